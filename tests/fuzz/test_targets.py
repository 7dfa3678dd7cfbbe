"""The corpus through the targets, without a fuzzer: neither rots, and what is wrong with the core is noticed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz.run import SEEDS, arguments, main
from fuzz.targets import TARGETS, Config, opened
from nbdkitpy.protocol import handshake, messages
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.protocol.handshake import Handshake
from nbdkitpy.protocol.replies import SimpleReplies, StructuredReplies
from nbdkitpy.protocol.transmission import Request, Transmission
from nbdkitpy.server.commands import Commands

ROOT = Path(__file__).parent.parent.parent
MOST_CORPUS = 64 << 10  # bytes

Plant = Callable[[pytest.MonkeyPatch], None]


def seeds(target: str) -> list[Path]:
    return sorted(path for path in SEEDS[target].iterdir() if path.is_file())


def run(target: str) -> None:
    for path in seeds(target):
        TARGETS[target](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_corpus_shows_nothing_wrong(target: str) -> None:
    assert len(seeds(target)) > 15

    run(target)


def test_corpus_is_small() -> None:
    assert sum(path.stat().st_size for target in {*SEEDS.values()} for path in target.iterdir()) < MOST_CORPUS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("data", [b"", b"\0", bytes(4), b"\xff" * 100], ids=["nothing", "one", "config", "ones"])
def test_target_takes_any_bytes(target: str, data: bytes) -> None:
    TARGETS[target](data)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(TlsMode.REQUIRE, False, False, True, True, 6, 0, True, True, True, 0xFFFF),
        Config(TlsMode.ON, export=3, handshake_flags=1, extended=True, cuts=7),
    ],
)
def test_input_says_what_the_server_offers(config: Config) -> None:
    assert opened(config.pack() + b"stream") == (config, b"stream")


def test_fuzzer_is_given_seeds_that_are_there_and_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    for target in TARGETS:
        *options, found, seeds = arguments(target, 0.5)

        assert "-max_total_time=30" in options
        assert Path(found).is_dir()
        assert Path(seeds).is_dir()
        (dictionary,) = (option.removeprefix("-dict=") for option in options if option.startswith("-dict="))
        assert Path(dictionary).is_file()


def test_inputs_that_were_found_are_repeated_without_a_fuzzer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "found"
    path.write_bytes(seeds("conversation")[0].read_bytes())
    main(["conversation", str(path)])
    _mix_up_cookies(monkeypatch)
    path.write_bytes((SEEDS["conversation"] / "all-simple").read_bytes())

    with pytest.raises(AssertionError):
        main(["conversation", str(path)])


@pytest.mark.parametrize("words", [[], ["everything"]])
def test_what_is_no_target_is_told_what_there_is(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="handshake,transmission,conversation,session"):
        main(words)


def test_without_the_fuzzer_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)

    with pytest.raises(SystemExit, match="Atheris is not installed"):
        main(["handshake", "1"])


# --- faults that are planted in the core ---


def _keep_what_was_agreed_before_tls(patch: pytest.MonkeyPatch) -> None:
    forget = Handshake._forget

    def forget_less(self: Handshake) -> None:
        structured_replies = getattr(self, "_structured_replies", False)
        forget(self)
        self._structured_replies = structured_replies

    patch.setattr(Handshake, "_forget", forget_less)


def _believe_announced_lengths(patch: pytest.MonkeyPatch) -> None:
    await_payload = Transmission._await_payload

    def provide_for_it(self: Transmission, request: Request, body: int) -> None:
        await_payload(self, request, body)
        self._own_buffer = memoryview(bytearray(request.length))

    patch.setattr(Transmission, "_await_payload", provide_for_it)


def _keep_what_does_not_matter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Handshake, "_skip_data", lambda self: len(self._buffer) >= self._length and Handshake._read_data(self)
    )
    patch.setattr(Handshake, "_STEPS", {**Handshake._STEPS, handshake._State.SKIP: Handshake._skip_data})


def _forget_to_skip(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transmission, "_payload_size", lambda self, request: 0)


def _fragment_in_spite_of_df(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Commands, "may_have_holes", lambda self, request: self.sparse is not None)


def _mix_up_cookies(patch: pytest.MonkeyPatch) -> None:
    success = SimpleReplies.success
    patch.setattr(SimpleReplies, "success", lambda self, cookie, offset: success(self, cookie ^ 1 << 40, offset))


def _say_wrong_offsets(patch: pytest.MonkeyPatch) -> None:
    hole = StructuredReplies.hole
    patch.setattr(
        StructuredReplies,
        "hole",
        lambda self, cookie, offset, start, length: hole(self, cookie, offset, start + 1, length),
    )


def _believe_counts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(messages, "MAX_QUERIES", 1)


def _let_clear_text_in(patch: pytest.MonkeyPatch) -> None:
    fail = Handshake._fail

    def let_in(self: Handshake, message: str) -> None:
        if "behind STARTTLS" not in message:
            fail(self, message)

    patch.setattr(Handshake, "_fail", let_in)


@pytest.mark.parametrize(
    ("target", "plant"),
    [
        ("handshake", _keep_what_was_agreed_before_tls),
        ("handshake", _keep_what_does_not_matter),
        ("handshake", _believe_counts),
        ("handshake", _let_clear_text_in),
        ("transmission", _believe_announced_lengths),
        ("transmission", _forget_to_skip),
        ("session", _fragment_in_spite_of_df),
        ("conversation", _mix_up_cookies),
        ("conversation", _say_wrong_offsets),
        ("session", _mix_up_cookies),
        ("session", _say_wrong_offsets),
        ("session", _let_clear_text_in),
        ("session", _forget_to_skip),
    ],
)
def test_planted_fault_is_found_by_the_corpus_alone(monkeypatch: pytest.MonkeyPatch, target: str, plant: Plant) -> None:
    plant(monkeypatch)

    with pytest.raises(AssertionError):
        run(target)

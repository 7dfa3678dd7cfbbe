"""The delay filter: waits as long as it is told to, and never does late what nobody waits for any more."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError, Filter, Flags, Handle
from nbdkitpy.backend import VERBS
from nbdkitpy.protocol.constants import Command
from nbdkitpy_filters.delay import Delay, register_filters
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE
from tests.recorder import Recorder, configured, request

#: Parameters, and the verbs that each delays.
DELAYS = {
    "delay-read": {"pread"},
    "rdelay": {"pread"},
    "delay-write": {"pwrite"},
    "delay-zero": {"zero"},
    "delay-trim": {"trim"},
    "wdelay": {"pwrite", "zero", "trim"},
    "delay-extents": {"extents"},
    "delay-cache": {"cache"},
}


class Clock:
    """Notes how long it was asked to wait, and does not."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.is_over = False

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        if self.is_over:
            raise OSError(errno.ESHUTDOWN, "gone")

    def take(self) -> list[float]:
        """The waits since the last time."""
        waits, self.waits = self.waits, []
        return waits


def opened(*words: str) -> tuple[Handle, Recorder, Clock]:
    stack, clock = configured(Delay(), *words), Clock()
    assert isinstance(stack.plugin, Recorder)
    return stack.open("", False, Client(1, sleep=clock.sleep)).handle, stack.plugin, clock


# --- which requests, and for how long ---


@pytest.mark.parametrize("parameter", DELAYS)
def test_delays_the_verbs_of_the_parameter_and_no_other(parameter: str) -> None:
    handle, plugin, clock = opened(f"{parameter}=100ms")

    delayed = set()
    for verb in VERBS:
        request(handle, verb)
        waits = clock.take()
        assert waits in ([], [0.1])
        delayed |= {verb} if waits else set()

    assert delayed == DELAYS[parameter]
    assert [call[0] for call in plugin.requests] == list(VERBS)


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        (["wdelay=4", "delay-zero=2"], {"pwrite": 4, "zero": 2, "trim": 4}),
        (["delay-zero=2", "wdelay=4"], {"pwrite": 4, "zero": 4, "trim": 4}),
        (["delay-read=1", "rdelay=3"], {"pread": 3}),
        (["rdelay=3", "delay-read=1"], {"pread": 1}),
        (["delay-read=1.2us"], {"pread": 1.2e-6}),
    ],
)
def test_what_is_given_last_counts(words: list[str], waits: dict[str, float]) -> None:
    handle, _, clock = opened(*words)

    for verb, seconds in waits.items():
        request(handle, verb)
        assert clock.take() == [pytest.approx(seconds)]


def test_without_parameters_everything_goes_past_the_filter() -> None:
    handle, _, _ = opened()

    assert all(getattr(handle, verb).__self__ is not handle for verb in VERBS)
    assert handle.pread_into is not None
    assert handle.sparse


def test_delayed_writes_leave_the_shortcuts_of_reads() -> None:
    handle, _, _ = opened("wdelay=1")

    assert handle.file_range is not None
    assert handle.sparse
    assert "pread" in handle.inline
    assert "pwrite" not in handle.inline


def test_delayed_reads_have_no_shortcuts() -> None:
    handle, _, _ = opened("rdelay=1")

    assert (handle.pread_into, handle.file_range, handle.sparse) == (None, None, False)


def test_delayed_block_status_does_not_delay_reads() -> None:
    handle, _, _ = opened("delay-extents=1")

    assert not handle.sparse
    assert handle.file_range is not None


# --- opening and closing ---


def test_opening_waits_before_the_plugin_opens() -> None:
    stack, clock = configured(Delay(), "delay-open=5"), Clock()
    assert isinstance(stack.plugin, Recorder)
    clock.is_over = True

    with pytest.raises(OSError, match="gone"):
        stack.open("", False, Client(1, sleep=clock.sleep))

    assert clock.waits == [5]
    assert stack.plugin.calls == []


@pytest.mark.parametrize("is_over", [False, True])
def test_closing_waits_and_closes_however_the_wait_ends(is_over: bool) -> None:
    handle, plugin, clock = opened("delay-close=5")
    clock.is_over = is_over

    handle.close()

    assert clock.waits == [5]
    assert plugin.calls[-1] == ("close", 1)


# --- fast zeroes ---


def test_fast_zero_is_delayed_like_any_other() -> None:
    handle, plugin, clock = opened("delay-zero=2")

    handle.zero(512, 0, Flags.FAST_ZERO)

    assert clock.waits == [2]
    assert plugin.requests == [("zero", 512, 0, Flags.FAST_ZERO)]


def test_refused_fast_zero_fails_at_once_and_others_wait() -> None:
    handle, plugin, clock = opened("delay-zero=2", "delay-fast-zero=false")

    with pytest.raises(OSError, match="fast zeroes are refused") as raised:
        handle.zero(512, 0, Flags.FAST_ZERO)
    assert (raised.value.errno, clock.waits, plugin.requests) == (errno.ENOTSUP, [], [])

    handle.zero(512, 0, Flags.NONE)
    assert clock.waits == [2]


def test_fast_zeroes_are_not_refused_where_zeroes_are_not_delayed() -> None:
    handle, plugin, _ = opened("delay-fast-zero=false")

    handle.zero(512, 0, Flags.FAST_ZERO)

    assert plugin.requests == [("zero", 512, 0, Flags.FAST_ZERO)]


@pytest.mark.parametrize(
    ("words", "offered"),
    [([], False), (["delay-fast-zero=false"], False), (["delay-fast-zero=false", "wdelay=1"], True)],
)
def test_refused_fast_zeroes_are_offered(words: list[str], offered: bool) -> None:
    plugin = Recorder()
    plugin.lacks = frozenset({"can_fast_zero"})
    stack = configured(Delay(), *words, plugin=plugin)

    assert stack.open("", False, Client(1)).capabilities.can_fast_zero is offered


# --- the trigger ---


def test_delays_only_while_the_trigger_exists(tmp_path: Path) -> None:
    trigger = tmp_path / "trigger"
    handle, _, clock = opened("rdelay=1", f"delay-trigger={trigger}")

    request(handle, "pread")
    assert clock.take() == []

    trigger.touch()
    request(handle, "pread")
    assert clock.take() == [1]

    trigger.unlink()
    request(handle, "pread")
    assert clock.take() == []


# --- what has been given up ---


@pytest.mark.parametrize("verb", sorted(set(VERBS) - {"flush"}))
def test_request_of_a_client_that_is_gone_is_not_carried_out(verb: str) -> None:
    handle, plugin, clock = opened("rdelay=1", "wdelay=1", "delay-extents=1", "delay-cache=1")
    clock.is_over = True

    with pytest.raises(OSError, match="gone") as raised:
        request(handle, verb)

    assert raised.value.errno == errno.ESHUTDOWN
    assert plugin.requests == []


@pytest.mark.parametrize("threads", [1, 16])
def test_delayed_write_of_a_dead_connection_does_not_destroy_newer_data(
    start_server: StartServer, tmp_path: Path, threads: int
) -> None:
    trigger, waiting, plugin = tmp_path / "trigger", threading.Event(), Recorder()
    delay = Noticing(waiting)
    for key, value in (("wdelay", "3600"), ("delay-trigger", str(trigger))):
        delay.config(key, value)
    running = start_server(plugin, delay, threads=threads)
    trigger.touch()

    old = running.connect()
    old.send(Command.WRITE, 0, data=b"old")
    assert waiting.wait(PATIENCE)
    old.socket.close()
    running.wait_for_sessions(0)
    trigger.unlink()
    with running.connect() as new:
        new.write(0, b"newer")

    assert plugin.requests == [("pwrite", 5, 0, 0)]


def test_S3_server_ends_although_requests_and_clients_are_delayed(start_server: StartServer) -> None:
    waiting = threading.Event()
    delay = Noticing(waiting)
    delay.config("rdelay", "3600")
    delay.config("delay-close", "3600")
    running = start_server(Recorder(), delay, drain=float(PATIENCE))
    client = running.connect()
    client.send(Command.READ, 0, 512)
    assert waiting.wait(PATIENCE)

    assert running.stop()

    assert client.reply().error == errno.ESHUTDOWN


class Noticing(Delay):
    """Tells when somebody begins to wait."""

    def __init__(self, waiting: threading.Event) -> None:
        super().__init__()
        self._waiting = waiting

    def wait(self, client: Client, seconds: float) -> None:
        if self.is_on() and seconds:
            self._waiting.set()
        super().wait(client, seconds)


# --- odds and ends ---


@pytest.mark.parametrize(
    "word", ["delay-read=x", "wdelay=-1", "delay-fast-zero=maybe", "delay-open=", "delay-trigger="]
)
def test_what_is_no_value_is_a_configuration_error(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^delay: {word.partition('=')[0]} must be"):
        configured(Delay(), word)


def test_unknown_parameters_are_for_other_layers() -> None:
    assert not Delay().config("delay", "1")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Delay]

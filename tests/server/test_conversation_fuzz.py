"""Whole conversations with the real server, whole or spoilt: it keeps to the protocol, harms nobody, leaves nothing."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fuzz import targets
from fuzz.targets import EXPORTS, Config, disks
from nbdkitpy.protocol.constants import Option, TlsMode
from nbdkitpy.server.credentials import certificates_context
from nbdkitpy.server.tls import Tls
from tests.conftest import StartServer
from tests.fuzzing import streams
from tests.fuzzing.answers import Output, ReplyReader, read_answers, read_greeting
from tests.fuzzing.effort import Tally, fuzz
from tests.fuzzing.exchange import exchange
from tests.fuzzing.model import ConversationModel, Disk, Terms, unordered
from tests.fuzzing.shelf import Manner, Shelf
from tests.nbdclient import PATIENCE, Style
from tests.serving import Running, join_others, open_descriptors

CONVERSATIONS = streams.conversations()
HOSTILE = st.one_of(CONVERSATIONS, streams.spoilt(CONVERSATIONS))
CUTS = st.integers(0, 0xFFFF)
CONFIGS = st.builds(
    Config,
    tls=st.sampled_from([TlsMode.OFF] * 6 + [TlsMode.ON, TlsMode.REQUIRE]),
    structured_replies=st.sampled_from([True] * 8 + [False]),
    meta_contexts=st.sampled_from([True] * 8 + [False]),
    filled=st.sampled_from([False] * 9 + [True]),
    rests=st.booleans(),
    export=st.just(0),
    structured=st.just(False),
    extended=st.booleans(),
    contexts=st.just(False),
    handshake_flags=st.sampled_from([3] * 17 + [1, 2, 0]),
    cuts=CUTS,
)


# --- without sockets ---


def test_core_answers_whole_and_spoilt_conversations_as_the_model_says(tally: Tally) -> None:
    @fuzz(300)
    @given(CONFIGS, HOSTILE)
    def check(config: Config, stream: bytes) -> None:
        tally["conversations with the core"] += 1
        targets.conversation(config.pack() + stream)

    check()


def test_session_answers_whole_and_spoilt_conversations_as_the_model_says(tally: Tally) -> None:
    @fuzz(800)
    @given(CONFIGS, HOSTILE)
    def check(config: Config, stream: bytes) -> None:
        tally["conversations with a session"] += 1
        targets.session(config.pack() + stream)

    check()


# --- with sockets, and a bystander ---

#: What the bystander reads and writes; nobody else opens it.
ITS_OWN = "bystander"
SHELF = {**EXPORTS, ITS_OWN: EXPORTS["disk"]._replace(name=ITS_OWN)}


def all_disks() -> dict[str, Disk]:
    return {**disks(), ITS_OWN: Disk(bytes(1 << 16))}


class Bystander:
    """A client to which nothing may happen, whatever others do."""

    def __init__(self, running: Running) -> None:
        self._client = running.connect(Style.STRUCTURED, name=ITS_OWN)
        self._turn = 0

    def is_served(self) -> None:
        self._turn += 1
        data = self._turn.to_bytes(4, "big") * 128
        self._client.write(self._turn % 100 * 512, data)
        assert self._client.read(self._turn % 100 * 512, 512) == data


class Scene:
    """A server with a bystander; each conversation begins with the disks as they are at the beginning.

    Args:
        start_server: The fixture.
        manner: Of the plugin's handles.
        tls: What takes clients over to TLS, if any.
    """

    def __init__(self, start_server: StartServer, manner: Manner, tls: Tls | None = None) -> None:
        self.shelf = Shelf(SHELF, all_disks(), manner)
        self.running = start_server(self.shelf, begin=False)
        self.running.server.tls = tls
        self.running.begin()
        self._manner = manner
        self._bystander = Bystander(self.running)
        self._bystander.is_served()
        self._threads = threading.enumerate()
        self._descriptors = open_descriptors()

    def converse(self, stream: bytes, cuts: Sequence[int], context: ssl.SSLContext | None = None) -> None:
        """Have a client say this, and check all that comes back."""
        self.shelf.restore(all_disks())
        mode = TlsMode.OFF if context is None else TlsMode.ON
        listed = [(name, export.description or "") for name, export in SHELF.items()]
        model = ConversationModel(Terms(SHELF, listed, mode), all_disks())
        client = self.running.dial()
        output = b""
        if context is not None:
            client.greet()
            assert client.option(Option.STARTTLS) == []
            model.hear(b"\0\0\0\3" + streams.option(Option.STARTTLS))
            model.answers.clear()
        output = exchange(client.socket, streams.split(stream, cuts), context)
        client.socket.close()
        model.hear(stream)
        self._check(Output(output), model, greeted=context is not None)
        self._wait_until_it_has_left()
        self._bystander.is_served()

    def _check(self, output: Output, model: ConversationModel, *, greeted: bool) -> None:
        if not greeted:
            read_greeting(output, 3)
        read_answers(output, model.answers)
        if model.agreement is not None:
            reader = ReplyReader(model.agreement.style)
            for expected in model.replies if self._manner is Manner.INLINE else unordered(model.replies):
                reader.expect(expected)
            reader.read(output)
            assert not reader.unanswered, "some requests have no reply"
            if self._manner is not Manner.WORKERS:
                assert self.shelf.content(model.handshake.export_name) == model.disk.content
        assert not output, "something is behind the answers"

    def leave(self, stream: bytes, cuts: Sequence[int]) -> None:
        """Have a client say this, and be gone."""
        client = self.running.dial()
        with contextlib.suppress(OSError):
            for piece in streams.split(stream, cuts):
                client.socket.sendall(piece)
        client.reset()
        self._wait_until_it_has_left()
        self._bystander.is_served()

    def _wait_until_it_has_left(self) -> None:
        # Not until there is one session: the server may not have accepted the client yet.
        assert self.running.server.ends.acquire(timeout=PATIENCE), "the session has not ended"
        assert len(self.running.sessions()) == 1

    def nothing_is_left(self) -> None:
        """See that all is as it was before the first conversation."""
        assert self.shelf.open_handles == 1  # the bystander's
        join_others(self._threads)
        assert open_descriptors() == self._descriptors


@pytest.fixture
def tracebacks(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [record.getMessage() for record in caplog.records if record.exc_info]


Tracebacks = Callable[[], list[str]]
PLACES = st.lists(st.integers(0, 1 << 20), max_size=6)


@pytest.mark.parametrize("manner", Manner)
def test_hostile_clients_get_what_the_protocol_says_and_harm_nobody(
    start_server: StartServer, tally: Tally, tracebacks: Tracebacks, manner: Manner
) -> None:
    scene = Scene(start_server, manner)

    @fuzz(120)
    @given(HOSTILE, PLACES)
    def check(stream: bytes, cuts: list[int]) -> None:
        tally["conversations over sockets"] += 1
        if manner is Manner.WORKERS:
            assume(has_no_cookie_twice(stream))
        scene.converse(stream, cuts)

    check()

    scene.nothing_is_left()
    assert tracebacks() == []


def has_no_cookie_twice(stream: bytes) -> bool:
    """Else which reply is to which request cannot be told, if they may come in any order."""
    model = ConversationModel(Terms(SHELF), all_disks())
    model.hear(stream)
    cookies = [reply.request.cookie for reply in model.replies]
    return len(cookies) == len(set(cookies))


@pytest.mark.parametrize("manner", Manner)
def test_clients_that_vanish_in_the_middle_harm_nobody(
    start_server: StartServer, tally: Tally, tracebacks: Tracebacks, manner: Manner
) -> None:
    scene = Scene(start_server, manner)

    @fuzz(60)
    @given(HOSTILE, PLACES)
    def check(stream: bytes, cuts: list[int]) -> None:
        tally["conversations broken off"] += 1
        scene.leave(stream, cuts)

    check()

    scene.nothing_is_left()
    assert tracebacks() == []


def test_hostile_clients_within_tls_get_what_the_protocol_says_and_harm_nobody(
    start_server: StartServer, tally: Tally, tracebacks: Tracebacks, certificates: Path
) -> None:
    contexts = Tls(TlsMode.ON, lambda: certificates_context(str(certificates), None, verify_peer=False), {})
    scene = Scene(start_server, Manner.FILE, contexts)
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
    within = streams.conversations(first=b"")

    @fuzz(60)
    @given(within | streams.spoilt(within), PLACES)
    def check(stream: bytes, cuts: list[int]) -> None:
        tally["conversations over TLS"] += 1
        scene.converse(stream, cuts, context)

    check()

    scene.nothing_is_left()
    assert tracebacks() == []


def test_noise_in_place_of_tls_harms_nobody(
    start_server: StartServer, tally: Tally, tracebacks: Tracebacks, certificates: Path
) -> None:
    tls = Tls(TlsMode.ON, lambda: certificates_context(str(certificates), None, verify_peer=False), {})
    scene = Scene(start_server, Manner.INLINE, tls)

    @fuzz(60)
    @given(st.binary(max_size=600), st.sampled_from([b"", bytes.fromhex("1603010200010001fc0303")]), PLACES)
    def check(noise: bytes, hello: bytes, cuts: list[int]) -> None:
        tally["conversations broken off"] += 1
        scene.leave(b"\0\0\0\3" + streams.option(Option.STARTTLS) + hello + noise, [20, *cuts])

    check()

    scene.nothing_is_left()
    assert tracebacks() == []

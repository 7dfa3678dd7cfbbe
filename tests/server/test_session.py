"""A session: one client from the accepted socket to the closed one, whatever client and backend do."""

from __future__ import annotations

import errno
import gc
import logging
import struct
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nbdkitpy import BlockSize, Client, Export, Filter, FilterHandle, Handle, Support, ThreadModel
from nbdkitpy.protocol.constants import Command, HandshakeFlag, InfoType, Option, OptionReply, TransmissionFlag
from nbdkitpy.protocol.handshake import Negotiated
from nbdkitpy.server.session import Session, transmission_flags
from nbdkitpy.stack import Capabilities
from tests.conftest import StartSession
from tests.nbdclient import PATIENCE, NbdClient, Refused, Style
from tests.serving import CONTENT, SIZE, Disk, Disks, Solo

STYLES = list(Style)


class Odd(BaseException):
    """Derived from nothing that anybody catches, and cannot be shown."""

    def __str__(self) -> str:
        raise SystemExit(3)


#: What a unit may raise, and what the client is told of it.
FAILURES: list[tuple[BaseException, str]] = [
    (OSError(errno.ENOENT, "there is no such disk"), "there is no such disk"),
    (OSError("no number"), "the export cannot be opened"),
    (OSError(5, 5), "the export cannot be opened"),
    (ValueError("internal"), "the export cannot be opened"),
    (MemoryError(), "the export cannot be opened"),
    (SystemExit(1), "the export cannot be opened"),
    (KeyboardInterrupt(), "the export cannot be opened"),
    (GeneratorExit(), "the export cannot be opened"),
    (Odd(), "the export cannot be opened"),
]
RAISED = pytest.mark.parametrize("error", [error for error, _ in FAILURES], ids=lambda error: type(error).__name__)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.DEBUG, "nbdkitpy")

    def texts() -> list[str]:
        return [record.getMessage() for record in caplog.records]

    return texts


Messages = Callable[[], list[str]]


# --- preconnect ---


class Refusing(Filter):
    """Refuses every client."""

    name = "refusing"

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def preconnect(self, client: Client, readonly: bool) -> None:
        raise self._error


def test_a_client_that_is_refused_gets_no_byte(start_session: StartSession, messages: Messages) -> None:
    plugin = Disks()

    solo = start_session(plugin, Refusing(OSError(errno.EACCES, "not you")))

    assert solo.client.at_end()
    solo.join()
    assert plugin.opened == 0
    (line,) = [text for text in messages() if "refused" in text]
    assert line.startswith("disks[1]: connection 1 (unix pid=")
    assert line.endswith(": refused: not you")


@RAISED
def test_G1_N6_whatever_is_raised_before_the_greeting_ends_the_connection_only(
    error: BaseException, start_session: StartSession
) -> None:
    solo = start_session(None, Refusing(error))

    assert solo.client.at_end()


# --- handshake ---


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.value)
def test_an_export_can_be_opened_and_read(style: Style, start_session: StartSession) -> None:
    solo = start_session()

    solo.client.negotiate(style)

    assert solo.client.size == SIZE
    assert solo.client.flags & TransmissionFlag.READ_ONLY
    assert bool(solo.client.flags & TransmissionFlag.SEND_DF) == (style is not Style.SIMPLE)
    assert solo.client.read(4096, 100) == CONTENT[4096:4196]
    assert solo.established.is_set()


def test_requests_that_come_right_behind_go_are_served(start_session: StartSession) -> None:
    client = start_session().client
    client.greet()
    with client.batched():
        client.send_option(Option.GO, b"\0" * 6)
        first = client.send(Command.READ, 0, 512)
        second = client.send(Command.READ, 512, 512)

    client.option_answers(Option.GO)

    replies = client.replies(2)
    assert (replies[first].data, replies[second].data) == (CONTENT[:512], CONTENT[512:1024])


@pytest.mark.parametrize("no_zeroes", [False, True])
def test_N10_export_name_opens_an_export_as_well(no_zeroes: bool, start_session: StartSession) -> None:
    client = start_session().client
    client.greet(3 if no_zeroes else 1)

    client.send_option(Option.EXPORT_NAME)

    answer = client.receive_bytes(10 if no_zeroes else 134)
    assert int.from_bytes(answer[:8], "big") == SIZE
    assert not any(answer[10:])
    assert client.read(0, 10) == CONTENT[:10]


def test_N5_info_closes_the_export_again(start_session: StartSession) -> None:
    plugin = Disks()
    client = start_session(plugin).client
    client.greet()

    client.go(option=Option.INFO)
    assert (plugin.opened, plugin.closed) == (1, 1)
    client.go()

    assert (plugin.opened, plugin.closed) == (2, 1)


class Described(Disk):
    def export_description(self) -> str:
        return "for tests"

    def block_size(self) -> BlockSize:
        return BlockSize(512, 4096, 1 << 20)


def test_the_client_is_told_what_it_asks_for(start_session: StartSession) -> None:
    client = start_session(Disks(Described)).client
    client.greet()

    told = client.go("disk", InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)

    assert told == {
        InfoType.NAME: b"disk",
        InfoType.DESCRIPTION: b"for tests",
        InfoType.BLOCK_SIZE: bytes.fromhex("00000200 00001000 00100000"),
    }
    assert client.call(Command.READ, 1, 512).error == 22  # the minimum counts


def test_a_probe_and_its_name_reach_the_backend(start_session: StartSession) -> None:
    seen: list[tuple[str, bool, bool]] = []

    class Watching(Filter):
        name = "watching"

        def default_export(self, client: Client, readonly: bool) -> str:
            return "standard"

        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            seen.append((export_name, readonly, client.is_probe))
            return super().open(export_name, readonly, client)

    client = start_session(None, Watching(), readonly=True).client
    client.greet()

    client.go("other", option=Option.INFO)
    told = client.go("", InfoType.NAME)

    assert seen == [("other", True, True), ("standard", True, False)]
    assert told[InfoType.NAME] == b"standard"


@pytest.mark.parametrize(("error", "text"), FAILURES, ids=lambda value: type(value).__name__)
def test_an_export_that_cannot_be_opened_is_refused_and_the_handshake_goes_on(
    error: BaseException, text: str, start_session: StartSession
) -> None:
    plugin = Disks(failing(error))  # type: ignore[arg-type]
    client = start_session(plugin).client
    client.greet()

    for _ in range(2):
        with pytest.raises(Refused) as caught:
            client.go()
        assert (caught.value.reply, caught.value.text) == (OptionReply.ERR_UNKNOWN, text)
    plugin._handle = Disk
    client.go()

    assert client.read(0, 10) == CONTENT[:10]


class Undescribed(Disk):
    def export_description(self) -> str:
        raise ValueError("broken")


def test_G7_what_fails_after_the_opening_closes_the_export(start_session: StartSession) -> None:
    plugin = Disks(Undescribed)
    solo = start_session(plugin)
    solo.client.greet()

    with pytest.raises(Refused):
        solo.client.go("", InfoType.DESCRIPTION)

    assert (plugin.opened, plugin.closed) == (1, 1)
    solo.finish()
    assert (plugin.opened, plugin.closed) == (1, 1)


def test_N10_export_name_has_no_way_to_refuse_but_to_hang_up(start_session: StartSession, messages: Messages) -> None:
    plugin = Disks(failing(OSError(errno.ENOENT, "nothing here")))  # type: ignore[arg-type]
    solo = start_session(plugin)
    solo.client.greet()

    solo.client.send_option(Option.EXPORT_NAME, b"x\x1b")

    assert solo.client.at_end()
    solo.join()
    (line,) = [text for text in messages() if "nothing here" in text]
    assert "EXPORT_NAME" in line
    assert "\x1b" not in line


def test_F5_a_refusal_shows_the_name_so_that_no_terminal_acts_on_it(
    start_session: StartSession, messages: Messages
) -> None:
    client = start_session(Disks(failing(OSError(errno.ENOENT, "nothing here")))).client  # type: ignore[arg-type]
    client.greet()

    with pytest.raises(Refused):
        client.go("a\nb\x1b")

    assert r'disks[1]: cannot open export "a\nb\x1b": [Errno 2] nothing here' in messages()


def test_the_exports_are_listed(start_session: StartSession) -> None:
    client = start_session().client
    client.greet()

    assert client.exports() == [""]


class Listing(Disks):
    """Lists whatever it is told."""

    def __init__(self, answer: Callable[[], Iterable[Export]]) -> None:
        super().__init__()
        self.answer = answer

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return self.answer()


@RAISED
def test_a_list_that_fails_is_refused_and_the_handshake_goes_on(
    error: BaseException, start_session: StartSession
) -> None:
    client = start_session(Listing(failing(error))).client  # type: ignore[arg-type]
    client.greet()

    with pytest.raises(Refused) as caught:
        client.exports()
    assert caught.value.reply is OptionReply.ERR_PLATFORM
    client.go()

    assert client.read(0, 10) == CONTENT[:10]


def test_a_long_list_is_sent_before_the_next_one_is_made(start_session: StartSession) -> None:
    """A client that asks for many and reads none cannot have them pile up in memory."""
    made: list[int] = []
    received = 0
    size = 4 << 20

    def four_megabytes() -> list[Export]:
        made.append(received)
        return [Export(f"{number:04}" + "x" * 1020) for number in range(size >> 10)]

    client = start_session(Listing(four_megabytes)).client
    client.greet()
    with client.batched():
        for _ in range(5):
            client.send_option(Option.LIST)

    for _ in range(5):
        received += sum(len(answer.data) for answer in client.option_answers(Option.LIST))

    # A socket holds two megabytes at most; that a list was begun means that the one before it had left us.
    assert all(got >= (number - 1) * size for number, got in enumerate(made)), made


@pytest.mark.parametrize("flags", [0, int(HandshakeFlag.FIXED_NEWSTYLE)])
def test_the_greeting_offers_what_the_options_say(flags: int, start_session: StartSession) -> None:
    assert start_session(handshake_flags=flags).client.greet(0) == flags


@pytest.mark.parametrize(
    ("option", "setting"),
    [(Option.STRUCTURED_REPLY, "structured_replies"), (Option.LIST_META_CONTEXT, "meta_contexts")],
)
def test_what_is_switched_off_is_not_supported(option: Option, setting: str, start_session: StartSession) -> None:
    options: dict[str, Any] = {setting: False}
    client = start_session(**options).client
    client.greet()

    with pytest.raises(Refused) as caught:
        client.option(option)

    assert caught.value.reply is OptionReply.ERR_UNSUP


class Leaving(Disks):
    """Keeps the client of the last handle."""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.client = client
        return super().open(export_name, readonly, client)


def test_a_backend_can_disconnect_its_client_at_once(start_session: StartSession) -> None:
    plugin = Leaving()
    solo = start_session(plugin)
    solo.client.negotiate()

    plugin.client.disconnect(True)

    assert solo.client.at_end()
    solo.join()


def test_a_backend_can_have_further_requests_of_its_client_refused(start_session: StartSession) -> None:
    plugin = Leaving()
    solo = start_session(plugin)
    solo.client.negotiate()
    solo.client.read(0, 512)

    plugin.client.disconnect(False)
    solo.client.send(Command.READ, 0, 512)

    assert solo.client.reply().error == errno.ESHUTDOWN


@pytest.mark.parametrize("force", [True, False])
def test_a_backend_can_disconnect_its_client_while_it_opens(force: bool, start_session: StartSession) -> None:
    class Refusing(Disks):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            client.disconnect(force)
            return super().open(export_name, readonly, client)

    plugin = Refusing()
    solo = start_session(plugin)
    solo.client.greet()
    solo.client.send_option(Option.GO, b"\0" * 6)

    solo.join()

    assert plugin.opened == plugin.closed == 1


def test_who_keeps_a_client_does_not_keep_its_session(start_session: StartSession) -> None:
    one = start_session(begin=False).session  # for what a session is made of
    session = Session(one._connection, Client(1), one._stack, one._options, one._log, lambda session: None)
    client, reference = session._client, weakref.ref(session)

    del session

    assert reference() is None
    client.disconnect(True)
    Client(1).disconnect(True)  # as in the tests of authors: there is no connection


def test_abort_is_answered_and_ends_the_session(start_session: StartSession) -> None:
    plugin = Disks()
    solo = start_session(plugin)
    solo.client.greet()

    assert solo.client.option(Option.ABORT) == []

    assert solo.client.at_end()
    solo.join()
    assert plugin.opened == 0
    assert not solo.established.is_set()


# --- oldstyle ---


def test_an_oldstyle_client_is_served_at_once(start_session: StartSession) -> None:
    solo = start_session(oldstyle=True)

    client = solo.client.expect_oldstyle()

    assert client.size == SIZE
    assert client.read(0, 10) == CONTENT[:10]
    assert solo.established.is_set()


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "locked"), ValueError("broken")])
def test_without_an_export_an_oldstyle_client_gets_no_byte(
    error: BaseException, start_session: StartSession, messages: Messages
) -> None:
    plugin = Disks(failing(error))  # type: ignore[arg-type]

    solo = start_session(plugin, oldstyle=True)

    assert solo.client.at_end()
    solo.join()
    assert any("the export was not opened" in text for text in messages())
    assert not any("connection lost" in text for text in messages())


# --- the ways out ---


def vanish(client: NbdClient) -> None:
    client.reset()


def say_goodbye(client: NbdClient) -> None:
    client.send(Command.DISC)
    assert client.at_end()


def send_rubbish(client: NbdClient) -> None:
    client.send_bytes(b"rubbish" * 10)
    assert client.at_end()


def leave_in_a_header(client: NbdClient) -> None:
    client.send_bytes(b"\x25\x60\x95\x13")
    client.reset()


def leave_half_open(client: NbdClient) -> None:
    client.socket.shutdown(1)
    assert client.at_end()


WAYS_OUT = [vanish, say_goodbye, send_rubbish, leave_in_a_header, leave_half_open]


@pytest.mark.parametrize("model", list(ThreadModel), ids=lambda model: model.name.lower())
@pytest.mark.parametrize("leave", WAYS_OUT, ids=lambda leave: leave.__name__)
def test_G7_an_export_is_closed_once_however_the_client_leaves(
    leave: Callable[[NbdClient], None], model: ThreadModel, start_session: StartSession
) -> None:
    plugin = Disks(model=model)
    solo = start_session(plugin)
    solo.client.negotiate()

    leave(solo.client)

    solo.join()
    assert (plugin.opened, plugin.closed) == (1, 1)


@pytest.mark.parametrize("leave", [vanish, leave_half_open], ids=lambda leave: leave.__name__)
def test_a_client_that_leaves_during_the_handshake_is_let_go(
    leave: Callable[[NbdClient], None], start_session: StartSession
) -> None:
    plugin = Disks()
    solo = start_session(plugin)
    solo.client.greet()

    leave(solo.client)

    solo.join()
    assert plugin.opened == 0


def test_a_client_that_has_gone_before_its_export_is_open_does_not_keep_it_open(start_session: StartSession) -> None:
    opening, go_on = threading.Event(), threading.Event()

    class Slow(Disk):
        def __init__(self, plugin: Disks) -> None:
            super().__init__(plugin)
            opening.set()
            assert go_on.wait(PATIENCE)

    plugin = Disks(Slow)
    solo = start_session(plugin)
    solo.client.greet()
    solo.client.send_option(Option.GO, b"\0" * 6)
    assert opening.wait(PATIENCE)
    assert solo.session.waits_for_backend

    solo.client.reset()
    go_on.set()

    solo.join()
    assert (plugin.opened, plugin.closed) == (1, 1)
    assert not solo.session.waits_for_backend


@pytest.mark.parametrize("phase", ["before", "handshake", "transmission"])
def test_a_session_can_be_aborted_in_every_phase(phase: str, start_session: StartSession) -> None:
    plugin = Disks()
    solo = in_phase(phase, plugin, start_session)

    solo.session.abort()

    assert solo.client.at_end()
    solo.join()
    assert plugin.opened == plugin.closed == (phase == "transmission")


@pytest.mark.parametrize("phase", ["handshake", "transmission"])
def test_a_session_can_be_stopped_in_every_phase(phase: str, start_session: StartSession) -> None:
    plugin = Disks()
    solo = in_phase(phase, plugin, start_session)

    solo.session.stop()

    assert solo.client.at_end()
    solo.join()
    assert plugin.opened == plugin.closed == (phase == "transmission")


def in_phase(phase: str, plugin: Disks, start_session: StartSession) -> Solo:
    solo = start_session(plugin)
    if phase == "handshake":
        solo.client.greet()
        assert solo.client.exports()
    elif phase == "transmission":
        solo.client.negotiate()
    else:
        solo.client.receive_bytes(18)
    return solo


def test_options_after_the_stop_are_refused(start_session: StartSession) -> None:
    solo = start_session(begin=False)
    solo.client.send_bytes(b"\0\0\0\3" + b"IHAVEOPT" + bytes([0, 0, 0, 3, 0, 0, 0, 0]))
    solo.session.stop()

    solo.begin()

    solo.client.receive_bytes(18)
    (answer,) = solo.client.option_answers(Option.LIST)
    assert answer.reply == OptionReply.ERR_SHUTDOWN
    assert solo.client.at_end()


def test_a_session_that_is_stopped_between_handshake_and_requests_refuses_these(start_session: StartSession) -> None:
    solo = start_session(begin=False)
    solo.session._established = lambda session: session.stop()
    solo.begin()
    client = solo.client
    client.greet()
    with client.batched():
        client.send_option(Option.GO, b"\0" * 6)
        client.send(Command.READ, 0, 512)

    client.option_answers(Option.GO)

    assert client.reply().error == 108
    assert client.at_end()


@RAISED
def test_G1_a_failure_to_close_is_logged_and_no_more(
    error: BaseException, start_session: StartSession, messages: Messages
) -> None:
    class Sticky(Disk):
        def close(self) -> None:
            raise error

    solo = start_session(Disks(Sticky))
    solo.client.negotiate()

    solo.client.disconnect()

    solo.join()
    assert any(text.startswith("disks[1]: closing the export: ") for text in messages())


def test_a_violation_is_one_line_in_the_log(start_session: StartSession, messages: Messages) -> None:
    solo = start_session()
    solo.client.negotiate()

    send_rubbish(solo.client)

    solo.join()
    (line,) = [text for text in messages() if "magic" in text]
    assert line.startswith("disks[1]: connection 1 (unix pid=")


def option(number: int, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data) if length is None else length) + data


@pytest.mark.parametrize(
    "violation",
    [b"no option at all", option(Option.EXPORT_NAME, b"a\0b"), option(99, length=1 << 30)],
    ids=["magic", "EXPORT_NAME", "length"],
)
def test_what_was_asked_before_a_violation_is_answered_and_logged(
    start_session: StartSession, messages: Messages, violation: bytes
) -> None:
    """Also if all of it has arrived at once."""
    solo = start_session()
    solo.client.greet()

    solo.client.send_bytes(option(Option.STRUCTURED_REPLY) + option(Option.LIST, b"data") + violation)

    assert solo.client.option_answers(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
    assert [answer.reply for answer in solo.client.option_answers(Option.LIST)] == [OptionReply.ERR_INVALID]
    assert solo.client.at_end()
    solo.join()
    assert [text for text in messages() if "option LIST" in text]


def test_being_cut_off_in_a_request_is_worth_a_line(start_session: StartSession, messages: Messages) -> None:
    solo = start_session()
    solo.client.negotiate()

    leave_in_a_header(solo.client)

    solo.join()
    assert "disks[1]: left in the middle of a request, which is dropped" in messages()


@pytest.mark.parametrize("leave", WAYS_OUT, ids=lambda leave: leave.__name__)
def test_what_a_connection_held_is_freed_at_once(
    leave: Callable[[NbdClient], None], start_session: StartSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers may have megabytes, and the garbage collector may be long in coming to an idle server."""
    monkeypatch.setattr(logging.getLogger("nbdkitpy"), "disabled", True)  # pytest keeps what is logged
    solo = start_session()
    solo.client.negotiate()
    solo.client.read(0, 512)
    engine = solo.session._engine
    assert engine is not None
    held: list[weakref.ref[object]] = [weakref.ref(each) for each in (engine, engine._transmission, engine._sender)]
    del engine
    gc.disable()
    try:
        leave(solo.client)
        solo.join()
        del solo.session._engine

        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


# --- what is offered ---

WRITABLE = Capabilities(
    size=SIZE,
    can_write=True,
    can_zero=Support.NONE,
    can_fast_zero=False,
    can_trim=False,
    can_fua=Support.NONE,
    can_flush=False,
    is_rotational=False,
    can_multi_conn=False,
    can_cache=Support.NONE,
    can_extents=False,
    block_size=None,
)
PLAIN = Negotiated(structured_replies=False, extended_headers=False, contexts=())


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"can_write": False}, TransmissionFlag.READ_ONLY),
        ({"can_flush": True}, TransmissionFlag.SEND_FLUSH),
        ({"can_fua": Support.EMULATE}, TransmissionFlag.SEND_FUA),
        ({"can_fua": Support.NATIVE}, TransmissionFlag.SEND_FUA),
        ({"is_rotational": True}, TransmissionFlag.ROTATIONAL),
        ({"can_trim": True}, TransmissionFlag.SEND_TRIM),
        ({"can_zero": Support.EMULATE}, TransmissionFlag.SEND_WRITE_ZEROES),
        ({"can_fast_zero": True}, TransmissionFlag.SEND_FAST_ZERO),
        ({"can_multi_conn": True}, TransmissionFlag.CAN_MULTI_CONN),
        ({"can_cache": Support.EMULATE}, TransmissionFlag.SEND_CACHE),
        ({"can_extents": True}, TransmissionFlag(0)),
    ],
    ids=str,
)
def test_each_capability_is_one_flag(change: dict[str, Any], flag: TransmissionFlag) -> None:
    capabilities = WRITABLE._replace(**change)

    assert transmission_flags(capabilities, PLAIN) == TransmissionFlag.HAS_FLAGS | flag


@pytest.mark.parametrize(
    ("negotiated", "flags"),
    [
        (Negotiated(True, False, ()), TransmissionFlag.SEND_DF),
        (Negotiated(True, False, ("base:allocation",)), TransmissionFlag.SEND_DF),
        (Negotiated(False, True, ()), TransmissionFlag.SEND_DF),
        (
            Negotiated(False, True, ("base:allocation",)),
            TransmissionFlag.SEND_DF | TransmissionFlag.BLOCK_STATUS_PAYLOAD,
        ),
    ],
    ids=str,
)
def test_chunked_replies_bring_flags_of_their_own(negotiated: Negotiated, flags: TransmissionFlag) -> None:
    assert transmission_flags(WRITABLE, negotiated) == TransmissionFlag.HAS_FLAGS | flags


# --- waiting on behalf of a client ---


class Slow(Filter):
    """Writes after an hour."""

    name = "slow"

    def __init__(self) -> None:
        super().__init__()
        self.sleeping = threading.Event()

    def preconnect(self, client: Client, readonly: bool) -> None:
        client.sleep(0)

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return SlowHandle(handle, self.sleeping, client)


class SlowHandle(FilterHandle):
    def __init__(self, next: Handle, sleeping: threading.Event, client: Client) -> None:
        super().__init__(next)
        self._sleeping = sleeping
        self._sleep = client.sleep

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._sleeping.set()
        self._sleep(3600)
        self.next.pwrite(data, offset, flags)


class Written(Disk):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        raise AssertionError("written after all")


@pytest.mark.parametrize("threads", [1, 16])
def test_D7_what_sleeps_does_not_outlive_its_client(
    start_session: StartSession, messages: Messages, threads: int
) -> None:
    slow = Slow()
    solo = start_session(Disks(Written), slow, threads=threads)
    solo.client.negotiate()
    for _ in range(20):
        solo.client.send(Command.WRITE, data=b"stale")
    assert slow.sleeping.wait(PATIENCE)

    solo.client.socket.close()
    solo.join()

    assert "written after all" not in "".join(messages())


@pytest.mark.parametrize("threads", [1, 16])
def test_what_sleeps_does_not_outlive_the_server(start_session: StartSession, threads: int) -> None:
    slow = Slow()
    solo = start_session(Disks(Written), slow, threads=threads)
    solo.client.negotiate()
    solo.client.send(Command.WRITE, data=b"stale")
    assert slow.sleeping.wait(PATIENCE)

    solo.session.stop()

    assert solo.client.reply().error == errno.ESHUTDOWN
    assert solo.client.at_end()
    solo.join()

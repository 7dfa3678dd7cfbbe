"""The client takes nothing on trust: what a server says that breaks the protocol is an error."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from nbdkitpy.testing import Command, CommandFlag, ProtocolError, Refused, Style
from nbdkitpy.testing.wire import Wire

GREETING = b"NBDMAGICIHAVEOPT\0\3"
COOKIE = 0xC00C1E0000000001
SIZE = 1 << 20


class Pair:
    """A client, and the server's end of its connection."""

    def __init__(self) -> None:
        self.server, theirs = socket.socketpair()
        self.wire = Wire(theirs, 5)
        self.wire.size = SIZE

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.wire.socket.close()

    def says(self, *data: bytes) -> None:
        """Have the server send this, and hang up."""
        self.server.sendall(b"".join(data))
        self.server.shutdown(socket.SHUT_WR)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as pair:
        yield pair


def option_reply(reply: int, data: bytes = b"", option: int = 7, magic: int = 0x3E889045565A9) -> bytes:
    return struct.pack(">QIII", magic, option, reply, len(data)) + data


def info(size: int = SIZE, flags: int = 1) -> bytes:
    return option_reply(3, struct.pack(">HQH", 0, size, flags))


ACK = option_reply(1)


def simple(error: int = 0, cookie: int = COOKIE, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(kind: int, payload: bytes = b"", *, flags: int = 1, cookie: int = COOKIE) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def extended(kind: int, payload: bytes = b"", *, flags: int = 1, cookie: int = COOKIE, offset: int = 512) -> bytes:
    return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload)) + payload


def data(offset: int, content: bytes) -> bytes:
    return struct.pack(">Q", offset) + content


def hole(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def error(number: int, text: bytes = b"", length: int | None = None, behind: bytes = b"") -> bytes:
    return struct.pack(">IH", number, len(text) if length is None else length) + text + behind


def status(*extents: tuple[int, int], context: int = 1) -> bytes:
    return struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)


# --- handshake ---


def test_the_greeting_is_answered_by_flags(pair: Pair) -> None:
    pair.says(GREETING)

    assert pair.wire.greet() == 3
    assert pair.server.recv(9) == b"\0\0\0\3"


def test_only_flags_that_are_offered_are_taken(pair: Pair) -> None:
    pair.says(b"NBDMAGICIHAVEOPT\0\1")

    assert pair.wire.greet(None) == 1
    assert pair.server.recv(9) == b"\0\0\0\1"


Does = Callable[[Wire], object]


@pytest.mark.parametrize(
    ("answer", "does", "text"),
    [
        (b"NBDMAGIC" + bytes(10), Wire.greet, "magic"),
        (option_reply(1, option=6), Wire.go, "option reply"),
        (option_reply(1, magic=1), Wire.go, "option reply"),
        (struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31), Wire.go, "length of an option reply"),
        (option_reply(1, b"x"), Wire.go, "OptionAnswer"),
        (ACK, Wire.go, "size and flags"),
        (info() + info() + ACK, Wire.go, "told twice"),
        (option_reply(3, b"\0\0\0") + ACK, Wire.go, "size and flags"),
        (option_reply(3, b"\0") + ACK, Wire.go, "OptionAnswer"),
        (option_reply(2) + ACK, Wire.go, "OptionAnswer"),
        (option_reply(2, b"\0\0\0\5abc", option=3) + option_reply(1, option=3), Wire.list_exports, "length of a name"),
        (option_reply(2, b"\0", option=3) + option_reply(1, option=3), Wire.list_exports, "OptionAnswer"),
        (
            option_reply(4, b"\0\0\0\2base:allocation", option=10) + option_reply(1, option=10),
            Wire.select_base_allocation,
            "meta contexts",
        ),
    ],
)
def test_a_handshake_that_breaks_the_protocol_is_an_error(pair: Pair, answer: bytes, does: Does, text: str) -> None:
    pair.says(answer)

    with pytest.raises(ProtocolError, match=text) as caught:
        does(pair.wire)

    assert caught.value.errno == errno.EPROTO


def test_a_refusal_is_an_error_of_the_system(pair: Pair) -> None:
    pair.says(option_reply(0x80000006, b"no such disk"))

    with pytest.raises(Refused, match="ERR_UNKNOWN: no such disk") as caught:
        pair.wire.go("x")

    assert caught.value.errno == errno.ENOENT


def test_a_refusal_that_comes_near_to_no_error_is_einval(pair: Pair) -> None:
    pair.says(option_reply(0x80000008))

    with pytest.raises(Refused) as caught:
        pair.wire.go("x")

    assert (caught.value.errno, caught.value.strerror) == (errno.EINVAL, "ERR_BLOCK_SIZE_REQD")


def test_a_connection_that_ends_is_an_error(pair: Pair) -> None:
    pair.says(GREETING[:10])

    with pytest.raises(ConnectionResetError, match="8 bytes early"):
        pair.wire.greet()


def test_a_server_that_says_nothing_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    wire = Wire(theirs, 0.01)

    with ours, wire.socket, pytest.raises(TimeoutError):
        wire.greet()


# --- replies ---

READ, WRITE, STATUS = (Command.READ, 0), (Command.WRITE, 0), (Command.BLOCK_STATUS, 0)
DF, ONE = (Command.READ, CommandFlag.DF), (Command.BLOCK_STATUS, CommandFlag.REQ_ONE)
NONE, DATA, HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002


@pytest.mark.parametrize(
    ("style", "request_", "reply", "text"),
    [
        (Style.SIMPLE, READ, struct.pack(">I", 1), "magic of a reply"),
        (Style.SIMPLE, READ, simple(cookie=1), "no request has this cookie"),
        (Style.SIMPLE, READ, simple(2), "no error of the protocol"),
        (Style.SIMPLE, READ, chunk(NONE), "a structured reply that was not negotiated"),
        (Style.SIMPLE, READ, extended(NONE), "an extended reply that was not negotiated"),
        (Style.STRUCTURED, READ, simple(), "a simple reply to READ"),
        (Style.STRUCTURED, READ, chunk(DATA, data(512, b"x"), flags=0) + simple(5), "a simple reply to READ"),
        (Style.STRUCTURED, WRITE, chunk(ERROR, error(5), flags=0) + simple(5), "a simple reply after chunks"),
        (Style.EXTENDED, WRITE, simple(), "a simple reply, in spite of extended headers"),
        (Style.EXTENDED, READ, extended(NONE, offset=0), "the offset is not the request's"),
        (Style.STRUCTURED, READ, chunk(NONE, flags=2), "unknown flags"),
        (Style.STRUCTURED, READ, struct.pack(">IHHQI", 0x668E33EF, 1, 1, COOKIE, 1 << 31), "too long"),
        (Style.STRUCTURED, READ, chunk(3), "unknown kind"),
        (Style.STRUCTURED, READ, chunk(NONE, flags=0), "NONE that is not the last"),
        (Style.STRUCTURED, READ, chunk(NONE, b"x"), "NONE that is not the last, or has a payload"),
        (Style.STRUCTURED, READ, chunk(NONE), "content is missing"),
        (Style.STRUCTURED, READ, chunk(DATA, bytes(8)), "a chunk too short"),
        (Style.STRUCTURED, READ, chunk(DATA, data(511, b"x")), "outside the request"),
        (Style.STRUCTURED, READ, chunk(DATA, data(512, bytes(1025))), "outside the request"),
        (Style.STRUCTURED, READ, chunk(DATA, data(512, b"xx"), flags=0) + chunk(HOLE, hole(513, 9)), "content twice"),
        (Style.STRUCTURED, READ, chunk(HOLE, hole(512, 0)), "length of a hole"),
        (Style.STRUCTURED, READ, chunk(HOLE, hole(512, 1 << 31)), "length of a hole"),
        (Style.STRUCTURED, READ, chunk(HOLE, hole(512, 4) + b"x"), "OFFSET_HOLE"),
        (Style.STRUCTURED, DF, chunk(DATA, data(512, b"x"), flags=0) + chunk(HOLE, hole(513, 1)), "in spite of DF"),
        (Style.STRUCTURED, WRITE, chunk(DATA, data(512, b"x")), "something else than READ"),
        (Style.STRUCTURED, READ, chunk(ERROR, error(5, b"text", 3)), "length of the text"),
        (Style.STRUCTURED, READ, chunk(ERROR, error(0)), "an error that is none"),
        (Style.STRUCTURED, READ, chunk(ERROR, error(5), flags=0) + chunk(ERROR, error(5)), "more than one error"),
        (Style.STRUCTURED, READ, chunk(ERROR_OFFSET, error(5, b"text", behind=bytes(4))), "length of the text"),
        (Style.STRUCTURED, READ, chunk(BLOCK_STATUS, status((1, 0))), "status that nobody asked for"),
        (Style.STRUCTURED, STATUS, chunk(BLOCK_STATUS, status((1, 0), context=2)), "unknown context"),
        (Style.STRUCTURED, STATUS, chunk(BLOCK_STATUS, status((1, 0)) + b"x"), "BLOCK_STATUS"),
        (Style.STRUCTURED, STATUS, chunk(BLOCK_STATUS, status((0, 0))), "empty extents"),
        (Style.STRUCTURED, STATUS, chunk(BLOCK_STATUS, status((1024, 0), (1, 0))), "too many extents"),
        (Style.STRUCTURED, STATUS, chunk(BLOCK_STATUS, status((SIZE, 0))), "beyond the end"),
        (Style.STRUCTURED, ONE, chunk(BLOCK_STATUS, status((1, 0), (2, 1))), "more than one extent"),
        (Style.STRUCTURED, STATUS, chunk(BLOCK_STATUS_EXT, bytes(24)), "without extended headers"),
        (Style.EXTENDED, STATUS, extended(BLOCK_STATUS, status((1, 0))), "BLOCK_STATUS"),
        (Style.EXTENDED, STATUS, extended(BLOCK_STATUS_EXT, b"\0\0\0\1\0\0\0\2" + bytes(16)), "count of extents"),
    ],
)
def test_a_reply_that_breaks_the_protocol_is_an_error(
    pair: Pair, style: Style, request_: tuple[int, int], reply: bytes, text: str
) -> None:
    command, flags = request_
    pair.wire.style = style
    pair.wire.send(command, 512, 1024, flags=flags)
    pair.says(reply)

    with pytest.raises(ProtocolError, match=text):
        pair.wire.reply()


def test_replies_in_pieces_are_put_together(pair: Pair) -> None:
    pair.wire.style = Style.STRUCTURED
    cookie = pair.wire.send(Command.READ, 512, 1024)
    pair.says(chunk(DATA, data(1024, b"b" * 512), flags=0), chunk(HOLE, hole(512, 512), flags=0), chunk(NONE))

    reply = pair.wire.reply()

    assert (reply.cookie, reply.error, reply.data) == (cookie, 0, bytes(512) + b"b" * 512)
    assert (reply.holes, reply.kinds) == ([(512, 512)], [DATA, HOLE, NONE])
    assert pair.wire.unanswered == 0


@pytest.mark.parametrize("payload", [error(28, b"full"), error(28, b"full", behind=bytes(8))], ids=["ERROR", "OFFSET"])
def test_errors_come_with_a_text(pair: Pair, payload: bytes) -> None:
    pair.wire.style = Style.STRUCTURED
    pair.wire.send(Command.READ, 512, 1024)
    pair.says(chunk(ERROR if len(payload) == 10 else ERROR_OFFSET, payload))

    reply = pair.wire.reply()

    assert (reply.error, reply.text, reply.data) == (28, "full", b"")


def test_extents_come_in_both_forms(pair: Pair) -> None:
    pair.wire.style = Style.STRUCTURED
    pair.wire.send(Command.BLOCK_STATUS, 512, 1024)
    pair.server.sendall(chunk(BLOCK_STATUS, status((512, 0), (4096, 3))))
    short = pair.wire.reply().extents
    pair.wire.style = Style.EXTENDED
    cookie = pair.wire.send(Command.BLOCK_STATUS, 512, 1024)
    payload = struct.pack(">IIQQQQ", 1, 2, 512, 0, 4096, 3)
    pair.says(extended(BLOCK_STATUS_EXT, payload, cookie=cookie))

    assert short == pair.wire.reply().extents == [(512, 0), (4096, 3)]

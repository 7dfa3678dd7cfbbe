"""A small NBD client for tests: it blocks, takes nothing on trust, and can send what no sane client would.

Written from the protocol, not from the server: it shares the names of numbers with it, but no layout and no parser.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import socket
import ssl
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from nbdkitpy.protocol.constants import (
    BASE_ALLOCATION,
    Command,
    CommandFlag,
    InfoType,
    Option,
    OptionReply,
    ReplyType,
    TransmissionFlag,
)

#: Seconds after which the server is taken to hang.
PATIENCE = 20

OPTION_MAGIC = b"IHAVEOPT"
_REPLY_MAGIC = 0x0003E889045565A9
_ERROR_BIT = 1 << 31
_WIRE_ERRORS = frozenset({1, 5, 12, 22, 28, 75, 95, 108})


class ProtocolError(AssertionError):
    """The server broke the protocol."""


def require(condition: object, *what: object) -> None:
    """Fail the test unless `condition` holds; `what` says what the server sent."""
    if not condition:
        raise ProtocolError(*what)


class Style(enum.Enum):
    """Which replies are negotiated."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class OptionAnswer(NamedTuple):
    """One reply to an option."""

    reply: int
    data: bytes


class Refused(Exception):
    """An option was answered with an error."""

    def __init__(self, answer: OptionAnswer) -> None:
        super().__init__(OptionReply(answer.reply).name, answer.data.decode())
        self.reply = OptionReply(answer.reply)
        self.text = answer.data.decode()


@dataclass
class Reply:
    """The whole reply to one request."""

    cookie: int
    error: int = 0
    text: str = ""  #: of an error chunk
    data: bytes = b""  #: of a READ that succeeded
    holes: list[tuple[int, int]] = field(default_factory=list)  #: offset and length
    kinds: list[int] = field(default_factory=list)  #: types of the chunks, none for a simple reply
    extents: list[tuple[int, int]] = field(default_factory=list)  #: length and type


class _Pending:
    """A request that has not been answered yet, and what has come of its reply."""

    def __init__(self, command: int, offset: int, length: int, flags: int) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.flags = flags
        self.parts: list[tuple[int, int, bytes]] = []  # offset, length, data


class NbdClient:
    """One connection to a server.

    Args:
        sock: Connected; the client owns it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE)
        self.socket = sock
        self.style = Style.SIMPLE
        self.size = 0
        self.flags = TransmissionFlag(0)
        self._cookies = itertools.count(0xC00C1E0000000001)
        self._pending: dict[int, list[_Pending]] = {}
        self._replies: dict[int, Reply] = {}  # of which some chunks have come
        self._held: list[bytes] | None = None

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # --- bytes ---

    def send_bytes(self, data: bytes) -> None:
        """Send anything."""
        if self._held is not None:
            self._held.append(data)
        else:
            self.socket.sendall(data)

    @contextlib.contextmanager
    def batched(self) -> Iterator[None]:
        """Send all that is sent meanwhile at once, at the end."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            self.socket.sendall(b"".join(held))

    def receive_bytes(self, count: int) -> bytes:
        """Receive exactly so many bytes."""
        data = bytearray()
        while len(data) < count:
            piece = self.socket.recv(min(count - len(data), 1 << 20))
            if not piece:
                raise EOFError(f"the server closed the connection {count - len(data)} bytes too early")
            data += piece
        return bytes(data)

    def at_end(self) -> bool:
        """Wait for the server to close the connection, or to send something, which is then False."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def reset(self) -> None:
        """Break the connection, so that a TCP server sees a reset rather than an orderly end."""
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def start_tls(self, context: ssl.SSLContext, name: str | None = "localhost") -> NbdClient:
        """Ask for TLS and begin it, and return this client.

        Args:
            context: Of a client.
            name: Of the server, as it has to stand in its certificate.
        """
        require(self.option(Option.STARTTLS) == [], "something before the ACK")
        self.socket = context.wrap_socket(self.socket, server_hostname=name)
        return self

    # --- handshake ---

    def greet(self, flags: int = 3) -> int:
        """Take the greeting and answer it with client flags; return those of the handshake."""
        magic, version, offered = struct.unpack(">8s8sH", self.receive_bytes(18))
        require((magic, version) == (b"NBDMAGIC", OPTION_MAGIC), magic, version)
        self.send_bytes(struct.pack(">I", flags))
        return int(offered)

    def send_option(self, option: int, data: bytes = b"") -> None:
        """Send an option and do not wait for its answer."""
        self.send_bytes(struct.pack(">8sII", OPTION_MAGIC, option, len(data)) + data)

    def option_answers(self, option: int) -> list[OptionAnswer]:
        """Take the replies to `option`, of which the last is ACK or an error."""
        answers: list[OptionAnswer] = []
        while True:
            magic, of, reply, length = struct.unpack(">QIII", self.receive_bytes(20))
            require(magic == _REPLY_MAGIC and of == option, magic, of, option)
            answers.append(OptionAnswer(reply, self.receive_bytes(length)))
            if reply == OptionReply.ACK or reply & _ERROR_BIT:
                require(reply & _ERROR_BIT or not length, answers[-1])
                return answers

    def option(self, option: int, data: bytes = b"") -> list[OptionAnswer]:
        """Send an option and return its replies before the ACK.

        Raises:
            Refused: the answer is an error.
        """
        self.send_option(option, data)
        *answers, last = self.option_answers(option)
        if last.reply != OptionReply.ACK:
            raise Refused(last)
        return answers

    def exports(self) -> list[str]:
        """Return the names that the server lists."""
        names = []
        for answer in self.option(Option.LIST):
            require(answer.reply == OptionReply.SERVER, answer)
            (length,) = struct.unpack_from(">I", answer.data)
            names.append(answer.data[4 : 4 + length].decode())
        return names

    def go(self, name: str = "", *infos: InfoType, option: Option = Option.GO) -> dict[InfoType, bytes]:
        """Open an export, or with INFO ask about it, and return what is said of it besides size and flags."""
        told: dict[InfoType, bytes] = {}
        for answer in self.option(option, go_data(name, *infos)):
            require(answer.reply == OptionReply.INFO, answer)
            (kind,) = struct.unpack_from(">H", answer.data)
            require(kind not in told, "told twice", kind)
            told[InfoType(kind)] = answer.data[2:]
        size, flags = struct.unpack(">QH", told.pop(InfoType.EXPORT))
        self.size, self.flags = size, TransmissionFlag(flags)
        return told

    def negotiate(self, style: Style = Style.SIMPLE, *, name: str = "", contexts: bool = False) -> NbdClient:
        """Go through a whole handshake, and return this client.

        Args:
            style: Of the replies.
            name: Of the export.
            contexts: Select base:allocation, so that the block status can be asked for.
        """
        self.greet()
        if style is not Style.SIMPLE:
            self.option(Option.STRUCTURED_REPLY if style is Style.STRUCTURED else Option.EXTENDED_HEADERS)
        self.style = style
        if contexts:
            query = BASE_ALLOCATION.encode()
            data = struct.pack(f">I{len(name.encode())}sII", len(name.encode()), name.encode(), 1, len(query)) + query
            (answer,) = self.option(Option.SET_META_CONTEXT, data)
            require(answer == (OptionReply.META_CONTEXT, struct.pack(">I", 1) + query), answer)
        self.go(name)
        return self

    def expect_oldstyle(self) -> NbdClient:
        """Take the greeting of an oldstyle server, and return this client."""
        magic, version, size, high, low = struct.unpack(">8sQQHH124x", self.receive_bytes(152))
        require((magic, version, high) == (b"NBDMAGIC", 0x0000420281861253, 0), magic, version, high)
        self.size, self.flags = size, TransmissionFlag(low)
        return self

    # --- requests ---

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        data: bytes = b"",
        cookie: int | None = None,
    ) -> int:
        """Send a request and return its cookie. The length is that of the data, if there are any."""
        cookie = next(self._cookies) if cookie is None else cookie
        length = len(data) or length
        if self.style is Style.EXTENDED:
            flags |= CommandFlag.PAYLOAD_LEN if data else 0
            header = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        else:
            header = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
        if command != Command.DISC:
            self._pending.setdefault(cookie, []).append(_Pending(command, offset, length, flags))
        self.send_bytes(header + data)
        return cookie

    def call(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Reply:
        """Send one request and return its reply, which has to be the next one."""
        cookie = self.send(command, offset, length, flags=flags, data=data)
        reply = self.reply()
        require(reply.cookie == cookie, "the reply is to another request", reply, cookie)
        return reply

    def read(self, offset: int, length: int) -> bytes:
        """Read, and fail the test if that fails."""
        reply = self.call(Command.READ, offset, length)
        require(not reply.error, reply)
        return reply.data

    def write(self, offset: int, data: bytes) -> None:
        """Write, and fail the test if that fails."""
        reply = self.call(Command.WRITE, offset, data=data)
        require(not reply.error, reply)

    def disconnect(self) -> None:
        """Say DISC, wait until the server has closed the connection, and close it."""
        self.send(Command.DISC)
        require(self.at_end(), "there is something after the last reply")
        self.socket.close()

    @property
    def unanswered(self) -> int:
        """How many requests have no reply yet."""
        return sum(map(len, self._pending.values()))

    # --- replies ---

    def reply(self) -> Reply:
        """Return the next reply that is complete."""
        while True:
            (magic,) = struct.unpack(">I", self.receive_bytes(4))
            done = {
                0x67446698: self._simple,
                0x668E33EF: self._structured_chunk,
                0x6E8A278C: self._extended_chunk,
            }.get(magic, self._unknown)()
            if done is not None:
                return done

    def replies(self, count: int) -> dict[int, Reply]:
        """Return the next replies by their cookies, each of which occurs once."""
        found = {reply.cookie: reply for reply in (self.reply() for _ in range(count))}
        require(len(found) == count, "a cookie came twice")
        return found

    def _unknown(self) -> Reply | None:
        raise ProtocolError("unknown magic of a reply")

    def _simple(self) -> Reply:
        error, cookie = struct.unpack(">IQ", self.receive_bytes(12))
        request = self._request(cookie)
        require(self.style is not Style.EXTENDED, "a simple reply, in spite of extended headers")
        is_read = request.command == Command.READ
        require(self.style is Style.SIMPLE or not is_read, "a simple reply to READ, in spite of structured replies")
        require(cookie not in self._replies, "a simple reply after chunks")
        reply = Reply(cookie, error)
        if is_read and not error:
            reply.data = self.receive_bytes(request.length)
        return self._finish(reply)

    def _structured_chunk(self) -> Reply | None:
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive_bytes(16))
        require(self.style is Style.STRUCTURED, "a structured reply that was not negotiated")
        return self._chunk(flags, kind, cookie, length)

    def _extended_chunk(self) -> Reply | None:
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.receive_bytes(28))
        require(self.style is Style.EXTENDED, "an extended reply that was not negotiated")
        require(offset == self._request(cookie).offset, "the offset is not the request's", offset)
        return self._chunk(flags, kind, cookie, length)

    def _chunk(self, flags: int, kind: int, cookie: int, length: int) -> Reply | None:
        request = self._request(cookie)
        require(flags in (0, 1), "unknown flags of a chunk", flags)
        require(length < 1 << 27, "a chunk too long", length)
        reply = self._replies.setdefault(cookie, Reply(cookie))
        reply.kinds.append(kind)
        payload = self.receive_bytes(length)
        _CHUNKS[ReplyType(kind)](self, reply, request, payload, bool(flags))
        if not flags:
            return None
        if request.command == Command.READ and not reply.error:
            reply.data = _joined(request)
        return self._finish(reply)

    def _none(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        require(done and not payload, "NONE that is not the last, or has a payload")

    def _data(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        require(len(payload) > 8, "OFFSET_DATA without data")
        (start,) = struct.unpack_from(">Q", payload)
        self._content(request, start, len(payload) - 8, payload[8:])

    def _hole(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        start, length = struct.unpack(">QI", payload)
        require(length, "an empty hole")
        reply.holes.append((start, length))
        self._content(request, start, length, bytes(length))

    def _content(self, request: _Pending, start: int, length: int, data: bytes) -> None:
        require(request.command == Command.READ, "content in reply to something else than READ")
        end = request.offset + request.length
        require(request.offset <= start and start + length <= end, "outside the request", start, length)
        require(all(start + length <= at or at + count <= start for at, count, _ in request.parts), "twice", start)
        require(not request.flags & CommandFlag.DF or not request.parts, "fragments in spite of DF")
        request.parts.append((start, length, data))

    def _error(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        error, length = struct.unpack_from(">IH", payload)
        require(length == len(payload) - 6 <= 4096, "length of the text", length, len(payload))
        require(not reply.error, "more than one error")
        reply.error, reply.text = error, payload[6:].decode()

    def _status(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        require(self.style is Style.STRUCTURED and len(payload) % 8 == 4, "BLOCK_STATUS", len(payload))
        self._extents(reply, request, payload[:4], struct.iter_unpack(">II", payload[4:]))

    def _status_ext(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        require(self.style is Style.EXTENDED, "BLOCK_STATUS_EXT without extended headers")
        require(len(payload) == 8 + 16 * struct.unpack_from(">I", payload, 4)[0], "count of extents")
        self._extents(reply, request, payload[:4], struct.iter_unpack(">QQ", payload[8:]))

    def _extents(self, reply: Reply, request: _Pending, context: bytes, found: Iterator[tuple[int, int]]) -> None:
        require(request.command == Command.BLOCK_STATUS and not reply.extents, "status that nobody asked for")
        require(context == struct.pack(">I", 1), "unknown context", context)
        reply.extents = list(found)
        require(reply.extents and all(length for length, _ in reply.extents), "empty extents", reply.extents)
        require(sum(length for length, _ in reply.extents[:-1]) < request.length, "too many extents")
        require(len(reply.extents) == 1 or not request.flags & CommandFlag.REQ_ONE, "more than one extent")
        require(request.offset + sum(length for length, _ in reply.extents) <= self.size, "beyond the end")

    def _request(self, cookie: int) -> _Pending:
        require(cookie in self._pending, "no request has this cookie", hex(cookie))
        return self._pending[cookie][0]

    def _finish(self, reply: Reply) -> Reply:
        require(not reply.error or reply.error in _WIRE_ERRORS, "no error of the protocol", reply.error)
        self._replies.pop(reply.cookie, None)
        waiting = self._pending[reply.cookie]
        del waiting[0]
        if not waiting:
            del self._pending[reply.cookie]
        return reply


_CHUNKS = {
    ReplyType.NONE: NbdClient._none,
    ReplyType.OFFSET_DATA: NbdClient._data,
    ReplyType.OFFSET_HOLE: NbdClient._hole,
    ReplyType.BLOCK_STATUS: NbdClient._status,
    ReplyType.BLOCK_STATUS_EXT: NbdClient._status_ext,
    ReplyType.ERROR: NbdClient._error,
}


def _joined(request: _Pending) -> bytes:
    data = b"".join(part for _, _, part in sorted(request.parts))
    require(len(data) == request.length, "content is missing", len(data), request.length)
    return data


def go_data(name: str = "", *infos: int) -> bytes:
    """Return the data of GO or INFO."""
    encoded = name.encode()
    return struct.pack(f">I{len(encoded)}sH{len(infos)}H", len(encoded), encoded, len(infos), *infos)

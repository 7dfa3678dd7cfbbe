"""The client's side of a connection, message by message; takes nothing on trust that the server says.

Written from the protocol, not from the server: it shares the names of numbers with it, but no layout and no parser.
"""

from __future__ import annotations

import enum
import errno
import itertools
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from nbdkitpy.protocol.constants import (
    BASE_ALLOCATION,
    Command,
    CommandFlag,
    InfoType,
    Magic,
    NbdError,
    Option,
    OptionReply,
    ReplyType,
    TransmissionFlag,
)

if TYPE_CHECKING:
    import ssl

__all__ = ["OptionAnswer", "ProtocolError", "Refused", "Reply", "Style", "Wire", "go_data"]

W = TypeVar("W", bound="Wire")

_ERROR_BIT = 1 << 31

#: No chunk of a reply is longer: that is as much as a request can ask for, and more than servers send.
_LONGEST_CHUNK = 1 << 27

#: The longest text of an error.
_LONGEST_TEXT = 4096

_REPLY_MAGICS = (Magic.SIMPLE_REPLY, Magic.STRUCTURED_REPLY, Magic.EXTENDED_REPLY)

#: What the refusal of an option is as an error of the system.
_ERRNO = {
    OptionReply.ERR_UNSUP: errno.EOPNOTSUPP,
    OptionReply.ERR_POLICY: errno.EACCES,
    OptionReply.ERR_INVALID: errno.EINVAL,
    OptionReply.ERR_PLATFORM: errno.EOPNOTSUPP,
    OptionReply.ERR_TLS_REQD: errno.EPERM,
    OptionReply.ERR_UNKNOWN: errno.ENOENT,
    OptionReply.ERR_SHUTDOWN: errno.ESHUTDOWN,
    OptionReply.ERR_TOO_BIG: errno.E2BIG,
}


class ProtocolError(OSError):
    """The server has broken the protocol: EPROTO."""

    def __init__(self, *what: object) -> None:
        super().__init__(errno.EPROTO, "the server breaks the protocol: " + ", ".join(map(str, what)))


class Style(enum.Enum):
    """Which replies are negotiated."""

    SIMPLE = "simple"
    STRUCTURED = "structured"
    EXTENDED = "extended"


class OptionAnswer(NamedTuple):
    """One reply to an option."""

    reply: int
    data: bytes


class Refused(OSError):  # noqa: N818  # the protocol's word for it
    """An option was answered with an error: ENOENT if there is no such export, or what else comes near to it."""

    def __init__(self, answer: OptionAnswer) -> None:
        self.reply = OptionReply(answer.reply)
        self.text = answer.data.decode()
        super().__init__(_ERRNO.get(self.reply, errno.EINVAL), f"{self.reply.name}: {self.text}".removesuffix(": "))


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


class Wire:
    """One connection to a server. Sends what it is told to, and checks all that comes back against what was asked for.

    Args:
        sock: Connected; it is owned from now on.
        timeout: Seconds after which a server that says nothing is given up with TimeoutError.
    """

    #: What is raised if the server breaks the protocol.
    violation: ClassVar[type[Exception]] = ProtocolError

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.settimeout(timeout)
        self.socket = sock
        self.style = Style.SIMPLE
        self.size = 0
        self.flags = TransmissionFlag(0)
        self._cookies = itertools.count(0xC00C1E0000000001)
        self._pending: dict[int, list[_Pending]] = {}
        self._replies: dict[int, Reply] = {}  # of which some chunks have come

    def require(self, condition: object, *what: object) -> None:
        """Raise :attr:`violation` unless `condition` holds; `what` says what the server sent."""
        if not condition:
            raise self.violation(*what)

    # --- bytes ---

    def send_bytes(self, data: bytes) -> None:
        """Send anything."""
        self.socket.sendall(data)

    def receive_bytes(self, count: int) -> bytes:
        """Receive exactly so many bytes.

        Raises:
            ConnectionResetError: the server has closed the connection.
        """
        data = bytearray(count)
        view = memoryview(data)
        while view:
            received = self.socket.recv_into(view)
            if not received:
                why = f"the server has closed the connection, {len(view)} bytes early"
                raise ConnectionResetError(errno.ECONNRESET, why)
            view = view[received:]
        return bytes(data)

    def start_tls(self: W, context: ssl.SSLContext, name: str | None = "localhost") -> W:
        """Ask for TLS and begin it, and return this connection.

        Args:
            context: Of a client.
            name: Of the server, as it has to stand in its certificate.
        """
        self.require(self.option(Option.STARTTLS) == [], "something before the ACK of STARTTLS")
        self.socket = context.wrap_socket(self.socket, server_hostname=name)
        return self

    # --- handshake ---

    def greet(self, flags: int | None = 3) -> int:
        """Take the greeting and answer it with client flags, None for all that are offered; return what is offered."""
        magic, version, offered = struct.unpack(">QQH", self.receive_bytes(18))
        self.require((magic, version) == (Magic.NBDMAGIC, Magic.IHAVEOPT), "magic", magic, version)
        self.send_bytes(struct.pack(">I", offered & 3 if flags is None else flags))
        return int(offered)

    def send_option(self, option: int, data: bytes = b"") -> None:
        """Send an option and do not wait for its answer."""
        self.send_bytes(struct.pack(">QII", Magic.IHAVEOPT, option, len(data)) + data)

    def option_answers(self, option: int) -> list[OptionAnswer]:
        """Take the replies to `option`, of which the last is ACK or an error."""
        answers: list[OptionAnswer] = []
        while True:
            magic, of, reply, length = struct.unpack(">QIII", self.receive_bytes(20))
            self.require(magic == Magic.OPTION_REPLY and of == option, "option reply", magic, of, option)
            self.require(length <= _LONGEST_CHUNK, "length of an option reply", length)
            answers.append(OptionAnswer(reply, self.receive_bytes(length)))
            if reply == OptionReply.ACK or reply & _ERROR_BIT:
                self.require(reply & _ERROR_BIT or not length, answers[-1])
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

    def list_exports(self) -> list[tuple[str, str]]:
        """Return the names and descriptions that the server lists."""
        exports = []
        for answer in self.option(Option.LIST):
            self.require(answer.reply == OptionReply.SERVER and len(answer.data) >= 4, answer)
            (length,) = struct.unpack_from(">I", answer.data)
            self.require(length <= len(answer.data) - 4, "length of a name", length)
            exports.append((answer.data[4 : 4 + length].decode(), answer.data[4 + length :].decode()))
        return exports

    def go(self, name: str = "", *infos: InfoType, option: Option = Option.GO) -> dict[InfoType, bytes]:
        """Open an export, or with INFO ask about it, and return what is said of it besides size and flags.

        Raises:
            Refused: there is no such export, or not for us.
        """
        told: dict[InfoType, bytes] = {}
        for answer in self.option(option, go_data(name, *infos)):
            self.require(answer.reply == OptionReply.INFO and len(answer.data) >= 2, answer)
            (kind,) = struct.unpack_from(">H", answer.data)
            self.require(kind not in told, "told twice", kind)
            told[InfoType(kind)] = answer.data[2:]
        self.require(len(told.get(InfoType.EXPORT, b"")) == 10, "size and flags", told)
        size, flags = struct.unpack(">QH", told.pop(InfoType.EXPORT))
        self.size, self.flags = size, TransmissionFlag(flags)
        return told

    def negotiate_style(self, style: Style) -> None:
        """Ask for a form of the replies.

        Raises:
            Refused: the server does not have it.
        """
        if style is not Style.SIMPLE:
            self.option(Option.STRUCTURED_REPLY if style is Style.STRUCTURED else Option.EXTENDED_HEADERS)
        self.style = style

    def select_base_allocation(self, name: str = "") -> bool:
        """Select base:allocation for an export, so that its block status can be asked for; False if it has none."""
        export, query = name.encode(), BASE_ALLOCATION.encode()
        data = struct.pack(f">I{len(export)}sII", len(export), export, 1, len(query)) + query
        answers = self.option(Option.SET_META_CONTEXT, data)
        expected = OptionAnswer(OptionReply.META_CONTEXT, struct.pack(">I", 1) + query)
        self.require(answers in ([], [expected]), "meta contexts", answers)
        return bool(answers)

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
            header = struct.pack(">IHHQQQ", Magic.EXTENDED_REQUEST, flags, command, cookie, offset, length)
        else:
            header = struct.pack(">IHHQQI", Magic.REQUEST, flags, command, cookie, offset, length)
        if command != Command.DISC:
            self._pending.setdefault(cookie, []).append(_Pending(command, offset, length, flags))
        self.send_bytes(header + data)
        return cookie

    @property
    def unanswered(self) -> int:
        """How many requests have no reply yet."""
        return sum(map(len, self._pending.values()))

    # --- replies ---

    def reply(self) -> Reply:
        """Return the next reply that is complete."""
        while True:
            (magic,) = struct.unpack(">I", self.receive_bytes(4))
            self.require(magic in _REPLY_MAGICS, "magic of a reply", hex(magic))
            done = _MESSAGES[Magic(magic)](self)
            if done is not None:
                return done

    def _simple(self) -> Reply:
        error, cookie = struct.unpack(">IQ", self.receive_bytes(12))
        request = self._request(cookie)
        self.require(self.style is not Style.EXTENDED, "a simple reply, in spite of extended headers")
        is_read = request.command == Command.READ
        self.require(self.style is Style.SIMPLE or not is_read, "a simple reply to READ, though others were negotiated")
        self.require(cookie not in self._replies, "a simple reply after chunks")
        reply = Reply(cookie, error)
        if is_read and not error:
            reply.data = self.receive_bytes(request.length)
        return self._finish(reply)

    def _structured_chunk(self) -> Reply | None:
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive_bytes(16))
        self.require(self.style is Style.STRUCTURED, "a structured reply that was not negotiated")
        return self._chunk(flags, kind, cookie, length)

    def _extended_chunk(self) -> Reply | None:
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.receive_bytes(28))
        self.require(self.style is Style.EXTENDED, "an extended reply that was not negotiated")
        self.require(offset == self._request(cookie).offset, "the offset is not the request's", offset)
        return self._chunk(flags, kind, cookie, length)

    def _chunk(self, flags: int, kind: int, cookie: int, length: int) -> Reply | None:
        request = self._request(cookie)
        self.require(flags in (0, 1), "unknown flags of a chunk", flags)
        self.require(length < _LONGEST_CHUNK, "a chunk too long", length)
        self.require(kind in _CHUNKS, "unknown kind of a chunk", kind)
        reply = self._replies.setdefault(cookie, Reply(cookie))
        reply.kinds.append(kind)
        payload = self.receive_bytes(length)
        least, take = _CHUNKS[kind]
        self.require(length >= least, "a chunk too short", kind, length)
        take(self, reply, request, payload, bool(flags))
        if not flags:
            return None
        if request.command == Command.READ and not reply.error:
            reply.data = self._joined(request)
        return self._finish(reply)

    def _none(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        self.require(done and not payload, "NONE that is not the last, or has a payload")

    def _data(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        (start,) = struct.unpack_from(">Q", payload)
        self._content(request, start, len(payload) - 8, payload[8:])

    def _hole(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        self.require(len(payload) == 12, "OFFSET_HOLE", len(payload))
        start, length = struct.unpack(">QI", payload)
        self.require(0 < length <= request.length, "length of a hole", length)
        reply.holes.append((start, length))
        self._content(request, start, length, bytes(length))

    def _content(self, request: _Pending, start: int, length: int, data: bytes) -> None:
        self.require(request.command == Command.READ, "content in reply to something else than READ")
        end = request.offset + request.length
        self.require(request.offset <= start and start + length <= end, "outside the request", start, length)
        apart = all(start + length <= at or at + count <= start for at, count, _ in request.parts)
        self.require(apart, "content twice", start)
        self.require(not request.flags & CommandFlag.DF or not request.parts, "fragments in spite of DF")
        request.parts.append((start, length, data))

    def _joined(self, request: _Pending) -> bytes:
        data = b"".join(part for _, _, part in sorted(request.parts))
        self.require(len(data) == request.length, "content is missing", len(data), request.length)
        return data

    def _error(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        error, length = struct.unpack_from(">IH", payload)
        self.require(length == len(payload) - 6 <= _LONGEST_TEXT, "length of the text", length, len(payload))
        self._set_error(reply, error, payload[6:])

    def _error_offset(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        error, length = struct.unpack_from(">IH", payload)
        self.require(length == len(payload) - 14 <= _LONGEST_TEXT, "length of the text", length, len(payload))
        self._set_error(reply, error, payload[6:-8])

    def _set_error(self, reply: Reply, error: int, text: bytes) -> None:
        self.require(error, "an error that is none")
        self.require(not reply.error, "more than one error")
        reply.error, reply.text = error, text.decode()

    def _status(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        self.require(self.style is Style.STRUCTURED and len(payload) % 8 == 4, "BLOCK_STATUS", len(payload))
        self._extents(reply, request, payload[:4], struct.iter_unpack(">II", payload[4:]))

    def _status_ext(self, reply: Reply, request: _Pending, payload: bytes, done: bool) -> None:
        self.require(self.style is Style.EXTENDED, "BLOCK_STATUS_EXT without extended headers")
        self.require(len(payload) == 8 + 16 * struct.unpack_from(">I", payload, 4)[0], "count of extents")
        self._extents(reply, request, payload[:4], struct.iter_unpack(">QQ", payload[8:]))

    def _extents(self, reply: Reply, request: _Pending, context: bytes, found: Iterator[tuple[int, int]]) -> None:
        self.require(request.command == Command.BLOCK_STATUS and not reply.extents, "status that nobody asked for")
        self.require(context == struct.pack(">I", 1), "unknown context", context)
        reply.extents = list(found)
        self.require(reply.extents and all(length for length, _ in reply.extents), "empty extents", reply.extents)
        self.require(sum(length for length, _ in reply.extents[:-1]) < request.length, "too many extents")
        self.require(len(reply.extents) == 1 or not request.flags & CommandFlag.REQ_ONE, "more than one extent")
        self.require(request.offset + sum(length for length, _ in reply.extents) <= self.size, "beyond the end")

    def _request(self, cookie: int) -> _Pending:
        self.require(cookie in self._pending, "no request has this cookie", hex(cookie))
        return self._pending[cookie][0]

    def _finish(self, reply: Reply) -> Reply:
        self.require(not reply.error or reply.error in set(NbdError), "no error of the protocol", reply.error)
        self._replies.pop(reply.cookie, None)
        waiting = self._pending[reply.cookie]
        del waiting[0]
        if not waiting:
            del self._pending[reply.cookie]
        return reply


#: What follows the magic of a reply.
_MESSAGES: Mapping[Magic, Callable[[Wire], Reply | None]] = {
    Magic.SIMPLE_REPLY: Wire._simple,
    Magic.STRUCTURED_REPLY: Wire._structured_chunk,
    Magic.EXTENDED_REPLY: Wire._extended_chunk,
}

#: For each kind of chunk the least bytes that it has, and who takes it.
_CHUNKS: Mapping[int, tuple[int, Callable[[Wire, Reply, _Pending, bytes, bool], None]]] = {
    ReplyType.NONE: (0, Wire._none),
    ReplyType.OFFSET_DATA: (9, Wire._data),
    ReplyType.OFFSET_HOLE: (12, Wire._hole),
    ReplyType.BLOCK_STATUS: (12, Wire._status),
    ReplyType.BLOCK_STATUS_EXT: (24, Wire._status_ext),
    ReplyType.ERROR: (6, Wire._error),
    ReplyType.ERROR_OFFSET: (14, Wire._error_offset),
}


def go_data(name: str = "", *infos: int) -> bytes:
    """Return the data of GO or INFO."""
    encoded = name.encode()
    return struct.pack(f">I{len(encoded)}sH{len(infos)}H", len(encoded), encoded, len(infos), *infos)

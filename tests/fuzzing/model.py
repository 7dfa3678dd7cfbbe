"""The protocol told once more, for tests to compare a server with: what has to be answered to a stream of bytes.

Written from docs/protocol.md and the protocol's own document, not from the server: it shares the names of numbers with
it, but no layout and no parser. It keeps all that it hears, looks at messages only when they are whole, and takes no
care to be quick.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from nbdkitpy.protocol.constants import (
    BASE_ALLOCATION,
    Command,
    CommandFlag,
    InfoType,
    NbdError,
    Option,
    OptionReply,
    TlsMode,
    TransmissionFlag,
)
from tests.nbdclient import Style

MAX_NAME = 4096
MAX_PAYLOAD = 64 << 20
MAX_SKIPPED = 128 << 20
MAX_OPTION_DATA = 1 << 20
OPTIONS = 32
QUERIES = 1024
#: The longest data that GO can have: a name, and as many information types as can be counted.
LONGEST_GO = 4 + MAX_NAME + 2 + 2 * 0xFFFF

_CONTEXT = BASE_ALLOCATION.encode()
_NO_ZEROES = 2
_FIXED_NEWSTYLE = 1
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)  # a number, as ~ of a flag forgets the bits that have no name


class Export(NamedTuple):
    """One that can be opened. The flags that depend on the negotiated replies are added to `flags`."""

    size: int
    flags: TransmissionFlag
    name: str | None = None  #: canonical
    description: str | None = None
    minimum: int = 1
    preferred: int = 4096
    maximum: int = MAX_PAYLOAD


class Terms(NamedTuple):
    """What a server has, and what it offers."""

    exports: Mapping[str, Export]  #: by the names that open them
    listed: Sequence[tuple[str, str]] = ()  #: names and descriptions
    tls: TlsMode = TlsMode.OFF
    structured_replies: bool = True
    meta_contexts: bool = True
    handshake_flags: int = 3


class Agreement(NamedTuple):
    """What a client was told of the export that it has opened, and what it has negotiated."""

    size: int
    flags: TransmissionFlag
    minimum: int = 1
    maximum: int = MAX_PAYLOAD
    structured: bool = False
    extended: bool = False
    contexts: bool = False

    @property
    def style(self) -> Style:
        """The form of the replies."""
        if self.extended:
            return Style.EXTENDED
        return Style.STRUCTURED if self.structured else Style.SIMPLE


class Phase(enum.Enum):
    """How far a conversation has come."""

    HANDSHAKE = enum.auto()
    TRANSMISSION = enum.auto()
    LEFT = enum.auto()  # the client has said so
    BROKEN = enum.auto()  # by the client: the connection has to be closed


# --- the handshake ---


class Answer(NamedTuple):
    """A reply to an option. The data of None are some text."""

    option: int
    reply: int
    data: bytes | None = b""


class OptionRefusedError(Exception):
    """An option is answered with this error."""


class NotWellFormedError(OptionRefusedError):
    """The data of an option are not what they should be."""

    def __init__(self) -> None:
        super().__init__(OptionReply.ERR_INVALID)


class BrokenError(Exception):
    """The client has done what ends its connection."""


class HandshakeModel:
    """The handshake, from the client's flags on.

    Args:
        terms: Of the server.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.phase = Phase.HANDSHAKE
        self.agreement: Agreement | None = None  #: when an export has been opened for good
        self.export_name = ""  #: by which it was
        self.shutting_down = False
        self.tls = False
        self._buffer = bytearray()
        self._client_flags: int | None = None
        self._answers: list[Answer | bytes] = []
        self._forget()

    def _forget(self) -> None:
        self.structured = self.extended = False
        self._context_of: str | None = None  # for which export base:allocation was selected
        self._options = OPTIONS
        self._has_listed = False

    def hear(self, data: bytes) -> list[Answer | bytes]:
        """Return what has to be answered to some more bytes: replies to options, or the bare answer to EXPORT_NAME."""
        self._buffer += data
        try:
            while self.phase is Phase.HANDSHAKE and self._step():
                pass
        except BrokenError:
            self.phase = Phase.BROKEN
        answers, self._answers = self._answers, []
        return answers

    @property
    def at_boundary(self) -> bool:
        """Whether what was heard are whole messages."""
        return not self._buffer

    def rest(self) -> bytes:
        """Return what came behind the handshake."""
        return bytes(self._buffer)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _step(self) -> bool:
        """Take one message; False if none is whole."""
        if self._client_flags is None:
            if len(self._buffer) < 4:
                return False
            self._client_flags = int.from_bytes(self._take(4), "big")
            if self._client_flags & ~self.terms.handshake_flags:
                raise BrokenError
            return True
        if len(self._buffer) < 16:
            return False
        magic, option, length = struct.unpack_from(">8sII", self._buffer)
        if magic != b"IHAVEOPT" or length > MAX_OPTION_DATA or not self._options:
            raise BrokenError
        if len(self._buffer) < 16 + length:
            return False
        self._options -= 1
        self._take(16)
        self._carry_out(option, self._take(length))
        return True

    def _carry_out(self, option: int, data: bytes) -> None:
        if option == Option.SET_META_CONTEXT:
            self._context_of = None
        if option == Option.ABORT:
            self._answer(option, OptionReply.ACK)
            self.phase = Phase.LEFT
            return
        try:
            self._admit(option, data)
            self._OPTIONS[Option(option)](self, option, data)
        except OptionRefusedError as refusal:
            if option == Option.EXPORT_NAME:
                raise BrokenError from None
            (reply,) = refusal.args
            self._answers.append(Answer(option, reply, None))

    def _admit(self, option: int, data: bytes) -> None:
        """Refuse what is refused whatever the data say."""
        if self.shutting_down:
            raise OptionRefusedError(OptionReply.ERR_SHUTDOWN)
        if not (self._client_flags or 0) & _FIXED_NEWSTYLE and option != Option.EXPORT_NAME:
            raise OptionRefusedError(OptionReply.ERR_INVALID)
        if self.terms.tls is TlsMode.REQUIRE and not self.tls and option != Option.STARTTLS:
            raise OptionRefusedError(OptionReply.ERR_TLS_REQD)
        unknown = option not in self._OPTIONS
        unknown |= option in (8, 11) and not self.terms.structured_replies
        unknown |= option in (9, 10) and not self.terms.meta_contexts
        if unknown:
            raise OptionRefusedError(OptionReply.ERR_UNSUP)
        if option in (3, 5, 8, 11) and data:
            raise OptionRefusedError(OptionReply.ERR_INVALID)
        if len(data) > LONGEST_GO:
            raise OptionRefusedError(OptionReply.ERR_TOO_BIG if option in (9, 10) else OptionReply.ERR_INVALID)

    def _answer(self, option: int, reply: int, data: bytes = b"") -> None:
        self._answers.append(Answer(option, reply, data))

    def _export_name(self, option: int, data: bytes) -> None:
        if self.extended:
            raise BrokenError
        export, agreement = self._opened(_name(data))
        zeroes = 0 if (self._client_flags or 0) & _NO_ZEROES else 124
        self._answers.append(struct.pack(">QH", export.size, agreement.flags) + bytes(zeroes))
        self._begin(_name(data), agreement)

    def _list(self, option: int, data: bytes) -> None:
        for name, description in self.terms.listed:
            length = len(name.encode())
            self._answer(option, OptionReply.SERVER, struct.pack(">I", length) + (name + description).encode())
        self._answer(option, OptionReply.ACK)
        if not self._has_listed:
            self._options += OPTIONS * len(self.terms.listed)
            self._has_listed = True

    def _starttls(self, option: int, data: bytes) -> None:
        if self.tls:
            raise OptionRefusedError(OptionReply.ERR_INVALID)
        if self.terms.tls is TlsMode.OFF:
            raise OptionRefusedError(OptionReply.ERR_POLICY)
        if self._buffer:
            raise BrokenError
        self._answer(option, OptionReply.ACK)
        self._forget()
        self.tls = True

    def _info_or_go(self, option: int, data: bytes) -> None:
        text, rest = _cut(data)
        count = int.from_bytes(rest[:2], "big")
        if len(rest) != 2 + 2 * count:
            raise NotWellFormedError
        asked = {int.from_bytes(rest[place : place + 2], "big") for place in range(2, len(rest), 2)}
        export, agreement = self._opened(_name(text))
        told = [(InfoType.EXPORT, struct.pack(">QH", export.size, agreement.flags))]
        if InfoType.NAME in asked and export.name is not None:
            told.append((InfoType.NAME, export.name.encode()))
        if InfoType.DESCRIPTION in asked and export.description is not None:
            told.append((InfoType.DESCRIPTION, export.description.encode()))
        if InfoType.BLOCK_SIZE in asked:
            told.append((InfoType.BLOCK_SIZE, struct.pack(">III", export.minimum, export.preferred, export.maximum)))
        for kind, value in told:
            self._answer(option, OptionReply.INFO, struct.pack(">H", kind) + value)
        self._answer(option, OptionReply.ACK)
        if option == Option.GO:
            self._begin(_name(text), agreement)

    def _structured_reply(self, option: int, data: bytes) -> None:
        if self.extended:
            raise OptionRefusedError(OptionReply.ERR_EXT_HEADER_REQD)
        if self.structured:
            raise OptionRefusedError(OptionReply.ERR_INVALID)
        self.structured = True
        self._answer(option, OptionReply.ACK)

    def _extended_headers(self, option: int, data: bytes) -> None:
        if self.extended:
            raise OptionRefusedError(OptionReply.ERR_INVALID)
        self.extended = True
        self._answer(option, OptionReply.ACK)

    def _list_meta_context(self, option: int, data: bytes) -> None:
        _, queries = _queries(data)
        if not queries or b"base:" in queries or _CONTEXT in queries:
            self._answer(option, OptionReply.META_CONTEXT, bytes(4) + _CONTEXT)
        self._answer(option, OptionReply.ACK)

    def _set_meta_context(self, option: int, data: bytes) -> None:
        if not (self.structured or self.extended):
            raise OptionRefusedError(OptionReply.ERR_INVALID)
        name, queries = _queries(data)
        if _CONTEXT in queries:
            self._context_of = name
            self._answer(option, OptionReply.META_CONTEXT, b"\0\0\0\1" + _CONTEXT)
        self._answer(option, OptionReply.ACK)

    def _opened(self, name: str) -> tuple[Export, Agreement]:
        export = self.terms.exports.get(name)
        if export is None:
            raise OptionRefusedError(OptionReply.ERR_UNKNOWN)
        flags = export.flags
        contexts = self._context_of == name
        if self.structured or self.extended:
            flags |= TransmissionFlag.SEND_DF
        if self.extended and contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        agreement = Agreement(
            export.size, flags, export.minimum, export.maximum, self.structured, self.extended, contexts
        )
        return export, agreement

    def _begin(self, name: str, agreement: Agreement) -> None:
        self.export_name = name
        self.agreement = agreement
        self.phase = Phase.TRANSMISSION

    _OPTIONS: ClassVar[Mapping[int, Callable[[HandshakeModel, int, bytes], None]]] = {
        Option.EXPORT_NAME: _export_name,
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info_or_go,
        Option.GO: _info_or_go,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _list_meta_context,
        Option.SET_META_CONTEXT: _set_meta_context,
        Option.EXTENDED_HEADERS: _extended_headers,
    }


def _cut(data: bytes) -> tuple[bytes, bytes]:
    """Return the string whose length comes first, and what is behind it."""
    length = int.from_bytes(data[:4], "big")
    if len(data) < 4 + length or len(data) < 4:
        raise NotWellFormedError
    return data[4 : 4 + length], data[4 + length :]


def _name(data: bytes) -> str:
    if len(data) > MAX_NAME or 0 in data:
        raise NotWellFormedError
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise NotWellFormedError from None


def _queries(data: bytes) -> tuple[str, list[bytes]]:
    text, rest = _cut(data)
    count = int.from_bytes(rest[:4], "big")
    if len(rest) < 4 + 4 * count:
        raise NotWellFormedError
    if count > QUERIES:
        raise OptionRefusedError(OptionReply.ERR_TOO_BIG)
    found, rest = [], rest[4:]
    for _ in range(count):
        query, rest = _cut(rest)
        if len(query) > MAX_NAME:
            raise NotWellFormedError
        found.append(query)
    return _name(text), found


# --- the transmission phase ---


class Verdict(NamedTuple):
    """What has to become of one request: an error, or 0 and the request as it reaches a back end."""

    error: int
    cookie: int
    command: int
    flags: int
    offset: int
    length: int
    payload: bytes = b""


class TransmissionModel:
    """The transmission phase of one connection."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.phase = Phase.TRANSMISSION
        self.shutting_down = False
        self._buffer = bytearray()

    @property
    def at_boundary(self) -> bool:
        """Whether what was heard are whole requests."""
        return not self._buffer

    def hear(self, data: bytes) -> list[Verdict]:
        """Return what has to become of the requests that are complete now."""
        self._buffer += data
        found = []
        while self.phase is Phase.TRANSMISSION and (verdict := self._next()) is not None:
            found.append(verdict)
        if self.phase is not Phase.TRANSMISSION:
            self._buffer.clear()
        return found

    def _next(self) -> Verdict | None:
        extended = self.agreement.extended
        layout, right = (">IHHQQQ", 0x21E41C71) if extended else (">IHHQQI", 0x25609513)
        header = struct.calcsize(layout)
        if len(self._buffer) < header:
            return None
        magic, flags, command, cookie, offset, length = struct.unpack_from(layout, self._buffer)
        if magic != right:
            self.phase = Phase.BROKEN
            return None
        if command == Command.DISC:
            self.phase = Phase.LEFT
            return None
        has_payload = bool(extended and flags & _PAYLOAD_LEN)
        size = length if has_payload or command == Command.WRITE else 0
        payload = bytes(self._buffer[header : header + size]) if size <= MAX_SKIPPED else b""
        error, effect = judge(self.agreement, command, flags, offset, length, payload)
        error = NbdError.ESHUTDOWN if self.shutting_down else error
        if error and size > MAX_SKIPPED:
            self.phase = Phase.BROKEN
            return None
        if len(self._buffer) < header + size:
            return None
        del self._buffer[: header + size]
        if has_payload and not error:
            flags &= ~_PAYLOAD_LEN
        return Verdict(error, cookie, command, flags, offset, effect, payload if command == Command.WRITE else b"")


def judge(agreement: Agreement, command: int, flags: int, offset: int, length: int, payload: bytes) -> tuple[int, int]:
    """Return the error that a request gets, and the length that it is about; the payload matters if it is all there."""
    offered = agreement.flags
    has_payload = False
    if agreement.extended:
        flags, has_payload = flags & ~_PAYLOAD_LEN, bool(flags & _PAYLOAD_LEN)
    if command > Command.BLOCK_STATUS:
        return NbdError.EINVAL, length
    writes = command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
    if writes and TransmissionFlag.READ_ONLY in offered:
        return NbdError.EPERM, length
    if has_payload and command != Command.WRITE:
        if not (command == Command.BLOCK_STATUS and TransmissionFlag.BLOCK_STATUS_PAYLOAD in offered):
            return NbdError.EINVAL, length
        if length != 12 or payload[8:] != b"\0\0\0\1":
            return NbdError.EINVAL, length
        length = int.from_bytes(payload[:8], "big")
    outside = length == 0 or offset + length > agreement.size
    if command == Command.FLUSH:
        outside = bool(offset or length)
    if outside:
        return (NbdError.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else NbdError.EINVAL), length
    if offset % agreement.minimum or length % agreement.minimum:
        return NbdError.EINVAL, length
    if flags & ~valid_flags(command, offered):
        return NbdError.EINVAL, length
    if command in (Command.READ, Command.WRITE) and length > agreement.maximum:
        chunked = agreement.style is not Style.SIMPLE
        return (NbdError.EOVERFLOW if command == Command.READ and chunked else NbdError.EINVAL), length
    if command in _NEEDED and _NEEDED[Command(command)] not in offered:
        return NbdError.EINVAL, length
    if command == Command.BLOCK_STATUS and not agreement.contexts:
        return NbdError.EINVAL, length
    return 0, length


_NEEDED = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.CACHE: TransmissionFlag.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}


def valid_flags(command: int, offered: TransmissionFlag) -> int:
    """Return the flags that a request of this command may have, but for PAYLOAD_LEN."""
    valid = CommandFlag.FUA if TransmissionFlag.SEND_FUA in offered else 0
    if command == Command.READ and TransmissionFlag.SEND_DF in offered:
        valid |= CommandFlag.DF
    if command == Command.BLOCK_STATUS:
        valid |= CommandFlag.REQ_ONE
    if command == Command.WRITE_ZEROES:
        valid |= CommandFlag.NO_HOLE
        valid |= CommandFlag.FAST_ZERO if TransmissionFlag.SEND_FAST_ZERO in offered else 0
    return int(valid)


# --- what is behind it ---


class Expected(NamedTuple):
    """The reply that a request has to get."""

    request: Verdict
    error: int
    content: bytes | None = b""  #: of the range, if the reply is about content; None if it cannot be known


class Disk:
    """A disk that carries out requests one after the other, at once.

    Args:
        content: What it begins with.
        broken: What is touched there fails with EIO.
    """

    def __init__(self, content: bytes, broken: range = range(0)) -> None:
        self.content = bytearray(content)
        self.broken = broken

    def carry_out(self, verdict: Verdict) -> Expected:
        """Do what is asked, and return the reply."""
        if verdict.error:
            return Expected(verdict, verdict.error)
        start, end = verdict.offset, verdict.offset + verdict.length
        if self.is_broken(start, end):
            return Expected(verdict, NbdError.EIO)
        if verdict.command == Command.WRITE:
            self.content[start:end] = verdict.payload
        elif verdict.command in (Command.WRITE_ZEROES, Command.TRIM):
            self.content[start:end] = bytes(verdict.length)
        told = verdict.command in (Command.READ, Command.BLOCK_STATUS)
        return Expected(verdict, 0, bytes(self.content[start:end]) if told else b"")

    def is_broken(self, start: int, end: int) -> bool:
        """Tell whether a range has something in common with what fails."""
        return start < self.broken.stop and self.broken.start < end


_CHANGES = (Command.WRITE, Command.WRITE_ZEROES, Command.TRIM)


def unordered(replies: Sequence[Expected]) -> list[Expected]:
    """Return what replies there have to be if requests that are under way together are not carried out in their order.

    Of content that one of them changes nothing is known then.
    """
    changes = [reply.request for reply in replies if not reply.error and reply.request.command in _CHANGES]
    return [
        reply._replace(content=None) if any(_overlap(reply.request, change) for change in changes) else reply
        for reply in replies
    ]


def _overlap(one: Verdict, other: Verdict) -> bool:
    return one.offset < other.offset + other.length and other.offset < one.offset + one.length


class ConversationModel:
    """Both phases, and the disks behind them.

    Args:
        terms: Of the server.
        disks: By the names of exports; they are changed by what is heard.
    """

    def __init__(self, terms: Terms, disks: Mapping[str, Disk]) -> None:
        self.handshake = HandshakeModel(terms)
        self.transmission: TransmissionModel | None = None
        self.answers: list[Answer | bytes] = []  #: to options, so far
        self.replies: list[Expected] = []  #: to requests, so far
        self._disks = disks

    @property
    def phase(self) -> Phase:
        """How far it has come."""
        return self.handshake.phase if self.transmission is None else self.transmission.phase

    @property
    def agreement(self) -> Agreement | None:
        """What was agreed on, once the handshake is over."""
        return self.handshake.agreement

    @property
    def is_between_messages(self) -> bool:
        """Whether what was heard are whole messages."""
        return (self.handshake if self.transmission is None else self.transmission).at_boundary

    @property
    def disk(self) -> Disk:
        """What is behind the export that was opened."""
        return self._disks[self.handshake.export_name]

    def shut_down(self) -> None:
        """Have all that is asked from now on refused."""
        self.handshake.shutting_down = True
        if self.transmission is not None:
            self.transmission.shutting_down = True

    def hear(self, data: bytes) -> None:
        """Take some more bytes."""
        if self.transmission is None:
            self.answers += self.handshake.hear(data)
            if self.handshake.agreement is None:
                return
            self.transmission = TransmissionModel(self.handshake.agreement)
            data = self.handshake.rest()
        self.replies += [self.disk.carry_out(verdict) for verdict in self.transmission.hear(data)]

"""The handshake: from the greeting until requests begin ("Fixed newstyle negotiation").

Decides what each option is answered, and what holds afterwards. What only the server knows, which exports there are and
what they can do, is asked for by an event that the driver answers; TLS is the driver's affair too. Knows nothing of
sockets, time or back ends.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple, NoReturn

from nbdkitpy.protocol.constants import (
    BASE_ALLOCATION,
    BASE_ALLOCATION_ID,
    MAX_STRING,
    ClientFlag,
    HandshakeFlag,
    InfoType,
    Magic,
    Option,
    OptionReply,
    TlsMode,
    TransmissionFlag,
)
from nbdkitpy.protocol.errors import OptionError, RemoteProtocolError, printable
from nbdkitpy.protocol.messages import (
    CLIENT_FLAGS,
    MAX_INFO_REQUEST,
    OPTION_HEADER,
    BlockSizeInfo,
    error_text,
    export_name_answer,
    greeting,
    info_block_size,
    info_export,
    info_text,
    meta_context,
    option_reply,
    parse_info_request,
    parse_meta_context_request,
    parse_name,
    server_entry,
)

__all__ = [
    "MAX_OPTIONS",
    "MAX_OPTION_DATA",
    "Closed",
    "Event",
    "ExportFacts",
    "Handshake",
    "ListExports",
    "Negotiated",
    "OpenExport",
    "Ready",
    "StartTls",
]

#: An option with more data than so many bytes ends the connection.
MAX_OPTION_DATA = 1 << 20

#: So many options may be sent, unless the driver says otherwise, and so many more for each export that was listed, as
#: in nbdkit.
MAX_OPTIONS = 32

#: Data is kept until the option is complete, up to so many bytes: what the longest well-formed GO has. More than this,
#: and data that does not matter, is dropped as it arrives, so that unfinished handshakes take little memory.
_MAX_KEPT = MAX_INFO_REQUEST

_SELECTED_BY_LIST = (b"base:", BASE_ALLOCATION.encode())
_SELECTED_BY_SET = (BASE_ALLOCATION.encode(),)

_INFO_TYPES = frozenset(InfoType)
#: What a client may well ask for: whether we know it, whether there is TLS, and what is our own affair.
_NO_FAULT = frozenset({OptionReply.ERR_UNSUP, OptionReply.ERR_POLICY, OptionReply.ERR_SHUTDOWN})

_CHUNKED_REPLIES = frozenset({Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS})
_META_CONTEXTS = frozenset({Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT})


class Negotiated(NamedTuple):
    """What client and server agreed on. Where both kinds of replies are on, extended headers take precedence."""

    structured_replies: bool
    extended_headers: bool
    contexts: tuple[str, ...]  #: selected metadata contexts


class ExportFacts(NamedTuple):
    """What the client is told of an export that was opened for it."""

    size: int  #: in bytes
    flags: TransmissionFlag  #: under the replies that were negotiated
    name: str | None = None  #: canonical name, if there is one
    description: str | None = None
    block_size: BlockSizeInfo | None = None


class OpenExport(NamedTuple):
    """Open this export and answer by `export_opened` or `export_refused`. After INFO close it again."""

    name: str  #: empty for the default export
    option: Option  #: EXPORT_NAME, INFO or GO
    wants_description: bool


class _Bare:
    """An event that says no more than what it is: any two of one kind are equal."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)


class ListExports(_Bare):
    """Find the exports and answer by `exports_listed` or `list_refused`."""


class StartTls(_Bare):
    """Send what there is to send, then go through the TLS handshake, and say so by `tls_started`. If that fails, close
    the connection: nothing more may be sent, or understood, in clear text."""


class Ready(_Bare):
    """The handshake is over: what was negotiated is final, and the client's next bytes are requests."""


class Closed(_Bare):
    """The client took its leave: send what there is to send, and close the connection."""


Event = OpenExport | ListExports | StartTls | Ready | Closed


class _State(enum.Enum):
    CLIENT_FLAGS = enum.auto()
    OPTION = enum.auto()  # its header is next
    DATA = enum.auto()  # of an option that is decided when it is complete
    SKIP = enum.auto()  # data that does not matter
    LISTING = enum.auto()  # the driver's answer is due
    OPENING = enum.auto()  # the same
    TLS = enum.auto()  # the driver's as well
    TRANSMISSION = enum.auto()
    CLOSED = enum.auto()


class _Rule(NamedTuple):
    """How a known option is treated."""

    carry_out: Callable[[Handshake, bytes], None]
    max_data: int = 0  # bytes
    if_longer: OptionReply = OptionReply.ERR_INVALID


class Handshake:
    """The server's side of one handshake.

    The driver feeds `receive_data`, takes events from `next_event` until there is none, answers those that ask, and
    sends what `data_to_send` returns after each: the greeting is there from the start. Set `shutting_down` when the
    server is about to end, and every option but ABORT is refused.
    """

    __slots__ = (
        "_buffer",
        "_client_flags",
        "_contexts",
        "_contexts_export",
        "_event",
        "_extended_headers",
        "_length",
        "_listed",
        "_max_options",
        "_offered",
        "_opening",
        "_option",
        "_options_left",
        "_output",
        "_refusal",
        "_requested",
        "_state",
        "_structured_replies",
        "_tls",
        "_tls_mode",
        "_withheld",
        "refusals",
        "shutting_down",
    )

    def __init__(
        self,
        *,
        handshake_flags: int = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES,
        structured_replies: bool = True,
        meta_contexts: bool = True,
        tls: TlsMode = TlsMode.OFF,
        max_options: int = MAX_OPTIONS,
    ) -> None:
        """Begin with the greeting.

        Args:
            handshake_flags: what the greeting offers, out of `HandshakeFlag`.
            structured_replies: whether STRUCTURED_REPLY and EXTENDED_HEADERS are options that we know.
            meta_contexts: whether LIST_META_CONTEXT and SET_META_CONTEXT are.
            tls: whether STARTTLS is granted, and whether there is anything else before it.
            max_options: so many may be sent, and so many more for each export that was listed; at least 1.
        """
        # Numbers that a client made up are never turned into enum.IntFlag, which remembers each value that it has seen.
        self._offered = int(handshake_flags)
        self._client_flags = 0
        self._withheld = frozenset[int]()
        if not structured_replies:
            self._withheld |= _CHUNKED_REPLIES
        if not meta_contexts:
            self._withheld |= _META_CONTEXTS
        self._max_options = max_options
        self._tls_mode = tls
        self._tls = False  # it is up
        self.shutting_down = False
        #: What was wrong with options that were refused, since the driver last took it from here.
        self.refusals: list[str] = []

        self._state = _State.CLIENT_FLAGS
        self._event: Event | None = None  # the next to be taken
        self._buffer = bytearray()  # received and not yet understood
        self._output = bytearray(greeting(self._offered))

        # The option that is being read or answered.
        self._option = 0
        self._length = 0  # of its data that has still to come out of the buffer
        self._refusal: tuple[OptionReply, str] | None = None  # what its header alone earns it
        self._requested = frozenset[int]()  # information that we know, if it is INFO or GO
        self._opening: OpenExport | None = None

        self._forget()

    def _forget(self) -> None:
        """Begin anew with what is agreed on by options."""
        self._requested = frozenset()
        self._opening = None
        self._options_left = self._max_options
        self._listed = False
        self._structured_replies = False
        self._extended_headers = False
        self._contexts: tuple[str, ...] = ()
        self._contexts_export = ""

    # The driver's side.

    def receive_data(self, data: bytes | memoryview) -> None:
        """Take bytes from the client. Once the connection is to be closed they are swallowed."""
        if self._state is not _State.CLOSED:
            self._buffer += data

    def next_event(self) -> Event | None:
        """Return what the driver has to do next; None is to feed more.

        Each event is returned once; after Ready, Closed and errors there is none any more.

        Raises:
            RemoteProtocolError: the connection has to be closed. What earlier options were answered may still be sent.
        """
        while self._event is None:
            step = self._STEPS.get(self._state)
            if step is None or not step(self):
                break
        event, self._event = self._event, None
        return event

    def data_to_send(self) -> bytes:
        """Return all that is to be sent now, once."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def take_unprocessed(self) -> bytes:
        """Return, once, what came behind the option that ended the handshake: the first requests."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    @property
    def negotiated(self) -> Negotiated:
        """What holds now. While an export is being opened, and afterwards, that is what holds for this export."""
        # "Metadata querying": a selection counts only for the export that it was made for.
        valid = self._opening is None or self._opening.name == self._contexts_export
        return Negotiated(self._structured_replies, self._extended_headers, self._contexts if valid else ())

    def export_opened(self, facts: ExportFacts) -> None:
        """Tell the client that the export of the last OpenExport is open; GO and EXPORT_NAME end the handshake."""
        opening = self._take_opening()
        if opening.option is Option.EXPORT_NAME:
            zeroes = not self._client_flags & ClientFlag.NO_ZEROES
            self._output += export_name_answer(facts.size, facts.flags, zeroes=zeroes)
        else:
            self._send_information(facts)
            self._reply(OptionReply.ACK)
        if opening.option is not Option.INFO:
            self._opening = opening  # from now on for good
            self._state = _State.TRANSMISSION
            self._event = Ready()

    def export_refused(self, reply: OptionReply, message: str) -> None:
        """Tell the client that the export of the last OpenExport is not to be had, and why.

        Raises:
            RemoteProtocolError: the option was EXPORT_NAME, which is refused by closing the connection.
        """
        self._take_opening()
        self._refuse(reply, message)

    def exports_listed(self, exports: Iterable[tuple[str, str]]) -> None:
        """Answer ListExports by names and descriptions; these may be empty."""
        replies = [option_reply(self._option, OptionReply.SERVER, server_entry(*export)) for export in exports]
        self._take_listing()
        self._output += b"".join(replies)
        self._reply(OptionReply.ACK)
        if not self._listed:  # each may be asked about, but one cannot haggle for ever by listing
            self._options_left += self._max_options * len(replies)
            self._listed = True

    def list_refused(self, reply: OptionReply, message: str) -> None:
        """Answer ListExports by an error."""
        self._take_listing()
        self._refuse(reply, message)

    def tls_started(self) -> None:
        """Answer StartTls: from now on bytes come and go through TLS.

        What was agreed on before is forgotten, as anybody on the way may have said it ("NBD_OPT_STARTTLS").
        """
        assert self._state is _State.TLS, "TLS was not asked for"
        assert not self._buffer, "there is clear text that nobody may understand"
        self._forget()
        self._tls = True
        self._state = _State.OPTION

    # States: each method takes what it needs out of the buffer, or returns False if that is not there.

    def _read_client_flags(self) -> bool:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: CLIENT_FLAGS.size]
        if flags & ~self._offered:
            self._fail(f"client flags 0x{flags:x} are not among the 0x{self._offered:x} that were offered")
        self._client_flags = flags
        self._state = _State.OPTION
        return True

    def _read_option(self) -> bool:
        if len(self._buffer) < OPTION_HEADER.size:
            return False
        magic, option, length = OPTION_HEADER.unpack_from(self._buffer)
        del self._buffer[: OPTION_HEADER.size]
        if magic != Magic.IHAVEOPT:
            self._fail(f"option begins with 0x{magic:016x}, not with 0x{Magic.IHAVEOPT:016x}")
        if length > MAX_OPTION_DATA:
            self._fail(f"option {option} has {length} bytes of data, more than {MAX_OPTION_DATA}")
        if not self._options_left:
            self._fail("too many options")
        self._options_left -= 1
        if option == Option.SET_META_CONTEXT:  # replaces the selection even if it fails ("Metadata querying")
            self._contexts = ()
        self._option = option
        self._length = length
        self._refusal = self._objection(option, length)
        matters = self._refusal is None and option != Option.ABORT
        self._state = _State.DATA if matters else _State.SKIP
        return True

    def _read_data(self) -> bool:
        if len(self._buffer) < self._length:
            return False
        data = bytes(self._buffer[: self._length])
        del self._buffer[: self._length]
        self._carry_out(data)
        return True

    def _skip_data(self) -> bool:
        skipped = min(self._length, len(self._buffer))
        del self._buffer[:skipped]
        self._length -= skipped
        if self._length:
            return False
        self._carry_out(b"")
        return True

    def _objection(self, option: int, length: int) -> tuple[OptionReply, str] | None:
        """Return why an option with this header is refused, whatever its data is."""
        if option == Option.ABORT:
            return None
        if not self._client_flags & ClientFlag.FIXED_NEWSTYLE and option != Option.EXPORT_NAME:
            return OptionReply.ERR_INVALID, "without the client flag FIXED_NEWSTYLE there is only EXPORT_NAME"
        if self._tls_mode is TlsMode.REQUIRE and not self._tls and option != Option.STARTTLS:
            return OptionReply.ERR_TLS_REQD, "this server requires TLS"
        rule = self._RULES.get(option)
        if rule is None or option in self._withheld:
            return OptionReply.ERR_UNSUP, f"option {option} is not supported"
        if length > rule.max_data:
            return rule.if_longer, f"{Option(option).name} takes at most {rule.max_data} bytes of data, not {length}"
        return None

    def _carry_out(self, data: bytes) -> None:
        """Do what the option says, now that all of it has arrived."""
        self._state = _State.OPTION
        try:
            if self.shutting_down and self._option != Option.ABORT:
                raise OptionError(OptionReply.ERR_SHUTDOWN, "the server is shutting down")
            if self._refusal is not None:
                raise OptionError(*self._refusal)
            self._RULES[self._option].carry_out(self, data)
        except OptionError as error:
            self._refuse(error.reply, str(error))
            if error.reply not in _NO_FAULT:
                self.refusals.append(f"option {_option_name(self._option)}: {printable(str(error))}")

    # Options: each method takes the data, which is no longer than its rule says, and answers or raises OptionError.

    def _export_name(self, data: bytes) -> None:
        if self._extended_headers:
            raise OptionError(OptionReply.ERR_INVALID, "with extended headers an export is opened by GO")
        self._ask_to_open(parse_name(data), frozenset())

    def _abort(self, _: bytes) -> None:
        self._reply(OptionReply.ACK)
        self._close()
        self._event = Closed()

    def _list(self, _: bytes) -> None:
        self._state = _State.LISTING
        self._event = ListExports()

    def _starttls(self, _: bytes) -> None:
        if self._tls:
            raise OptionError(OptionReply.ERR_INVALID, "TLS is on already")
        if self._tls_mode is TlsMode.OFF:
            raise OptionError(OptionReply.ERR_POLICY, "this server does not offer TLS")
        if self._buffer:  # anybody on the way may have put it there, for us to take it for what comes through TLS
            self._fail("something came in clear text behind STARTTLS")
        self._reply(OptionReply.ACK)
        self._state = _State.TLS
        self._event = StartTls()

    def _info_or_go(self, data: bytes) -> None:
        self._ask_to_open(*parse_info_request(data))

    def _structured_reply(self, _: bytes) -> None:
        if self._extended_headers:
            raise OptionError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers are on already")
        if self._structured_replies:
            raise OptionError(OptionReply.ERR_INVALID, "structured replies are on already")
        self._structured_replies = True
        self._reply(OptionReply.ACK)

    def _extended(self, _: bytes) -> None:
        if self._extended_headers:
            raise OptionError(OptionReply.ERR_INVALID, "extended headers are on already")
        self._extended_headers = True
        self._reply(OptionReply.ACK)

    def _list_meta_context(self, data: bytes) -> None:
        queries = parse_meta_context_request(data).queries
        if not queries or any(query in _SELECTED_BY_LIST for query in queries):
            self._reply(OptionReply.META_CONTEXT, meta_context(0, BASE_ALLOCATION))  # ids are for SET_META_CONTEXT
        self._reply(OptionReply.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        if not (self._structured_replies or self._extended_headers):
            raise OptionError(OptionReply.ERR_INVALID, "metadata contexts need structured replies or extended headers")
        request = parse_meta_context_request(data)
        if any(query in _SELECTED_BY_SET for query in request.queries):
            self._contexts = (BASE_ALLOCATION,)
            self._contexts_export = request.name
            self._reply(OptionReply.META_CONTEXT, meta_context(BASE_ALLOCATION_ID, BASE_ALLOCATION))
        self._reply(OptionReply.ACK)

    # Steps that several of the above share.

    def _ask_to_open(self, name: str, requested: frozenset[int]) -> None:
        self._requested = requested & _INFO_TYPES
        self._opening = OpenExport(name, Option(self._option), InfoType.DESCRIPTION in requested)
        self._state = _State.OPENING
        self._event = self._opening

    def _take_opening(self) -> OpenExport:
        assert self._state is _State.OPENING, "no export is being opened"
        assert self._opening is not None, "this state has one"
        opening, self._opening = self._opening, None
        self._state = _State.OPTION
        return opening

    def _take_listing(self) -> None:
        assert self._state is _State.LISTING, "no list of exports was asked for"
        self._state = _State.OPTION

    def _send_information(self, facts: ExportFacts) -> None:
        """Send what was asked for and is known, each kind once; the size and the flags go out unasked."""
        self._reply(OptionReply.INFO, info_export(facts.size, facts.flags))
        if InfoType.NAME in self._requested and facts.name is not None:
            self._reply(OptionReply.INFO, info_text(InfoType.NAME, facts.name))
        if InfoType.DESCRIPTION in self._requested and facts.description is not None:
            self._reply(OptionReply.INFO, info_text(InfoType.DESCRIPTION, facts.description))
        if InfoType.BLOCK_SIZE in self._requested and facts.block_size is not None:
            self._reply(OptionReply.INFO, info_block_size(facts.block_size))

    def _reply(self, reply: OptionReply, data: bytes = b"") -> None:
        self._output += option_reply(self._option, reply, data)

    def _refuse(self, reply: OptionReply, message: str) -> None:
        if self._option == Option.EXPORT_NAME:  # which has no error reply
            self._fail(f"EXPORT_NAME was refused: {message}")
        self._reply(reply, error_text(message))

    def _fail(self, message: str) -> NoReturn:
        self._close()
        raise RemoteProtocolError(printable(message))  # the driver's reasons for a refusal may quote the client

    def _close(self) -> None:
        self._state = _State.CLOSED
        self._buffer.clear()

    _STEPS: ClassVar[dict[_State, Callable[[Handshake], bool]]] = {
        _State.CLIENT_FLAGS: _read_client_flags,
        _State.OPTION: _read_option,
        _State.DATA: _read_data,
        _State.SKIP: _skip_data,
    }

    _RULES: ClassVar[dict[int, _Rule]] = {
        Option.EXPORT_NAME: _Rule(_export_name, MAX_STRING),
        Option.ABORT: _Rule(_abort),
        Option.LIST: _Rule(_list),
        Option.STARTTLS: _Rule(_starttls),
        Option.INFO: _Rule(_info_or_go, _MAX_KEPT),
        Option.GO: _Rule(_info_or_go, _MAX_KEPT),
        Option.STRUCTURED_REPLY: _Rule(_structured_reply),
        Option.LIST_META_CONTEXT: _Rule(_list_meta_context, _MAX_KEPT, OptionReply.ERR_TOO_BIG),
        Option.SET_META_CONTEXT: _Rule(_set_meta_context, _MAX_KEPT, OptionReply.ERR_TOO_BIG),
        Option.EXTENDED_HEADERS: _Rule(_extended),
    }


def _option_name(option: int) -> str:
    return Option(option).name if option in Handshake._RULES else str(option)

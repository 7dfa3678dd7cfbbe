"""Numbers of the NBD protocol, under the names that its document gives them, without the ``NBD_`` and kind prefixes."""

from __future__ import annotations

import enum

__all__ = [
    "BASE_ALLOCATION",
    "BASE_ALLOCATION_ID",
    "DEFAULT_PORT",
    "MAX_STRING",
    "ClientFlag",
    "Command",
    "CommandFlag",
    "HandshakeFlag",
    "InfoType",
    "Magic",
    "NbdError",
    "Option",
    "OptionReply",
    "ReplyFlag",
    "ReplyType",
    "TlsMode",
    "TransmissionFlag",
]

#: Assigned by IANA to the newstyle protocol.
DEFAULT_PORT = 10809

#: No string on the wire is longer, in bytes of UTF-8 ("Values": a name of exactly this length is legal).
MAX_STRING = 4096

#: The one metadata context that is served, and the number it has in replies.
BASE_ALLOCATION = "base:allocation"
BASE_ALLOCATION_ID = 1


class Magic(enum.IntEnum):
    """Numbers by which a message is known."""

    NBDMAGIC = 0x4E42444D41474943
    IHAVEOPT = 0x49484156454F5054
    OLDSTYLE = 0x0000420281861253
    OPTION_REPLY = 0x0003E889045565A9
    REQUEST = 0x25609513
    SIMPLE_REPLY = 0x67446698
    STRUCTURED_REPLY = 0x668E33EF
    EXTENDED_REQUEST = 0x21E41C71
    EXTENDED_REPLY = 0x6E8A278C


class TlsMode(enum.Enum):
    """Whether clients may or have to use TLS; the protocol's words are NOTLS, SELECTIVETLS and FORCEDTLS."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"

    def __str__(self) -> str:
        return self.value


class HandshakeFlag(enum.IntFlag):
    """What the server's greeting offers."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class ClientFlag(enum.IntFlag):
    """What the client takes of that offer."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """What a client may ask for during the handshake. PEEK_EXPORT (4) was withdrawn and is unknown to us."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """Answers to an option; bit 31 marks errors."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_PLATFORM = 0x80000004
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_BLOCK_SIZE_REQD = 0x80000008
    ERR_TOO_BIG = 0x80000009
    ERR_EXT_HEADER_REQD = 0x8000000A


class InfoType(enum.IntEnum):
    """Kinds of information in an INFO reply."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """What can be done with an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(enum.IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ReplyFlag(enum.IntFlag):
    """Flags of a reply chunk."""

    DONE = 1


class ReplyType(enum.IntEnum):
    """Kinds of reply chunks; bit 15 marks errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


class NbdError(enum.IntEnum):
    """The only error numbers that may be sent ("Error values"); they are not the system's own."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108

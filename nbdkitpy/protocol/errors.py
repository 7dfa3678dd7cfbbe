"""What a client's violation raises, and how a back end's errors look on the wire."""

from __future__ import annotations

import errno

from nbdkitpy.protocol.constants import NbdError, OptionReply

__all__ = ["OptionError", "RemoteProtocolError", "nbd_error", "printable"]


class RemoteProtocolError(Exception):
    """The client broke a rule after which its bytes cannot be trusted: its connection ends, and nothing else does."""


class OptionError(Exception):
    """An option cannot be honoured: the client gets an error reply with this text, and the handshake goes on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


#: Values that mean the same on the wire; all others become EINVAL ("Error values").
_ON_THE_WIRE = {
    errno.EPERM: NbdError.EPERM,
    errno.EROFS: NbdError.EPERM,
    errno.EACCES: NbdError.EPERM,
    errno.EIO: NbdError.EIO,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.ESHUTDOWN: NbdError.ESHUTDOWN,
}


def nbd_error(number: int | None, *, fast_zero: bool = False, dont_fragment: bool = False) -> NbdError:
    """Return what the client is told of a back end's errno.

    ENOTSUP may be sent only for a WRITE_ZEROES with FAST_ZERO, EOVERFLOW only for a READ with DF. An error without
    a number is EIO.
    """
    if number is None:
        return NbdError.EIO
    if fast_zero and number in (errno.ENOTSUP, errno.EOPNOTSUPP):
        return NbdError.ENOTSUP
    if dont_fragment and number == errno.EOVERFLOW:
        return NbdError.EOVERFLOW
    return _ON_THE_WIRE.get(number, NbdError.EINVAL)


def printable(text: str | bytes, limit: int = 256) -> str:
    """Return text from a client so that it can be shown: nothing a terminal or a log would act on, and not too long.

    At most `limit` characters are taken; what is cut off is marked by an ellipsis.
    """
    if isinstance(text, bytes):
        # No character has more than 4 bytes: one that is cut in two here is past the limit.
        text = text[: 4 * limit + 4].decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[:limit] + "…"

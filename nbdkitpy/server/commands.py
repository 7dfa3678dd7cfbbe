"""The commands of the protocol, carried out on one export: a request goes in, its reply comes out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

from nbdkitpy.backend import Buffer, Flags
from nbdkitpy.exceptions import describe
from nbdkitpy.extents import Extent, ExtentType
from nbdkitpy.protocol.constants import Command, CommandFlag
from nbdkitpy.protocol.errors import nbd_error
from nbdkitpy.protocol.replies import Replies
from nbdkitpy.protocol.transmission import Request
from nbdkitpy.server.checks import checked_data, error_number, locked, normalised, reason
from nbdkitpy.stack import OpenExport

__all__ = ["ARGUMENTS", "VERBS", "Commands", "Log", "is_hole"]

#: Where errors go.
Log: TypeAlias = "logging.Logger | logging.LoggerAdapter[logging.Logger]"

#: Which verb of a handle carries out a command.
VERBS: dict[int, str] = {
    Command.READ: "pread",
    Command.WRITE: "pwrite",
    Command.FLUSH: "flush",
    Command.TRIM: "trim",
    Command.CACHE: "cache",
    Command.WRITE_ZEROES: "zero",
    Command.BLOCK_STATUS: "extents",
}

#: Reads of at least so many bytes are asked for holes, if the handle has any; with more pieces it does not pay.
_SPARSE = 16 << 10
_MOST_PIECES = 32

# Plain numbers: operations on members of an enum take many times as long.
_WIRE_FUA = int(CommandFlag.FUA)
_WIRE_DF = int(CommandFlag.DF)
_WIRE_REQ_ONE = int(CommandFlag.REQ_ONE)
_FUA = int(Flags.FUA)
_REQ_ONE = int(Flags.REQ_ONE)
_ZERO = int(ExtentType.ZERO)


class Commands:
    """Carries out requests, in whatever thread; nothing that a backend does comes out of here but as a reply.

    Args:
        export: What is served.
        replies: The form in which this client wants its answers.
        lock: Held during each call into the export, if not None.
        log: Where errors go.
        name: Of the connection, for the log.
    """

    def __init__(self, export: OpenExport, replies: Replies, lock: threading.Lock | None, log: Log, name: str) -> None:
        handle = export.handle
        self._replies = replies
        self._log = log
        self._name = name
        self._knows_extents = export.capabilities.can_extents
        #: Reads of at least so many bytes may be answered by holes in place of zeroes; None if none are.
        self.sparse = _SPARSE if handle.sparse and self._knows_extents and replies.chunked else None
        #: The verbs, as they are to be called.
        self.pread = locked(handle.pread, lock)
        self.pwrite = locked(handle.pwrite, lock)
        self._others: dict[int, Callable[..., None]] = {
            Command.FLUSH: locked(handle.flush, lock),
            Command.TRIM: locked(handle.trim, lock),
            Command.WRITE_ZEROES: locked(handle.zero, lock),
            Command.CACHE: locked(handle.cache, lock),
        }
        self._extents = locked(normalised(handle.extents), lock)

    def perform(self, request: Request) -> list[Buffer]:
        """Carry out a request and return its reply, whatever happens."""
        try:
            return _WORK[request.command](self, request)
        except BaseException as error:  # SystemExit too: nothing that a backend raises ends more than its request
            return [self.failure(request, error)]

    def failure(self, request: Request, error: BaseException) -> bytes:
        """Log why a request failed, and return the reply that says so."""
        number, text, trace = error_number(error), "internal error of the server", None
        if isinstance(error, OSError):
            text = reason(error) or "input/output error"
        else:
            trace = error
        what = f"{VERBS[request.command]} of {request.length} bytes at {request.offset}"
        self._log.error("%s: %s: %s", self._name, what, describe(error), exc_info=trace)
        fast_zero = bool(request.flags & CommandFlag.FAST_ZERO)
        wire = nbd_error(number, fast_zero=fast_zero, dont_fragment=bool(request.flags & _WIRE_DF))
        return self._replies.error(request.cookie, request.offset, wire, text)

    def holes(self, request: Request) -> list[Extent] | None:
        """Return the extents of a read if some of them need not be sent, else None."""
        if not self.may_have_holes(request):
            return None
        extents = self._extents(request.length, request.offset, 0)
        covered = extents[-1].offset + extents[-1].length == request.offset + request.length
        if not covered or len(extents) > _MOST_PIECES or not any(map(is_hole, extents)):
            return None
        return extents

    def may_have_holes(self, request: Request) -> bool:
        """Tell whether :meth:`holes` would ask the export."""
        return self.sparse is not None and request.length >= self.sparse and not request.flags & _WIRE_DF

    # --- command by command ---

    def _do_read(self, request: Request) -> list[Buffer]:
        _, _, cookie, offset, length, _ = request
        replies, holes = self._replies, self.holes(request)
        if holes is None:
            data = checked_data(self.pread(length, offset), length)
            return [replies.data(cookie, offset, length), data]
        pieces: list[Buffer] = []
        for extent in holes:
            start, count, _ = extent
            if is_hole(extent):
                pieces.append(replies.hole(cookie, offset, start, count))
            else:
                data = checked_data(self.pread(count, start), count)
                pieces += (replies.part(cookie, offset, start, count), data)
        pieces.append(replies.end(cookie, offset))
        return pieces

    def _do_write(self, request: Request) -> list[Buffer]:
        self.pwrite(request.payload, request.offset, _FUA if request.flags & _WIRE_FUA else 0)
        return [self._replies.success(request.cookie, request.offset)]

    def _do_other(self, request: Request) -> list[Buffer]:
        self._others[request.command](*ARGUMENTS[request.command](request))
        return [self._replies.success(request.cookie, request.offset)]

    def _do_block_status(self, request: Request) -> list[Buffer]:
        if self._knows_extents:
            return self.status(request, self._extents(*ARGUMENTS[Command.BLOCK_STATUS](request)))
        return self.status(request, [Extent(request.offset, request.length)])

    def status(self, request: Request, extents: list[Extent]) -> list[Buffer]:
        """Return the reply that tells a client of the extents that it asked for."""
        told = extents[:1] if request.flags & _WIRE_REQ_ONE else extents
        pairs = [(extent.length, extent.type) for extent in told]
        return [self._replies.block_status(request.cookie, request.offset, pairs)]


_WORK: dict[int, Callable[[Commands, Request], list[Buffer]]] = {
    Command.READ: Commands._do_read,
    Command.WRITE: Commands._do_write,
    Command.FLUSH: Commands._do_other,
    Command.TRIM: Commands._do_other,
    Command.CACHE: Commands._do_other,
    Command.WRITE_ZEROES: Commands._do_other,
    Command.BLOCK_STATUS: Commands._do_block_status,
}


def _fua(request: Request) -> int:
    return _FUA if request.flags & _WIRE_FUA else 0


def _zero_flags(request: Request) -> int:
    flags = Flags.NONE if request.flags & CommandFlag.NO_HOLE else Flags.MAY_TRIM
    if request.flags & _WIRE_FUA:
        flags |= Flags.FUA
    if request.flags & CommandFlag.FAST_ZERO:
        flags |= Flags.FAST_ZERO
    return int(flags)


#: What the verb of a command is called with.
ARGUMENTS: dict[int, Callable[[Request], tuple[Any, ...]]] = {
    Command.READ: lambda request: (request.length, request.offset),
    Command.WRITE: lambda request: (request.payload, request.offset, _fua(request)),
    Command.FLUSH: lambda request: (),
    Command.TRIM: lambda request: (request.length, request.offset, _fua(request)),
    Command.CACHE: lambda request: (request.length, request.offset),
    Command.WRITE_ZEROES: lambda request: (request.length, request.offset, _zero_flags(request)),
    Command.BLOCK_STATUS: lambda request: (
        request.length,
        request.offset,
        _REQ_ONE if request.flags & _WIRE_REQ_ONE else 0,
    ),
}


def is_hole(extent: Extent) -> bool:
    """Tell whether the client need not be sent the bytes of `extent`, as they are zeroes."""
    return bool(extent.type & _ZERO)

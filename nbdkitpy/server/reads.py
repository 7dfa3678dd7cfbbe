"""Reads that do not have to wait, by the shortest way that there is for each."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from nbdkitpy.backend import Buffer, FileRange, Handle
from nbdkitpy.extents import Extent
from nbdkitpy.protocol.replies import Replies
from nbdkitpy.protocol.transmission import Request
from nbdkitpy.server.batch import ROOM, Batch
from nbdkitpy.server.checks import checked_data, checked_range
from nbdkitpy.server.commands import Commands, is_hole
from nbdkitpy.server.ways import Ways
from nbdkitpy.server.workers import Pace

__all__ = ["Reads"]

T = TypeVar("T")

#: Reads up to this length are copied, in memory that stays in the processor's cache: that costs no more than the calls
#: that it takes to avoid it. Larger ones may be sent straight from the file, if the handle can name one.
_COPIED = 32 << 10

#: Up to this length which way is better is found out; nbdcopy's reads, of 256 KiB, are fastest from the file.
_EITHER = 128 << 10


class Reads:
    """Answers reads in the thread that receives them, or says that they have to wait.

    There are three ways, of which a handle offers some: its data are copied into the batch's memory, if they are at
    hand (``pread_into``); a large range goes from its file to the socket (``file_range``); and ``pread`` itself, if it
    never waits, or is quick, or if there is nobody else to call it.

    Args:
        handle: What is read.
        commands: That has its verbs under lock.
        batch: Where replies go.
        locked: Only one call at a time may be made into the handle.
        alone: There are no workers.
        pace: Of reads, measured.
    """

    def __init__(
        self,
        handle: Handle,
        commands: Commands,
        replies: Replies,
        batch: Batch,
        *,
        locked: bool,
        alone: bool,
        pace: Pace,
    ) -> None:
        self._commands = commands
        self._replies = replies
        self._batch = batch
        self._pread = commands.pread
        self._pace = pace
        self._alone = alone
        self._asks_at_once = alone or "extents" in handle.inline
        #: Fill a buffer from an offset on, and return whether that was possible without waiting.
        self.into: Callable[[memoryview, int], bool] | None = None if locked or alone else handle.pread_into
        self._inline = "pread" in handle.inline
        if self._inline:
            self.into = None
        self._file_range = None if locked else handle.file_range
        self._ways = Ways()
        #: Reads up to this length have nothing to gain from :meth:`at_once`, if they have no flags.
        self.plain = ROOM if self._file_range is None else _COPIED
        if commands.sparse is not None:
            self.plain = commands.sparse - 1

    @property
    def now(self) -> Callable[[int, int], Buffer | None]:
        """What returns the data of a range, or None if that would wait."""
        return self._pread if self._inline else self._paced  # kept, the latter would refer to us, and we to it

    def at_once(self, request: Request) -> bool:
        """Answer a read, of whatever kind, if that can be done without waiting.

        Raises:
            Exception: the backend's. Nothing has been sent.
        """
        holes = None
        if self._commands.may_have_holes(request):
            if not self._asks_at_once:
                return False
            holes = self._commands.holes(request)
        if holes is not None:
            return self._pieces(request, holes)
        return self._from_file(request) or self._whole(request)

    def _whole(self, request: Request) -> bool:
        _, _, cookie, offset, length, _ = request
        data = self._data(length, offset)
        if data is None:
            return False
        self._batch.append([self._replies.data(cookie, offset, length), data])
        return True

    def _data(self, length: int, offset: int) -> Buffer | None:
        if self.into is None:
            data = self.now(length, offset)
            return None if data is None else checked_data(data, length)
        if length > ROOM:
            return None
        view = self._batch.take(length)
        return view if self.into(view, offset) else None

    def _paced(self, count: int, offset: int) -> Buffer | None:
        if not self._pace.quick:
            if not self._alone:
                return None
            self._batch.send()  # replies do not wait for what comes after them
        begin = time.perf_counter()
        try:
            return self._pread(count, offset)
        finally:
            self._pace.took(time.perf_counter() - begin)

    # --- from a file ---

    def _from_file(self, request: Request) -> bool:
        """Answer a large read by sending a part of a file, if the handle says where it lies."""
        _, _, cookie, offset, length, _ = request
        if length <= _COPIED or self._file_range is None:
            return False
        if length <= _EITHER and self.into is not None and not self._ways.from_file(length):
            return False
        found = self._file_range(length, offset)
        if found is None:
            return False
        where = checked_range(found)
        replies, batch = self._replies, self._batch
        if not replies.chunked:
            batch.send_file(replies.data(cookie, offset, length), where, length, None)
            return True
        # DONE may not stand on a chunk that can still fail ("Structured reply flags"), hence one more chunk.
        header = replies.part(cookie, offset, offset, length)
        if batch.send_file(header, where, length, lambda missing: self._too_short(request, missing)):
            batch.append([replies.end(cookie, offset)])
        return True

    def _too_short(self, request: Request, missing: int) -> list[Buffer]:
        """What completes a chunk whose file has become shorter: what was announced, and that it is not the data."""
        error = OSError(errno.EIO, "the file has become shorter")
        return [bytes(missing), self._commands.failure(request, error)]

    # --- with holes ---

    def _pieces(self, request: Request, extents: list[Extent]) -> bool:
        """Answer a read by several chunks, if the data among them are at hand: all of them, or nothing is sent."""
        _, _, cookie, offset, _, _ = request
        found = self._sources([extent for extent in extents if not is_hole(extent)])
        if found is None:
            return False
        replies, batch, sources = self._replies, self._batch, iter(found)
        for extent in extents:
            start, count, _ = extent
            if is_hole(extent):
                batch.append([replies.hole(cookie, offset, start, count)])
                continue
            header, source = replies.part(cookie, offset, start, count), next(sources)
            if not isinstance(source, FileRange):
                batch.append([header, source])
            elif not batch.send_file(header, source, count, lambda missing: self._too_short(request, missing)):
                return True  # that was the end of the reply
        batch.append([replies.end(cookie, offset)])
        return True

    def _sources(self, extents: list[Extent]) -> Sequence[Buffer | FileRange] | None:
        """Return the data of `extents`, or where they lie, or None if some of them are not at hand."""
        if self.into is None or self._batch.make_room([extent.length for extent in extents]):
            return _all(self._data(count, start) for start, count, _ in extents)
        if self._file_range is None:
            return None
        where = _all(self._file_range(count, start) for start, count, _ in extents)
        return None if where is None else [checked_range(found) for found in where]


def _all(found: Iterable[T | None]) -> list[T] | None:
    """Return what was found, or None as soon as one is None."""
    result = []
    for one in found:
        if one is None:
            return None
        result.append(one)
    return result

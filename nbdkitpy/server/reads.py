"""Reads that do not have to wait, by the shortest way that there is for each."""

from __future__ import annotations

import contextlib
import errno
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from nbdkitpy.backend import Buffer, FileRange, Handle
from nbdkitpy.extents import Extent
from nbdkitpy.protocol.replies import Replies
from nbdkitpy.protocol.transmission import Request
from nbdkitpy.server.batch import FULL, ROOM, Batch
from nbdkitpy.server.budget import Budget, CancelledError
from nbdkitpy.server.checks import checked_data, checked_range
from nbdkitpy.server.commands import Commands, is_hole
from nbdkitpy.server.sender import FilePart
from nbdkitpy.server.ways import Ways
from nbdkitpy.server.workers import Pace

__all__ = ["Reads"]

T = TypeVar("T")

#: Makes a part of a tuple, in half the time that the class takes to be called.
_part: Callable[[tuple[bytes, int, int, bytes]], FilePart] = functools.partial(tuple.__new__, FilePart)

#: Reads up to this length are copied, in memory that stays in the processor's cache: that costs no more than the calls
#: that it takes to avoid it. Larger ones may be sent straight from the file, if the handle can name one.
_COPIED = 32 << 10

#: Up to this length which way is better is found out; nbdcopy's reads, of 256 KiB, are fastest from the file.
_EITHER = 128 << 10

#: So many bytes are asked for in one call where reads follow each other in a file.
_LONGEST_RUN = 1 << 20


class Reads:
    """Answers reads in the thread that receives them, or says that they have to wait.

    There are three ways, of which a handle offers some: its data are copied into the batch's memory, if they are at
    hand (``pread_into``); a large range goes from its file to the socket (``file_range``); and ``pread`` itself, if it
    never waits, or is quick, or if there is nobody else to call it.

    Args:
        handle: What is read.
        commands: That has its verbs under lock.
        batch: Where replies go.
        budget: What large replies are counted by, from before they are there until they are sent.
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
        budget: Budget,
        *,
        locked: bool,
        alone: bool,
        pace: Pace,
    ) -> None:
        self._commands = commands
        self._replies = replies
        self._batch = batch
        self._budget = budget
        self._pread = commands.pread
        self._pace = pace
        self._alone = alone
        self._asks_at_once = alone or "extents" in handle.inline
        self._inline = "pread" in handle.inline
        #: Fill a buffer from an offset on, and return whether that was possible without waiting.
        self._into = None if locked or alone or self._inline else handle.pread_into
        #: Answer a read of up to :data:`~nbdkitpy.server.batch.ROOM` bytes; False if it has to wait. Takes its cookie,
        #: offset and length.
        self.copy = None if self._into is None else _copier(self._into, replies, batch)
        self._file_range = None if locked else handle.file_range
        self._ways = Ways()
        #: Reads that follow each other, to be sent from the file together, and where the next one would begin.
        self.run: list[Request] = []
        self._run_end = 0
        self._waiting: list[Request] = []  # reads of earlier runs that turned out to have to wait
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

        It may be put off until :meth:`finish` is called, which has to be done as long as there is a :attr:`run`.

        Raises:
            Exception: the backend's. Nothing has been sent.
        """
        holes = None
        if self._commands.may_have_holes(request):
            if not self._asks_at_once:
                return False
            holes = self._commands.holes(request)
        if holes is not None:
            if request.length < FULL or self._into is not None:
                return self._pieces(request, holes)
            amount = sum(extent.length for extent in holes if not is_hole(extent))
            return self._held(amount, lambda: self._pieces(request, holes))
        if not self._comes_from_file(request.length):
            return self._whole(request)
        if self.run and (request.offset != self._run_end or self._run_end - self.run[0].offset >= _LONGEST_RUN):
            self.send_run()
        self.run.append(request)
        self._run_end = request.offset + request.length
        return True

    def _whole(self, request: Request) -> bool:
        _, _, cookie, offset, length, _ = request
        if self.copy is not None:
            return length <= ROOM and self.copy(cookie, offset, length)
        if length < FULL:
            return self._read(request)
        return self._held(length, lambda: self._read(request))

    def _read(self, request: Request) -> bool:
        _, _, cookie, offset, length, _ = request
        data = self.now(length, offset)
        if data is None:
            return False
        self._batch.append([self._replies.data(cookie, offset, length), checked_data(data, length)])
        return True

    def _held(self, size: int, answer: Callable[[], bool]) -> bool:
        """Have a read answered, whose data in memory have `size` bytes, within the budget."""
        if self._budget.is_cancelled:
            return True  # there is nobody to take it
        if not (self._inline or self._alone or self._pace.quick):
            return False
        with self._budget.holding(size):
            done = answer()
            self._batch.send()
        return done

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

    def _comes_from_file(self, length: int) -> bool:
        """Tell whether a read is to be sent by sending a part of a file, if the handle says where it lies."""
        if length <= _COPIED or self._file_range is None:
            return False
        return length > _EITHER or self.copy is None or self._ways.from_file(length)

    def finish(self) -> list[Request]:
        """Answer the reads that were put off, and return those of them that have to wait."""
        self.send_run()
        waiting, self._waiting = self._waiting, []
        return waiting

    def send_run(self) -> None:
        """Answer the reads that were put off, but for those that have to wait."""
        run, self.run = self.run, []
        where = None
        if len(run) > 1:
            with contextlib.suppress(BaseException):  # it comes again when they are asked for one by one
                where = self._find(self._run_end - run[0].offset, run[0].offset)
        if where is not None:
            self._send_from_file(where, run)
            return
        for request in run:
            self._send_one(request)

    def _send_one(self, request: Request) -> None:
        try:
            where = self._find(request.length, request.offset)
            if where is not None:
                self._send_from_file(where, [request])
            elif not self._whole(request):
                self._waiting.append(request)
        except CancelledError:
            raise
        except BaseException as error:
            self._batch.append([self._commands.failure(request, error)])

    def _find(self, count: int, offset: int) -> FileRange | None:
        found = None if self._file_range is None else self._file_range(count, offset)
        return None if found is None else checked_range(found)

    def _send_from_file(self, where: FileRange, run: Sequence[Request]) -> None:
        """Send the data of reads that follow each other, the first of which lie there."""
        replies, shift = self._replies, where.position - run[0].offset
        if not replies.chunked:
            whole = [
                _part((replies.data(cookie, offset, length), offset + shift, length, b""))
                for _, _, cookie, offset, length, _ in run
            ]
            self._batch.send_files(where.fd, whole, None)
            return
        # DONE may not stand on a chunk that can still fail ("Structured reply flags"), hence one more chunk.
        parts = [
            FilePart(replies.part(cookie, offset, offset, length), offset + shift, length, replies.end(cookie, offset))
            for _, _, cookie, offset, length, _ in run
        ]
        self._batch.send_files(where.fd, parts, lambda index, missing: self._too_short(run[index], missing))

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
            else:
                part = FilePart(header, source.position, count, b"")
                if not batch.send_files(source.fd, [part], lambda _, missing: self._too_short(request, missing)):
                    return True  # that was the end of the reply
        batch.append([replies.end(cookie, offset)])
        return True

    def _sources(self, extents: list[Extent]) -> Sequence[Buffer | FileRange] | None:
        """Return the data of `extents`, or where they lie, or None if some of them are not at hand."""
        if self._into is None or self._batch.make_room([extent.length for extent in extents]):
            return _all(self._data(count, start) for start, count, _ in extents)
        return _all(self._find(count, start) for start, count, _ in extents)

    def _data(self, length: int, offset: int) -> Buffer | None:
        if self._into is None:
            data = self.now(length, offset)
            return None if data is None else checked_data(data, length)
        view = self._batch.take(length)
        return view if self._into(view, offset) is True else None


def _copier(into: Callable[[memoryview, int], bool], replies: Replies, batch: Batch) -> Callable[[int, int, int], bool]:
    head, put_head = replies.data_size, replies.put_data

    def copy(cookie: int, offset: int, length: int) -> bool:
        start = batch.used + head
        end = start + length
        if end > batch.limit:
            batch.renew()
            start = batch.used + head
            end = start + length
        memory = batch.memory
        if into(memory[start:end], offset) is not True:  # not any other answer
            return False
        put_head(memory, batch.used, cookie, offset, length)
        batch.used = end
        return True

    return copy


def _all(found: Iterable[T | None]) -> list[T] | None:
    """Return what was found, or None as soon as one is None."""
    result = []
    for one in found:
        if one is None:
            return None
        result.append(one)
    return result

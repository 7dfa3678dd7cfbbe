"""Requests on their way through the cow filter."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from nbdkitpy import (
    BlockSize,
    Buffer,
    Extent,
    ExtentType,
    FileRange,
    FilterHandle,
    Flags,
    Handle,
    Support,
    normalise_extents,
)

from .overlay import Overlay
from .states import BELOW, DATA, ZERO

__all__ = ["MAX_BLOCK", "CowHandle", "Policy"]

#: The largest block.
MAX_BLOCK = 1 << 31

_MAX_PREFERRED = 32 << 20
_PIECE = 1 << 20  # zeroes are written, and blocks are copied, in pieces of about so many bytes
_MOST_BLOCKS = 1 << 32  # that can be zeroed at once: each 32768 of them take some hundred bytes of memory

_FUA = int(Flags.FUA)
_HOLE = int(ExtentType.HOLE | ExtentType.ZERO)


class Policy(NamedTuple):
    """What is copied to the overlay besides what is written."""

    on_read: bool | str  #: or: if there is a file of this name
    on_cache: bool

    def keeps_reads(self) -> bool:
        """Tell whether what is read is copied, now."""
        return self.on_read if isinstance(self.on_read, bool) else os.path.exists(self.on_read)


class CowHandle(FilterHandle):
    """Reads each block from the overlay or, if it is not there, from below; writes to the overlay only."""

    def __init__(self, next: Handle, overlay: Overlay, policy: Policy, give_back: Callable[[], None]) -> None:
        super().__init__(next)
        self._overlay = overlay
        self._states = overlay.states
        self._bits = overlay.bits
        self._size = overlay.size
        self._policy = policy
        self._give_back: Callable[[], None] | None = give_back
        self._inner_sizes = next.block_size()
        self._most_read = self._inner_sizes.maximum if self._inner_sizes else _PIECE
        self._can_extents = next.can_extents()
        self._can_cache = next.can_cache() is not Support.NONE
        self._set_shortcuts()

    def _set_shortcuts(self) -> None:
        """Offer the ways round pread that the inner handle has."""
        if self._policy.on_read is not False:
            return
        inner_into = self._copied_into if "pread" in self.next.inline else self.next.pread_into
        if inner_into is not None:
            self._inner_into: Callable[[memoryview, int], bool] = inner_into
            self.pread_into = self._pread_into
        if self.next.file_range is not None:
            self._inner_range = self.next.file_range
            self.file_range = self._file_range

    # --- what can be done: all, whatever the inner layers can ---

    def can_write(self) -> bool:
        return True

    def can_zero(self) -> Support:
        return Support.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def can_trim(self) -> bool:
        return True

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_flush(self) -> bool:
        return True

    def can_multi_conn(self) -> bool:
        """There is one overlay for all connections."""
        return True

    def can_cache(self) -> Support:
        return Support.NATIVE

    def can_extents(self) -> bool:
        return True

    def block_size(self) -> BlockSize:
        """Return what the inner layers demand of reads, and that writes of whole blocks are best."""
        minimum, preferred, maximum = self._inner_sizes or BlockSize(maximum=0xFFFFFFFF)
        best = min(max(preferred, self._overlay.block), _MAX_PREFERRED)
        if best > maximum:
            best = preferred
        return BlockSize(minimum, best, maximum)

    # --- reading ---

    def pread(self, count: int, offset: int) -> Buffer:
        if self._policy.on_read and self._policy.keeps_reads():
            with contextlib.suppress(OSError):  # what cannot be copied can still be read
                self._copy(count, offset)
        state = self._states.common(*self._overlay.span(count, offset))
        if state is not None:
            return self._read(state, count, offset)
        data = bytearray(count)
        view = memoryview(data)
        for start, length, kind in self._runs(count, offset):
            view[start - offset : start - offset + length] = self._read(kind, length, start)
        return data

    def _runs(self, count: int, offset: int) -> Iterator[tuple[int, int, int]]:
        """Yield offset, length and state of each part of a range that is alike."""
        for first, end, state in self._states.runs(*self._overlay.span(count, offset)):
            start, stop = max(first << self._bits, offset), min(end << self._bits, offset + count)
            yield start, stop - start, state

    def _read(self, state: int, count: int, offset: int) -> Buffer:
        if state == BELOW:
            return self.next.pread(count, offset)
        return self._overlay.read(count, offset) if state == DATA else bytes(count)

    def _read_below(self, start: int, end: int) -> memoryview:
        data = memoryview(bytearray(end - start))
        for at in range(start, end, self._most_read):
            length = min(self._most_read, end - at)
            data[at - start : at - start + length] = self.next.pread(length, at)  # ValueError if it is not so long
        return data

    def _pread_into(self, buffer: memoryview, offset: int) -> bool:
        count = len(buffer)
        state = self._states.common(*self._overlay.span(count, offset))
        if state == BELOW:
            return self._inner_into(buffer, offset)
        if state == DATA:
            return self._overlay.read_at_hand(buffer, offset)
        if state == ZERO:
            buffer[:] = bytes(count)
        return state == ZERO

    def _copied_into(self, buffer: memoryview, offset: int) -> bool:
        buffer[:] = self.next.pread(len(buffer), offset)
        return True

    def _file_range(self, count: int, offset: int) -> FileRange | None:
        state = self._states.common(*self._overlay.span(count, offset))
        if state == BELOW:
            return self._inner_range(count, offset)
        # If the end is at hand, so is, most likely, what lies before it.
        if state != DATA or not self._overlay.read_at_hand(memoryview(bytearray(1)), offset + count - 1):
            return None
        return FileRange(self._overlay.fd, self._overlay.position + offset)

    def cache(self, count: int, offset: int) -> None:
        if self._policy.on_cache:
            self._copy(count, offset)
        elif self._can_cache:
            for start, length, state in self._runs(count, offset):
                if state == BELOW:
                    self.next.cache(length, start)

    def extents(self, count: int, offset: int, flags: int) -> Iterator[Extent]:
        for start, length, state in self._runs(count, offset):
            found = self._extents(state, length, start, flags)
            yield from found
            known = found[-1].offset + found[-1].length
            if flags & Flags.REQ_ONE or known < start + length:  # the answer may end before the range does
                return

    def _extents(self, state: int, count: int, offset: int, flags: int) -> list[Extent]:
        if state == BELOW and self._can_extents:
            return normalise_extents(self.next.extents(count, offset, flags), count, offset)
        return [Extent(offset, count, _HOLE if state == ZERO else ExtentType.DATA)]

    # --- writing ---

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._write(data, offset)
        if flags and flags & _FUA:
            self._overlay.flush()

    def flush(self) -> None:
        self._overlay.flush()

    def trim(self, count: int, offset: int, flags: int) -> None:
        if count >> self._bits < _MOST_BLOCKS:  # else it is too much to remember, and a trim is a hint
            self.zero(count, offset, flags | Flags.MAY_TRIM)

    def zero(self, count: int, offset: int, flags: int) -> None:
        first, end = self._whole_blocks(count, offset)
        if not flags & Flags.MAY_TRIM:
            end = first  # the space has to be taken, and only writing does that
        edges = self._edges(count, offset, first, end)
        if edges and flags & Flags.FAST_ZERO:
            raise OSError(errno.ENOTSUP, "zeroes would have to be written")
        if end - first > _MOST_BLOCKS:
            raise OSError(errno.ENOMEM, f"cow: {count} bytes are more than can be zeroed at once")
        for start, stop in edges:
            self._write_zeroes(start, stop)
        with self._overlay.blocks.exclusive(first, end):
            self._states.set(first, end, ZERO)
        if flags & _FUA:
            self._overlay.flush()

    def _whole_blocks(self, count: int, offset: int) -> tuple[int, int]:
        """Return the first whole block of a range, and the one after the last; the last of the disk may be shorter."""
        first = offset + self._overlay.block - 1 >> self._bits
        stop = offset + count
        end = self._overlay.span(count, offset)[1] if stop == self._size else stop >> self._bits
        return first, max(first, end)

    def _edges(self, count: int, offset: int, first: int, end: int) -> Sequence[tuple[int, int]]:
        """Return start and end of what is outside of blocks `first` to `end`."""
        stop = offset + count
        if first == end:
            return [(offset, stop)]
        edges = [(offset, first << self._bits), (end << self._bits, stop)]
        return [(begin, finish) for begin, finish in edges if begin < finish]

    def _write_zeroes(self, start: int, stop: int) -> None:
        zeroes = memoryview(bytes(min(_PIECE, stop - start)))
        for at in range(start, stop, _PIECE):
            self._write(zeroes[: stop - at], at)

    def _write(self, data: memoryview, offset: int) -> None:
        overlay = self._overlay
        first, end = overlay.span(len(data), offset)
        if self._states.common(first, end) == DATA:
            overlay.write((data,), offset)
            return
        with overlay.blocks.exclusive(first, end):
            parts, start = self._completed(data, offset, first, end)
            overlay.take(parts, start, first, end)

    def _completed(self, data: memoryview, offset: int, first: int, end: int) -> tuple[Sequence[Buffer], int]:
        """Return what has to be written, and where, so that `data` is in the overlay in whole blocks."""
        start, stop = first << self._bits, min(end << self._bits, self._size)
        finish = offset + len(data)
        if end - first == 1 and start < offset and finish < stop:  # one read of what is below, rather than two
            old = self._old(first, start, stop)
            return ([old[: offset - start], data, old[finish - start :]], start) if old else ([data], offset)
        head = self._old(first, start, offset)
        tail = self._old(end - 1, finish, stop)
        return [head, data, tail], offset - len(head)

    def _old(self, block: int, start: int, stop: int) -> memoryview:
        """Return what a part of a block, or nothing of it, holds; nothing if it is in the overlay already."""
        state = self._states.of(block)
        if state == DATA or start == stop:
            return memoryview(b"")
        return self._read_below(start, stop) if state == BELOW else memoryview(bytes(stop - start))

    def _copy(self, count: int, offset: int) -> None:
        """Copy blocks to the overlay that are not there, a few at a time."""
        first, end = self._overlay.span(count, offset)
        few = max(_PIECE >> self._bits, 1)
        for start in range(first, end, few):
            stop = min(start + few, end)
            if BELOW in {state for _, _, state in self._states.runs(start, stop)}:
                self._copy_blocks(start, stop)

    def _copy_blocks(self, start: int, stop: int) -> None:
        with self._overlay.blocks.exclusive(start, stop):
            for first, end, state in list(self._states.runs(start, stop)):
                if state == BELOW:
                    at = first << self._bits
                    data = self._read_below(at, min(end << self._bits, self._size))
                    self._overlay.take((data,), at, first, end)

    def close(self) -> None:
        # Once only, even if an outer layer closes twice: others may have the overlay open.
        give_back, self._give_back = self._give_back, None
        try:
            super().close()
        finally:
            if give_back is not None:
                give_back()

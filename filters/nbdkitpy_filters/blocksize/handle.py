"""Requests on their way through the blocksize filter."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

from nbdkitpy import (
    BlockSize,
    Buffer,
    Extent,
    FileRange,
    FilterHandle,
    Flags,
    Handle,
    RangeLock,
    Support,
    normalise_extents,
)

__all__ = ["NO_LIMIT", "BlocksizeHandle", "Limits"]

#: As the maximum of a BlockSize it says that there is none; and what fits in 32 bits.
NO_LIMIT = 0xFFFFFFFF

#: Of the answer to a client, whose range may be of any length.
_MOST_QUESTIONS = 1024

_FUA = int(Flags.FUA)


class Limits(NamedTuple):
    """What requests to the inner layers keep to. The other two are multiples of the block."""

    block: int
    data: int  #: most bytes of one with data
    length: int  #: most bytes of one without


class BlocksizeHandle(FilterHandle):
    """Passes on what keeps to the limits, and makes of everything else requests that do.

    Whoever changes a part of a block is alone in it, from reading it to writing it back; whoever writes whole blocks
    shares them with others who do. The lock is held while the inner layers work.
    """

    inline: ClassVar[frozenset[str]] = frozenset({"pread", "trim", "cache", "extents"})

    def __init__(self, next: Handle, limits: Limits, lock: RangeLock) -> None:
        super().__init__(next)
        self._block, self._most_data, self._most_length = limits
        self._mask = self._block - 1  # the bits that are zero in an aligned number
        self._lock = lock
        self._has_fua = next.can_fua() is Support.NATIVE
        # What stands in for a verb that is lacking writes or reads as much at once as it is asked for.
        data_only = min(self._most_data, self._most_length)
        self._most_zeroed = self._most_length if next.can_zero() is Support.NATIVE else data_only
        self._most_cached = self._most_length if next.can_cache() is Support.NATIVE else data_only
        self.sparse = next.sparse
        if next.pread_into is not None:
            self._inner_into = next.pread_into
            self.pread_into = self._pread_into
        if next.file_range is not None:
            self._inner_range = next.file_range
            self.file_range = self._file_range

    def get_size(self) -> int:
        return self._down(self.next.get_size())

    def block_size(self) -> BlockSize:
        """Return that anything goes, and what is best."""
        inner = self.next.block_size() or BlockSize()
        return BlockSize(1, max(inner.preferred, self._block), NO_LIMIT)

    # --- reading ---

    def pread(self, count: int, offset: int) -> Buffer:
        if count <= self._most_data and not (count | offset) & self._mask:
            return self.next.pread(count, offset)
        start = self._down(offset)
        data = self._read(start, self._up(offset + count))
        return data[offset - start : offset - start + count] if len(data) != count else data

    def _read(self, start: int, end: int) -> bytearray:
        """Read an aligned range, however long."""
        data = bytearray(end - start)
        view = memoryview(data)
        for at, length in _pieces(start, end, self._most_data):
            view[at - start : at - start + length] = self.next.pread(length, at)  # ValueError if it is not so long
        return data

    def _pread_into(self, buffer: memoryview, offset: int) -> bool:
        count = len(buffer)
        start, end = self._down(offset), self._up(offset + count)
        if end - start > self._most_data:
            return False
        if end - start == count:
            return self._inner_into(buffer, offset)
        blocks = memoryview(bytearray(end - start))
        if self._inner_into(blocks, start) is not True:
            return False
        buffer[:] = blocks[offset - start : offset - start + count]
        return True

    def _file_range(self, count: int, offset: int) -> FileRange | None:
        if count > self._most_data or (count | offset) & self._mask:
            return None
        return self._inner_range(count, offset)

    def cache(self, count: int, offset: int) -> None:
        for at, length in _pieces(self._down(offset), self._up(offset + count), self._most_cached):
            self.next.cache(length, at)

    def extents(self, count: int, offset: int, flags: int) -> Iterator[Extent]:
        pieces = _pieces(self._down(offset), self._up(offset + count), self._most_length)
        for start, length in itertools.islice(pieces, _MOST_QUESTIONS):
            known = start
            for extent in self._aligned_extents(length, start, flags):
                known = extent.offset + extent.length
                yield extent
            if known < start + length:  # the answer may end before the range does
                break

    def _aligned_extents(self, count: int, offset: int, flags: int) -> Iterable[Extent]:
        found = normalise_extents(self.next.extents(count, offset, flags), count, offset)
        return self._whole_blocks(found, offset) if self._mask else found

    def _whole_blocks(self, found: list[Extent], start: int) -> Iterator[Extent]:
        """Yield extents of whole blocks; what is not known of all parts of a block is not known of the block."""
        pending = -1  # the block that `found` has a beginning of: the type of that
        for position, length, kind in found:
            end = position + length
            if start < position:  # this one begins within a block
                pending &= kind
                if end < start + self._block:
                    continue
                yield Extent(start, self._block, pending)
                start += self._block
            if start < self._down(end):
                yield Extent(start, self._down(end) - start, kind)
                start = self._down(end)
            pending = kind
        if start == found[0].offset:  # not one whole block
            yield Extent(start, self._block, self._type_of_block(pending, found[-1], start + self._block))

    def _type_of_block(self, kind: int, known: Extent, end: int) -> int:
        """Ask until all up to `end` is known; `known` is the last extent that is, `kind` joins those before it."""
        position = known.offset + known.length
        while position < end:
            for _, length, more in normalise_extents(
                self.next.extents(end - position, position, 0), end - position, position
            ):
                kind &= more
                position += length
        return kind

    # --- writing ---

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        count = len(data)
        if count <= self._most_data and not (count | offset) & self._mask:
            with self._lock.shared(offset, offset + count):
                self.next.pwrite(data, offset, flags)
            return
        with self._locked(count, offset), self._in_parts(flags) as part_flags:
            for start, end in self._edges(count, offset):
                self._change(data[start - offset : end - offset], start, part_flags)
            for at, length in _pieces(*self._middle(count, offset), self._most_data):
                self.next.pwrite(data[at - offset : at - offset + length], at, part_flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        edges = self._edges(count, offset)
        if edges and flags & Flags.FAST_ZERO:
            raise OSError(errno.ENOTSUP, "parts of blocks would have to be written")
        with self._locked(count, offset), self._in_parts(flags) as part_flags:
            for start, end in edges:
                self._change(memoryview(bytes(end - start)), start, part_flags & _FUA)
            for at, length in _pieces(*self._middle(count, offset), self._most_zeroed):
                self.next.zero(length, at, part_flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        start, end = self._middle(count, offset)
        with self._lock.shared(start, end), self._in_parts(flags) as part_flags:
            for at, length in _pieces(start, end, self._most_length):
                self.next.trim(length, at, part_flags)

    def _change(self, data: memoryview, offset: int, flags: int) -> None:
        """Write a part of a block, by all of it. The block is ours alone."""
        start = self._down(offset)
        block = self._read(start, start + self._block)
        block[offset - start : offset - start + len(data)] = data
        self.next.pwrite(memoryview(block), start, flags)

    def _locked(self, count: int, offset: int) -> contextlib.AbstractContextManager[None]:
        lock = self._lock.exclusive if (count | offset) & self._mask else self._lock.shared
        return lock(self._down(offset), self._up(offset + count))

    @contextlib.contextmanager
    def _in_parts(self, flags: int) -> Iterator[int]:
        """Yield the flags for each part of a request. One flush after them all stands in for FUA, if that is slow."""
        flush = flags & _FUA and not self._has_fua
        yield flags & ~_FUA if flush else flags
        if flush:
            self.next.flush()

    # --- arithmetic ---

    def _down(self, number: int) -> int:
        return number & ~self._mask

    def _up(self, number: int) -> int:
        return (number + self._mask) & ~self._mask

    def _middle(self, count: int, offset: int) -> tuple[int, int]:
        """Return start and end of the whole blocks of a range; they are equal if there are none."""
        start = self._up(offset)
        return start, max(start, self._down(offset + count))

    def _edges(self, count: int, offset: int) -> list[tuple[int, int]]:
        """Return start and end of what is not whole blocks of a range, each within one block."""
        start, end = self._middle(count, offset)
        if start > offset + count:
            return [(offset, offset + count)]
        edges = [(offset, start), (end, offset + count)]
        return [(first, last) for first, last in edges if first < last]


def _pieces(start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, most):
        yield at, min(most, end - at)

"""A part of a handle as a handle of its own, for filters that serve a range of what lies inside."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TypeVar

from nbdkitpy.backend import VERBS, Buffer, FilterHandle, Handle

__all__ = ["range_of"]

S = TypeVar("S")
T = TypeVar("T")


def range_of(handle: Handle, offset: int, size: int, name: str) -> Handle:
    """Return a handle on the `size` bytes of `handle` from `offset` on.

    All that `handle` can do it can do too, in the same ways: what is inline stays inline, and bytes that lie in a file
    are still sent from there. A range that begins at 0 costs nothing on requests.

    Args:
        handle: Is closed by closing what is returned.
        offset: Of the range in `handle`: 0 or more, and a multiple of its minimum block size.
        size: 0 or more.
        name: Of the filter, for messages.

    Raises:
        OSError: the range does not lie within `handle`, or begins in the middle of a block.
    """
    whole = handle.get_size()
    if not 0 <= offset <= offset + size <= whole:
        text = f"{name}: the range of {size} bytes at {offset} is not within the {whole} bytes of the disk"
        raise OSError(errno.EINVAL, text)
    block = handle.block_size()
    if block is not None and offset % block.minimum:
        text = f"{name}: the range begins at {offset}, which must be a multiple of the block size, {block.minimum}"
        raise OSError(errno.EINVAL, text)
    if offset:
        return _ShiftedHandle(handle, offset, size)
    return handle if size == whole else _ShorterHandle(handle, size)


class _ShorterHandle(FilterHandle):
    """The beginning of the next handle. That no request goes beyond the end is seen to by the core."""

    def __init__(self, next: Handle, size: int) -> None:
        super().__init__(next)
        self._size = size

    def get_size(self) -> int:
        return self._size


class _ShiftedHandle(_ShorterHandle):
    """A range of the next handle that begins at `start`."""

    inline = frozenset(VERBS)  # to add two numbers does not wait

    def __init__(self, next: Handle, start: int, size: int) -> None:
        super().__init__(next, size)
        self._start = start
        self.sparse = next.sparse
        if next.pread_into is not None:
            self.pread_into = _shifted(next.pread_into, start)
        if next.file_range is not None:
            self.file_range = _shifted(next.file_range, start)

    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset + self._start)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset + self._start, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset + self._start, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset + self._start, flags)

    def cache(self, count: int, offset: int) -> None:
        self.next.cache(count, offset + self._start)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        start = self._start
        for position, length, kind in self.next.extents(count, offset + start, flags):
            yield position - start, length, kind


def _shifted(read: Callable[[S, int], T], start: int) -> Callable[[S, int], T]:
    return lambda subject, offset: read(subject, offset + start)

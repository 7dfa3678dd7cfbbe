"""memory: a RAM disk, shared by all clients and gone when the server ends.

The disk is kept as regions of 1 MiB, each an anonymous memory mapping that is made when something is first written
there. The system gives such a mapping memory page by page as it is written, and takes it back page by page when it is
trimmed: a heap of smaller buffers was measured to give nothing back as long as every other one is in use. One byte for
each page tells data, zeroes that have memory, and holes apart.

Any number of threads may call at once, without a lock. What makes that safe:

* The interpreter's lock makes each step on a mapping, a bytearray or the dict of regions one that cannot be cut in two.
* A write changes the bytes first and then says that the pages are data; zero and trim say first what the pages become
  and then change the bytes. So, however requests are interleaved, a page with data in it is never said to be zero.
* A page changes to zero or hole only when a request covers all of it, so that a write it races with overlaps it, and
  the order of the two is nobody's to know.
* A region that is dropped lives on until the last one who reads it is done, and is never used for anything else.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

from nbdkitpy import (
    Client,
    Extent,
    ExtentType,
    Flags,
    Handle,
    Parameter,
    Plugin,
    Support,
    ThreadModel,
    choice,
    hookimpl,
    parse_size,
)

__all__ = ["Memory", "MemoryHandle", "register_plugins"]

_PAGE = mmap.PAGESIZE  # what can be trimmed on its own
_REGION_BITS = 20
_REGION = 1 << _REGION_BITS
_PAGES = _REGION // _PAGE

_DATA = int(ExtentType.DATA)
_ZERO = int(ExtentType.ZERO)
_HOLE = int(ExtentType.HOLE | ExtentType.ZERO)


class _Region:
    """An aligned MiB of the disk: its bytes, and for each page of it the type of extent that it is.

    Positions are relative to the region; all `end` are exclusive.
    """

    __slots__ = ("data", "kinds")

    def __init__(self) -> None:
        try:
            self.data = mmap.mmap(-1, _REGION, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.kinds = bytearray([_HOLE]) * _PAGES
        except (OSError, MemoryError) as error:
            raise OSError(errno.ENOMEM, f"memory: no memory for {_REGION} more bytes of the disk") from error
        if sys.platform == "linux":  # else huge pages, of 2 MiB, may come to stand for single small ones
            with contextlib.suppress(OSError):  # a kernel that has none does not know the advice
                self.data.madvise(mmap.MADV_NOHUGEPAGE)

    def write(self, data: bytes | memoryview, start: int, end: int) -> None:
        """Put `data` at `start` to `end`."""
        self.data[start:end] = data
        first, last = start // _PAGE, (end - 1) // _PAGE
        if first == last:  # most writes: ten times as fast as the assignment to a slice
            self.kinds[first] = _DATA
        else:
            self._set_kinds(_DATA, first, last + 1)

    def zero(self, start: int, end: int) -> None:
        """Make `start` to `end` zeroes that have their memory."""
        for edge_start, edge_end in _edges(start, end):
            self.write(bytes(edge_end - edge_start), edge_start, edge_end)
        first, last = _whole_pages(start, end)
        if first < last:
            self._set_kinds(_ZERO, first, last)
            self.data[first * _PAGE : last * _PAGE] = bytes((last - first) * _PAGE)

    def trim(self, start: int, end: int) -> None:
        """Make `start` to `end` zeroes, and give back the memory of the whole pages."""
        for edge_start, edge_end in _edges(start, end):
            zeroes = bytes(edge_end - edge_start)
            if self.data[edge_start:edge_end] != zeroes:  # writing to a hole would take memory
                self.data[edge_start:edge_end] = zeroes
        first, last = _whole_pages(start, end)
        if first < last:
            self._set_kinds(_HOLE, first, last)
            self._give_back(first * _PAGE, (last - first) * _PAGE)

    def _set_kinds(self, kind: int, first: int, last: int) -> None:
        self.kinds[first:last] = bytes([kind]) * (last - first)

    def _give_back(self, start: int, length: int) -> None:
        if sys.platform == "linux":  # elsewhere this advice does not promise zeroes
            with contextlib.suppress(OSError):  # memory that is locked (--swap) is not given back
                self.data.madvise(mmap.MADV_DONTNEED, start, length)
                return
        self.data[start : start + length] = bytes(length)

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where each run of pages of one type begins within `start` to `end`, and the type."""
        page = start // _PAGE
        kinds = self.kinds[page : -(-end // _PAGE)]
        while kinds:
            yield max(page * _PAGE, start), kinds[0]
            others = kinds.lstrip(kinds[:1])
            page += len(kinds) - len(others)
            kinds = others


def _whole_pages(start: int, end: int) -> tuple[int, int]:
    """Return the first page that lies wholly within the range, and the one after the last."""
    return -(-start // _PAGE), end // _PAGE


def _edges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of the range that are not whole pages, each within one page."""
    first, last = _whole_pages(start, end)
    if first > last:
        yield start, end
        return
    if start < first * _PAGE:
        yield start, first * _PAGE
    if last * _PAGE < end:
        yield last * _PAGE, end


def _pieces(count: int, offset: int) -> Iterator[tuple[int, int, int]]:
    """Cut a range of the disk: yield the index of each region, and start and end within it."""
    end = offset + count
    while offset < end:
        index, start = divmod(offset, _REGION)
        stop = min(_REGION, start + end - offset)
        yield index, start, stop
        offset += stop - start


def _merge(runs: Iterator[tuple[int, int]], end: int) -> Iterator[Extent]:
    """Turn runs, at least one and the last one up to `end`, into extents, no two neighbours alike."""
    start, kind = next(runs)
    for position, next_kind in runs:
        if next_kind != kind:
            yield Extent(start, position - start, kind)
            start, kind = position, next_kind
    yield Extent(start, end - start, kind)


class MemoryHandle(Handle):
    """A client's view of the disk, whose `regions`, by index, are those of the plugin."""

    inline: ClassVar[frozenset[str]] = frozenset({"pread", "pwrite", "flush", "trim", "zero", "cache", "extents"})
    sparse = True

    def __init__(self, size: int, regions: dict[int, _Region]) -> None:
        self._size = size
        self._regions = regions

    def get_size(self) -> int:
        return self._size

    def can_fast_zero(self) -> bool:
        return True

    def can_fua(self) -> Support:
        """Natively: nothing is more stable than memory here."""
        return Support.NATIVE

    def can_multi_conn(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        # A copy: a view would change under who holds it, when the next write comes.
        start = offset & (_REGION - 1)
        end = start + count
        if end > _REGION:
            return b"".join(self._views(count, offset))
        region = self._regions.get(offset >> _REGION_BITS)
        return bytes(count) if region is None else region.data[start:end]

    def _views(self, count: int, offset: int) -> Iterator[bytes | memoryview]:
        for index, start, end in _pieces(count, offset):
            region = self._regions.get(index)
            yield bytes(end - start) if region is None else memoryview(region.data)[start:end]

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        start = offset & (_REGION - 1)
        end = start + len(data)
        if end <= _REGION:
            self._region(offset >> _REGION_BITS).write(data, start, end)
            return
        done = 0
        for index, start, end in _pieces(len(data), offset):
            self._region(index).write(data[done : done + end - start], start, end)
            done += end - start

    def _region(self, index: int) -> _Region:
        region = self._regions.get(index)
        if region is None:  # another thread may be faster: all have to take the one that is in the dict
            region = self._regions.setdefault(index, _Region())
        return region

    def flush(self) -> None:
        """Do nothing: there is nothing more stable to go to."""

    def cache(self, count: int, offset: int) -> None:
        """Do nothing: all is near."""

    def trim(self, count: int, offset: int, flags: int) -> None:
        end = offset + count
        if end == self._size:  # nothing is behind it, so that the last page and region go as a whole
            end += -end % _REGION
        for first, region in self._present(offset, end):
            start, stop = max(offset - first, 0), min(end - first, _REGION)
            if stop - start == _REGION:
                self._regions.pop(first >> _REGION_BITS, None)
            else:
                region.trim(start, stop)

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags and flags & Flags.MAY_TRIM:
            self.trim(count, offset, flags)
            return
        if count > _physical_memory():  # better refused than tried, which ends with the system killing processes
            raise OSError(errno.ENOMEM, f"memory: {count} bytes that may not be a hole exceed the machine's memory")
        for index, start, end in _pieces(count, offset):
            self._region(index).zero(start, end)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[Extent]:
        end = offset + count
        extents = _merge(self._runs(offset, end), end)
        return itertools.islice(extents, 1) if flags and flags & Flags.REQ_ONE else extents

    def _runs(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        for first, region in self._present(offset, end):
            if offset < first:
                yield offset, _HOLE
                offset = first
            stop = min(first + _REGION, end)
            for position, kind in region.runs(offset - first, stop - first):
                yield first + position, kind
            offset = stop
        if offset < end:
            yield offset, _HOLE

    def _present(self, offset: int, end: int) -> Iterator[tuple[int, _Region]]:
        """Yield the regions of a range that are there, in order, each after its position on the disk."""
        wanted = range(offset >> _REGION_BITS, ((end - 1) >> _REGION_BITS) + 1)
        found: Iterable[int] = wanted
        if len(wanted) > len(self._regions):  # a copy, since other threads change the dict
            found = sorted(index for index in list(self._regions) if index in wanted)
        for index in found:
            region = self._regions.get(index)
            if region is not None:
                yield index << _REGION_BITS, region


def _physical_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Memory(Plugin):
    """Keeps the disk."""

    name = "memory"
    longname = "nbdkitpy RAM disk plugin"
    description = "Serves a disk that is kept in memory, shared by all clients, and lost when the server ends."

    size = Parameter(parse_size, required=True, magic=True, help="Size of the disk.")
    allocator = Parameter(
        choice("sparse"),
        default="sparse",
        metavar="ALLOCATOR",
        help="How memory is allocated; there is only sparse, which takes memory as the disk is written.",
    )

    def __init__(self) -> None:
        super().__init__()
        self._regions: dict[int, _Region] = {}

    def thread_model(self) -> ThreadModel:
        """Return ``PARALLEL``."""
        return ThreadModel.PARALLEL

    def dump(self) -> Mapping[str, str]:
        """Say, with nbdkit's keys, which of its other allocators there are."""
        return {"mlock": "no", "zstd": "no"}

    def open(self, export_name: str, readonly: bool, client: Client) -> MemoryHandle:
        return MemoryHandle(self.size, self._regions)

    def unload(self) -> None:
        """Forget the disk."""
        self._regions.clear()


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Register the plugin."""
    register(Memory)

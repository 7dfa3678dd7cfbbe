"""Handles on a regular file and on a block device."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from nbdkitpy import Buffer, ExtentType, FileRange, Flags, Handle, Support

from . import linux
from .sync import FileSync

__all__ = ["BlockDeviceHandle", "FileHandle"]


class FileHandle(Handle):
    """A regular file, open on a descriptor of its own."""

    # Writing puts data into the page cache, and where data lies is known to the file system, which may have to read
    # some of its own to say it, but seldom. All that must wait, FUA and flush, is not inline.
    inline = frozenset({"pwrite", "extents"})

    def __init__(self, fd: int, writable: bool, sync: FileSync) -> None:
        self.fd = fd
        self._writable = writable
        self._sync = sync
        self._unsupported: set[Callable[[int, int, int], None]] = set()  # operations that need not be tried again
        self._size = os.lseek(fd, 0, os.SEEK_END)  # st_size of a block device is 0
        self._has_extents = self._probe_extents()
        self.sparse = self._has_extents and os.fstat(fd).st_blocks * 512 < self._size
        if _has_nowait(fd):
            self.pread_into = _reader_into(fd)
            self.file_range = _range_finder(fd)

    def get_size(self) -> int:
        return self._size

    def can_write(self) -> bool:
        return self._writable

    def can_fast_zero(self) -> bool:
        return True

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_multi_conn(self) -> bool:
        return True  # all handles share the page cache, and a flush is of the file

    def can_cache(self) -> Support:
        return Support.NATIVE if hasattr(os, "posix_fadvise") else Support.NONE

    def can_extents(self) -> bool:
        return self._has_extents

    def pread(self, count: int, offset: int) -> Buffer:
        data = os.pread(self.fd, count, offset)
        if len(data) == count:
            return data
        return self._read_on(data, count, offset)

    def _read_on(self, data: bytes, count: int, offset: int) -> bytes:
        pieces = [data]
        missing = count - len(data)
        while missing:
            # The end of the file lies before the end of the export: somebody has truncated it.
            if not pieces[-1]:
                raise OSError(errno.EIO, f"the file ends at {offset + count - missing}, which is too soon")
            pieces.append(os.pread(self.fd, missing, offset + count - missing))
            missing -= len(pieces[-1])
        return b"".join(pieces)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        written = os.pwrite(self.fd, data, offset)
        if written != len(data):
            self._write_on(data[written:], offset + written)
        if flags and flags & Flags.FUA:
            self._sync.flush(self.fd)

    def _write_on(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self.fd, data, offset)
            if written == 0:
                raise OSError(errno.EIO, f"nothing could be written at {offset}")
            data = data[written:]
            offset += written

    def flush(self) -> None:
        self._sync.flush(self.fd)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._forget(count, offset)
        if flags & Flags.FUA:
            self._sync.flush(self.fd)

    def zero(self, count: int, offset: int, flags: int) -> None:
        if not self._zeroed(count, offset, flags):
            raise OSError(errno.EOPNOTSUPP, "there is no better way than to write zeroes")
        if flags & Flags.FUA:
            self._sync.flush(self.fd)

    def cache(self, count: int, offset: int) -> None:
        os.posix_fadvise(self.fd, offset, count, os.POSIX_FADV_WILLNEED)

    def extents(self, count: int, offset: int, flags: int) -> Iterator[tuple[int, int, int]]:
        # The position of the descriptor, which lseek moves and threads share, matters to nothing else here.
        end = offset + count
        while offset < end:
            data = self._next_data(offset, end)
            if data > offset:
                yield offset, data - offset, ExtentType.HOLE | ExtentType.ZERO
                if flags & Flags.REQ_ONE:
                    return
            offset = data
            if data < end:
                offset = self._next_hole(data, end)
                yield data, offset - data, ExtentType.DATA
                if flags & Flags.REQ_ONE:
                    return

    def close(self) -> None:
        os.close(self.fd)

    def _forget(self, count: int, offset: int) -> None:
        """Free what can be freed of a range; a trim is a hint, so that nothing may be."""
        self._punch(count, offset)

    def _zeroed(self, count: int, offset: int, flags: int) -> bool:
        """Zero a range by the best way that there is, or return False."""
        if flags & Flags.MAY_TRIM and self._punch(count, offset):
            return True
        if self._did(linux.zero_range, count, offset):
            return True
        # tmpfs knows only this. It may turn out half-way that it does not work: a fast zero has to fail at once.
        return not flags & Flags.FAST_ZERO and self._punch(count, offset) and self._did(linux.allocate, count, offset)

    def _punch(self, count: int, offset: int) -> bool:
        if not self._did(linux.punch_hole, count, offset):
            return False
        self.sparse = self._has_extents
        return True

    def _did(self, operation: Callable[[int, int, int], None], count: int, offset: int) -> bool:
        """Do `operation` and return True, or return False if it is not supported."""
        if operation in self._unsupported:
            return False
        try:
            operation(self.fd, offset, count)
        except OSError as error:
            if error.errno not in linux.UNSUPPORTED:
                raise
            self._unsupported.add(operation)
            return False
        return True

    def _probe_extents(self) -> bool:
        try:
            os.lseek(self.fd, 0, os.SEEK_HOLE)
        except OSError:  # ENXIO of an empty file too, which nobody can ask about
            return False
        return True

    def _next_data(self, offset: int, end: int) -> int:
        """Return where the next data are, `end` at most. What lies beyond the end of the file counts as data."""
        try:
            return min(os.lseek(self.fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        # No more data in the file. If it has been truncated, reads of what is gone have to fail rather than be zeroes.
        return max(offset, min(os.fstat(self.fd).st_size, end))

    def _next_hole(self, offset: int, end: int) -> int:
        """Return where the hole after the data at `offset` is, `end` at most."""
        try:
            hole = os.lseek(self.fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return end
        # At `offset` itself there is one only if it was punched since the data were found; data is a safe answer.
        return min(hole, end) if hole > offset else end


class BlockDeviceHandle(FileHandle):
    """A block device. What is not aligned to its sectors can be neither discarded nor zeroed by the device."""

    def __init__(self, fd: int, writable: bool, sync: FileSync) -> None:
        super().__init__(fd, writable, sync)
        self._sector = linux.sector_size(fd)

    def is_rotational(self) -> bool:
        return linux.is_rotational(self.fd)

    def _probe_extents(self) -> bool:
        return False

    def _forget(self, count: int, offset: int) -> None:
        start = -(-offset // self._sector) * self._sector
        end = (offset + count) // self._sector * self._sector
        if start < end:
            self._did(linux.discard, end - start, start)

    def _zeroed(self, count: int, offset: int, flags: int) -> bool:
        if (offset | count) % self._sector:
            return False
        if flags & Flags.MAY_TRIM and self._punch(count, offset):
            return True
        # The kernel writes the zeroes if the device cannot make them: right, but not fast.
        return not flags & Flags.FAST_ZERO and self._did(linux.zero_out, count, offset)


def _has_nowait(fd: int) -> bool:
    """Tell whether the file system of `fd` can say that a read would wait."""
    try:
        os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except (OSError, AttributeError):  # AttributeError: this is not Linux
        return False
    return True


def _reader_into(fd: int) -> Callable[[memoryview, int], bool]:
    preadv, nowait = os.preadv, os.RWF_NOWAIT

    def pread_into(buffer: memoryview, offset: int) -> bool:
        try:
            return preadv(fd, (buffer,), offset, nowait) == len(buffer)
        except OSError:  # it would wait; or pread will say what is wrong
            return False

    return pread_into


def _range_finder(fd: int) -> Callable[[int, int], FileRange | None]:
    preadv, nowait, probe = os.preadv, os.RWF_NOWAIT, (bytearray(1),)

    def file_range(count: int, offset: int) -> FileRange | None:
        # The end is in the page cache: so is, most likely, what lies before it.
        try:
            if preadv(fd, probe, offset + count - 1, nowait):
                return FileRange(fd, offset)
        except OSError:
            pass
        return None

    return file_range

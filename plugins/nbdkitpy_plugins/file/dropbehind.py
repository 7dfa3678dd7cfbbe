"""Reading and writing a file without leaving it in the page cache (cache=none)."""

from __future__ import annotations

import os
import threading
from collections import deque

from nbdkitpy import Buffer, FilterHandle

from .handle import FileHandle

__all__ = ["DropBehindHandle"]

#: So many bytes may have been written and not yet have been dropped for the second time.
_DROP_BEHIND = 8 << 20


class DropBehindHandle(FilterHandle):
    """Has the kernel drop from the page cache what was read or written through `next` (cache=none).

    What was written has to reach the device before it can be dropped. So the kernel is told twice: at once, which
    makes it begin to write, and when some more has been written. Nothing waits for that to end (sync_file_range
    could), since who waits is also told of a failure, which a later flush then would not be.
    """

    def __init__(self, next: FileHandle) -> None:
        super().__init__(next)
        self._fd = next.fd
        self._lock = threading.Lock()
        self._written: deque[tuple[int, int]] = deque()  # offset and length of what is told of a second time
        self._pending = 0  # bytes in _written

    def pread(self, count: int, offset: int) -> Buffer:
        data = self.next.pread(count, offset)
        self._drop(offset, count)
        return data

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset, flags)
        self._drop(offset, len(data))
        self._drop_later(offset, len(data))

    def flush(self) -> None:
        with self._lock:
            written, self._written, self._pending = self._written, deque(), 0
        self.next.flush()
        for offset, count in written:
            self._drop(offset, count)

    def _drop_later(self, offset: int, count: int) -> None:
        due = []
        with self._lock:
            self._written.append((offset, count))
            self._pending += count
            while self._pending > _DROP_BEHIND:
                due.append(self._written.popleft())
                self._pending -= due[-1][1]
        for range_ in due:
            self._drop(*range_)

    def _drop(self, offset: int, count: int) -> None:
        os.posix_fadvise(self._fd, offset, count, os.POSIX_FADV_DONTNEED)

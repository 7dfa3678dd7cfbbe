"""The way of a file to stable storage, which all handles on the file share.

Two things need to be known of the file rather than of one handle. A failed fsync is reported once, and the pages that
could not be written are then clean: another fsync succeeds, although data are lost. So the first failure has to be
remembered. And a flush that waits while another one runs is often covered by the next one that somebody else begins.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import weakref

__all__ = ["FileSync", "FileSyncs"]

#: Places for failures: two files share one, and then the failure, with a probability of one in so many.
_PLACES = 1 << 16


class FileSync:
    """Flushes one file.

    Args:
        failures: A failure is noted there, for all processes that have it in common.
        place: Where in it.
    """

    def __init__(self, failures: mmap.mmap | bytearray, place: int) -> None:
        self._failures = failures
        self._place = place
        self._lock = threading.Lock()  # held while the file is being flushed
        self._begun = 0  # counts flushes of the file, when they begin
        self._failure = ""  # text of the one that failed here

    def flush(self, fd: int) -> None:
        """Return when everything written to the file before the call is on stable storage.

        fdatasync is enough: it leaves out times and the like only, not what is needed to read the data back, such as
        where newly allocated blocks and holes are. The size of the file never changes here.

        Raises:
            OSError: it is not, or, with EIO, an earlier flush of this file has failed: the kernel says so only once.
        """
        begun = self._begun
        with self._lock:
            self._check()
            if self._begun != begun:
                return  # a flush that began after this call has ended
            self._begun += 1
            try:
                _fdatasync(fd)
            except OSError as error:
                self._failure = str(error)
                self._failures[self._place] = 1
                raise
            self._check()  # a process that shares this very descriptor may have been told in our place

    def _check(self) -> None:
        if self._failures[self._place]:
            why = f" ({self._failure})" if self._failure else ""
            raise OSError(errno.EIO, f"an earlier flush failed{why}, so writes may be lost")


class FileSyncs:
    """Finds the :class:`FileSync` of each file that is open, and remembers which files could not be flushed.

    Processes that are forked later remember it together.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_file: weakref.WeakValueDictionary[tuple[int, int, int], FileSync] = weakref.WeakValueDictionary()
        self._failures = mmap.mmap(-1, _PLACES)

    def of(self, status: os.stat_result) -> FileSync:
        """Return the one of the file that `status` describes; a block device is one file under all its names."""
        is_device = stat.S_ISBLK(status.st_mode)
        file = (1, status.st_rdev, 0) if is_device else (0, status.st_dev, status.st_ino)
        with self._lock:
            found = self._of_file.get(file)
            if found is None:
                found = self._of_file[file] = FileSync(self._failures, hash(file) % _PLACES)
            return found


def _fdatasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync

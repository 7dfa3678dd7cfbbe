"""The way of a file to stable storage, which all handles on the file share.

Two things need to be known of the file rather than of one handle. A failed fsync is reported once, and the pages that
could not be written are then clean: another fsync succeeds, although data are lost. So the first failure has to be
remembered. And a flush that waits while another one runs is often covered by the next one that somebody else begins.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import weakref
from collections.abc import Callable

__all__ = ["FileSync", "FileSyncs"]


class FileSync:
    """Flushes one file. `failed` is called once, when a flush has failed for the first time."""

    def __init__(self, failed: Callable[[FileSync], None]) -> None:
        self._report = failed
        self._lock = threading.Lock()  # held while the file is being flushed
        self._begun = 0  # counts flushes of the file, when they begin
        self._failure = ""

    def flush(self, fd: int) -> None:
        """Return when everything written to the file before the call is on stable storage.

        fdatasync is enough: it leaves out times and the like only, not what is needed to read the data back, such as
        where newly allocated blocks and holes are. The size of the file never changes here.

        Raises:
            OSError: it is not, or, with EIO, an earlier flush of this file has failed: the kernel says so only once.
        """
        begun = self._begun
        with self._lock:
            if self._failure:
                raise OSError(errno.EIO, f"an earlier flush failed ({self._failure}), so writes may be lost")
            if self._begun != begun:
                return  # a flush that began after this call has ended
            self._begun += 1
            try:
                _fdatasync(fd)
            except OSError as error:
                self._failure = str(error)
                self._report(self)
                raise


class FileSyncs:
    """Finds the :class:`FileSync` of each file that is open, and keeps those of files that could not be flushed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_file: weakref.WeakValueDictionary[tuple[int, int, int], FileSync] = weakref.WeakValueDictionary()
        self._failed: list[FileSync] = []

    def of(self, status: os.stat_result) -> FileSync:
        """Return the one of the file that `status` describes; a block device is one file under all its names."""
        is_device = stat.S_ISBLK(status.st_mode)
        file = (1, status.st_rdev, 0) if is_device else (0, status.st_dev, status.st_ino)
        with self._lock:
            found = self._of_file.get(file)
            if found is None:
                found = self._of_file[file] = FileSync(self._failed.append)
            return found


def _fdatasync(fd: int) -> None:
    getattr(os, "fdatasync", os.fsync)(fd)  # macOS has no fdatasync

"""Counts that units keep of what clients do, shared by all processes that serve."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterator

__all__ = ["ProcessCount"]

_CELL = 8  # bytes of a signed number in shared memory


class ProcessCount:
    """A :class:`~nbdkitpy.SharedCount` of several processes. Make it before they are forked.

    Each process has a place of its own in shared memory, so that what a killed one held can be taken back.

    Args:
        places: One for each process, the first is that of this one.
        on_zero: Called in the process that gives the last one back.
    """

    def __init__(self, places: int, on_zero: Callable[[], None] | None = None) -> None:
        #: Which one is that of this process. Each sets its own after the fork.
        self.place = 0
        self._on_zero = on_zero or _do_nothing
        cells = memoryview(mmap.mmap(-1, 2 * places * _CELL)).cast("q")
        self._held = cells[:places]
        self._owed = cells[places:]  # 1 for each process in which on_zero is to be called, and has not returned yet
        self._lock = _ProcessLock()

    @property
    def value(self) -> int:
        """How many there are now, in all processes."""
        with self._lock.held():
            return sum(self._held)

    def take(self, limit: int = 0) -> bool:
        """Count one more, unless there are `limit` already."""
        with self._lock.held():
            if limit and sum(self._held) >= limit:
                return False
            self._held[self.place] += 1
            return True

    def give_back(self) -> None:
        """Count one less."""
        with self._lock.held():
            is_zero = sum(self._held) == 1
            if is_zero:
                self._owed[self.place] = 1  # first, as we may be killed at any point
            self._held[self.place] -= 1
        if is_zero:
            self._pay(self.place)

    def release(self, place: int) -> None:
        """Take back all that a process holds that has been killed, and do what is left of what it had to."""
        with self._lock.held():
            held = self._held[place]
            if held and sum(self._held) == held:
                self._owed[place] = 1
            self._held[place] = 0
            is_owed = self._owed[place] == 1
        if is_owed:
            self._pay(place)

    def _pay(self, place: int) -> None:
        self._on_zero()
        self._owed[place] = 0


class _ProcessLock:
    """A lock between processes that came to be by a fork, and their threads. Who is killed does not keep it."""

    def __init__(self) -> None:
        self._threads = threading.Lock()
        # Such a lock is a process's, not a descriptor's, so that one descriptor does for all of them.
        self._fd = os.memfd_create("nbdkitpy-lock", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._threads:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)


def _do_nothing() -> None:
    pass

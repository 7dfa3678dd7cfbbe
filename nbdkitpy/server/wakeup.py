"""What one thread waits for by poll, and others set, signal handlers too."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import weakref

__all__ = ["Wakeup"]


class Wakeup:
    """A flag that poll can wait for.

    Its descriptors are freed with it, or by :meth:`close`.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._read, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        #: What to register with poll.
        self.watch = (self._read, select.POLLIN)
        # Who sets it must not write into what has got the descriptor's number next. A handler of signals may come in
        # the middle of either, in the same thread.
        self._lock = threading.RLock()
        self._frees = [weakref.finalize(self, os.close, fd) for fd in (self._read, self.write_fd)]

    def set(self) -> None:
        """Wake up who waits. Nothing happens if it is closed."""
        self.is_set = True
        with self._lock, contextlib.suppress(OSError):  # it is closed, or has been set so often that there is no room
            os.write(self.write_fd, b"\0")

    def clear(self) -> None:
        """Take note that it has been set."""
        self.is_set = False
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def close(self) -> None:
        """Free the descriptors. Only :meth:`set` may be called after this."""
        with self._lock:
            self.write_fd = -1
            for free in self._frees:
                free()

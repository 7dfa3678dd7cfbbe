"""A lock on ranges of bytes, for filters that read, change and write back whole blocks."""

from __future__ import annotations

import threading

__all__ = ["RangeLock"]


class RangeLock:
    """As many locks as an export has bytes, taken a range at a time::

        with self._ranges.exclusive(start, end):
            ...  # nobody else is between start and end

    What several connections change together needs one lock for all of them, so it is kept on the filter. Who comes
    first is served first: a range waits for those that overlap it and came earlier, and so nobody waits for ever. A
    thread that holds a range must not ask for another one.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._ranges: dict[_Range, None] = {}  # in the order in which they came; those that wait are among them

    def exclusive(self, start: int, end: int) -> _Range:
        """Return what, by ``with``, keeps everybody else out of `start` to `end`, which is exclusive."""
        return _Range(self, start, end, True)

    def shared(self, start: int, end: int) -> _Range:
        """Likewise, but keep out only those who want to be alone."""
        return _Range(self, start, end, False)

    def _take(self, wanted: _Range) -> None:
        with self._changed:
            self._ranges[wanted] = None
            try:
                while self._has_to_wait(wanted):
                    self._changed.wait()
            except BaseException:  # a signal, in the main thread
                self._drop(wanted)
                raise

    def _has_to_wait(self, wanted: _Range) -> bool:
        for other in self._ranges:
            if other is wanted:
                break
            if other.start < wanted.end and wanted.start < other.end and (wanted.alone or other.alone):
                return True
        return False

    def _give_back(self, held: _Range) -> None:
        with self._changed:
            self._drop(held)

    def _drop(self, held: _Range) -> None:
        del self._ranges[held]
        self._changed.notify_all()


class _Range:
    """A range that is wanted or held."""

    __slots__ = ("_lock", "alone", "end", "start")

    def __init__(self, lock: RangeLock, start: int, end: int, alone: bool) -> None:
        self._lock = lock
        self.start = start
        self.end = end
        self.alone = alone

    def __enter__(self) -> None:
        self._lock._take(self)

    def __exit__(self, *_: object) -> None:
        self._lock._give_back(self)

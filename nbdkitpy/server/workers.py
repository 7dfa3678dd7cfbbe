"""Threads that make the calls which may have to wait, and the decision which calls those are."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Pace", "Workers"]

J = TypeVar("J")

#: A call that took longer than this, in seconds, has waited for something.
_SLOW = 0.0005

#: After so many calls in a row that did not, it is taken that none will.
_QUICK_IN_A_ROW = 64


class Pace:
    """Whether the calls of one verb are quick enough for the thread that reads requests to make them itself.

    A call that waits holds up the requests behind it, a hand-over to a worker costs more than a quick call takes:
    what is right depends on the backend, so it is measured.
    """

    def __init__(self, *, quick: bool) -> None:
        #: Whether the reading thread should make the next call.
        self.quick = quick
        self._in_a_row = 0

    def took(self, seconds: float) -> None:
        """Take note of how long one call took."""
        if seconds > _SLOW:
            self.quick = False
            self._in_a_row = 0
        elif not self.quick:
            self._in_a_row += 1
            self.quick = self._in_a_row >= _QUICK_IN_A_ROW


class Workers(Generic[J]):
    """Up to `most` threads that call `work` with each job put in, begun when there is something for them to do."""

    def __init__(self, work: Callable[[J], None], most: int, name: str) -> None:
        self._work = work
        self._most = most
        self._name = name
        self._jobs: queue.SimpleQueue[J | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._busy = 0  # jobs queued or being worked on

    def put(self, job: J) -> None:
        """Have `job` worked on. Called by one thread only."""
        with self._lock:
            self._busy += 1
            needed = self._busy > len(self._threads) < self._most
        self._jobs.put(job)
        if needed:
            self._begin()

    def _begin(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}.{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more of them
            if not self._threads:
                self._work_on_next()
        else:
            self._threads.append(thread)

    def _run(self) -> None:
        while self._work_on_next():
            pass

    def _work_on_next(self) -> bool:
        """Wait for a job and do it; False if there is to be no more."""
        job = self._jobs.get()
        if job is None:
            return False
        self._work(job)  # the job may hold a large payload, so it is not kept until there is another one
        with self._lock:
            self._busy -= 1
        return True

    def stop(self) -> None:
        """End all threads when the jobs put in so far are done, and wait for that. :meth:`put` begins new ones."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

"""Token buckets: how much of a bandwidth is left, and how long to wait for more. The tokens are bits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

__all__ = ["Bucket", "spend", "spend_at_once"]

#: Seconds after which a wait looks whether the rate has changed.
_LONGEST_WAIT = 1.0


class Bucket:
    """Fills at the rate of so many bits each second, up to what fits in. Any number of threads may take from it.

    Who takes more than there is leaves a debt, and waits until it has been paid: so requests go in the order in which
    they came, and one larger than the bucket goes too.

    Args:
        rate: Returns the rate, which may change; None is no limit.
        burstiness: Returns how many seconds' worth of bits fit in, which may change too.
        clock: Returns seconds that only ever go on.
    """

    def __init__(
        self, rate: Callable[[], int | None], burstiness: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._rate = rate
        self._burstiness = burstiness
        self._clock = clock
        self._lock = threading.Lock()
        self._filled_at = clock()
        self._level = (rate() or 0) * burstiness()  # less than nothing is a debt
        self._added = 0.0  # all that has come in ever

    def take(self, bits: int) -> float:
        """Take `bits`, and return the mark at which they are there; see :meth:`wait_for`."""
        with self._lock:
            self._fill()
            self._level -= bits
            return self._added - self._level

    def take_at_once(self, bits: int) -> bool:
        """Take `bits` if so many are there, and return whether they were."""
        with self._lock:
            if self._fill() is not None:
                if self._level < bits:
                    return False
                self._level -= bits
            return True

    def give_back(self, bits: int) -> None:
        """Put in `bits` that were taken and have not been used: all that wait gain by it."""
        with self._lock:
            self._add(bits)

    def wait_for(self, mark: float) -> float:
        """Return how many seconds there are to wait until `mark` is reached, as things stand."""
        with self._lock:
            rate = self._fill()
            missing = mark - self._added
            return 0.0 if rate is None or missing < 1 else missing / rate

    def _fill(self) -> int | None:
        """Add what has come since the last time, and return the rate."""
        rate, now = self._rate(), self._clock()
        seconds, self._filled_at = now - self._filled_at, now
        if rate is None:
            self._level = max(self._level, 0.0)
            return None
        capacity = rate * self._burstiness()
        self._level = min(self._level, capacity)  # which may have become less
        self._add(min(seconds * rate, capacity - self._level))
        return rate

    def _add(self, bits: float) -> None:
        self._level += bits
        self._added += bits


def spend(buckets: Sequence[Bucket], bits: int, sleep: Callable[[float], None]) -> None:
    """Take `bits` from all `buckets`, and wait until they are there.

    Args:
        sleep: Waits so many seconds; what it raises ends the wait, and nothing is taken.
    """
    marks = [bucket.take(bits) for bucket in buckets]
    try:
        while (seconds := max(map(Bucket.wait_for, buckets, marks))) > 0:
            sleep(min(seconds, _LONGEST_WAIT))
    except BaseException:
        for bucket in buckets:
            bucket.give_back(bits)
        raise


def spend_at_once(buckets: Sequence[Bucket], bits: int) -> bool:
    """Take `bits` from all `buckets` if so many are there, and return whether they were; else nothing is taken."""
    for number, bucket in enumerate(buckets):
        if not bucket.take_at_once(bits):
            for earlier in buckets[:number]:
                earlier.give_back(bits)
            return False
    return True

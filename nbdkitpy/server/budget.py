"""Memory that payloads and replies under way take: what a connection may hold, and what all of a process may together.

A connection has a little for itself (:data:`OWN`), so that small requests never wait for what others do. What it holds
beyond that is taken from what all have in common.
"""

from __future__ import annotations

import contextlib
import errno
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

__all__ = ["OWN", "Budget", "CancelledError", "Memory"]

#: Bytes that each connection may hold without asking.
OWN = 2 << 20


class CancelledError(ConnectionAbortedError):
    """The connection has to end while its thread waits for memory."""

    def __init__(self) -> None:
        super().__init__(errno.ECONNABORTED, "ended while it waited for memory")


def _nothing() -> None:
    """Do nothing."""


class _Claim:
    """Memory that somebody waits for."""

    def __init__(self, budget: Budget, size: int) -> None:
        self.budget = budget
        self.size = size
        self.is_granted = False
        self.decided = threading.Event()


class Memory:
    """Bytes that all connections of this process may hold, beyond those that each has for itself.

    Only threads that read requests ask for some, and wait in order if there is none. They hold no lock meanwhile, and
    nothing that would not come back without them: workers finish, clients take their replies. Clients that do not are
    found by :meth:`overdue`, and have to go. A back end that does not return is waited for.

    Args:
        limit: Bytes; 0 is no limit. Who wants more gets it when nobody else has any.
        patience: Seconds that a connection may keep what others wait for; 0 is for ever.
        wake: Called, by any thread, when there is a new :attr:`deadline`.
    """

    def __init__(self, limit: int = 0, *, patience: float = 0.0, wake: Callable[[], object] = _nothing) -> None:
        self._limit = limit or math.inf
        self._patience = patience or math.inf
        self._wake = wake
        self._lock = threading.Lock()
        self._queue: deque[_Claim] = deque()
        self._budgets: set[Budget] = set()  # those that have drawn something
        #: Bytes that are held now.
        self.held = 0
        #: Somebody waits.
        self.is_short = False
        #: When :meth:`overdue` may have something to say.
        self.deadline = math.inf

    # --- for budgets ---

    def take_now(self, budget: Budget, size: int) -> bool:
        """Take so many bytes for `budget`, if that is possible at once."""
        with self._lock:
            if self._queue or not self._fits(size):
                return False
            self._hand_out(budget, size)
            return True

    def take(self, budget: Budget, size: int) -> None:
        """Take so many bytes for `budget`, when its turn has come.

        Raises:
            CancelledError: by :meth:`cancel`.
        """
        claim = _Claim(budget, size)
        with self._lock:
            if budget.is_cancelled:
                raise CancelledError
            self._queue.append(claim)
            self._grant()
            holders: list[Budget] = []
            if self._queue and not self.is_short:
                self.is_short = True
                self._begin_period()
                holders += self._budgets
        if not claim.decided.is_set():
            for holder in holders:
                holder.give_way()
            self._wake()
            claim.decided.wait()
        if not claim.is_granted:
            raise CancelledError

    def give(self, budget: Budget, size: int) -> None:
        """Give back what `budget` has taken."""
        with self._lock:
            self.held -= size
            budget.drawn -= size
            if not budget.drawn:
                self._budgets.discard(budget)
            self._grant()

    def cancel(self, budget: Budget) -> None:
        """Have `budget`, whose :attr:`Budget.is_cancelled` is set, wait no longer."""
        with self._lock:
            for claim in [claim for claim in self._queue if claim.budget is budget]:
                self._queue.remove(claim)
                budget.pending = 0
                claim.decided.set()
            self._grant()

    def _fits(self, size: int) -> bool:
        return not self.held or self.held + size <= self._limit

    def _hand_out(self, budget: Budget, size: int) -> None:
        if budget not in self._budgets:
            self._budgets.add(budget)
            budget.forget_time()
        self.held += size
        budget.drawn += size
        budget.pending = 0

    def _grant(self) -> None:
        """Hand out what there is to those who have waited longest."""
        while self._queue and self._fits(self._queue[0].size):
            claim = self._queue.popleft()
            self._hand_out(claim.budget, claim.size)
            claim.is_granted = True
            claim.decided.set()
        if not self._queue:
            self.is_short = False
            self.deadline = math.inf

    # --- for who sees to it that it goes on ---

    @property
    def wanted(self) -> int:
        """Bytes that are waited for."""
        with self._lock:
            return sum(claim.size for claim in self._queue)

    def overdue(self, now: float) -> list[Budget]:
        """Return who has kept what he held when this period of waiting began, beginning with who holds most.

        That is nobody before :attr:`deadline`, with which another period begins.
        """
        with self._lock:
            if now < self.deadline:
                return []
            found = [budget for budget in self._budgets if budget.has_kept]
            self._begin_period()
        return sorted(found, key=lambda budget: budget.drawn, reverse=True)

    def _begin_period(self) -> None:
        self.deadline = time.monotonic() + self._patience
        for budget in self._budgets:
            budget.note_time()


class Budget:
    """Bytes that one connection holds: work in hand, replies that are not sent yet, and the payload that arrives.

    Past the limit, or that of the common memory, whoever brings more waits. One thread does; any may give back.

    Args:
        limit: Bytes; 0 is no limit. A cost above it fits when there is nothing else in hand.
        memory: What all connections have in common; None is without limit.
    """

    def __init__(self, limit: int = 0, memory: Memory | None = None) -> None:
        self._limit = limit or math.inf
        self._memory = memory or Memory()
        self._changed = threading.Condition()
        self._used = 0  # by work in hand and replies
        self._payload = 0  # by the buffer of a large payload, which arrives, is in use, or is kept for the next one
        self._kept: memoryview | None = None
        #: Bytes of the common memory. Only that changes it.
        self.drawn = 0
        #: Bytes that are counted as held, while the common memory for them is waited for. That sets it back.
        self.pending = 0
        self._returned = 0  # given back while something was drawn
        self._due = 0  # what that has to come to by the end of the period
        #: The connection has to end: nobody waits any more.
        self.is_cancelled = False
        #: A payload waits for :meth:`claim`, rather than for the client.
        self.is_waiting = False
        #: Called by who is about to wait: what is ready should not wait with him.
        self.before_waiting: Callable[[], object] = _nothing
        #: Called, by any thread, when a period begins in which others wait for memory. It must not call anything here.
        self.others_wait: Callable[[], object] = _nothing

    # --- work in hand ---

    def take(self, cost: int, *, has_payload: bool = False) -> None:
        """Take `cost`, when it fits.

        Args:
            has_payload: The payload that has landed goes with it, and is counted by it from now on.

        Raises:
            CancelledError: by :meth:`cancel`.
        """
        with self._changed:
            fits = self._fits(cost, has_payload)
            lacking = self._count(cost, has_payload) if fits else 0
        if not fits:
            self.before_waiting()
            with self._changed:
                self._changed.wait_for(lambda: self._fits(cost, has_payload))
                lacking = self._count(cost, has_payload)
        if lacking > 0:
            self._draw(lacking, cost, self.give)

    def _fits(self, cost: int, has_payload: bool) -> bool:
        """Tell whether `cost` fits, in place of the payload or beside it."""
        held = self._used if has_payload else self._used + self._payload
        return not self._used or held + cost <= self._limit

    def _count(self, cost: int, has_payload: bool) -> int:
        """Return how much memory is lacking, if that is more than 0."""
        self._used += cost
        if has_payload and self._payload:
            self._payload = 0
            return 0  # it has been claimed when it began to arrive
        return self._used + self._payload - OWN - self.drawn

    def give(self, cost: int) -> None:
        """Give back what :meth:`take` took."""
        with self._changed:
            self._used -= cost
            if self.drawn:
                self._repay(cost)
            self._changed.notify_all()

    @contextlib.contextmanager
    def holding(self, cost: int) -> Iterator[None]:
        """Take `cost` as :meth:`take` does, and give it back in the end."""
        self.take(cost)
        try:
            yield
        finally:
            self.give(cost)

    @property
    def unused(self) -> bool:
        """Whether no work is in hand."""
        return not self._used

    def finish(self) -> None:
        """Wait until no work is in hand, and hold nothing any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used)
        self.drop()
        self.others_wait = self.before_waiting = _nothing  # which may refer to who refers to us

    # --- payloads that arrive: see protocol.transmission.Room ---

    def claim(self, size: int) -> None:
        """Have the payload that arrives take `size` bytes, when they fit.

        Raises:
            CancelledError: by :meth:`cancel`.
        """
        if size <= self._payload:
            return
        self.is_waiting = True
        with self._changed:
            self._changed.wait_for(lambda: self._fits(size, has_payload=True))
            self._payload = size
            lacking = self._used + size - OWN - self.drawn
        if lacking > 0:
            self._draw(lacking, size, lambda _: self.drop())
        self.is_waiting = False

    def keep(self, buffer: memoryview) -> None:
        """Keep `buffer`, whose payload is done with, for the next one, unless somebody waits for memory."""
        with self._changed:
            if self._memory.is_short:
                self._release()
            else:
                self._kept = buffer

    def kept(self, size: int) -> memoryview | None:
        """Return the buffer that is kept, if it has `size` bytes or more; there is none any more in any case."""
        with self._changed:
            buffer, self._kept = self._kept, None
            if buffer is None or len(buffer) < size:
                self._release()
                return None
        return buffer

    def drop(self) -> None:
        """Keep no buffer, and have a payload that has begun to arrive take nothing for now."""
        with self._changed:
            self._kept = None
            self._release()

    def give_way(self) -> None:
        """Keep no buffer that is not in use, as others wait for memory. From any thread."""
        with self._changed:
            if self._kept is not None:
                self._kept = None
                self._release()

    def _release(self) -> None:
        size, self._payload = self._payload, 0
        if self.drawn:
            self._repay(size)

    # --- the common memory ---

    def cancel(self) -> None:
        """Have nobody wait for the common memory any more. From any thread."""
        self.is_cancelled = True
        self._memory.cancel(self)

    def _draw(self, lacking: int, cost: int, give: Callable[[int], object]) -> None:
        """Draw what is lacking since `cost` was counted, or have it given back by `give` if that cannot be."""
        if self._memory.take_now(self, lacking):
            return
        self.before_waiting()
        self.give_way()
        with self._changed:
            self.pending = cost
            # Who waited with a part of it could wait for others who do the same.
            self._give_excess()
            lacking = self._used + self._payload - OWN - self.drawn
        if lacking <= 0:
            self.pending = 0
            return
        try:
            self._memory.take(self, lacking)
        except CancelledError:
            self.pending = 0
            give(cost)
            raise

    def _repay(self, returned: int) -> None:
        """Give back what is not needed any more: at once if others wait for it, else when hardly anything is held."""
        self._returned += returned
        if self._used + self._payload <= OWN or self._memory.is_short:
            self._give_excess()

    def _give_excess(self) -> None:
        drawn = self.drawn  # read before what is pending, which may be granted meanwhile
        excess = min(drawn, drawn + OWN - (self._used + self._payload - self.pending))
        if excess > 0:
            self._memory.give(self, excess)

    # --- for the common memory ---

    @property
    def has_kept(self) -> bool:
        """Whether it has not given back as much as it held at the last :meth:`note_time`."""
        return self._returned < self._due

    def note_time(self) -> None:
        """Begin a period in which others wait."""
        self.others_wait()
        self._due = self._returned + self._used + self._payload - self.pending

    def forget_time(self) -> None:
        """Hold nothing yet, at the beginning of this period."""
        self._due = self._returned

"""Replies on their way out: one lock around each whole message, and nobody waits for it who need not."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from nbdkitpy.backend import Buffer
from nbdkitpy.server.budget import Budget
from nbdkitpy.server.transport import Stream

__all__ = ["FilePart", "Sender"]


class FilePart(NamedTuple):
    """A message whose data lie in a file: `length` bytes from `position` on, between its head and its tail."""

    head: bytes
    position: int
    length: int
    tail: bytes


class Sender:
    """Sends the replies of one connection: those of the thread that reads requests, and those of its workers.

    Workers leave their replies in a queue. Whoever holds the lock sends all that is queued, in one gather write.
    """

    def __init__(self, transport: Stream, budget: Budget) -> None:
        self._transport = transport
        self._budget = budget
        self._lock = threading.Lock()
        self._queue: deque[tuple[Sequence[Buffer], int]] = deque()
        #: The client cannot be reached any more: replies are dropped.
        self.broken = False

    @property
    def is_sending(self) -> bool:
        """Whether somebody is about to send something, which may have to wait for the client."""
        return self._lock.locked()

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send whole messages, and then those that are queued. Waits for the client to take them."""
        with self._lock:
            self._send(pieces)
        if self._queue:
            self._send_queued()

    def send_files(
        self,
        pieces: Sequence[Buffer],
        fd: int,
        parts: Sequence[FilePart],
        if_short: Callable[[int, int], Sequence[Buffer]] | None,
    ) -> bytes | None:
        """Send `pieces`, whole messages, and then at least one whose data lie in a file.

        If the file has become shorter, the message is finished by what `if_short` returns for the index of the part
        and the number of bytes that are missing; without `if_short` the connection is broken, as there is no other way
        to say it.

        Returns:
            The tail of the last message, which has not been sent, so that it can go with what follows; None if that
            message was cut short.
        """
        send_file, tail = self._transport.send_file, b""
        with self._lock:
            if pieces:
                self._send(pieces, more=True)
            missing = 0
            for index, (head, position, length, next_tail) in enumerate(parts):
                if self.broken:
                    break
                try:
                    missing = length - send_file(tail + head, fd, position, length)
                except OSError:
                    self._break()
                tail = next_tail
                if missing:
                    tail = b""
                    self._finish(index, missing, if_short)
        self._send_queued()
        return None if missing else tail

    def _finish(self, index: int, missing: int, if_short: Callable[[int, int], Sequence[Buffer]] | None) -> None:
        if if_short is None:
            self._break()
        else:
            self._send(if_short(index, missing))

    def post(self, pieces: Sequence[Buffer], cost: int) -> None:
        """Queue whole messages, and see that they are sent; `cost` is given back to the budget when they are."""
        self._queue.append((pieces, cost))
        self._send_queued()

    def _send_queued(self) -> None:
        # Looked at again after the lock is released: what was queued meanwhile by one who did not get it is ours.
        while self._queue and self._lock.acquire(blocking=False):
            pieces: list[Buffer] = []
            cost = 0
            try:
                while self._queue:
                    message, price = self._queue.popleft()
                    pieces += message
                    cost += price
                self._send(pieces)
            finally:
                self._lock.release()
                self._budget.give(cost)

    def _send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None:
        if self.broken:
            return
        try:
            self._transport.send(pieces, more=more)
        except (OSError, MemoryError):  # nobody knows how much has been sent
            self._break()

    def _break(self) -> None:
        self.broken = True
        self._transport.abort()  # so that the thread that receives finds out
        self._budget.cancel()

"""Replies that go out together, and the memory that their data lie in until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdkitpy.backend import Buffer, FileRange
from nbdkitpy.protocol.buffers import page_aligned
from nbdkitpy.server.sender import Sender

__all__ = ["FULL", "ROOM", "Batch"]

#: Bytes of memory for data: as much as a processor keeps near, where they are when they are copied a second time.
ROOM = 256 << 10

#: So many bytes lie before each piece of data there, so that it does not begin a little before the place, in a page,
#: where it goes when the batch is copied into the socket: see :mod:`nbdkitpy.protocol.buffers`.
_BESIDE_PAGE = 64

#: A batch is sent when it has so many bytes: data that is not in our memory would pile up.
FULL = 1 << 20


class Batch:
    """The replies that the thread which reads requests has ready, in order."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._memory: memoryview | None = None
        self._used = 0
        #: Whole messages, and how many bytes they have.
        self.pieces: list[Buffer] = []
        self.size = 0

    def take(self, length: int) -> memoryview:
        """Return memory for `length` bytes of data, up to :data:`ROOM`, that is ours until the batch has been sent."""
        start = self._used + _BESIDE_PAGE
        end = start + length
        if self._memory is None:
            self._memory = page_aligned(_BESIDE_PAGE + ROOM)
        elif end > _BESIDE_PAGE + ROOM:
            self.send()
            start = _BESIDE_PAGE
            end = start + length
        self._used = end
        return self._memory[start:end]

    def make_room(self, lengths: Sequence[int]) -> bool:
        """See to it that so many pieces can be taken one after the other; False if that is too much."""
        needed = sum(lengths) + len(lengths) * _BESIDE_PAGE
        if needed > _BESIDE_PAGE + ROOM:
            return False
        if self._used + needed > _BESIDE_PAGE + ROOM:
            self.send()
        return True

    def append(self, pieces: Sequence[Buffer]) -> None:
        """Add whole messages."""
        self.pieces += pieces
        self.size += sum(map(len, pieces))
        if self.size >= FULL:
            self.send()

    def send(self) -> None:
        """Send what there is."""
        self._used = 0
        if self.pieces:
            self._sender.send(self.pieces)
            self.pieces.clear()
            self.size = 0

    def send_file(
        self, header: bytes, where: FileRange, count: int, if_short: Callable[[int], Sequence[Buffer]] | None
    ) -> bool:
        """Send what there is, `header` and, from a file, the bytes that it announces: see :meth:`Sender.send_file`."""
        self._used = 0
        self.pieces.append(header)
        try:
            return self._sender.send_file(self.pieces, where, count, if_short)
        finally:
            self.pieces.clear()
            self.size = 0

    def rest(self) -> None:
        """Give memory back; there is nothing to be sent."""
        self._memory = None

"""Replies that go out together, and the memory that they lie in until then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nbdkitpy.backend import Buffer
from nbdkitpy.protocol.buffers import page_aligned
from nbdkitpy.server.sender import FilePart, Sender

__all__ = ["FULL", "ROOM", "Batch"]

#: Bytes of memory for data: as much as a processor keeps near, where they are when they are copied a second time.
ROOM = 256 << 10

#: So many bytes lie before what is put there, so that data does not begin a little before the place, in a page, where
#: it goes when the batch is copied into the socket: see :mod:`nbdkitpy.protocol.buffers`.
_BESIDE_PAGE = 64

#: The longest header that stands before data; there is room for one more, so that :data:`ROOM` bytes of data fit.
_HEADER = 64

#: A batch is sent when it has so many bytes: data that is not in our memory would pile up.
FULL = 1 << 20


class Batch:
    """The replies that the thread which reads requests has ready.

    Messages are put together in memory, one behind the other, or added as pieces that lie elsewhere. They are sent in
    any order, as the protocol allows.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        #: Where messages are put together: the first that is not among the pieces begins at `begun`, and the next one
        #: has the place from `used` up to `limit`. There is no memory while `limit` is 0.
        self.memory = memoryview(b"")
        self.begun = self.used = _BESIDE_PAGE
        self.limit = 0
        #: Whole messages that lie elsewhere, and how many bytes they have.
        self.pieces: list[Buffer] = []
        self.size = 0

    def renew(self) -> None:
        """Send what there is, so that all of the memory is free, which is there then."""
        self.send()
        if not self.limit:
            self.limit = _BESIDE_PAGE + _HEADER + ROOM
            self.memory = page_aligned(self.limit)

    def take(self, length: int) -> memoryview:
        """Return memory for `length` bytes of data, up to :data:`ROOM`, that is ours until the batch has been sent."""
        if self.used + length > self.limit:
            self.renew()
        self._gather()
        start = self.used + _BESIDE_PAGE
        self.begun = self.used = start + length
        return self.memory[start : self.used]

    def make_room(self, lengths: Sequence[int]) -> bool:
        """See to it that so many pieces can be taken one after the other; False if that is too much."""
        needed = sum(lengths) + len(lengths) * _BESIDE_PAGE
        if needed > ROOM:
            return False
        if self.used + needed > self.limit:
            self.renew()
        return True

    def append(self, pieces: Sequence[Buffer]) -> None:
        """Add whole messages."""
        self.pieces += pieces
        self.size += sum(map(len, pieces))
        if self.size >= FULL:
            self.send()

    def send(self) -> None:
        """Send what there is."""
        self._gather()
        self.begun = self.used = _BESIDE_PAGE
        if self.pieces:
            self._sender.send(self.pieces)
            self.pieces.clear()
            self.size = 0

    def send_files(
        self, fd: int, parts: Sequence[FilePart], if_short: Callable[[int, int], Sequence[Buffer]] | None
    ) -> bool:
        """Send messages whose data lie in a file, with what there is: see :meth:`Sender.send_files`.

        Returns:
            Whether the last one is whole. Its end goes with what is sent next.
        """
        self._gather()
        self.begun = self.used = _BESIDE_PAGE
        try:
            end = self._sender.send_files(self.pieces, fd, parts, if_short)
        finally:
            self.pieces.clear()
            self.size = 0
        if end:
            self.append([end])
        return end is not None

    def rest(self) -> None:
        """Give memory back; there is nothing to be sent."""
        self.memory = memoryview(b"")
        self.limit = 0

    def _gather(self) -> None:
        """Have the messages in our memory among the pieces."""
        if self.used > self.begun:
            self.pieces.append(self.memory[self.begun : self.used])
            self.begun = self.used

"""The overlay: the file that takes what clients write to one export, shared by all who have it open."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Sequence

from nbdkitpy import Buffer, RangeLock

from .states import DATA, BlockStates, Save

__all__ = ["Overlay", "TemporaryOverlay"]


class Overlay:
    """Blocks of a disk in a file, each as far behind `position` as it is on the disk.

    Who reads needs no lock: a block is written before it is said to be here. Who puts a block here that was not, or
    takes one away, has :attr:`blocks` to himself meanwhile.

    Attributes:
        fd: The file, or -1 if there is none yet.
        states: Where each block is.
        blocks: Locks ranges of numbers of blocks.
    """

    def __init__(self, size: int, block: int, position: int = 0, save: Save | None = None) -> None:
        self.size = size
        self.block = block
        self.bits = block.bit_length() - 1
        self.position = position
        self.fd = -1
        self.states = BlockStates(save)
        self.blocks = RangeLock()
        self.users = 0  #: how many have it open; counted by the filter, under its lock

    def span(self, count: int, offset: int) -> tuple[int, int]:
        """Return the first block of a range, and the one after the last."""
        return offset >> self.bits, (offset + count - 1 >> self.bits) + 1

    def read(self, count: int, offset: int) -> Buffer:
        """Read what is here."""
        data = os.pread(self.fd, count, self.position + offset)
        return data if len(data) == count else self._read_on(data, count, offset)

    def _read_on(self, data: bytes, count: int, offset: int) -> bytes:
        while len(data) < count:
            more = os.pread(self.fd, count - len(data), self.position + offset + len(data))
            if not more:
                raise OSError(errno.EIO, "cow: the overlay has become shorter")
            data += more
        return data

    def read_at_hand(self, buffer: memoryview, offset: int) -> bool:
        """Read what is here into `buffer` and return True, or return False if that would wait."""
        try:
            return os.preadv(self.fd, (buffer,), self.position + offset, os.RWF_NOWAIT) == len(buffer)
        except (OSError, AttributeError):  # it would wait, or one cannot tell; AttributeError: this is not Linux
            return False

    def write(self, parts: Sequence[Buffer], offset: int) -> None:
        """Write `parts`, one behind the other."""
        count = sum(map(len, parts))
        written = os.pwritev(self.fd, parts, self.position + offset)
        if written < count:
            self._write_on(memoryview(b"".join(parts)), self.position + offset, written)

    def _write_on(self, data: memoryview, position: int, written: int) -> None:
        while written < len(data):
            more = os.pwrite(self.fd, data[written:], position + written)
            if not more:
                raise OSError(errno.EIO, "cow: nothing could be written to the overlay")
            written += more

    def take(self, parts: Sequence[Buffer], offset: int, first: int, end: int) -> None:
        """Write `parts`, after which blocks `first` to `end` are here."""
        self.write(parts, offset)
        self.states.set(first, end, DATA)

    def flush(self) -> None:
        """Return when all that was written before is on stable storage."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class TemporaryOverlay(Overlay):
    """An overlay that is made when something is first written, has no name, and is gone when it is closed."""

    def __init__(self, size: int, block: int, directory: str) -> None:
        super().__init__(size, block)
        self._directory = directory
        self._lock = threading.Lock()

    def write(self, parts: Sequence[Buffer], offset: int) -> None:
        if self.fd < 0:
            self._open()
        super().write(parts, offset)

    def _open(self) -> None:
        with self._lock:
            if self.fd < 0:
                with tempfile.TemporaryFile(dir=self._directory, buffering=0) as file:
                    self.fd = os.dup(file.fileno())

    def flush(self) -> None:
        """Do nothing: what is gone with the process need not survive the machine."""

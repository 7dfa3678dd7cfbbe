"""The disk as partition tables see it: sectors, and where a partition lies. Nothing that is read there is trusted."""

from __future__ import annotations

import errno
from typing import NamedTuple

from nbdkitpy import Handle

__all__ = ["Disk", "Partition", "wrong"]

_PIECE = 1 << 20  # the most that is read at once


class Partition(NamedTuple):
    """Where a partition lies, in sectors."""

    start: int
    length: int


def wrong(text: str) -> OSError:
    """Return the error that the disk does not have the partition, for the reason that `text` gives."""
    return OSError(errno.EINVAL, f"partition: {text}")


class Disk:
    """Reads sectors by way of an open handle.

    Args:
        handle: Of the whole disk.
        sector_size: 512 or 4096.
    """

    def __init__(self, handle: Handle, sector_size: int) -> None:
        self._handle = handle
        self._size = handle.get_size()
        block = handle.block_size()
        self._block = block.minimum if block else 1
        self._piece = min(_PIECE, block.maximum) if block else _PIECE
        self.sector_size = sector_size
        self.sectors = self._size // sector_size

    def read(self, sector: int, length: int | None = None) -> bytes:
        """Return the `length` bytes, or those of one sector, from `sector` on.

        Args:
            sector: Anything.
            length: Bounded by the caller.

        Raises:
            OSError: they do not lie on the disk, or cannot be read.
        """
        length = self.sector_size if length is None else length
        begin = sector * self.sector_size
        end = begin + length
        if not 0 <= begin <= end <= self._size:
            raise wrong(f"the partition table goes on at sector {sector}, which is outside of the disk")
        # A disk with larger blocks wants to be asked for whole ones.
        first = begin - begin % self._block
        last = min(end + -end % self._block, self._size)
        pieces = [
            bytes(self._handle.pread(min(self._piece, last - start), start))
            for start in range(first, last, self._piece)
        ]
        return b"".join(pieces)[begin - first : end - first]

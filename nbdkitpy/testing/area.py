"""The part of an export that checks work on, and what it should read as."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nbdkitpy.extents import ExtentType
from nbdkitpy.protocol.constants import CommandFlag, TransmissionFlag
from nbdkitpy.testing.client import NbdClient

__all__ = ["Area"]

#: Bytes from the beginning of an export that are written and read.
_SIZE = 256 << 10

#: Bytes of a request, if it need not be more; as many when all is read; the most, whatever the export takes.
_USUAL = 16 << 10
_STEP = 64 << 10
_LARGEST = 4 << 20

# What requests need that are not offered for every export.
_NONE = TransmissionFlag(0)
_OF_FLAGS = {CommandFlag.FUA: TransmissionFlag.SEND_FUA, CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO}


class Area:
    """The beginning of an open export.

    Its verbs make one request each. They tell whether it has been done; that has to be so if it is offered, and if it
    is not it has to be refused.

    Args:
        client: Has it open.
        keeps_data: What is written can be read again.
    """

    def __init__(self, client: NbdClient, *, keeps_data: bool = True) -> None:
        sizes = client.info.block_size
        self.client = client
        self.unit = sizes.minimum  #: offsets and lengths are multiples of this
        self.largest = min(sizes.maximum, _LARGEST, client.size) // self.unit * self.unit  #: of reads and writes
        self.size = min(client.size, _SIZE) // self.unit * self.unit
        self.end = client.size // self.unit * self.unit  #: of the export
        assert self.size, "the export is too small to be tested: parameters have to make it larger"
        self._keeps_data = keeps_data
        self._random = random.Random(self.size)
        self.content = bytearray(self.read())  #: what it should read as

    # --- places ---

    def ranges(self, number: int) -> Iterator[tuple[int, int]]:
        """Yield so many ranges, count and offset, at odd places; they may overlap."""
        blocks = self.size // self.unit
        most = max(1, min(blocks, _USUAL // self.unit))
        for _ in range(number):
            count = self._random.randint(1, most)
            yield count * self.unit, self._random.randint(0, blocks - count) * self.unit

    def pieces(self, most: int) -> list[tuple[int, int]]:
        """Return some ranges of one size, at most so many, that do not overlap."""
        number = max(1, min(most, self.size // self.unit))
        apart = self.size // number // self.unit * self.unit
        count = min(apart, max(_USUAL // self.unit, 1) * self.unit)
        return [(count, index * apart) for index in range(number)]

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yield ranges, count and offset, that are all of it together, one after the other."""
        step = min(self.largest, _STEP // self.unit * self.unit)
        for offset in range(0, self.size, step):
            yield min(step, self.size - offset), offset

    def data(self, count: int) -> bytes:
        """Return bytes that are not there yet, none of which is zero."""
        some = bytes(self._random.randrange(1, 256) for _ in range(64))
        return (some * (count // 64 + 1))[:count]

    # --- what is there ---

    def read(self, client: NbdClient | None = None) -> bytes:
        """Return all of it, as it is now for a client."""
        return b"".join((client or self.client).pread(count, offset) for count, offset in self.steps())

    def check(self, client: NbdClient | None = None) -> None:
        """See that it reads as it should, for a client."""
        self.check_read(self.read(client), 0)

    def check_read(self, found: bytes, offset: int) -> None:
        """See that what has been read from `offset` on is as it should be."""
        wanted = self.content[offset : offset + len(found)]
        if self._keeps_data and found != wanted:
            place = next(place for place in range(len(found)) if found[place] != wanted[place])
            raise AssertionError(f"at {offset + place} is {found[place]:#04x}, and should be {wanted[place]:#04x}")

    def expect(self, data: bytes, offset: int) -> None:
        """Take note of what a range should read as from now on."""
        self.content[offset : offset + len(data)] = data

    def check_extents(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See that what is said of each of these ranges covers it, bit by bit, and agrees with what it reads as."""
        for count, offset in ranges if self.client.has_extents else ():
            end, found = offset + count, self.client.extents(count, offset, CommandFlag.REQ_ONE)
            while offset < end:
                found += self.client.extents(end - offset, offset)
                offset = found[-1].offset + found[-1].length
            for extent in found if self._keeps_data else ():
                content = self.content[extent.offset : extent.offset + extent.length]
                assert not (extent.type & ExtentType.ZERO and any(content)), f"{extent} does not read as zeroes"

    # --- verbs ---

    def write(self, data: bytes, offset: int, flags: int = 0) -> bool:
        """Write. Flag: FUA."""
        written = self._attempt(self.client.pwrite, data, offset, flags, writes=True)
        if written:
            self.expect(data, offset)
        return written

    def fill(self) -> None:
        """Have no zero left in it, if it can be written."""
        for count, offset in self.steps():
            self.write(self.data(count), offset)

    def zero(self, count: int, offset: int, flags: int = 0) -> bool:
        """Write zeroes. Flags: FUA, NO_HOLE, FAST_ZERO, which may be refused though it is offered."""
        refusal = errno.ENOTSUP if flags & CommandFlag.FAST_ZERO else 0
        needs = TransmissionFlag.SEND_WRITE_ZEROES
        written = self._attempt(self.client.zero, count, offset, flags, needs=needs, writes=True, refusal=refusal)
        if written:
            self.expect(bytes(count), offset)
        return written

    def trim(self, count: int, offset: int, flags: int = 0) -> bool:
        """Trim; what is there afterwards may be anything. Flag: FUA."""
        trimmed = self._attempt(self.client.trim, count, offset, flags, needs=TransmissionFlag.SEND_TRIM, writes=True)
        if trimmed:
            self.expect(self.client.pread(count, offset), offset)
        return trimmed

    def flush(self) -> bool:
        """Flush."""
        return self._attempt(self.client.flush, needs=TransmissionFlag.SEND_FLUSH)

    def cache(self, count: int, offset: int) -> bool:
        """Prefetch."""
        return self._attempt(self.client.cache, count, offset, needs=TransmissionFlag.SEND_CACHE)

    def _attempt(
        self,
        verb: Callable[..., None],
        *args: Any,
        needs: TransmissionFlag = _NONE,
        writes: bool = False,
        refusal: int = 0,
    ) -> bool:
        """Call a verb, and see that it works if it is offered, and is refused if not; tell whether it has worked.

        Args:
            verb: Of the client.
            *args: Of the verb, flags last if it has any.
            needs: What has to be offered for it.
            writes: It needs an export that is not read-only, and may have flags.
            refusal: The errno by which it may be refused though it is offered; 0 if there is none.
        """
        if writes:
            for flag, offer in _OF_FLAGS.items():
                needs |= offer if args[-1] & flag else _NONE
        flags, name = self.client.flags, verb.__name__
        offered = flags & needs == needs and not (writes and flags & TransmissionFlag.READ_ONLY)
        try:
            verb(*args)
        except OSError as error:
            if not (offered and error.errno == refusal):
                assert not offered, f"{name} is offered, and fails: {error}"
                assert error.errno in (errno.EINVAL, errno.EPERM), f"{name} is not offered, and fails: {error}"
            return False
        assert offered, f"{name} is not offered, and works"
        return True

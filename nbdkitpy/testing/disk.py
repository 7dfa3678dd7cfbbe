"""The next layer for tests of filters: a disk in memory that watches how it is used."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping

from nbdkitpy.backend import BlockSize, Client, FileRange, Flags, Handle, Plugin, Support, ThreadModel
from nbdkitpy.extents import Extent, ExtentType

__all__ = ["CAPABILITIES", "Disk"]

#: All that a disk can do beside reading.
CAPABILITIES = frozenset({"write", "zero", "fast_zero", "trim", "fua", "flush", "multi_conn", "cache", "extents"})

#: Seconds that a call waits for one that should not be there at the same time, and how many calls do that.
_DWELL = 0.002
_DWELLING = 30

#: Unit of the extents: a block that holds only zeroes is a hole.
_BLOCK = 4096


class Disk(Plugin):
    """A disk in memory, which notes in :attr:`mistakes` what the layers before it do against the contract.

    Args:
        content: What it reads as at first.
        can: Those of :data:`CAPABILITIES` that it has.
        model: The thread model.
        block_size: Its size constraints.
        shortcuts: Whether reads may also be had by ``pread_into``, ``file_range`` and ``sparse``.
    """

    name = "disk"

    def __init__(
        self,
        content: bytes,
        *,
        can: Collection[str] = CAPABILITIES,
        model: ThreadModel = ThreadModel.PARALLEL,
        block_size: BlockSize | None = None,
        shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.can = frozenset(can)
        self.sizes = block_size
        self.shortcuts = shortcuts
        self._model = model

        self.mistakes: list[str] = []  #: what was done against the contract
        self.fails: Mapping[str, int] = {}  #: errnos that verbs raise, by name; ``"open"`` too
        self.failures = 0  #: how often that was done
        self.preconnects = 0
        self.opened = 0
        self.closed = 0

        self._initial = content
        self.lock = threading.Condition()  # over what follows
        self.running = 0  # calls under way
        self.begun = 0  # calls so far
        self.dwelling = 0  # calls that have waited for others

    def thread_model(self) -> ThreadModel:
        return self._model

    def load(self) -> None:
        self.fd = os.memfd_create("disk")
        os.truncate(self.fd, len(self._initial))
        self.content = mmap.mmap(self.fd, len(self._initial))
        self.content[:] = self._initial
        self.durable = bytearray(self._initial)  #: what would be there after a power cut

    def unload(self) -> None:
        self.content.close()
        os.close(self.fd)

    def preconnect(self, client: Client, readonly: bool) -> None:
        self.preconnects += 1

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.fail("open")
        with self.lock:
            self.opened += 1
        return (_QuickHandle if self.shortcuts else _DiskHandle)(self, readonly)

    def fail(self, verb: str) -> None:
        """Raise what the test has set for `verb`."""
        number = self.fails.get(verb)
        if number is not None:
            self.failures += 1
            raise OSError(number, os.strerror(number))


class _DiskHandle(Handle):
    """One client's. Every call is looked at before it is done."""

    def __init__(self, disk: Disk, readonly: bool) -> None:
        self._disk = disk
        self._readonly = readonly
        self._size = len(disk.content)
        self._running = 0
        self._begun = 0
        self._closed = False

    def get_size(self) -> int:
        return self._size

    def can_write(self) -> bool:
        return "write" in self._disk.can

    def can_zero(self) -> Support:
        return self._support("zero")

    def can_fast_zero(self) -> bool:
        return "fast_zero" in self._disk.can

    def can_trim(self) -> bool:
        return "trim" in self._disk.can

    def can_fua(self) -> Support:
        return self._support("fua")

    def can_flush(self) -> bool:
        return "flush" in self._disk.can

    def can_multi_conn(self) -> bool:
        return "multi_conn" in self._disk.can

    def can_cache(self) -> Support:
        return self._support("cache")

    def can_extents(self) -> bool:
        return "extents" in self._disk.can

    def block_size(self) -> BlockSize | None:
        return self._disk.sizes

    def _support(self, what: str) -> Support:
        return Support.NATIVE if what in self._disk.can else Support.NONE

    # --- verbs ---

    def pread(self, count: int, offset: int) -> bytes:
        with self._watched("pread", count, offset):
            return self._disk.content[offset : offset + count]

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        with self._watched("pwrite", len(data), offset, flags, allowed=Flags.FUA, needs="write"):
            self._put(bytes(data), offset, flags)

    def flush(self) -> None:
        with self._watched("flush", needs="flush"), self._disk.lock:
            self._disk.durable[:] = self._disk.content[:]

    def trim(self, count: int, offset: int, flags: int) -> None:
        with self._watched("trim", count, offset, flags, allowed=Flags.FUA, needs="trim"):
            self._put(bytes(count), offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        allowed = Flags.FUA | Flags.MAY_TRIM | Flags.FAST_ZERO
        with self._watched("zero", count, offset, flags, allowed=allowed, needs="zero"):
            self._put(bytes(count), offset, flags)

    def cache(self, count: int, offset: int) -> None:
        with self._watched("cache", count, offset, needs="cache"):
            pass

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        with self._watched("extents", count, offset, flags, allowed=Flags.REQ_ONE, needs="extents"):
            content = self._disk.content
            return [
                Extent(start, min(_BLOCK, self._size - start), _kind(content[start : start + _BLOCK]))
                for start in range(offset - offset % _BLOCK, offset + count, _BLOCK)
            ]

    def close(self) -> None:
        with self._disk.lock:
            self._check(not self._closed, "close: it is closed already")
            self._check(not self._running, "close: a call has not returned")
            self._closed = True
            self._disk.closed += 1

    def _put(self, data: bytes, offset: int, flags: int) -> None:
        disk = self._disk
        with disk.lock:
            disk.content[offset : offset + len(data)] = data
            if flags & Flags.FUA:
                disk.durable[offset : offset + len(data)] = data

    # --- the contract ---

    def _check(self, condition: bool, mistake: str) -> None:
        if not condition:
            self._disk.mistakes.append(mistake)

    @contextlib.contextmanager
    def _watched(
        self, verb: str, count: int = 1, offset: int = 0, flags: int = 0, *, allowed: int = 0, needs: str = ""
    ) -> Iterator[None]:
        call = f"{verb}({count}, {offset}, {Flags(flags)!r})"
        disk, sizes = self._disk, self._disk.sizes or BlockSize(1, 4096, 0xFFFFFFFF)
        self._check(not self._closed, f"{call}: the handle is closed")
        self._check(count > 0, f"{call}: the range is empty")
        self._check(0 <= offset <= offset + count <= self._size, f"{call}: the export has {self._size} bytes")
        if verb != "flush":
            self._check((count | offset) % sizes.minimum == 0, f"{call}: blocks have {sizes.minimum} bytes")
        if verb in ("pread", "pwrite"):
            self._check(count <= sizes.maximum, f"{call}: the maximum is {sizes.maximum}")
        self._check(not needs or needs in disk.can, f"{call}: the handle cannot do that")
        self._check(not flags & ~allowed, f"{call}: no flags for it")
        self._check("fua" in disk.can or not flags & Flags.FUA, f"{call}: the handle does not offer FUA")
        self._check("fast_zero" in disk.can or not flags & Flags.FAST_ZERO, f"{call}: it does not offer FAST_ZERO")
        writes = needs in ("write", "zero", "trim")
        self._check(not writes or not self._readonly, f"{call}: the handle was opened read-only")
        disk.fail(verb)
        with self._counted(call):
            yield

    @contextlib.contextmanager
    def _counted(self, call: str) -> Iterator[None]:
        """See that no more calls are under way at once than the thread model allows."""
        disk = self._disk
        with disk.lock:
            self._running += 1
            self._begun += 1
            disk.running += 1
            disk.begun += 1
            self._look_out(call, disk.thread_model())
        try:
            yield
        finally:
            with disk.lock:
                self._running -= 1
                disk.running -= 1

    def _look_out(self, call: str, model: ThreadModel) -> None:
        """Note a mistake if another call is under way that should not be; wait for it a little."""
        if model is ThreadModel.PARALLEL:
            return
        disk, of_handle = self._disk, model is ThreadModel.SERIALIZE_REQUESTS

        def begun() -> int:
            return self._begun if of_handle else disk.begun

        mine, alone = begun(), (self._running if of_handle else disk.running) == 1
        disk.lock.notify_all()
        if alone and disk.dwelling < _DWELLING:
            disk.dwelling += 1
            alone = not disk.lock.wait_for(lambda: begun() != mine, _DWELL)
        self._check(alone, f"{call}: another call is under way, in spite of {model.name}")


class _QuickHandle(_DiskHandle):
    """Reads in all ways that there are."""

    sparse = True

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        with self._watched("pread", len(buffer), offset):
            buffer[:] = self._disk.content[offset : offset + len(buffer)]
        return True

    def file_range(self, count: int, offset: int) -> FileRange | None:
        with self._watched("pread", count, offset):
            return FileRange(self._disk.fd, offset)


def _kind(data: bytes) -> ExtentType:
    return ExtentType.DATA if any(data) else ExtentType.HOLE | ExtentType.ZERO

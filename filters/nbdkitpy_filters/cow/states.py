"""Where the blocks of a disk are: with the inner layers still, or in the overlay.

Of each block there is an entry of one byte: what the block is now and, times four, what it was when the overlay was
last flushed. Entries of blocks that follow each other lie in chunks, which are made when one of their blocks changes.

One thread at a time sets entries. Reading takes no lock: a chunk that was looked up while it was being replaced is what
was true then.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator

__all__ = ["BELOW", "CHUNK", "DATA", "ZERO", "BlockStates", "is_entries"]

#: What a block is: not in the overlay, in it, or zeroes that are kept nowhere.
BELOW, DATA, ZERO = range(3)

_CHUNK_BITS = 15
CHUNK = 1 << _CHUNK_BITS  #: blocks, and bytes

_NOW = 3  # the bits of an entry that say what the block is now
_ENTRIES = bytes(now | flushed << 2 for now in (BELOW, DATA, ZERO) for flushed in (BELOW, DATA, ZERO))
_RUN = re.compile(b"([\x00\x04\x08]+)|([\x01\x05\x09]+)|[\x02\x06\x0a]+")
_STATE_OF_GROUP = {1: BELOW, 2: DATA, None: ZERO}

# For bytes.translate: what becomes of an entry, any byte, when...
_SET = tuple(bytes(entry & ~_NOW | state for entry in range(256)) for state in (BELOW, DATA, ZERO))  # it is set
_ONLY_NOW = bytes(entry & _NOW for entry in range(256))  # what it was is forgotten
_NOW_FLUSHED = bytes((entry & _NOW) << 2 for entry in range(256))  # only what it is now is kept, as flushed
_BACK = bytes(entry & ~_NOW | entry >> 2 & _NOW for entry in range(256))  # it is again what was flushed

#: The only chunks that are bytes: they stand in for all whose blocks are alike, and were not flushed.
_UNIFORM = tuple(bytes([state]) * CHUNK for state in (BELOW, DATA, ZERO))

#: Takes entries, and the number of the block that they begin with, to a place where they outlive the process.
Save = Callable[[bytes, int], None]


class BlockStates:
    """The entries of all blocks.

    Args:
        save: Called with entries before they are set. If it fails they are not.
    """

    def __init__(self, save: Save | None = None) -> None:
        self._save = save or _forget
        self._chunks: dict[int, bytes | bytearray] = {}
        self._lock = threading.Lock()
        self._changed: set[int] = set()  # chunks of which not all is as it was when flushed

    @property
    def untouched(self) -> bool:
        """Whether no block was ever set."""
        return not self._chunks

    def of(self, block: int) -> int:
        """Return what a block is."""
        chunk = self._chunks.get(block >> _CHUNK_BITS)
        return BELOW if chunk is None else chunk[block & CHUNK - 1] & _NOW

    def common(self, first: int, end: int) -> int | None:
        """Return what all blocks of a range are, None if they are not alike."""
        if end - first == 1:
            return self.of(first)
        runs = self.runs(first, end)
        _, stop, state = next(runs)
        return state if stop == end else None

    def runs(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield first, end and state of each run of blocks that are alike in a range."""
        start, state = first, None
        for position, kind in self._runs(first, end):
            if kind != state:
                if state is not None:
                    yield start, position, state
                start, state = position, kind
        if state is not None:
            yield start, end, state

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield where runs begin, and what they are; neighbours may be alike."""
        position = first
        for index in self._present(first, end):
            base = index << _CHUNK_BITS
            start, stop = max(base, first), min(base + CHUNK, end)
            if position < start:
                yield position, BELOW
            for run, state in _runs_of(self._chunks[index], start - base, stop - base):
                yield start + run, state
            position = stop
        if position < end:
            yield position, BELOW

    def _present(self, first: int, end: int) -> list[int]:
        """Return the chunks of a range that are there, in order."""
        wanted = range(first >> _CHUNK_BITS, (end - 1 >> _CHUNK_BITS) + 1)
        if len(wanted) < len(self._chunks):
            return [index for index in wanted if index in self._chunks]
        return sorted(index for index in list(self._chunks) if index in wanted)  # a copy: others add some

    def set(self, first: int, end: int, state: int) -> None:
        """Set what the blocks of a range are.

        Raises:
            OSError: of `save`; then those that have not been saved are not set.
        """
        with self._lock:
            while first < end:
                index, start = first >> _CHUNK_BITS, first & CHUNK - 1
                stop = min(start + end - first, CHUNK)
                self._set_part(index, start, stop, state)
                first += stop - start

    def _set_part(self, index: int, start: int, stop: int, state: int) -> None:
        chunk = self._chunks.get(index, _UNIFORM[BELOW])
        becomes_uniform = stop - start == CHUNK and not isinstance(chunk, bytearray)
        entries = _UNIFORM[state] if becomes_uniform else bytes(chunk[start:stop]).translate(_SET[state])
        self._save(entries, (index << _CHUNK_BITS) + start)
        if becomes_uniform:
            self._chunks[index] = entries
        else:
            self._own(index)[start:stop] = entries
        self._changed.add(index)

    def _own(self, index: int) -> bytearray:
        """Return a chunk that may be changed."""
        chunk = self._chunks.get(index, _UNIFORM[BELOW])
        if not isinstance(chunk, bytearray):
            chunk = self._chunks[index] = bytearray(chunk)
        return chunk

    # --- what outlives the process ---

    def load(self, index: int, entries: bytes, *, undo: bool) -> None:
        """Take over a chunk of entries that were saved; with `undo` only what was flushed counts, and is saved.

        Raises:
            OSError: of `save`.
        """
        wanted = entries.translate(_BACK) if undo else entries
        if wanted != entries:
            self._save(wanted, index << _CHUNK_BITS)
        self._chunks[index] = bytearray(wanted)
        self._changed.add(index)

    def begin_flush(self) -> dict[int, bytes]:
        """Return the entries that are to be flushed, by chunk."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return {index: bytes(self._chunks[index]) for index in changed}

    def end_flush(self, begun: dict[int, bytes]) -> bool:
        """Save that what was there when the flush began has been flushed; return whether anything was to be saved.

        Raises:
            OSError: of `save`.
        """
        settled = [self._settle(index, entries) for index, entries in begun.items()]
        return any(settled)

    def _settle(self, index: int, then: bytes) -> bool:
        with self._lock:
            before = bytes(self._chunks[index])
            entries = _either(before.translate(_ONLY_NOW), then.translate(_NOW_FLUSHED))
            if entries == before:
                return False
            self._save(entries, index << _CHUNK_BITS)
            self._own(index)[:] = entries
            return True


def _forget(entries: bytes, block: int) -> None:
    pass


def _runs_of(chunk: bytes | bytearray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield where, counted from `start`, runs of a part of a chunk begin, and what they are."""
    if isinstance(chunk, bytes):  # all alike
        yield 0, chunk[0]
        return
    for run in _RUN.finditer(bytes(chunk[start:stop])):
        yield run.start(), _STATE_OF_GROUP[run.lastindex]


def _either(one: bytes, other: bytes) -> bytes:
    """Return the bits of both."""
    both = int.from_bytes(one, "big") | int.from_bytes(other, "big")
    return both.to_bytes(len(one), "big")


def is_entries(entries: bytes) -> bool:
    """Tell whether all of these can be entries."""
    return not entries.translate(None, _ENTRIES)

"""Extents: which parts of an export are allocated, and which read as zeroes.

A handle reports them as it finds them; :func:`normalise_extents` makes of that the list which the rest of the
server relies on, or refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntFlag
from typing import NamedTuple

__all__ = ["MAX_EXTENTS", "Extent", "ExtentType", "normalise_extents"]

#: At most so many extents are kept of one answer, as in nbdkit; a client asks again for the rest.
MAX_EXTENTS = 1 << 20


class ExtentType(IntFlag):
    """What is known of an extent; the values are those of base:allocation. ``DATA`` (nothing known) is always safe."""

    DATA = 0
    HOLE = 1
    ZERO = 2


_ALL_TYPES = int(ExtentType.HOLE | ExtentType.ZERO)


class Extent(NamedTuple):
    """`length` bytes from `offset` on that are alike."""

    offset: int
    length: int
    type: int = ExtentType.DATA


def normalise_extents(found: Iterable[tuple[int, int, int]], count: int, offset: int) -> list[Extent]:
    """Return what `found` says of the `count` bytes (at least 1) at `offset`: contiguous, clipped, merged.

    The first extent may begin before `offset`, each further one must begin where the one before it ended. Extents
    of length zero are skipped, parts outside the range are cut off, equal neighbours become one, and at most
    ``MAX_EXTENTS`` are kept. The answer may end before the range does, but has at least one extent, which
    begins at `offset`.

    Raises:
        ValueError: an extent of negative length or unknown type or not of integers, a gap, an overlap, or nothing
            about `offset`.
    """
    end = offset + count
    extents: list[Extent] = []
    expected: int | None = None
    for start, length, kind in found:
        if not _is_extent(start, length, kind):
            raise ValueError(f"extent (offset {start!r}, length {length!r}, type {kind!r}) is not one that can be")
        if length == 0:
            continue
        if expected is not None and start != expected:
            raise ValueError(f"extent at {start} does not begin where the one before it ended, at {expected}")
        if expected is None and start > offset:
            raise ValueError(f"the first extent begins at {start}, after the offset {offset} that was asked about")
        expected = start + length
        first, last = max(start, offset), min(expected, end)
        if first < last:
            if extents and extents[-1].type == kind:
                extents[-1] = Extent(extents[-1].offset, last - extents[-1].offset, kind)
            elif len(extents) == MAX_EXTENTS:
                break
            else:
                extents.append(Extent(first, last - first, kind))
        if expected >= end:
            break
    if not extents:
        raise ValueError(f"no extent covers the offset {offset}")
    return extents


def _is_extent(start: object, length: object, kind: object) -> bool:
    # A length that a plugin divided is a float, and would pass all comparisons.
    if not (isinstance(start, int) and isinstance(length, int) and isinstance(kind, int)):
        return False
    return length >= 0 and 0 <= kind <= _ALL_TYPES

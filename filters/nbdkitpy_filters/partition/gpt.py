"""Partitions of a GUID partition table (GPT), of which there are two copies: behind the MBR, and at the end.

As the UEFI specification demands, and unlike in nbdkit, the checksums decide whether a copy is good.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from .disk import Disk, Partition, wrong

__all__ = ["find", "has_signature"]

_SIGNATURE = b"EFI PART"
_PRIMARY_SECTOR = 1
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_CRC_OFFSET = 16
_ENTRY = struct.Struct("<16s16sQQ")
_UNUSED = bytes(16)
_SMALLEST_ENTRY = 128
_LARGEST_TABLE = 1 << 20  # bytes: 64 times what is usual


class _Header(NamedTuple):
    """The fields in their order on the disk."""

    signature: bytes
    revision: int
    size: int
    crc: int
    reserved: int
    here: int
    other: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    table: int
    entry_count: int
    entry_size: int
    table_crc: int


def has_signature(sector: bytes) -> bool:
    """Tell whether a sector begins as a header does."""
    return sector.startswith(_SIGNATURE)


def find(disk: Disk, number: int) -> Partition:
    """Return where partition `number` lies, by the first copy of the table that is good.

    Raises:
        OSError: there is none of that number, or no copy is good.
    """
    header, table = _good_copy(disk)
    if number > header.entry_count:
        raise wrong(f"there is no partition {number} in the GPT, which has room for {header.entry_count}")
    kind, _, first, last = _ENTRY.unpack_from(table, (number - 1) * header.entry_size)
    if kind == _UNUSED:
        raise wrong(f"there is no partition {number} in the GPT")
    if last < first:
        raise wrong(f"partition {number} ends at sector {last}, before it begins, at {first}")
    return Partition(first, last - first + 1)


def _good_copy(disk: Disk) -> tuple[_Header, bytes]:
    try:
        return _copy(disk, _PRIMARY_SECTOR)
    except _DamagedError as primary:
        try:
            return _copy(disk, disk.sectors - 1)
        except _DamagedError as backup:
            text = f"no copy of the GPT is good: the first one has {primary}, the one at the end has {backup}"
            raise wrong(f"{text} (sectors of {disk.sector_size} bytes; see partition-sectorsize)") from None


class _DamagedError(Exception):
    """A copy is not good; the text says what it has."""


def _copy(disk: Disk, sector: int) -> tuple[_Header, bytes]:
    data = disk.read(sector)
    if not has_signature(data):
        raise _DamagedError("no header")
    header = _Header(*_HEADER.unpack_from(data))
    if not _HEADER.size <= header.size <= len(data):
        raise _DamagedError(f"a header that says it has {header.size} bytes")
    covered = data[:_CRC_OFFSET] + bytes(4) + data[_CRC_OFFSET + 4 : header.size]
    if zlib.crc32(covered) != header.crc or header.here != sector:
        raise _DamagedError("a damaged header")
    return header, _table(disk, header)


def _table(disk: Disk, header: _Header) -> bytes:
    length = header.entry_count * header.entry_size
    if header.entry_size < _SMALLEST_ENTRY or length > _LARGEST_TABLE:
        raise _DamagedError(f"{header.entry_count} entries of {header.entry_size} bytes")
    if header.table + -(-length // disk.sector_size) > disk.sectors:
        raise _DamagedError(f"its entries at sector {header.table}, outside of the disk")
    table = disk.read(header.table, length)
    if zlib.crc32(table) != header.table_crc:
        raise _DamagedError("damaged entries")
    return table

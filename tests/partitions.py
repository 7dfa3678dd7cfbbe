"""Partition tables for tests, written as the specifications say, and then made wrong where a test wants that."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

LINUX = 0x83
EXTENDED = 0x05
PROTECTIVE = 0xEE

#: Any type but that of an unused entry will do.
DATA_TYPE = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


class Entry(NamedTuple):
    """One entry of an MBR or EBR, in sectors."""

    type: int = 0
    start: int = 0
    length: int = 0


def boot_record(entries: Sequence[Entry]) -> bytes:
    """Return the 512 bytes of an MBR or EBR."""
    table = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", start, length) for kind, start, length in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def put(disk: bytearray, sector: int, data: bytes, sector_size: int = 512) -> None:
    """Write `data` at a sector."""
    disk[sector * sector_size : sector * sector_size + len(data)] = data


def mbr_disk(sectors: int, records: Mapping[int, Sequence[Entry]], sector_size: int = 512) -> bytearray:
    """Return a disk with a boot record at each of these sectors."""
    disk = bytearray(sectors * sector_size)
    for sector, entries in records.items():
        put(disk, sector, boot_record(entries), sector_size)
    return disk


def gpt_header(
    partitions: Sequence[tuple[int, int] | None],
    *,
    sectors: int,
    backup: bool = False,
    entry_size: int = 128,
    entry_count: int = 128,
    sector_size: int = 512,
    wrong: Mapping[str, int] = MappingProxyType({}),
) -> tuple[bytes, bytes]:
    """Return a header, and the array of entries that belongs to it; `wrong` fields replace what is right."""
    entries = b"".join(_gpt_entry(*extent, entry_size) if extent else bytes(entry_size) for extent in partitions)
    entries = entries.ljust(entry_size * entry_count, b"\0")
    room = -(-len(entries) // sector_size)
    here, other = (sectors - 1, 1) if backup else (1, sectors - 1)
    right = {
        "revision": 0x10000,
        "header_size": 92,
        "here": here,
        "other": other,
        "first": 2 + room,
        "last": sectors - 2 - room,
        "table": sectors - 1 - room if backup else 2,
        "entry_count": entry_count,
        "entry_size": entry_size,
        "entries_crc": zlib.crc32(entries),
    } | dict(wrong)
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        b"EFI PART",
        right["revision"],
        right["header_size"],
        0,
        0,
        *(right[name] for name in ("here", "other", "first", "last")),
        uuid.UUID(int=1).bytes_le,
        *(right[name] for name in ("table", "entry_count", "entry_size", "entries_crc")),
    )
    crc = right.get("header_crc", zlib.crc32(header[: right["header_size"]]))
    return header[:16] + struct.pack("<I", crc) + header[20:], entries


def _gpt_entry(first: int, last: int, size: int) -> bytes:
    return struct.pack("<16s16sQQQ", DATA_TYPE.bytes_le, uuid.UUID(int=first + 2).bytes_le, first, last, 0).ljust(
        size, b"\0"
    )


def gpt_disk(
    partitions: Sequence[tuple[int, int] | None],
    *,
    sectors: int = 4096,
    sector_size: int = 512,
    entry_size: int = 128,
    entry_count: int = 128,
    wrong: Mapping[str, int] = MappingProxyType({}),
) -> bytearray:
    """Return a disk with a GPT of partitions (first and last sector); `wrong` fields are of the first header."""
    disk = bytearray(sectors * sector_size)
    put(disk, 0, boot_record([Entry(PROTECTIVE, 1, sectors - 1)]))
    for backup in (True, False):
        header, entries = gpt_header(
            partitions,
            sectors=sectors,
            sector_size=sector_size,
            backup=backup,
            entry_size=entry_size,
            entry_count=entry_count,
            wrong={} if backup else wrong,
        )
        room = -(-len(entries) // sector_size)
        put(disk, sectors - 1 if backup else 1, header, sector_size)
        put(disk, sectors - 1 - room if backup else 2, entries, sector_size)
    return disk

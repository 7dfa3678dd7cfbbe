"""Partitions of an MBR: four primary ones, and logical ones in a chain of extended boot records (EBR)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from .disk import Disk, Partition, wrong

__all__ = ["find", "has_signature", "is_protective"]

_PRIMARY = 4
_EXTENDED = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE = 0xEE  # the whole disk, for programs that do not know GPT
_SIGNATURE = b"\x55\xaa"
_SIGNATURE_OFFSET = 510
_TABLE_OFFSET = 446
_ENTRY = struct.Struct("<4xB3xII")


class _Entry(NamedTuple):
    type: int
    start: int
    length: int

    @property
    def is_used(self) -> bool:
        return bool(self.type and self.length)


def has_signature(record: bytes) -> bool:
    """Tell whether a sector is a boot record."""
    return record[_SIGNATURE_OFFSET : _SIGNATURE_OFFSET + 2] == _SIGNATURE


def is_protective(record: bytes) -> bool:
    """Tell whether a boot record says that there is a GPT."""
    return has_signature(record) and any(entry.type == _PROTECTIVE for entry in _entries(record))


def _entries(record: bytes) -> list[_Entry]:
    return [_Entry(*_ENTRY.unpack_from(record, _TABLE_OFFSET + number * _ENTRY.size)) for number in range(_PRIMARY)]


def find(disk: Disk, number: int) -> Partition:
    """Return where partition `number` lies: 1 to 4 are primary ones, from 5 on they are logical ones.

    Raises:
        OSError: there is none of that number, or the table is wrong.
    """
    entries = _entries(disk.read(0))
    if number > _PRIMARY:
        return _logical(disk, entries, number)
    entry = entries[number - 1]
    if not entry.is_used:
        raise wrong(f"there is no partition {number} in the MBR")
    if entry.type in _EXTENDED:
        raise wrong(f"partition {number} is an extended one; those in it have numbers from {_PRIMARY + 1} on")
    return Partition(entry.start, entry.length)


def _logical(disk: Disk, entries: list[_Entry], number: int) -> Partition:
    """Follow the chain to partition `number`. It has to lead upwards, so that it comes to an end."""
    extended = next((entry for entry in entries if entry.is_used and entry.type in _EXTENDED), None)
    if extended is None:
        raise wrong(f"partition {number} would be a logical one, but there is no extended partition")
    here = extended.start
    for _ in range(_PRIMARY + 1, number):
        _, link, *_ = _boot_record(disk, here)
        if not link.is_used or link.type not in _EXTENDED:
            raise wrong(f"there is no partition {number} in the MBR")
        following = extended.start + link.start
        if following <= here:
            raise wrong(f"the chain of logical partitions leads from sector {here} back to {following}")
        here = following
    entry, *_ = _boot_record(disk, here)
    if not entry.is_used:
        raise wrong(f"there is no partition {number} in the MBR")
    start = here + entry.start
    if start + entry.length > extended.start + extended.length:
        raise wrong(f"partition {number} goes beyond the end of the extended partition")
    return Partition(start, entry.length)


def _boot_record(disk: Disk, sector: int) -> list[_Entry]:
    record = disk.read(sector)
    if not has_signature(record):
        raise wrong(f"the chain of logical partitions leads to sector {sector}, where there is no boot record")
    return _entries(record)

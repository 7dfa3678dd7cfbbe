"""The partition filter: one partition of a disk."""

from __future__ import annotations

from collections.abc import Callable

from nbdkitpy import Client, Filter, Handle, Parameter, hookimpl, integer, parse_size, range_of

from . import gpt, mbr
from .disk import Disk, Partition, wrong

__all__ = ["Partitions"]

_SECTOR_SIZES = (512, 4096)

#: More than any table has.
_MAX_NUMBER = 8192


def _parse_sector_size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError:
        size = 0
    if size not in _SECTOR_SIZES:
        raise ValueError("512 or 4096")
    return size


class Partitions(Filter):
    """Serve one partition. The table is read each time that an export is opened."""

    name = "partition"
    longname = "nbdkitpy partition filter"
    description = "Serve one partition of the disk, which has an MBR or a GPT."
    multi_process = True

    partition = Parameter(
        integer(1, _MAX_NUMBER),
        required=True,
        metavar="PART",
        help="Number of the partition, from 1; in an MBR, logical ones are counted from 5.",
    )
    partition_sectorsize = Parameter(
        _parse_sector_size,
        metavar="SECTOR_SIZE",
        help="Bytes of a sector in the table, 512 or 4096. Default: the minimum block size if it is either, else 512.",
    )

    def wrap(self, handle: Handle, client: Client) -> Handle:
        disk = Disk(handle, self.partition_sectorsize or _natural_sector_size(handle))
        start, length = _find(disk, self.partition)
        if start + length > disk.sectors:
            raise wrong(f"partition {self.partition} ends at sector {start + length}, outside of the disk")
        return range_of(handle, start * disk.sector_size, length * disk.sector_size, self.name)


def _natural_sector_size(handle: Handle) -> int:
    block = handle.block_size()
    return block.minimum if block is not None and block.minimum in _SECTOR_SIZES else _SECTOR_SIZES[0]


def _find(disk: Disk, number: int) -> Partition:
    if disk.sectors < 2:
        raise wrong(f"a disk of {disk.sectors} sectors of {disk.sector_size} bytes is too small for partitions")
    boot_record = disk.read(0)
    if gpt.has_signature(disk.read(1)) or mbr.is_protective(boot_record):
        return gpt.find(disk, number)
    if mbr.has_signature(boot_record):
        return mbr.find(disk, number)
    raise wrong("there is neither an MBR nor a GPT on the disk")


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Partitions)

"""delayed: a disk of coroutines that takes 5 ms to answer; its peer is nbdkit's memory behind its delay filter."""

from __future__ import annotations

import asyncio

from nbdkitpy import AsyncHandle, AsyncPlugin, Buffer, Client, Parameter, parse_size

#: Seconds that a request takes.
DELAY = 0.005


class DelayedHandle(AsyncHandle):
    """A client's view of the disk."""

    def __init__(self, disk: bytearray) -> None:
        self._disk = disk

    def get_size(self) -> int:
        return len(self._disk)

    async def pread(self, count: int, offset: int) -> Buffer:
        await asyncio.sleep(DELAY)
        return self._disk[offset : offset + count]

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        await asyncio.sleep(DELAY)
        self._disk[offset : offset + len(data)] = data


class Delayed(AsyncPlugin):
    """Keeps the disk."""

    size = Parameter(parse_size, required=True, help="Size of the disk.")

    def get_ready(self) -> None:
        self._disk = bytearray(self.size)

    async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
        return DelayedHandle(self._disk)

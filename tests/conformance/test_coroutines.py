"""A plugin of coroutines keeps what every plugin has to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import MappingProxyType

from nbdkitpy import AsyncHandle, AsyncPlugin, Buffer, Client, Extent, ExtentType, Parameter, parse_size
from nbdkitpy.testing import PluginConformance


class RamHandle(AsyncHandle):
    """All verbs, each of which lets others go on before it does its work."""

    def __init__(self, disk: bytearray) -> None:
        self.disk = disk

    def get_size(self) -> int:
        return len(self.disk)

    def can_multi_conn(self) -> bool:
        return True

    async def pread(self, count: int, offset: int) -> Buffer:
        await asyncio.sleep(0)
        return self.disk[offset : offset + count]

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        await asyncio.sleep(0)
        self.disk[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await asyncio.sleep(0)

    async def trim(self, count: int, offset: int, flags: int) -> None:
        await self.zero(count, offset, flags)

    async def zero(self, count: int, offset: int, flags: int) -> None:
        await asyncio.sleep(0)
        self.disk[offset : offset + count] = bytes(count)

    async def cache(self, count: int, offset: int) -> None:
        await asyncio.sleep(0)

    async def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        await asyncio.sleep(0)
        return [Extent(offset, count, ExtentType.DATA)]


class Ram(AsyncPlugin):
    """A disk in memory."""

    name = "ram"
    size = Parameter(parse_size, default=1 << 20)

    def get_ready(self) -> None:
        self.disk = bytearray(self.size)

    async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
        return RamHandle(self.disk)


class TestCoroutines(PluginConformance):
    plugin = Ram


class TestCoroutinesBehindFilters(PluginConformance):
    """As far as filters override verbs, threads wait for the coroutines."""

    plugin = Ram
    parameters = MappingProxyType({"offset": "64k", "error-rate": "0"})

    def layers(self) -> tuple[type[Ram], list[str]]:
        return Ram, ["blocksize", "offset", "error", "fua", "cow"]

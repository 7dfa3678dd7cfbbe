"""A plugin whose verbs are coroutines, which notes what it is asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

from nbdkitpy import AsyncHandle, AsyncPlugin, Buffer, Client, Extent, Support, ThreadModel
from tests.nbdclient import PATIENCE
from tests.serving import CONTENT, SIZE


class AsyncWhole(AsyncHandle):
    """Can do everything. Tests override what they are about."""

    def __init__(self, plugin: AsyncDisks) -> None:
        self.plugin = plugin
        self.store = bytearray(CONTENT)
        self.calls: list[tuple[object, ...]] = []
        self.threads: set[str] = set()  #: in which verbs were called, by name

    def noted(self, *call: object) -> None:
        self.calls.append(call)
        self.threads.add(threading.current_thread().name)

    def get_size(self) -> int:
        return SIZE

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    async def pread(self, count: int, offset: int) -> Buffer:
        self.noted("pread", count, offset)
        await asyncio.sleep(0)
        return bytes(self.store[offset : offset + count])

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.noted("pwrite", len(data), offset, flags)
        await asyncio.sleep(0)
        self.store[offset : offset + len(data)] = data

    async def flush(self) -> None:
        self.noted("flush")

    async def trim(self, count: int, offset: int, flags: int) -> None:
        self.noted("trim", count, offset, flags)

    async def zero(self, count: int, offset: int, flags: int) -> None:
        self.noted("zero", count, offset, flags)

    async def cache(self, count: int, offset: int) -> None:
        self.noted("cache", count, offset)

    async def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self.noted("extents", count, offset, flags)
        return [Extent(offset, count)]

    async def close(self) -> None:
        self.plugin.closed += 1


class AsyncDisks(AsyncPlugin):
    """Makes a handle for each client, and keeps it.

    Args:
        handle: Called with this plugin.
        model: The thread model, if it is not that of any such plugin.
    """

    name = "disks"

    def __init__(
        self, handle: Callable[[AsyncDisks], AsyncHandle] = AsyncWhole, model: ThreadModel | None = None
    ) -> None:
        super().__init__()
        self._handle = handle
        self._model = model
        self.handles: list[Any] = []
        self.closed = 0

    def thread_model(self) -> ThreadModel:
        return super().thread_model() if self._model is None else self._model

    async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
        self.handles.append(self._handle(self))
        return self.handles[-1]  # type: ignore[no-any-return]


class Gate:
    """Where coroutines wait until a test lets them go on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_open = False
        self._waiting: list[asyncio.Future[None]] = []
        self._arrivals = threading.Semaphore(0)

    async def wait(self) -> None:
        """Wait, unless the gate has been opened."""
        future = asyncio.get_running_loop().create_future()
        with self._lock:
            self._arrivals.release()
            if self._is_open:
                return
            self._waiting.append(future)
        await future

    def wait_for(self, count: int) -> None:
        """In the test: wait until so many have come, since the last time."""
        for number in range(count):
            assert self._arrivals.acquire(timeout=PATIENCE), f"only {number} of {count} have come"

    def open(self) -> None:
        """In the test: let all go on, and whoever comes."""
        with self._lock:
            self._is_open = True
        for future in self._waiting:
            future.get_loop().call_soon_threadsafe(_release, future)


def _release(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

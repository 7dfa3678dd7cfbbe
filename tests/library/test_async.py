"""A server in a program of coroutines: nothing waits in their thread."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from nbdkitpy import EmbeddedServer, serve
from tests.library.units import Disk, descriptors, holding_up
from tests.nbdclient import PATIENCE, NbdClient

Body = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = threading.enumerate(), descriptors()
    yield
    assert threading.enumerate() == before[0]
    assert descriptors() <= before[1]


def run(body: Body) -> None:
    asyncio.run(asyncio.wait_for(body(), PATIENCE))


async def magic(server: EmbeddedServer) -> bytes:
    """The first bytes that a client by the Unix socket is sent."""
    reader, writer = await asyncio.open_unix_connection(server.unix_path)
    received = await reader.readexactly(8)
    writer.close()
    await writer.wait_closed()
    return received


def test_it_serves_while_the_block_lasts() -> None:
    disk = Disk()

    async def body() -> None:
        async with serve(disk) as one, serve("null") as other:
            assert [await magic(server) for server in (one, other)] == [b"NBDMAGIC"] * 2

    run(body)

    assert disk.steps[-2:] == ["cleanup", "unload"]


@pytest.mark.parametrize("step", ["load", "get_ready", "after_fork", "cleanup", "unload"])
def test_other_tasks_go_on_while_a_layer_takes_its_time(step: str) -> None:
    disk, reached, go_on = Disk(), threading.Event(), threading.Event()
    disk.does[step] = holding_up(reached, go_on)

    async def let_go_on() -> None:
        await is_set(reached)
        go_on.set()  # never reached, if the loop were held up

    async def body() -> None:
        task = asyncio.create_task(let_go_on())
        async with serve(disk):
            pass
        await task

    run(body)

    assert disk.steps[-1] == "unload"


def test_other_tasks_go_on_while_clients_are_waited_for() -> None:
    disk = Disk()

    async def body() -> None:
        async with serve(disk, drain=PATIENCE) as server:
            client = await asyncio.to_thread(lambda: NbdClient(server.connect()).negotiate())
            disk.does["close"] = lambda: asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(PATIENCE)
            loop = asyncio.get_running_loop()
        client.socket.close()

    run(body)

    assert disk.steps[-3:] == ["close", "cleanup", "unload"]


def test_an_error_at_the_start_is_raised() -> None:
    disk = Disk()
    error = OSError(errno.EIO, "broken")

    def fail() -> None:
        raise error

    disk.does["get_ready"] = fail

    async def body() -> None:
        with pytest.raises(OSError) as caught:
            async with serve(disk):
                pytest.fail("it has started")
        assert caught.value is error

    run(body)

    assert disk.steps[-1] == "unload"


def test_without_a_thread_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def body() -> None:
        monkeypatch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            async with serve(Disk):
                pass

    run(body)


def test_an_error_at_the_end_is_raised() -> None:
    disk = Disk()

    def fail() -> None:
        raise OSError(errno.EIO, "cannot be unloaded")

    disk.does["unload"] = fail

    async def body() -> None:
        with pytest.raises(OSError, match="cannot be unloaded"):
            async with serve(disk):
                pass

    run(body)


def test_an_error_of_the_block_is_raised_and_the_server_ends() -> None:
    disk = Disk()

    async def body() -> None:
        with pytest.raises(ZeroDivisionError):
            async with serve(disk):
                _ = 1 / 0

    run(body)

    assert disk.steps[-1] == "unload"


async def is_set(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0)


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task, and let it notice."""
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("step", ["get_ready", "cleanup"])
def test_a_task_that_is_cancelled_waits_for_the_end(step: str) -> None:
    disk, reached, go_on = Disk(), threading.Event(), threading.Event()
    disk.does[step] = holding_up(reached, go_on)

    async def serving() -> None:
        async with serve(disk):
            pass

    async def body() -> None:
        task = asyncio.create_task(serving())
        await is_set(reached)
        await cancel(task)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert disk.steps[-2:] == ["cleanup", "unload"]

    run(body)


@pytest.mark.parametrize("step", ["get_ready", "cleanup"])
def test_a_task_that_is_cancelled_twice_waits_no_more(step: str) -> None:
    disk, reached, go_on = Disk(), threading.Event(), threading.Event()
    disk.does[step] = holding_up(reached, go_on)
    server = serve(disk)

    async def serving() -> None:
        async with server:
            pass

    async def body() -> None:
        task = asyncio.create_task(serving())
        await is_set(reached)
        await cancel(task)
        await cancel(task)
        assert task.cancelled()

    run(body)

    go_on.set()
    assert server.wait(PATIENCE)
    assert disk.steps[-2:] == ["cleanup", "unload"]

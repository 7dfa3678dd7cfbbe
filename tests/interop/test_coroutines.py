"""A plugin of coroutines in a file, as strangers write it: served by the command line, and clean under mypy."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.interop.harness import MIB, Servers, Tool, run
from tests.nbdclient import NbdClient

pytestmark = pytest.mark.interop

FAR = """
import asyncio
import os

from nbdkitpy import AsyncHandle, AsyncPlugin, Buffer, Client, Parameter, parse_size


class FarHandle(AsyncHandle):
    def __init__(self, disk: bytearray) -> None:
        self.disk = disk

    def get_size(self) -> int:
        return len(self.disk)

    async def pread(self, count: int, offset: int) -> Buffer:
        await asyncio.sleep(0.001)
        return self.disk[offset : offset + count]

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        await asyncio.sleep(0.001)
        self.disk[offset : offset + len(data)] = data


class Far(AsyncPlugin):
    multi_process = True
    size = Parameter(parse_size, default=1 << 20, magic=True)

    def get_ready(self) -> None:
        self.disk = bytearray(self.size)

    def after_fork(self) -> None:
        self.disk[:8] = self.run(self.number())

    async def number(self) -> bytes:
        await asyncio.sleep(0)
        return b"%8d" % os.getpid()

    async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
        return FarHandle(self.disk)
"""


@pytest.fixture
def far(tmp_path: Path) -> Path:
    path = tmp_path / "far.py"
    path.write_text(FAR)
    return path


def test_it_is_served_by_its_path_with_filters_before_it(far: Path, serve: Servers, qemu_io: Tool) -> None:
    server = serve("--filter=log", "--filter=offset", far, f"{2 * MIB}", "offset=4096", "logfile=/dev/null")

    output = qemu_io("-f", "raw", "-c", "write -P 7 512 64k", "-c", "read -P 7 512 64k", server.uri)

    assert output.count("65536/65536 bytes") == 2


def test_each_worker_has_a_loop_of_its_own(far: Path, serve: Servers) -> None:
    server = serve("--workers=2", far)
    clients = [NbdClient(server.connect()).negotiate() for _ in range(2)]

    numbers = {int(client.read(0, 8)) for client in clients}
    for client in clients:
        client.socket.close()

    assert len(numbers) == 2
    assert not numbers & {server.pid, os.getpid()}


@pytest.mark.parametrize("connections", [1, 4])
def test_copies_over_tls_are_whole(
    connections: int, far: Path, serve: Servers, nbdcopy: Tool, certificates: Path, tmp_path: Path
) -> None:
    server = serve("--tls=require", "--tls-certificates", certificates, far, f"{4 * MIB}")
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(4 * MIB))
    many = ("--request-size=65536", f"--connections={connections}", "--requests=64")

    nbdcopy(*many, image, server.uri)
    nbdcopy(*many, server.uri, back)

    assert back.read_bytes() == image.read_bytes()


def test_it_is_clean_under_mypy_strict(far: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")

    run([sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}/cache", str(far)])

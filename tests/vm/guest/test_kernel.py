"""The kernel's NBD client: file systems on a served disk."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vm.guest.harness import MIB, Server, digest, noise, run

Serve = Callable[..., Server]

DEVICE = "/dev/nbd0"
QUEUE = Path("/sys/block/nbd0/queue")
SIZE = 16 * MIB


@pytest.fixture(autouse=True, scope="module")
def client() -> None:
    run("modprobe", "nbd")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return noise(tmp_path / "disk", SIZE)


@contextlib.contextmanager
def attached(server: Server, *options: str) -> Iterator[None]:
    """The disk is the kernel's ``/dev/nbd0``."""
    port, path = re.search(r":(\d+)$", server.uri), re.search(r"socket=(.*)", server.uri)
    where = ["127.0.0.1", port[1]] if port else ["-unix", path[1] if path else ""]
    run("nbd-client", *where, DEVICE, *options)
    try:
        yield
    finally:
        run("nbd-client", "-d", DEVICE)


@contextlib.contextmanager
def mounted(where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", *options, DEVICE, where)
    try:
        yield where
    finally:
        run("umount", where)


def fill(directory: Path) -> None:
    """Make some files, small, large and with holes."""
    for number in range(100):
        noise(directory / f"small-{number}", 37 * number)
    noise(directory / "large", 4 * MIB)
    with (directory / "sparse").open("wb") as sparse:
        for position in range(0, 4 * MIB, MIB):
            os.pwrite(sparse.fileno(), b"x" * 5000, position)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in directory.iterdir() if path.is_file()}


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("listen", [["-U", "-"], ["-4", "-p", "0"]], ids=["unix", "tcp"])
@pytest.mark.parametrize("plugin", ["file", "memory"])
def test_file_system_is_as_it_was_left(
    serve: Serve, tmp_path: Path, disk: Path, plugin: str, listen: list[str]
) -> None:
    words = [*listen, plugin, str(disk) if plugin == "file" else str(SIZE)]
    server = serve(*words)
    with attached(server):
        run("mkfs.ext4", "-q", DEVICE)
        with mounted(tmp_path / "mnt") as directory:
            fill(directory)
            made = contents(directory)
    if plugin == "file":
        assert server.end() == []
        run("fsck.ext4", "-f", "-n", disk)
        server = serve(*words)

    with attached(server):
        run("fsck.ext4", "-f", "-n", DEVICE)
        with mounted(tmp_path / "mnt", "-o", "ro") as directory:
            found = contents(directory)

    assert len(made) == 102
    assert found == made
    assert server.end() == []


def test_file_system_is_written_by_several_connections(serve: Serve, tmp_path: Path, disk: Path) -> None:
    server = serve("-U", "-", "file", disk)
    with attached(server, "-C", "4"):
        run("mkfs.ext4", "-q", DEVICE)
        with mounted(tmp_path / "mnt") as directory:
            places = [directory / str(number) for number in range(4)]
            for place in places:
                place.mkdir()
            with ThreadPoolExecutor(len(places)) as pool:
                list(pool.map(lambda place: noise(place / "file", 2 * MIB), places))
            made = [digest(place / "file") for place in places]
        run("fsck.ext4", "-f", "-n", DEVICE)

        with mounted(tmp_path / "mnt", "-o", "ro"):
            assert [digest(place / "file") for place in places] == made
    assert server.end() == []


def test_kernel_knows_what_the_server_can_do(serve: Serve, disk: Path) -> None:
    server = serve("-U", "-", "file", disk)

    with attached(server):
        assert run("blockdev", "--getsize64", DEVICE) == f"{SIZE}\n"
        assert run("blockdev", "--getro", DEVICE) == "0\n"
        assert (QUEUE / "write_cache").read_text() == "write back\n"
        assert (QUEUE / "fua").read_text() == "1\n"
        assert int((QUEUE / "discard_max_bytes").read_text()) > 0


def test_device_is_read_only_if_the_server_is(serve: Serve, disk: Path) -> None:
    before = digest(disk)
    server = serve("-U", "-", "-r", "file", disk)

    with attached(server):
        assert run("blockdev", "--getro", DEVICE) == "1\n"
        assert digest(DEVICE) == before
        run("mkfs.ext4", "-q", "-F", DEVICE, status=1)

    assert server.end() == []
    assert digest(disk) == before


@pytest.mark.parametrize("plugin", ["file", "memory"])
def test_discarded_blocks_are_zeroes_and_no_others(serve: Serve, disk: Path, plugin: str) -> None:
    noisy = disk.read_bytes()
    server = serve("-U", "-", plugin, disk if plugin == "file" else str(SIZE))
    with attached(server):
        run("dd", f"if={disk}", f"of={DEVICE}", "bs=1M", "oflag=direct")

        run("blkdiscard", "--offset", str(MIB), "--length", str(2 * MIB), DEVICE)

        assert Path(DEVICE).read_bytes() == noisy[:MIB] + bytes(2 * MIB) + noisy[3 * MIB :]
        run("blkdiscard", DEVICE)
        assert Path(DEVICE).read_bytes() == bytes(SIZE)
    assert server.end() == []
    if plugin == "file":
        assert allocated(disk) == 0


def test_trimmed_file_system_gives_its_blocks_back(serve: Serve, tmp_path: Path, disk: Path) -> None:
    server = serve("-U", "-", "file", disk)
    with attached(server):
        run("mkfs.ext4", "-q", DEVICE)
        with mounted(tmp_path / "mnt") as directory:
            kept, gone = noise(directory / "kept", 2 * MIB), noise(directory / "gone", 8 * MIB)
            before = digest(kept)
            gone.unlink()
            os.sync()

            run("fstrim", directory)

        assert 2 * MIB < allocated(disk) < 8 * MIB
        with mounted(tmp_path / "mnt", "-o", "ro"):
            assert digest(kept) == before
        run("fsck.ext4", "-f", "-n", DEVICE)


def test_server_with_exitlast_ends_when_the_kernel_leaves(serve: Serve) -> None:
    server = serve("-U", "-", "--filter=exitlast", "memory", "1M")

    with attached(server):
        assert not server.has_ended

    assert server.wait() == []


def test_end_of_the_server_is_an_error_of_the_device(serve: Serve, disk: Path) -> None:
    server = serve("-U", "-", "file", disk)
    with attached(server):
        run("dd", f"if={DEVICE}", "of=/dev/null", "count=8", "iflag=direct")

        assert server.end() == []

        run("dd", f"if={DEVICE}", "of=/dev/null", "count=8", "iflag=direct", status=1)

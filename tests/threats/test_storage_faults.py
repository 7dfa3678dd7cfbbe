"""Storage that is full, broken or cut off: the request fails with the right number, and everything else goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError
from nbdkitpy_plugins.file import FilePlugin, linux
from tests.conftest import StartServer
from tests.interop.harness import Server
from tests.nbdclient import NbdClient
from tests.threats import filters

KIB, MIB = 1 << 10, 1 << 20
SIZE = 4 * MIB

#: What the system says, and what the client is told.
ERRORS = {
    errno.EIO: NbdError.EIO,
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EROFS: NbdError.EPERM,
    errno.ENOMEM: NbdError.ENOMEM,
    errno.ESTALE: NbdError.EINVAL,
}

#: A request, and the call of the system that fails it.
REQUESTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "read": (os, "pread", {"command": Command.READ, "length": 512}),
    "write": (os, "pwrite", {"command": Command.WRITE, "data": b"x" * 512}),
    "write through": (os, "fdatasync", {"command": Command.WRITE, "data": b"x" * 512, "flags": CommandFlag.FUA}),
    "flush": (os, "fdatasync", {"command": Command.FLUSH}),
    "trim": (linux, "punch_hole", {"command": Command.TRIM, "length": 8192}),
    "zero": (linux, "zero_range", {"command": Command.WRITE_ZEROES, "length": 8192, "flags": CommandFlag.NO_HOLE}),
    "cache": (os, "posix_fadvise", {"command": Command.CACHE, "length": 512}),
}


class Faulty:
    """Storage that breaks, and is mended again."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.is_broken = False

    def made_of(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call of the system that fails as long as the storage is broken."""

        def either(*arguments: Any) -> Any:
            if self.is_broken:
                raise OSError(self._number, os.strerror(self._number))
            return call(*arguments)

        return either


def disk(path: Path) -> FilePlugin:
    plugin = FilePlugin()
    plugin.config("file", str(filters.image(path, SIZE)))
    return plugin


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("request_", REQUESTS)
def test_an_error_of_the_storage_is_told_by_its_number_and_of_that_request_alone(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: str, number: int
) -> None:
    where, call, arguments = REQUESTS[request_]
    faulty = Faulty(number)
    for name in [call, *(["preadv"] if call == "pread" else [])]:
        monkeypatch.setattr(where, name, faulty.made_of(getattr(where, name)))
    server = start_server(disk(tmp_path / "disk"))
    client, other = server.connect(), server.connect()

    faulty.is_broken = True
    assert client.call(**arguments).error == ERRORS[number]
    faulty.is_broken = False

    again = client.call(**arguments).error
    assert again == (NbdError.EIO if call == "fdatasync" else 0)  # what was not synchronised may be lost for good
    assert other.read(0, 512) == client.read(0, 512)
    client.disconnect()
    other.disconnect()


# --- filters ---

#: Which pass on what they are asked, more or less; the others have errors of their own, or none.
PASSING = [name for name in filters.PARAMETERS if name not in ("cow", "tls-fallback", "partition")]


@pytest.mark.parametrize("name", PASSING)
def test_an_error_of_the_storage_comes_through_every_filter(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    server = start_server(disk(tmp_path / "disk"), filters.loaded(name, tmp_path))
    client = server.connect()

    def full(*_: object) -> NoReturn:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        for offset, length in ((0, 4096), (MIB + 777, 100_000)):
            assert client.call(Command.WRITE, offset, data=b"x" * length).error == NbdError.ENOSPC

    for offset, length in ((0, 4096), (MIB + 777, 100_000)):
        client.write(offset, b"x" * length)
    client.disconnect()


# --- disks that fill up ---


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M", "none", place], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def serving(path: Path, *under: str, workers: int = 0) -> Iterator[Callable[[], NbdClient]]:
    """Serve a file; the clients that are made leave, and the server ends in order."""
    words = ("-U", "-", f"--workers={workers}", "file", path)
    server = Server(*words, directory=path.parent, under=under)
    with contextlib.ExitStack() as clients:
        clients.callback(server.kill)
        yield lambda: clients.enter_context(NbdClient(server.connect()).negotiate())
        assert server.is_running
        os.kill(server.pid, 15)
        assert server.status() == 0
    assert "Traceback" not in "".join(server.log())


def fill(client: NbdClient, limit: int) -> int:
    """Write from the beginning on until there is no more room; return how much was acknowledged."""
    for offset in range(0, limit, 64 * KIB):
        reply = client.call(Command.WRITE, offset, data=b"x" * (64 * KIB))
        if reply.error:
            assert reply.error == NbdError.ENOSPC
            return offset
    pytest.fail("it does not fill up")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_is_full_refuses_writes_keeps_what_it_has_and_takes_more_when_there_is_room(
    small: Path, workers: int
) -> None:
    path = small / "disk"
    path.write_bytes(b"")
    os.truncate(path, 8 * MIB)
    with serving(path, workers=workers) as connect:
        client, other = connect(), connect()

        room = fill(client, 8 * MIB)

        assert room >= 512 * KIB
        assert client.read(0, room) == b"x" * room
        assert not client.call(Command.FLUSH).error
        assert other.call(Command.WRITE, 4 * MIB, data=b"y" * 64 * KIB).error == NbdError.ENOSPC
        assert not other.call(Command.TRIM, 0, 512 * KIB).error
        other.write(4 * MIB, b"y" * 64 * KIB)
        assert other.read(4 * MIB, 64 * KIB) == b"y" * 64 * KIB


def test_a_file_may_be_larger_than_the_process_may_make_one(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    os.truncate(path, 8 * MIB)
    with serving(path, "prlimit", f"--fsize={MIB}") as connect:
        client, other = connect(), connect()

        assert fill(client, 8 * MIB) == MIB

        assert client.read(0, MIB) == b"x" * MIB
        other.write(512 * KIB, b"y" * 512)
        assert other.read(7 * MIB, 512) == bytes(512)


def test_a_file_may_be_cut_off_and_made_long_again_under_all_requests(tmp_path: Path) -> None:
    path = filters.image(tmp_path / "disk", SIZE)
    content = path.read_bytes()
    with serving(path) as connect:
        client, other = connect(), connect()
        for length in (512, 4096, 100 * KIB, MIB):
            os.truncate(path, 2 * MIB)
            # Where a large read has begun the only way to say that it fails is to end the connection.
            with contextlib.suppress(EOFError):
                assert client.call(Command.READ, 3 * MIB, length).error == NbdError.EIO
                assert client.call(Command.READ, 2 * MIB - 256, length).error == NbdError.EIO
            assert other.read(0, 2 * MIB) == content[: 2 * MIB]
            assert not other.call(Command.FLUSH).error

            os.truncate(path, SIZE)
            assert other.read(3 * MIB, length) == bytes(length)
            client = connect()

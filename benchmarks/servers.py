"""The servers that are compared: how they are started, and ended."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from benchmarks.clients import BenchmarkError, Target
from benchmarks.figures import MIB
from benchmarks.wire import (
    CMD_DISC,
    EXPORT_REPLY,
    FIXED_NEWSTYLE_NO_ZEROES,
    FLAGS_AND_OPTION,
    GREETING,
    IHAVEOPT,
    OPT_EXPORT_NAME,
    REQUEST,
    REQUEST_MAGIC,
    receive,
)

NBDKITPY = (sys.executable, "-m", "nbdkitpy")
# Filters that let everything through, in the order in which --filters N takes them.
FILTERS = (("ip", "allow=all"), ("limit", "limit=64"), ("exitlast", None))
START_SECONDS = 10.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Setup:
    """What both servers are to serve, and how. `size` is the image's, in bytes."""

    image: Path
    size: int
    filters: int = 0


@dataclass(frozen=True)
class Address:
    """Where a server is to listen: a Unix socket, or a TCP port on loopback."""

    path: str = ""
    port: int = 0

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={quote(self.path)}" if self.path else f"nbd://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """Return a new connection."""
        connection = socket.socket(socket.AF_UNIX if self.path else socket.AF_INET)
        connection.settimeout(START_SECONDS)
        try:
            connection.connect(self.path or ("127.0.0.1", self.port))
        except OSError:
            connection.close()
            raise
        return connection


def nbdkit_command(program: Sequence[str], plugin: str, setup: Setup, address: Address) -> list[str]:
    """Return the command line of nbdkit, which is nbdkitpy's too."""
    listen = ["-U", address.path] if address.path else ["-i", "127.0.0.1", "-p", str(address.port)]
    filters = FILTERS[: setup.filters]
    source = {"file": str(setup.image), "memory": str(setup.size)}[plugin]
    parameters = [parameter for _, parameter in filters if parameter]
    return [*program, "-f", *listen, *(f"--filter={name}" for name, _ in filters), plugin, source, *parameters]


def qemu_nbd_command(setup: Setup, address: Address) -> list[str]:
    """Return the command line of qemu-nbd, which has no filters."""
    listen = ["-k", address.path] if address.path else ["-b", "127.0.0.1", "-p", str(address.port)]
    return ["qemu-nbd", "--persistent", "--shared=64", "--format=raw", *listen, str(setup.image)]


@dataclass(frozen=True)
class Peer:
    """A server to compare with, the command that starts it, our plugin that does the same, and whether it filters."""

    tool: str
    command: Callable[[Setup, Address], list[str]]
    plugin: str = "file"
    filters: bool = True


PEERS = {
    "nbdkit-file": Peer("nbdkit", partial(nbdkit_command, ["nbdkit"], "file")),
    "nbdkit-memory": Peer("nbdkit", partial(nbdkit_command, ["nbdkit"], "memory"), plugin="memory"),
    "qemu-nbd": Peer("qemu-nbd", qemu_nbd_command, filters=False),
}


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    pid: int
    target: Target


@contextlib.contextmanager
def serving(command: Sequence[str], address: Address, size: int) -> Iterator[Server]:
    """Run a server, with one idle client so that no filter takes it for forsaken, and end it in the end."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            with idle_client(process, address):
                yield Server(process.pid, Target(address.uri, size))
        except (BenchmarkError, OSError) as error:
            log.seek(0)
            raise BenchmarkError(f"{error}\n{log.read()}".rstrip()) from error
        finally:
            end(process)


def connected(process: subprocess.Popen[bytes], address: Address) -> socket.socket:
    """Return a connection to a server that has just been started, as soon as it listens."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return address.connect()
        time.sleep(0.01)
    raise BenchmarkError(f"no server at {address.uri}")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server, by force if need be."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a TCP port that nobody has at this moment: nbdkit 1.32 cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextlib.contextmanager
def idle_client(process: subprocess.Popen[bytes], address: Address) -> Iterator[None]:
    """Wait until the server is there, and stay connected to its default export."""
    with connected(process, address) as connection:
        receive(connection, GREETING.size)
        connection.sendall(FLAGS_AND_OPTION.pack(FIXED_NEWSTYLE_NO_ZEROES, IHAVEOPT, OPT_EXPORT_NAME, 0))
        receive(connection, EXPORT_REPLY.size)
        yield
        # It may have ended already, and whoever notices says so better.
        with contextlib.suppress(OSError):
            connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))


def make_image(path: Path, size: int) -> None:
    """Write `size` bytes of random data, a whole number of MiB, and leave them clean in the page cache."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass

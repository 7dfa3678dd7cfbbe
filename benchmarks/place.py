"""Where a server and its client meet: an image in a directory, and a socket."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from benchmarks.clients import BenchmarkError
from benchmarks.figures import MIB

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """An image of `size` bytes and room for one server's files, which are called after it.

    The server listens on a Unix socket, or on a TCP port on loopback if that is not 0.
    """

    directory: Path
    size: int
    name: str
    port: int = 0

    @property
    def image(self) -> Path:
        return self.directory / "image"

    @property
    def path(self) -> Path:
        """The Unix socket."""
        return self.directory / self.name

    @property
    def config(self) -> Path:
        """Where there may be a file that the server is told to read."""
        return self.directory / f"{self.name}.conf"

    @property
    def pid_file(self) -> Path:
        """Where a server that goes into the background says which process it is."""
        return self.directory / f"{self.name}.pid"

    def clear(self) -> None:
        """Remove what a server has left."""
        for path in (self.path, self.config, self.pid_file):
            path.unlink(missing_ok=True)

    def uri(self, export: str) -> str:
        """Return how clients call an export."""
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{export}"
        return f"nbd+unix:///{export}?socket={quote(str(self.path))}"

    def connect(self) -> socket.socket:
        """Return a new connection."""
        connection = socket.socket(socket.AF_INET if self.port else socket.AF_UNIX)
        connection.settimeout(CONNECT_SECONDS)
        try:
            connection.connect(("127.0.0.1", self.port) if self.port else str(self.path))
        except OSError:
            connection.close()
            raise
        return connection

    def seen_from(self, root: Path) -> Place:
        """Return this place as it is called where `root` is the root directory."""
        try:
            return replace(self, directory="/" / self.directory.relative_to(root))
        except ValueError:
            raise BenchmarkError(f"{self.directory} is not within {root}: choose another --directory") from None


def free_port() -> int:
    """Return a TCP port that nobody has at this moment: nbdkit 1.32 cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


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


def chill(path: Path) -> None:
    """Have the system forget what it holds of a file in memory."""
    with path.open("rb+", buffering=0) as file:
        os.fsync(file.fileno())  # what has not been written cannot be forgotten
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

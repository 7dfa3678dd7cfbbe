"""Runs the real server and the real clients, for the interop tests."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.environment import NBDKITPY, without_coverage

SCRIPTS = Path(__file__).parent / "scripts"

#: Debian builds libnbd's binding for its own Python only.
DEBIANS_PYTHON = "/usr/bin/python3"

#: Seconds after which a client or a server is taken to hang.
PATIENCE = 60

MIB = 1 << 20
GIB = 1 << 30


def missing(reason: str) -> NoReturn:
    """Skip the test for `reason`; in continuous integration, where it could have been installed, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our environment with some variables more, in which coverage is not measured: it takes half of the time."""
    return {**without_coverage(), **(more or {})}


class Tool:
    """A command-line client, by its name."""

    def __init__(self, name: str, package: str) -> None:
        path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
        if path is None:
            missing(f"{name} is not installed (Debian's package {package})")
        self.path = path

    def __call__(self, *args: str | Path, status: int = 0) -> str:
        """Run it and return its standard output.

        Args:
            status: The exit status that it has to have.
        """
        return run([self.path, *map(str, args)], status=status)

    def json(self, *args: str | Path) -> Any:
        """Run it and return what its standard output says as JSON."""
        return json.loads(self(*args))


def run(
    argv: Sequence[str],
    *,
    status: int = 0,
    env: Mapping[str, str] | None = None,
    text: str | None = None,
    cwd: Path | None = None,
) -> str:
    """Run a command that ends by itself, and return its standard output.

    Args:
        argv: The command.
        status: The exit status that it has to have.
        env: Variables that are added to the environment.
        text: Its standard input; nothing if None.
        cwd: The directory that it is run in, if not ours.
    """
    done = subprocess.run(
        argv,
        input=text or "",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(env),
        cwd=cwd,
        check=False,
    )
    if done.returncode != status:
        pytest.fail(f"{argv} ended with {done.returncode}, not {status}:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def run_script(name: str, *args: object) -> Any:
    """Run a script of ours with libnbd's binding; return what it prints as JSON, None if it prints nothing."""
    # Isolated (-I), as our Python's modules are none for Debian's.
    output = run([DEBIANS_PYTHON, "-I", str(SCRIPTS / name), *map(str, args)])
    return json.loads(output) if output else None


class Server:
    """``nbdkitpy`` in a process of its own, from when clients can connect until it has ended.

    Args:
        words: Of the command line.
        directory: For what it writes on standard error.
        env: Variables that are added to the environment.
        pass_fds: Descriptors that it inherits.
        under: Words before those of the command, of a program that becomes it.
    """

    def __init__(
        self,
        *words: str | Path,
        directory: Path,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        under: Sequence[str] = (),
    ) -> None:
        self._log = directory / f"stderr-{random.getrandbits(64):x}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*under, *NBDKITPY, "-f", "--print-uri", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(env),
                pass_fds=pass_fds,
                text=True,
            )
        self._has_ended = False
        assert self._process.stdout is not None
        self.uri = self._process.stdout.readline().strip()  # printed as soon as clients can connect
        if not self.uri:
            self._process.wait(PATIENCE)
            self._close()
            pytest.fail(f"nbdkitpy {words} did not start:\n{self._log.read_text()}", pytrace=False)

    @property
    def pid(self) -> int:
        """The process number."""
        return self._process.pid

    @property
    def port(self) -> int:
        """The TCP port."""
        return urlsplit(self.uri).port or 10809

    @property
    def unix_path(self) -> str:
        """The path of the Unix socket."""
        return unquote(parse_qs(urlsplit(self.uri).query)["socket"][0])

    def connect(self) -> socket.socket:
        """Return a new connection to it, on which nothing has happened yet."""
        if urlsplit(self.uri).scheme == "nbd":
            return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        with contextlib.ExitStack() as ends:
            sock = ends.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(self.unix_path)  # with a time limit it would fail if too many clients wait
            sock.settimeout(PATIENCE)
            ends.pop_all()
        return sock

    def log(self) -> list[str]:
        """Return the lines that it has written on standard error so far."""
        return self._log.read_text().splitlines()

    def status(self) -> int:
        """Wait until it ends, however that may be, and return its exit status."""
        return self._process.wait(PATIENCE)

    def wait(self, status: int = 0) -> list[str]:
        """Wait until it ends by itself, with this exit status, and return its standard error's lines."""
        found = self._process.wait(PATIENCE)
        self._has_ended = True
        self._close()
        lines = self.log()
        assert "Traceback" not in "\n".join(lines)
        assert found == status, lines
        return lines

    def end(self) -> list[str]:
        """End it by SIGTERM, which it has to do in order, and return its standard error's lines."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    @property
    def has_ended(self) -> bool:
        """Whether the test has seen it end."""
        return self._has_ended

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Make sure that it has ended, when nothing else matters any more."""
        if self.is_running:
            self._process.kill()
            self._process.wait(PATIENCE)
        self._close()

    def _close(self) -> None:
        if self._process.stdout is not None:
            self._process.stdout.close()


class Servers:
    """Starts servers, and sees to it that each of them ends in order and had no errors to report."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: list[Server] = []

    def __call__(self, *words: str | Path, env: Mapping[str, str] | None = None) -> Server:
        """Start a server on a private Unix socket."""
        return self.at("-U", "-", *words, env=env)

    def tcp(self, *words: str | Path, env: Mapping[str, str] | None = None) -> Server:
        """Start a server on a free port of the IPv4 loopback address."""
        return self.at("-4", "-p", "0", *words, env=env)

    def at(self, *words: str | Path, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()) -> Server:
        """Start a server where `words` say."""
        server = Server(*words, directory=self._directory, env=env, pass_fds=pass_fds)
        self._running.append(server)
        return server

    def finish(self) -> None:
        """End those that are running, and check that each had nothing to say.

        A test that expects messages, or the end, has ended the server itself and looked at them.
        """
        try:
            for server in self._running:
                if not server.has_ended:
                    assert server.is_running, f"the server ended of itself: {server.log()}"
                    assert server.end() == []
        finally:
            for server in self._running:
                server.kill()


# --- images ---


def sparse_image(path: Path, size: int, pieces: Mapping[int, int]) -> Path:
    """Make a file that is a hole but for `pieces`: offset to length, of bytes that have no zeroes in a row."""
    with path.open("wb") as image:
        image.truncate(size)
        for offset, length in pieces.items():
            image.seek(offset)
            for start in range(0, length, len(_NOISE)):
                # Turned by a little each time, so that a piece in the wrong place is noticed.
                turn = (offset + start) // 4093 % len(_NOISE)
                image.write((_NOISE[turn:] + _NOISE[:turn])[: length - start])
    return path


#: Random bytes; to make a gigabyte of them would take seconds.
_NOISE = random.Random(0).randbytes(4 * MIB)


def full_image(path: Path, size: int) -> Path:
    """Make a file without a hole or a block of zeroes."""
    return sparse_image(path, size, {0: size})


def empty_image(path: Path, size: int) -> Path:
    """Make a file that is a hole."""
    return sparse_image(path, size, {})


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(16 * MIB):
            digest.update(piece)
    return digest.hexdigest()


def allocated(path: Path) -> int:
    """Return how many bytes a file takes up on disk."""
    return path.stat().st_blocks * 512


# --- packages of strangers ---


def make_distribution(directory: Path, name: str, *, plugins: str = "", filters: str = "") -> None:
    """Make what pip leaves of a package of one module, `name`, which registers these classes.

    Args:
        directory: That is going to be on the module search path.
        name: Of the distribution, its module, and the unit.
        plugins: Source of the module, if the unit is a plugin.
        filters: The same, if it is a filter.
    """
    kind = "plugins" if plugins else "filters"
    (directory / f"{name}.py").write_text(plugins or filters)
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[nbdkitpy.{kind}]\n{name} = {name}\n")


# --- raw sockets ---


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """Return the next `count` bytes."""
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        assert piece, f"the server closed the connection after {data!r}"
        data += piece
    return data


def receive_all(sock: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(1 << 16):
            data += piece
    return data

"""Servers that run: how they are started, waited for, and ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients import BenchmarkError, Target, run_client
from benchmarks.place import Place, free_port
from benchmarks.processes import is_alive
from benchmarks.servers import Contender
from benchmarks.wire import GREETING, disconnect, negotiate, receive

START_SECONDS = 10.0
STOP_SECONDS = 10.0
# Between two looks whether a server is there, or has gone.
POLL_SECONDS = 0.0005
# Bytes of what a server says that are shown.
MOST_SAID = 16 << 10


@dataclass(frozen=True)
class Running:
    """A server that has been started at a place; it may not listen yet."""

    contender: Contender
    place: Place
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """The process that serves, once it listens."""
        return int(self.place.pid_file.read_text()) if self.contender.daemon else self.process.pid

    def connect(self) -> socket.socket:
        """Return a connection, as soon as the server listens; nothing has been received yet."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not self.failed():
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                return self.place.connect()
            time.sleep(POLL_SECONDS)
        raise BenchmarkError(f"no server at {self.place.uri(self.contender.export)}")

    def failed(self) -> bool:
        """Whether it has ended, and was not to."""
        status = self.process.poll()
        return status is not None and not (self.contender.daemon and status == 0)

    @contextlib.contextmanager
    def client(self) -> Iterator[socket.socket]:
        """Stay connected, in the transmission phase, for a while."""
        with self.connect() as connection:
            receive(connection, GREETING.size)
            negotiate(connection, self.contender.export)
            yield connection
            disconnect(connection)


@dataclass(frozen=True)
class Server:
    """A server that is there for clients."""

    pid: int
    target: Target


class Service:
    """One contender, which serves what is in a directory.

    Args:
        contender: What to run.
        directory: That has the image.
        size: Of the image, in bytes.
        tcp: Listen on TCP ports instead of Unix sockets.
        ends: Where to put what has to be ended.
    """

    def __init__(
        self, contender: Contender, directory: Path, size: int, *, tcp: bool, ends: contextlib.ExitStack
    ) -> None:
        self.contender = contender
        self._directory = directory
        self._size = size
        self._tcp = tcp
        self._ends = ends
        self._numbers = itertools.count()
        self._server: Server | None = None
        self._log = ends.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - it is one

    @property
    def server(self) -> Server:
        """The server that clients are run on, which is started when it is first asked for."""
        if self._server is None:
            running = self._ends.enter_context(self.launch())
            # So that no filter takes the server for forsaken while fio, which connects twice, does not.
            self._ends.enter_context(running.client())
            target = Target(running.place.uri(self.contender.export), self._size, running.place.image)
            if self.contender.source == "memory":
                run_client(["nbdcopy", str(target.image), target.uri], 0)
            self._server = Server(running.pid, target)
        return self._server

    @contextlib.contextmanager
    def launch(self) -> Iterator[Running]:
        """Run one more server, with nobody connected, and end it in the end."""
        name = f"{re.sub('[^a-z0-9.-]+', '-', self.contender.name)}-{next(self._numbers)}"
        place = Place(self._directory, self._size, name, free_port() if self._tcp else 0)
        command = self.contender.command(place)
        environment = {**os.environ, **self.contender.environment}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment
        )
        running = Running(self.contender, place, process)
        try:
            yield running
        finally:
            end(running)
            place.clear()

    def said(self) -> str:
        """Return what its servers have said so far."""
        # Not by way of the file's position, which is where the servers write.
        return os.pread(self._log.fileno(), MOST_SAID, 0).decode(errors="replace")


def end(running: Running) -> None:
    """End a server, by force if need be."""
    if running.contender.daemon and running.place.pid_file.exists():
        end_stranger(running.pid)
    running.process.terminate()
    try:
        running.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        running.process.kill()
        running.process.wait()


def end_stranger(pid: int) -> None:
    """End a process that is not our child, so that nobody tells us when it is gone."""
    deadline = time.monotonic() + STOP_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        os.kill(pid, signal.SIGKILL)

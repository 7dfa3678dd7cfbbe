"""Servers with workers, in processes of their own, whose plugin tells which process it is in."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.environment import NBDKITPY
from tests.interop.harness import PATIENCE, Server, make_distribution
from tests.nbdclient import NbdClient

PIDS = """
import errno, os, signal, sys, threading, time
from nbdkitpy import Handle, Parameter, Plugin, ThreadModel, hookimpl, parse_path, parse_string

class Unspeakable(OSError):
    def __str__(self):
        sys.exit()

class Disk(Handle):
    def __init__(self, plugin):
        self.plugin = plugin
    def get_size(self):
        return 1 << 20
    def pread(self, count, offset):
        if offset == 8192:
            self.plugin.server.shutdown()
        if offset == 4096:
            self.plugin.note("held up")
            threading.Event().wait()
        return f"{os.getpid()} {self.plugin.word}".ljust(count).encode()[:count]
    def close(self):
        self.plugin.note("close")

class Pids(Plugin):
    name = "pids"
    multi_process = True
    journal = Parameter(parse_path, required=True)
    word = Parameter(parse_string, default="-", live=True)
    bad = Parameter(parse_string, default="")
    def note(self, event):
        fd = os.open(self.journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{event} {os.getpid()}\\n".encode())
        os.close(fd)
    def thread_model(self):
        return ThreadModel.PARALLEL
    def get_ready(self):
        self.main = os.getpid()
        self.note("get_ready")
        self.open_handles = self.server.shared_count(self.count_is_zero)
        if self.bad == "thread":
            threading.Thread(target=threading.Event().wait, name="early", daemon=True).start()
    def after_fork(self):
        self.note("after_fork")
        if self.bad == "after_fork":
            raise OSError(errno.EIO, "the disk is on fire")
        with open(self.journal) as journal:
            is_second = journal.read().count("after_fork") == 2
        if self.bad == "second" and is_second:
            raise OSError(errno.EIO, "one disk too many")
        if self.bad == "count":
            self.server.shared_count()
        if self.bad == "waits":
            threading.Event().wait()
        if self.bad == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.bad == "replaced" and os.path.exists(self.journal + ".bad"):
            raise OSError(errno.EIO, "the disk is on fire")
    def preconnect(self, client, readonly):
        self.note("preconnect")
        if self.bad == "preconnect":
            raise KeyError("no such client")
        if self.bad == "unspeakable":
            raise Unspeakable
        if self.bad == "exits":
            sys.exit(0)
        if self.bad == "hangs":
            threading.Event().wait()
    def count_is_zero(self):
        self.note("zero")
        raise Unspeakable
    def reload(self, values):
        if values["word"] == "exit":
            sys.exit()
        if os.getpid() != self.main and values["word"] == "wrong":
            raise OSError(errno.EIO, "only a worker minds")
        super().reload(values)
    def open(self, export_name, readonly, client):
        if self.bad == "zero":
            self.open_handles.take()
        return Disk(self)
    def cleanup(self):
        self.note("cleanup")
        if self.bad == "cleanup":
            threading.Event().wait()
    def unload(self):
        self.note("unload")

@hookimpl
def register_plugins(register):
    register(Pids)
"""


class Pool(Server):
    """A server with workers, whose plugin reads as the process that serves, and notes what it is called for.

    Args:
        directory: As :func:`prepared`.
        words: Options of the command line.
        plugin: Its name.
        parameters: Of plugin and filters.
        workers: How many.
    """

    def __init__(
        self,
        directory: Path,
        *words: str | Path,
        plugin: str = "pids",
        parameters: Sequence[str] = (),
        workers: int = 2,
    ) -> None:
        self.journal = directory / "journal"
        own = (f"journal={self.journal}",) if plugin == "pids" else ()
        options = ("-U", "-", f"--workers={workers}", *words)
        super().__init__(*options, plugin, *own, *parameters, directory=directory, env=surroundings(directory))
        self._clients: list[NbdClient] = []

    def dial(self) -> NbdClient:
        """Return a client that is connected, and has neither sent nor received anything."""
        client = NbdClient(self.connect())
        self._clients.append(client)
        return client

    def client(self) -> NbdClient:
        """Return one with the handshake behind it."""
        return self.dial().negotiate()

    def events(self) -> list[tuple[str, int]]:
        """Return what the plugin has been called for, and in which process."""
        return events(self.journal)

    def pids(self, event: str) -> list[int]:
        """Return the processes in which something was called."""
        return [pid for name, pid in self.events() if name == event]

    def kill(self) -> None:
        """See that nothing is left, neither of the server nor of its clients."""
        super().kill()
        for client in self._clients:
            client.socket.close()


def events(journal: Path) -> list[tuple[str, int]]:
    """Return what the plugin has been called for, and in which process."""
    if not journal.exists():
        return []
    lines = [line.rpartition(" ") for line in journal.read_text().splitlines()]
    return [(event, int(pid)) for event, _, pid in lines]


def prepared(directory: Path) -> Path:
    """Have the plugin in `directory`, and return that."""
    make_distribution(directory, "pids", plugins=PIDS)
    return directory


def surroundings(directory: Path) -> dict[str, str]:
    """Return the environment in which the plugin is found, and coverage measured if it is here.

    To fork with more than one thread is an error there.
    """
    measured = {key: value for key, value in os.environ.items() if key.startswith("COVERAGE_PROCESS")}
    return {**measured, "PYTHONPATH": str(directory), "PYTHONWARNINGS": "error::DeprecationWarning"}


def popen(directory: Path, *words: str, env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Begin the program, with two workers and what it says on pipes."""
    return subprocess.Popen(
        [*NBDKITPY, "--workers=2", *words],
        env={**os.environ, **surroundings(directory), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(directory: Path, *words: str) -> tuple[int, str, str]:
    """Run the program until it ends or goes into the background; return its status, and what it has said."""
    with popen(directory, *words) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output, errors


def dial(path: str) -> NbdClient:
    """Return a client of the Unix socket at `path`, with the handshake behind it."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return NbdClient(sock).negotiate()


@contextlib.contextmanager
def ended(*pids: int) -> Iterator[None]:
    """See that processes, which need not be children, end meanwhile or after."""
    with contextlib.ExitStack() as ends:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                ends.enter_context(_ended(os.pidfd_open(pid), pid))
        yield


@contextlib.contextmanager
def _ended(fd: int, pid: int) -> Iterator[None]:
    try:
        yield
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(PATIENCE * 1000), f"process {pid} does not end"
    finally:
        os.close(fd)


def worker_of(client: NbdClient) -> int:
    """Return the process that serves a client."""
    return int(client.read(0, 64).split()[0])


def kill_worker_of(client: NbdClient) -> int:
    """Kill it, see that the client finds out, and return which it was."""
    pid = worker_of(client)
    with ended(pid):
        os.kill(pid, signal.SIGKILL)
    assert client.at_end()
    return pid


def eventually(condition: Callable[[], bool]) -> None:
    """Try until it holds; each try waits for the server itself."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"

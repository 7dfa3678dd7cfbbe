"""Signals while a server starts, and the end of the interpreter under load: nothing is left, and nothing crashes.

Names begin with the number of the threat that a test is about: S4 and S5.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import Command
from tests.environment import NBDKITPY, without_coverage
from tests.interop.harness import PATIENCE, make_distribution
from tests.nbdclient import NbdClient

# --- S4: signals while it starts ---

#: A plugin that has a signal come in one step of its life, and a FIFO open until the end of all processes.
STAGES = """
import os, signal
from nbdkitpy import Plugin, hookimpl

class Stages(Plugin):
    name = "stages"

    def stage(self, name):
        if os.environ["STAGE"] == name:
            os.kill(os.getpid(), signal.SIGTERM)

    def load(self):
        self.alive = os.open(os.environ["ALIVE"], os.O_WRONLY)
        self.stage("load")

    def config_complete(self):
        self.stage("config_complete")

    def get_ready(self):
        self.stage("get_ready")

    def after_fork(self):
        self.stage("after_fork")

    def open(self, export_name, readonly, client):
        raise OSError(5, "there is nothing here")

@hookimpl
def register_plugins(register):
    register(Stages)
"""


class Starting:
    """Servers that are started in a directory, of which nothing is to be left there."""

    def __init__(self, directory: Path) -> None:
        self.place = directory / "place"
        self.place.mkdir()
        packages = directory / "packages"
        packages.mkdir()
        make_distribution(packages, "stages", plugins=STAGES)
        os.mkfifo(directory / "alive")
        self._alive = os.open(directory / "alive", os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(self._alive, True)
        self._env = {**without_coverage(), "PYTHONPATH": str(packages), "ALIVE": str(directory / "alive")}

    def start(self, *mode: str, stage: str = "") -> subprocess.Popen[bytes]:
        """Begin to start a server. In one stage of its start it gets a signal."""
        words = [*mode, "-U", f"{self.place}/socket", "-P", f"{self.place}/pid", "stages"]
        return subprocess.Popen([*NBDKITPY, *words], env={**self._env, "STAGE": stage}, stderr=subprocess.PIPE)

    def signal_server(self) -> None:
        """End the server that runs, if there is one."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int((self.place / "pid").read_text()), signal.SIGTERM)

    def left(self) -> list[str]:
        """Wait for the end of all processes, and return the names of the files that there are then."""
        assert os.read(self._alive, 1) == b""
        return sorted(path.name for path in self.place.iterdir())

    def close(self) -> None:
        os.close(self._alive)


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Starting]:
    starting = Starting(tmp_path)
    yield starting
    starting.signal_server()
    starting.close()


MODES = pytest.mark.parametrize("mode", [["-f"], []], ids=["foreground", "background"])


@MODES
@pytest.mark.parametrize("stage", ["load", "config_complete", "get_ready", "after_fork"])
def test_S4_signal_in_any_step_of_the_start_leaves_nothing(starting: Starting, mode: list[str], stage: str) -> None:
    with starting.start(*mode, stage=stage) as process:
        _, errors = process.communicate(timeout=PATIENCE)

    assert starting.left() == []
    assert (process.returncode, errors) == (0 if stage == "after_fork" else -signal.SIGTERM, b"")


@MODES
def test_S4_signal_at_any_moment_of_the_start_leaves_nothing(starting: Starting, mode: list[str]) -> None:
    begin = time.monotonic()
    with starting.start() as process:  # in the background: it is there when this process has ended
        process.wait(PATIENCE)
    seconds = time.monotonic() - begin
    starting.signal_server()
    assert starting.left() == []

    for part in range(25):
        with starting.start(*mode) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds * part / 24)
            process.terminate()
            if mode and part % 2:
                process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=PATIENCE)
            if not mode and process.returncode == 0:
                starting.signal_server()
        assert starting.left() == [], errors
        assert process.returncode in ENDS, errors
        assert b"Traceback" not in errors


#: Exit statuses of who gets a signal while starting: before there is anything to undo the system ends it.
ENDS = (0, 1, -signal.SIGTERM, -signal.SIGINT)


# --- S5: the interpreter's end ---

#: Forks for each line that it reads a process which is nbdkitpy with these words, and prints the status of its end. All
#: has been imported by then, so that a hundred starts take seconds. What is held up is given up at once.
NURSERY = """
import os, sys
import nbdkitpy.cli.program, nbdkitpy.server.launch, nbdkitpy.server.engine
from nbdkitpy.cli import main
from nbdkitpy.server import service

service.GRACE = 0.02
while line := sys.stdin.readline():
    pid = os.fork()
    if not pid:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    os._exit(0)
sys.stdin = open(os.devnull)
sys.argv = ["nbdkitpy", *line.split()]
main()
"""

#: Reads of the first blocks never return, each in another way; others take their time.
BUSY = """
import itertools, logging, os, threading
from nbdkitpy import Handle, Plugin, ThreadModel, hookimpl

logger = logging.getLogger("nbdkitpy.busy")

def spin():
    for _ in itertools.count():
        pass

def wait():
    threading.Event().wait()

def read():
    os.read(os.pipe()[0], 1)

def talk():
    for number in itertools.count():
        logger.info("%d", number)  # which the log leaves out

WAYS = (spin, wait, read, talk)

class Busy(Plugin):
    name = "busy"

    def thread_model(self):
        return ThreadModel.PARALLEL

    def open(self, export_name, readonly, client):
        return BusyHandle()

class BusyHandle(Handle):
    def get_size(self):
        return 1 << 20

    def pread(self, count, offset):
        if offset >> 12 < len(WAYS):
            WAYS[offset >> 12]()
        return bytes(count)

    def pwrite(self, data, offset, flags):
        pass

@hookimpl
def register_plugins(register):
    register(Busy)
"""

ROUNDS = 100


class Nursery:
    """See :data:`NURSERY`."""

    def __init__(self, directory: Path) -> None:
        make_distribution(directory, "busy", plugins=BUSY)
        self._path, self._pid = f"{directory}/socket", directory / "pid"
        self._errors = (directory / "errors").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            env={**without_coverage(), "PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def start(self) -> None:
        self._stdin.write(f"-f --drain=0.02 -U {self._path} -P {self._pid} --print-uri busy\n")
        self._stdin.flush()
        for _ in range(3):  # the URI, and two lines about it
            self._stdout.readline()

    def connect(self) -> NbdClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self._path)
        return NbdClient(sock).negotiate()

    def end(self, signals: int) -> int:
        """End the server by so many signals, and return its exit status."""
        pid = int(self._pid.read_text())
        for _ in range(signals):
            os.kill(pid, signal.SIGTERM)
        return int(self._stdout.readline())

    def errors(self) -> list[str]:
        """End it all, and return what has been written on standard error."""
        self._stdin.close()
        assert self._process.wait(PATIENCE) == 0
        self._errors.seek(0)
        return self._errors.read().decode().splitlines()

    def close(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE)
        for stream in (self._stdin, self._stdout, self._errors):
            stream.close()


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path)
    yield nursery
    nursery.close()


def load(client: NbdClient) -> None:
    """Have replies under way, none of which is taken."""
    with client.batched():
        for _ in range(16):
            client.send(Command.WRITE, 1 << 16, data=bytes(1 << 15))
            client.send(Command.READ, 1 << 16, length=1 << 16)


def test_S5_no_exit_under_load_is_a_crash(nursery: Nursery) -> None:
    statuses = []

    for number in range(ROUNDS):
        nursery.start()
        clients = [nursery.connect() for _ in range(3)]
        for client in clients:
            load(client)
        held_up = number % 5 == 0
        if held_up:
            clients.append(nursery.connect())
            clients[-1].send(Command.READ, number // 5 % 4 << 12, 512)
        clients[0].receive_bytes(16)
        statuses.append((held_up, nursery.end(signals=1 + number % 2)))
        for client in clients:
            client.socket.close()

    assert {status for held_up, status in statuses if not held_up} == {0}
    assert {status for held_up, status in statuses if held_up} <= {0, 1}  # the end may have come first
    lines = nursery.errors()
    assert {line.partition(": busy[")[0] for line in lines} <= {
        "nbdkitpy: error: still held up in the backend, abandoned"
    }
    assert len(lines) == sum(status for _, status in statuses) > 0

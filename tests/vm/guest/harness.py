"""Runs the installed server and the real clients, for the tests in the virtual machine."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbd  # type: ignore[import-not-found, unused-ignore]

NBDKITPY = "/usr/local/bin/nbdkitpy"

#: Seconds after which something is taken to hang. The machine may be emulated, and then is slow.
PATIENCE = 90

MIB = 1 << 20


def run(*argv: str | Path, status: int = 0) -> str:
    """Run a command that ends by itself with this exit status, and return its standard output."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == status, f"{argv} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def open_export(uri: str) -> nbd.NBD:
    """Return a libnbd handle that is connected; the client leaves when its ``shutdown`` is called."""
    handle = nbd.NBD()
    handle.aio_connect_uri(uri)  # the other one cannot be interrupted
    while handle.aio_is_connecting():
        assert handle.poll(PATIENCE * 1000), f"nobody answers at {uri}"
    return handle


def greeted(family: int, address: Any, *, source: Any = None) -> socket.socket:
    """Return a connection on which the server has said who it is, and the client has said nothing.

    Raises:
        ConnectionError: the server has closed the connection without a word.
    """
    sock = socket.socket(family)
    sock.settimeout(PATIENCE)
    if source is not None:
        sock.bind(source)
    sock.connect(address)
    if sock.recv(18, socket.MSG_WAITALL)[:8] != b"NBDMAGIC":
        sock.close()
        raise ConnectionError
    return sock


def has_ended(sock: socket.socket) -> bool:
    """Wait for the end of the connection; return whether it came without further bytes."""
    with contextlib.suppress(ConnectionResetError):
        return sock.recv(1) == b""
    return True


def noise(path: Path, size: int) -> Path:
    """Make a file of random bytes."""
    path.write_bytes(os.urandom(size))
    return path


def digest(path: Path | str) -> str:
    """Return the hash of the bytes of a file or device."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Server:
    """``nbdkitpy`` in the foreground, from when clients can connect until it has ended."""

    def __init__(self, *words: str | Path) -> None:
        self._process = subprocess.Popen(
            [NBDKITPY, "-f", "--print-uri", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.uri = self._process.stdout.readline().strip()  # comes when clients can connect
        assert self.uri, self._process.communicate()[1]

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def wait(self) -> list[str]:
        """Wait until it ends by itself, in order, and return the lines of its standard error."""
        _, said = self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0, said
        return said.splitlines()

    def end(self) -> list[str]:
        """End it by SIGTERM; then as :meth:`wait`."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Make sure that it has ended."""
        if not self.has_ended:
            self._process.kill()
            self._process.communicate()


# --- systemd ---


def journal(match: str) -> list[dict[str, Any]]:
    """Return the records that match so far."""
    run("journalctl", "--sync")
    lines = run("journalctl", "--output=json", "--no-pager", "--quiet", match).splitlines()
    return [json.loads(line) for line in lines]


UNITS = Path("/run/systemd/system")


#: How each service begins; what a test says later wins.
SERVICE = ("[Unit]", "StartLimitIntervalSec=0", "[Service]", "Type=notify")


class Unit:
    """A service and, if it has one, its socket."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, verb: str, *, kind: str = "service", status: int = 0) -> None:
        """Have systemctl do something with the service, or the socket."""
        run("systemctl", verb, f"{self.name}.{kind}", status=status)

    def show(self, name: str, *, kind: str = "service") -> str:
        """Return a property."""
        return run("systemctl", "show", "--value", f"--property={name}", f"{self.name}.{kind}").strip()

    def wait_for(self, name: str, is_right: Callable[[str], bool]) -> str:
        """Wait until a property is right, and return it."""
        for value in map(self.show, itertools.repeat(name)):  # systemctl takes its time: this does not spin
            if is_right(value):
                return value
        raise AssertionError

    @property
    def pid(self) -> int:
        """Number of the main process."""
        return int(self.show("MainPID"))

    def journal(self) -> list[dict[str, Any]]:
        """Return the records of the service's processes so far."""
        return journal(f"_SYSTEMD_UNIT={self.name}.service")

    def wait_for_message(self, *parts: str) -> str:
        """Wait for a record of the service that has all these parts, from the beginning, and return its message."""
        command = ["journalctl", "--follow", "--no-tail", "--output=cat", f"_SYSTEMD_UNIT={self.name}.service"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
            try:
                return next(line for line in follower.stdout or () if all(part in line for part in parts))
            finally:
                follower.kill()


class Units:
    """Makes units, and removes them. No two have the same name, as the journal forgets nothing."""

    def __init__(self) -> None:
        self._names = (f"vm{number}" for number in itertools.count())
        self._made: list[Unit] = []

    def __call__(self, service: Sequence[str], socket: Sequence[str] = ()) -> Unit:
        """Make a service, by the lines of its section, and start its socket if there are lines for one."""
        unit = Unit(next(self._names))
        self._made.append(unit)
        of_each_client = "@" if "Accept=yes" in socket else ""
        files = {
            f"{unit.name}{of_each_client}.service": [*SERVICE, *service],
            f"{unit.name}.socket": ["[Socket]", "TriggerLimitIntervalSec=0", *socket],
        }
        for file, lines in files.items():
            (UNITS / file).write_text("\n".join([*lines, ""]))
        # Systemd finds files of names that it has never heard of by itself, and to reload them all takes long.
        if socket:
            unit("start", kind="socket")
        return unit

    def remove(self) -> None:
        """Remove those that were made so far."""
        for unit in self._made:
            # Patterns, as nothing need have been started. The socket goes first: it would start the service again.
            run("systemctl", "stop", f"{unit.name}.socket*", f"{unit.name}.service*", f"{unit.name}@*")
            for file in [*UNITS.glob(f"{unit.name}.*"), *UNITS.glob(f"{unit.name}@.*")]:
                file.unlink()
        self._made.clear()

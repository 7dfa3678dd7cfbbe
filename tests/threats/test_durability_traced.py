"""What is acknowledged as stable has been synchronised before the reply leaves (D1, D2, D5), by the system's calls."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdkitpy.protocol.constants import Command, CommandFlag, TransmissionFlag
from tests.interop.harness import Server, missing
from tests.nbdclient import NbdClient
from tests.pools import eventually
from tests.threats import filters

MIB = 1 << 20
SIZE = 4 * MIB

WRITES = {"pwrite64", "pwritev", "pwritev2", "write", "writev", "fallocate", "ftruncate"}
SYNCS = {"fdatasync", "fsync"}
SENDS = {"sendmsg", "sendto"}

#: How the sockets of clients are shown; those between processes are of another kind.
CLIENTS = "UNIX-STREAM"


class Call(NamedTuple):
    """One call of the system, in the order in which all begin and end."""

    name: str
    path: str  #: of the file, or what is known of the socket
    begin: int
    end: int


_BEGIN = re.compile(r"(\w+)\(\d+<([^>]*)>")
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>")


def calls_of(trace: Iterable[str]) -> Iterator[Call]:
    """The calls that succeeded, of all threads and processes."""
    begun: dict[str, tuple[str, str, int]] = {}
    for number, line in enumerate(trace):
        thread, _, call = line.partition(" ")
        call = call.strip()
        if match := _BEGIN.match(call):
            begun[thread] = match[1], match[2], number
        elif not _RESUMED.match(call):
            continue
        if not call.endswith("<unfinished ...>") and not re.search(r"\) += -1 E", call):
            yield Call(*begun.pop(thread), number)


class Traced:
    """A server whose calls are written down.

    Args:
        directory: Of all its files.
        words: Of its command line.
    """

    def __init__(self, directory: Path, *words: str) -> None:
        strace = shutil.which("strace") or missing("strace is not installed (Debian's package strace)")
        self._trace = directory / "trace"
        names = ",".join(WRITES | SYNCS | SENDS)
        # -D: the server is our child, and strace is somebody else's.
        under = [strace, "-D", "-f", "-yy", "--seccomp-bpf", "-q", "-o", str(self._trace), "-e", f"trace={names}"]
        self.server = Server("-U", "-", *words, directory=directory, under=under)
        self._directory = directory

    def connect(self) -> NbdClient:
        return NbdClient(self.server.connect()).negotiate()

    def end(self) -> list[Call]:
        """End the server, and return the calls that it has made on our files, and to send."""
        pid = self.server.pid
        assert self.server.end() == []
        eventually(lambda: f"{pid} +++ exited with 0 +++" in re.sub(" +", " ", self._trace.read_text()))
        calls = sorted(calls_of(self._trace.read_text().splitlines()), key=lambda call: call.end)
        data = {str(self._directory / name) for name in ("disk", "overlay")}
        return [call for call in calls if call.path in data or call.path.startswith(CLIENTS)]


def unstable(calls: list[Call], reply: Call) -> list[Call]:
    """What had been written before `reply` was sent, and not been synchronised by then."""
    before = [call for call in calls if call.end < reply.begin]
    syncs = [call for call in before if call.name in SYNCS]
    return [
        write
        for write in before
        if write.name in WRITES and not any(sync.path == write.path and write.end < sync.begin for sync in syncs)
    ]


# --- what is asked for ---


class Request(NamedTuple):
    """Of a client: the first one or the second."""

    client: int
    command: Command
    offset: int = 0
    length: int = 0
    fua: bool = False

    @property
    def is_durable(self) -> bool:
        return self.fua or self.command is Command.FLUSH


REQUESTS = [
    Request(0, Command.WRITE, 0, 4096),
    Request(0, Command.FLUSH),
    Request(0, Command.WRITE, 4096, 4096, fua=True),
    Request(0, Command.WRITE, 777, 100_000, fua=True),  # not in blocks, and more than blocksize lets through at once
    Request(0, Command.WRITE, 200_000, 3),
    Request(1, Command.FLUSH),
    Request(0, Command.WRITE_ZEROES, 1000, 300_000, fua=True),
    Request(0, Command.WRITE_ZEROES, 8192, 8192),
    Request(1, Command.FLUSH),
    Request(0, Command.TRIM, 1000, 300_000, fua=True),
    Request(0, Command.WRITE, MIB, 64 << 10),
    Request(0, Command.TRIM, 0, 65536),
    Request(0, Command.FLUSH),
]


def make(traced: Traced) -> list[Request]:
    """Make the requests that are offered, one after the other, and return them."""
    clients = [traced.connect() for _ in range(2)]
    flags = clients[0].flags
    offered = {
        Command.WRITE_ZEROES: flags & TransmissionFlag.SEND_WRITE_ZEROES,
        Command.TRIM: flags & TransmissionFlag.SEND_TRIM,
        Command.FLUSH: flags & TransmissionFlag.SEND_FLUSH,
    }
    made = []
    for request in REQUESTS:
        number, command, offset, length, fua = request
        if not offered.get(command, True) or (fua and not flags & TransmissionFlag.SEND_FUA):
            continue
        if number and not flags & TransmissionFlag.CAN_MULTI_CONN:
            request = request._replace(client=0)
        data = b"x" * length if command is Command.WRITE else b""
        reply = clients[request.client].call(command, offset, length, flags=CommandFlag.FUA if fua else 0, data=data)
        assert not reply.error, request
        made.append(request)
    for client in clients:
        client.disconnect()
    return made


def check(traced: Traced, requests: list[Request]) -> None:
    """See that whenever one was acknowledged that says so, all was stable."""
    calls = traced.end()
    replies = [call for call in calls if call.name in SENDS][-len(requests) :]
    assert len([call for call in calls if call.name in WRITES]) >= 5
    assert [request for request in requests if request.is_durable]
    for request, reply in zip(requests, replies):
        if request.is_durable:
            assert unstable(calls, reply) == [], request


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Callable[..., Traced]]:
    """Start a server of a disk, with these words before and after the plugin."""
    made: list[Traced] = []
    filters.image(tmp_path / "disk", SIZE)

    def start(options: Iterable[str] = (), parameters: Iterable[str] = ()) -> Traced:
        words = [*options, "file", f"{tmp_path}/disk", *parameters]
        made.append(Traced(tmp_path, *words))
        return made[0]

    yield start
    for traced in made:
        traced.server.kill()


#: To clients without TLS it serves a message, and before others it does not stand.
PASSED = [name for name in filters.PARAMETERS if name != "tls-fallback"]


@pytest.mark.parametrize("name", ["none", *PASSED])
def test_D1_D2_D5_flush_and_fua_reach_the_disk_through_every_filter(
    trace: Callable[..., Traced], tmp_path: Path, name: str
) -> None:
    options = [] if name == "none" else [f"--filter={name}"]
    traced = trace(options, [] if name == "none" else filters.words(name, tmp_path))

    check(traced, make(traced))


@pytest.mark.parametrize("mode", ["none", "native", "force", "pass"])
def test_D2_fua_reaches_the_disk_in_every_mode_that_promises_it(trace: Callable[..., Traced], mode: str) -> None:
    traced = trace(["--filter=fua"], [f"fua-mode={mode}"])

    check(traced, make(traced))


@pytest.mark.parametrize("name", ["none", "delay", "fua", "retry"])
def test_D1_D2_D5_flush_and_fua_reach_the_disk_from_every_worker(
    trace: Callable[..., Traced], tmp_path: Path, name: str
) -> None:
    options = [] if name == "none" else [f"--filter={name}"]
    traced = trace(["--workers=2", *options], [] if name == "none" else filters.words(name, tmp_path))

    check(traced, make(traced))


def test_every_filter_is_tried() -> None:
    assert filters.names()

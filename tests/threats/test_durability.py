"""What was acknowledged is kept, and what was not cannot come back later (section 10 of the threats, D)."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client, ThreadModel
from nbdkitpy.protocol.constants import Command, TransmissionFlag
from nbdkitpy.server.budget import Budget
from nbdkitpy.server.options import Endpoint
from nbdkitpy.server.transport import SocketTransport, is_broken
from nbdkitpy_filters.cow import Cow
from nbdkitpy_plugins.file import FilePlugin
from tests.conftest import StartServer
from tests.interop.harness import Server
from tests.nbdclient import PATIENCE, NbdClient
from tests.pools import eventually
from tests.serving import Disk, Disks, Running, make_stack
from tests.threats.writers import BLOCK, Writers

# --- flushes ---


class Medium:
    """What of the blocks of a file is on stable storage: what had been written when a synchronisation began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._written: dict[int, int] = {}  # version by offset
        self.stable: dict[int, int] = {}
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._write)
        monkeypatch.setattr(os, "fdatasync", self._synchronise)

    def _write(self, fd: int, data: memoryview, offset: int) -> int:
        written = self._pwrite(fd, data, offset)
        with self._lock:
            self._written[offset] = int.from_bytes(data[:8], "big")
        return written

    def _synchronise(self, fd: int) -> None:
        with self._lock:
            stable = dict(self._written)
        for _ in range(20):
            os.sched_yield()  # it takes its time
        with self._lock:
            self.stable.update((offset, max(version, self.stable.get(offset, 0))) for offset, version in stable.items())


def test_D4_D5_a_flush_covers_all_that_was_acknowledged_before_on_every_connection(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium = Medium(monkeypatch)
    (tmp_path / "disk").write_bytes(bytes(64 * BLOCK))
    plugin = FilePlugin()
    plugin.config("file", str(tmp_path / "disk"))
    server = start_server(plugin)
    acknowledged: dict[int, int] = {}
    missing: list[tuple[int, int, int]] = []

    def work(client: NbdClient, number: int) -> None:
        for version in range(1, 60):
            offsets = [(number * 16 + place) * BLOCK for place in range(16)]
            with client.batched():
                cookies = {
                    client.send(Command.WRITE, offset, data=version.to_bytes(8, "big") * 2): offset
                    for offset in offsets[version % 2 :: 2]
                }
            acknowledged.update({cookies[cookie]: version for cookie in client.replies(len(cookies))})
            covered = dict(acknowledged)
            assert not client.call(Command.FLUSH).error
            stable = dict(medium.stable)
            missing.extend((at, least, stable.get(at, 0)) for at, least in covered.items() if stable.get(at, 0) < least)

    clients = [server.connect() for _ in range(4)]
    assert clients[0].flags & TransmissionFlag.CAN_MULTI_CONN
    threads = [threading.Thread(target=work, args=(client, number)) for number, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert len(acknowledged) == 64
    assert missing == []


def test_D10_a_new_overlay_is_in_its_directory_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    cow = Cow()
    cow.config("cow-file", str(tmp_path / "overlay"))

    stack = make_stack(Disks(), [cow])
    stack.open("", False, Client(1)).close()

    assert synced == [str(tmp_path / "overlay"), str(tmp_path)]
    stack.unload()


# --- late writes ---

ADDRESSES: Mapping[str, Mapping[str, Any]] = {"unix": {}, "tcp": {"endpoints": (Endpoint(port="0"),)}}

STALE = 40  # writes that a client leaves behind


class Stuck(Disk):
    """Writes wait at a gate, unless they are new."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        assert isinstance(plugin, Gated)
        self.gated = plugin

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        written = bytes(data)
        if written != b"new":
            self.gated.inside.release()
            assert self.gated.gate.acquire(timeout=PATIENCE)
        self.gated.written.append(written)


class Gated(Disks):
    def __init__(self, model: ThreadModel = ThreadModel.PARALLEL) -> None:
        super().__init__(Stuck, model)
        self.inside = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.written: list[bytes] = []


def connected(server: Running) -> NbdClient:
    if server.server.unix_path:
        return server.connect()
    return NbdClient(socket.create_connection(("127.0.0.1", server.server.port or 0))).negotiate()


def leave_stale_writes(client: NbdClient) -> None:
    with client.batched():
        for _ in range(STALE):
            client.send(Command.WRITE, 0, data=b"stale")


def close(client: NbdClient) -> None:
    client.socket.close()


@pytest.fixture
def no_more_comes(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Released each time that a connection has come to its end, and waits for what it has at work."""
    released = threading.Semaphore(0)
    wait = Budget.finish

    def noted(budget: Budget) -> None:
        released.release()
        wait(budget)

    monkeypatch.setattr(Budget, "finish", noted)
    return released


@pytest.mark.parametrize("leave", [close, NbdClient.reset])
@pytest.mark.parametrize("transport", list(ADDRESSES))
def test_D7_what_workers_have_not_begun_when_the_client_has_gone_is_not_done(
    transport: str,
    leave: Callable[[NbdClient], None],
    start_server: StartServer,
    no_more_comes: threading.Semaphore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdkitpy.server.engine._QUICK_AT_FIRST", frozenset())
    plugin = Gated()
    server = start_server(plugin, threads=2, **ADDRESSES[transport])
    old = connected(server)
    (session,) = server.server._sessions
    assert isinstance(session._connection, SocketTransport)
    watched = session._connection._socket.dup()  # stays open when the session has ended
    leave_stale_writes(old)
    for _ in range(2):
        assert plugin.inside.acquire(timeout=PATIENCE)

    leave(old)
    assert no_more_comes.acquire(timeout=PATIENCE)
    with connected(server) as new:
        new.write(0, b"new")
    # By TCP it may take a reply to find out whether a client that says no more still listens; two may begin meanwhile.
    plugin.gate.release(2)
    while not is_broken(watched.fileno()):
        os.sched_yield()
    watched.close()
    plugin.gate.release(STALE)
    server.wait_for_sessions(0)

    begun = 4 if transport == "tcp" and leave is close else 2
    assert plugin.written[0] == b"new"
    assert len(plugin.written) <= 1 + begun


@pytest.mark.parametrize("leave", [close, NbdClient.reset])
@pytest.mark.parametrize("transport", list(ADDRESSES))
@pytest.mark.parametrize("model", list(ThreadModel)[:3], ids=lambda model: model.name.lower())
def test_D7_what_its_thread_has_not_begun_when_the_client_has_gone_is_not_done(
    model: ThreadModel,
    transport: str,
    leave: Callable[[NbdClient], None],
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdkitpy.server.workers._SLOW", 0.0)
    plugin = Gated(model)
    server = start_server(plugin, **ADDRESSES[transport])
    old = connected(server)
    leave_stale_writes(old)
    assert plugin.inside.acquire(timeout=PATIENCE)

    leave(old)
    plugin.gate.release(STALE)
    server.wait_for_sessions(0)

    assert len(plugin.written) <= (2 if transport == "tcp" and leave is close else 1)


def test_D7_what_was_asked_for_before_disc_is_done_though_the_client_has_gone(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdkitpy.server.engine._QUICK_AT_FIRST", frozenset())
    plugin = Gated()
    server = start_server(plugin, threads=2)
    client = connected(server)
    leave_stale_writes(client)
    client.send(Command.DISC)
    assert plugin.inside.acquire(timeout=PATIENCE)

    client.socket.close()
    plugin.gate.release(STALE)
    server.wait_for_sessions(0)

    assert len(plugin.written) == STALE


# --- sudden ends, and ends in order ---

SIZE = 4 * Writers.BLOCKS * BLOCK


def by(*numbers: signal.Signals) -> Callable[[Server], None]:
    """Send these signals to the main process."""

    def send(server: Server) -> None:
        for number in numbers:
            os.kill(server.pid, number)

    return send


def by_killing_workers(server: Server) -> None:
    """Kill all but the main process."""
    for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split():
        os.kill(int(pid), signal.SIGKILL)


ENDS: Mapping[str, tuple[Sequence[str], Callable[[Server], None]]] = {
    "SIGTERM": ([], by(signal.SIGTERM)),
    "SIGTERM of workers": (["--workers=2"], by(signal.SIGTERM)),
    "SIGTERM twice": ([], by(signal.SIGTERM, signal.SIGTERM)),
    "drain": (["--filter=delay", "wdelay=3ms"], by(signal.SIGTERM)),
    "SIGKILL": ([], by(signal.SIGKILL)),
    "SIGKILL of the main process": (["--workers=2"], by(signal.SIGKILL)),
    "SIGKILL of workers": (["--workers=2"], by_killing_workers),
}


@pytest.mark.parametrize("end", ENDS)
def test_D3_no_write_that_was_acknowledged_is_lost(end: str, tmp_path: Path) -> None:
    words, bring_about = ENDS[end]
    options = [word for word in words if word.startswith("-")]
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(SIZE))
    server = Server("-U", "-", *options, "file", disk, *set(words) - set(options), directory=tmp_path)
    try:
        writers = Writers(lambda: NbdClient(server.connect()).negotiate())
        writers.wait_for(1000)

        bring_about(server)

        writers.join()
        assert writers.check(disk) >= 64
    finally:
        server.kill()


@pytest.mark.parametrize("workers", [0, 2])
def test_D3_no_write_that_was_acknowledged_is_lost_by_a_reload(workers: int, tmp_path: Path) -> None:
    disk, config = tmp_path / "disk", tmp_path / "config.toml"
    disk.write_bytes(bytes(SIZE))
    config.write_text(f'[plugin]\nname = "file"\nfile = "{disk}"\n[[filter]]\nname = "limit"\nlimit = 9\n')
    server = Server("-U", "-", f"--workers={workers}", "--config", config, directory=tmp_path)
    try:
        writers = Writers(lambda: NbdClient(server.connect()).negotiate())
        for limit in (1, 2, 9):
            writers.wait_for(100)
            config.write_text(config.read_text()[:-2] + f"{limit}\n")
            os.kill(server.pid, signal.SIGHUP)
            eventually(lambda limit=limit: f"limit has been set: {limit}" in "".join(server.log()))  # type: ignore[misc]
        writers.wait_for(100)
        server.end()

        writers.join()
        assert writers.check(disk) >= 64
    finally:
        server.kill()

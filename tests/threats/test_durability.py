"""What was acknowledged is kept, and what was not cannot come back later (section 10 of the threats, D)."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from nbdkitpy import ThreadModel
from nbdkitpy.protocol.constants import Command
from nbdkitpy.server.options import Endpoint
from nbdkitpy.server.sender import Budget
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, NbdClient
from tests.serving import Disk, Disks, Running

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
            assert self.gated.gate.wait(PATIENCE)
        self.gated.written.append(written)


class Gated(Disks):
    def __init__(self, model: ThreadModel = ThreadModel.PARALLEL) -> None:
        super().__init__(Stuck, model)
        self.inside = threading.Semaphore(0)
        self.gate = threading.Event()
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
    wait = Budget.wait_until_unused

    def noted(budget: Budget) -> None:
        released.release()
        wait(budget)

    monkeypatch.setattr(Budget, "wait_until_unused", noted)
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
    leave_stale_writes(old)
    for _ in range(2):
        assert plugin.inside.acquire(timeout=PATIENCE)

    leave(old)
    assert no_more_comes.acquire(timeout=PATIENCE)
    with connected(server) as new:
        new.write(0, b"new")
    plugin.gate.set()
    server.wait_for_sessions(0)

    # By TCP it may take a reply to find out whether a client that says no more still listens.
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
    plugin.gate.set()
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
    plugin.gate.set()
    server.wait_for_sessions(0)

    assert len(plugin.written) == STALE

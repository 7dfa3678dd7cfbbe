"""What a connection that is gone has left behind changes nothing any more.

ydb-platform/nbs 7070, D7: a client whose connection broke while a write was stuck came again, wrote newer data, had
that acknowledged, and then the old write landed on it. What the storage has begun cannot be called back; what it has
not begun when the client is gone is not begun.
"""

from __future__ import annotations

import logging
import select
import socket
import threading

import pytest

from nbdkitpy import ThreadModel
from nbdkitpy.protocol.constants import Command
from nbdkitpy.server import engine
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, NbdClient
from tests.serving import Disk, Disks, Running

#: How many calls of one connection there are at once, by the thread model.
AT_ONCE = {ThreadModel.PARALLEL: 16, ThreadModel.SERIALIZE_ALL_REQUESTS: 1}
MODELS = pytest.mark.parametrize("model", AT_ONCE, ids=lambda model: model.name.lower())
PIPELINED = 40


class Journal(Disks):
    """Notes what is written and in which order; old data are stuck on their way until the test lets go of them."""

    def __init__(self, model: ThreadModel) -> None:
        super().__init__(Stuck, model)
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.landed: list[str] = []


class Stuck(Disk):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        assert isinstance(self.plugin, Journal)
        what = bytes(data).decode()
        if what == "old":
            self.plugin.begun.release()
            assert self.plugin.may_end.acquire(timeout=PATIENCE)
        self.plugin.landed.append(what)


@pytest.fixture(autouse=True)
def _writes_are_known_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_QUICK_AT_FIRST", frozenset())


def stuck(server: Running, plugin: Journal, model: ThreadModel) -> NbdClient:
    """Return a client that has sent writes, of which as many have begun as can."""
    client = server.connect()
    with client.batched():
        for _ in range(PIPELINED):
            client.send(Command.WRITE, 0, data=b"old")
    for _ in range(AT_ONCE[model]):
        assert plugin.begun.acquire(timeout=PATIENCE)
    return client


@MODELS
def test_D7_ydb_nbs_7070_writes_that_have_not_begun_when_the_client_is_gone_never_do(
    model: ThreadModel, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nbdkitpy")
    plugin = Journal(model)
    server = start_server(plugin)
    client = stuck(server, plugin, model)

    client.socket.shutdown(socket.SHUT_RD)  # it takes no more replies, and we see what becomes of the connection
    plugin.may_end.release()
    broken = select.poll()
    broken.register(client.socket, select.POLLHUP)
    assert broken.poll(PATIENCE * 1000)
    plugin.may_end.release(PIPELINED)
    server.wait_for_sessions(0)
    server.connect().write(0, b"new")

    assert plugin.landed == ["old"] * AT_ONCE[model] + ["new"]
    dropped = PIPELINED - AT_ONCE[model]
    assert f"disks[1]: gone, {dropped} requests that had not begun are dropped" in caplog.messages


@MODELS
def test_D7_what_a_client_has_asked_for_before_disc_is_done_though_it_does_not_wait(
    model: ThreadModel, start_server: StartServer
) -> None:
    plugin = Journal(model)
    server = start_server(plugin)
    client = stuck(server, plugin, model)

    client.send(Command.DISC)
    client.socket.close()
    plugin.may_end.release(PIPELINED)
    server.wait_for_sessions(0)

    assert plugin.landed == ["old"] * PIPELINED


@MODELS
def test_D7_a_client_that_takes_its_replies_may_have_closed_its_half_of_the_connection(
    model: ThreadModel, start_server: StartServer
) -> None:
    plugin = Journal(model)
    server = start_server(plugin)
    client = stuck(server, plugin, model)

    client.socket.shutdown(socket.SHUT_WR)
    plugin.may_end.release(PIPELINED)

    assert not any(reply.error for reply in client.replies(PIPELINED).values())
    assert client.at_end()
    assert plugin.landed == ["old"] * PIPELINED

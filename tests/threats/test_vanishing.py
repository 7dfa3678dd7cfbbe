"""A client vanishes at every byte of a conversation: of those that it sends, and of those that it receives."""

from __future__ import annotations

import logging
import socket
import threading

import pytest

from nbdkitpy import Extent, Flags, Handle, Support
from nbdkitpy.backend import VERBS
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, Style
from tests.serving import CONTENT, SIZE, Disks, Running, open_descriptors
from tests.threats.conversation import LEAVE, PAYLOAD, WHERE, recorded


class Store(Handle):
    """Small, so that conversations are; all clients have the same one."""

    def __init__(self, plugin: Disks) -> None:
        assert isinstance(plugin, Stores)
        self._plugin = plugin
        self._store = plugin.store

    def get_size(self) -> int:
        return SIZE

    def can_fua(self) -> Support:
        return Support.NATIVE

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(self._store[offset : offset + count])

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        assert flags in (0, Flags.FUA)
        self._store[offset : offset + len(data)] = data

    def flush(self) -> None:
        pass

    def trim(self, count: int, offset: int, flags: int) -> None:
        pass

    def zero(self, count: int, offset: int, flags: int) -> None:
        pass

    def cache(self, count: int, offset: int) -> None:
        pass

    def extents(self, count: int, offset: int, flags: int) -> list[Extent]:
        return [Extent(offset, count)]

    def close(self) -> None:
        self._plugin.count_closed()


class Inline(Store):
    inline = frozenset(VERBS)


class Stores(Disks):
    def __init__(self, handle: type[Store]) -> None:
        super().__init__(handle)
        self.store = bytearray(CONTENT)


# --- its ends ---


def dial(server: Running) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(server.path)
    return sock


def vanish_while_sending(server: Running, sent: bytes, count: int) -> None:
    """Send the first bytes of a conversation, and leave without a look at what is said."""
    with dial(server) as sock:
        sock.sendall(sent[:count])


def vanish_while_receiving(server: Running, sent: bytes, count: int) -> None:
    """Send all of a conversation, and leave when so much has been received."""
    with dial(server) as sock:
        sock.sendall(sent)
        while count:
            count -= len(sock.recv(count))


@pytest.mark.parametrize("handle", [Store, Inline], ids=["workers", "inline"])
@pytest.mark.parametrize("style", list(Style), ids=lambda style: style.value)
def test_a_client_may_vanish_at_every_byte_of_a_conversation(
    style: Style,
    handle: type[Store],
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nbdkitpy.server.engine._QUICK_AT_FIRST", frozenset())
    caplog.set_level(logging.INFO, "nbdkitpy")
    plugin = Stores(handle)
    server = start_server(plugin)
    sent, received = recorded(server.path, style)
    whole_write = sent.index(PAYLOAD) + len(PAYLOAD)
    without_leave = sent[: -LEAVE[style]]
    assert server.server.ends.acquire(timeout=PATIENCE)
    descriptors, threads = open_descriptors(), threading.active_count()

    vanishings = [
        *((vanish_while_sending, sent, count) for count in range(len(sent) + 1)),
        *((vanish_while_receiving, without_leave, count) for count in range(len(received) + 1)),
    ]
    for vanish, saying, count in vanishings:
        plugin.store[:] = CONTENT
        vanish(server, saying, count)
        assert server.server.ends.acquire(timeout=PATIENCE)
        possible = [CONTENT[WHERE : WHERE + len(PAYLOAD)]]
        if vanish is vanish_while_receiving or count >= whole_write:
            possible.append(PAYLOAD)
        assert plugin.store[WHERE : WHERE + len(PAYLOAD)] in possible, (vanish, count)

    assert plugin.opened == plugin.closed
    assert open_descriptors() == descriptors
    assert threading.active_count() <= threads + 1  # the last one may be about to end
    assert not [record for record in caplog.records if record.exc_info]
    with server.connect() as client:
        assert client.read(0, 512) == CONTENT[:512]
        client.disconnect()

"""Flaws that other servers had in what they sent, each by the number under which it is known.

What they leaked, mixed up or sent too late; see ``test_past_flaws.py``.
"""

from __future__ import annotations

import random
import socket
import threading
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import Command, NbdError, Option
from nbdkitpy_filters.cow import Cow
from nbdkitpy_plugins.file import FilePlugin
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, NbdClient, Refused, Style, go_data
from tests.serving import CONTENT, SIZE, Disk, Disks, open_descriptors
from tests.threats.hostile import option

STYLES = pytest.mark.parametrize("style", list(Style), ids=lambda style: style.value)


# --- data ---


def test_nbdserver_f123be9_sequential_reads_over_an_overlay_give_what_was_written(
    start_server: StartServer, tmp_path: Path
) -> None:
    some = random.Random(9)
    image = tmp_path / "disk"
    model = bytearray(SIZE)
    for start in range(0, SIZE, 3 << 16):  # the rest are holes
        model[start : start + (1 << 16)] = some.randbytes(min(1 << 16, SIZE - start))
    image.write_bytes(model)
    plugin, overlay = FilePlugin(), Cow()
    assert plugin.config("file", str(image))
    assert overlay.config("cow-block-size", "4k")
    server = start_server(plugin, overlay)
    writer = server.connect()

    for _ in range(100):
        start, data = some.randrange(SIZE), some.randbytes(some.choice((1, 511, 4096, 20000)))
        data = data[: SIZE - start]
        writer.write(start, data)
        model[start : start + len(data)] = data
    for start in range(5 << 12, SIZE - 4096, 7 << 13):
        assert not writer.call(Command.WRITE_ZEROES, start, 4096).error
        model[start : start + 4096] = bytes(4096)

    for style in Style:
        reader = server.connect(style)
        for length in (3000, 4096, 65536, 100_000, SIZE):
            starts = range(0, SIZE, length)
            with reader.batched():
                sent = {reader.send(Command.READ, start, min(length, SIZE - start)): start for start in starts}
            for cookie, reply in reader.replies(len(sent)).items():
                assert reply.data == model[sent[cookie] : sent[cookie] + length]


class Lazy(Disk):
    """Says that it has read, and has not, below the middle."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = self._pread_into

    def _pread_into(self, buffer: memoryview, offset: int) -> bool:
        if offset >= SIZE // 2:
            buffer[:] = CONTENT[offset : offset + len(buffer)]
        return True


@STYLES
def test_nbdkit_b1ce255e_memory_that_a_plugin_does_not_fill_shows_nothing_of_others(
    style: Style, start_server: StartServer
) -> None:
    server = start_server(Disks(Lazy))
    for _ in range(20):
        with server.connect(style) as other:  # whose memory is given back when it leaves
            assert other.read(SIZE // 2, 200_000) == CONTENT[SIZE // 2 :][:200_000]
    staying = server.connect(style)
    assert staying.read(SIZE // 2, 200_000) == CONTENT[SIZE // 2 :][:200_000]

    client = server.connect(style)

    assert client.read(0, 200_000) == bytes(200_000)


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1, 1 << 64, -1])
def test_CVE_2023_5215_size_that_clients_cannot_bear_is_not_offered(size: int, start_server: StartServer) -> None:
    class Odd(Disk):
        def get_size(self) -> int:
            return size

    client = start_server(Disks(Odd)).dial()
    client.greet()

    for number in (Option.INFO, Option.GO):
        with pytest.raises(Refused):
            client.go(option=number)
    client.send_option(Option.EXPORT_NAME)

    assert client.at_end()


@STYLES
def test_CVE_2023_5215_largest_size_is_served_to_its_end(style: Style, start_server: StartServer) -> None:
    class Largest(Disk):
        def get_size(self) -> int:
            return (1 << 63) - 1

        def pread(self, count: int, offset: int) -> bytes:
            return bytes(count)

    client = start_server(Disks(Largest)).connect(style)

    assert client.size == (1 << 63) - 1
    assert client.read((1 << 63) - 2, 1) == b"\0"
    assert client.call(Command.READ, (1 << 63) - 1, 1).error == NbdError.EINVAL


@STYLES
@pytest.mark.parametrize("excess", [-511, -1, 1, 512, 1 << 20])
def test_rce_2019_10_data_outside_of_the_request_are_not_sent(
    style: Style, excess: int, start_server: StartServer
) -> None:
    class Generous(Disk):
        def pread(self, count: int, offset: int) -> bytes:
            return bytes(count + excess) if offset < SIZE // 2 else super().pread(count, offset)

    client = start_server(Disks(Generous)).connect(style)

    assert client.call(Command.READ, 0, 512).error == NbdError.EIO
    assert client.read(SIZE // 2, 512) == CONTENT[SIZE // 2 :][:512]


# --- the end of a connection ---


class Stuck(Disk):
    """Reads, in a worker, when the test lets it; a byte that no other export has."""

    inside = threading.Event()
    may_end = threading.Event()

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = lambda buffer, offset: False

    def pread(self, count: int, offset: int) -> bytes:
        if not offset:
            self.inside.set()
            assert self.may_end.wait(PATIENCE)
        return super().pread(count, offset)


def test_CVE_2024_49855_late_reply_reaches_nobody_else(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stuck, "inside", threading.Event())
    monkeypatch.setattr(Stuck, "may_end", threading.Event())
    server = start_server(Disks(Stuck))
    gone = server.connect()
    gone.send(Command.READ, 0, 4096)
    assert Stuck.inside.wait(PATIENCE)
    gone.socket.close()

    others = [server.connect() for _ in range(5)]  # one of which would get the number of that socket
    for other in others:
        other.send(Command.READ, 512, 512)
    Stuck.may_end.set()
    server.wait_for_sessions(5)

    for other in others:
        assert other.reply().data == CONTENT[512:1024]
        assert other.read(1024, 512) == CONTENT[1024:1536]
        other.disconnect()  # and there is nothing more


@pytest.mark.parametrize("handshake", [b"", b"\0\0\0\3", b"\0\0\0\3" + option(Option.GO, go_data())])
def test_blktap_402_client_that_closes_its_half_only_keeps_no_descriptor(
    handshake: bytes, start_server: StartServer
) -> None:
    plugin = Disks()
    server = start_server(plugin)
    server.connect().read(0, 1)
    before = len(open_descriptors())
    clients: list[NbdClient] = []

    for _ in range(50):
        clients.append(server.dial())
        clients[-1].send_bytes(handshake)
        clients[-1].socket.shutdown(socket.SHUT_WR)
    while not all(client.at_end() for client in clients):
        pass
    server.wait_for_sessions(1)

    assert len(open_descriptors()) == before + len(clients)  # which are the clients' ends
    assert plugin.opened - plugin.closed == 1

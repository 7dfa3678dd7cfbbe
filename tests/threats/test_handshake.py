"""Clients that do odd things before they are served: nobody else notices, and nothing of them is left."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from nbdkitpy.protocol.constants import Command, Option
from nbdkitpy.server.options import Endpoint
from nbdkitpy_filters.exitlast import ExitLast
from nbdkitpy_filters.ip import Ip
from nbdkitpy_filters.limit import Limit
from tests.conftest import StartServer
from tests.nbdclient import NbdClient, Refused, go_data
from tests.serving import CONTENT, Disk, Disks, open_descriptors
from tests.threats.hostile import meta_data, option


class Writable(Disk):
    """Takes what is written, and forgets it."""

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        pass

    def flush(self) -> None:
        pass


# --- N5: when an export is opened ---


def test_N5_asking_opens_and_closes_one_export_at_a_time_and_listing_none(start_server: StartServer) -> None:
    plugin = Disks()
    client = start_server(plugin).dial()
    client.greet()

    assert client.exports() == [""]
    assert plugin.opened == 0
    for asked in range(1, 30):
        client.go(option=Option.INFO)
        assert (plugin.opened, plugin.closed) == (asked, asked)


@pytest.mark.parametrize("name", [b"x" * 4097, b"a\0b", b"\xff"])
def test_N5_name_that_cannot_be_one_opens_nothing(name: bytes, start_server: StartServer) -> None:
    plugin = Disks()
    client = start_server(plugin).dial()
    client.greet()

    for number in (Option.INFO, Option.GO):
        with pytest.raises(Refused):
            client.option(number, struct.pack(f">I{len(name)}sH", len(name), name, 0))
    client.send_option(Option.EXPORT_NAME, name)

    assert client.at_end()
    assert plugin.opened == 0


def test_N5_client_that_a_filter_refuses_opens_nothing(start_server: StartServer) -> None:
    plugin, ip, limit = Disks(), Ip(), Limit()
    assert ip.config("deny", "allunix")
    refusing, full = start_server(plugin, ip), start_server(plugin, limit)
    full.connect().read(0, 1)

    for server in (refusing, full):
        for number in (Option.INFO, Option.GO, Option.EXPORT_NAME):
            client = server.dial()
            with contextlib.suppress(ConnectionError):
                client.send_bytes(b"\0\0\0\3" + option(number, go_data()))
            assert client.at_end()

    assert plugin.opened == 1


# --- N6: whatever a client sends ends its own connection, at most ---

#: A whole conversation, in which every byte counts.
CONVERSATION = b"".join(
    (
        b"\0\0\0\3",
        option(Option.STRUCTURED_REPLY),
        option(Option.INFO, go_data("", 0, 1)),
        option(Option.SET_META_CONTEXT, meta_data()),
        option(Option.GO, go_data()),
        struct.pack(">IHHQQI", 0x25609513, 0, Command.READ, 1, 0, 512),
        struct.pack(">IHHQQI5s", 0x25609513, 0, Command.WRITE, 2, 512, 5, b"hello"),
        struct.pack(">IHHQQI", 0x25609513, 0, Command.BLOCK_STATUS, 3, 0, 512),
        struct.pack(">IHHQQI", 0x25609513, 0, Command.DISC, 4, 0, 0),
    )
)


class Scene:
    """A TCP server, and what there is of it when it is at rest."""

    def __init__(self, start_server: StartServer) -> None:
        self.plugin = Disks(Writable)
        self.server = start_server(self.plugin, endpoints=(Endpoint(port="0"),))
        self.bystander = self.dial().negotiate()
        assert self.bystander.read(0, 512) == CONTENT[:512]
        self.descriptors = open_descriptors()

    def dial(self) -> NbdClient:
        """Return a client that is connected."""
        assert self.server.server.port is not None
        return NbdClient(socket.create_connection(("127.0.0.1", self.server.server.port)))

    def is_at_rest(self, records: list[logging.LogRecord]) -> None:
        """See that nothing is left of others, and that the one that has been there all the time is served."""
        assert self.bystander.read(0, 512) == CONTENT[:512]
        self.dial().negotiate().disconnect()  # accepted after all of them
        self.server.wait_for_sessions(1)
        assert open_descriptors() == self.descriptors
        assert not self.server.server._connections.handshakes
        assert self.plugin.opened - self.plugin.closed == 1
        assert [record.getMessage() for record in records if record.exc_info] == []


@pytest.fixture
def scene(start_server: StartServer) -> Iterator[Scene]:
    scene = Scene(start_server)
    with scene.bystander:
        yield scene


@pytest.mark.parametrize("end", [NbdClient.reset, lambda client: client.socket.close()], ids=["reset", "closed"])
def test_N6_CVE_2017_9524_client_that_leaves_after_any_byte(
    end: Callable[[NbdClient], None], scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for length in range(len(CONVERSATION) + 1):
        client = scene.dial()
        client.send_bytes(CONVERSATION[:length])
        end(client)

    scene.is_at_rest(caplog.records)


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF], ids=hex)
def test_N6_CVE_2017_7539_any_byte_that_is_not_what_it_should_be(
    change: int, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    for place in range(len(CONVERSATION)):
        changed = bytearray(CONVERSATION)
        changed[place] ^= change
        with scene.dial() as client:
            with contextlib.suppress(ConnectionError):
                client.send_bytes(bytes(changed))
                client.socket.shutdown(socket.SHUT_WR)
            client.wait_for_end()

    scene.is_at_rest(caplog.records)


@pytest.mark.parametrize("name", [b"\0\xff\xfe\n", b"\0" + b"x" * 100, b""], ids=ascii)
def test_N6_client_whose_own_address_is_odd_is_a_client(name: bytes, start_server: StartServer) -> None:
    server = start_server()
    with NbdClient(socket.socket(socket.AF_UNIX)) as client:
        client.socket.bind(name)
        client.socket.connect(server.path)

        assert client.negotiate().read(0, 512) == CONTENT[:512]
        client.disconnect()


# --- N12: what does not end a server ---


@pytest.mark.parametrize("is_alone", [False, True], ids=["with a client", "alone"])
def test_N12_scans_and_questions_do_not_end_a_server_with_exitlast(is_alone: bool, start_server: StartServer) -> None:
    server = start_server(None, ExitLast())
    live = None if is_alone else server.connect()

    for number in range(100):
        client = server.dial()
        if number % 2:
            client.greet()
            client.go(option=Option.INFO)
        client.socket.close()
    server.wait_for_sessions(0 if is_alone else 1)

    live = live or server.connect()
    assert live.read(0, 512) == CONTENT[:512]
    live.disconnect()
    assert server.join()  # which that one does

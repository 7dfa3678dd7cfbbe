"""The server: it lets clients in, keeps them from harming each other, and ends in bounded time."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import queue
import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Buffer, Client, Export, ThreadModel
from nbdkitpy.protocol.constants import Command, NbdError, Option
from nbdkitpy.server import budget, front, service
from nbdkitpy.server.options import Endpoint, ServerOptions, Transport
from nbdkitpy.server.service import Server
from nbdkitpy.server.session import Session
from nbdkitpy.server.transport import SocketTransport, describe_client
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, NbdClient, Style
from tests.pools import eventually
from tests.serving import CONTENT, SIZE, Disk, Disks, Running, open_descriptors

MODELS = pytest.mark.parametrize("model", list(ThreadModel), ids=lambda model: model.name.lower())

#: Seconds in which something has to happen that should happen at once, on a busy machine.
AT_ONCE = 5.0


class Clock:
    """In place of the time in the main loop: it goes by when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(front, "time", clock)
    monkeypatch.setattr(service, "time", clock)
    return clock


def pass_time(clock: Clock, server: Running, seconds: float) -> None:
    clock.now += seconds
    server.server._wake()


# --- where it listens ---


def bound(export_name: str = "", **place: Any) -> Server:
    server = Server(ServerOptions(endpoints=(Endpoint(**place),), export_name=export_name))
    server.bind()
    return server


def test_a_unix_server_says_where_it_is(tmp_path: Path) -> None:
    server = bound(transport=Transport.UNIX, unix_path=f"{tmp_path}/socket", export_name="a b")

    assert (server.listening, server.unix_path, server.port) == ([f"{tmp_path}/socket"], f"{tmp_path}/socket", None)
    assert server.uri == f"nbd+unix:///a%20b?socket={tmp_path}/socket"
    server.close()


@pytest.mark.parametrize(
    ("address", "host"), [(None, "localhost"), ("any", "localhost"), ("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")]
)
def test_a_tcp_server_says_where_it_is(address: str | None, host: str) -> None:
    server = bound(address=address, port="0")

    assert server.port
    assert all(text.endswith(f":{server.port}") for text in server.listening)
    assert server.uri == f"nbd://{host}:{server.port}"
    assert server.unix_path is None
    server.close()


def test_a_closed_server_leaves_nothing_behind(tmp_path: Path) -> None:
    before = open_descriptors()
    server = bound(transport=Transport.UNIX, unix_path=f"{tmp_path}/socket")

    server.close()
    server.close()
    server.shutdown()  # a signal may come late
    del server
    gc.collect()

    assert open_descriptors() == before
    assert not os.listdir(tmp_path)


# --- clients ---


def test_clients_on_all_addresses_are_served(start_server: StartServer) -> None:
    server = start_server(endpoints=(Endpoint(port="0"),))

    for family, name in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        sock = socket.socket(family)
        sock.connect((name, server.server.port))
        with NbdClient(sock).negotiate() as client:
            assert client.read(0, 100) == CONTENT[:100]
            client.disconnect()


def test_clients_are_numbered_from_one(start_server: StartServer) -> None:
    server = start_server()

    clients = [server.connect() for _ in range(3)]

    assert [session.name for session in server.sessions()] == ["disks[1]", "disks[2]", "disks[3]"]
    for client in clients:
        client.disconnect()


def test_N6_a_client_that_was_never_there_is_no_matter(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nbdkitpy")
    server = start_server(begin=False)

    def gone_at_first(sock: socket.socket, number: int) -> Client:
        if number == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return describe_client(sock, number)

    monkeypatch.setattr("nbdkitpy.server.service.describe_client", gone_at_first)
    server.begin()

    assert server.dial().at_end()
    assert server.connect().read(0, 1) == CONTENT[:1]
    assert "connection 1: [Errno 22] Invalid argument" in caplog.messages


# --- no client holds up another one ---


class Watchful(Disk):
    """Notices calls that overlap."""

    def pread(self, count: int, offset: int) -> bytes:
        plugin = self.plugin
        assert isinstance(plugin, Watching)
        with plugin.lock:
            plugin.now.append(self)
            plugin.most_on_one = max(plugin.most_on_one, plugin.now.count(self))
            plugin.most = max(plugin.most, len(plugin.now))
        plugin.meet()
        with plugin.lock:
            plugin.now.remove(self)
        return super().pread(count, offset)

    def get_size(self) -> int:
        return SIZE


class Watching(Disks):
    """Knows the most calls that there were at once, in all and on one handle."""

    def __init__(self, model: ThreadModel, meet: Callable[[], object]) -> None:
        super().__init__(Watchful, model)
        self.lock = threading.Lock()
        self.now: list[Disk] = []
        self.most = self.most_on_one = 0
        self.meet = meet


def give_way() -> None:
    """Let any other thread run that could."""
    for _ in range(20):
        os.sched_yield()


@pytest.mark.parametrize("model", [ThreadModel.SERIALIZE_ALL_REQUESTS, ThreadModel.SERIALIZE_REQUESTS])
def test_G5_calls_overlap_as_far_as_the_thread_model_allows_and_no_further(
    model: ThreadModel, start_server: StartServer
) -> None:
    plugin = Watching(model, give_way)
    server = start_server(plugin)
    clients = [server.connect(style) for style in (Style.SIMPLE, Style.STRUCTURED, Style.EXTENDED)]

    def read(client: NbdClient) -> None:
        with client.batched():
            for _ in range(100):
                client.send(Command.READ, 0, 512)
        client.replies(100)

    readers = [threading.Thread(target=read, args=(client,)) for client in clients]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(PATIENCE)

    assert plugin.most_on_one == 1
    if model is ThreadModel.SERIALIZE_ALL_REQUESTS:
        assert plugin.most == 1


def test_with_serialised_requests_handles_are_called_at_once(start_server: StartServer) -> None:
    together = threading.Barrier(3)
    plugin = Watching(ThreadModel.SERIALIZE_REQUESTS, lambda: together.wait(PATIENCE))
    server = start_server(plugin)
    clients = [server.connect() for _ in range(3)]

    for client in clients:
        client.send(Command.READ, 0, 512)

    assert [client.reply().data for client in clients] == [CONTENT[:512]] * 3


def test_in_parallel_one_handle_is_called_at_once(start_server: StartServer) -> None:
    together = threading.Barrier(16)

    class Cold(Watchful):
        def __init__(self, plugin: Disks) -> None:
            super().__init__(plugin)
            self.pread_into = lambda buffer, offset: False

    plugin = Watching(ThreadModel.PARALLEL, lambda: together.wait(PATIENCE))
    plugin._handle = Cold
    client = start_server(plugin).connect()

    with client.batched():
        for _ in range(16):
            client.send(Command.READ, 0, 512)

    assert len(client.replies(16)) == 16
    assert plugin.most_on_one == 16


def test_with_serialised_connections_the_next_one_begins_when_the_last_has_ended(start_server: StartServer) -> None:
    asked = threading.Semaphore(0)

    class One(Disks):
        def default_export(self, client: Client, readonly: bool) -> str:
            asked.release()
            return ""

    plugin = One(model=ThreadModel.SERIALIZE_CONNECTIONS)
    server = start_server(plugin)
    first, second = server.connect(), server.dial()
    second.greet()
    second.send_option(Option.GO, b"\0" * 6)
    for _ in range(2):
        assert asked.acquire(timeout=PATIENCE)

    assert first.read(0, 10) == CONTENT[:10]
    assert plugin.opened == 1
    first.disconnect()

    second.option_answers(Option.GO)
    assert second.read(0, 10) == CONTENT[:10]
    assert (plugin.opened, plugin.closed) == (2, 1)


@MODELS
def test_N1_a_silent_client_holds_up_nobody(model: ThreadModel, start_server: StartServer) -> None:
    server = start_server(Disks(model=model))
    silent = [server.dial() for _ in range(4)]
    silent[1].greet()
    silent[2].send_bytes(b"\0\0\0\3IHAVE")
    if model > ThreadModel.SERIALIZE_CONNECTIONS:
        server.connect()  # and says nothing more
        server.connect().send_bytes(b"\x25\x60\x95\x13\0\0\0\1" + bytes(17) + b"\1\0\0" + b"half a payload")

    begin = time.monotonic()
    client = server.connect()

    assert client.read(0, 10) == CONTENT[:10]
    assert time.monotonic() - begin < AT_ONCE


def test_G3_N1_a_call_that_does_not_return_holds_up_its_own_connection_only(start_server: StartServer) -> None:
    inside, gate = threading.Event(), threading.Event()

    class Stuck(Disk):
        def pread(self, count: int, offset: int) -> bytes:
            if offset:
                inside.set()
                assert gate.wait(PATIENCE)
            return super().pread(count, offset)

    server = start_server(Disks(Stuck))
    stuck = server.connect()
    stuck.send(Command.READ, 512, 512)
    assert inside.wait(PATIENCE)

    assert server.connect().read(0, 512) == CONTENT[:512]
    gate.set()

    assert stuck.reply().data == CONTENT[512:1024]


# --- clients that vanish ---


class Slow(Disk):
    """Reads from a worker, so that replies are under way when the client is gone."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = lambda buffer, offset: False


@pytest.mark.parametrize("handle", [Disk, Slow], ids=["inline", "workers"])
@pytest.mark.parametrize("transport", [Transport.UNIX, Transport.TCP], ids=["unix", "tcp"])
def test_nbdkit_9d82aa4f_clients_that_vanish_in_the_middle_of_it_all_leave_nothing_behind(
    transport: Transport, handle: type[Disk], start_server: StartServer
) -> None:
    plugin = Disks(handle)
    place: dict[str, Any] = {} if transport is Transport.UNIX else {"endpoints": (Endpoint(port="0"),)}
    server = start_server(plugin, **place)

    def dial() -> NbdClient:
        if transport is Transport.UNIX:
            return server.dial()
        return NbdClient(socket.create_connection(("127.0.0.1", server.server.port)))

    good = dial().negotiate()
    assert good.read(0, 4096) == CONTENT[:4096]
    descriptors, threads = open_descriptors(), threading.active_count()

    for number in range(100):
        client = dial().negotiate(list(Style)[number % 3])
        with client.batched():
            for offset in range(0, 24 * 4096, 4096):
                client.send(Command.READ, offset, 65536)
        client.receive_bytes(100)
        client.reset()
        if number % 10 == 0:
            assert good.read(number * 4096, 4096) == CONTENT[number * 4096 :][:4096]
    server.wait_for_sessions(1)

    for thread in threading.enumerate():
        if thread.name.startswith("disks[") and not thread.name.startswith("disks[1]"):
            thread.join(PATIENCE)
    assert open_descriptors() == descriptors
    assert threading.active_count() <= threads + 1  # the worker of the good client, perhaps
    assert (plugin.opened, plugin.closed) == (101, 100)
    good.disconnect()


def test_N7_a_storm_of_connections_at_random_stages_leaves_nothing_behind(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Disks()
    server = start_server(plugin)
    good = server.connect()
    descriptors = open_descriptors()
    some = random.Random(5)
    whole = b"\0\0\0\3IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0" + bytes.fromhex("25609513") + bytes(23) + b"\1"

    for _ in range(300):
        with server.dial() as client:
            client.send_bytes(whole[: some.randrange(len(whole) + 1)])
            if some.random() < 0.5:
                client.socket.recv(some.randrange(1, 100))
    server.connect().disconnect()  # accepted after all of them
    server.wait_for_sessions(1)

    assert good.read(0, 512) == CONTENT[:512]
    assert open_descriptors() == descriptors
    assert plugin.opened - plugin.closed == 1
    assert not server.server._connections.handshakes
    assert not [record for record in caplog.records if record.exc_info]
    good.disconnect()


# --- handshakes ---


def is_closed(client: NbdClient) -> None:
    """Wait until the server has closed the connection, whatever it may send before."""
    with contextlib.suppress(ConnectionResetError):
        while client.socket.recv(4096):
            pass


def established(server: Running) -> NbdClient:
    """Return a client whose handshake is over for the server as well."""
    client = server.connect()
    client.read(0, 1)
    return client


def test_a_handshake_has_to_end_in_time(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    server = start_server(handshake_timeout=0.02)

    server.dial().wait_for_end()

    assert "disks[1]: handshake not finished in time, closed" in caplog.messages


def test_the_time_is_that_of_the_whole_handshake(start_server: StartServer, clock: Clock) -> None:
    server = start_server(handshake_timeout=10.0)
    slow = server.dial()
    slow.greet()
    for _ in range(3):
        pass_time(clock, server, 3.0)
        assert slow.exports() == [""]

    pass_time(clock, server, 1.5)

    assert slow.at_end()


def test_a_session_that_is_established_has_no_limit(start_server: StartServer, clock: Clock) -> None:
    server = start_server(handshake_timeout=10.0)
    client, other = established(server), server.dial()
    other.greet()

    pass_time(clock, server, 100.0)

    assert other.at_end()
    assert client.read(0, 1) == CONTENT[:1]


@pytest.mark.parametrize("timeout", [0.0, 2.0**31])
def test_the_time_can_be_unlimited_or_as_good_as(timeout: float, start_server: StartServer, clock: Clock) -> None:
    server = start_server(handshake_timeout=timeout)
    slow = server.dial()
    slow.greet()

    pass_time(clock, server, 1e6)

    assert server.connect().read(0, 1) == CONTENT[:1]
    assert slow.exports() == [""]


def test_who_waits_for_a_backend_is_not_late(start_server: StartServer, clock: Clock) -> None:
    waiting = threading.Semaphore(0)

    class One(Disks):
        def default_export(self, client: Client, readonly: bool) -> str:
            waiting.release()
            return ""

    server = start_server(One(model=ThreadModel.SERIALIZE_CONNECTIONS), handshake_timeout=10.0)
    first, second = established(server), server.dial()
    second.greet()
    second.send_option(Option.GO, b"\0" * 6)
    for _ in range(2):
        assert waiting.acquire(timeout=PATIENCE)
    silent = server.dial()
    silent.greet()

    pass_time(clock, server, 11.0)
    assert silent.at_end()  # so the main loop has looked
    first.disconnect()

    second.option_answers(Option.GO)
    assert second.read(0, 1) == CONTENT[:1]


def test_of_too_many_unfinished_handshakes_the_oldest_is_dropped(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(max_handshakes=2)
    served = established(server)
    oldest, *younger = (server.dial() for _ in range(3))

    oldest.wait_for_end()
    for client in younger:
        assert client.negotiate().read(0, 1) == CONTENT[:1]

    assert served.read(0, 1) == CONTENT[:1]
    assert "too many unfinished handshakes, the oldest is closed: disks[2]" in caplog.messages


# --- too many ---


def test_past_the_limit_a_client_gets_no_byte_and_the_next_one_who_leaves_makes_room(
    start_server: StartServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(max_connections=2)
    clients = [established(server) for _ in range(2)]

    for _ in range(3):
        assert server.dial().at_end()
    lines = [line for line in caplog.messages if "too many" in line]
    assert len(lines) == 1
    assert re.fullmatch(
        r"too many connections, at most 2: connection 3 \(unix pid=\d+ uid=\d+\) is disconnected", lines[0]
    )
    clock.now += 1.0
    assert server.dial().at_end()
    assert len([line for line in caplog.messages if "too many" in line]) == 2
    clients[0].disconnect()
    server.wait_for_sessions(1)

    assert server.connect().read(0, 1) == CONTENT[:1]
    assert clients[1].read(0, 1) == CONTENT[:1]


def test_who_says_nothing_gives_way_to_a_newcomer(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    server = start_server(max_connections=3)
    served, silent, other = established(server), server.dial(), server.dial()

    assert server.connect().read(0, 1) == CONTENT[:1]

    is_closed(silent)
    assert served.read(0, 1) == CONTENT[:1]
    assert other.negotiate().read(0, 1) == CONTENT[:1]
    assert "too many connections, the oldest unfinished handshake is closed: disks[2]" in caplog.messages


def test_past_the_limit_of_its_source_a_client_is_refused_before_anybody_is_asked(start_server: StartServer) -> None:
    class Asked(Disks):
        asked = 0

        def preconnect(self, client: Client, readonly: bool) -> None:
            self.asked += 1

    plugin = Asked()
    server = start_server(plugin, max_connections_per_source=2)
    server.dial().greet()
    established(server)

    assert server.dial().at_end()

    assert plugin.asked == 2


def test_limits_may_change_while_clients_are_served(start_server: StartServer) -> None:
    server = start_server(max_connections=1)
    established(server)
    assert server.dial().at_end()

    server.server.change_options(max_connections=2)

    assert server.connect().read(0, 1) == CONTENT[:1]
    assert server.dial().at_end()


def test_clients_wait_in_the_queue_while_too_many_are_about_to_go(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving = threading.Event()
    run = Session.run

    def slow(session: Session) -> None:
        run(session)
        assert leaving.wait(PATIENCE)

    monkeypatch.setattr(Session, "run", slow)
    monkeypatch.setattr(service, "LEAVING", 2)
    server = start_server(max_connections=1)
    silent = [server.dial() for _ in range(3)]
    silent[-1].greet()
    assert not server.server._has_room()
    waiting = server.dial()
    leaving.set()

    assert waiting.negotiate().read(0, 1) == CONTENT[:1]
    monkeypatch.undo()


# --- memory ---

MIB = 1 << 20


class Large(Disk):
    """Larger than the memory of the tests below; every read waits for a gate, and has to be made by a worker."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = lambda buffer, offset: False

    def get_size(self) -> int:
        return 64 * MIB

    def pread(self, count: int, offset: int) -> bytes:
        assert isinstance(self.plugin, Gated)
        assert self.plugin.gate.wait(PATIENCE)
        return bytes(count)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        return None


class Gated(Disks):
    def __init__(self) -> None:
        super().__init__(Large)
        self.gate = threading.Event()
        self.gate.set()


@pytest.fixture
def patience(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock, by which it is measured for how long somebody has waited for memory too."""
    monkeypatch.setattr(budget, "time", clock)
    return clock


def short_of_memory(server: Running, wanted: int) -> None:
    """Wait until so many bytes are waited for."""
    memory = server.server._memory
    while memory.wanted < wanted:
        assert server.server.wakes.acquire(timeout=PATIENCE), (memory.held, memory.wanted)


def pass_periods(clock: Clock, server: Running, client: NbdClient) -> None:
    """Let time go by until `client` has a reply: it may take a while until others are really stuck."""
    while not select.select([client.socket], [], [], 0)[0]:
        pass_period(clock, server)


def pass_period(clock: Clock, server: Running, seconds: float = 30.0) -> None:
    """Let time go by, and wait until the main loop has looked at it."""
    clock.now += seconds
    for _ in range(2):  # once more, as it may be about to make calls when it is told to
        looked = threading.Event()
        server.server.call_soon(looked.set)
        assert looked.wait(PATIENCE)


def until_held(server: Running, size: int, other: NbdClient) -> None:
    """Wait until so many bytes are held; each try waits for the server, which serves `other` meanwhile."""
    eventually(lambda: other.read(0, 1) == b"\0" and server.server._memory.held > size)


def takes_no_replies(client: NbdClient) -> None:
    with client.batched():
        for _ in range(8):
            client.send(Command.READ, 0, 4 * MIB)


def sends_no_payload(client: NbdClient) -> None:
    client.send_bytes(struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 1, 0, 16 * MIB) + bytes(300_000))


@pytest.mark.parametrize("stall", [takes_no_replies, sends_no_payload])
def test_who_keeps_memory_that_others_wait_for_has_to_go(
    stall: Callable[[NbdClient], None],
    start_server: StartServer,
    patience: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = start_server(Gated(), max_buffered=16 * MIB, stall_timeout=30.0)
    stalled, small, good = (established(server) for _ in range(3))
    stall(stalled)
    until_held(server, 8 * MIB, small)
    good.send(Command.READ, 0, 16 * MIB)
    short_of_memory(server, 14 * MIB)

    pass_period(patience, server, 29.0)
    assert small.read(0, MIB) == bytes(MIB)
    assert not caplog.messages
    pass_periods(patience, server, good)

    assert good.reply().data == bytes(16 * MIB)
    is_closed(stalled)
    assert "disks[1]: keeps memory that others wait for, and is disconnected" in caplog.messages
    assert small.read(0, 1) == b"\0"


def test_a_list_of_exports_that_nobody_takes_counts_too(start_server: StartServer, patience: Clock) -> None:
    class Many(Gated):
        def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
            return [Export(f"{number:01000}") for number in range(10_000)]

    server = start_server(Many(), max_buffered=10 * MIB, stall_timeout=30.0, handshake_timeout=0.0)
    good, greedy = established(server), server.dial()
    greedy.greet()
    greedy.send_option(Option.LIST)
    until_held(server, 7 * MIB, good)
    good.send(Command.READ, 0, 10 * MIB)
    short_of_memory(server, 1)

    pass_periods(patience, server, good)

    assert good.reply().data == bytes(10 * MIB)
    is_closed(greedy)


def test_no_more_have_to_go_than_it_takes(start_server: StartServer, patience: Clock) -> None:
    server = start_server(Gated(), max_buffered=16 * MIB, stall_timeout=30.0)
    first, second, good = (established(server) for _ in range(3))
    for client, count, held in ((first, 5, 8 * MIB), (second, 2, 10 * MIB)):
        with client.batched():
            for _ in range(count):
                client.send(Command.READ, 0, 2 * MIB)
        until_held(server, held, good)
    engines = [session._engine for session in server.sessions()[:2]]
    eventually(lambda: good.read(0, 1) == b"\0" and all(engine is not None and engine._is_full() for engine in engines))
    good.send(Command.READ, 0, 10 * MIB)
    short_of_memory(server, 1)

    pass_periods(patience, server, good)

    assert good.reply().data == bytes(10 * MIB)
    is_closed(first)
    assert len(second.replies(2)) == 2


def test_what_a_back_end_is_slow_at_is_no_clients_fault(
    start_server: StartServer, patience: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = Gated()
    server = start_server(plugin, max_buffered=16 * MIB, stall_timeout=30.0, handshake_timeout=0.0)
    slow, waiting = (established(server) for _ in range(2))
    plugin.gate.clear()
    takes_no_replies(slow)
    short_of_memory(server, 1)
    waiting.send(Command.READ, 0, 4 * MIB)
    short_of_memory(server, 6 * MIB)

    for _ in range(5):
        pass_period(patience, server)
    plugin.gate.set()

    assert len(slow.replies(8)) == 8
    assert waiting.reply().data == bytes(4 * MIB)
    assert not caplog.messages


def test_who_waits_for_memory_does_not_keep_the_server_from_ending(start_server: StartServer) -> None:
    plugin = Gated()
    server = start_server(plugin, max_buffered=16 * MIB, stall_timeout=0.0, drain=0.05)
    stalled, waiting, sending = (established(server) for _ in range(3))
    takes_no_replies(stalled)
    short_of_memory(server, 1)
    waiting.send(Command.READ, 0, 16 * MIB)
    short_of_memory(server, 14 * MIB)
    sends_no_payload(sending)
    short_of_memory(server, 20 * MIB)

    assert server.stop()
    assert server.server._memory.held == 0


# --- no room ---


class Full(socket.socket):
    """A listening socket of a system that has no descriptors left until it is told."""

    error = errno.EMFILE
    refused: threading.Semaphore
    has_room: threading.Event

    def accept(self) -> tuple[socket.socket, Any]:
        if self.has_room.is_set():
            return super().accept()
        self.refused.release()
        raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def full(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A server that cannot accept anybody yet."""
    monkeypatch.setattr(Full, "refused", threading.Semaphore(0), raising=False)
    monkeypatch.setattr(Full, "has_room", threading.Event(), raising=False)
    server = start_server(begin=False)
    (listener,) = server.server._listeners
    listener.socket = Full(fileno=listener.socket.detach())
    return server


def be_refused(times: int) -> None:
    """Wait until the server has tried so often, counted from now."""
    while Full.refused.acquire(blocking=False):
        pass
    for _ in range(times):
        assert Full.refused.acquire(timeout=PATIENCE)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_descriptors_there_is_a_line_a_second_and_an_attempt_now_and_then(
    error: int, full: Running, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Full, "error", error)
    monkeypatch.setattr(front, "_BREATHER", 0.001)
    client = full.dial()
    full.begin()
    line = f"cannot accept a client: {os.strerror(error)}"

    for lines in (1, 2):
        be_refused(20)
        assert caplog.messages == [line] * lines
        clock.now += 1.0
    Full.has_room.set()

    assert client.negotiate().read(0, 1) == CONTENT[:1]
    assert caplog.messages[0] == line
    assert len(caplog.messages) <= 3


def test_a_breather_is_taken_between_two_attempts(full: Running) -> None:
    full.dial()
    full.begin()
    assert Full.refused.acquire(timeout=PATIENCE)
    begin = time.monotonic()
    for _ in range(3):
        assert Full.refused.acquire(timeout=PATIENCE)

    assert time.monotonic() - begin >= 3 * 0.05


def test_a_server_without_descriptors_can_be_ended(full: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_BREATHER", 3600)
    full.dial()
    full.begin()
    assert Full.refused.acquire(timeout=PATIENCE)

    assert full.stop()


@pytest.mark.parametrize("error", [errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO, errno.EPERM])
def test_a_client_that_leaves_the_queue_is_no_reason_to_pause_or_to_complain(
    error: int, full: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Full, "error", error)
    monkeypatch.setattr(front, "_BREATHER", 3600)
    client = full.dial()
    full.begin()
    for _ in range(3):
        assert Full.refused.acquire(timeout=PATIENCE)
    Full.has_room.set()

    assert client.negotiate().read(0, 1) == CONTENT[:1]
    assert not caplog.messages


def test_without_threads_a_client_is_turned_away_and_the_next_one_served(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server()
    assert server.connect().read(0, 1) == CONTENT[:1]
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert server.dial().at_end()
    monkeypatch.setattr(threading.Thread, "start", start)

    assert server.connect().read(0, 1) == CONTENT[:1]
    assert "cannot serve a client: can't start new thread" in caplog.messages
    assert not server.server._connections.handshakes


FEW_DESCRIPTORS = """
import logging, resource, sys, threading
sys.path[:0] = ["."]
from tests.serving import Disks, Running, unix_options
logging.basicConfig(stream=sys.stdout, format="%(message)s")
server = Running(Disks(), (), unix_options(sys.argv[1], handshake_timeout=0.0))
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
server.begin()
print("listening", flush=True)
sys.stdin.read()
sys.exit(0 if server.stop() else 1)
"""


def test_a_server_that_has_run_out_of_descriptors_goes_on_when_clients_leave(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_DESCRIPTORS, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "listening\n"
        clients = []
        for _ in range(50):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            clients.append(NbdClient(sock))
        assert process.stdout.readline() == "cannot accept a client: Too many open files\n"

        for client in clients[:-1]:
            client.socket.close()

        assert clients[-1].negotiate().read(0, 100) == CONTENT[:100]
        clients[-1].disconnect()
        output, _ = process.communicate("", timeout=PATIENCE)
        assert process.returncode == 0
        assert output.count("\n") < 10
    finally:
        process.kill()
        process.communicate()


# --- the end ---


def idle(server: Running) -> None:
    server.connect()


def silent(server: Running) -> None:
    server.dial().receive_bytes(18)


def in_the_handshake(server: Running) -> None:
    client = server.dial()
    client.greet()
    client.send_bytes(b"IHAVEOPT\0\0")


def in_a_header(server: Running) -> None:
    client = server.connect()
    client.read(0, 1)
    client.send_bytes(b"\x25\x60")


def in_a_payload(server: Running) -> None:
    client = server.connect()
    client.read(0, 1)
    client.send_bytes(bytes.fromhex("25609513 0000 0001 0000000000000001 0000000000000000 00100000") + b"x" * 1000)


STATES = [idle, silent, in_the_handshake, in_a_header, in_a_payload]


class Writable(Disk):
    """Refuses to be written, so that a test notices."""

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        raise AssertionError("a payload that has not come whole must not be written")


@MODELS
@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_S1_a_client_that_does_nothing_does_not_keep_the_server_from_ending(
    state: Callable[[Running], None], model: ThreadModel, start_server: StartServer
) -> None:
    plugin = Disks(Writable, model)
    server = start_server(plugin, drain=60.0)
    state(server)

    begin = time.monotonic()

    assert server.stop()
    assert time.monotonic() - begin < AT_ONCE
    assert plugin.opened == plugin.closed
    assert not os.path.exists(server.path)


def test_a_server_without_clients_ends(start_server: StartServer) -> None:
    assert start_server().stop()


def test_a_shutdown_before_the_service_is_not_forgotten(start_server: StartServer) -> None:
    server = start_server(begin=False)
    server.server.shutdown()

    assert server.begin().join()


def unread_replies(server: Running, requests: int = 64) -> NbdClient:
    """Return a client that asks for much and takes nothing."""
    client = server.connect()
    with client.batched():
        for _ in range(requests):
            client.send(Command.READ, 0, SIZE)
    return client


@pytest.mark.parametrize("handle", [Disk, Slow], ids=["inline", "workers"])
def test_S1_replies_that_nobody_takes_are_given_up_after_the_drain_time(
    handle: type[Disk], start_server: StartServer
) -> None:
    plugin = Disks(handle)
    server = start_server(plugin, drain=0.1)
    unread_replies(server).receive_bytes(16)  # they are under way

    begin = time.monotonic()

    assert server.stop()
    assert 0.1 <= time.monotonic() - begin < AT_ONCE
    assert (plugin.opened, plugin.closed) == (1, 1)


def test_S2_replies_that_are_taken_in_time_arrive(start_server: StartServer) -> None:
    began = threading.Event()

    class Begun(Disk):
        def pread(self, count: int, offset: int) -> bytes:
            began.set()
            return super().pread(count, offset)

    server = start_server(Disks(Begun), drain=60.0)
    client = unread_replies(server, requests=10)
    assert began.wait(PATIENCE)
    server.server.shutdown()

    replies = client.replies(10)

    done = [reply for reply in replies.values() if not reply.error]
    assert all(reply.data == CONTENT for reply in done)
    assert all(reply.error == NbdError.ESHUTDOWN for reply in replies.values() if reply.error)
    assert done
    assert client.at_end()
    assert server.join()


@pytest.mark.parametrize("model", [ThreadModel.PARALLEL, ThreadModel.SERIALIZE_ALL_REQUESTS])
def test_S2_what_is_in_flight_is_finished_and_what_comes_later_refused(
    model: ThreadModel, start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inside, gate, stopped = threading.Event(), threading.Event(), threading.Event()
    stop_receiving = SocketTransport.stop_receiving

    def noted(self: SocketTransport) -> None:
        stop_receiving(self)
        stopped.set()

    monkeypatch.setattr(SocketTransport, "stop_receiving", noted)
    written: list[bytes] = []

    class Stuck(Disk):
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            inside.set()
            assert gate.wait(PATIENCE)
            written.append(bytes(data))

    server = start_server(Disks(Stuck, model), drain=60.0)
    client = server.connect()
    first = client.send(Command.WRITE, 0, data=b"first")
    assert inside.wait(PATIENCE)  # in the thread that reads, as the first call of its kind
    later = client.send(Command.WRITE, 0, data=b"later")

    server.server.shutdown()
    assert stopped.wait(PATIENCE)
    gate.set()

    replies = client.replies(2)
    assert not replies[first].error
    assert replies[later].error == NbdError.ESHUTDOWN
    assert client.at_end()
    assert written == [b"first"]
    assert server.join()
    assert not caplog.messages


def test_S2_what_workers_have_in_hand_is_answered(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, gate, waits = threading.Semaphore(0), threading.Event(), threading.Event()
    finish = budget.Budget.finish

    def noted(self: budget.Budget) -> None:
        waits.set()
        finish(self)

    monkeypatch.setattr(budget.Budget, "finish", noted)

    class Held(Slow):
        def pread(self, count: int, offset: int) -> bytes:
            inside.release()
            assert gate.wait(PATIENCE)
            return super().pread(count, offset)

    server = start_server(Disks(Held), drain=60.0)
    client = server.connect()
    for number in range(4):
        client.send(Command.READ, number * 512, 512)
        assert inside.acquire(timeout=PATIENCE)

    server.server.shutdown()
    assert waits.wait(PATIENCE)  # by the thread that reads, which has come to the end
    gate.set()

    assert sorted(reply.data for reply in client.replies(4).values()) == sorted(
        CONTENT[number * 512 : number * 512 + 512] for number in range(4)
    )
    assert client.at_end()
    assert server.join()


def test_S4_a_second_request_to_end_does_not_wait_for_clients(start_server: StartServer) -> None:
    plugin = Disks()
    server = start_server(plugin, drain=3600.0)
    client = unread_replies(server)
    client.receive_bytes(16)

    begin = time.monotonic()
    server.server.shutdown()
    server.server.abort()

    assert server.join()
    assert time.monotonic() - begin < AT_ONCE
    assert (plugin.opened, plugin.closed) == (1, 1)


@MODELS
def test_S3_G3_a_backend_that_does_not_return_is_abandoned_and_reported(
    model: ThreadModel,
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inside, gate = threading.Event(), threading.Event()

    class Stuck(Disk):
        def pread(self, count: int, offset: int) -> bytes:
            inside.set()
            assert gate.wait(PATIENCE)
            return super().pread(count, offset)

    monkeypatch.setattr(service, "GRACE", 0.1)
    server = start_server(Disks(Stuck, model), drain=0.1)
    server.connect().send(Command.READ, 0, 1)
    assert inside.wait(PATIENCE)

    begin = time.monotonic()
    assert not server.stop()

    assert 0.2 <= time.monotonic() - begin < AT_ONCE
    assert "still held up in the backend, abandoned: disks[1]" in caplog.messages
    gate.set()
    server.wait_for_sessions(0)


def test_the_end_of_one_of_many_sessions_is_noticed(start_server: StartServer) -> None:
    server = start_server()
    clients = [server.connect() for _ in range(5)]

    for left, client in zip((4, 3, 2, 1, 0), clients):
        client.disconnect()
        server.wait_for_sessions(left)

    assert server.stop()


def test_S2_acknowledged_writes_survive_a_shutdown_under_load(start_server: StartServer) -> None:
    store = bytearray(SIZE)

    class Store(Disk):
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            store[offset : offset + len(data)] = data

        def pread(self, count: int, offset: int) -> Buffer:  # type: ignore[override]
            return store[offset : offset + count]

    server = start_server(Disks(Store), drain=60.0)
    client = server.connect()
    acknowledged: set[int] = set()
    under_way = threading.Event()

    def write() -> None:
        sent: dict[int, int] = {}
        block = 0
        try:
            while True:
                with client.batched():
                    for _ in range(16):
                        block += 1
                        where = block % (SIZE // 512)
                        sent[client.send(Command.WRITE, where * 512, data=block.to_bytes(512, "big"))] = block
                for cookie, reply in client.replies(16).items():
                    if not reply.error:
                        acknowledged.add(sent[cookie])
                under_way.set()
        except (OSError, EOFError):
            pass

    writer = threading.Thread(target=write)
    writer.start()
    assert under_way.wait(PATIENCE)
    assert server.stop()
    writer.join(PATIENCE)

    last = max(acknowledged)
    for block in range(max(1, last - SIZE // 512 + 17), last):
        if block in acknowledged:
            where = block % (SIZE // 512) * 512
            assert int.from_bytes(store[where : where + 512], "big") >= block


# --- the service manager, and calls from elsewhere ---


class Manager:
    """What a notifier tells, kept."""

    def __init__(self, watchdog_interval: float | None = None) -> None:
        self.watchdog_interval = watchdog_interval
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def status(self, text: str) -> None:
        self.told.put(text)

    def alive(self) -> None:
        self.told.put("alive")

    def stopping(self) -> None:
        self.told.put("stopping")

    def next(self) -> str:
        return self.told.get(timeout=PATIENCE)


def managed(server: Running, manager: Manager) -> None:
    server.server.notifier = manager  # type: ignore[assignment]  # all of it that the server uses


def test_the_manager_is_told_how_many_clients_there_are_and_that_the_end_begins(start_server: StartServer) -> None:
    server, manager = start_server(begin=False), Manager()
    managed(server, manager)
    server.begin()

    assert manager.next() == "0 clients are connected"
    first = server.connect()
    assert manager.next() == "1 client is connected"
    second = server.connect()
    assert manager.next() == "2 clients are connected"
    first.disconnect()
    assert manager.next() == "1 client is connected"
    server.server.shutdown()
    assert manager.next() == "stopping"
    second.at_end()


def test_P7_calls_that_ask_for_the_next_one_keep_no_client_waiting(start_server: StartServer) -> None:
    server = start_server(Disks())

    def again() -> None:
        server.server.call_soon(again)

    again()

    with server.connect() as client:
        assert client.read(0, 512) == CONTENT[:512]


def test_the_watchdog_is_fed_in_time_and_not_more_often(clock: Clock, start_server: StartServer) -> None:
    server, manager = start_server(begin=False), Manager(watchdog_interval=30.0)
    managed(server, manager)
    server.begin()
    assert [manager.next(), manager.next()] == ["0 clients are connected", "alive"]

    pass_time(clock, server, 29.0)
    seen = threading.Event()
    server.server.call_soon(seen.set)
    assert seen.wait(PATIENCE)
    assert manager.told.empty()
    pass_time(clock, server, 1.5)

    assert manager.next() == "alive"


def test_the_watchdog_wakes_the_main_loop_by_itself(start_server: StartServer) -> None:
    server, manager = start_server(begin=False), Manager(watchdog_interval=0.001)
    managed(server, manager)
    server.begin()

    assert [manager.next() for _ in range(4)] == ["0 clients are connected", "alive", "alive", "alive"]


def test_calls_are_made_by_the_thread_that_accepts_in_order(start_server: StartServer) -> None:
    server = start_server()
    made: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def call(number: int) -> None:
        made.put((number, threading.current_thread().name))

    for number in range(3):
        server.server.call_soon(functools.partial(call, number))

    assert [made.get(timeout=PATIENCE) for _ in range(3)] == [(number, "test server") for number in range(3)]


def test_what_is_written_to_the_wakeup_descriptor_wakes_the_main_loop(start_server: StartServer) -> None:
    server = start_server()
    made = threading.Event()
    server.server._calls.append(made.set)  # as a signal handler would, which runs when the loop wakes up

    os.write(server.server.wakeup_fd, b"\x0f")

    assert made.wait(PATIENCE)


# --- quiet clients ---


def test_a_quiet_client_is_disconnected_after_the_idle_timeout(start_server: StartServer) -> None:
    server = start_server(idle_timeout=0.05)

    quiet = server.connect()

    assert quiet.at_end()


def test_without_an_idle_timeout_a_quiet_client_stays(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = threading.Semaphore(0)
    monkeypatch.setattr("nbdkitpy.server.engine._QUIET", 0.005)
    monkeypatch.setattr("nbdkitpy.server.engine.Engine._rest", lambda engine: rests.release())
    server = start_server()
    quiet = server.connect()

    for _ in range(3):
        assert rests.acquire(timeout=PATIENCE)

    assert quiet.read(0, 512) == CONTENT[:512]
    quiet.disconnect()


def test_a_client_whose_request_is_at_work_is_not_quiet(start_server: StartServer) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(Disk):
        def __init__(self, plugin: Disks) -> None:
            super().__init__(plugin)
            self.pread_into = lambda buffer, offset: False

        def pread(self, count: int, offset: int) -> bytes:
            begun.set()
            assert go_on.wait(PATIENCE)
            return super().pread(count, offset)

    server = start_server(Disks(Waiting), idle_timeout=0.05)
    client = server.connect()
    client.send(Command.READ, 0, 512)
    assert begun.wait(PATIENCE)
    (session,) = server.sessions()
    engine = session._engine
    assert engine is not None
    rested = threading.Semaphore(0)
    engine._rest = rested.release  # type: ignore[method-assign]
    for _ in range(3):
        assert rested.acquire(timeout=PATIENCE)

    go_on.set()

    assert client.reply().data == CONTENT[:512]


@pytest.mark.parametrize("keepalive", [False, True])
def test_keepalive_is_asked_of_the_system(keepalive: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()):
        sock, _ = listening.accept()

        SocketTransport(sock, keepalive=keepalive)

        assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)) == keepalive
        sock.close()


# --- to finish, rather than to shut down ---


def test_a_server_that_finishes_takes_no_more_clients_and_serves_those_that_are_there(
    start_server: StartServer,
) -> None:
    server, manager = start_server(begin=False), Manager()
    managed(server, manager)
    server.begin()
    open_client, in_handshake = server.connect(), server.dial()
    in_handshake.greet()

    server.server.finish()

    while manager.next() != "stopping":
        pass
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(OSError):
        late.connect(server.path)
    in_handshake.go()
    assert in_handshake.read(0, 512) == open_client.read(0, 512) == CONTENT[:512]
    for client in (open_client, in_handshake):
        client.disconnect()
    server.join()
    assert server.result is True


def test_a_server_that_finishes_without_clients_ends(start_server: StartServer) -> None:
    server = start_server()

    server.server.finish()

    server.join()
    assert server.result is True


def test_a_server_that_finishes_can_still_be_shut_down(start_server: StartServer) -> None:
    server = start_server()
    idle = server.connect()

    server.server.finish()
    server.server.shutdown()

    server.join()
    assert idle.at_end()


def test_a_late_handshake_ends_also_while_the_server_finishes(clock: Clock, start_server: StartServer) -> None:
    server = start_server()
    silent = server.dial()
    silent.greet()

    server.server.finish()
    pass_time(clock, server, 11.0)

    assert silent.at_end()
    server.join()

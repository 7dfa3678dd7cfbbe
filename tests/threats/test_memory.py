"""What clients can have a server hold in memory, and how they share it: each test is named after the threat."""

from __future__ import annotations

import threading
import time

import pytest

from nbdkitpy.protocol.constants import Command
from tests.interop.harness import Server, Servers
from tests.nbdclient import PATIENCE, NbdClient
from tests.threats.hostile import (
    MIB,
    ask_without_reading,
    clients_of,
    header,
    is_closed,
    memory_of,
    peak_of,
    send_what_goes,
    status_of,
    time_of,
    within,
)

#: The largest request that every client may count on, and what the server of these tests may hold for all of them.
LARGE = 32 * MIB
LIMIT = 128 * MIB

#: What a connection may take beside that, and what else comes and goes in a process.
EACH = 5 * MIB
ELSE = 48 * MIB

#: Seconds in which a small request is answered, on a busy machine, whatever others do.
SOON = 1.0


def takes_little(server: Server, before: int, connections: int) -> bool:
    """Whether the server has kept to its limit so far."""
    taken = peak_of(server) - before
    return taken < LIMIT + connections * EACH + ELSE


def is_served_soon(client: NbdClient) -> bool:
    begin = time.monotonic()
    for _ in range(10):
        assert client.read(0, 4096) == bytes(4096)
    return time.monotonic() - begin < SOON


#: Back ends that are asked by workers, and one that is asked by the thread that reads requests.
BACK_ENDS = {
    "workers": ("--filter=delay", "memory", "1G", "delay-read=1ms", "delay-write=1ms"),
    "inline": ("memory", "1G"),
}


@pytest.fixture(params=BACK_ENDS)
def server(request: pytest.FixtureRequest, serve: Servers) -> Server:
    """A server that may hold :data:`LIMIT` for all clients, and has little patience."""
    return serve(f"--max-buffered={LIMIT}", "--stall-timeout=1", *BACK_ENDS[request.param])


# --- replies ---


def test_M1_clients_that_never_read_replies_take_no_more_than_the_limit_and_give_way(server: Server) -> None:
    with clients_of(server) as clients:
        good = clients.connect()
        greedy = [clients.connect() for _ in range(8)]
        before = memory_of(server)

        for client in greedy:
            ask_without_reading(client, 64, LARGE)
        assert within(PATIENCE, lambda: memory_of(server) - before > LIMIT * 3 // 4, good)

        assert is_served_soon(good)
        assert len(good.read(0, LARGE)) == LARGE
        assert is_served_soon(good)
        assert takes_little(server, before, len(greedy))
    assert any("keeps memory that others wait for, and is disconnected" in line for line in server.end())


def test_M1_client_that_never_reads_is_bounded_by_itself(serve: Servers) -> None:
    server = serve("--max-buffered-per-connection=64M", *BACK_ENDS["workers"])
    with clients_of(server) as clients:
        good, greedy = clients.connect(), clients.connect()
        before = memory_of(server)

        ask_without_reading(greedy, 64, LARGE)

        assert is_served_soon(good)
        assert len(good.read(0, LARGE)) == LARGE
        assert peak_of(server) - before < 64 * MIB + LARGE + 2 * EACH + ELSE
        assert not is_closed(greedy, 0.01), "nobody waits for what it holds"
    server.end()


# --- payloads ---


def test_M2_a_header_buys_nothing(server: Server) -> None:
    with clients_of(server) as clients:
        good = clients.connect()
        silent = [clients.connect() for _ in range(50)]
        before = memory_of(server)

        for client in silent:
            client.send_bytes(header(Command.WRITE, LARGE))

        begin = time.monotonic()
        good.write(0, bytes(LARGE))
        assert time.monotonic() - begin < SOON, "nothing is kept for those who send nothing"
        assert is_served_soon(good)
        assert peak_of(server) - before < LARGE + len(silent) * MIB + ELSE
    assert server.end() == []


def test_M2_payloads_that_stop_short_take_no_more_than_the_limit_and_give_way(server: Server) -> None:
    with clients_of(server) as clients:
        good = clients.connect()
        stalled = [clients.connect() for _ in range(50)]
        before = memory_of(server)

        send_what_goes(stalled, [header(Command.WRITE, LARGE), bytes(LARGE - 1)])

        assert is_served_soon(good)
        assert takes_little(server, before, len(stalled))
        for client in stalled[8:]:
            client.socket.close()
        good.write(0, bytes(LARGE))
        assert is_served_soon(good)
    assert any("keeps memory that others wait for" in line for line in server.end())


@pytest.mark.parametrize("back_end", ["slow", "quick"])
def test_M3_pipelined_writes_wait_for_the_storage(back_end: str, serve: Servers) -> None:
    delay = ("--filter=delay", "null", "1G", "delay-write=50ms") if back_end == "slow" else ("null", "1G")
    server = serve("--max-buffered-per-connection=64M", *delay)
    with clients_of(server) as clients:
        good, eager = clients.connect(), clients.connect()
        before = memory_of(server)

        writer = threading.Thread(target=write_eagerly, args=(eager, 32, 16 * MIB))
        writer.start()
        while writer.is_alive():
            assert is_served_soon(good)
        writer.join()

        assert len(eager.replies(32)) == 32
        assert peak_of(server) - before < 64 * MIB + 16 * MIB + 2 * EACH + ELSE
    server.end()


def write_eagerly(client: NbdClient, count: int, length: int) -> None:
    data = bytes(length)
    for _ in range(count):
        client.send(Command.WRITE, 0, data=data)


# --- afterwards ---


def test_M4_memory_comes_back_when_clients_have_left(server: Server) -> None:
    with clients_of(server) as clients:
        good = clients.connect()
        before = memory_of(server)
        reading, writing, stopping = ([clients.connect() for _ in range(2)] for _ in range(3))

        for client in writing:
            for _ in range(3):
                client.call(Command.WRITE, 0, data=bytes(LARGE))
        for client in reading:
            for _ in range(3):
                assert len(client.read(0, LARGE)) == LARGE
            ask_without_reading(client, 16, LARGE)
        send_what_goes(stopping, [header(Command.WRITE, LARGE), bytes(LARGE // 2)])
        used = memory_of(server) - before
        for client in (*reading, *writing, *stopping):
            client.socket.close()

        disk = LARGE
        assert used > disk + 48 * MIB, "else there is nothing to come back"
        assert within(5.0, lambda: memory_of(server) - before < disk + 32 * MIB, good)
    server.end()


# --- fairness ---


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
def test_M5_large_transfers_do_not_starve_small_ones(command: Command, server: Server) -> None:
    with clients_of(server) as clients:
        small, large = clients.connect(), clients.connect()
        ends = threading.Event()
        transfers = threading.Thread(target=transfer, args=(large, command, ends))
        transfers.start()
        try:
            small.read(0, 4096)
            times = sorted(time_of(lambda: small.read(0, 4096)) for _ in range(200))
        finally:
            ends.set()
            transfers.join()

        assert times[150] < 0.05
        assert times[-3] < 0.2
    server.end()


def transfer(client: NbdClient, command: Command, ends: threading.Event) -> None:
    """Keep two large requests under way until `ends`."""
    data = bytes(LARGE) if command == Command.WRITE else b""
    client.send(command, 0, LARGE, data=data)
    while not ends.is_set():
        client.send(command, 0, LARGE, data=data)
        client.reply()
    client.reply()


def test_M6_threads_are_bounded_by_clients_and_those_are_bounded(serve: Servers) -> None:
    server = serve("-t", "3", "--max-connections=40", "--filter=delay", "memory", "1M", "delay-read=300ms")
    with clients_of(server) as clients:
        active = [clients.dial().negotiate() for _ in range(40)]
        assert is_closed(clients.dial())

        for client in active:
            ask_without_reading(client, 20, 4096)
        assert within(PATIENCE, lambda: status_of(server, "Threads") > 40 * 3)

        most = 0
        for client in active:
            most = max(most, status_of(server, "Threads"))
            assert len(client.receive_bytes(3 * (16 + 4096))) > 0
        assert most <= 1 + 40 * (1 + 3)
    assert any("too many connections, at most 40" in line for line in server.end())

"""Clients that connect and are a nuisance: others are served, and what one client takes stays within bounds.

Each test is named after the threat that it is about, N in the handshake, A about who may connect.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import BASE_ALLOCATION, Option, OptionReply
from tests.interop.harness import Server, Servers, make_distribution
from tests.nbdclient import PATIENCE, NbdClient, Refused, Style, go_data
from tests.threats.hostile import (
    MIB,
    OPTION_MAGIC,
    Clients,
    clients_of,
    descriptors_of,
    is_closed,
    memory_of,
    option,
    pause,
    processor_time_of,
    time_of,
    within,
)

#: Seconds in which a client is served that does no wrong, on a busy machine.
SOON = 1.0


def served_soon(clients: Clients) -> bool:
    """Whether a newcomer gets through the handshake and reads a block in time."""
    begin = time.monotonic()
    client = clients.dial().negotiate()
    client.read(0, 4096)
    client.disconnect()
    return time.monotonic() - begin < SOON


# --- silence ---


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Let this process have many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this process may not have 4096 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_descriptors")
@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_N2_idle_flood_takes_little_and_is_gone_in_time(transport: str, serve: Servers) -> None:
    words = ("--timeout=4", "--max-connections=1500", "memory", "1M")
    server = serve(*words) if transport == "unix" else serve.tcp(*words)
    with clients_of(server) as clients:
        verified = clients.connect()
        before, descriptors = memory_of(server), descriptors_of(server)

        for _ in range(1999):
            clients.dial()
        assert time_of(lambda: verified.read(0, 4096)) < SOON
        clients.dial(greeted=True)  # so that the server has seen them all
        assert served_soon(clients)

        connected = descriptors_of(server) - descriptors
        assert 900 < connected <= 1100, "of 2000 unfinished handshakes 1000 are kept, and some are about to go"
        assert (memory_of(server) - before) / connected < 64 << 10
        assert within(4 + 3, lambda: descriptors_of(server) <= descriptors, verified)
    assert any("too many unfinished handshakes, the oldest is closed" in line for line in server.end())


@pytest.mark.usefixtures("many_descriptors")
def test_N2_idle_flood_does_not_take_the_place_of_clients_though_there_is_little_room(serve: Servers) -> None:
    server = serve("--max-connections=5", "memory", "1M")
    with clients_of(server) as clients:
        verified = [clients.connect() for _ in range(3)]

        for _ in range(200):
            clients.dial()
        assert served_soon(clients)

        assert all(client.read(0, 4096) == bytes(4096) for client in verified)
        assert descriptors_of(server) < 150
    assert any("too many connections, the oldest unfinished handshake is closed" in line for line in server.end())


def test_N2_connections_of_one_source_do_not_take_the_place_of_others(serve: Servers) -> None:
    server = serve.at("-i", "127.0.0.1", "-p", "0", "--max-connections-per-source=3", "memory", "1M")
    with clients_of(server) as clients:
        for _ in range(3):
            clients.connect()
        assert is_closed(clients.dial())

        sock = socket.create_connection(("127.0.0.1", server.port), PATIENCE, ("127.0.0.2", 0))
        with NbdClient(sock) as other:
            assert other.negotiate().read(0, 1) == b"\0"
    (line,) = server.end()
    assert "too many connections of address 127.0.0.1, at most 3: connection 4 (127.0.0.1:" in line


# --- slowness ---


def test_N3_slow_client_has_the_time_for_the_whole_handshake_not_for_each_byte(serve: Servers) -> None:
    server = serve("--timeout=1", "memory", "1M")
    dialogue = struct.pack(">I", 3) + struct.pack(">8sII", OPTION_MAGIC, Option.GO, 6) + bytes(6)
    with clients_of(server) as clients:
        slow = clients.dial()
        begin = time.monotonic()
        slow.receive_bytes(18)

        sent = 0
        slow.socket.settimeout(0.1)
        for byte in dialogue:
            slow.socket.send(bytes([byte]))
            sent += 1
            if is_closed(slow, 0.1):
                break

        assert sent < len(dialogue)
        assert 0.9 < time.monotonic() - begin < 1 + 2
        assert served_soon(clients)
    assert server.end() == ["nbdkitpy: error: memory[1]: handshake not finished in time, closed"]


@pytest.mark.parametrize(("words", "most"), [((), 32), (("--max-options=5",), 5)])
def test_N3_endless_options_end(words: tuple[str, ...], most: int, serve: Servers) -> None:
    server = serve(*words, "memory", "1M")
    with clients_of(server) as clients:
        verified = clients.connect()
        endless = clients.dial(greeted=True)

        assert answered(endless, 3000) == most
        assert verified.read(0, 4096) == bytes(4096)
    (line,) = server.end()
    assert line.endswith("too many options")


def answered(client: NbdClient, count: int) -> int:
    """Send INFO so many times, as long as the connection lasts, and return how often it was answered."""
    answers = 0
    with contextlib.suppress(EOFError, OSError):
        for _ in range(count):
            client.go("", option=Option.INFO)
            answers += 1
    return answers


# --- no descriptors ---


def test_N4_server_without_descriptors_rests_says_so_once_a_second_and_goes_on(serve: Servers) -> None:
    server = serve("--timeout=0", "memory", "1M")
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (64, 64))
    with clients_of(server) as clients:
        verified = clients.connect()
        for _ in range(150):
            clients.dial()
        assert within(PATIENCE, lambda: bool(server.log()), verified)
        begin, spent, lines = time.monotonic(), processor_time_of(server), len(server.log())

        pause(2.0)

        passed = time.monotonic() - begin
        assert processor_time_of(server) - spent < 0.1 * passed
        assert len(server.log()) - lines <= passed + 1
        assert verified.read(0, 4096) == bytes(4096)
        clients.leave()
        assert within(PATIENCE, lambda: descriptors_of(server) < 30)
        assert served_soon(clients)
    assert set(server.end()) == {"nbdkitpy: error: cannot accept a client: Too many open files"}


# --- lies ---


def go(name: bytes, length: int) -> bytes:
    return struct.pack(">I", length) + name + bytes(2)


def meta(length: int, count: int, query: bytes) -> bytes:
    return struct.pack(">III", length, count, len(query)) + query


#: Lengths within an option that do not agree with its own, which is right: they are errors, and nothing is out of step.
LIES = {
    "CVE-2022-26495: name of 2^32-1 bytes": (Option.GO, go(b"disk", 0xFFFFFFFF)),
    "CVE-2022-26495: name of 2^32-2 bytes": (Option.INFO, go(b"disk", 0xFFFFFFFE)),
    "CVE-2022-26496: name that goes on behind the option": (Option.GO, go(b"disk", 70_000)),
    "name one byte longer than there is": (Option.GO, go(b"disk", 7)),
    "name shorter than what follows": (Option.GO, go(b"disk" * 100, 4)),
    "many kinds of information announced": (Option.GO, struct.pack(">IH", 0, 0xFFFF)),
    "context of 2^32-1 bytes": (Option.SET_META_CONTEXT, struct.pack(">III", 0, 1, 0xFFFFFFFF) + b"base:"),
    "2^32-1 contexts": (Option.LIST_META_CONTEXT, struct.pack(">II", 0, 0xFFFFFFFF)),
    "export of a context of 2^31 bytes": (Option.LIST_META_CONTEXT, meta(1 << 31, 0, b"")),
    "qemu 4843: option inside an option": (Option.SET_META_CONTEXT, meta(0, 1, b"base:x") + option(Option.ABORT, b"")),
    "data where there is none": (Option.LIST, bytes(1000)),
}


@pytest.fixture(scope="module")
def lied_to(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Clients]]:
    servers = Servers(tmp_path_factory.mktemp("lies"))
    server = servers("memory", "1M")
    with clients_of(server) as clients:
        yield server, clients
    server.end()


@pytest.mark.parametrize("lie", LIES)
def test_N8_lengths_within_an_option_that_lie_are_errors_and_the_next_option_is_understood(
    lie: str, lied_to: tuple[Server, Clients]
) -> None:
    _, clients = lied_to
    number, data = LIES[lie]
    client = clients.dial(greeted=True)
    client.option(Option.STRUCTURED_REPLY)
    client.style = Style.STRUCTURED

    client.send_bytes(option(number, data) + option(Option.GO, go_data()))

    answers = client.option_answers(number)
    if "inside" not in lie:
        assert answers[-1].reply in (OptionReply.ERR_INVALID, OptionReply.ERR_TOO_BIG)
    assert client.option_answers(Option.GO)[-1].reply == OptionReply.ACK
    assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("length", [(1 << 20) + 1, 1 << 31, 0xFFFFFFF0, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [Option.GO, Option.EXPORT_NAME, Option.LIST, 99])
def test_N8_cve_2017_15119_option_that_is_too_long_ends_the_connection_before_its_data(
    number: int, length: int, lied_to: tuple[Server, Clients]
) -> None:
    _, clients = lied_to
    client = clients.dial(greeted=True)

    client.send_bytes(option(number, length=length))

    assert is_closed(client)


def test_N8_what_is_announced_takes_no_memory(lied_to: tuple[Server, Clients]) -> None:
    server, clients = lied_to
    before = memory_of(server)

    for number in (Option.GO, Option.SET_META_CONTEXT, Option.LIST, 99) * 25:
        client = clients.dial(greeted=True)
        client.send_bytes(option(number, bytes(100_000), length=1 << 20))
    assert served_soon(clients)

    assert memory_of(server) - before < 100 * (256 << 10)


# --- much for little ---


def test_N9_many_copies_of_a_query_are_one_answer_or_none(serve: Servers) -> None:
    server = serve("memory", "1M")
    query = struct.pack(">I", len(BASE_ALLOCATION)) + BASE_ALLOCATION.encode()
    with clients_of(server) as clients:
        client = clients.dial(greeted=True)
        client.option(Option.STRUCTURED_REPLY)

        few = client.option(Option.SET_META_CONTEXT, struct.pack(">II", 0, 1000) + query * 1000)
        with pytest.raises(Refused) as refused:
            client.option(Option.SET_META_CONTEXT, struct.pack(">II", 0, 50_000) + query * 50_000)
        client.send_bytes(option(Option.SET_META_CONTEXT, length=8 + 100_000 * len(query)))

        assert len(few) == 1
        assert refused.value.reply == OptionReply.ERR_TOO_BIG
        assert is_closed(client)
    server.end()


#: A plugin with as many exports as can be listed, each with a long name.
HUGE = """
from nbdkitpy import Export, Handle, Plugin, ThreadModel, hookimpl

class Disk(Handle):
    def get_size(self):
        return 1 << 20
    def pread(self, count, offset):
        return bytes(count)

class Huge(Plugin):
    name = "huge"
    def thread_model(self):
        return ThreadModel.PARALLEL
    def open(self, export_name, readonly, client):
        return Disk()
    def list_exports(self, client, readonly):
        return [Export(f"{number:0200}") for number in range(10_000)]

@hookimpl
def register_plugins(register):
    register(Huge)
"""


def test_N9_huge_list_that_nobody_takes_is_made_once_and_disturbs_nobody(serve: Servers, tmp_path: Path) -> None:
    make_distribution(tmp_path, "huge", plugins=HUGE)
    server = serve("--timeout=2", "huge", env={"PYTHONPATH": str(tmp_path)})
    with clients_of(server) as clients:
        verified = clients.connect()
        before, descriptors = memory_of(server), descriptors_of(server)

        greedy = [clients.dial(greeted=True) for _ in range(5)]
        for client in greedy:
            client.send_bytes(option(Option.LIST, b"") * 32)
        times = []
        while descriptors_of(server) > descriptors:
            times.append(time_of(lambda: verified.read(0, 4096)))
            pause(0.02)

        assert max(times) < SOON
        assert memory_of(server) - before < len(greedy) * 10 * MIB  # a list has 2 MiB, and what it is made of some more
    assert len(server.end()) == len(greedy)


# --- the number of clients ---


def test_A8_of_clients_that_come_together_as_many_get_in_as_the_limit_says(serve: Servers) -> None:
    server = serve("--filter=limit", "memory", "1M", "limit=5")
    with clients_of(server) as clients:
        for _ in range(3):
            assert len(come_together(clients, 40)) == 5
            clients.leave()
            slots: list[NbdClient] = []
            assert within(PATIENCE, lambda slots=slots: fill(clients, slots, 5))  # type: ignore[misc]
            assert not fill(clients, slots, 6), "a slot too many has come back"
            clients.leave()
    assert all("too many clients connected" in line or "lost" in line for line in server.end())


def come_together(clients: Clients, count: int) -> list[NbdClient]:
    """Have so many clients go through the handshake at once, and return those that get in."""
    dialled = [clients.dial(greeted=True) for _ in range(count)]
    inside: list[NbdClient] = []
    barrier = threading.Barrier(count)

    def come(client: NbdClient) -> None:
        barrier.wait(PATIENCE)
        if opens(client):
            inside.append(client)

    threads = [threading.Thread(target=come, args=(client,)) for client in dialled]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return inside


def opens(client: NbdClient) -> bool:
    """Whether a client that has been greeted gets the export open."""
    try:
        client.go()
    except (Refused, EOFError, OSError):
        return False
    return client.read(0, 1) == b"\0"


def fill(clients: Clients, slots: list[NbdClient], count: int) -> bool:
    """Have clients come until there are so many; tell whether they all get in."""
    while len(slots) < count:
        client = clients.dial()
        try:
            client.greet()
        except OSError:
            return False
        if not opens(client):
            return False
        slots.append(client)
    return True


def test_A9_unfinished_handshakes_take_no_slot_and_idle_clients_give_theirs_back_if_asked_to(serve: Servers) -> None:
    server = serve("--filter=limit", "--idle-timeout=0.5", "memory", "1M", "limit=1")
    with clients_of(server) as clients:
        silent = [clients.dial(greeted=True) for _ in range(3)]
        idle = clients.connect()
        assert is_closed(clients.dial())

        assert is_closed(idle)
        newcomer = clients.connect()

        assert newcomer.read(0, 4096) == bytes(4096)
        for client in silent:
            assert not is_closed(client, 0.01)
    assert [line for line in server.end() if "too many clients connected" in line]


def test_A9_without_an_idle_timeout_an_idle_client_keeps_its_slot(serve: Servers) -> None:
    server = serve("--filter=limit", "memory", "1M", "limit=1")
    with clients_of(server) as clients:
        idle = clients.connect()
        pause(0.3)

        assert is_closed(clients.dial())
        assert idle.read(0, 4096) == bytes(4096)
        idle.disconnect()
        slots: list[NbdClient] = []
        assert within(PATIENCE, lambda: fill(clients, slots, 1))
    server.end()

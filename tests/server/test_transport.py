"""The transport: whole gather writes, files without a copy, and an end that takes back nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client, Family
from nbdkitpy.server import transport as module
from nbdkitpy.server.transport import SocketTransport, describe_client
from tests.nbdclient import PATIENCE, NbdClient
from tests.serving import CONTENT

Pair = tuple[SocketTransport, NbdClient]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A transport and who is at the other end of it."""
    ours, theirs = socket.socketpair()
    transport = SocketTransport(ours)
    with NbdClient(theirs) as client:
        yield transport, client
    transport.close()


@pytest.fixture
def tcp() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        client = NbdClient(socket.create_connection(listening.getsockname()))
        transport = SocketTransport(listening.accept()[0])
    with client:
        yield transport, client
    transport.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    """A file with 64 KiB of content, by its descriptor."""
    path = tmp_path / "disk"
    path.write_bytes(CONTENT[:65536])
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


# --- sending ---


def test_pieces_are_sent_in_order_whatever_their_kind(pair: Pair) -> None:
    transport, client = pair

    transport.send([b"one", bytearray(b"two"), b"", memoryview(b"three")])

    assert client.receive_bytes(11) == b"onetwothree"


def test_more_pieces_are_sent_than_the_kernel_takes_at_once(pair: Pair) -> None:
    transport, client = pair
    pieces = [struct.pack(">I", number) for number in range(3000)]

    transport.send(pieces)

    assert client.receive_bytes(12000) == b"".join(pieces)


class Hesitant(socket.socket):
    """Takes only a few bytes of each gather write, as the kernel may when a signal arrives."""

    def sendmsg(self, buffers: Iterable[Any], *_: object) -> int:
        return self.send(b"".join(buffers)[:5])


def test_what_the_kernel_did_not_take_is_sent_after_it() -> None:
    ours, theirs = socket.socketpair()
    transport = SocketTransport(Hesitant(fileno=ours.detach()))

    transport.send([b"123", b"4567", b"", memoryview(b"89")])
    transport.close()

    assert NbdClient(theirs).receive_bytes(9) == b"123456789"
    theirs.close()


def test_sending_to_who_has_left_raises(pair: Pair) -> None:
    transport, client = pair
    client.socket.close()

    with pytest.raises(OSError, match="Broken pipe"):
        transport.send([b"data"])


@pytest.mark.parametrize("kind", ["pair", "tcp"])
def test_who_says_no_more_is_gone_only_when_he_does_not_listen_either(
    kind: str, request: pytest.FixtureRequest
) -> None:
    transport, client = request.getfixturevalue(kind)
    assert not transport.is_gone()

    client.socket.shutdown(socket.SHUT_WR)
    assert transport.receive_into(memoryview(bytearray(1))) == 0
    assert not transport.is_gone()
    client.reset()

    assert transport.is_gone()


def test_tcp_does_not_wait_for_more(tcp: Pair) -> None:
    transport, _ = tcp

    assert transport._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("network", ["pair", "tcp"])
def test_a_connection_is_full_when_the_client_takes_nothing(network: str, request: pytest.FixtureRequest) -> None:
    transport, _ = request.getfixturevalue(network)
    assert not transport.is_full()
    transport._socket.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            transport._socket.send(bytes(1 << 16))

    assert transport.is_full()

    transport._socket.setblocking(True)
    transport.abort()
    assert not transport.is_full(), "who waits for it is told"
    transport.close()
    assert not transport.is_full()


# --- files ---


@pytest.mark.parametrize("network", ["pair", "tcp"])
def test_a_part_of_a_file_follows_its_header(network: str, disk: int, request: pytest.FixtureRequest) -> None:
    transport, client = request.getfixturevalue(network)

    sent = transport.send_file(b"header", disk, 1000, 20000)

    assert sent == 20000
    assert client.receive_bytes(20006) == b"header" + CONTENT[1000:21000]
    assert os.lseek(disk, 0, os.SEEK_CUR) == 0


def test_a_file_that_is_too_short_is_sent_as_far_as_it_goes(pair: Pair, disk: int) -> None:
    transport, client = pair

    assert transport.send_file(b"a", disk, 60000, 10000) == 5536
    assert transport.send_file(b"b", disk, 70000, 10000) == 0
    assert client.receive_bytes(5538) == b"a" + CONTENT[60000:65536] + b"b"


@pytest.mark.parametrize("kind", ["directory", "closed"])
def test_what_is_no_file_has_no_bytes(pair: Pair, kind: str, tmp_path: Path) -> None:
    transport, _ = pair
    fd = os.open(tmp_path, os.O_RDONLY)
    if kind == "closed":
        os.close(fd)

    assert transport.send_file(b"", fd, 0, 100) == 0

    if kind != "closed":
        os.close(fd)


def test_a_file_cannot_be_sent_to_who_has_left(pair: Pair, disk: int) -> None:
    transport, client = pair
    client.socket.close()

    with pytest.raises(OSError, match="Broken pipe"):
        transport.send_file(b"header", disk, 0, 100)


# --- receiving ---


def test_receiving_gives_up_after_a_while_and_can_go_on(pair: Pair) -> None:
    transport, client = pair
    transport.set_patience(0.01)
    buffer = bytearray(10)

    with pytest.raises(BlockingIOError):
        transport.receive_into(buffer)
    client.send_bytes(b"late")

    assert transport.receive_into(buffer) == 4


def test_patience_is_set_to_parts_of_a_second(pair: Pair) -> None:
    transport, _ = pair

    transport.set_patience(1.25)

    raw = transport._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)
    seconds, microseconds = struct.unpack("@ll", raw)
    assert seconds == 1
    assert microseconds == pytest.approx(250_000, abs=10_000)  # the kernel's clock ticks


def test_a_time_limit_for_all_sockets_is_not_ours(pair: Pair) -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(0.001)  # as after socket.setdefaulttimeout() in a plugin

    transport = SocketTransport(ours)

    assert transport._socket.gettimeout() is None
    transport.close()
    theirs.close()


def test_after_stop_receiving_there_is_what_had_arrived_and_then_the_end(pair: Pair) -> None:
    transport, client = pair
    client.send_bytes(b"before")

    transport.stop_receiving()

    buffer = bytearray(10)
    assert transport.receive_into(buffer) == 6
    assert transport.receive_into(buffer) == 0
    transport.send([b"still there"])
    assert client.receive_bytes(11) == b"still there"


# --- waiting ---


def test_sleep_lasts_as_long_as_asked_for_though_poll_counts_in_milliseconds(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_POLL", 1)
    begin = time.monotonic()

    pair[0].sleep(0.0045)

    assert time.monotonic() - begin >= 0.0045


ENDS: list[Callable[[SocketTransport, NbdClient], None]] = [
    lambda transport, client: client.socket.close(),
    lambda transport, client: client.reset(),
    lambda transport, client: client.socket.shutdown(socket.SHUT_WR),
    lambda transport, client: transport.stop_receiving(),
    lambda transport, client: transport.abort(),
]


@pytest.mark.parametrize("network", ["pair", "tcp"])
@pytest.mark.parametrize("end", ENDS)
def test_sleep_is_cut_when_the_connection_ends(
    network: str, end: Callable[[SocketTransport, NbdClient], None], request: pytest.FixtureRequest
) -> None:
    transport, client = request.getfixturevalue(network)
    client.send_bytes(b"never read")
    results: list[int | None] = []

    def sleep() -> None:
        try:
            transport.sleep(2**31 - 1)
        except OSError as error:
            results.append(error.errno)

    thread = threading.Thread(target=sleep)
    thread.start()
    end(transport, client)
    thread.join(PATIENCE)

    assert results == [errno.ESHUTDOWN]


def test_no_sleep_begins_after_the_end(pair: Pair) -> None:
    pair[1].socket.close()

    with pytest.raises(OSError, match="at its end"):
        pair[0].sleep(0)


# --- the end ---


@pytest.mark.parametrize("network", ["pair", "tcp"])
def test_abort_wakes_who_waits_for_the_client(network: str, request: pytest.FixtureRequest) -> None:
    transport, client = request.getfixturevalue(network)
    received: list[int] = []
    thread = threading.Thread(target=lambda: received.append(transport.receive_into(bytearray(10))))
    thread.start()

    transport.abort()
    thread.join(PATIENCE)

    assert received == [0]
    assert client.at_end()


def test_after_the_end_nothing_can_be_ended_any_more(pair: Pair) -> None:
    transport, _ = pair
    transport.close()
    other, its_peer = socket.socketpair()  # has got the number that the descriptor had

    transport.abort()
    transport.stop_receiving()
    transport.close()

    other.sendall(b"alive")
    assert its_peer.recv(10) == b"alive"
    other.close()
    its_peer.close()


def test_bytes_that_nobody_wants_do_not_take_back_what_was_sent(tcp: Pair) -> None:
    """A TCP that is closed with bytes unread resets the connection, and drops what has not been taken yet."""
    transport, client = tcp
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    transport._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    data = CONTENT[: 256 << 10]
    transport.send([data])  # all of it is in the kernel; the client takes none of it
    client.send_bytes(b"junk")

    transport.close()

    assert client.receive_bytes(len(data)) == data
    assert client.at_end()


def test_who_sends_without_end_is_not_listened_to_for_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, client = pair
    monkeypatch.setattr(module, "_UNREAD_PIECE", 10)
    monkeypatch.setattr(module, "_MOST_UNREAD", 30)
    client.send_bytes(b"x" * 1000)
    reads = count_reads(transport, monkeypatch)

    transport.close()

    assert len(reads) == 3


def count_reads(transport: SocketTransport, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []

    class Counting(socket.socket):
        def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
            reads.append(bufsize)
            return super().recv(bufsize, flags)

    transport._socket = Counting(fileno=transport._socket.detach())
    return reads


# --- who is it? ---


def test_of_a_unix_client_its_process_is_known() -> None:
    ours, theirs = socket.socketpair()

    client = describe_client(ours, 7)

    assert client.family is Family.UNIX
    assert (client.number, client.pid, client.uid, client.gid) == (7, os.getpid(), os.getuid(), os.getgid())
    assert (client.address, client.port) == (None, None)
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("family", "name", "known"),
    [(socket.AF_INET, "127.0.0.1", Family.INET), (socket.AF_INET6, "::1", Family.INET6)],
    ids=["inet", "inet6"],
)
def test_of_a_tcp_client_address_and_port_are_known(family: int, name: str, known: Family) -> None:
    with socket.create_server((name, 0), family=family) as listening, socket.socket(family) as peer:
        peer.connect(listening.getsockname())
        ours, _ = listening.accept()
        client = describe_client(ours, 1)

        assert (client.family, client.address, client.port) == (known, name, peer.getsockname()[1])
        assert client.pid is None
        ours.close()


class Fake:
    """A socket of a kind that this machine has no peer for."""

    def __init__(self, family: int, name: object, options: dict[int, bytes] | None = None) -> None:
        self.family = family
        self.name = name
        self.options = options or {}

    def getpeername(self) -> object:
        if isinstance(self.name, OSError):
            raise self.name
        return self.name

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        if option not in self.options:
            raise OSError(errno.ENOPROTOOPT, "no label")
        return self.options[option]


def describe(fake: Fake) -> Client:
    return describe_client(fake, 3)  # type: ignore[arg-type]


def test_of_a_vsock_client_context_and_port_are_known() -> None:
    client = describe(Fake(getattr(socket, "AF_VSOCK", 40), (5, 1234)))

    assert (client.family, client.cid, client.port) == (Family.VSOCK, 5, 1234)


def test_A1_ipv4_client_of_an_ipv6_socket_is_described_as_one_of_ipv4() -> None:
    client = describe(Fake(socket.AF_INET6, ("::ffff:10.0.0.1", 9, 0, 0)))

    assert (client.family, client.address, client.port) == (Family.INET, "10.0.0.1", 9)


def test_A7_a_zone_is_no_part_of_an_address() -> None:
    assert describe(Fake(socket.AF_INET6, ("fe80::1%eth0", 9, 0, 2))).address == "fe80::1"


def test_a_security_label_is_told() -> None:
    client = describe(Fake(socket.AF_INET, ("192.0.2.1", 9), {module._SO_PEERSEC: b"user_t:s0\0"}))

    assert client.security_label == "user_t:s0"


def test_a_security_label_that_is_no_text_is_shown_as_far_as_it_is() -> None:
    assert describe(Fake(socket.AF_INET, ("192.0.2.1", 9), {module._SO_PEERSEC: b"a\xff"})).security_label == "a\\xff"


def test_A5_ids_that_the_system_does_not_tell_are_unknown() -> None:
    credentials = struct.pack("3i", 0, -1, -1)

    client = describe(Fake(socket.AF_UNIX, "", {socket.SO_PEERCRED: credentials}))

    assert (client.pid, client.uid, client.gid) == (0, None, None)


@pytest.mark.parametrize(
    "fake",
    [Fake(socket.AF_INET, OSError(errno.ENOTCONN, "gone")), Fake(socket.AF_APPLETALK, "?")],
    ids=["gone", "of another family"],
)
def test_A4_of_who_cannot_be_known_nothing_is_claimed(fake: Fake) -> None:
    assert describe(fake) == Client(3)


def test_patience_can_be_set_on_vsock_too() -> None:
    """Python takes only numbers for options of such sockets, and this one is a structure."""
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except (AttributeError, OSError) as error:
        pytest.skip(f"this system has no vsock: {error}")
    transport = SocketTransport(sock)

    transport.set_patience(1.5)

    assert sock.fileno() >= 0
    transport.close()


class Looking:
    """In place of receiving: takes note of the flags, and has something for who waits, after so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flags: list[int] = []
        self.takes = 0.0
        self.now = 0.0
        monkeypatch.setattr("nbdkitpy.server.transport.time.perf_counter", lambda: self.now)

    def __call__(self, buffer: memoryview, count: int = 0, flags: int = 0) -> int:
        self.flags.append(flags)
        if flags:
            raise BlockingIOError
        self.now += self.takes
        return 4


def test_who_waits_for_replies_and_is_quick_is_looked_out_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    transport, _ = pair
    transport.receive_into = looking = Looking(monkeypatch)  # type: ignore[assignment]
    buffer = memoryview(bytearray(10))

    assert transport.receive_soon(buffer) == 4
    looking.takes = 0.001
    assert transport.receive_soon(buffer) == 4
    assert transport.receive_soon(buffer) == 4

    assert looking.flags == [0, *[socket.MSG_DONTWAIT] * 30, 0, 0]


def test_what_comes_while_it_is_looked_out_for_is_taken_at_once(pair: Pair) -> None:
    transport, client = pair
    buffer = memoryview(bytearray(10))
    for _ in range(3):
        client.socket.sendall(b"more")
        assert transport.receive_soon(buffer) == 4

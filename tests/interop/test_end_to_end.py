"""What a user does: images served, copied and compared; filters that do what their READMEs say; orderly ends."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.environment import NBDKITPY
from tests.interop.harness import (
    GIB,
    MIB,
    Server,
    Servers,
    Tool,
    allocated,
    empty_image,
    full_image,
    receive_all,
    receive_exactly,
    run,
    run_script,
    sparse_image,
)

pytestmark = pytest.mark.interop

GREETING = bytes.fromhex("4e42444d41474943 49484156454f5054 0003")
RAW = ("-f", "raw", "-O", "raw")


# --- a gigabyte ---

DATA = {0: 60 * MIB, 300 * MIB: 100 * MIB, 700 * MIB + 4096: 39 * MIB, GIB - MIB: MIB}
SLACK = 2 * MIB


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    image = sparse_image(tmp_path_factory.mktemp("gigabyte") / "sparse.img", GIB, DATA)
    yield image
    image.unlink()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    image = empty_image(tmp_path / "target.img", GIB)
    yield image
    image.unlink()


@pytest.fixture
def back(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "back.img"
    yield path
    path.unlink(missing_ok=True)


def extents(nbdinfo: Tool, uri: str) -> list[tuple[int, int, int]]:
    found: list[dict[str, Any]] = nbdinfo.json("--map", "--json", uri)
    return [(extent["offset"], extent["length"], extent["type"]) for extent in found]


def expected_extents() -> list[tuple[int, int, int]]:
    data, end, found = 0, 0, []
    for offset, length in DATA.items():
        found += [(end, offset - end, 3)] if offset > end else []
        found.append((offset, length, data))
        end = offset + length
    return found


def test_qemu_img_converts_a_gigabyte_onto_a_file_and_back(
    serve: Servers, qemu_img: Tool, nbdinfo: Tool, sparse: Path, target: Path, back: Path
) -> None:
    server = serve("file", target)

    qemu_img("convert", *RAW, "-n", sparse, server.uri)
    qemu_img("convert", *RAW, server.uri, back)

    qemu_img("compare", "-f", "raw", "-F", "raw", sparse, server.uri)
    qemu_img("compare", "-f", "raw", "-F", "raw", sparse, back)
    assert extents(nbdinfo, server.uri) == expected_extents()
    assert max(allocated(target), allocated(back)) <= sum(DATA.values()) + SLACK


def test_nbdcopy_copies_a_gigabyte_onto_a_file_and_back(
    serve: Servers, nbdcopy: Tool, nbdinfo: Tool, qemu_img: Tool, sparse: Path, target: Path, back: Path
) -> None:
    server = serve("file", target)

    nbdcopy("--flush", sparse, server.uri)
    nbdcopy(server.uri, back)

    qemu_img("compare", "-f", "raw", "-F", "raw", sparse, server.uri)
    qemu_img("compare", "-f", "raw", "-F", "raw", sparse, back)
    assert extents(nbdinfo, server.uri) == expected_extents()
    assert max(allocated(target), allocated(back)) <= sum(DATA.values()) + SLACK


def test_a_gigabyte_without_holes_is_converted_and_compared(
    serve: Servers, qemu_img: Tool, target: Path, tmp_path: Path
) -> None:
    full = full_image(tmp_path / "full.img", GIB)
    server = serve("file", target)

    qemu_img("convert", *RAW, "-n", "-W", full, server.uri)

    qemu_img("compare", "-f", "raw", "-F", "raw", full, server.uri)
    full.unlink()


# --- ip, limit and exitlast ---

FILTERS = ("--filter=ip", "--filter=limit", "--filter=exitlast")


class Client:
    """A client by hand, which opens the default export and keeps it open."""

    def __init__(self, server: Server) -> None:
        self.sock = server.connect()
        assert receive_exactly(self.sock, len(GREETING)) == GREETING
        self.sock.sendall(bytes.fromhex("00000003 49484156454f5054 00000001 00000000"))  # EXPORT_NAME, ""
        self.size = int.from_bytes(receive_exactly(self.sock, 10)[:8], "big")

    def read(self, offset: int, length: int) -> bytes:
        request = bytes.fromhex("25609513 0000 0000 1122334455667788")
        self.sock.sendall(request + offset.to_bytes(8, "big") + length.to_bytes(4, "big"))
        assert receive_exactly(self.sock, 16) == bytes.fromhex("67446698 00000000 1122334455667788")
        return receive_exactly(self.sock, length)

    def leave(self) -> None:
        """Say DISC, upon which the server closes without a word."""
        self.sock.sendall(bytes.fromhex("25609513 0000 0002 0000000000000000 0000000000000000 00000000"))
        assert receive_all(self.sock) == b""
        self.sock.close()


def first_bytes(server: Server) -> bytes:
    """Connect, and return all that the server says to a client that is silent, until it closes the connection."""
    with server.connect() as sock:
        return receive_all(sock)


def test_the_three_filters_do_what_their_readmes_say(serve: Servers, nbdinfo: Tool) -> None:
    server = serve.tcp(*FILTERS, "memory", "1G", "allow=loopback", "deny=all", "limit=2")

    first, second = Client(server), Client(server)
    refused = first_bytes(server)
    sizes = [first.size, second.size]
    data = [client.read(GIB - 4096, 4096) for client in (first, second)]
    first.leave()
    third = Client(server)
    second.leave()
    is_running_with_one_client_left = server.is_running
    third.leave()

    assert refused == b""
    assert sizes == [GIB, GIB]
    assert data == [bytes(4096)] * 2
    assert is_running_with_one_client_left
    (line,) = server.wait()
    assert "limit: too many clients" in line


@pytest.mark.parametrize(
    "rules",
    [
        ["deny=all"],
        ["allow=10.0.0.0/8", "deny=all"],
        ["allow=anyipv6,allunix", "deny=all"],
        ["deny=127.0.0.1"],
        ["deny=loopback"],
        ["allow=127.0.0.2", "deny=127.0.0.0/8"],
    ],
    ids=" ".join,
)
def test_a_client_that_is_not_permitted_gets_no_byte(serve: Servers, rules: list[str]) -> None:
    server = serve.tcp(*FILTERS, "memory", "1G", *rules, "limit=2")

    assert [first_bytes(server) for _ in range(3)] == [b""] * 3

    lines = server.end()
    assert len(lines) == 3  # one for each
    assert all("refused" in line for line in lines)


def test_permitted_clients_are_told_from_others_by_their_address(serve: Servers, nbdinfo: Tool) -> None:
    server = serve.tcp(*FILTERS, "memory", "1G", "allow=127.0.0.0/30", "deny=all", "limit=2")

    def connect_from(address: str) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), source_address=(address, 0), timeout=10) as sock:
            sock.shutdown(socket.SHUT_WR)
            return receive_all(sock)

    assert [connect_from(f"127.0.0.{last}") for last in (1, 3, 4, 77)] == [GREETING, GREETING, b"", b""]
    assert nbdinfo("--size", server.uri).strip() == str(GIB)
    assert len(server.wait()) == 2


def test_clients_of_a_unix_socket_are_told_from_others_by_their_credentials(serve: Servers, nbdinfo: Tool) -> None:
    ours, others = f"allow=uid:{os.getuid()}", f"allow=uid:{os.getuid() + 1}"
    permitted, refused = (
        serve(*FILTERS, "memory", "1M", ours, "deny=all"),
        serve(*FILTERS, "memory", "1M", others, "deny=all"),
    )

    assert nbdinfo("--size", permitted.uri).strip() == str(MIB)
    assert first_bytes(refused) == b""

    assert permitted.wait() == []
    assert len(refused.end()) == 1


def test_N12_inquiries_do_not_end_a_server_with_exitlast(serve: Servers, nbdinfo: Tool, libnbd: None) -> None:
    server = serve("--filter=exitlast", "memory", "1M")

    for _ in range(2):
        nbdinfo("--list", server.uri)
        run_script("ask.py", server.uri)
        with server.connect() as silent:
            receive_exactly(silent, len(GREETING))
    is_running_after_inquiries = server.is_running
    client = Client(server)
    client.leave()

    assert is_running_after_inquiries
    assert server.wait() == []


def test_a_client_that_vanishes_ends_a_server_with_exitlast(serve: Servers) -> None:
    server = serve("--filter=exitlast", "memory", "1M")
    client = Client(server)
    client.read(0, 512)

    client.sock.close()

    assert server.wait() == []


# --- a server's life ---


def test_an_idle_client_does_not_keep_the_server(serve: Servers) -> None:
    server = serve("memory", "1M")
    client, silent = Client(server), server.connect()
    receive_exactly(silent, len(GREETING))

    assert server.end() == []

    assert (receive_all(client.sock), receive_all(silent)) == (b"", b"")
    client.sock.close()
    silent.close()


def test_the_socket_and_the_pidfile_are_there_while_the_server_is(serve: Servers, tmp_path: Path) -> None:
    pidfile, path = tmp_path / "server.pid", tmp_path / "server.sock"
    server = serve.at("-U", path, "-P", pidfile, "memory", "1M")
    found = (pidfile.read_text(), path.is_socket())

    assert server.end() == []

    assert found == (f"{server.pid}\n", True)
    assert not pidfile.exists()
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=lambda number: number.name)
def test_other_signals_end_the_server_in_order_too(serve: Servers, number: signal.Signals) -> None:
    server = serve("memory", "1M")

    os.kill(server.pid, number)

    assert server.wait() == []


def test_S6_run_serves_while_a_command_runs_and_gives_back_its_status(nbdinfo: Tool) -> None:
    output = run([*NBDKITPY, "memory", "1M", "--run", f'{nbdinfo.path} --size "$uri"; exit 7'], status=7)

    assert output.strip() == str(MIB)


def test_run_gives_clients_a_tcp_port_if_asked_to(nbdinfo: Tool) -> None:
    output = run([*NBDKITPY, "-4", "-p", "0", "memory", "1M", "--run", f'echo $port; {nbdinfo.path} --size "$uri"'])

    port, size = output.split()
    assert 0 < int(port) < 1 << 16
    assert size == str(MIB)


def test_what_was_written_outlives_the_server(serve: Servers, qemu_io: Tool, tmp_path: Path) -> None:
    image = empty_image(tmp_path / "disk.img", MIB)

    for number in (1, 2):
        server = serve("--filter=exitlast", "file", image)
        qemu_io("-f", "raw", "-c", f"write -P {number} {number * 4}k 4k", server.uri)
        assert server.wait() == []

    assert image.read_bytes()[: 16 << 10] == bytes(4096) + b"\x01" * 4096 + b"\x02" * 4096 + bytes(4096)

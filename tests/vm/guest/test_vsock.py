"""AF_VSOCK: the machine talks to itself, as context 1."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import nbd  # type: ignore[import-not-found, unused-ignore]
import pytest

from tests.vm.guest.harness import MIB, NBDKITPY, Server, digest, greeted, has_ended, noise, open_export, run

Serve = Callable[..., Server]

HERE = 1  # VMADDR_CID_LOCAL
PORT = 10809
SOURCE = (socket.VMADDR_CID_ANY, 5000)


@pytest.fixture(autouse=True, scope="module")
def loopback() -> None:
    run("modprobe", "vsock_loopback")


def test_uri_is_that_of_this_machine_and_finds_the_export(serve: Serve) -> None:
    server = serve("--vsock", "-e", "disk", "memory", "1M")
    assert server.uri == "nbd+vsock://1/disk"

    client = open_export(server.uri)
    client.pwrite(b"x" * 512, 512)
    read = client.pread(1024, 0)
    client.shutdown()

    assert read == bytes(512) + b"x" * 512
    assert server.end() == []


def test_port_has_32_bits(serve: Serve) -> None:
    server = serve("--vsock", "--port=4000000000", "memory", "1M")
    assert server.uri == "nbd+vsock://1:4000000000"

    client = nbd.NBD()
    client.connect_vsock(HERE, 4_000_000_000)

    assert client.get_size() == MIB
    client.shutdown()
    assert server.end() == []


def test_free_port_is_found(serve: Serve) -> None:
    servers = [serve("--vsock", "-p", "0", "memory", "1M") for _ in range(2)]
    ports = [int(server.uri.rpartition(":")[2]) for server in servers]

    clients = [nbd.NBD() for _ in ports]
    for client, port in zip(clients, ports):
        client.connect_vsock(HERE, port)

    assert len({0, *ports}) == 3
    assert [client.get_size() for client in clients] == [MIB, MIB]


def test_port_that_is_taken_is_an_error_of_one_line(serve: Serve) -> None:
    serve("--vsock", "memory", "1M")

    second = subprocess.run([NBDKITPY, "-f", "--vsock", "memory", "1M"], capture_output=True, text=True, check=False)

    assert second.returncode == 1
    (line,) = second.stderr.splitlines()
    assert re.search(r"vsock.* 10809: Address already in use", line)


def test_image_is_copied_there_and_back(serve: Serve, tmp_path: Path) -> None:
    image, disk, back = noise(tmp_path / "image", 8 * MIB), tmp_path / "disk", tmp_path / "back"
    disk.touch()
    run("truncate", "-s", "8M", disk)
    server = serve("--vsock", "file", disk)

    run("nbdcopy", image, server.uri)
    run("nbdcopy", server.uri, back)

    assert server.end() == []
    assert digest(disk) == digest(image)
    assert digest(back) == digest(image)


@pytest.mark.parametrize(
    "rules",
    [
        ["allow=vsock-cid:1", "deny=all"],
        ["allow=vsock-port:5000", "deny=all"],
        ["deny=vsock-cid:2,vsock-port:5001,anyipv4,anyipv6,anyunix,loopback"],
    ],
    ids=" ".join,
)
def test_rules_permit_the_client(serve: Serve, rules: list[str]) -> None:
    server = serve("--vsock", "--filter=ip", "memory", "1M", *rules)

    greeted(socket.AF_VSOCK, (HERE, PORT), source=SOURCE).close()

    assert server.end() == []


@pytest.mark.parametrize(
    "rules",
    [
        ["deny=vsock-cid:1"],
        ["deny=vsock-port:5000"],
        ["deny=anyvsock"],
        ["allow=vsock-cid:2,vsock-port:5001,loopback,anyunix", "deny=all"],
    ],
    ids=" ".join,
)
def test_rules_refuse_the_client(serve: Serve, rules: list[str]) -> None:
    server = serve("--vsock", "--filter=ip", "memory", "1M", *rules)

    with pytest.raises(ConnectionError):
        greeted(socket.AF_VSOCK, (HERE, PORT), source=SOURCE)

    (line,) = server.end()
    assert "vsock 1:5000" in line


def test_clients_that_do_nothing_do_not_keep_the_server(serve: Serve) -> None:
    server = serve("--vsock", "memory", "1M")
    idle, silent = open_export(server.uri), greeted(socket.AF_VSOCK, (HERE, PORT))

    assert server.end() == []

    assert has_ended(silent)
    with pytest.raises(nbd.Error):
        idle.pread(512, 0)


def test_exitlast_sees_the_last_client_leave(serve: Serve) -> None:
    server = serve("--vsock", "--filter=exitlast", "memory", "1M")

    first, last = open_export(server.uri), open_export(server.uri)

    first.shutdown()
    assert last.pread(512, 0) == bytes(512)
    last.shutdown()

    assert server.wait() == []

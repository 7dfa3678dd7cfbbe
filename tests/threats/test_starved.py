"""A server that has run out of descriptors or memory, or was stopped for a while, serves again when that is over."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from nbdkitpy.protocol.constants import Command
from tests.conftest import StartServer
from tests.interop.harness import Server
from tests.nbdclient import NbdClient
from tests.pools import eventually
from tests.serving import CONTENT

MIB = 1 << 20


@contextlib.contextmanager
def serving(directory: Path, *words: str, under: Sequence[str] = ()) -> Iterator[Server]:
    """A server that ends in order, whatever it may have complained of, and without a traceback."""
    server = Server("-U", "-", *words, directory=directory, under=under)
    try:
        yield server
        assert server.is_running, server.log()
        os.kill(server.pid, signal.SIGTERM)
        assert server.status() == 0
        assert "Traceback" not in "\n".join(server.log())
    finally:
        server.kill()


# --- descriptors ---


@pytest.mark.parametrize("workers", [0, 2])
def test_clients_are_accepted_again_when_descriptors_come_back(tmp_path: Path, workers: int) -> None:
    words = (f"--workers={workers}", "--timeout=0", "null", "1M")
    with serving(tmp_path, *words, under=["prlimit", "--nofile=40:40"]) as server:
        crowd = []
        for _ in range(120):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # the queue is full
                sock.connect(server.unix_path)
            crowd.append(sock)
        eventually(lambda: any("Too many open files" in line for line in server.log()))

        for sock in crowd:
            sock.close()

        with NbdClient(server.connect()).negotiate() as client:
            assert client.read(0, 512) == bytes(512)
            client.disconnect()
        assert len(server.log()) < 20


# --- memory ---


def address_space(pid: int) -> int:
    """Bytes that a process has mapped."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def ask_for_much(client: NbdClient) -> int:
    """Have much read and written, and return how many requests have failed."""
    try:
        client.negotiate()
        replies = client.call(Command.WRITE, 0, data=bytes(16 * MIB)), client.call(Command.READ, 0, 16 * MIB)
        return sum(reply.error != 0 for reply in replies)
    except (OSError, EOFError):
        return 1
    finally:
        client.socket.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_clients_that_want_more_memory_than_there_is_fail_and_others_do_not(tmp_path: Path, workers: int) -> None:
    with serving(tmp_path, f"--workers={workers}", "null", "1G") as server, contextlib.ExitStack() as clients:
        bystander = clients.enter_context(NbdClient(server.connect()).negotiate())
        bystander.read(0, 512)
        pid = server.pid if not workers else int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text())
        enough = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space(pid) + 40 * MIB, enough[1]))

        with ThreadPoolExecutor(8) as greedy:
            failed = sum(greedy.map(ask_for_much, [NbdClient(server.connect()) for _ in range(16)]))
        assert failed
        assert bystander.read(0, 512) == bytes(512)

        resource.prlimit(pid, resource.RLIMIT_AS, enough)
        assert ask_for_much(NbdClient(server.connect())) == 0
        assert bystander.read(0, 512) == bytes(512)


@pytest.mark.parametrize("where", ["service.SocketTransport", "service.Session", "service.threading.Thread.start"])
def test_a_client_for_whom_there_is_no_memory_is_turned_away_and_the_next_one_served(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    server = start_server()
    good = server.connect()
    with monkeypatch.context() as without:
        without.setattr(f"nbdkitpy.server.{where}", out_of_memory)
        assert server.dial().at_end()

    assert server.connect().read(0, 512) == good.read(0, 512) == CONTENT[:512]
    assert len(server.sessions()) == 2
    assert [message for message in caplog.messages if message.startswith("cannot serve a client: ")]


def out_of_memory(*_: object, **__: object) -> NoReturn:
    raise MemoryError


# --- time ---


def stopped(pid: int) -> bool:
    """Whether a process does not run any more, though it has not ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_was_stopped_goes_on_where_it_was(tmp_path: Path, workers: int) -> None:
    words = (f"--workers={workers}", "--drain=1", "memory" if not workers else "null", "64M")
    with serving(tmp_path, *words) as server, contextlib.ExitStack() as clients:

        def dial() -> NbdClient:
            return clients.enter_context(NbdClient(server.connect()))

        idle, reading, writing = (dial().negotiate() for _ in range(3))
        silent, late = dial(), dial()
        silent.greet()
        idle.read(0, 512)
        with reading.batched():
            for _ in range(4):
                reading.send(Command.READ, 0, 4 * MIB)
        header = bytes.fromhex("25609513 0000 0001 0000000000000001 0000000000000000 00100000")
        writing.send_bytes(header + bytes(1000))
        pids = [server.pid, *map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())]

        for _ in range(3):
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            eventually(lambda: all(map(stopped, pids)))
            newcomer = dial()
            cookie = idle.send(Command.READ, 4096, 512)
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            assert idle.reply().cookie == cookie
            assert newcomer.negotiate().read(0, 512) == bytes(512)

        assert [len(reading.reply().data) for _ in range(4)] == [4 * MIB] * 4
        writing.send_bytes(bytes(MIB - 1000))
        assert writing.receive_bytes(16)[4:8] == bytes(4)
        for client in (silent, late):
            assert (client.go() if client is silent else client.negotiate()) is not None
            assert client.read(0, 512) == bytes(512)

"""How servers end: in bounded time whatever clients do, with all that was acknowledged, and with nothing left behind.

Names begin with the number of the threat that a test is about: S1 to S7. S4 and S5 are in test_exit.py, others lie
beside the code that they are about.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdkitpy.protocol.constants import Command, NbdError, Option
from nbdkitpy_plugins.file import FilePlugin
from tests.conftest import StartServer
from tests.environment import NBDKITPY
from tests.interop.harness import PATIENCE, Server, Servers, empty_image, make_distribution
from tests.nbdclient import NbdClient

MIB = 1 << 20

#: Seconds that an end may take, whatever clients do.
AT_MOST = 5.0

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


# --- S1: it ends, whatever clients do ---


def silent(server: Server) -> NbdClient:
    return NbdClient(server.connect())


def in_the_handshake(server: Server) -> NbdClient:
    client = silent(server)
    client.greet()
    client.send_bytes(b"IHAVEOPT\0\0")
    return client


def in_the_tls_handshake(server: Server) -> NbdClient:
    client = silent(server)
    client.greet()
    client.option(Option.STARTTLS)
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    client.send_bytes(hello.read()[:-1])
    return client


def idle(server: Server) -> NbdClient:
    client = silent(server).negotiate()
    client.read(0, 512)
    return client


def in_a_header(server: Server) -> NbdClient:
    client = idle(server)
    client.send_bytes(bytes.fromhex("25609513 0000"))
    return client


def in_a_payload(server: Server) -> NbdClient:
    client = idle(server)
    client.send_bytes(bytes.fromhex("25609513 0000 0001 0000000000000001 0000000000000000 00010000") + b"x" * 65535)
    return client


def with_replies_unread(server: Server) -> NbdClient:
    client = idle(server)
    with client.batched():
        for _ in range(64):
            client.send(Command.READ, 0, MIB)
    client.receive_bytes(16)  # they are under way
    return client


STATES = (silent, in_the_handshake, in_the_tls_handshake, idle, in_a_header, in_a_payload, with_replies_unread)
EACH_AND_ALL = [*((state,) for state in STATES), STATES]


@BOTH
@pytest.mark.parametrize(
    "states", [*((state,) for state in STATES), STATES], ids=[*(s.__name__ for s in STATES), "all"]
)
def test_S1_server_ends_in_time_whatever_a_client_does(
    serve: Servers,
    tmp_path: Path,
    certificates: Path,
    number: signal.Signals,
    states: tuple[Callable[[Server], NbdClient], ...],
) -> None:
    image = empty_image(tmp_path / "disk.img", MIB)
    words = ["--workers=2"] if states is STATES else []
    server = serve("--drain=0.3", f"--tls-certificates={certificates}", "--tls=on", *words, "file", image)
    clients = [state(server) for state in states]

    begin = time.monotonic()
    os.kill(server.pid, number)

    assert server.wait() == []
    assert time.monotonic() - begin < AT_MOST
    assert not Path(server.unix_path).parent.exists()
    assert image.read_bytes() == bytes(MIB)
    for client in clients:
        client.socket.close()


# --- S2: what was acknowledged is there, what was refused is not ---

BLOCK = 4096
WRITERS = 4
PIPELINED = 16


class Writer(threading.Thread):
    """Writes blocks that nobody else writes, many at once, until the server ends.

    Args:
        server: Where.
        number: Which of the writers this is.
        enough: Released for each reply.
    """

    def __init__(self, server: Server, number: int, enough: threading.Semaphore) -> None:
        super().__init__()
        self.client = NbdClient(server.connect()).negotiate()
        self._blocks = itertools.count(number, WRITERS)
        self._enough = enough
        #: What became of each block: the error of its reply, if there was one.
        self.errors: dict[int, int] = {}

    def run(self) -> None:
        sent: dict[int, int] = {}
        with contextlib.suppress(OSError, EOFError), self.client:
            while True:
                with self.client.batched():
                    for block in itertools.islice(self._blocks, PIPELINED - len(sent)):
                        sent[self.client.send(Command.WRITE, block * BLOCK, data=content(block))] = block
                reply = self.client.reply()
                self.errors[sent.pop(reply.cookie)] = reply.error
                self._enough.release()


def content(block: int) -> bytes:
    return (block + 1).to_bytes(8, "big") * (BLOCK // 8)


@pytest.mark.parametrize("round_", range(5))
@pytest.mark.parametrize("words", [[], ["--workers=2"]], ids=["one process", "workers"])
def test_S2_under_load_what_is_acknowledged_is_there_and_what_is_refused_is_not(
    serve: Servers, tmp_path: Path, words: list[str], round_: int
) -> None:
    image = empty_image(tmp_path / "disk.img", 1 << 40)
    server = serve(*words, "file", image)
    enough = threading.Semaphore(0)
    writers = [Writer(server, number, enough) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    for _ in range(200 + 97 * round_):
        assert enough.acquire(timeout=PATIENCE)

    begin = time.monotonic()
    server.end()
    assert time.monotonic() - begin < AT_MOST
    for writer in writers:
        writer.join(PATIENCE)

    errors = {block: error for writer in writers for block, error in writer.errors.items()}
    assert set(errors.values()) <= {0, NbdError.ESHUTDOWN}
    with image.open("rb") as disk:
        for block, error in errors.items():
            assert os.pread(disk.fileno(), BLOCK, block * BLOCK) == (bytes(BLOCK) if error else content(block)), block


# --- S3: what does not return ---

#: Reads of its second block never return.
STUCK = """
import threading
from nbdkitpy import Handle, Plugin, ThreadModel, hookimpl

class Stuck(Plugin):
    name = "stuck"

    def thread_model(self):
        return ThreadModel.PARALLEL

    def open(self, export_name, readonly, client):
        return StuckHandle()

class StuckHandle(Handle):
    def get_size(self):
        return 1 << 20

    def pread(self, count, offset):
        if offset == 4096:
            threading.Event().wait()
        return bytes(count)

@hookimpl
def register_plugins(register):
    register(Stuck)
"""


def test_S3_plugin_that_does_not_return_is_abandoned_in_time_with_a_word_and_a_status(
    serve: Servers, tmp_path: Path
) -> None:
    make_distribution(tmp_path, "stuck", plugins=STUCK)
    server = serve("--drain=0.1", "stuck", env={"PYTHONPATH": str(tmp_path)})
    stuck, good = NbdClient(server.connect()).negotiate(), NbdClient(server.connect()).negotiate()
    stuck.send(Command.READ, 4096, 512)
    good.read(0, 512)

    begin = time.monotonic()
    os.kill(server.pid, signal.SIGTERM)

    assert server.wait(status=1) == ["nbdkitpy: error: still held up in the backend, abandoned: stuck[1]"]
    assert time.monotonic() - begin < AT_MOST
    assert not Path(server.unix_path).exists()
    for client in (stuck, good):
        client.socket.close()


# --- S6: the command of --run ---


def test_S6_command_ends_with_the_server_and_its_status_is_ours(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    command = f"echo $$ >{pids}; exec sleep 600"

    with subprocess.Popen([*NBDKITPY, "memory", "1M", "--run", command]) as server:
        watched = os.pidfd_open(int(pids.read_text()))
        server.terminate()
        ended = select.select([watched], [], [], AT_MOST)[0] == [watched]
        if not ended:  # else it would be waited for here
            signal.pidfd_send_signal(watched, signal.SIGKILL)
        status = server.wait(PATIENCE)
    os.close(watched)

    assert ended
    assert status == 128 + signal.SIGTERM


@pytest.mark.parametrize("words", [["file", "/nowhere"], ["-P", "/nowhere/pid", "memory", "1M"]], ids=" ".join)
def test_S6_command_is_not_run_by_a_server_that_does_not_start(tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        [*NBDKITPY, *words, "--run", f"touch {tmp_path}/ran; exit 0"], stderr=subprocess.DEVNULL, timeout=PATIENCE
    )

    assert done.returncode == 1
    assert not (tmp_path / "ran").exists()


# --- S7: clients that leave without a flush ---


class Synced(NamedTuple):
    """A plugin, and how often its files were synced."""

    plugin: FilePlugin
    calls: list[int]


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Synced:
    calls: list[int] = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *args: calls.append(1))
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    plugin = FilePlugin()
    plugin.config("file", str(tmp_path / "disk.img"))
    return Synced(plugin, calls)


def test_S7_client_that_leaves_without_a_flush_makes_the_server_flush_nothing(
    synced: Synced, start_server: StartServer
) -> None:
    server = start_server(synced.plugin)
    client = server.connect()
    client.write(0, b"x" * 65536)

    client.disconnect()
    assert server.stop()

    assert synced.calls == []


def test_S7_client_that_flushes_before_it_leaves_is_flushed_for(synced: Synced, start_server: StartServer) -> None:
    client = start_server(synced.plugin).connect()
    client.write(0, b"x" * 65536)

    assert not client.call(Command.FLUSH).error

    assert synced.calls == [1]
    client.disconnect()

"""Plugins and filters that do what they should not (section 12 of the threats, G)."""

from __future__ import annotations

import faulthandler
import os
import random
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import Command
from nbdkitpy_plugins.file import FilePlugin
from tests.conftest import StartServer
from tests.interop.harness import Server, Servers, make_distribution
from tests.nbdclient import PATIENCE, NbdClient
from tests.pools import eventually
from tests.serving import Running
from tests.threats import filters

MIB = 1 << 20


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Servers]:
    """Starts servers, and sees to it that each of them ends in order and has nothing to say."""
    servers = Servers(tmp_path)
    yield servers
    servers.finish()


# --- G9: the state of the process ---

MEDDLER = """
import gc, locale, os, signal, socket, sys
from nbdkitpy import Handle, Parameter, Plugin, ThreadModel, hookimpl, parse_string

def meddle():
    os.chdir("/proc")
    os.umask(0o777)
    socket.setdefaulttimeout(0.01)
    locale.setlocale(locale.LC_ALL, "C")
    os.environ.clear()
    gc.disable()

class Disk(Handle):
    def get_size(self):
        return 64 << 20
    def pread(self, count, offset):
        meddle()
        return bytes(count)

class Meddler(Plugin):
    name = "meddler"
    multi_process = True
    when = Parameter(parse_string, magic=True)
    def thread_model(self):
        return ThreadModel.PARALLEL
    def meddle_at(self, step):
        if self.when != step:
            return
        meddle()
        if step == "get_ready":
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    def get_ready(self):
        self.meddle_at("get_ready")
    def after_fork(self):
        self.meddle_at("after_fork")
    def open(self, export_name, readonly, client):
        self.meddle_at("open")
        sys.stdout = sys.stderr = sys.stdin = None
        return Disk()

@hookimpl
def register_plugins(register):
    register(Meddler)
"""


def processor_time(pid: int) -> int:
    """What a process and its children that are alive have used, in ticks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) + sum(map(processor_time, map(int, children)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("when", ["get_ready", "after_fork", "open"])
def test_G9_a_plugin_that_changes_the_state_of_the_process_does_no_harm(
    serve: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, workers: int
) -> None:
    make_distribution(tmp_path, "meddler", plugins=MEDDLER)
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "log"
    server = serve.at(
        *("-U", "socket", "-P", "pid", f"--log={log}", f"--workers={workers}", "meddler", when),
        env={"PYTHONPATH": str(tmp_path)},
    )
    monkeypatch.chdir("/")

    client = NbdClient(server.connect()).negotiate()
    used = processor_time(server.pid)
    assert not select.select([client.socket], [], [], 0.5)[0]
    assert processor_time(server.pid) - used < 20, "it does not wait for an idle client, but spins"

    ask_for_much(client)  # so that the server has to wait for the client
    assert not select.select([], [], [], 0.05)[0]
    assert [len(client.reply().data) for _ in range(4)] == [16 * MIB] * 4

    ask_for_much(client)
    client.receive_bytes(16)
    client.socket.close()
    with NbdClient(server.connect()).negotiate() as other:
        assert other.read(0, 512) == bytes(512)

    log.rename(tmp_path / "old")
    os.kill(server.pid, signal.SIGHUP)
    eventually(log.exists)
    assert server.end() == []
    assert not {"socket", "pid"} & set(os.listdir(tmp_path))


def ask_for_much(client: NbdClient) -> None:
    with client.batched():
        for _ in range(4):
            client.send(Command.READ, 0, 16 * MIB)


# --- G3: threads that end ---

KILLER = """
import ctypes
from nbdkitpy import Handle, Plugin, ThreadModel, hookimpl

class Disk(Handle):
    def get_size(self):
        return 1 << 20
    def pread(self, count, offset):
        if offset:
            ctypes.CDLL(None).pthread_exit(None)
        return bytes(count)

class Killer(Plugin):
    name = "killer"
    def thread_model(self):
        return ThreadModel.PARALLEL
    def open(self, export_name, readonly, client):
        return Disk()

@hookimpl
def register_plugins(register):
    register(Killer)
"""


def test_G3_a_thread_that_a_plugin_ends_is_as_one_that_does_not_return(tmp_path: Path) -> None:
    make_distribution(tmp_path, "killer", plugins=KILLER)
    server = Server("-U", "-", "--drain=0.1", "killer", directory=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    try:
        with NbdClient(server.connect()).negotiate() as victim, NbdClient(server.connect()).negotiate() as other:
            victim.send(Command.READ, 512, 512)

            assert other.read(0, 512) == bytes(512)
            os.kill(server.pid, signal.SIGTERM)
            assert other.at_end()
            assert victim.at_end()

        assert server.status() == 1
        assert server.log() == ["nbdkitpy: error: still held up in the backend, abandoned: killer[1]"]
    finally:
        server.kill()


# --- G10: programs that plugins run ---

FORKER = """
import os, subprocess, sys
from nbdkitpy import Handle, Plugin, ThreadModel, hookimpl

class Disk(Handle):
    def get_size(self):
        return 1 << 20
    def pread(self, count, offset):
        if offset:
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
            return bytes(count)
        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], stdout=subprocess.PIPE, close_fds=False)
        return listed.stdout.ljust(count)[:count]

class Forker(Plugin):
    name = "forker"
    multi_process = True
    def thread_model(self):
        return ThreadModel.PARALLEL
    def open(self, export_name, readonly, client):
        return Disk()

@hookimpl
def register_plugins(register):
    register(Forker)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_G10_programs_that_plugins_run_have_nothing_of_ours_and_hold_nothing_up(
    serve: Servers, tmp_path: Path, workers: int
) -> None:
    make_distribution(tmp_path, "forker", plugins=FORKER)
    server = serve(f"--workers={workers}", "forker", env={"PYTHONPATH": str(tmp_path), "PYTHONWARNINGS": "ignore"})
    clients = [NbdClient(server.connect()).negotiate() for _ in range(4)]

    for client in clients:
        with client.batched():
            for number in range(8):
                client.send(Command.READ, number % 2 * 4096, 4096)
    listings = [
        reply.data.decode().split() for client in clients for reply in client.replies(8).values() if any(reply.data)
    ]

    assert len(listings) == 16
    for words in listings:
        opened = [words[place + 1] for place, word in enumerate(words) if word == "->"]
        assert not [target for target in opened if target.startswith(("socket:", "anon_inode:", "/memfd:"))]
        assert len([target for target in opened if target.startswith("pipe:")]) <= 2  # its standard output and error
    for client in clients:
        client.disconnect()


# --- G6: filters together ---


class Owner:
    """A client that has stripes of the disk for itself, and sees that it reads what it has written there.

    Stripes begin and end within blocks, so that clients change parts of the same blocks at once.
    """

    OWNERS = 4
    STRIPE = 1001
    STRIPES = 64  # of all owners together
    START = MIB

    def __init__(self, server: Running, number: int) -> None:
        self._server = server
        self._chance = random.Random(number)
        self._model = dict.fromkeys(range(number, self.STRIPES, self.OWNERS), b"\xa5" * self.STRIPE)
        self.failure: BaseException | None = None

    def run(self, rounds: int) -> None:
        """Come and go so often."""
        try:
            for _ in range(rounds):
                client = self._server.dial()
                try:
                    client.negotiate()
                    self._change(client)
                    self._check(client)
                    client.disconnect()
                finally:
                    client.socket.close()
        except BaseException as error:
            self.failure = error

    def _change(self, client: NbdClient) -> None:
        stripes = self._chance.sample(list(self._model), 8)
        with client.batched():
            for stripe in stripes:
                self._send(client, stripe)
            client.send(Command.FLUSH)
        assert not [reply for reply in client.replies(len(stripes) + 1).values() if reply.error]

    def _send(self, client: NbdClient, stripe: int) -> None:
        at = self.START + stripe * self.STRIPE
        if self._chance.random() < 0.2:
            self._model[stripe] = bytes(self.STRIPE)
            client.send(Command.WRITE_ZEROES, at, self.STRIPE)
        else:
            self._model[stripe] = self._chance.randbytes(self.STRIPE)
            client.send(Command.WRITE, at, data=self._model[stripe])

    def _check(self, client: NbdClient) -> None:
        found = client.read(self.START, self.STRIPES * self.STRIPE)
        for stripe, data in self._model.items():
            assert found[stripe * self.STRIPE :][: self.STRIPE] == data, f"stripe {stripe}"


#: tls-fallback would serve a message, and partition does not find its table behind offset.
TOGETHER = sorted(filters.PARAMETERS.keys() - {"tls-fallback", "partition"})

#: In the first two each filter is before each other one.
ORDERS = [TOGETHER, TOGETHER[::-1], *(random.Random(seed).sample(TOGETHER, len(TOGETHER)) for seed in (1, 2))]


@pytest.mark.parametrize("order", ORDERS, ids=["forwards", "backwards", "some", "others"])
def test_G6_all_filters_together_neither_wait_for_each_other_nor_lose_anything(
    start_server: StartServer, tmp_path: Path, order: list[str]
) -> None:
    plugin = FilePlugin()
    plugin.config("file", str(filters.image(tmp_path / "disk", 2 * MIB)))
    server = start_server(plugin, *(filters.loaded(name, tmp_path) for name in order))
    idle = server.connect()  # so that exitlast does not end the server between two others
    owners = [Owner(server, number) for number in range(Owner.OWNERS)]
    threads = [threading.Thread(target=owner.run, args=(20,)) for owner in owners]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        if thread.is_alive():
            faulthandler.dump_traceback()
            pytest.fail("there is a deadlock")

    assert [owner.failure for owner in owners if owner.failure] == []
    idle.disconnect()
    assert server.join()

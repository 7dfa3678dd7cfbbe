"""Plugins and filters that do what they should not (section 12 of the threats, G)."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import Command
from tests.interop.harness import Servers, make_distribution
from tests.nbdclient import NbdClient
from tests.pools import eventually

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

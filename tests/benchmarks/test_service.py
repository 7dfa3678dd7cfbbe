"""Test how the benchmark starts servers, waits for them, and ends them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError, Target
from benchmarks.figures import MIB
from benchmarks.place import Place
from benchmarks.processes import cpu_seconds, is_alive
from benchmarks.servers import Contender, ours
from benchmarks.service import Running, Service, end, end_stranger
from benchmarks.wire import read_block
from tests.benchmarks.samples import contender

IDLE = "import signal; print('ready', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(15, signal.SIG_IGN)\n" + IDLE

Serve = Callable[..., Service]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with contextlib.ExitStack() as ends:
        yield lambda contender, tcp=False: Service(contender, tmp_path, MIB, tcp=tcp, ends=ends)


def shell(script: str) -> Contender:
    """Return a contender that is a shell script."""
    return Contender("script", ("sh", "-c"), lambda contender, place: [script])


@contextlib.contextmanager
def python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code that prints a line when it is ready."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_server_runs_until_the_end_though_its_filter_would_end_it(tmp_path: Path, tcp: bool) -> None:
    with contextlib.ExitStack() as ends:
        service = Service(replace(ours("null"), filters=3), tmp_path, MIB, tcp=tcp, ends=ends)

        server = service.server
        uri = server.target.uri
        for _ in range(2):
            assert service.server is server
            assert cpu_seconds(server.pid) > 0

        assert server.target == Target(uri, MIB, tmp_path / "image")
        assert uri.startswith("nbd://127.0.0.1:" if tcp else "nbd+unix:///?socket=")
    assert not is_alive(server.pid)
    assert list(tmp_path.iterdir()) == []


def test_each_launch_is_a_server_of_its_own(serve: Serve) -> None:
    service = serve(ours("null"))

    with service.launch() as one, service.launch() as other:
        assert one.place.path != other.place.path
        for running in (one, other):
            with running.client() as connection:
                read_block(connection)


def test_server_finds_what_it_needs_in_its_environment(serve: Serve) -> None:
    with serve(ours("bytearray")).launch() as running, running.client() as connection:
        read_block(connection)


def test_server_that_does_not_start_is_an_error(serve: Serve) -> None:
    service = serve(shell("echo no such disk >&2; exit 1"))

    with pytest.raises(BenchmarkError, match="no server at "), service.launch() as running:
        running.connect()

    assert service.said() == "no such disk\n"


def test_what_is_said_by_each_server_is_kept(serve: Serve) -> None:
    service = serve(shell("echo begin"))

    said = []
    for _ in range(2):
        with service.launch() as running:
            running.process.wait()
            said.append(service.said())

    assert said == ["begin\n", "begin\nbegin\n"]


def test_server_that_does_not_listen_in_time_is_an_error(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.service.START_SECONDS", 0.05)
    service = serve(shell("exec tail -f /dev/null"))

    with pytest.raises(BenchmarkError, match="no server at "), service.launch() as running:
        running.connect()


def test_server_in_the_background_is_found_and_ended_by_its_number(serve: Serve) -> None:
    def background(contender: Contender, place: Place) -> list[str]:
        return ["-P", str(place.pid_file), "-U", str(place.path), "null", str(place.size)]

    service = serve(replace(ours("null"), arguments=background, daemon=True))

    with service.launch() as running:
        with running.client() as connection:
            read_block(connection)
        pid = running.pid
        assert is_alive(pid)
        assert pid != running.process.pid

    assert not is_alive(pid)


def running(process: subprocess.Popen[bytes]) -> Running:
    return Running(contender("python"), Place(Path("/nowhere"), MIB, "s"), process)


def test_server_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.service.STOP_SECONDS", 0.1)

    with python(STUBBORN) as process:
        end(running(process))

    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("code", "by"), [(IDLE, signal.SIGTERM), (STUBBORN, signal.SIGKILL)], ids=["idle", "stubborn"])
def test_stranger_is_ended_by_force_if_need_be(code: str, by: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.service.STOP_SECONDS", 0.5)

    with python(code) as process:
        end_stranger(process.pid)

        assert process.wait() == -by


def test_stranger_that_has_gone_is_left_alone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()

    end_stranger(process.pid)

    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)

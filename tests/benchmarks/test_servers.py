"""Test how the benchmark starts and ends servers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError, Target
from benchmarks.figures import MIB
from benchmarks.processes import cpu_seconds
from benchmarks.servers import (
    NBDKITPY,
    PEERS,
    Address,
    Setup,
    end,
    free_port,
    make_image,
    nbdkit_command,
    qemu_nbd_command,
    serving,
)

IDLE = "import signal; print('ready', flush=True); signal.pause()"


@contextmanager
def python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code that prints a line when it is ready."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


def test_nbdkit_and_ours_are_started_alike() -> None:
    setup = Setup(Path("/tmp/image"), 4 * MIB, filters=2)
    arguments = ["-f", "-U", "/tmp/s", "--filter=ip", "--filter=limit", "file", "/tmp/image", "allow=all", "limit=64"]

    ours = nbdkit_command(NBDKITPY, "file", setup, Address(path="/tmp/s"))
    peer = PEERS["nbdkit-file"].command(setup, Address(path="/tmp/s"))

    assert ours == [sys.executable, "-m", "nbdkitpy", *arguments]
    assert peer == ["nbdkit", *arguments]


def test_memory_is_given_its_size_and_tcp_its_port() -> None:
    command = PEERS["nbdkit-memory"].command(Setup(Path("/tmp/image"), 4096), Address(port=7))

    assert command == ["nbdkit", "-f", "-i", "127.0.0.1", "-p", "7", "memory", "4096"]


@pytest.mark.parametrize(
    ("address", "listen"),
    [(Address(path="/tmp/s"), ["-k", "/tmp/s"]), (Address(port=7), ["-b", "127.0.0.1", "-p", "7"])],
)
def test_qemu_nbd_serves_the_image_raw_to_many(address: Address, listen: list[str]) -> None:
    command = qemu_nbd_command(Setup(Path("/tmp/image"), 4096, filters=3), address)

    assert command == ["qemu-nbd", "--persistent", "--shared=64", "--format=raw", *listen, "/tmp/image"]


@pytest.mark.parametrize(
    ("address", "uri"),
    [(Address(path="/tmp/a b/s"), "nbd+unix:///?socket=/tmp/a%20b/s"), (Address(port=7), "nbd://127.0.0.1:7")],
)
def test_address_has_a_uri(address: Address, uri: str) -> None:
    assert address.uri == uri


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_server_runs_until_the_end_though_its_filter_would_end_it(tmp_path: Path, tcp: bool) -> None:
    address = Address(port=free_port()) if tcp else Address(path=str(tmp_path / "s"))
    setup = Setup(tmp_path / "image", MIB, filters=3)

    with serving(nbdkit_command(NBDKITPY, "memory", setup, address), address, setup.size) as server:
        for _ in range(2):
            address.connect().close()
        assert cpu_seconds(server.pid) > 0
        assert server.target == Target(address.uri, MIB)

    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_server_that_does_not_start_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "s"))

    with (
        pytest.raises(BenchmarkError, match=r"(?s)no server at .*no such disk"),
        serving(["sh", "-c", "echo no such disk; exit 1"], address, MIB),
    ):
        pass


def test_failing_client_is_an_error_with_what_the_server_said(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "s"))
    command = [*NBDKITPY, "-f", "-v", "-U", address.path, "null", "4096"]

    with pytest.raises(BenchmarkError, match=r"(?s)client went wrong\n.*debug"), serving(command, address, 4096):
        raise BenchmarkError("client went wrong")


def test_server_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.servers.STOP_SECONDS", 0.1)

    with python("import signal; signal.signal(15, signal.SIG_IGN)\n" + IDLE) as process:
        end(process)

    assert process.returncode == -9


def test_image_is_random_and_of_the_size_asked_for(tmp_path: Path) -> None:
    make_image(tmp_path / "image", 2 * MIB)

    data = (tmp_path / "image").read_bytes()

    assert len(data) == 2 * MIB
    assert data[:MIB] != data[MIB:]
    assert len(set(data)) == 256

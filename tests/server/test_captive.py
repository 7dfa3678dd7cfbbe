"""The command of --run: its variables, its exit status, and that nothing of it is left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from nbdkitpy.server.captive import Captive


def run(command: str, **variables: str) -> int:
    captive = Captive(command)
    captive.start(variables, lambda: None)
    return captive.wait()


def test_F5_command_finds_the_variables_set_and_not_exported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    value = 'it\'s $HOME `x` "q"\n\\ \udcff'

    status = run(f'printf %s "$uri" > {out}; printf "|%s|" "$empty" >> {out}; env >> {out}', uri=value, empty="")

    assert status == 0
    assert out.read_bytes().startswith(os.fsencode(value) + b"||")
    assert b"\nuri=" not in out.read_bytes()


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("exit 7", 7), ("no-such-command 2>&-", 127)])
def test_S6_status_is_the_commands(command: str, status: int) -> None:
    assert run(command) == status


def test_S6_command_that_a_signal_ends_gives_128_and_the_signal(caplog: pytest.LogCaptureFixture) -> None:
    assert run("kill -9 $$") == 128 + signal.SIGKILL
    assert [record.getMessage() for record in caplog.records] == ["the command of --run was killed by signal 9"]


def test_end_of_the_command_is_told() -> None:
    told = threading.Event()
    captive = Captive("true")

    captive.start({}, told.set)

    assert told.wait(30)
    assert captive.wait() == 0


def waiting(tmp_path: Path, setup: str = "") -> Captive:
    """A command that runs until it is ended, which has got as far as waiting."""
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    captive = Captive(f"{setup}\necho > {ready}\nwhile :; do read line < {ready}; done")
    captive.start({}, lambda: None)
    ready.read_text()
    return captive


def test_command_that_is_told_to_end_gets_sigterm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captive = waiting(tmp_path)

    captive.end()

    assert captive.wait() == 128 + signal.SIGTERM
    assert not caplog.records  # that is no news to the one who sent the signal


def test_command_that_does_not_end_is_killed_the_second_time(tmp_path: Path) -> None:
    captive = waiting(tmp_path, "trap '' TERM")

    captive.end()
    captive.end()

    assert captive.wait() == 128 + signal.SIGKILL


def test_S6_reaping_ends_a_command_that_still_runs(tmp_path: Path) -> None:
    captive = waiting(tmp_path)

    captive.reap()

    assert captive.wait() == 128 + signal.SIGTERM


def test_reaping_a_command_that_has_ended_does_nothing() -> None:
    captive = Captive("exit 5")
    captive.start({}, lambda: None)
    captive.wait()

    captive.reap()

    assert captive.wait() == 5


def test_command_that_is_told_to_end_before_it_starts_is_not_started(tmp_path: Path) -> None:
    captive = Captive(f"touch {tmp_path}/started")

    captive.end()
    captive.start({}, lambda: pytest.fail("it ended"))

    assert captive.wait() == 0
    captive.reap()
    assert not (tmp_path / "started").exists()


def test_signal_while_the_command_is_being_started_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    captive = Captive("while :; do :; done")
    start = subprocess.Popen

    def interrupted(argv: list[str]) -> subprocess.Popen[bytes]:
        captive.end()  # as by a handler that came before there was a process
        return start(argv)

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    captive.start({}, lambda: None)

    assert captive.wait() == 128 + signal.SIGTERM


def test_neither_a_thread_nor_a_handler_of_signals_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, before = threading.active_count(), signal.getsignal(signal.SIGCHLD)
    captive = Captive("exec sleep 60")
    captive.start({}, lambda: None)
    assert threading.active_count() == threads
    captive.reap()
    assert signal.getsignal(signal.SIGCHLD) == before

    def fail(argv: list[str]) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", fail)
    captive = Captive("true")
    with pytest.raises(BlockingIOError):
        captive.start({}, lambda: None)
    captive.reap()
    assert signal.getsignal(signal.SIGCHLD) == before


def test_the_end_of_other_children_is_not_taken_for_the_commands() -> None:
    told: list[bool] = []
    captive = Captive("exec sleep 60")
    captive.start({}, lambda: told.append(True))

    subprocess.run(["true"], check=True)

    assert not told
    captive.reap()
    assert told == [True]


def test_P2_command_has_our_standard_streams_and_no_other_descriptor(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    out = tmp_path / "out"
    try:
        run(f"ls /proc/self/fd > {out}")
    finally:
        os.close(read)
        os.close(write)

    # 3 is the directory that ls reads.
    assert out.read_text().split() == ["0", "1", "2", "3"]

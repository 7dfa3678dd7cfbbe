"""Test how the benchmark counts what servers use."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.processes import ProcessStat, cpu_seconds, family, field, footprint, is_alive, parse_stat, tree

IDLE = "import signal; print('ready', flush=True); signal.pause()"
BURN = "import time\nwhile time.process_time() < 0.2: pass\n"


def test_stat_is_read_whatever_the_process_is_called() -> None:
    times = "1000 200 30 4"
    text = f"77 (a) R 1 (b) S 42 77 77 0 -1 4194560 1 2 3 4 {times} 20 0 1 0 99 0\n"

    assert parse_stat(text) == ProcessStat(parent=42, ticks=1234)


def test_tree_counts_all_descendants_and_no_strangers() -> None:
    processes = {
        1: ProcessStat(0, 1),
        10: ProcessStat(1, 20),
        11: ProcessStat(10, 300),
        12: ProcessStat(11, 4000),
        13: ProcessStat(1, 50000),
    }

    assert set(tree(10, processes)) == {10, 11, 12}


def test_cpu_time_includes_threads_and_children_alive_and_dead() -> None:
    burn = "import subprocess, sys, threading\nBURN = " + repr(BURN) + "\n"
    dead = "subprocess.run([sys.executable, '-c', BURN], check=True)\n"
    alive = f"p = subprocess.Popen([sys.executable, '-c', BURN + {IDLE!r}], stdout=subprocess.PIPE)\n"
    thread = "t = threading.Thread(target=exec, args=(BURN,)); t.start(); t.join()\n"
    wait = "p.stdout.readline(); print('ready', flush=True)\ntry:\n sys.stdin.read()\nfinally:\n p.kill(); p.wait()\n"
    with subprocess.Popen(
        [sys.executable, "-c", burn + dead + alive + thread + wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"

        spent = cpu_seconds(process.pid)

        process.communicate()
    # Three times 0.2 s were burnt; the ticks of 0.01 s may miss parts of that, but never one of the three.
    assert spent >= 2.5 * 0.2


def test_cpu_time_of_a_server_that_ended_is_an_error() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()

    with pytest.raises(BenchmarkError, match=f"{process.pid} has ended"):
        cpu_seconds(process.pid)


def test_footprint_counts_threads_and_memory_of_descendants() -> None:
    child = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {IDLE!r}]); p.wait()"
    with subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"

        both = footprint(process.pid)

        (number,) = set(family(process.pid)) - {process.pid}
        alone = footprint(number)
        os.kill(number, signal.SIGKILL)
    assert (both.threads, alone.threads) == (2, 1)
    assert both.memory > alone.memory > 1_000_000


def test_field_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match=f"/proc/{os.getpid()}/status does not say Wings"):
        field(os.getpid(), "status", "Wings")


def test_process_is_alive_until_it_ends_whether_or_not_its_parent_takes_note() -> None:
    with subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        alive = is_alive(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert (alive, is_alive(process.pid)) == (True, False)
    assert not is_alive(process.pid)

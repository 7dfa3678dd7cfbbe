"""Test how the benchmark counts what servers use."""

import subprocess
import sys

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.processes import ProcessStat, cpu_seconds, parse_stat, tree_ticks

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

    assert tree_ticks(10, processes) == 4320


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

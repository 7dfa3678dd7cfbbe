"""What servers use: processor time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients import BenchmarkError


@dataclass(frozen=True)
class ProcessStat:
    """A process's parent, and the processor time in clock ticks of its threads and of its children that it reaped."""

    parent: int
    ticks: int


def parse_stat(text: str) -> ProcessStat:
    """Return what a /proc/PID/stat says; proc(5) numbers the fields, of which the name may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    parent, *times = (int(fields[number - 3]) for number in (4, 14, 15, 16, 17))
    return ProcessStat(parent, sum(times))


def process_table() -> dict[int, ProcessStat]:
    """Return all processes by their number."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may end at any time.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stats[int(path.parent.name)] = parse_stat(path.read_text(errors="replace"))
    return stats


def tree_ticks(root: int, processes: Mapping[int, ProcessStat]) -> int:
    """Return the clock ticks of process `root` and of all its descendants."""
    children = (number for number, process in processes.items() if process.parent == root)
    return processes[root].ticks + sum(tree_ticks(child, processes) for child in children)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and of its descendants so far, in seconds."""
    processes = process_table()
    if pid not in processes:
        raise BenchmarkError(f"server process {pid} has ended")
    return tree_ticks(pid, processes) / os.sysconf("SC_CLK_TCK")

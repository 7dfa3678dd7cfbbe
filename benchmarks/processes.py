"""What servers use: processor time, memory and threads, with all their descendants."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
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


def tree(root: int, processes: Mapping[int, ProcessStat]) -> Iterator[int]:
    """Yield process `root` and all its descendants."""
    yield root
    for number, process in processes.items():
        if process.parent == root:
            yield from tree(number, processes)


def family(pid: int) -> dict[int, ProcessStat]:
    """Return a process and its descendants by their number."""
    processes = process_table()
    if pid not in processes:
        raise BenchmarkError(f"server process {pid} has ended")
    return {number: processes[number] for number in tree(pid, processes)}


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and of its descendants so far, in seconds."""
    return sum(process.ticks for process in family(pid).values()) / os.sysconf("SC_CLK_TCK")


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that has ended may be there until its parent, or init, takes note."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


@dataclass(frozen=True)
class Footprint:
    """What a server takes up at one moment: bytes of memory (of what it shares its part, PSS), and threads."""

    memory: int
    threads: int


def footprint(pid: int) -> Footprint:
    """Return what a process and its descendants take up."""
    members = family(pid)
    return Footprint(
        1024 * sum(field(number, "smaps_rollup", "Pss") for number in members),
        sum(field(number, "status", "Threads") for number in members),
    )


def field(pid: int, file: str, name: str) -> int:
    """Return the number that stands after `name` in a file of /proc/PID."""
    found = re.search(rf"^{name}:\s*(\d+)", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    if found is None:
        raise BenchmarkError(f"/proc/{pid}/{file} does not say {name}")
    return int(found[1])

"""What clients do to a server."""

from __future__ import annotations

import fnmatch
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.clients import BenchmarkError, Target, run_client
from benchmarks.figures import MIB, Transfer


class Workload(Protocol):
    """Something that a client does to a server."""

    @property
    def name(self) -> str:
        """Name for --only and the report."""
        ...

    @property
    def tool(self) -> str:
        """The client's command."""
        ...

    def run(self, target: Target, seconds: float) -> Transfer:
        """Run the client for about so many seconds, and return what it moved."""
        ...


@dataclass(frozen=True)
class Fio:
    """fio with one connection: `rw` as fio calls it, in blocks of so many bytes, `depth` requests in flight."""

    rw: str
    block: int
    depth: int
    tool: str = "fio"

    @property
    def name(self) -> str:
        size = f"{self.block // MIB}m" if self.block >= MIB else f"{self.block // 1024}k"
        return f"{self.rw}-{size}-d{self.depth}"

    def run(self, target: Target, seconds: float) -> Transfer:
        return parse_fio(run_client(self.command(target, seconds), seconds))

    def command(self, target: Target, seconds: float) -> list[str]:
        """Return fio's command line."""
        options = {
            "name": self.name,
            "ioengine": "nbd",
            "uri": target.uri,
            "rw": self.rw,
            "bs": self.block,
            "iodepth": self.depth,
            "size": target.size,
            "runtime": f"{round(1000 * seconds)}ms",
            "output-format": "json",
        }
        # Without its map of blocks done fio costs less, and so there is more of the servers in what it measures.
        switches = ["--thread", "--time_based", "--norandommap"]
        return [self.tool, *switches, *(f"--{name}={value}" for name, value in options.items())]


@dataclass(frozen=True)
class Copy:
    """nbdcopy of the whole disk to nowhere, over and over for the time given."""

    name: str = "nbdcopy"
    tool: str = "nbdcopy"

    def run(self, target: Target, seconds: float) -> Transfer:
        start = time.monotonic()
        copies, elapsed = 0, 0.0
        while elapsed < seconds or not copies:
            run_client([self.tool, target.uri, "null:"], seconds)
            copies, elapsed = copies + 1, time.monotonic() - start
        return Transfer(copies * target.size, elapsed)


WORKLOADS: tuple[Workload, ...] = (
    Fio("randread", 4096, 1),
    Fio("randread", 4096, 16),
    Fio("randread", 4096, 64),
    Fio("randwrite", 4096, 1),
    Fio("randwrite", 4096, 64),
    Fio("read", 64 << 10, 16),
    Fio("read", MIB, 4),
    Fio("write", 64 << 10, 16),
    Fio("write", MIB, 4),
    Copy(),
)


def parse_fio(output: str) -> Transfer:
    """Return what fio's JSON says of its one job, which reads or writes.

    fio's nbd engine says "fio: connected to NBD server" before it, on the same stream.
    """
    try:
        (job,) = json.loads(output[output.index("{") :])["jobs"]
        side = max((job["read"], job["write"]), key=lambda side: int(side["io_bytes"]))
        p99 = side["clat_ns"]["percentile"]["99.000000"] / 1000
        return Transfer(side["io_bytes"], side["runtime"] / 1000, p99)
    except (KeyError, ValueError) as error:
        raise BenchmarkError(f"fio did no input or output, or its output is not understood:\n{output}") from error


def select(patterns: Sequence[str]) -> list[Workload]:
    """Return the workloads whose name matches one of the patterns; all of them if there is none.

    Raises:
        BenchmarkError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(workload.name, pattern) for workload in WORKLOADS):
            raise BenchmarkError(f'no workload matches "{pattern}"; --list shows their names')
    wanted = patterns or ["*"]
    return [each for each in WORKLOADS if any(fnmatch.fnmatch(each.name, pattern) for pattern in wanted)]

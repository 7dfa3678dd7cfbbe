"""What clients do to a server that runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.clients import BenchmarkError, Target, run_client
from benchmarks.figures import MIB, TRANSFER_METRICS, Metric, Sample, Transfer
from benchmarks.place import chill, make_image
from benchmarks.processes import cpu_seconds
from benchmarks.service import Service

PAGE = 4096


PAGE = 4096


class Workload(Protocol):
    """Something that is done to a server, and what is measured of it."""

    @property
    def name(self) -> str:
        """Name for --only and the report."""
        ...

    @property
    def tools(self) -> Sequence[str]:
        """The commands that it needs."""
        ...

    @property
    def metrics(self) -> Sequence[Metric]:
        """What it measures, the most important first."""
        ...

    @property
    def of_file(self) -> bool:
        """Whether it makes sense with an image alone, and not with what is in memory."""
        ...

    def run(self, service: Service, seconds: float) -> Sample:
        """Do it, for about so many seconds."""
        ...


@dataclass(frozen=True)
class Fio:
    """fio: `rw` as fio calls it, in blocks of so many bytes, `depth` requests in flight on each connection.

    With `cold` the image is not in memory, and is gone through once at most, as it is in memory then. With `aligned`
    the client's buffers begin with a page, as those of qemu and of the kernel do. Else they begin 16 bytes after one,
    where malloc puts them, which some processors are slow to copy a page to.
    """

    rw: str
    block: int
    depth: int
    connections: int = 1
    cold: bool = False
    aligned: bool = False

    tools = ("fio",)
    metrics = TRANSFER_METRICS

    @property
    def name(self) -> str:
        size = f"{self.block // MIB}m" if self.block >= MIB else f"{self.block // 1024}k"
        connections = f"-c{self.connections}" if self.connections > 1 else ""
        return f"{'cold-' * self.cold}{self.rw}-{size}-d{self.depth}{connections}{'-aligned' * self.aligned}"

    @property
    def of_file(self) -> bool:
        return self.cold

    def run(self, service: Service, seconds: float) -> Sample:
        server = service.server
        if self.cold:
            chill(server.target.image)
        before = cpu_seconds(server.pid)
        transfer = parse_fio(run_client(self.command(server.target, seconds), seconds))
        return transfer.sample(cpu_seconds(server.pid) - before)

    def command(self, target: Target, seconds: float) -> list[str]:
        """Return fio's command line."""
        options = {
            "name": self.name,
            "ioengine": "nbd",
            "uri": target.uri,
            "rw": self.rw,
            "rwmixread": 70,
            "bs": self.block,
            "iodepth": self.depth,
            "numjobs": self.connections,
            "size": target.size,
            "runtime": f"{round(1000 * seconds)}ms",
            "output-format": "json",
        }
        # Without its map of blocks done fio costs less, and so there is more of the servers in what it measures.
        switches = ["--thread", "--norandommap", "--group_reporting", *([] if self.cold else ["--time_based"])]
        if self.aligned:
            options["iomem_align"] = PAGE
        return ["fio", *switches, *(f"--{name}={value}" for name, value in options.items())]


def parse_fio(output: str) -> Transfer:
    """Return what fio's JSON says of its one group of jobs. Of reads and writes the slower ones give the latency.

    fio's nbd engine says "fio: connected to NBD server" before it, on the same stream.
    """
    try:
        (group,) = json.loads(output[output.index("{") :])["jobs"]
        sides = [side for side in (group["read"], group["write"]) if side["io_bytes"]]
        seconds = max(side["runtime"] for side in sides) / 1000
        p99 = max(side["clat_ns"]["percentile"]["99.000000"] for side in sides) / 1000
        return Transfer(sum(side["io_bytes"] for side in sides), seconds, p99)
    except (KeyError, ValueError) as error:
        raise BenchmarkError(f"fio did no input or output, or its output is not understood:\n{output}") from error


@dataclass(frozen=True)
class Copy:
    """nbdcopy of the whole disk to nowhere, or of a file to the disk, over and over for the time given."""

    name: str
    to_server: bool = False
    tool: str = "nbdcopy"

    metrics = TRANSFER_METRICS
    of_file = False

    @property
    def tools(self) -> Sequence[str]:
        return (self.tool,)

    def run(self, service: Service, seconds: float) -> Sample:
        server = service.server
        ends = self.ends(server.target)
        before, start = cpu_seconds(server.pid), time.monotonic()
        copies, elapsed = 0, 0.0
        while elapsed < seconds or not copies:
            run_client([self.tool, *ends], seconds)
            copies, elapsed = copies + 1, time.monotonic() - start
        return Transfer(copies * server.target.size, elapsed).sample(cpu_seconds(server.pid) - before)

    def ends(self, target: Target) -> tuple[str, str]:
        """Return from where to where the copy goes; a file to copy is made if there is none yet."""
        if not self.to_server:
            return target.uri, "null:"
        file = target.image.with_name("to-copy")
        if not file.exists():
            make_image(file, target.size)
        return str(file), target.uri


TRANSFERS: tuple[Workload, ...] = (
    Fio("randread", 4096, 1),
    Fio("randread", 4096, 16),
    Fio("randread", 4096, 64),
    Fio("randwrite", 4096, 1),
    Fio("randwrite", 4096, 64),
    Fio("randrw", 4096, 16),
    Fio("read", 64 << 10, 16),
    Fio("read", MIB, 4),
    Fio("read", 64 << 10, 16, aligned=True),
    Fio("read", MIB, 4, aligned=True),
    Fio("write", 64 << 10, 16),
    Fio("write", MIB, 4),
    Fio("randread", 4096, 16, connections=4),
    Fio("read", MIB, 16, connections=4),
    Fio("read", MIB, 16, connections=4, aligned=True),
    Copy("nbdcopy"),
    Copy("nbdcopy-write", to_server=True),
    Fio("randread", 4096, 16, cold=True),
    Fio("read", MIB, 4, cold=True),
)

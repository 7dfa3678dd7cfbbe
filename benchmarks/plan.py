"""The benchmark: what is run, one server after the other."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.clients import BenchmarkError, run_client, version
from benchmarks.figures import MIB, Comparison, Sample
from benchmarks.processes import cpu_seconds
from benchmarks.report import markdown, save, summary
from benchmarks.servers import (
    FILTERS,
    NBDKITPY,
    PEERS,
    Address,
    Server,
    Setup,
    free_port,
    make_image,
    nbdkit_command,
    serving,
)
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Plan:
    """What to run: each workload `pairs` times on each server, for `seconds`, on a disk of `size` bytes."""

    peer: str
    workloads: Sequence[Workload]
    pairs: int
    seconds: float
    size: int
    filters: int
    tcp: bool
    directory: str | None

    def tools(self) -> list[str]:
        """Return the clients' commands, each once."""
        filler = ["nbdcopy"] if PEERS[self.peer].plugin == "memory" else []
        return sorted({*(workload.tool for workload in self.workloads), *filler})

    def check(self) -> None:
        """Raise BenchmarkError if a command is not installed."""
        missing = [tool for tool in (PEERS[self.peer].tool, *self.tools()) if shutil.which(tool) is None]
        if missing:
            raise BenchmarkError(f"not installed: {', '.join(missing)}")

    def facts(self) -> dict[str, str]:
        """Return what one has to know to make sense of the figures."""
        peer = PEERS[self.peer]
        filters = ", ".join(name for name, _ in FILTERS[: self.filters]) or "none"
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} processors, {platform.platform()}, load {os.getloadavg()[0]:.2f} before",
            "ours": f"{version([*NBDKITPY, '--version'])}, plugin {peer.plugin}, Python {platform.python_version()}",
            "peer": f"{self.peer}, {version([peer.tool, '--version'])}",
            "clients": ", ".join(version([tool, "--version"]) for tool in self.tools()),
            "runs": f"{self.pairs} pairs of {self.seconds:g} s, disk of {self.size // MIB} MiB",
            "transport": "TCP on loopback" if self.tcp else "Unix socket",
            "filters": filters if peer.filters or not self.filters else f"{filters} (ours alone)",
        }


@contextlib.contextmanager
def both(plan: Plan) -> Iterator[tuple[Server, Server]]:
    """Run nbdkitpy and the peer on the same data."""
    peer = PEERS[plan.peer]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdkitpy-", dir=plan.directory)))
        setup = Setup(directory / "image", plan.size, plan.filters)
        make_image(setup.image, setup.size)

        def start(name: str, command: Callable[[Setup, Address], list[str]]) -> Server:
            address = Address(port=free_port()) if plan.tcp else Address(path=str(directory / name))
            server = stack.enter_context(serving(command(setup, address), address, setup.size))
            if peer.plugin == "memory":
                run_client(["nbdcopy", str(setup.image), server.target.uri], 0)
            return server

        yield start("ours", partial(nbdkit_command, NBDKITPY, peer.plugin)), start("peer", peer.command)


def measure(workload: Workload, server: Server, seconds: float) -> Sample:
    """Run a workload once."""
    before = cpu_seconds(server.pid)
    transfer = workload.run(server.target, seconds)
    return Sample(transfer, cpu_seconds(server.pid) - before)


def compare(workload: Workload, ours: Server, peer: Server, plan: Plan) -> Comparison:
    """Run a workload on the one, then on the other, and so on."""
    pairs = [(measure(workload, ours, plan.seconds), measure(workload, peer, plan.seconds)) for _ in range(plan.pairs)]
    return Comparison(workload.name, pairs)


def carry_out(plan: Plan, prefix: Path) -> None:
    """Run the plan; save the report after each workload, and print it in the end."""
    plan.check()
    facts = plan.facts()
    comparisons: list[Comparison] = []
    with both(plan) as (ours, peer):
        for workload in plan.workloads:
            comparison = compare(workload, ours, peer, plan)
            comparisons.append(comparison)
            print(f"{workload.name}: {summary(comparison)}", file=sys.stderr, flush=True)
            save(prefix, facts, comparisons)
    print(markdown(facts, comparisons), end="")

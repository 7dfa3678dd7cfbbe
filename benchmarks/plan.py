"""What is run: each case in rounds, in which each server has its turn."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.clients import BenchmarkError, version
from benchmarks.figures import MIB, Comparison, Figure, Metric, Sample
from benchmarks.place import make_image
from benchmarks.servers import BARE, NBDKIT_SCRIPT, SYSTEM, Contender, build_bare
from benchmarks.service import Service
from benchmarks.workloads import Workload


@dataclass(frozen=True)
class Goal:
    """What a figure has to be: `bound` at the least if more is better, else at the most.

    It is the ratio to the peer, or, unless `of_ratio`, our own value.
    """

    metric: Metric
    bound: float
    of_ratio: bool = True

    def value(self, figure: Figure) -> float | None:
        """Return what the bound is for."""
        return figure.ratio if self.of_ratio else figure.ours

    def is_met(self, figure: Figure) -> bool:
        """Return whether it is known, and good enough."""
        value = self.value(figure)
        if value is None:
            return False
        return value >= self.bound if self.metric.more else value <= self.bound


@dataclass(frozen=True)
class Case:
    """A workload on ours and on its peers, and what is to come of it with the hardest of those in `judges`."""

    name: str
    workload: Workload
    ours: Contender
    peers: Sequence[Contender]
    goals: Sequence[Goal] = ()
    judges: Sequence[str] = ()


@dataclass
class Result:
    """What came of a case: comparisons with the peers that worked, and why others, or all, did not."""

    case: Case
    comparisons: list[Comparison] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def judged(self) -> Comparison | None:
        """Return the comparison that the goals are for: that with the peer which is best at the first of them."""
        fit = [each for each in self.comparisons if each.peer in self.case.judges]
        if not self.case.goals or not fit:
            return None
        metric = self.case.goals[0].metric
        known = [(each.figure(metric).ratio, each) for each in fit]
        ranked = sorted(((ratio, each) for ratio, each in known if ratio is not None), key=lambda pair: pair[0])
        return ranked[0 if metric.more else -1][1] if ranked else fit[0]

    def verdicts(self) -> list[tuple[Goal, Comparison | None, bool]]:
        """Return each goal with the comparison that it was judged by, and whether it is met."""
        comparison = self.judged()
        return [
            (goal, comparison, comparison is not None and goal.is_met(comparison.figure(goal.metric)))
            for goal in self.case.goals
        ]

    @property
    def is_good(self) -> bool:
        """Whether nothing failed, and all goals are met."""
        return not self.failures and all(met for _, _, met in self.verdicts())


@dataclass(frozen=True)
class Plan:
    """What to run: each case in `pairs` rounds, `seconds` for each server, on a disk of `size` bytes."""

    cases: Sequence[Case]
    pairs: int = 5
    seconds: float = 2.0
    size: int = 512 * MIB
    tcp: bool = False
    directory: Path | None = None

    def contenders(self) -> dict[str, Contender]:
        """Return all servers by what they are called, ours first."""
        found: dict[str, Contender] = {}
        for case in self.cases:
            for contender in (case.ours, *case.peers):
                found.setdefault(contender.name, contender)
        return found

    def root(self) -> Path:
        """Return the root directory in which the image has to be.

        Raises:
            BenchmarkError: there is more than one besides the system's.
        """
        roots = {contender.root for contender in self.contenders().values()} - {SYSTEM}
        if len(roots) > 1:
            raise BenchmarkError("servers with different root directories cannot serve one image")
        return next(iter(roots), SYSTEM)

    def tools(self) -> list[str]:
        """Return the clients' commands, each once."""
        filler = [("nbdcopy",) for case in self.cases if case.ours.source == "memory"]
        return sorted({tool for tools in (*(case.workload.tools for case in self.cases), *filler) for tool in tools})

    def check(self) -> None:
        """Make what can be made, and raise BenchmarkError if a command is not installed."""
        contenders = self.contenders().values()
        if any(contender.program == (str(BARE),) for contender in contenders):
            build_bare()
        wanted = dict.fromkeys([*(contender.invocation[0] for contender in contenders), *self.tools()])
        missing = [tool for tool in wanted if shutil.which(tool) is None]
        if missing:
            raise BenchmarkError(f"not installed: {', '.join(missing)}")

    def facts(self) -> dict[str, str]:
        """Return what one has to know to make sense of the figures."""
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} × {processor()}, {platform.platform()}, load {os.getloadavg()[0]:.2f} before",
            "Python": platform.python_version(),
            **{name: described(contender) for name, contender in self.contenders().items()},
            "clients": ", ".join(version([tool, "--version"]) for tool in self.tools()) or "our own",
            "runs": f"{self.pairs} rounds, {self.seconds:g} s for each server, disk of {self.size // MIB} MiB",
            "transport": "TCP on loopback" if self.tcp else "Unix socket",
        }


def processor() -> str:
    """Return the name of the processor, if the system knows it."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def described(contender: Contender) -> str:
    """Return what a server is, and how it was told to be different."""
    filters = f", {contender.filters} filters" if contender.filters else ""
    return f"{contender.version()}{filters}{''.join(f' {option}' for option in contender.options)}"


@contextlib.contextmanager
def workspace(plan: Plan) -> Iterator[Path]:
    """Return a directory with the image, and what else servers read, for a while."""
    root = plan.root()
    parent = plan.directory or (root / "tmp" if root != SYSTEM else None)
    with tempfile.TemporaryDirectory(prefix="nbdkitpy-", dir=parent) as name:
        directory = Path(name).resolve()
        make_image(directory / "image", plan.size)
        shutil.copy(NBDKIT_SCRIPT, directory)
        yield directory


def carry_out(plan: Plan) -> Iterator[tuple[Mapping[str, str], Sequence[Result]]]:
    """Run the plan; yield the facts and all results so far after each case."""
    plan.check()
    facts = plan.facts()
    results: list[Result] = []
    with workspace(plan) as directory:
        for case in plan.cases:
            print(f"{case.name} ...", file=sys.stderr, flush=True)
            results.append(run_case(case, plan, directory))
            yield facts, results


def run_case(case: Case, plan: Plan, directory: Path) -> Result:
    """Run a case, on servers of its own; whatever goes wrong with one of them is noted, and the others go on."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in (case.ours, *case.peers)}
    failures: dict[str, str] = {}
    with contextlib.ExitStack() as ends:
        services = [
            Service(contender, directory, plan.size, tcp=plan.tcp, ends=ends) for contender in (case.ours, *case.peers)
        ]
        for service in turns(services, plan.pairs):
            name = service.contender.name
            if name in failures or case.ours.name in failures:
                continue
            try:
                samples[name].append(case.workload.run(service, plan.seconds))
            except (BenchmarkError, OSError) as error:
                failures[name] = f"{error}\n{service.said()}".rstrip()
    return Result(case, comparisons(case, samples, failures), failures)


def turns(services: Sequence[Service], rounds: int) -> Iterator[Service]:
    """Yield each service once a round; every second round backwards, so that drift hits all alike."""
    for number in range(rounds):
        yield from services if number % 2 == 0 else reversed(services)


def comparisons(case: Case, samples: Mapping[str, Sequence[Sample]], failures: Mapping[str, str]) -> list[Comparison]:
    """Return ours beside each peer that worked, if ours did."""
    if case.ours.name in failures:
        return []
    return [
        Comparison(case.name, peer.name, case.workload.metrics, list(zip(samples[case.ours.name], samples[peer.name])))
        for peer in case.peers
        if peer.name not in failures
    ]

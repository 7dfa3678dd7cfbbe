"""Cases and results for tests, that nothing was run for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.clients import BenchmarkError
from benchmarks.figures import LIMIT, THROUGHPUT, TRANSFER_METRICS, Comparison, Metric, Sample
from benchmarks.place import Place
from benchmarks.plan import Case, Goal, Result
from benchmarks.servers import Contender
from benchmarks.service import Service


def no_arguments(contender: Contender, place: Place) -> list[str]:
    return []


def contender(name: str) -> Contender:
    """Return a contender that is not to be started."""
    return Contender(name, ("true",), no_arguments)


@dataclass(frozen=True)
class Recorder:
    """A workload that notes where it ran, measures how often it has so far, and fails on what is called bad."""

    ran: list[str] = field(default_factory=list)
    name: str = "recorder"
    tools: Sequence[str] = ("true",)
    metrics: Sequence[Metric] = TRANSFER_METRICS
    of_file: bool = False

    def run(self, service: Service, seconds: float) -> Sample:
        self.ran.append(service.contender.name)
        if service.contender.name == "bad":
            raise BenchmarkError("it broke")
        return {"throughput": len(self.ran)}


def case(*peers: str, ours: str = "ours", goals: Sequence[Goal] = (), judges: Sequence[str] = ()) -> Case:
    """Return a case of a workload that records."""
    return Case("w", Recorder(), contender(ours), [contender(peer) for peer in peers], goals, judges)


def compared(peer: str, ours: float, theirs: float, metric: Metric = THROUGHPUT) -> Comparison:
    """Return a comparison of one pair."""
    return Comparison("w", peer, TRANSFER_METRICS, [({metric.name: ours}, {metric.name: theirs})])


def result(goals: Sequence[Goal], *comparisons: Comparison) -> Result:
    """Return what came of a case whose peers are all judges but for the limit."""
    peers = [comparison.peer for comparison in comparisons if comparison.peer != LIMIT]
    return Result(case(*peers, goals=goals, judges=peers), list(comparisons))

"""Test in which order the benchmark runs what."""

import os
from dataclasses import dataclass, field

from benchmarks.clients import Target
from benchmarks.figures import MIB, Transfer
from benchmarks.plan import Plan, compare
from benchmarks.servers import Server


@dataclass(frozen=True)
class Recorder:
    """A workload that notes where it ran."""

    uris: list[str] = field(default_factory=list)
    name: str = "recorder"
    tool: str = "true"

    def run(self, target: Target, seconds: float) -> Transfer:
        self.uris.append(target.uri)
        return Transfer(len(self.uris), seconds)


def test_runs_alternate_between_ours_and_the_peer() -> None:
    workload = Recorder()
    ours, peer = (Server(os.getpid(), Target(uri, MIB)) for uri in ("ours", "peer"))
    plan = Plan("nbdkit-file", [workload], 3, 0.5, MIB, 0, False, None)

    comparison = compare(workload, ours, peer, plan)

    assert workload.uris == ["ours", "peer"] * 3
    assert [(a.transfer.bytes, b.transfer.bytes) for a, b in comparison.pairs] == [(1, 2), (3, 4), (5, 6)]

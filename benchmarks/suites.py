"""What can be run by a name: single workloads against chosen peers, and the proof."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.clients import BenchmarkError
from benchmarks.figures import CPU, LIMIT, MIB, THROUGHPUT
from benchmarks.plan import Case, Goal
from benchmarks.servers import PEERS, SYSTEM, Contender, ours
from benchmarks.starts import OVER_PYTHON, Idle, Start, memory_at
from benchmarks.workloads import PAGE, TRANSFERS, Workload

WORKLOADS: Sequence[Workload] = (*TRANSFERS, Start(), Idle())

#: Throughput at least, and processor time at most, ours ÷ that of nbdkit's file plugin; more options for ours.
Bounds = tuple[float, float | None, tuple[str, ...]]
PROOF: dict[str, Bounds] = {
    "randread-4k-d1": (1.2, 0.8, ()),
    "randread-4k-d16": (1.4, 0.7, ()),
    "randread-4k-d64": (1.4, 0.7, ()),
    "randwrite-4k-d64": (1.2, 0.8, ()),
    "read-64k-d16": (1.4, 0.5, ()),
    "read-1m-d4": (2.0, 0.2, ()),
    "read-64k-d16-aligned": (1.4, 0.5, ()),
    "read-1m-d4-aligned": (2.0, 0.2, ()),
    "write-64k-d16": (1.0, 1.0, ()),
    "write-1m-d4": (1.0, 1.0, ()),
    "randread-4k-d16-c4": (1.4, 0.7, ("--workers", "2")),
    "read-1m-d16-c4": (2.0, 0.2, ("--workers", "2")),
    "read-1m-d16-c4-aligned": (2.0, 0.2, ("--workers", "2")),
    "nbdcopy": (1.8, None, ()),
}
#: Requests a second of a plugin whose coroutines take 5 ms each, with 64 in flight.
COROUTINES = Goal(THROUGHPUT, 10_000 * PAGE / MIB, of_ratio=False)

WITHOUT_FILTERS = "ours, no filters"


def workload(name: str) -> Workload:
    """Return the workload of that name."""
    return next(each for each in WORKLOADS if each.name == name)


def matching(patterns: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """Return the cases whose workload's name matches one of the patterns; all of them if there is none.

    Raises:
        BenchmarkError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(case.workload.name, pattern) for case in cases):
            raise BenchmarkError(f'no workload matches "{pattern}"; --list shows their names')
    wanted = patterns or ["*"]
    return [case for case in cases if any(fnmatch.fnmatch(case.workload.name, pattern) for pattern in wanted)]


def single_cases(our_options: Sequence[str], filters: int, peers: Sequence[Contender]) -> list[Case]:
    """Return each workload with those peers for which it makes sense, and ours serving what they do."""
    cases = []
    for source in dict.fromkeys(peer.source for peer in peers):
        ours_here = replace(ours(source), options=tuple(our_options), filters=filters)
        alike = [peer for peer in peers if peer.source == source]
        cases += [Case(each.name, each, ours_here, alike) for each in WORKLOADS if source == "file" or not each.of_file]
    return cases


def proof_cases(our_options: Sequence[str], nbdkit_root: Path) -> list[Case]:
    """Return the whole table that we hold ourselves to.

    With another root directory, nbdkit of there and of the system are compared with, and what counts is whichever is
    faster.
    """
    cases = [
        against_nbdkit(workload(name), "nbdkit-file", (*options, *our_options), nbdkit_root, bounds(least, most))
        for name, (least, most, options) in PROOF.items()
    ]
    common = (tuple(our_options), nbdkit_root)
    random_read = workload("randread-4k-d16")
    return [
        *cases,
        against_nbdkit(random_read, "nbdkit-python-parallel", *common, bounds(4.0, 0.4)),
        against_nbdkit(workload("randread-4k-d64"), "nbdkit-delayed", *common, [COROUTINES]),
        filters_cost(random_read, tuple(our_options)),
        against_nbdkit(Idle(), "nbdkit-file", *common, memory_bounds(Idle())),
        against_nbdkit(Start(), "nbdkit-null", *common, [Goal(OVER_PYTHON, 120.0, of_ratio=False)]),
    ]


def bounds(throughput: float, cpu: float | None) -> list[Goal]:
    """Return the goals for throughput at least, and processor time at most."""
    return [Goal(THROUGHPUT, throughput), *([] if cpu is None else [Goal(CPU, cpu)])]


def memory_bounds(idle: Idle) -> list[Goal]:
    """Return the goals for the memory of the most clients: no more than nbdkit's, and not more than 100 MB."""
    memory = memory_at(max(idle.clients))
    return [Goal(memory, 1.0), Goal(memory, 100.0, of_ratio=False)]


def against_nbdkit(
    workload: Workload, peer_name: str, our_options: tuple[str, ...], root: Path, goals: Sequence[Goal]
) -> Case:
    """Return a case whose judges are the nbdkits that there are; beside a file, how far the limit is, is shown too."""
    peer = PEERS[peer_name]
    judges = in_roots(peer, root)
    limit = [PEERS[LIMIT]] if peer.source == "file" and CPU in workload.metrics else []
    mine = replace(ours(peer.source), options=our_options)
    name = f"{workload.name}{''.join(f' {option}' for option in our_options)}"
    name = name if peer.source == "file" else f"{name} ({peer.source})"
    return Case(name, workload, mine, [*judges, *limit], goals, [judge.name for judge in judges])


def in_roots(peer: Contender, root: Path) -> list[Contender]:
    """Return a peer in the system's root directory, and in another if there is one, told apart by their versions."""
    if root == SYSTEM:
        return [peer]
    both = (peer, replace(peer, root=root))
    return [replace(each, name=f"{each.name} {each.version().split()[1]}") for each in both]


def filters_cost(workload: Workload, our_options: tuple[str, ...]) -> Case:
    """Return ours with three filters beside ours with none."""
    plain = replace(ours("file"), options=our_options)
    peer = replace(plain, name=WITHOUT_FILTERS)
    name = f"{workload.name} (3 filters)"
    return Case(name, workload, replace(plain, filters=3), [peer], [Goal(THROUGHPUT, 0.98)], [peer.name])

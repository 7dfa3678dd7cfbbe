"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.clients import BenchmarkError
from benchmarks.figures import MIB
from benchmarks.plan import Plan, carry_out
from benchmarks.servers import FILTERS, PEERS
from benchmarks.workloads import Workload, select


def whole_number(text: str) -> int:
    """Return a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, not "{text}"')
    return value


def duration(text: str) -> float:
    """Return a time in seconds: a millisecond at least, which is fio's unit, and an hour at most."""
    value = float(text)
    if not 0.001 <= value <= 3600:
        raise argparse.ArgumentTypeError(f'must be 0.001 to 3600 seconds, not "{text}"')
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--peer", choices=PEERS, default="nbdkit-file", help="server to compare with (%(default)s)")
    add("--pairs", type=whole_number, default=5, metavar="N", help="runs of each workload on each server (%(default)s)")
    add("--runtime", type=duration, default=5.0, metavar="SECONDS", help="length of a run (%(default)s)")
    add("--size", type=whole_number, default=512, metavar="MIB", help="size of the disk, in MiB (%(default)s)")
    add("--only", action="append", default=[], metavar="PATTERN", help="workloads to run, as 'randread-*'; repeatable")
    add("--list", action="store_true", help="show the names of the workloads, and end")
    add("--filters", type=int, choices=range(len(FILTERS) + 1), default=0, help="so many filters that let all through")
    add("--tcp", action="store_true", help="TCP on loopback instead of Unix sockets")
    add("--directory", metavar="DIR", help="where to put the image while it is needed (the system's place)")
    add("--save", default="build/benchmark", metavar="PREFIX", help="write PREFIX.json and .md (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = parser().parse_args(argv)
    try:
        workloads = select(arguments.only)
        if arguments.list:
            print("\n".join(workload.name for workload in workloads))
        else:
            carry_out(plan_of(arguments, workloads), Path(arguments.save))
    except (BenchmarkError, OSError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    return 0


def plan_of(arguments: argparse.Namespace, workloads: Sequence[Workload]) -> Plan:
    """Return what the command line asks for."""
    return Plan(
        peer=arguments.peer,
        workloads=workloads,
        pairs=arguments.pairs,
        seconds=arguments.runtime,
        size=arguments.size * MIB,
        filters=arguments.filters,
        tcp=arguments.tcp,
        directory=arguments.directory,
    )

"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.clients import BenchmarkError
from benchmarks.figures import MIB
from benchmarks.plan import Case, Plan, Result, carry_out
from benchmarks.report import markdown, save, summary
from benchmarks.servers import FILTERS, PEERS, SYSTEM, Contender, nbdkit_arguments
from benchmarks.starts import compile_ours
from benchmarks.suites import matching, proof_cases, single_cases

DESCRIPTION = "Compare nbdkitpy with other NBD servers, side by side on this machine."


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


def directory(text: str) -> Path:
    """Return a directory that exists, by its full name."""
    path = Path(text).resolve()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f'there is no directory "{text}"')
    return path


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="compare.py", description=DESCRIPTION)
    what = parser.add_argument_group("what is run").add_argument
    what("--suite", choices=["proof"], help="all that we claim, with its targets, instead of chosen peers and filters")
    what("--peer", choices=PEERS, action="append", help="server to compare with; repeatable (nbdkit-file)")
    what("--only", action="append", default=[], metavar="PATTERN", help="workloads to run, as 'randread-*'; repeatable")
    what("--list", action="store_true", help="show the names of the workloads, and end")
    what(
        "--pairs", type=whole_number, default=5, metavar="N", help="runs of each workload on each server (%(default)s)"
    )
    what("--runtime", type=duration, default=2.0, metavar="SECONDS", help="length of a run (%(default)s)")
    how = parser.add_argument_group("how the servers are run").add_argument
    how("--size", type=whole_number, default=512, metavar="MIB", help="size of the disk, in MiB (%(default)s)")
    how("--tcp", action="store_true", help="TCP on loopback instead of Unix sockets")
    how("--filters", type=int, choices=range(len(FILTERS) + 1), default=0, help="so many filters that let all through")
    how("--peer-filters", type=int, choices=range(len(FILTERS) + 1), help="so many for peers (as for ours)")
    how("--ours-options", type=shlex.split, default=[], metavar="WORDS", help="more options for ours: '--workers 2'")
    how("--peer-options", type=shlex.split, default=[], metavar="WORDS", help="more options for peers")
    how("--peer-python", type=shlex.split, metavar="COMMAND", help="what --peer ours runs, such as another checkout's")
    how("--nbdkit-root", type=directory, default=SYSTEM, metavar="DIR", help="run nbdkit with this root directory")
    where = parser.add_argument_group("where things go").add_argument
    where("--directory", type=directory, metavar="DIR", help="for the image while it is needed (the system's place)")
    where("--save", default="build/benchmark", metavar="PREFIX", help="write PREFIX.json, .md and .svg (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status, which is 1 if something failed or a target was not met."""
    arguments = parser().parse_args(argv)
    try:
        cases = matching(arguments.only, cases_of(arguments))
        if arguments.list:
            print("\n".join(dict.fromkeys(case.workload.name for case in cases)))
            return 0
        allow_open_files()
        compile_ours()
        return run(plan_of(arguments, cases), Path(arguments.save))
    except (BenchmarkError, OSError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1


def run(plan: Plan, prefix: Path) -> int:
    """Run a plan, save the report after each case, print it in the end, and return the exit status."""
    facts: Mapping[str, str] = {}
    results: Sequence[Result] = []
    for facts, results in carry_out(plan):
        print(summary(results[-1]), file=sys.stderr, flush=True)
        save(prefix, facts, results)
    print(markdown(facts, results), end="")
    return 0 if all(result.is_good for result in results) else 1


def cases_of(arguments: argparse.Namespace) -> list[Case]:
    """Return all that the command line could mean."""
    if arguments.suite:
        return proof_cases(arguments.ours_options, arguments.nbdkit_root)
    peers = [peer_of(arguments, PEERS[name]) for name in dict.fromkeys(arguments.peer or ["nbdkit-file"])]
    return single_cases(arguments.ours_options, arguments.filters, peers)


def peer_of(arguments: argparse.Namespace, peer: Contender) -> Contender:
    """Return a peer as the command line wants it."""
    if peer.arguments is nbdkit_arguments:
        filters = arguments.filters if arguments.peer_filters is None else arguments.peer_filters
        peer = replace(peer, filters=filters)
    if peer.name == "ours":
        return replace(
            peer,
            name="ours, as the peer",
            program=tuple(arguments.peer_python or peer.program),
            options=tuple(arguments.peer_options),
        )
    root = arguments.nbdkit_root if peer.program == ("nbdkit",) else SYSTEM
    return replace(peer, options=tuple(arguments.peer_options), root=root)


def plan_of(arguments: argparse.Namespace, cases: Sequence[Case]) -> Plan:
    """Return what the command line asks for."""
    return Plan(
        cases=cases,
        pairs=arguments.pairs,
        seconds=arguments.runtime,
        size=arguments.size * MIB,
        tcp=arguments.tcp,
        directory=arguments.directory,
    )


def allow_open_files() -> None:
    """Have as many open files, ourselves and in the servers that we start, as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

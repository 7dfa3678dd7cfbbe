"""Test what the benchmark tells clients to do, and reads of their output."""

import json

import pytest

from benchmarks.clients import BenchmarkError, Target
from benchmarks.figures import MIB, Transfer
from benchmarks.workloads import WORKLOADS, Copy, Fio, parse_fio, select


def fio_output(**sides: object) -> str:
    nothing = {"io_bytes": 0, "runtime": 0, "clat_ns": {}}
    job = {"read": nothing, "write": nothing, **sides}
    return "fio: connected to NBD server\n" + json.dumps({"jobs": [job]})


@pytest.mark.parametrize("side", ["read", "write"])
def test_fio_output_is_read_past_what_its_engine_says(side: str) -> None:
    moved = {"io_bytes": 4096, "runtime": 250, "clat_ns": {"percentile": {"50.000000": 9, "99.000000": 7000}}}

    assert parse_fio(fio_output(**{side: moved})) == Transfer(bytes=4096, seconds=0.25, p99=7.0)


@pytest.mark.parametrize("output", ["", "fio: connected to NBD server\n", "{}", '{"jobs": []}', "{", fio_output()])
def test_fio_output_without_figures_is_an_error(output: str) -> None:
    with pytest.raises(BenchmarkError, match="fio did no input or output"):
        parse_fio(output)


def test_fio_is_told_what_to_do() -> None:
    command = Fio("randread", 4096, 16).command(Target("nbd://here", 8 * MIB), 0.3)

    assert command[0] == "fio"
    assert {
        "--ioengine=nbd",
        "--uri=nbd://here",
        "--rw=randread",
        "--bs=4096",
        "--iodepth=16",
        f"--size={8 * MIB}",
        "--runtime=300ms",
        "--time_based",
        "--output-format=json",
    } <= set(command)


def test_copy_runs_once_at_least_and_counts_what_it_copied() -> None:
    target = Target("nbd://here", 5 * MIB)

    once, often = Copy(tool="true").run(target, 0), Copy(tool="true").run(target, 0.05)

    assert once.bytes == 5 * MIB
    assert often.bytes % (5 * MIB) == 0
    assert often.seconds >= 0.05
    assert often.p99 is None


def test_workloads_have_names_of_their_own() -> None:
    names = [workload.name for workload in WORKLOADS]

    assert len(set(names)) == len(names)
    assert {"randread-4k-d1", "read-64k-d16", "write-1m-d4", "nbdcopy"} <= set(names)


def test_selection_keeps_the_order_of_the_table_and_takes_all_without_patterns() -> None:
    assert [workload.name for workload in select(["nbdcopy", "randread-4k-d?", "nbd*"])] == [
        "randread-4k-d1",
        "nbdcopy",
    ]
    assert select([]) == list(WORKLOADS)

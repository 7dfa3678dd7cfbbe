"""Test what the benchmark tells clients to do, and reads of their output."""

import contextlib
import json
from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError, Target
from benchmarks.figures import MIB, Transfer
from benchmarks.servers import ours
from benchmarks.service import Service
from benchmarks.workloads import TRANSFERS, Copy, Fio, parse_fio

NOTHING = {"io_bytes": 0, "runtime": 0, "clat_ns": {}}


def side(size: int, milliseconds: int, p99: int) -> dict[str, object]:
    percentiles = {"50.000000": 9, "99.000000": p99}
    return {"io_bytes": size, "runtime": milliseconds, "clat_ns": {"percentile": percentiles}}


def fio_output(**sides: object) -> str:
    job = {"read": NOTHING, "write": NOTHING, **sides}
    return "fio: connected to NBD server\n" + json.dumps({"jobs": [job]})


@pytest.mark.parametrize("name", ["read", "write"])
def test_fio_output_is_read_past_what_its_engine_says(name: str) -> None:
    output = fio_output(**{name: side(4096, 250, 7000)})

    assert parse_fio(output) == Transfer(bytes=4096, seconds=0.25, p99=7.0)


def test_reads_and_writes_are_added_and_the_slower_latency_counts() -> None:
    output = fio_output(read=side(7, 500, 1000), write=side(3, 499, 2000))

    assert parse_fio(output) == Transfer(bytes=10, seconds=0.5, p99=2.0)


@pytest.mark.parametrize("output", ["", "fio: connected to NBD server\n", "{}", '{"jobs": []}', "{", fio_output()])
def test_fio_output_without_figures_is_an_error(output: str) -> None:
    with pytest.raises(BenchmarkError, match="fio did no input or output"):
        parse_fio(output)


TARGET = Target("nbd://here", 8 * MIB, Path("/tmp/image"))


def test_fio_is_told_what_to_do() -> None:
    command = Fio("randread", 4096, 16, connections=4).command(TARGET, 0.3)

    assert command[0] == "fio"
    assert {
        "--ioengine=nbd",
        "--uri=nbd://here",
        "--rw=randread",
        "--bs=4096",
        "--iodepth=16",
        "--numjobs=4",
        "--group_reporting",
        f"--size={8 * MIB}",
        "--runtime=300ms",
        "--time_based",
        "--output-format=json",
    } <= set(command)


def test_cold_disk_is_gone_through_once_at_most() -> None:
    command = Fio("read", MIB, 4, cold=True).command(TARGET, 0.3)

    assert "--time_based" not in command
    assert "--runtime=300ms" in command


def service(directory: Path, ends: contextlib.ExitStack) -> Service:
    (directory / "image").write_bytes(bytes(MIB))
    return Service(ours("file"), directory, MIB, tcp=False, ends=ends)


def test_copy_runs_once_at_least_and_counts_what_it_copied(tmp_path: Path) -> None:
    with contextlib.ExitStack() as ends:
        served = service(tmp_path, ends)

        once, often = Copy("copy", tool="true").run(served, 0), Copy("copy", tool="true").run(served, 0.05)

    for sample in (once, often):
        assert sample["throughput"] > 0
        assert sample["CPU"] >= 0
        assert "p99" not in sample


def test_file_is_copied_to_the_server_and_made_but_once(tmp_path: Path) -> None:
    target = Target("nbd://here", MIB, tmp_path / "image")
    copy = Copy("copy", to_server=True)

    ends = copy.ends(target)
    made = (tmp_path / "to-copy").read_bytes()

    assert ends == copy.ends(target) == (str(tmp_path / "to-copy"), "nbd://here")
    assert made == (tmp_path / "to-copy").read_bytes()
    assert len(made) == MIB
    assert Copy("copy").ends(target) == ("nbd://here", "null:")


def test_cold_run_begins_with_an_image_that_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chilled: list[Path] = []
    monkeypatch.setattr("benchmarks.workloads.chill", chilled.append)
    monkeypatch.setattr("benchmarks.workloads.run_client", lambda *_: fio_output(read=side(4096, 250, 7000)))

    with contextlib.ExitStack() as ends:
        served = service(tmp_path, ends)
        for cold in (False, True):
            assert Fio("read", MIB, 4, cold=cold).run(served, 0.3)["p99"] == 7.0

    assert chilled == [tmp_path / "image"]


def test_workloads_have_names_of_their_own() -> None:
    names = [workload.name for workload in TRANSFERS]

    assert len(set(names)) == len(names)
    assert {"randread-4k-d1", "read-64k-d16", "randread-4k-d16-c4", "cold-read-1m-d4", "nbdcopy"} <= set(names)


def test_only_what_needs_a_cold_image_is_of_files_alone() -> None:
    assert {workload.name for workload in TRANSFERS if workload.of_file} == {"cold-randread-4k-d16", "cold-read-1m-d4"}

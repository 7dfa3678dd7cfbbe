"""Test what the benchmark runs by name."""

from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.figures import CPU, THROUGHPUT
from benchmarks.plan import Goal
from benchmarks.servers import PEERS, SYSTEM
from benchmarks.starts import OVER_PYTHON, memory_at
from benchmarks.suites import WITHOUT_FILTERS, WORKLOADS, matching, proof_cases, single_cases

PROOF = {case.name: case for case in proof_cases([], SYSTEM)}


def test_selection_keeps_the_order_of_the_table_and_takes_all_without_patterns() -> None:
    cases = single_cases([], 0, [PEERS["nbdkit-file"]])

    some = matching(["nbdcopy", "randread-4k-d?", "nbdcop?"], cases)

    assert [case.workload.name for case in some] == ["randread-4k-d1", "nbdcopy"]
    assert [case.workload for case in matching([], cases)] == list(WORKLOADS)


def test_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match='no workload matches "sleep"; --list shows their names'):
        matching(["randread-*", "sleep"], list(PROOF.values()))


def test_peers_are_compared_with_ours_serving_the_same() -> None:
    cases = single_cases(["-t", "2"], 3, [PEERS["bare"], PEERS["nbdkit-memory"], PEERS["qemu-nbd"]])

    first = [case for case in cases if case.workload.name == "randread-4k-d1"]

    assert [(case.ours.source, [peer.name for peer in case.peers]) for case in first] == [
        ("file", ["bare", "qemu-nbd"]),
        ("memory", ["nbdkit-memory"]),
    ]
    assert {(case.ours.options, case.ours.filters) for case in cases} == {(("-t", "2"), 3)}


def test_what_is_in_memory_is_not_run_cold() -> None:
    names = [case.workload.name for case in single_cases([], 0, [PEERS["nbdkit-memory"]])]

    assert "randread-4k-d16" in names
    assert not any(name.startswith("cold") for name in names)


@pytest.mark.parametrize(
    ("name", "throughput", "cpu"),
    [
        ("randread-4k-d1", 1.2, 0.8),
        ("randread-4k-d16", 1.4, 0.7),
        ("randread-4k-d64", 1.4, 0.7),
        ("randwrite-4k-d64", 1.2, 0.8),
        ("read-64k-d16", 1.4, 0.5),
        ("read-1m-d4", 2.0, 0.2),
        ("write-64k-d16", 1.0, 1.0),
        ("write-1m-d4", 1.0, 1.0),
        ("randread-4k-d16-c4 --workers 2", 1.4, 0.7),
        ("read-1m-d16-c4 --workers 2", 2.0, 0.2),
        ("read-64k-d16-aligned", 1.4, 0.5),
        ("read-1m-d4-aligned", 2.0, 0.2),
        ("read-1m-d16-c4-aligned --workers 2", 2.0, 0.2),
    ],
)
def test_proof_has_the_targets_of_the_table(name: str, throughput: float, cpu: float) -> None:
    case = PROOF[name]

    assert case.goals == [Goal(THROUGHPUT, throughput), Goal(CPU, cpu)]
    assert [peer.name for peer in case.peers] == ["nbdkit-file", "bare"]
    assert case.judges == ["nbdkit-file"]
    assert " ".join([case.workload.name, *case.ours.options]) == name


def test_proof_has_targets_for_what_is_not_a_plain_transfer() -> None:
    others = list(PROOF)[13:]

    assert [(name, PROOF[name].judges, PROOF[name].goals) for name in others] == [
        ("nbdcopy", ["nbdkit-file"], [Goal(THROUGHPUT, 1.8)]),
        ("randread-4k-d16 (bytearray)", ["nbdkit-python-parallel"], [Goal(THROUGHPUT, 4.0), Goal(CPU, 0.4)]),
        ("randread-4k-d64 (delayed)", ["nbdkit-delayed"], [Goal(THROUGHPUT, 39.0625, of_ratio=False)]),
        ("randread-4k-d16 (3 filters)", [WITHOUT_FILTERS], [Goal(THROUGHPUT, 0.98)]),
        ("idle", ["nbdkit-file"], [Goal(memory_at(1000), 1.0), Goal(memory_at(1000), 100.0, of_ratio=False)]),
        ("start (null)", ["nbdkit-null"], [Goal(OVER_PYTHON, 120.0, of_ratio=False)]),
    ]
    filtered = PROOF["randread-4k-d16 (3 filters)"]
    assert (filtered.ours.filters, filtered.peers[0].filters) == (3, 0)


def test_options_for_ours_are_added_to_all_of_the_proof() -> None:
    cases = proof_cases(["-t", "2"], SYSTEM)

    assert {case.ours.options[-2:] for case in cases} == {("-t", "2")}


def test_another_root_adds_a_judge_told_apart_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command, answer in (("nbdkit", "nbdkit 1.32.5"), ("chroot", "$2 1.48.1")):
        (tmp_path / command).write_text(f'#!/bin/sh\necho "{answer}"\n')
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    (case,) = [case for case in proof_cases([], Path("/srv")) if case.name == "nbdcopy"]

    assert case.judges == ["nbdkit-file 1.32.5", "nbdkit-file 1.48.1"]
    assert [(peer.name, peer.root) for peer in case.peers] == [
        ("nbdkit-file 1.32.5", SYSTEM),
        ("nbdkit-file 1.48.1", Path("/srv")),
        ("bare", SYSTEM),
    ]

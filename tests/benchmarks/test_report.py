"""Test what the benchmark prints and saves."""

import json
from pathlib import Path

import pytest

from benchmarks.figures import CPU, THROUGHPUT, TRANSFER_METRICS, Comparison, Metric
from benchmarks.plan import Goal, Result
from benchmarks.report import as_json, heading, markdown, row, save, shown, summary, table
from tests.benchmarks.samples import case, compared, result


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.00"),
        (0.04561, "0.0456"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (-45.67, "-45.7"),
        (123.4, "123"),
        (1234567.0, "1234567"),
    ],
)
def test_figures_are_shown_with_three_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_table_is_aligned_markdown() -> None:
    assert table([["name", "x"], ["a", "1.50"], ["longer", "–"]]) == (
        "| name   |    x |\n| ------ | ---: |\n| a      | 1.50 |\n| longer |    – |"
    )


def test_row_has_ratio_with_spread_ours_and_peer_for_each_metric() -> None:
    pairs = [
        ({"throughput": 4.0, "CPU": 250.0}, {"throughput": 2.0, "CPU": 500.0}),
        ({"throughput": 8.0}, {"throughput": 2.0}),
    ]

    cells = row(Comparison("w", "p", TRANSFER_METRICS, pairs))

    assert dict(zip(heading(TRANSFER_METRICS), cells, strict=True)) == {
        "workload": "w",
        "peer": "p",
        "throughput ratio": "3.00 (2.00–4.00)",
        "ours, MiB/s": "6.00",
        "peer, MiB/s": "2.00",
        "CPU ratio": "0.500",
        "ours, ms/MiB": "250",
        "peer, ms/MiB": "500",
        "p99 ratio": "–",
        "ours, µs": "–",
        "peer, µs": "–",
    }


def test_metric_without_unit_is_shown_without() -> None:
    assert heading([Metric("threads", "")]) == ["workload", "peer", "threads ratio", "ours", "peer"]


def test_markdown_has_facts_and_a_table_for_what_has_the_same_metrics() -> None:
    threads = Comparison("idle", "q", [Metric("threads", "")], [({"threads": 1}, {"threads": 2})])

    report = markdown({"peer": "nbdkit-file"}, [result([], compared("p", 1, 2), threads, compared("r", 3, 4))])

    assert "- peer: nbdkit-file\n" in report
    lines = [line.split("|")[1:3] for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    assert [(workload.strip(), peer.strip()) for workload, peer in lines] == [
        ("workload", "peer"),
        ("w", "p"),
        ("w", "r"),
        ("workload", "peer"),
        ("idle", "q"),
    ]
    assert "targets" not in report


def test_markdown_says_which_targets_are_met() -> None:
    goals = [Goal(THROUGHPUT, 1.4), Goal(CPU, 0.7), Goal(THROUGHPUT, 2, of_ratio=False)]

    report = markdown({}, [result(goals, compared("p", 3, 2), compared("bare", 2, 4))])

    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "≥" in line or "≤" in line
    ]
    assert lines == [
        ["w", "throughput, ours ÷ peer ≥ 1.4", "1.50", "p", "0.500", "yes"],
        ["w", "CPU, ours ÷ peer ≤ 0.7", "–", "p", "–", "NO"],
        ["w", "throughput, MiB/s ≥ 2", "3.00", "p", "0.500", "yes"],
    ]
    assert "2 of 3 targets are met." in report


def test_markdown_says_what_failed_and_that_its_targets_are_not_met() -> None:
    failed = Result(case("p", goals=[Goal(CPU, 0.5)], judges=["p"]), failures={"p": "it broke\nand said why"})

    report = markdown({}, [failed])

    assert "w on p failed:\n\n    it broke\n    and said why\n" in report
    assert "0 of 1 targets are met." in report


def test_json_has_figures_samples_goals_and_failures() -> None:
    good = result([Goal(THROUGHPUT, 1.0)], compared("p", 3, 1))
    good.failures["q"] = "it broke"

    report = json.loads(as_json({"peer": "p"}, [good, Result(case(goals=[Goal(CPU, 1.0)]))]))

    assert report["facts"] == {"peer": "p"}
    (entry,) = report["results"]
    assert (entry["workload"], entry["peer"]) == ("w", "p")
    assert entry["figures"]["throughput"] == {
        "unit": "MiB/s",
        "ratio": 3.0,
        "low": 3.0,
        "high": 3.0,
        "ours": 3.0,
        "peer": 1.0,
    }
    assert entry["figures"]["CPU"]["ratio"] is None
    assert entry["pairs"] == [{"ours": {"throughput": 3}, "peer": {"throughput": 1}}]
    assert report["goals"] == [
        {"workload": "w", "metric": "throughput", "of": "ratio", "bound": 1.0, "value": 3.0, "peer": "p", "met": True},
        {"workload": "w", "metric": "CPU", "of": "ratio", "bound": 1.0, "value": None, "peer": None, "met": False},
    ]
    assert report["failures"] == [{"workload": "w", "q": "it broke"}]


def test_summary_has_a_line_for_each_peer() -> None:
    mixed = result([], compared("p", 3, 2))
    mixed.failures["q"] = "it broke\nand said why"

    assert summary(mixed) == "  p: throughput 1.50, CPU –, p99 –\n  q failed: it broke"


def test_report_is_saved_in_three_forms(tmp_path: Path) -> None:
    save(tmp_path / "made" / "report.1", {}, [result([], compared("p", 3, 2))])

    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "report.1.json",
        "report.1.md",
        "report.1.svg",
    ]
    assert (tmp_path / "made" / "report.1.svg").read_text().startswith("<svg ")

"""Test what the benchmark prints and saves."""

import json

import pytest

from benchmarks.figures import MIB, Comparison, Sample, Transfer
from benchmarks.report import as_json, heading, markdown, row, shown, table


def sample(mib: float = 1, seconds: float = 1, cpu: float = 1, p99: float | None = None) -> Sample:
    return Sample(Transfer(int(mib * MIB), seconds, p99), cpu)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.00"),
        (0.04561, "0.0456"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (45.67, "45.7"),
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


def test_row_has_ratio_ours_and_peer_for_each_metric() -> None:
    cells = row(Comparison("w", [(sample(mib=4, p99=30), sample(mib=2, p99=60))]))

    assert dict(zip(heading(), cells, strict=True)) == {
        "workload": "w",
        "throughput ratio": "2.00",
        "ours, MiB/s": "4.00",
        "peer, MiB/s": "2.00",
        "CPU ratio": "0.500",
        "ours, ms/MiB": "250",
        "peer, ms/MiB": "500",
        "p99 ratio": "0.500",
        "ours, µs": "30.0",
        "peer, µs": "60.0",
    }


def test_markdown_has_facts_and_a_row_for_each_workload() -> None:
    report = markdown({"peer": "nbdkit-file"}, [Comparison(name, [(sample(), sample())]) for name in ("v", "w")])

    assert "- peer: nbdkit-file\n" in report
    assert [line.split()[1] for line in report.splitlines() if line.startswith("| ")][2:] == ["v", "w"]


def test_json_has_medians_and_samples() -> None:
    comparison = Comparison("w", [(sample(mib=3), sample(cpu=0))])

    report = json.loads(as_json({"peer": "p"}, [comparison]))

    assert report["facts"] == {"peer": "p"}
    (result,) = report["results"]
    assert result["workload"] == "w"
    assert result["figures"]["throughput"] == {"unit": "MiB/s", "ratio": 3.0, "ours": 3.0, "peer": 1.0}
    assert result["figures"]["CPU"]["ratio"] is None
    assert result["pairs"][0]["ours"] == {"transfer": {"bytes": 3 * MIB, "seconds": 1, "p99": None}, "cpu": 1}

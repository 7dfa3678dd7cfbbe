"""Test what the benchmark calculates."""

import pytest

from benchmarks.figures import METRICS, MIB, Comparison, Figure, Sample, Transfer, median, ratio

THROUGHPUT, CPU, P99 = METRICS


def sample(mib: float = 1, seconds: float = 1, cpu: float = 1, p99: float | None = None) -> Sample:
    return Sample(Transfer(int(mib * MIB), seconds, p99), cpu)


@pytest.mark.parametrize(
    ("numerator", "denominator", "expected"),
    [(3.0, 2.0, 1.5), (0.0, 2.0, 0.0), (3.0, 0.0, None), (None, 2.0, None), (3.0, None, None)],
)
def test_ratio_is_none_where_it_has_no_meaning(
    numerator: float | None, denominator: float | None, expected: float | None
) -> None:
    assert ratio(numerator, denominator) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0], 2.5), ([None, 5.0, None], 5.0), ([None], None), ([], None)],
)
def test_median_is_of_the_values_that_are_known(values: list[float | None], expected: float | None) -> None:
    assert median(values) == expected


def test_metrics_have_the_units_that_they_claim() -> None:
    one = sample(mib=10, seconds=2, cpu=0.5, p99=70)

    assert [(metric.name, metric.unit, metric.of(one)) for metric in METRICS] == [
        ("throughput", "MiB/s", 5.0),
        ("CPU", "ms/MiB", 50.0),
        ("p99", "µs", 70),
    ]


def test_figure_takes_the_median_of_the_ratios_of_pairs() -> None:
    pairs = [(sample(mib=ours), sample(mib=peer)) for ours, peer in [(10, 10), (20, 5), (30, 15)]]

    figure = Comparison("w", pairs).figure(THROUGHPUT)

    # The ratios are 1, 4 and 2; the ratio of the medians would be 20 ÷ 10.
    assert figure == Figure(ratio=2.0, ours=20.0, peer=10.0)
    assert Comparison("w", pairs[:2]).figure(THROUGHPUT).ratio == 2.5


def test_figure_of_what_was_not_measured_is_unknown() -> None:
    comparison = Comparison("nbdcopy", [(sample(cpu=2), sample(cpu=0))])

    assert comparison.figure(P99) == Figure(None, None, None)
    assert comparison.figure(CPU) == Figure(None, 2000.0, 0.0)

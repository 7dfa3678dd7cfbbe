"""Test what the benchmark calculates."""

from collections.abc import Mapping

import pytest

from benchmarks.figures import (
    CPU,
    MIB,
    P99,
    THROUGHPUT,
    TRANSFER_METRICS,
    Comparison,
    Figure,
    Transfer,
    median,
    ratio,
)


@pytest.mark.parametrize(
    ("numerator", "denominator", "expected"),
    [(3.0, 2.0, 1.5), (0.0, 2.0, 0.0), (3.0, 0.0, None), (3.0, -2.0, None), (None, 2.0, None), (3.0, None, None)],
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


def test_transfer_is_measured_in_the_units_of_the_metrics() -> None:
    sample = Transfer(bytes=10 * MIB, seconds=2, p99=70).sample(cpu=0.5)

    assert [(metric.name, metric.unit, sample[metric.name]) for metric in TRANSFER_METRICS] == [
        ("throughput", "MiB/s", 5.0),
        ("CPU", "ms/MiB", 50.0),
        ("p99", "µs", 70),
    ]


def test_what_a_transfer_does_not_know_is_not_in_its_sample() -> None:
    assert Transfer(bytes=MIB, seconds=0).sample(cpu=0) == {"CPU": 0}


def throughputs(*pairs: tuple[float, float]) -> Comparison:
    samples: list[tuple[Mapping[str, float], Mapping[str, float]]] = [
        ({"throughput": ours}, {"throughput": peer}) for ours, peer in pairs
    ]
    return Comparison("w", "p", TRANSFER_METRICS, samples)


def test_figure_takes_the_median_of_the_ratios_of_pairs_and_their_spread() -> None:
    comparison = throughputs((10, 10), (20, 5), (30, 15))

    # The ratios are 1, 4 and 2; the ratio of the medians would be 20 ÷ 10.
    assert comparison.figure(THROUGHPUT) == Figure(ratio=2.0, low=1.0, high=4.0, ours=20.0, peer=10.0)
    assert throughputs((10, 10), (20, 5)).figure(THROUGHPUT).ratio == 2.5


def test_figure_of_what_was_not_measured_is_unknown() -> None:
    comparison = Comparison("nbdcopy", "p", TRANSFER_METRICS, [({"CPU": 2.0}, {"CPU": 0.0})])

    assert comparison.figure(P99) == Figure(None, None, None, None, None)
    assert comparison.figure(CPU) == Figure(None, None, None, 2.0, 0.0)

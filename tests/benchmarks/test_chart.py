"""Test the benchmark's chart."""

from xml.etree import ElementTree

import pytest

from benchmarks.chart import LABELS, MARGIN, WIDTH, Scale, chart
from benchmarks.figures import TRANSFER_METRICS, Comparison, Sample

SVG = "{http://www.w3.org/2000/svg}"


def comparison(workload: str, *pairs: tuple[Sample, Sample]) -> Comparison:
    return Comparison(workload, "a < b", TRANSFER_METRICS, pairs)


def bars(svg: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}rect"))


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_scale_has_one_in_the_middle_of_a_half_and_two() -> None:
    scale = Scale(0.5, 2.0)

    assert scale.x(0.5) == LABELS
    assert scale.x(2.0) == WIDTH - MARGIN
    assert scale.x(1) == pytest.approx((LABELS + WIDTH - MARGIN) / 2)
    assert scale.ticks() == [0.5, 1, 2]


def test_each_ratio_has_a_bar_that_is_good_or_bad() -> None:
    faster = comparison("faster", ({"throughput": 3.0, "CPU": 1.0}, {"throughput": 2.0, "CPU": 4.0}))
    slower = comparison("slower", ({"throughput": 1.0, "CPU": 4.0}, {"throughput": 2.0, "CPU": 1.0}))

    svg = chart([faster, slower])

    assert [bar.get("class") for bar in bars(svg)] == ["good", "bad", "good", "bad"]
    for words in ("faster", "slower", "a < b", "1.50", "0.50", "0.25", "4.00"):
        assert words in texts(svg)


def test_limit_is_neither_good_nor_bad() -> None:
    limit = Comparison("w", "bare", TRANSFER_METRICS, [({"throughput": 1.0}, {"throughput": 2.0})])

    assert [bar.get("class") for bar in bars(chart([limit]))] == ["limit"]


def test_bars_lie_on_either_side_of_one() -> None:
    more = comparison("more", ({"throughput": 2.0}, {"throughput": 1.0}))
    less = comparison("less", ({"throughput": 1.0}, {"throughput": 2.0}))

    right, left = bars(chart([more, less]))

    assert float(left.get("x", "")) + float(left.get("width", "")) == pytest.approx(float(right.get("x", "")), abs=0.2)
    assert float(left.get("width", "")) == pytest.approx(float(right.get("width", "")), abs=0.2)


def test_spread_is_drawn_from_the_least_to_the_most() -> None:
    pairs: list[tuple[Sample, Sample]] = [({"throughput": value}, {"throughput": 1.0}) for value in (1.0, 1.5, 2.0)]

    svg = chart([comparison("w", *pairs)])

    (spread,) = [line for line in ElementTree.fromstring(svg).iter(f"{SVG}line") if line.get("class") == "spread"]
    scale = Scale(0.5 / 1.1, 2.0 * 1.1)
    assert [spread.get("x1"), spread.get("x2")] == [f"{scale.x(value):.1f}" for value in (1.0, 2.0)]


def test_what_has_no_ratio_has_no_bar() -> None:
    svg = chart([comparison("copy", ({"throughput": 2.0}, {"throughput": 1.0})), comparison("none", ({}, {}))])

    assert len(bars(svg)) == 1
    assert not any("CPU" in words for words in texts(svg))


def test_workload_with_several_peers_is_named_once() -> None:
    pair: tuple[Sample, Sample] = ({"throughput": 2.0}, {"throughput": 1.0})

    svg = chart([comparison("w", pair), comparison("w", pair)])

    assert texts(svg).count("w") == 1
    assert texts(svg).count("a < b") == 2


def test_chart_of_nothing_is_an_image_all_the_same() -> None:
    assert bars(chart([])) == []

"""The chart: a bar for each ratio, from 1 to what it is, on a scale on which twice and half are as far from 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.figures import CPU, LIMIT, THROUGHPUT, Comparison, Figure, Metric

WIDTH = 1000
LABELS = 400
MARGIN = 90  # on the right, for the figures
LINE = 20
BAR = 12
TOP = 56
GAP = 8  # between workloads
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 14px; }
  .quiet { fill: #59636e; }
  .grid { stroke: #d1d9e0; }
  .one { stroke: #59636e; }
  .good { fill: #2da44e; }
  .bad { fill: #cf222e; }
  .limit { fill: #8c959f; }
  .spread { stroke: #1f2328; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .quiet { fill: #9198a1; }
    .grid { stroke: #3d444d; }
    .one { stroke: #9198a1; }
    .good { fill: #3fb950; }
    .bad { fill: #f85149; }
    .limit { fill: #656c76; }
    .spread { stroke: #f0f6fc; }
  }
"""


@dataclass(frozen=True)
class Scale:
    """Where a ratio is, from left to right, when the outermost are `least` and `most`."""

    least: float
    most: float

    def x(self, ratio: float) -> float:
        """Return the distance from the left edge."""
        part = math.log(ratio / self.least) / math.log(self.most / self.least)
        return LABELS + part * (WIDTH - LABELS - MARGIN)

    def ticks(self) -> list[float]:
        """Return the ratios at which there is a line."""
        return [tick for tick in TICKS if self.least <= tick <= self.most]


@dataclass(frozen=True)
class Bar:
    """One ratio: what it is of, whether more would be better, and between what it lies."""

    workload: str
    peer: str
    more: bool
    ratio: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """Whether ours is at least as good; the limit is not there to be beaten."""
        if self.peer == LIMIT:
            return "limit"
        good = self.ratio >= 1 if self.more else self.ratio <= 1
        return "good" if good else "bad"


def bars(comparisons: Sequence[Comparison], metric: Metric) -> Iterator[Bar]:
    """Yield the bars of a metric; what has no ratio, or one that is not above 0, has none."""
    for comparison in comparisons:
        figure: Figure = comparison.figure(metric)
        ratio, low, high = figure.ratio, figure.low, figure.high
        if ratio and low and high and low > 0:
            yield Bar(comparison.workload, comparison.peer, metric.more, ratio, low, high)


def chart(comparisons: Sequence[Comparison]) -> str:
    """Return an SVG image of the throughput and the CPU time of all comparisons, light or dark as the page is."""
    panels = [
        ("Throughput, ours ÷ peer: to the right is better", list(bars(comparisons, THROUGHPUT))),
        ("CPU time of the server per MiB, ours ÷ peer: to the left is better", list(bars(comparisons, CPU))),
    ]
    drawn: list[str] = []
    y = 0
    for title, some in panels:
        if some:
            lines, height = panel(title, some)
            drawn += [f'<g transform="translate(0 {y})">', *lines, "</g>"]
            y += height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" role="img">'
    return "\n".join([head, "<title>nbdkitpy side by side</title>", f"<style>{STYLE}</style>", *drawn, "</svg>"]) + "\n"


def panel(title: str, bars: Sequence[Bar]) -> tuple[list[str], int]:
    """Return the lines of one metric, and how high they are together."""
    scale = Scale(min(0.5, *(bar.low for bar in bars)) / 1.1, max(2.0, *(bar.high for bar in bars)) * 1.1)
    rows: list[str] = []
    y, before = TOP, ""
    for bar in bars:
        if bar.workload != before:
            y += GAP
            rows.append(text(8, y, bar.workload))
        rows += drawn(bar, scale, y)
        before = bar.workload
        y += LINE
    return [text(8, 24, title, "title"), *grid(scale, y), *rows], y + GAP


def grid(scale: Scale, bottom: int) -> list[str]:
    """Return the lines behind the bars, of which that at 1 stands out, and the numbers over them."""
    lines = []
    for tick in scale.ticks():
        x = scale.x(tick)
        name = "one" if tick == 1 else "grid"
        lines.append(f'<line class="{name}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>')
        lines.append(text(x, TOP - 18, f"{tick:g}", "quiet", "middle"))
    return lines


def drawn(bar: Bar, scale: Scale, y: int) -> list[str]:
    """Return the lines of one bar: whom it is against, the bar, its spread, and the number."""
    left, right = sorted((scale.x(1), scale.x(bar.ratio)))
    middle = y + BAR / 2
    return [
        text(LABELS - 8, y, bar.peer, "quiet", "end"),
        f'<rect class="{bar.kind}" x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{BAR}"/>',
        f'<line class="spread" x1="{scale.x(bar.low):.1f}" x2="{scale.x(bar.high):.1f}" y1="{middle}" y2="{middle}"/>',
        text(WIDTH - 8, y, f"{bar.ratio:.2f}", "", "end"),
    ]


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Return a text whose line begins, ends or has its middle at `x`, beside a bar at `y`."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y + BAR - 2}" text-anchor="{anchor}">{escape(words)}</text>'

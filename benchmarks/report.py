"""What is printed and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.figures import METRICS, Comparison

LEGEND = (
    "Ratios are ours ÷ peer, the median of those of each pair of runs: above 1 is good for throughput, below 1 for\n"
    "CPU (the server's, per MiB moved) and p99 (latency). The other columns are the medians of each side."
)


def shown(value: float | None) -> str:
    """Return `value` with three significant digits or all before the point, and no exponent."""
    if value is None:
        return "–"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - magnitude)}f}"


def heading() -> list[str]:
    """Return the names of the table's columns."""
    columns = ([f"{metric.name} ratio", f"ours, {metric.unit}", f"peer, {metric.unit}"] for metric in METRICS)
    return ["workload", *(name for names in columns for name in names)]


def row(comparison: Comparison) -> list[str]:
    """Return the table's cells for one workload."""
    figures = [comparison.figure(metric) for metric in METRICS]
    cells = ([shown(figure.ratio), shown(figure.ours), shown(figure.peer)] for figure in figures)
    return [comparison.workload, *(cell for group in cells for cell in group)]


def summary(comparison: Comparison) -> str:
    """Return one line with the ratios."""
    return ", ".join(f"{metric.name} {shown(comparison.figure(metric).ratio)}" for metric in METRICS)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which is the heading, as a Markdown table that is aligned as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        for cells in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(facts: Mapping[str, str], comparisons: Sequence[Comparison]) -> str:
    """Return the whole report for people."""
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    cells = table([heading(), *map(row, comparisons)])
    return f"# nbdkitpy side by side\n\n{listed}\n\n{cells}\n\n{LEGEND}\n"


def as_json(facts: Mapping[str, str], comparisons: Sequence[Comparison]) -> str:
    """Return the whole report for programs: the medians, and every sample that they come from."""
    results = [
        {
            "workload": comparison.workload,
            "figures": {m.name: {"unit": m.unit, **asdict(comparison.figure(m))} for m in METRICS},
            "pairs": [{"ours": asdict(ours), "peer": asdict(peer)} for ours, peer in comparison.pairs],
        }
        for comparison in comparisons
    ]
    return json.dumps({"facts": dict(facts), "results": results}, indent=2) + "\n"


def save(prefix: Path, facts: Mapping[str, str], comparisons: Sequence[Comparison]) -> None:
    """Write PREFIX.json and PREFIX.md."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.json").write_text(as_json(facts, comparisons), encoding="utf-8")
    prefix.with_name(f"{prefix.name}.md").write_text(markdown(facts, comparisons), encoding="utf-8")

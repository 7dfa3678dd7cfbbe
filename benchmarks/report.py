"""What is printed and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.chart import chart
from benchmarks.figures import LIMIT, Comparison, Figure, Metric
from benchmarks.plan import Goal, Result

LEGEND = (
    "Ratios are ours ÷ peer, the median of those of each pair of runs, and in brackets the least and the most.\n"
    "Above 1 is good for throughput, below 1 for all else: CPU is the server's, per MiB moved, p99 is latency.\n"
    "The other columns are the medians of each side."
)


def shown(value: float | None) -> str:
    """Return `value` with three significant digits or all before the point, and no exponent."""
    if value is None:
        return "–"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - magnitude)}f}"


def spread(figure: Figure) -> str:
    """Return the ratio and, if there are several, between what they lie."""
    if figure.low == figure.high:
        return shown(figure.ratio)
    return f"{shown(figure.ratio)} ({shown(figure.low)}–{shown(figure.high)})"


def heading(metrics: Sequence[Metric]) -> list[str]:
    """Return the names of a table's columns."""
    units = [(metric.name, f", {metric.unit}" if metric.unit else "") for metric in metrics]
    columns = ([f"{name} ratio", f"ours{unit}", f"peer{unit}"] for name, unit in units)
    return ["workload", "peer", *(name for names in columns for name in names)]


def row(comparison: Comparison) -> list[str]:
    """Return a table's cells for one workload and peer."""
    figures = [comparison.figure(metric) for metric in comparison.metrics]
    cells = ([spread(figure), shown(figure.ours), shown(figure.peer)] for figure in figures)
    return [comparison.workload, comparison.peer, *(cell for group in cells for cell in group)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which is the heading, as a Markdown table that is aligned as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        for cells in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def tables(comparisons: Iterable[Comparison]) -> list[str]:
    """Return a table for all that have the same metrics."""
    groups: dict[tuple[Metric, ...], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(tuple(comparison.metrics), []).append(comparison)
    return [table([heading(metrics), *map(row, alike)]) for metrics, alike in groups.items()]


def goal_rows(result: Result) -> list[list[str]]:
    """Return a row for each goal of a case."""
    rows = []
    for goal, comparison, met in result.verdicts():
        figure = comparison.figure(goal.metric) if comparison else None
        rows.append(
            [
                result.case.name,
                wanted(goal),
                measured(goal, figure) if figure else "–",
                comparison.peer if comparison else "–",
                to_limit(result, goal.metric),
                "yes" if met else "NO",
            ]
        )
    return rows


def to_limit(result: Result, metric: Metric) -> str:
    """Return the ratio to the limit, where that is known."""
    ratios = [each.figure(metric).ratio for each in result.comparisons if each.peer == LIMIT]
    return shown(ratios[0]) if ratios else "–"


def wanted(goal: Goal) -> str:
    """Return what a goal asks for."""
    what = f"{goal.metric.name}, ours ÷ peer" if goal.of_ratio else f"{goal.metric.name}, {goal.metric.unit}"
    return f"{what} {'≥' if goal.metric.more else '≤'} {goal.bound:g}"


def measured(goal: Goal, figure: Figure) -> str:
    """Return what there is for a goal."""
    return spread(figure) if goal.of_ratio else shown(figure.ours)


def goals(results: Sequence[Result]) -> str:
    """Return the table of goals, or nothing if there are none."""
    rows = [cells for result in results for cells in goal_rows(result)]
    if not rows:
        return ""
    met = sum(cells[-1] == "yes" for cells in rows)
    columns = ["workload", "target", "measured", "peer", f"ours ÷ {LIMIT}", "met"]
    return f"{table([columns, *rows])}\n\n{met} of {len(rows)} targets are met."


def failures(results: Sequence[Result]) -> str:
    """Return what went wrong, or nothing."""
    said = [(result.case.name, name, text) for result in results for name, text in result.failures.items()]
    return "\n\n".join(f"{case} on {name} failed:\n\n{indented(text)}" for case, name, text in said)


def indented(text: str) -> str:
    """Return text as a block of code in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def markdown(facts: Mapping[str, str], results: Sequence[Result]) -> str:
    """Return the whole report for people."""
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    compared = tables(comparison for result in results for comparison in result.comparisons)
    parts = ["# nbdkitpy side by side", listed, *compared, LEGEND, goals(results), failures(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_json(facts: Mapping[str, str], results: Sequence[Result]) -> str:
    """Return the whole report for programs: the figures, and every sample that they come from."""
    report = {
        "facts": dict(facts),
        "results": [entry(comparison) for result in results for comparison in result.comparisons],
        "goals": [goal_entry(result, *verdict) for result in results for verdict in result.verdicts()],
        "failures": [{"workload": result.case.name, **result.failures} for result in results if result.failures],
    }
    return json.dumps(report, indent=2) + "\n"


def entry(comparison: Comparison) -> dict[str, object]:
    """Return a comparison for programs."""
    figures = {m.name: {"unit": m.unit, **asdict(comparison.figure(m))} for m in comparison.metrics}
    pairs = [{"ours": dict(ours), "peer": dict(peer)} for ours, peer in comparison.pairs]
    return {"workload": comparison.workload, "peer": comparison.peer, "figures": figures, "pairs": pairs}


def goal_entry(result: Result, goal: Goal, comparison: Comparison | None, met: bool) -> dict[str, object]:
    """Return a goal for programs."""
    return {
        "workload": result.case.name,
        "metric": goal.metric.name,
        "of": "ratio" if goal.of_ratio else "ours",
        "bound": goal.bound,
        "value": goal.value(comparison.figure(goal.metric)) if comparison else None,
        "peer": comparison.peer if comparison else None,
        "met": met,
    }


def summary(result: Result) -> str:
    """Return a few lines for who waits."""
    lines = [
        f"  {comparison.peer}: "
        + ", ".join(f"{metric.name} {spread(comparison.figure(metric))}" for metric in comparison.metrics)
        for comparison in result.comparisons
    ]
    lines += [f"  {name} failed: {text.partition(chr(10))[0]}" for name, text in result.failures.items()]
    return "\n".join(lines)


def save(prefix: Path, facts: Mapping[str, str], results: Sequence[Result]) -> None:
    """Write PREFIX.json, PREFIX.md and PREFIX.svg."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    comparisons = [comparison for result in results for comparison in result.comparisons]
    for ending, text in (
        ("json", as_json(facts, results)),
        ("md", markdown(facts, results)),
        ("svg", chart(comparisons)),
    ):
        prefix.with_name(f"{prefix.name}.{ending}").write_text(text, encoding="utf-8")

"""What is measured, and the medians and ratios that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MIB = 1 << 20
MB = 1_000_000

#: The peer that does no more than it has to: what ours is of it tells how far there is to go.
LIMIT = "bare"


@dataclass(frozen=True)
class Metric:
    """Something to compare; `more` says whether more of it is better."""

    name: str
    unit: str
    more: bool = False


#: What one run of a workload on one server gave: values by the names of metrics. What is not known is not in it.
Sample = Mapping[str, float]

THROUGHPUT = Metric("throughput", "MiB/s", more=True)
CPU = Metric("CPU", "ms/MiB")
P99 = Metric("p99", "µs")
TRANSFER_METRICS = (THROUGHPUT, CPU, P99)


@dataclass(frozen=True)
class Transfer:
    """What a client moved: `bytes` in `seconds`; `p99` is the 99th percentile of latency in µs, if it was measured."""

    bytes: int
    seconds: float
    p99: float | None = None

    def sample(self, cpu: float) -> Sample:
        """Return the figures of this, for which the server spent `cpu` seconds."""
        known = {
            THROUGHPUT.name: ratio(self.bytes / MIB, self.seconds),
            CPU.name: ratio(1000 * cpu, self.bytes / MIB),
            P99.name: self.p99,
        }
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class Figure:
    """One metric: the median of ours ÷ peer's, taken pair by pair, the least and the most, and the median of each."""

    ratio: float | None
    low: float | None
    high: float | None
    ours: float | None
    peer: float | None


@dataclass(frozen=True)
class Comparison:
    """A workload's samples of `metrics`: pairs of ours and the peer's that ran shortly one after the other."""

    workload: str
    peer: str
    metrics: Sequence[Metric]
    pairs: Sequence[tuple[Sample, Sample]]

    def figure(self, metric: Metric) -> Figure:
        """Return what is known of `metric`."""
        values = [(ours.get(metric.name), peer.get(metric.name)) for ours, peer in self.pairs]
        ratios = [each for each in (ratio(*pair) for pair in values) if each is not None]
        return Figure(
            median(ratios),
            min(ratios, default=None),
            max(ratios, default=None),
            median(ours for ours, _ in values),
            median(peer for _, peer in values),
        )


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, or None where it is not known or without meaning."""
    return numerator / denominator if numerator is not None and denominator and denominator > 0 else None


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known, or None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

"""What is measured, and the medians and ratios that come of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Transfer:
    """What a client moved: `bytes` in `seconds`; `p99` is the 99th percentile of latency in µs, if it was measured."""

    bytes: int
    seconds: float
    p99: float | None = None


@dataclass(frozen=True)
class Sample:
    """One run of one workload on one server, which spent `cpu` seconds on it."""

    transfer: Transfer
    cpu: float


@dataclass(frozen=True)
class Metric:
    """Something to compare, and how to get it out of a sample."""

    name: str
    unit: str
    of: Callable[[Sample], float | None]


METRICS = (
    Metric("throughput", "MiB/s", lambda sample: ratio(sample.transfer.bytes / MIB, sample.transfer.seconds)),
    Metric("CPU", "ms/MiB", lambda sample: ratio(1000 * sample.cpu, sample.transfer.bytes / MIB)),
    Metric("p99", "µs", lambda sample: sample.transfer.p99),
)


@dataclass(frozen=True)
class Figure:
    """Medians of one metric: of ours ÷ peer's, taken pair by pair, and of each side."""

    ratio: float | None
    ours: float | None
    peer: float | None


@dataclass(frozen=True)
class Comparison:
    """A workload's samples: pairs of ours and the peer's that ran one after the other."""

    workload: str
    pairs: Sequence[tuple[Sample, Sample]]

    def figure(self, metric: Metric) -> Figure:
        """Return the medians of `metric`."""
        values = [(metric.of(ours), metric.of(peer)) for ours, peer in self.pairs]
        return Figure(
            median(ratio(ours, peer) for ours, peer in values),
            median(ours for ours, _ in values),
            median(peer for _, peer in values),
        )


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, or None where it is not known or without meaning."""
    return numerator / denominator if numerator is not None and denominator else None


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known, or None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

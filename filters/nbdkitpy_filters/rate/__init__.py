"""The rate filter: how many bits a second may be read and written, by one connection or by all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from nbdkitpy import (
    Buffer,
    Client,
    FileRange,
    Filter,
    FilterHandle,
    Handle,
    Parameter,
    hookimpl,
    parse_delay,
    parse_path,
    parse_size,
)
from nbdkitpy_filters.rate.bucket import Bucket, spend, spend_at_once

__all__ = ["Rate", "register_filters"]

_log = logging.getLogger("nbdkitpy.rate")

#: Seconds between two looks at a file that says the rate.
_LOOK_INTERVAL = 1.0

#: Characters of such a file that are read.
_LONGEST_LINE = 64


def _parse_rate(text: str) -> int:
    """Return bits per second: a number of at least 1, with suffixes as those of sizes."""
    try:
        rate = parse_size(text)
    except ValueError:
        rate = 0
    if not rate:
        raise ValueError("a number of bits per second, such as 100000, 50K or 1M")
    return rate


class Rate(Filter):
    """Let reads and writes pass at the rates that are given, each of the two on its own.

    Args:
        clock: Returns seconds that only ever go on.
    """

    name = "rate"
    longname = "nbdkitpy rate filter"
    description = "Limit the bandwidth of each connection, or of the server."

    rate = Parameter(_parse_rate, live=True, metavar="BITSPERSEC", help="Limit of all connections together.")
    connection_rate = Parameter(_parse_rate, live=True, metavar="BITSPERSEC", help="Limit of each connection.")
    rate_file = Parameter(parse_path, metavar="FILENAME", help="File that says the rate, and may change.")
    connection_rate_file = Parameter(
        parse_path, metavar="FILENAME", help="File that says the connection-rate, and may change."
    )
    burstiness = Parameter(
        parse_delay, default=2.0, live=True, metavar="SECS", help="Seconds' worth of bits after a pause. Default: 2."
    )

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock

    def get_ready(self) -> None:
        self._rate = _Rate(lambda: self.rate, self.rate_file, self._clock)
        self._connection_rate = _Rate(lambda: self.connection_rate, self.connection_rate_file, self._clock)
        self._reads, self._writes = self._bucket(self._rate), self._bucket(self._rate)

    def _bucket(self, rate: _Rate) -> Bucket:
        return Bucket(rate.now, lambda: self.burstiness, self._clock)

    def wrap(self, handle: Handle, client: Client) -> Handle:
        reads, writes = [], []
        if self._rate.is_given():
            reads.append(self._reads)
            writes.append(self._writes)
        if self._connection_rate.is_given():
            reads.append(self._bucket(self._connection_rate))
            writes.append(self._bucket(self._connection_rate))
        return _RateHandle(handle, reads, writes, client.sleep) if reads else handle


class _Rate:
    """A rate as its parameter says, or as the file says once there is one.

    Args:
        parameter: Returns the rate that has been given, which may change.
        path: Of the file, if there may be one.
        clock: Returns seconds.
    """

    def __init__(self, parameter: Callable[[], int | None], path: str | None, clock: Callable[[], float]) -> None:
        self._parameter = parameter
        self._path = path
        self._clock = clock
        self._from_file: int | None = None
        self._look_again_at = clock()
        self._wrong = ""  # what stood in the file and was no rate

    def is_given(self) -> bool:
        """Whether there is a limit, or there may come one."""
        return self._path is not None or self._parameter() is not None

    def now(self) -> int | None:
        """Return the rate, in bits per second; None is no limit."""
        if self._path is not None and self._clock() >= self._look_again_at:
            self._look_again_at = self._clock() + _LOOK_INTERVAL
            self._look(self._path)
        return self._parameter() if self._from_file is None else self._from_file

    def _look(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8", errors="replace") as stream:
                text = stream.readline(_LONGEST_LINE).strip()
        except OSError:  # it is not there yet, or not any more
            return
        try:
            self._from_file = _parse_rate(text)
        except ValueError as error:
            if text != self._wrong:
                _log.error("rate: %s must hold %s, not %r; the rate stays as it was", path, error, text)
                self._wrong = text


class _RateHandle(FilterHandle):
    """Takes the bits of each read and write from buckets.

    The shortcuts of reads are kept, as long as there are enough bits at the moment.
    """

    def __init__(
        self, next: Handle, reads: Sequence[Bucket], writes: Sequence[Bucket], sleep: Callable[[float], None]
    ) -> None:
        super().__init__(next)
        self._reads = reads
        self._writes = writes
        self._sleep = sleep
        self.sparse = next.sparse  # holes take up no bandwidth
        self._inner_pread_into = next.pread_into
        self._inner_file_range = next.file_range

    def pread(self, count: int, offset: int) -> Buffer:
        spend(self._reads, count * 8, self._sleep)
        return self.next.pread(count, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        found = self._inner_pread_into(buffer, offset) if self._inner_pread_into else False
        return found is True and spend_at_once(self._reads, len(buffer) * 8)

    def file_range(self, count: int, offset: int) -> FileRange | None:
        found = self._inner_file_range(count, offset) if self._inner_file_range else None
        return found if found is not None and spend_at_once(self._reads, count * 8) else None

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        spend(self._writes, len(data) * 8, self._sleep)
        self.next.pwrite(data, offset, flags)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Rate)

"""The delay filter: answers later than it could, as a slow or remote disk would."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable

from nbdkitpy import (
    Buffer,
    Client,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Parameter,
    hookimpl,
    parse_bool,
    parse_delay,
    parse_path,
)

__all__ = ["Delay", "register_filters"]

_FAST_ZERO = int(Flags.FAST_ZERO)

#: What wdelay stands for, and sets; as ever, what is given last counts.
_WDELAY = ("delay-write", "delay-zero", "delay-trim")


def _delay(what: str, *aliases: str) -> Parameter[float]:
    return Parameter(parse_delay, default=0.0, aliases=aliases, help=f"Delay {what} by so long. Default: 0.")


class Delay(Filter):
    """Wait before requests are passed on.

    The waiting is :attr:`nbdkitpy.Client.sleep`: it is cut when the client is gone, and what waited is not done.
    """

    name = "delay"
    longname = "nbdkitpy delay filter"
    description = "Delay requests, to simulate a slow or remote server."
    multi_process = True

    delay_read = _delay("reads", "rdelay")
    delay_write = _delay("writes")
    delay_zero = _delay("writes of zeroes")
    delay_trim = _delay("trims")
    wdelay = Parameter(parse_delay, default=0.0, help="Sets delay-write, delay-zero and delay-trim.")
    delay_extents = _delay("questions for the block status")
    delay_cache = _delay("prefetching")
    delay_open = _delay("the opening of exports")
    delay_close = _delay("the closing of exports")
    delay_fast_zero = Parameter(
        parse_bool,
        default=True,
        metavar="BOOL",
        help="Fast zeroes are delayed like others; if false, and if others are delayed, they fail at once. "
        "Default: true.",
    )
    delay_trigger = Parameter(parse_path, metavar="FILENAME", help="Delay only while this file exists.")

    def config(self, key: str, value: str) -> bool:
        if not super().config(key, value):
            return False
        if key == "wdelay":
            for name in _WDELAY:
                super().config(name, value)
        return True

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.wait(client, self.delay_open)
        return super().open(export_name, readonly, client)

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return _DelayHandle(handle, self, client)

    def is_on(self) -> bool:
        """Whether there is no trigger, or it has been pulled."""
        return self.delay_trigger is None or os.path.exists(self.delay_trigger)

    def wait(self, client: Client, seconds: float) -> None:
        """Wait on behalf of `client`, if the filter is on.

        Raises:
            OSError: the client is gone, or the server ends.
        """
        if seconds and self.is_on():
            client.sleep(seconds)


class _DelayHandle(FilterHandle):
    """Waits before the verbs that are to be delayed; the others pass at no cost."""

    def __init__(self, next: Handle, delay: Delay, client: Client) -> None:
        delays = {
            "pread": delay.delay_read,
            "pwrite": delay.delay_write,
            "zero": delay.delay_zero,
            "trim": delay.delay_trim,
            "extents": delay.delay_extents,
            "cache": delay.delay_cache,
        }
        super().__init__(next, untouched={verb for verb, seconds in delays.items() if not seconds})
        self._delay = delay
        self._wait: Callable[[float], None] = lambda seconds: delay.wait(client, seconds)

    @property
    def _refuses_fast_zeroes(self) -> bool:
        return bool(self._delay.delay_zero) and not self._delay.delay_fast_zero

    def can_fast_zero(self) -> bool:
        # To refuse each of them at once is a way to serve them.
        return self._refuses_fast_zeroes or self.next.can_fast_zero()

    def pread(self, count: int, offset: int) -> Buffer:
        self._wait(self._delay.delay_read)
        return self.next.pread(count, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._wait(self._delay.delay_write)
        self.next.pwrite(data, offset, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._wait(self._delay.delay_trim)
        self.next.trim(count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & _FAST_ZERO and self._refuses_fast_zeroes:
            raise OSError(errno.ENOTSUP, "delay: fast zeroes are refused (delay-fast-zero=false)")
        self._wait(self._delay.delay_zero)
        self.next.zero(count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self._wait(self._delay.delay_cache)
        self.next.cache(count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self._wait(self._delay.delay_extents)
        return self.next.extents(count, offset, flags)

    def close(self) -> None:
        # What is to be closed is closed, however the wait ends.
        with contextlib.suppress(OSError):
            self._wait(self._delay.delay_close)
        super().close()


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Delay)

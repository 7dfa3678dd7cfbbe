"""The error filter: requests fail, at random or always, to see what clients make of that."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable

from nbdkitpy import (
    Buffer,
    Client,
    Filter,
    FilterHandle,
    Handle,
    Parameter,
    choice,
    hookimpl,
    parse_path,
    parse_probability,
)

__all__ = ["Error", "register_filters"]

#: Verbs that can be made to fail, as in names of parameters.
_VERBS = ("pread", "pwrite", "trim", "zero", "extents", "cache")

#: What may follow ``error`` and ``error-VERB`` in names of parameters.
_SUFFIXES = ("", "-rate", "-file")

#: Parameters that stand for others, which are set by them; as ever, what is given last counts.
_SETS = {f"error{suffix}": tuple(f"error-{verb}{suffix}" for verb in _VERBS) for suffix in _SUFFIXES}


def _parse_rate(text: str) -> float:
    rate = parse_probability(text)
    if rate > 1:
        raise ValueError("a rate from 0% to 100%")
    return rate


def _error(verb: str) -> tuple[Parameter[str], Parameter[float], Parameter[str | None]]:
    """The three parameters that are about `verb`, or all verbs."""
    which, all_verbs = (f"{verb} requests", "") if verb else ("requests", " Default: EIO.")
    return (
        Parameter(
            choice("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN"),
            default="EIO",
            metavar="ERROR",
            help=f"The error of {which} that are made to fail.{all_verbs}",
        ),
        Parameter(
            _parse_rate, default=0.0, metavar="RATE", help=f"How many {which} fail: 10%, 0.1 or 1:10. Default: 0."
        ),
        Parameter(parse_path, metavar="FILENAME", help=f"Make {which} fail only while this file exists."),
    )


class Error(Filter):
    """Make requests fail at given rates.

    Args:
        chance: Returns numbers from 0 to just below 1; a request fails if its number is less than the rate.
    """

    name = "error"
    longname = "nbdkitpy error filter"
    description = "Inject errors, to test clients."
    multi_process = True

    error, error_rate, error_file = _error("")
    error_pread, error_pread_rate, error_pread_file = _error("pread")
    error_pwrite, error_pwrite_rate, error_pwrite_file = _error("pwrite")
    error_trim, error_trim_rate, error_trim_file = _error("trim")
    error_zero, error_zero_rate, error_zero_file = _error("zero")
    error_extents, error_extents_rate, error_extents_file = _error("extents")
    error_cache, error_cache_rate, error_cache_file = _error("cache")

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        super().__init__()
        self._chance = chance

    def config(self, key: str, value: str) -> bool:
        if not super().config(key, value):
            return False
        for name in _SETS.get(key, ()):
            super().config(name, value)
        return True

    def wrap(self, handle: Handle, client: Client) -> Handle:
        dice = {verb: self._die(verb) for verb in _VERBS}
        return _ErrorHandle(handle, {verb: die for verb, die in dice.items() if die is not None})

    def _die(self, verb: str) -> Callable[[], None] | None:
        """Return what raises an error now and then, or None if `verb` never fails."""
        name: str = getattr(self, f"error_{verb}")
        rate: float = getattr(self, f"error_{verb}_rate")
        path: str | None = getattr(self, f"error_{verb}_file")
        if not rate:
            return None
        number = int(getattr(errno, name))
        text = f"injecting {name} error into {verb}"
        chance = self._chance

        def roll() -> None:
            if chance() < rate and (path is None or os.path.exists(path)):
                raise OSError(number, text)

        return roll


def _never() -> None:
    """Raise nothing."""


class _ErrorHandle(FilterHandle):
    """Rolls the die of a verb before it is passed on; verbs without one pass at no cost."""

    def __init__(self, next: Handle, dice: dict[str, Callable[[], None]]) -> None:
        super().__init__(next, untouched=set(_VERBS) - set(dice))
        self._roll_pread = dice.get("pread", _never)
        self._roll_pwrite = dice.get("pwrite", _never)
        self._roll_trim = dice.get("trim", _never)
        self._roll_zero = dice.get("zero", _never)
        self._roll_extents = dice.get("extents", _never)
        self._roll_cache = dice.get("cache", _never)

    def pread(self, count: int, offset: int) -> Buffer:
        self._roll_pread()
        return self.next.pread(count, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._roll_pwrite()
        self.next.pwrite(data, offset, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._roll_trim()
        self.next.trim(count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._roll_zero()
        self.next.zero(count, offset, flags)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self._roll_extents()
        return self.next.extents(count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self._roll_cache()
        self.next.cache(count, offset)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Error)

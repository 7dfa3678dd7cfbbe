"""The nozero filter: zeroes are written in other ways than the plugin's own, or not offered at all."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nbdkitpy import Client, Filter, FilterHandle, Flags, Handle, Parameter, Support, choice, hookimpl

__all__ = ["NoZero"]

_FUA = int(Flags.FUA)
_MAY_TRIM = int(Flags.MAY_TRIM)
_FAST_ZERO = int(Flags.FAST_ZERO)

_PIECE = 1 << 20  # zeroes are written in pieces of so many bytes at most


class NoZero(Filter):
    """Put one handle around for what becomes of zeroes, and another for what becomes of fast ones."""

    name = "nozero"
    longname = "nbdkitpy nozero filter"
    description = "Write zeroes in another way than the plugin does."
    multi_process = True

    zero_mode = Parameter(
        choice("none", "emulate", "notrim", "plugin"),
        default="none",
        aliases=("zeromode",),
        metavar="MODE",
        help="How zeroes are written: not by a command of their own, by writing, by the plugin without trimming, or"
        " by the plugin.",
    )
    fast_zero_mode = Parameter(
        choice("default", "none", "slow", "ignore"),
        default="default",
        aliases=("fastzeromode",),
        metavar="MODE",
        help="What becomes of fast zeroes: as zero-mode has it, not offered, always refused, or done as others are.",
    )

    def wrap(self, handle: Handle, client: Client) -> Handle:
        if not handle.can_write():
            return handle
        if self.zero_mode == "none":
            return _WithoutZero(handle)
        if self.zero_mode != "emulate" and handle.can_zero() is Support.NONE:
            raise OSError(errno.EINVAL, f"nozero: zero-mode={self.zero_mode} needs what can write zeroes behind it")
        for layer in (_ZERO_MODES[self.zero_mode], _FAST_ZERO_MODES[self.fast_zero_mode]):
            handle = handle if layer is None else layer(handle)
        return handle


class _WithoutZero(FilterHandle):
    def can_zero(self) -> Support:
        return Support.NONE


class _Writing(FilterHandle):
    """Writes zeroes as data, none of them fast."""

    def __init__(self, next: Handle) -> None:
        super().__init__(next)
        block = next.block_size()
        self._piece = min(_PIECE, block.maximum) if block else _PIECE
        self._fua_is_native = next.can_fua() is Support.NATIVE

    def can_zero(self) -> Support:
        return Support.EMULATE

    def can_fast_zero(self) -> bool:
        return True

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & _FAST_ZERO:
            raise _too_slow()
        zeroes = memoryview(bytes(min(count, self._piece)))
        end = offset + count
        for start in range(offset, end, self._piece):
            rest = end - start
            # Where it is done by a flush, that of the last piece covers the others too.
            fua = flags & _FUA if self._fua_is_native or rest <= self._piece else 0
            self.next.pwrite(zeroes[:rest], start, fua)


class _NotTrimming(FilterHandle):
    inline = frozenset({"zero"})

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags & ~_MAY_TRIM)


class _WithoutFastZero(FilterHandle):
    def can_fast_zero(self) -> bool:
        return False


class _RefusingFastZero(FilterHandle):
    inline = frozenset({"zero"})

    def can_fast_zero(self) -> bool:
        return True

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & _FAST_ZERO:
            raise _too_slow()
        self.next.zero(count, offset, flags)


class _IgnoringFastZero(FilterHandle):
    inline = frozenset({"zero"})

    def can_fast_zero(self) -> bool:
        return True

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags & ~_FAST_ZERO)


def _too_slow() -> OSError:
    return OSError(errno.ENOTSUP, "nozero: fast zeroes are refused")


_ZERO_MODES: Mapping[str, type[FilterHandle] | None] = MappingProxyType(
    {"emulate": _Writing, "notrim": _NotTrimming, "plugin": None}
)
_FAST_ZERO_MODES: Mapping[str, type[FilterHandle] | None] = MappingProxyType(
    {"default": None, "none": _WithoutFastZero, "slow": _RefusingFastZero, "ignore": _IgnoringFastZero}
)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(NoZero)

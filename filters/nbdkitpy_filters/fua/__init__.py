"""The fua filter: what becomes of forced unit access (FUA) and of flushes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from types import MappingProxyType

from nbdkitpy import Client, Filter, FilterHandle, Flags, Handle, Parameter, Support, choice, hookimpl, parse_bool

__all__ = ["Fua"]

_FUA = int(Flags.FUA)


class Fua(Filter):
    """Put a handle around that does what `fua_mode` says."""

    name = "fua"
    longname = "nbdkitpy fua filter"
    description = "Change how writes get to stable storage."
    multi_process = True

    fua_mode = Parameter(
        choice("none", "emulate", "native", "force", "pass", "discard"),
        default="none",
        aliases=("fuamode",),
        metavar="MODE",
        help="What becomes of FUA: not offered, done by a flush, left to the plugin, put on every write, passed on, or"
        " discarded together with flushes, which is unsafe.",
    )
    flush_on_close = Parameter(
        parse_bool,
        default=False,
        metavar="BOOL",
        help="Flush when a client closes its connection.",
    )

    def wrap(self, handle: Handle, client: Client) -> Handle:
        if self.flush_on_close:
            _need(handle.can_flush(), "flush-on-close=true", "flush")
            handle = handle if client.is_probe else _FlushingAtEnd(handle)
        if not handle.can_write():
            return handle
        needed = _NEEDED.get(self.fua_mode)
        if needed is not None:
            can, what = needed
            _need(can(handle), f"fua-mode={self.fua_mode}", what)
        layer = _MODES[self.fua_mode]
        return handle if layer is None else layer(handle)


def _need(is_there: bool, setting: str, what: str) -> None:
    if not is_there:
        raise OSError(errno.EINVAL, f"fua: {setting} needs what can {what} behind it")


class _WithoutFua(FilterHandle):
    def can_fua(self) -> Support:
        return Support.NONE


class _Native(FilterHandle):
    """Says that it does FUA itself; if an inner layer does it by a flush, that is not to be seen."""

    def can_fua(self) -> Support:
        return Support.NATIVE


class _Emulating(FilterHandle):
    """Flushes after each request with FUA. Without FUA, nothing waits that did not before."""

    inline = frozenset({"pwrite", "trim", "zero"})

    def can_fua(self) -> Support:
        return Support.EMULATE

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset, flags & ~_FUA)
        if flags & _FUA:
            self.next.flush()

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags & ~_FUA)
        if flags & _FUA:
            self.next.flush()

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags & ~_FUA)
        if flags & _FUA:
            self.next.flush()


class _WithoutFlush(FilterHandle):
    """Offers FUA and flush, the latter doing nothing."""

    inline = frozenset({"flush"})

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_flush(self) -> bool:
        return True

    def flush(self) -> None:
        pass


class _Forcing(_WithoutFlush):
    """Puts FUA on all that writes, which so is stable when it has returned: that is why flush has nothing to do."""

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset, flags | _FUA)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags | _FUA)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags | _FUA)


class _Discarding(_WithoutFlush):
    """Takes FUA away."""

    inline = frozenset({"pwrite", "flush", "trim", "zero"})

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset, flags & ~_FUA)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags & ~_FUA)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags & ~_FUA)


class _FlushingAtEnd(FilterHandle):
    """Flushes before it is closed, once."""

    _is_open = True

    def close(self) -> None:
        was_open, self._is_open = self._is_open, False
        try:
            if was_open:
                self.next.flush()
        finally:
            super().close()


def _can_flush(handle: Handle) -> bool:
    return handle.can_flush()


def _can_fua(handle: Handle) -> bool:
    return handle.can_fua() is not Support.NONE


#: What the inner layers have to be capable of.
_NEEDED: Mapping[str, tuple[Callable[[Handle], bool], str]] = MappingProxyType(
    {"emulate": (_can_flush, "flush"), "native": (_can_fua, "do FUA"), "force": (_can_fua, "do FUA")}
)
_MODES: Mapping[str, type[FilterHandle] | None] = MappingProxyType(
    {
        "none": _WithoutFua,
        "emulate": _Emulating,
        "native": _Native,
        "force": _Forcing,
        "pass": None,
        "discard": _Discarding,
    }
)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Fua)

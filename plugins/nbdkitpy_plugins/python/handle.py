"""An open export of a script: a handle that overrides what the script defines, and nothing else."""

from __future__ import annotations

import errno
import operator
from collections.abc import Callable, Iterable
from typing import Any

from nbdkitpy import BlockSize, Buffer, Flags, Handle, Support

from .api import Api, Caller
from .script import Script

__all__ = ["ScriptHandle", "handle_class"]

#: The thread's own; looked up once, as each request sets two of its attributes.
_CALLS = Api.calls

_NO_BOUND = 0xFFFFFFFF
_MAY_TRIM = int(Flags.MAY_TRIM)
_FAST_ZERO = int(Flags.FAST_ZERO)
_NOT_SUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP})


class ScriptHandle(Handle):
    """What a script's ``open`` returned, and for whom. See :func:`handle_class` for the verbs."""

    def __init__(self, script: Script, handle: object, caller: Caller) -> None:
        self._script = script
        self._callbacks = script.callbacks
        self._handle = handle
        self._caller = caller

    def get_size(self) -> int:
        answer = self._call("get_size")
        try:
            return operator.index(answer)
        except TypeError:
            raise TypeError(f"{self._script.path}: get_size must return an int, not {answer!r}") from None

    def close(self) -> None:
        if self._script.has("close"):
            self._call("close")

    def _call(self, name: str, *args: object) -> Any:
        return self._script.call(name, self._handle, *args, caller=self._caller)

    def _failure(self, error: Exception) -> Exception:
        return self._script.failure(error)

    def _is_true(self, name: str) -> bool:
        """Ask a question that is answered by yes or no. nbdkit takes nothing but True for a yes."""
        answer = self._call(name)
        if answer is not True and (answer or answer is None):
            meant = bool(answer)
            self._script.warn_once(name, f"{name} returned {answer!r}, not True or False; taken for {meant}")
        return bool(answer)

    def _support(self, name: str) -> Support:
        answer = self._call(name)
        try:
            return Support(operator.index(answer))
        except (TypeError, ValueError):
            prefix = name.removeprefix("can_").upper()
            wanted = ", ".join(f"nbdkit.{prefix}_{support.name}" for support in Support)
            raise ValueError(f"{self._script.path}: {name} must return one of {wanted}, not {answer!r}") from None


# --- what a script may define: each becomes a method of its handles' class ---


def _yes_or_no(name: str) -> Callable[[ScriptHandle], bool]:
    def ask(self: ScriptHandle) -> bool:
        return self._is_true(name)

    return ask


def _can_zero(self: ScriptHandle) -> Support:
    return Support.NATIVE if self._is_true("can_zero") else Support.EMULATE


def _can_fua(self: ScriptHandle) -> Support:
    support = self._support("can_fua")
    if support is Support.NATIVE and self._script.version == 1:  # whose callbacks are not told of it
        return Handle.can_fua(self)
    return support


def _can_cache(self: ScriptHandle) -> Support:
    return self._support("can_cache")


def _block_size(self: ScriptHandle) -> BlockSize | None:
    answer = self._call("block_size")
    try:
        minimum, preferred, maximum = map(operator.index, answer)
    except (TypeError, ValueError):
        raise ValueError(f"{self._script.path}: block_size must return three ints, not {answer!r}") from None
    if not (minimum or preferred or maximum):
        return None
    return BlockSize(minimum, preferred, _NO_BOUND if maximum == -1 else maximum)


def _export_description(self: ScriptHandle) -> str | None:
    description: str | None = self._call("export_description")
    return description


def _cache(self: ScriptHandle, count: int, offset: int) -> None:
    self._call("cache", count, offset, 0)


def _extents(self: ScriptHandle, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
    found = self._call("extents", count, offset, flags)
    try:
        return [*found]  # now, since a generator does its work when it is asked
    except Exception as error:
        raise self._failure(error) from error


# --- the verbs of API version 1 ---


def _pread_1(self: ScriptHandle, count: int, offset: int) -> Buffer:
    _CALLS.caller = self._caller
    _CALLS.error = 0
    try:
        data = self._callbacks["pread"](self._handle, count, offset)
    except Exception as error:
        raise self._failure(error) from error
    return data if type(data) is bytes and len(data) == count else _cut(data, count)


def _cut(data: Any, count: int) -> memoryview:
    """The first `count` bytes of what a script returned."""
    try:
        view = memoryview(data).cast("B")
    except TypeError:
        raise TypeError(f"pread must return bytes or the like, not {type(data).__name__}") from None
    if len(view) < count:
        raise OSError(errno.EIO, f"pread must return {count} bytes, not {len(view)}")
    return view[:count]


def _pwrite_1(self: ScriptHandle, data: memoryview, offset: int, flags: int) -> None:
    _CALLS.caller = self._caller
    _CALLS.error = 0
    try:
        self._callbacks["pwrite"](self._handle, data.toreadonly(), offset)
    except Exception as error:
        raise self._failure(error) from error


def _flush_1(self: ScriptHandle) -> None:
    self._call("flush")


def _trim_1(self: ScriptHandle, count: int, offset: int, flags: int) -> None:
    self._call("trim", count, offset)


def _zero_1(self: ScriptHandle, count: int, offset: int, flags: int) -> None:
    if flags & _FAST_ZERO:  # of which it cannot be told
        raise OSError(errno.ENOTSUP, "API version 1 has no fast zero")
    self._call("zero", count, offset, bool(flags & _MAY_TRIM))
    _check_zero()


def _check_zero() -> None:
    # A script may say so without raising an exception.
    if _CALLS.error in _NOT_SUPPORTED:
        raise OSError(_CALLS.error, "zero is not supported by the script")


# --- the verbs of API version 2 ---


def _pread_2(self: ScriptHandle, count: int, offset: int) -> Buffer:
    _CALLS.caller = self._caller
    _CALLS.error = 0
    buffer = bytearray(count)
    try:
        # A view: assigning too few bytes to a bytearray would make it shorter.
        result = self._callbacks["pread"](self._handle, memoryview(buffer), offset, 0)
    except Exception as error:
        raise self._failure(error) from error
    if result is not None and isinstance(result, (bytes, bytearray)):
        raise TypeError("pread must fill the buffer that it is given, not return bytes: API_VERSION is 2")
    return buffer


def _pwrite_2(self: ScriptHandle, data: memoryview, offset: int, flags: int) -> None:
    _CALLS.caller = self._caller
    _CALLS.error = 0
    try:
        self._callbacks["pwrite"](self._handle, data.toreadonly(), offset, flags)
    except Exception as error:
        raise self._failure(error) from error


def _flush_2(self: ScriptHandle) -> None:
    self._call("flush", 0)


def _trim_2(self: ScriptHandle, count: int, offset: int, flags: int) -> None:
    self._call("trim", count, offset, flags)


def _zero_2(self: ScriptHandle, count: int, offset: int, flags: int) -> None:
    self._call("zero", count, offset, flags)
    _check_zero()


_QUESTIONS: dict[str, Callable[..., object]] = {
    "can_zero": _can_zero,
    "can_fua": _can_fua,
    "can_cache": _can_cache,
    "block_size": _block_size,
    "export_description": _export_description,
    **{
        name: _yes_or_no(name)
        for name in (
            "can_write",
            "can_fast_zero",
            "can_trim",
            "can_flush",
            "is_rotational",
            "can_multi_conn",
            "can_extents",
        )
    },
}

_METHODS: dict[int, dict[str, Callable[..., object]]] = {
    1: {
        **_QUESTIONS,
        "pread": _pread_1,
        "pwrite": _pwrite_1,
        "flush": _flush_1,
        "trim": _trim_1,
        "zero": _zero_1,
        "cache": _cache,
        "extents": _extents,
    },
    2: {
        **_QUESTIONS,
        "pread": _pread_2,
        "pwrite": _pwrite_2,
        "flush": _flush_2,
        "trim": _trim_2,
        "zero": _zero_2,
        "cache": _cache,
        "extents": _extents,
    },
}


def handle_class(script: Script) -> type[ScriptHandle]:
    """Return a class that overrides what `script` defines, from which the server infers what it can do."""
    methods = {name: method for name, method in _METHODS[script.version].items() if script.has(name)}
    return type("ScriptHandle", (ScriptHandle,), methods)

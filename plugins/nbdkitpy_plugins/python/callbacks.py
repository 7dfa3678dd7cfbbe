"""The callbacks that a script may define, and whether those that it defines can be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

__all__ = ["CALLBACKS", "LATEST_API", "NOT_NBDKITS", "REQUIRED", "Callback", "Signature", "definition", "mismatch"]

#: What a script defines.
Callback: TypeAlias = Callable[..., Any]

#: The newest version of the callbacks' parameters; see API_VERSION of nbdkit's manual.
LATEST_API = 2

REQUIRED = ("open", "get_size", "pread")


class Signature(NamedTuple):
    """The parameters with which a callback is called, by API version."""

    version_1: str
    version_2: str

    def parameters(self, version: int) -> str:
        """Return those of one version."""
        return self.version_2 if version == LATEST_API else self.version_1


def _same(parameters: str) -> Signature:
    return Signature(parameters, parameters)


#: Every callback, in the order of nbdkit's manual, and one more.
CALLBACKS: dict[str, Signature] = {
    "dump_plugin": _same(""),
    "config": _same("key, value"),
    "config_complete": _same(""),
    "thread_model": _same(""),
    "get_ready": _same(""),
    "after_fork": _same(""),
    "cleanup": _same(""),
    "list_exports": _same("readonly, is_tls"),
    "default_export": _same("readonly, is_tls"),
    "preconnect": _same("readonly"),
    "open": _same("readonly"),
    "close": _same("h"),
    "export_description": _same("h"),
    "get_size": _same("h"),
    "block_size": _same("h"),
    "is_rotational": _same("h"),
    "can_multi_conn": _same("h"),
    "can_write": _same("h"),
    "can_flush": _same("h"),
    "can_trim": _same("h"),
    "can_zero": _same("h"),
    "can_fast_zero": _same("h"),
    "can_fua": _same("h"),
    "can_cache": _same("h"),
    "can_extents": _same("h"),
    "pread": Signature("h, count, offset", "h, buf, offset, flags"),
    "pwrite": Signature("h, buf, offset", "h, buf, offset, flags"),
    "flush": Signature("h", "h, flags"),
    "trim": Signature("h, count, offset", "h, count, offset, flags"),
    "zero": Signature("h, count, offset, may_trim", "h, count, offset, flags"),
    "cache": _same("h, count, offset, flags"),
    "extents": _same("h, count, offset, flags"),
    "unload": _same(""),
}

#: What nbdkit does not call, so that a script may have something else of that name.
NOT_NBDKITS = frozenset({"unload"})


def _takes(callback: Callback, parameters: str) -> bool:
    """Tell whether `callback` can be called with `parameters`, as far as that can be known."""
    try:
        inspect.signature(callback).bind(*parameters.split(", ") if parameters else ())
    except TypeError:
        return False
    except ValueError:  # one that is not written in Python does not say
        return True
    return True


def mismatch(name: str, callback: Callback, version: int) -> str | None:
    """Return what is wrong with the parameters of `callback`, or None."""
    signature = CALLBACKS[name]
    wanted = signature.parameters(version)
    if _takes(callback, wanted):
        return None
    other = LATEST_API + 1 - version
    hint = ""
    if _takes(callback, signature.parameters(other)):
        hint = f"; with API_VERSION = {other} in the script it would be right"
    found = inspect.signature(callback)
    return f"{name} must take ({wanted}) as API_VERSION is {version}, not {found}{hint}"


def definition(callback: Callback, path: str) -> str | None:
    """Return the file and line where `callback` is defined, if that is in the file of `path`."""
    code = getattr(inspect.unwrap(callback), "__code__", None)
    if code is None or code.co_filename != path:
        return None
    return f"{path}:{code.co_firstlineno}"

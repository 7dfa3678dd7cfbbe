"""What scripts get by ``import nbdkit``: nbdkit's functions and constants for Python, as of 1.48."""

from __future__ import annotations

import logging
import operator
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import ClassVar, NamedTuple, TypeVar

from nbdkitpy import (
    Client,
    ExtentType,
    Flags,
    Plugin,
    Support,
    ThreadModel,
    parse_bool,
    parse_delay,
    parse_probability,
    parse_size,
    read_password,
)

from .hexdump import hexdiff, hexdump

__all__ = ["Api", "Caller", "Calls", "Error", "constants", "make_module"]

_logger = logging.getLogger("nbdkitpy.python")

_NANOSECONDS = 1_000_000_000
_LONGEST_SLEEP = (1 << 31) - 1  # seconds

#: What of :class:`Api` a script sees, under the same names.
_FUNCTIONS = (
    "debug",
    "debug_hexdiff",
    "debug_hexdump",
    "disconnect",
    "export_name",
    "is_tls",
    "name",
    "nanosleep",
    "parse_bool",
    "parse_delay",
    "parse_probability",
    "parse_size",
    "peer_gid",
    "peer_pid",
    "peer_security_context",
    "peer_tls_dn",
    "peer_tls_issuer_dn",
    "peer_uid",
    "read_password",
    "set_error",
    "shutdown",
    "stdio_safe",
    "timestamp",
)

T = TypeVar("T")


class Error(OSError):
    """For scripts to raise: ``nbdkit.Error("text")``, or ``nbdkit.Error(errno.ENOSPC, "text")``."""


class Caller(NamedTuple):
    """On whose behalf a callback is called."""

    plugin: Plugin
    client: Client
    export_name: str | None  #: None while none is open


class Calls(threading.local):
    """What the callback that the current thread is in has to do with; what it has said of its failure."""

    caller: Caller | None = None
    error: int = 0  #: of set_error; 0 if it was not called


class Api:
    """The functions of the module that one script imports.

    Args:
        plugin: The one that runs the script.
    """

    #: Shared by all scripts of the process, since one that imports the module late may find that of another.
    calls: ClassVar[Calls] = Calls()

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        #: Whether the server's own use of the standard streams is still to come.
        self.configuring = True

    # --- messages ---

    def debug(self, message: str) -> None:
        """Write a debug message."""
        _logger.debug("%s", _text("debug", message))

    def debug_hexdump(self, buf: bytes, prefix: str | None, start: int) -> None:
        """Write the bytes of `buf` as debug messages; the first is said to lie at `start`."""
        lines = hexdump(memoryview(buf), _prefix("debug_hexdump", prefix), operator.index(start))
        _debug_lines(lines)

    def debug_hexdiff(self, buf1: bytes, buf2: bytes, prefix: str | None, start: int) -> None:
        """Write the bytes of `buf1` and, where they are different, of `buf2` as debug messages."""
        one, other = memoryview(buf1), memoryview(buf2)
        if one.nbytes != other.nbytes:
            raise RuntimeError("nbdkit.debug_hexdiff: buffers must have equal length")
        _debug_lines(hexdiff(one, other, _prefix("debug_hexdiff", prefix), operator.index(start)))

    def timestamp(self) -> str:
        """Return the time, in UTC, for messages."""
        seconds, microseconds = divmod(time.time_ns() // 1000, 1_000_000)
        return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(seconds))}.{microseconds:06d}"

    def name(self) -> str | None:
        """Return what ``--name`` calls the server, or None."""
        return self._of_caller().server_name or None

    def set_error(self, err: int) -> None:
        """Have the client told `err`, an errno, if the callback then raises an exception."""
        self.calls.error = operator.index(err)

    # --- the server and the client ---

    def shutdown(self) -> None:
        """Begin an orderly shutdown of the server."""
        self._of_caller().server.shutdown()

    def disconnect(self, force: bool) -> None:
        """End the connection of the client: at once, or when what it has asked for is done."""
        self._caller("disconnect").client.disconnect(bool(force))

    def nanosleep(self, sec: int, nsec: int) -> None:
        """Sleep for `sec` seconds and `nsec` nanoseconds.

        Raises:
            OSError: ESHUTDOWN, as soon as the client is gone or the server ends.
        """
        seconds = operator.index(sec) + operator.index(nsec) / _NANOSECONDS
        if sec < 0 or nsec < 0 or seconds > _LONGEST_SLEEP:
            raise ValueError(f"nbdkit.nanosleep: must be 0 to {_LONGEST_SLEEP} seconds, not {sec} s and {nsec} ns")
        caller = self.calls.caller
        (time.sleep if caller is None else caller.client.sleep)(seconds)

    def stdio_safe(self) -> bool:
        """Tell whether a user may be asked something: during configuration, if standard input is one."""
        return self.configuring and not _is_nothing(0)

    def export_name(self) -> str:
        """Return the name of the export that the client has open. It may be anything that a client sends."""
        name = self._caller("export_name", RuntimeError).export_name
        if name is None:
            raise RuntimeError("nbdkit.export_name: no export is open")
        return name

    def is_tls(self) -> bool:
        """Tell whether the client has completed a TLS handshake."""
        caller = self.calls.caller
        return caller is not None and caller.client.tls

    def peer_pid(self) -> int:
        """Return the process number of the client."""
        return self._known("peer_pid", self._caller("peer_pid").client.pid)

    def peer_uid(self) -> int:
        """Return the user number of the client."""
        return self._known("peer_uid", self._caller("peer_uid").client.uid)

    def peer_gid(self) -> int:
        """Return the group number of the client."""
        return self._known("peer_gid", self._caller("peer_gid").client.gid)

    def peer_security_context(self) -> str:
        """Return the security label of the client."""
        return self._known("peer_security_context", self._caller("peer_security_context").client.security_label)

    def peer_tls_dn(self) -> str:
        """Return the subject of the client's certificate, "" if it has none."""
        return self._caller("peer_tls_dn").client.tls_dn or ""

    def peer_tls_issuer_dn(self) -> str:
        """Return who issued the client's certificate, "" if it has none."""
        return self._caller("peer_tls_issuer_dn").client.tls_issuer_dn or ""

    # --- parsing ---

    def parse_size(self, str: str) -> int:
        """Return the bytes of a size such as ``10M``."""
        return _parsed("parse_size", parse_size, "", str)

    def parse_bool(self, str: str) -> bool:
        """Return the truth value of a word such as ``yes``."""
        return _parsed("parse_bool", parse_bool, "", str)

    def parse_probability(self, what: str, str: str) -> float:
        """Return the number of a probability such as ``10%``; `what` is what messages call it."""
        return _parsed("parse_probability", parse_probability, what, str)

    def parse_delay(self, what: str, str: str) -> tuple[int, int]:
        """Return the seconds and nanoseconds of a time such as ``10ms``; `what` is what messages call it."""
        return divmod(round(_parsed("parse_delay", parse_delay, what, str) * _NANOSECONDS), _NANOSECONDS)

    def read_password(self, value: str) -> bytes:
        """Return the password that a parameter stands for."""
        try:
            return read_password(_text("read_password", value)).encode()
        except ValueError as error:
            raise ValueError(f"nbdkit.read_password: must be {error}") from None

    # --- helpers ---

    def _of_caller(self) -> Plugin:
        caller = self.calls.caller
        return self._plugin if caller is None else caller.plugin

    def _caller(self, function: str, kind: type[Exception] = ValueError) -> Caller:
        caller = self.calls.caller
        if caller is None:
            raise kind(f"nbdkit.{function}: not called on behalf of a client in this thread")
        return caller

    def _known(self, function: str, value: T | None) -> T:
        if value is None:
            raise ValueError(f"nbdkit.{function}: not known of this client")
        return value


def make_module(api: Api) -> ModuleType:
    """Return the module that ``import nbdkit`` is to give."""
    module = ModuleType("nbdkit", "Functions and constants of the server, for the script that it runs.")
    vars(module).update({name: getattr(api, name) for name in _FUNCTIONS}, Error=Error, **constants())
    return module


def constants() -> dict[str, int]:
    """Return the constants of the module by name."""
    values: dict[str, dict[str, int]] = {
        "THREAD_MODEL": {model.name: model for model in ThreadModel},
        "FLAG": {name: Flags[name] for name in ("MAY_TRIM", "FUA", "REQ_ONE", "FAST_ZERO")},
        "FUA": {support.name: support for support in Support},
        "CACHE": {support.name: support for support in Support},
        "EXTENT": {name: ExtentType[name] for name in ("HOLE", "ZERO")},
    }
    return {f"{kind}_{name}": int(value) for kind, members in values.items() for name, value in members.items()}


def _debug_lines(lines: Iterator[str]) -> None:
    if _logger.isEnabledFor(logging.DEBUG):
        for line in lines:
            _logger.debug("%s", line)


def _text(function: str, value: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"nbdkit.{function}: the argument must be a str, not {type(value).__name__}")
    return value


def _prefix(function: str, prefix: str | None) -> str:
    return "" if prefix is None else _text(function, prefix)


def _parsed(function: str, parse: Callable[[str], T], what: str, text: str) -> T:
    try:
        return parse(_text(function, text))
    except ValueError as error:
        raise ValueError(f"nbdkit.{function}: {what or 'it'} must be {error}, not {text!r}") from None


def _is_nothing(fd: int) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(os.devnull))
    except OSError:
        return True

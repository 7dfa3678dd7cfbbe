"""What nbdkit's sh and eval plugins have in common: a plugin of which each method is a process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from nbdkitpy import (
    BlockSize,
    Client,
    ConfigError,
    Export,
    Extent,
    ExtentType,
    Flags,
    Handle,
    Plugin,
    Support,
    ThreadModel,
    parse_size,
)
from nbdkitpy_plugins._methods import MAX_KNOWN_STATUS, Reply, Status, call_method

__all__ = ["METHODS", "MethodHandle", "MethodPlugin", "parse_exports", "parse_extents"]

T = TypeVar("T")

#: Every method, but load, which the plugins treat differently.
METHODS = (
    "after_fork",
    "block_size",
    "cache",
    "can_cache",
    "can_extents",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_write",
    "can_zero",
    "close",
    "config",
    "config_complete",
    "default_export",
    "dump_plugin",
    "export_description",
    "extents",
    "flush",
    "get_ready",
    "get_size",
    "is_rotational",
    "list_exports",
    "open",
    "pread",
    "preconnect",
    "pwrite",
    "thread_model",
    "trim",
    "unload",
    "zero",
)

#: The words of flags, in nbdkit's order.
_FLAG_WORDS = (
    (Flags.FUA, "fua"),
    (Flags.MAY_TRIM, "may_trim"),
    (Flags.FAST_ZERO, "fast"),
    (Flags.REQ_ONE, "req_one"),
)

_SUPPORT = {support.name.lower(): support for support in Support}
_MODELS = {model.name.lower(): model for model in ThreadModel}
_TYPES = {"hole": ExtentType.HOLE, "zero": ExtentType.ZERO}


class MethodPlugin(Plugin):
    """Calls methods. A subclass says how."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = ""
        self._env: dict[str, str] = {}
        self._logger = logging.getLogger(f"nbdkitpy.{self.name}")

    def command(self, method: str) -> Sequence[str] | None:
        """Return the words of the command to which a method and its arguments are given; None if it is missing."""
        raise NotImplementedError

    # --- calls ---

    def call(self, method: str, *args: str, client: Client | None = None, data: memoryview | None = None) -> Reply:
        """Call a method on behalf of `client`.

        Raises:
            OSError: it failed.
        """
        command = self.command(method)
        if command is None:
            return Reply(Status.MISSING)
        return call_method([*command, method, *args], data, self._env, self.server.shutdown, client)

    def expect(
        self, method: str, *args: str, client: Client | None = None, data: memoryview | None = None
    ) -> Reply | None:
        """Call a method that has no yes and no; None if it is missing.

        Raises:
            OSError: it failed, or said no.
        """
        reply = self.call(method, *args, client=client, data=data)
        if reply.status is Status.FALSE:
            raise OSError(errno.EIO, f"the method {method} must not exit with status {Status.FALSE:d}")
        return None if reply.status is Status.MISSING else reply

    def configure(self, method: str, *args: str) -> Reply | None:
        """Call a method in the life of the server; None if it is missing.

        Raises:
            ConfigError: it failed.
        """
        try:
            return self.expect(method, *args)
        except OSError as error:
            raise ConfigError(f"{self.name}: {method}: {error.strerror}") from error

    # --- life of the server ---

    def load(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="nbdkitpy-")
        self._env = {**os.environ, "tmpdir": self._directory}

    def unload(self) -> None:
        with contextlib.suppress(OSError):  # as in nbdkit
            self.call("unload")
        shutil.rmtree(self._directory, ignore_errors=True)

    def configure_key(self, key: str, value: str) -> None:
        """Give a parameter to the method ``config``.

        Raises:
            ConfigError: it refuses it, or is missing.
        """
        if self.configure("config", key, value) is None:
            raise ConfigError(f"{self.name}: there is no method config to take the parameter {key}=")

    def config_complete(self) -> None:
        super().config_complete()
        self.configure("config_complete")

    def thread_model(self) -> ThreadModel:
        reply = self.configure("thread_model")
        if reply is None:
            return super().thread_model()
        word = reply.text.strip()
        if word not in _MODELS:
            self._logger.debug("thread_model: %r is none, and ignored", word)
        return _MODELS.get(word, super().thread_model())

    def dump(self) -> Mapping[str, str]:
        reply = self.configure("dump_plugin")
        lines = (line.partition("=") for line in reply.text.splitlines()) if reply else ()
        return {"max_known_status": f"{MAX_KNOWN_STATUS:d}", **{key: value for key, _, value in lines}}

    def get_ready(self) -> None:
        self.configure("get_ready")

    def after_fork(self) -> None:
        self.configure("after_fork")

    # --- clients ---

    def preconnect(self, client: Client, readonly: bool) -> None:
        self.expect("preconnect", _word(readonly), client=client)

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        reply = self.expect("list_exports", _word(readonly), _word(client.tls), client=client)
        return super().list_exports(client, readonly) if reply is None else parse_exports(reply.text)

    def default_export(self, client: Client, readonly: bool) -> str:
        reply = self.expect("default_export", _word(readonly), _word(client.tls), client=client)
        return next((export.name for export in parse_exports(reply.text)), "") if reply else ""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        reply = self.expect("open", _word(readonly), export_name, _word(client.tls), client=client)
        return MethodHandle(self, reply.text if reply else "", client)


class MethodHandle(Handle):
    """What the method ``open`` printed. Whether the other methods are there is not known before they are called."""

    def __init__(self, plugin: MethodPlugin, handle: str, client: Client) -> None:
        self._plugin = plugin
        self._handle = handle
        self._client = client
        self._answers: dict[str, bool] = {}

    # --- questions ---

    def get_size(self) -> int:
        return self._parsed("get_size", self._required("get_size").text, parse_size)

    def can_write(self) -> bool:
        return self._is_true("can_write")

    def can_zero(self) -> Support:
        return Support.NATIVE if self._is_true("can_zero") else Support.EMULATE

    def can_fast_zero(self) -> bool:
        reply = self._ask("can_fast_zero")
        if reply.status is Status.MISSING:  # without zero they fail, which is fast
            return self.can_zero() is Support.EMULATE
        return reply.status is Status.OK

    def can_trim(self) -> bool:
        return self._is_true("can_trim")

    def can_fua(self) -> Support:
        support = self._support("can_fua")
        if support is None:
            return Support.EMULATE if self.can_flush() else Support.NONE
        return support

    def can_flush(self) -> bool:
        return self._is_true("can_flush")

    def is_rotational(self) -> bool:
        return self._is_true("is_rotational")

    def can_multi_conn(self) -> bool:
        return self._is_true("can_multi_conn")

    def can_cache(self) -> Support:
        return self._support("can_cache") or Support.NONE

    def can_extents(self) -> bool:
        return self._is_true("can_extents")

    def block_size(self) -> BlockSize | None:
        reply = self._expect("block_size")
        if reply is None:
            return None
        sizes = self._parsed("block_size", reply.text, _parse_block_size)
        return sizes if any(sizes) else None

    def export_description(self) -> str | None:
        reply = self._expect("export_description")
        return None if reply is None else reply.text

    # --- verbs ---

    def pread(self, count: int, offset: int) -> bytes:
        output = self._required("pread", str(count), str(offset)).output
        if len(output) != count:
            raise OSError(errno.EIO, f"the method pread must print {count} bytes, not {len(output)}")
        return output

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._required("pwrite", str(len(data)), str(offset), _flags(flags), data=data)

    def flush(self) -> None:
        self._required("flush")

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._required("trim", str(count), str(offset), _flags(flags))

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._required("zero", str(count), str(offset), _flags(flags))

    def cache(self, count: int, offset: int) -> None:
        self._required("cache", str(count), str(offset))

    def extents(self, count: int, offset: int, flags: int) -> Iterable[Extent]:
        text = self._required("extents", str(count), str(offset), _flags(flags)).text
        return self._parsed("extents", text, parse_extents)

    def close(self) -> None:
        self._expect("close")

    # --- calls ---

    def _ask(self, method: str) -> Reply:
        return self._plugin.call(method, self._handle, client=self._client)

    def _expect(self, method: str, *args: str, data: memoryview | None = None) -> Reply | None:
        return self._plugin.expect(method, self._handle, *args, client=self._client, data=data)

    def _required(self, method: str, *args: str, data: memoryview | None = None) -> Reply:
        reply = self._expect(method, *args, data=data)
        if reply is None:
            raise OSError(errno.EIO, f"there is no method {method}")
        return reply

    def _is_true(self, method: str) -> bool:
        if method not in self._answers:  # what follows from an answer may be asked before it, or after
            self._answers[method] = self._ask(method).status is Status.OK
        return self._answers[method]

    def _support(self, method: str) -> Support | None:
        reply = self._expect(method)
        return None if reply is None else self._parsed(method, reply.text, _parse_support)

    def _parsed(self, method: str, text: str, parse: Callable[[str], T]) -> T:
        try:
            return parse(text.strip())
        except ValueError as error:
            raise ValueError(f"{self._plugin.name}: {method} must print {error}, not {text!r:.200}") from None


# --- what methods print and are given ---


def parse_exports(text: str) -> Iterator[Export]:
    """Yield the exports of a list, in the form that its first line says."""
    form, *lines = text.split("\n") if text else [""]
    if form == "INTERLEAVED":
        names, descriptions = lines[::2], lines[1::2]
    elif form == "NAMES+DESCRIPTIONS":
        half = -(-len(lines) // 2)
        names, descriptions = lines[:half], lines[half:]
    else:
        names, descriptions = lines if form == "NAMES" or not text else [form, *lines], []
    descriptions += [""] * (len(names) - len(descriptions))
    yield from map(Export, names, descriptions)


def parse_extents(text: str) -> list[Extent]:
    """Return the extents of a list: offset, length and perhaps a type on each line.

    Raises:
        ValueError: they are not written so.
    """
    lines = (line.strip() for line in text.splitlines())
    try:
        return [_parse_extent(*line.split()) for line in lines if line and not line.startswith("#")]
    except (TypeError, ValueError):
        raise ValueError("lines of OFFSET LENGTH TYPE (nothing, hole, zero, or hole,zero)") from None


def _parse_extent(offset: str, length: str, kind: str = "0") -> Extent:
    return Extent(parse_size(offset), parse_size(length), _parse_type(kind))


def _parse_type(text: str) -> int:
    kind = 0
    for word in text.split(","):
        kind |= _TYPES[word] if word in _TYPES else int(word)
    return kind


def _parse_block_size(text: str) -> BlockSize:
    sizes = text.split()
    if len(sizes) != 3:
        raise ValueError("three sizes")
    return BlockSize(*map(parse_size, sizes))


def _parse_support(text: str) -> Support:
    if text not in _SUPPORT:
        raise ValueError(f"one of {', '.join(_SUPPORT)}")
    return _SUPPORT[text]


def _flags(flags: int) -> str:
    return ",".join(word for flag, word in _FLAG_WORDS if flags & flag) if flags else ""


def _word(answer: bool) -> str:
    return "true" if answer else "false"

"""The python plugin: serves what a Python script written for nbdkit's plugin of that name says."""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import io
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

from nbdkitpy import Client, ConfigError, Export, Handle, Parameter, Plugin, ThreadModel, hookimpl

from .api import Api, Caller, make_module
from .callbacks import LATEST_API
from .handle import ScriptHandle, handle_class
from .script import Script, parse_script, surroundings

__all__ = ["PythonPlugin", "register_plugins"]

#: Of Python's stable C interface; it has had this number from the beginning.
_ABI_VERSION = 3


class PythonPlugin(Plugin):
    """Calls what one script defines."""

    name = "python"
    longname = "python plugin"
    description = "Serve what a Python script, written for nbdkit or for this plugin, says; see its own documentation."

    script = Parameter(parse_script, required=True, metavar="SCRIPT", help="The script. It gets all other parameters.")

    def __init__(self) -> None:
        super().__init__()
        self._loaded: Script | None = None
        self._surroundings = contextlib.ExitStack()
        self._api = Api(self)

    @property
    def _script(self) -> Script:
        assert self._loaded is not None  # config_complete has made sure of it
        return self._loaded

    # --- life of the server ---

    def magic_config_key(self) -> str | None:
        """Return what the script says; before there is one, the first bare word is that."""
        if self._loaded is None:
            return None
        key = self._loaded.callbacks.get("magic_config_key")
        return str(self._loaded.configure("magic_config_key") if callable(key) else key) if key else None

    def config_help(self, given: Mapping[str, str]) -> str:
        """Return the script's docstring. It is not run for this."""
        try:
            with open(given["script"], "rb") as stream:
                text = ast.get_docstring(ast.parse(stream.read()))
        except (KeyError, OSError, ValueError, SyntaxError):
            return ""
        return f"{os.path.basename(given['script'])}:\n\n{text}" if text else ""

    def config(self, key: str, value: str) -> bool:
        """Load the script, and give it all that comes after it."""
        if self._loaded is None:
            if not super().config(key, value):
                raise ConfigError(f"python: the first parameter must be the script, not {key}=")
            self._load(self.script)
            return True
        if not self._loaded.has("config"):
            raise ConfigError(
                f"python: {self._loaded.path} takes no parameters (it defines no config), but {key}= is given"
            )
        self._loaded.configure("config", key, value)
        return True

    def _load(self, path: str) -> None:
        main = ModuleType("__main__")
        self._surroundings.enter_context(surroundings(path, main, make_module(self._api)))
        self._loaded = Script(path, main)

    def config_complete(self) -> None:
        super().config_complete()
        self._script.configure("config_complete")

    def thread_model(self) -> ThreadModel:
        if self._loaded is None or not self._loaded.has("thread_model"):
            return super().thread_model()
        answer = self._loaded.configure("thread_model")
        try:
            return ThreadModel(answer)
        except ValueError:
            wanted = "one of nbdkit.THREAD_MODEL_..."
            raise ConfigError(
                f"python: {self._loaded.path}: thread_model must return {wanted}, not {answer!r}"
            ) from None

    def dump(self) -> Mapping[str, str]:
        facts = {
            "python_version": platform.python_version(),
            "python_pep_384_abi_version": str(_ABI_VERSION),
            "nbdkit_python_maximum_api_version": str(LATEST_API),
        }
        if self._loaded is not None:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                self._loaded.configure("dump_plugin")
            lines = (line.partition("=") for line in printed.getvalue().splitlines())
            facts.update((key, value) for key, _, value in lines)
        return facts

    def get_ready(self) -> None:
        self._script.configure("get_ready")
        self._api.configuring = False

    def after_fork(self) -> None:
        self._script.configure("after_fork")

    def cleanup(self) -> None:
        self._script.configure("cleanup")

    def unload(self) -> None:
        with self._surroundings:
            if self._loaded is not None:
                self._loaded.configure("unload")

    # --- clients ---

    def preconnect(self, client: Client, readonly: bool) -> None:
        if not self._script.has("preconnect"):
            return
        try:
            self._script.call("preconnect", readonly, caller=Caller(self, client, None))
        except OSError:
            raise
        except Exception as error:  # any exception is the way to refuse a client
            raise OSError(errno.EACCES, str(error)) from error

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        if not self._script.has("list_exports"):
            return super().list_exports(client, readonly)
        answer = self._script.call("list_exports", readonly, client.tls, caller=Caller(self, client, None))
        return self._exports(answer)

    def _exports(self, answer: Iterable[object]) -> Iterator[Export]:
        if isinstance(answer, (str, bytes)):
            raise TypeError(f"{self._script.path}: list_exports must return a list of names, not {answer!r:.80}")
        for entry in answer:
            try:
                export = _export(entry)
            except (TypeError, ValueError):
                wanted = "names, or pairs of name and description"
                raise TypeError(f"{self._script.path}: list_exports must return {wanted}, not {entry!r:.80}") from None
            yield export

    def default_export(self, client: Client, readonly: bool) -> str:
        if not self._script.has("default_export"):
            return super().default_export(client, readonly)
        answer = self._script.call("default_export", readonly, client.tls, caller=Caller(self, client, None))
        try:
            return _text(answer)
        except TypeError:
            raise TypeError(f"{self._script.path}: default_export must return a str, not {answer!r:.80}") from None

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        caller = Caller(self, client, export_name)
        return self._handle_class(self._script, self._script.call("open", readonly, caller=caller), caller)

    @functools.cached_property
    def _handle_class(self) -> type[ScriptHandle]:
        # Made when the first client comes: until then a script may define callbacks.
        return handle_class(self._script)


def _export(entry: Any) -> Export:
    name, description = (entry, None) if isinstance(entry, (str, bytes)) else entry
    return Export(_text(name), _text(description or ""))


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode()
    if not isinstance(value, str):
        raise TypeError
    return value


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Hand over the plugin."""
    register(PythonPlugin)

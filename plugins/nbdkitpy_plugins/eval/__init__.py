"""The eval plugin: serves what pieces of shell script on the command line say, one for each method."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from nbdkitpy import Client, ConfigError, Plugin, hookimpl
from nbdkitpy_plugins._method_plugin import METHODS, MethodPlugin
from nbdkitpy_plugins._methods import SHELL, Reply, Status

__all__ = ["EvalPlugin", "register_plugins"]

#: Called in place of those that are not given.
_MISSING = "missing"

_REQUIRED = "get_size"

#: These are answered by yes if there is the other method, and no script of their own.
_IMPLIED = {f"can_{method}": method for method in ("cache", "extents", "flush", "trim", "zero")} | {
    "can_write": "pwrite"
}


class EvalPlugin(MethodPlugin):
    """Has the shell run a piece of script for each method."""

    name = "eval"
    longname = "eval plugin"
    description = "Serve what pieces of shell script on the command line say, one for each method."

    def __init__(self) -> None:
        super().__init__()
        self._scripts: dict[str, str] = {}

    def config_help(self, given: Mapping[str, str]) -> str:
        """Return the methods."""
        methods = textwrap.fill(", ".join(METHODS), 90)
        return (
            "METHOD=SCRIPT\n\nThe script is run by the shell for each call of the method. All other parameters are"
            f"\ngiven to the method config. missing=SCRIPT is for methods that are not given.\n\n{methods}"
        )

    def command(self, method: str) -> Sequence[str] | None:
        script = self._scripts.get(method, self._scripts.get(_MISSING))
        return None if script is None else [SHELL, "-c", script, method]

    def call(self, method: str, *args: str, client: Client | None = None, data: memoryview | None = None) -> Reply:
        if method not in self._scripts and _IMPLIED.get(method) in self._scripts:
            return Reply(Status.OK, b"native")
        return super().call(method, *args, client=client, data=data)

    def config(self, key: str, value: str) -> bool:
        """Take the script of a method, or give a parameter to the method ``config``."""
        if key in METHODS or key == _MISSING:
            self._scripts[key] = value
        else:
            self.configure_key(key, value)
        return True

    def config_complete(self) -> None:
        if _REQUIRED not in self._scripts:
            raise ConfigError(f"eval: {_REQUIRED}=SCRIPT is missing: the method {_REQUIRED} is required")
        super().config_complete()


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Hand over the plugin."""
    register(EvalPlugin)

"""The sh plugin: serves what a script in any language says, which is run for each method."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from nbdkitpy import ConfigError, Parameter, Plugin, hookimpl
from nbdkitpy_plugins._method_plugin import MethodPlugin

__all__ = ["ShPlugin", "register_plugins"]

#: The script is on standard input.
_INLINE = "-"


def parse_script(text: str) -> str:
    """Return the absolute path of a script that can be run, or ``-``.

    Raises:
        ValueError: it is not there, or cannot be run.
    """
    if text == _INLINE:
        return text
    path = os.path.abspath(text) if text and "\0" not in text else ""
    if not os.path.isfile(path):
        raise ValueError("the path of a script, or - for one on standard input (there is no such file)")
    if not os.access(path, os.X_OK):
        raise ValueError("the path of a script that may be executed (see chmod +x)")
    return path


class ShPlugin(MethodPlugin):
    """Runs one script for each method."""

    name = "sh"
    longname = "sh plugin"
    description = "Serve what a script or program in any language says; it is run for each request."

    script = Parameter(
        parse_script,
        required=True,
        metavar="SCRIPT",
        help="The script, or - for one on standard input. It gets all other parameters.",
    )

    def __init__(self) -> None:
        super().__init__()
        self._path = ""
        self._magic: str | None = None

    def command(self, method: str) -> Sequence[str] | None:
        return [self._path] if self._path else None

    def magic_config_key(self) -> str | None:
        """Return what the script says; before there is one, the first bare word is that."""
        return self._magic

    def config(self, key: str, value: str) -> bool:
        """Take the script, and give it all that comes after it."""
        if self._path:
            self.configure_key(key, value)
            return True
        if not super().config(key, value):
            raise ConfigError(f"sh: the first parameter must be the script, not {key}=")
        self._path = self._inline_script() if self.script == _INLINE else self.script
        self.configure("load")
        reply = self.configure("magic_config_key")
        self._magic = reply.text if reply else None
        return True

    def _inline_script(self) -> str:
        text = sys.stdin.buffer.read()
        if not text:
            raise ConfigError("sh: there is no script on standard input (which is the client's with -s)")
        path = os.path.join(self._directory, "inline-script")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o700)
        with open(fd, "wb") as stream:
            stream.write(text)
        return path


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Hand over the plugin."""
    register(ShPlugin)

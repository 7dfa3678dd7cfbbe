"""Fixtures for scripts of the python plugin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from nbdkitpy import Client, Handle
from nbdkitpy_plugins.python import PythonPlugin
from tests.serving import AskedServer

SCRIPTS = Path(__file__).parent / "scripts"

#: What a script must have, but for its version.
REQUIRED = """
def open(readonly):
    return "handle"
def get_size(h):
    return 1 << 20
"""

VERSION_1 = f"""
{REQUIRED}
def pread(h, count, offset):
    return bytes(count)
"""

VERSION_2 = f"""
API_VERSION = 2
{REQUIRED}
def pread(h, buf, offset, flags):
    pass
"""


class Loaded(PythonPlugin):
    """The plugin with a script; `records` is the script's variable of that name."""

    server: AskedServer

    @property
    def records(self) -> list[object]:
        found: list[object] = self._script.callbacks["records"]
        return found

    def handle(self, name: str = "", readonly: bool = False, client: Client | None = None) -> Handle:
        """Open an export."""
        return self.open(name, readonly, client or Client(1))


class Load(Protocol):
    """Load a script."""

    def __call__(self, source: str, **parameters: str) -> Loaded:
        """Return the plugin that has loaded `source`, and been given `parameters`."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the script lies."""
    return tmp_path / "script.py"


@pytest.fixture
def load(path: Path) -> Iterator[Load]:
    with contextlib.ExitStack() as ends:

        def loaded(source: str, **parameters: str) -> Loaded:
            path.write_text(source)
            plugin = Loaded()
            plugin.server = AskedServer()
            ends.callback(plugin.unload)
            for key, value in {"script": str(path), **parameters}.items():
                assert plugin.config(key, value)
            return plugin

        yield loaded

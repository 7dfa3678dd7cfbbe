"""What the tests of the plugins sh and eval have in common."""

from __future__ import annotations

from nbdkitpy_plugins._method_plugin import MethodPlugin
from tests.serving import AskedServer


def loaded(plugin: MethodPlugin, **parameters: str) -> AskedServer:
    """Load `plugin`, give it `parameters`, and return its server."""
    plugin.server = server = AskedServer()
    plugin.load()
    for key, value in parameters.items():
        assert plugin.config(key, value)
    return server

"""What the tests of the plugins sh and eval have in common."""

from __future__ import annotations

from nbdkitpy_plugins._method_plugin import MethodPlugin


class Server:
    """What a plugin sees of a server; takes note of what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def finish(self) -> None:
        raise AssertionError("nobody asked for it")

    def shutdown(self) -> None:
        self.asked.append("shutdown")


def loaded(plugin: MethodPlugin, **parameters: str) -> Server:
    """Load `plugin`, give it `parameters`, and return its server."""
    plugin.server = server = Server()
    plugin.load()
    for key, value in parameters.items():
        assert plugin.config(key, value)
    return server

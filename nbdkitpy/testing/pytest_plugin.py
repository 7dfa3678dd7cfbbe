"""Fixtures that serve plugins within the process of the tests; pytest loads this wherever nbdkitpy is installed.

So it imports nothing that is not needed to say what there is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from nbdkitpy.backend import Plugin
    from nbdkitpy.library import EmbeddedServer, Parameters
    from nbdkitpy.testing.client import NbdClient

__all__ = ["ConnectNbd", "ServeNbd", "connect_nbd", "serve_nbd"]

pytest.register_assert_rewrite("nbdkitpy.testing.area", "nbdkitpy.testing.checks", "nbdkitpy.testing.conformance")


class ServeNbd(Protocol):
    """Serves; arguments are those of :func:`nbdkitpy.serve`."""

    def __call__(
        self, plugin: str | type[Plugin] | Plugin, parameters: Parameters = ..., **options: Any
    ) -> EmbeddedServer:
        """Return a server, which clients can connect to until the test ends."""


class ConnectNbd(Protocol):
    """Serves to one client, without a listener; arguments are those of :func:`nbdkitpy.serve`."""

    def __call__(
        self,
        plugin: str | type[Plugin] | Plugin,
        parameters: Parameters = ...,
        *,
        export_name: str = "",
        **options: Any,
    ) -> NbdClient:
        """Return a client, which has the export open until the test ends."""


@pytest.fixture
def serve_nbd() -> Iterator[ServeNbd]:
    """Serve plugins: ``serve_nbd(MyPlugin, {"size": "1M"})`` returns a server, which ends with the test."""
    import nbdkitpy

    with contextlib.ExitStack() as ends:

        def serve(
            plugin: str | type[Plugin] | Plugin, parameters: Parameters | None = None, **options: Any
        ) -> EmbeddedServer:
            return ends.enter_context(nbdkitpy.serve(plugin, parameters or {}, **options))

        yield serve


@pytest.fixture
def connect_nbd() -> Iterator[ConnectNbd]:
    """Connect to plugins: ``connect_nbd(MyPlugin, {"size": "1M"})`` returns a client of a server without a listener."""
    import nbdkitpy
    from nbdkitpy.testing.client import NbdClient

    with contextlib.ExitStack() as ends:

        def connect(
            plugin: str | type[Plugin] | Plugin,
            parameters: Parameters | None = None,
            *,
            export_name: str = "",
            **options: Any,
        ) -> NbdClient:
            server = nbdkitpy.serve(plugin, parameters or {}, listen=False, **options)
            return ends.enter_context(NbdClient(ends.enter_context(server), export_name))

        yield connect

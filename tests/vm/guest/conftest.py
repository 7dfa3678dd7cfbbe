"""Fixtures of the tests in the virtual machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vm.guest.harness import Server, Units


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers by the words of their command lines."""
    with contextlib.ExitStack() as ends:

        def start(*words: str | Path) -> Server:
            server = Server(*words)
            ends.callback(server.kill)
            return server

        yield start


@pytest.fixture(scope="session")
def all_units() -> Units:
    return Units()


@pytest.fixture
def units(all_units: Units) -> Iterator[Units]:
    """Makes units for systemd."""
    yield all_units
    all_units.remove()

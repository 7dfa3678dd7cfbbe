"""Fixtures of the tests that are named after threats: real servers, besides those in the process of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.harness import Servers


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Servers]:
    """Starts servers; at the end of the test they end in order, without a word."""
    servers = Servers(tmp_path)
    yield servers
    servers.finish()

"""Fixtures of the interop tests: real servers, and real clients by their names."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.harness import DEBIANS_PYTHON, PATIENCE, Servers, Tool, missing
from tests.interop.sidebyside import SideBySide


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Servers]:
    """Starts servers; at the end of the test they end in order, without a word."""
    servers = Servers(tmp_path)
    yield servers
    servers.finish()


@pytest.fixture
def nbdinfo() -> Tool:
    return Tool("nbdinfo", "libnbd-bin")


@pytest.fixture
def nbdcopy() -> Tool:
    return Tool("nbdcopy", "libnbd-bin")


@pytest.fixture
def qemu_img() -> Tool:
    return Tool("qemu-img", "qemu-utils")


@pytest.fixture
def qemu_io() -> Tool:
    return Tool("qemu-io", "qemu-utils")


@pytest.fixture
def nbd_client() -> Tool:
    return Tool("nbd-client", "nbd-client")


@pytest.fixture
def fio() -> Tool:
    return Tool("fio", "fio")


@pytest.fixture(scope="session")
def libnbd() -> None:
    """Needs libnbd's Python binding."""
    try:
        subprocess.run([DEBIANS_PYTHON, "-c", "import nbd"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        missing(f"{DEBIANS_PYTHON} has no module nbd (Debian's package python3-libnbd)")


@pytest.fixture(scope="session")
def build_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What has to be on the module search path for packages to be built, or installed as they lie there."""
    needed = ["hatchling", "editables"]
    if all(importlib.util.find_spec(module) is not None for module in needed):
        return ""
    directory = str(tmp_path_factory.mktemp("hatchling"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", directory, *needed]
    if subprocess.run(pip, capture_output=True, timeout=PATIENCE, check=False).returncode != 0:
        missing("pip cannot install hatchling, which packages are built with")
    return directory


@pytest.fixture
def side_by_side(serve: Servers, tmp_path: Path, libnbd: None) -> SideBySide:
    """Compares us with the real nbdkit."""
    return SideBySide(serve, tmp_path)

"""The fixtures that authors have, and what it costs others that they are there: nearly nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nbdkitpy.testing import NbdClient, area, checks, conformance
from nbdkitpy.testing.pytest_plugin import ConnectNbd, ServeNbd
from tests.environment import without_coverage
from tests.serving import CONTENT, Disks


def test_a_served_class(serve_nbd: ServeNbd) -> None:
    one, other = serve_nbd(Disks), serve_nbd("memory", {"size": "1M"}, readonly=True)

    with NbdClient(one.uri) as client:
        assert client.pread(512, 0) == CONTENT[:512]
    with NbdClient(other.uri) as client:
        assert client.pread(512, 0) == bytes(512)


def test_a_client_of_a_class(connect_nbd: ConnectNbd) -> None:
    client = connect_nbd(Disks, filters=[("offset", {"offset": 512})], export_name="any")

    assert client.pread(512, 0) == CONTENT[512:1024]
    assert client.info.name == "any"


STRANGER = """
import sys, threading
import pytest
import nbdkitpy
from nbdkitpy.testing import PluginConformance

BEFORE = set(sys.modules)

class Ones(nbdkitpy.Plugin):
    def open(self, export_name, readonly, client):
        return OnesHandle()

class OnesHandle(nbdkitpy.Handle):
    def get_size(self): return 1 << 20
    def pread(self, count, offset): return b"1" * count

class TestOnes(PluginConformance):
    plugin = Ones
    exempt = {"test_it_says_the_same_each_time": "it need not"}

def test_served(serve_nbd, connect_nbd):
    assert serve_nbd(Ones).unix_path
    assert connect_nbd(Ones).pread(3, 0) == b"111"

def test_nothing_is_left():
    assert threading.enumerate() == [threading.main_thread()]
"""


def run(directory: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_strange.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *options, "test_strange.py"]
    return subprocess.run(
        command, cwd=directory, stdout=subprocess.PIPE, text=True, env=without_coverage(), timeout=60, check=False
    )


def test_a_strangers_tests_use_all_of_it_without_configuring_anything(tmp_path: Path) -> None:
    done = run(tmp_path, STRANGER, "-ra", "-q")

    assert done.returncode == 0, done.stdout
    assert "SKIPPED [1] " in done.stdout
    assert "it need not" in done.stdout


def test_failed_checks_show_what_they_have_compared() -> None:
    rewritten = "@pytest_ar"  # what pytest puts into modules whose assertions it has rewritten

    assert all(rewritten in vars(module) for module in (area, checks, conformance))


NOTHING = """
import sys

def test_modules():
    assert sorted(name for name in sys.modules if name.startswith("nbdkitpy")) == sorted({expected})
"""

#: What pytest loads of ours wherever nbdkitpy is installed; nothing that takes long.
LOADED = [
    "nbdkitpy",
    "nbdkitpy.backend",
    "nbdkitpy.exceptions",
    "nbdkitpy.extents",
    "nbdkitpy.hookspecs",
    "nbdkitpy.locks",
    "nbdkitpy.parameters",
    "nbdkitpy.ranges",
    "nbdkitpy.testing",
    "nbdkitpy.testing.pytest_plugin",
]


def test_tests_that_do_not_use_it_load_next_to_nothing_of_it(tmp_path: Path) -> None:
    done = run(tmp_path, NOTHING.replace("{expected}", repr(LOADED)), "-q")

    assert done.returncode == 0, done.stdout

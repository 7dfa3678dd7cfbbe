"""What the library is for: a pytest of somebody else, in which each of many tests has a server of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.environment import without_coverage

ROOT = Path(__file__).parents[2]

#: Seconds that all tests together may take.
LIMIT = 20

TESTS = """
import os, socket, threading
import pytest
import nbdkitpy
from tests.nbdclient import NbdClient

def descriptors():
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}

@pytest.fixture(scope="session", autouse=True)
def nothing_is_left():
    threads, files, paths = threading.enumerate(), descriptors(), []
    yield paths
    assert threading.enumerate() == threads
    assert descriptors() == files
    assert len(set(paths)) == 200
    assert not [path for path in paths if os.path.exists(path) or os.path.exists(os.path.dirname(path))]

@pytest.mark.parametrize("number", range(200))
def test_disk(number, nothing_is_left):
    with nbdkitpy.serve("memory", {"size": "1M"}, filters=["offset"]) as server:
        nothing_is_left.append(server.unix_path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(server.unix_path)
            client = NbdClient(sock).negotiate()
            client.write(number * 512, b"x" * 512)
            assert client.read(number * 512, 1024) == b"x" * 512 + bytes(512)
"""


def test_200_tests_with_a_server_each_are_quick_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_disks.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", ".", "test_disks.py"]

    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**without_coverage(), "PYTHONPATH": os.fspath(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )

    assert done.returncode == 0, done.stdout
    summary = re.search(r"^200 passed in ([0-9.]+)s", done.stdout, re.MULTILINE)
    assert summary is not None
    assert float(summary[1]) < LIMIT

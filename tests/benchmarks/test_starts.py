"""Test how the benchmark measures starts and idle clients, with real servers."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.figures import MIB
from benchmarks.servers import ours
from benchmarks.service import Service
from benchmarks.starts import Idle, Start, compile_ours, python_start


@pytest.fixture
def null(tmp_path: Path) -> Iterator[Service]:
    with contextlib.ExitStack() as ends:
        yield Service(ours("null"), tmp_path, MIB, tcp=False, ends=ends)
    assert list(tmp_path.iterdir()) == []


def test_start_is_measured_to_the_greeting_and_then_to_the_first_reply(null: Service) -> None:
    start = Start()

    sample = start.run(null, 0)

    assert set(sample) == {metric.name for metric in start.metrics}
    assert 5 < sample["greeting"] < sample["first reply"]
    assert sample["first reply over python -c pass"] < sample["first reply"]


def test_ours_has_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "nbdkitpy_plugins"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setattr("benchmarks.starts.OURS", [package.name, "no_such_package"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)

    compile_ours()

    assert list(package.glob("__pycache__/__init__.*.pyc"))


def test_python_takes_its_time_to_start() -> None:
    assert 0.001 < python_start() < 10


def test_idle_clients_are_counted_in_threads_and_memory(null: Service) -> None:
    idle = Idle(clients=(1, 3))

    sample = idle.run(null, 0)

    assert [metric.name for metric in idle.metrics] == ["memory of 3", "memory of 1", "threads at 3", "threads at 1"]
    assert set(sample) == {metric.name for metric in idle.metrics}
    assert sample["threads at 3"] - sample["threads at 1"] == 2
    assert -1 < sample["memory of 1"] < 10

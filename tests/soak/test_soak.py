"""The soak itself: it runs, and it notices what it is there to notice."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.nbdclient import Style
from tests.soak import soak as module
from tests.soak.checker import Checker
from tests.soak.hooligans import Hooligan, Target
from tests.soak.soak import Weight, main, soak
from tests.threats.writers import BLOCK, content


@pytest.mark.parametrize("workers", [0, 2])
def test_all_is_well_in_a_short_one(workers: int) -> None:
    report = soak(1.0, workers=workers, seed=5)

    assert report.failures == []
    assert report.counts["blocks found in the file at the end"] == Checker.BLOCKS
    assert report.counts["blocks read back and compared"] > 1000
    assert report.counts["connections of hooligans"] > 10


@pytest.fixture
def target(tmp_path: Path) -> Target:
    (tmp_path / Checker.NAME).write_bytes(bytes(Checker.SIZE))
    return Target("", dict.fromkeys(Style, (b"", b"")), tmp_path, tmp_path, tmp_path / "log")


def test_a_block_that_is_lost_is_noticed(target: Target) -> None:
    checker = Checker(target, 1)
    checker.check_file()
    assert (checker.found, checker.failures) == (Checker.BLOCKS, [])
    checker._versions[7] = 2

    checker.check_file()
    assert checker.failures == ["block 7 is not what has been written as version 2"]
    with (target.disks / Checker.NAME).open("r+b") as file:
        file.seek(7 * BLOCK)
        file.write(content(7, 2))
    checker.check_file()

    assert checker.found == Checker.BLOCKS


def test_what_goes_wrong_is_reported_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(checker: Checker, is_over: threading.Event) -> None:
        checker.failures.append("block 7 is lost")

    def do_something(hooligan: Hooligan, is_over: threading.Event) -> None:
        hooligan._target.log.write_text("nbdkitpy: error: file[1]: TypeError: no such thing\n")
        raise KeyError("unexpected")

    monkeypatch.setattr(Checker, "run", check)
    monkeypatch.setattr(Hooligan, "run", do_something)
    monkeypatch.setattr(module, "HOOLIGANS", 1)
    monkeypatch.setattr(module, "WORKERS", (0,))

    status = main(["--minutes", "0.001", "--seed", "1"])

    lines = capsys.readouterr().out.splitlines()
    assert status == 1
    assert {line.partition("FAILED: ")[2] for line in lines if "FAILED" in line} == {
        "block 7 is lost",
        "KeyError: 'unexpected'",
        "in the log: nbdkitpy: error: file[1]: TypeError: no such thing",
    }


@pytest.mark.parametrize(
    ("after", "failures"),
    [
        (Weight(100 * module.MIB, 3, 30, 3), []),
        (Weight(100 * module.MIB, 4, 32, 3), ["1 threads more than before", "2 descriptors more than before"]),
        (Weight(200 * module.MIB, 3, 30, 3), ["110.0 MiB of memory more than before"]),
    ],
)
def test_what_a_server_keeps_is_noticed(target: Target, after: Weight, failures: list[str]) -> None:
    one = module._Soak(None, target, random.Random(1))  # type: ignore[arg-type]  # it asks nothing of the server

    one._compare(Weight(90 * module.MIB, 3, 30, 3), after)

    assert one._failures == failures
    assert one._counts == Counter()

"""Test the command line of the benchmark, and one moment of the whole."""

import json
import os
import shutil
from pathlib import Path

import pytest

from benchmarks.command import main


def test_list_shows_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "write-*"]) == 0

    assert capsys.readouterr().out == "write-64k-d16\nwrite-1m-d4\n"


def test_pattern_without_workload_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "randread-*", "--only", "sleep"]) == 1

    assert 'no workload matches "sleep"' in capsys.readouterr().err


def test_missing_tools_are_named_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert main(["--peer", "nbdkit-memory", "--only", "rand*", "--save", str(tmp_path / "b")]) == 1

    assert capsys.readouterr().err == "compare: error: not installed: nbdkit, fio, nbdcopy\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pairs", "0"],
        ["--size", "-1"],
        ["--size", "1.5"],
        ["--runtime", "0"],
        ["--runtime", "nan"],
        ["--runtime", "inf"],
        ["--filters", "4"],
        ["--peer", "nobody"],
    ],
)
def test_options_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)

    assert f"argument {arguments[0]}" in capsys.readouterr().err


@pytest.mark.interop
@pytest.mark.parametrize(
    ("peer", "options"), [("nbdkit-file", ["--filters", "3"]), ("nbdkit-memory", ["--tcp"])], ids=["file", "memory"]
)
def test_benchmark_compares_with_nbdkit(
    peer: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = [tool for tool in ("nbdkit", "fio", "nbdcopy") if shutil.which(tool) is None]
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")
    prefix = tmp_path / "made" / "report.1"
    brief = ["--pairs", "1", "--runtime", "0.3", "--size", "4", "--only", "randread-4k-d16"]

    status = main(["--peer", peer, *options, *brief, "--directory", str(tmp_path), "--save", str(prefix)])

    out, err = capsys.readouterr()
    assert status == 0, err
    assert out == (tmp_path / "made" / "report.1.md").read_text()
    report = json.loads((tmp_path / "made" / "report.1.json").read_text())
    assert report["facts"]["peer"].startswith(f"{peer}, nbdkit ")
    (result,) = report["results"]
    ((ours, theirs),) = (pair.values() for pair in result["pairs"])
    for one in (ours, theirs):
        assert one["transfer"]["bytes"] > 0
        assert one["transfer"]["p99"] > 0
        assert 0.2 < one["transfer"]["seconds"] < 10
        assert one["cpu"] > 0
    assert result["figures"]["throughput"]["ratio"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]

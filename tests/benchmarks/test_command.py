"""Test the command line of the benchmark, and one moment of the whole."""

import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.command import cases_of, main, parser, plan_of
from benchmarks.figures import MIB
from benchmarks.plan import Case


def cases(*arguments: str) -> list[Case]:
    return cases_of(parser().parse_args(arguments))


def test_list_shows_each_name_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "write-*", "--peer", "bare", "--peer", "nbdkit-memory"]) == 0

    assert capsys.readouterr().out == "write-64k-d16\nwrite-1m-d4\n"


def test_pattern_without_workload_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "randread-*", "--only", "sleep"]) == 1

    assert 'no workload matches "sleep"' in capsys.readouterr().err


def test_missing_tools_are_an_error(
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
        ["--filters", "11"],
        ["--peer", "nobody"],
        ["--suite", "none"],
        ["--directory", "/does/not/exist"],
    ],
)
def test_options_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)

    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_without_peers_it_is_the_file_plugin() -> None:
    assert [peer.name for peer in cases()[0].peers] == ["nbdkit-file"]


def test_filters_are_for_both_unless_said_otherwise() -> None:
    both, ours_alone = cases("--filters", "3")[0], cases("--filters", "3", "--peer-filters", "0")[0]

    assert (both.ours.filters, both.peers[0].filters) == (3, 3)
    assert (ours_alone.ours.filters, ours_alone.peers[0].filters) == (3, 0)
    assert cases("--filters", "3", "--peer", "qemu-nbd")[0].peers[0].filters == 0


def test_options_are_passed_on() -> None:
    case = cases("--ours-options", "--workers 2", "--peer-options", "-t '1'")[0]

    assert case.ours.options == ("--workers", "2")
    assert case.peers[0].options == ("-t", "1")


def test_ours_of_another_checkout_is_a_peer() -> None:
    (peer,) = cases("--peer", "ours", "--peer-python", "/other/python -m nbdkitpy", "--peer-options", "-t 1")[0].peers

    assert peer.name == "ours, as the peer"
    assert peer.program == ("/other/python", "-m", "nbdkitpy")
    assert peer.options == ("-t", "1")


def test_root_is_for_nbdkit_alone(tmp_path: Path) -> None:
    case = cases("--nbdkit-root", str(tmp_path), "--peer", "nbdkit-file", "--peer", "qemu-nbd")[0]

    assert [peer.root for peer in case.peers] == [tmp_path, Path("/")]
    assert case.ours.root == Path("/")


def test_suite_takes_its_own_peers() -> None:
    assert [peer.name for peer in cases("--suite", "proof")[0].peers] == ["nbdkit-file", "bare"]


def test_plan_is_what_the_command_line_asks_for(tmp_path: Path) -> None:
    arguments = parser().parse_args(
        ["--pairs", "3", "--runtime", "0.5", "--size", "4", "--tcp", "--directory", str(tmp_path)]
    )

    plan = plan_of(arguments, [])

    assert (plan.pairs, plan.seconds, plan.size, plan.tcp, plan.directory) == (3, 0.5, 4 * MIB, True, tmp_path)


BRIEF = ["--pairs", "1", "--runtime", "0.3", "--size", "4", "--only", "randread-4k-d16"]


def skip_without(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.mark.interop
@pytest.mark.parametrize(
    ("peers", "options"),
    [(["nbdkit-file", "bare"], ["--filters", "3"]), (["nbdkit-memory"], ["--tcp"])],
    ids=["file", "memory"],
)
def test_benchmark_compares_with_others(
    peers: list[str], options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without("nbdkit", "fio", "nbdcopy", "cc")
    prefix = tmp_path / "made" / "report.1"
    chosen = [word for peer in peers for word in ("--peer", peer)]

    status = main([*chosen, *options, *BRIEF, "--directory", str(tmp_path), "--save", str(prefix)])

    out, err = capsys.readouterr()
    assert status == 0, err
    assert out == (tmp_path / "made" / "report.1.md").read_text()
    ElementTree.parse(tmp_path / "made" / "report.1.svg")
    report = json.loads((tmp_path / "made" / "report.1.json").read_text())
    assert report["facts"][peers[0]].startswith("nbdkit ")
    assert [result["peer"] for result in report["results"]] == peers
    for result in report["results"]:
        ((ours, theirs),) = (pair.values() for pair in result["pairs"])
        assert min(*ours.values(), *theirs.values()) > 0
        assert result["figures"]["throughput"]["ratio"] > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "made"]


@pytest.mark.interop
def test_what_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skip_without("nbdkit", "fio", "nbdcopy", "cc")

    peers = ["--peer", "nbdkit-file", "--peer", "bare", "--peer-options=--no-such"]

    status = main([*peers, *BRIEF, "--save", f"{tmp_path}/r"])

    out, _ = capsys.readouterr()
    assert status == 1
    assert "randread-4k-d16 on nbdkit-file failed:" in out
    assert "unrecognized option" in out
    assert "randread-4k-d16 on bare failed:" in out

"""Test in which order the benchmark runs what, and what it makes of it."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.figures import CPU, MIB, THROUGHPUT, Comparison, Figure
from benchmarks.plan import Case, Goal, Plan, Result, carry_out, described, run_case, turns, workspace
from benchmarks.servers import PEERS, ours
from benchmarks.service import Service
from tests.benchmarks.samples import Recorder, case, compared, contender, result


def figure(ratio: float | None, mine: float | None = None) -> Figure:
    return Figure(ratio, ratio, ratio, mine, None)


@pytest.mark.parametrize(
    ("goal", "figure", "met"),
    [
        (Goal(THROUGHPUT, 1.4), figure(1.4), True),
        (Goal(THROUGHPUT, 1.4), figure(1.39), False),
        (Goal(CPU, 0.7), figure(0.7), True),
        (Goal(CPU, 0.7), figure(0.71), False),
        (Goal(CPU, 0.7), figure(None), False),
        (Goal(CPU, 100, of_ratio=False), figure(9.0, 99.0), True),
        (Goal(CPU, 100, of_ratio=False), figure(0.1, 101.0), False),
    ],
)
def test_goal_is_met_or_not(goal: Goal, figure: Figure, met: bool) -> None:
    assert goal.is_met(figure) == met


def test_servers_take_turns_and_every_second_round_backwards() -> None:
    with contextlib.ExitStack() as ends:
        services = [Service(contender(name), Path("/"), MIB, tcp=False, ends=ends) for name in "abc"]

        order = "".join(service.contender.name for service in turns(services, 3))

    assert order == "abccbaabc"


def test_pairs_are_of_the_same_round() -> None:
    done = run_case(case("a", "b"), Plan([], pairs=2), Path("/"))

    # What is measured is the number of the run: ours 1 and 6, a 2 and 5, b 3 and 4.
    assert {each.peer: [(x["throughput"], y["throughput"]) for x, y in each.pairs] for each in done.comparisons} == {
        "a": [(1, 2), (6, 5)],
        "b": [(1, 3), (6, 4)],
    }
    assert done.is_good


def test_peer_that_fails_is_left_out_and_the_others_go_on() -> None:
    some = case("bad", "b")

    done = run_case(some, Plan([], pairs=2), Path("/"))

    assert [each.peer for each in done.comparisons] == ["b"]
    assert done.failures == {"bad": "it broke"}
    assert isinstance(some.workload, Recorder)
    assert some.workload.ran == ["ours", "bad", "b", "b", "ours"]
    assert not done.is_good


def test_nothing_is_compared_once_ours_has_failed() -> None:
    some = case("a", ours="bad")

    done = run_case(some, Plan([], pairs=3), Path("/"))

    assert isinstance(some.workload, Recorder)
    assert some.workload.ran == ["bad"]
    assert done.comparisons == []


def test_goals_are_judged_by_the_hardest_judge() -> None:
    goals = [Goal(THROUGHPUT, 1.4)]

    done = result(goals, compared("slow", 3, 1), compared("fast", 3, 2))

    assert done.verdicts() == [(goals[0], done.comparisons[1], True)]


def test_hardest_judge_of_what_should_be_little_is_the_one_with_the_highest_ratio() -> None:
    done = result([Goal(CPU, 0.5)], compared("thrifty", 3, 2, CPU), compared("wasteful", 3, 4, CPU))

    (verdict,) = done.verdicts()

    assert verdict == (Goal(CPU, 0.5), done.comparisons[0], False)


def test_who_is_no_judge_does_not_count() -> None:
    some = Result(case("bare", "peer", goals=[Goal(THROUGHPUT, 1.0)], judges=["peer"]))
    some.comparisons = [compared("bare", 1, 2), compared("peer", 2, 1)]

    assert some.is_good


@pytest.mark.parametrize("comparisons", [[], [compared("p", 1, 0)]], ids=["none", "without ratio"])
def test_goal_without_figures_is_not_met(comparisons: list[Comparison]) -> None:
    some = Result(case("p", goals=[Goal(THROUGHPUT, 1.0)], judges=["p"]), comparisons)

    assert [met for _, _, met in some.verdicts()] == [False]


def test_plan_is_carried_out_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    null = ours("null")
    cases = [replace(case(), ours=null, peers=[replace(null, name=name)]) for name in "ab"]
    runs = "1 rounds, 2 s for each server, disk of 1 MiB"

    counts = [
        (facts["runs"], [each.peer for result in results for each in result.comparisons])
        for facts, results in carry_out(Plan(cases, pairs=1, size=MIB, directory=tmp_path))
    ]

    assert counts == [(runs, ["a"]), (runs, ["a", "b"])]
    assert capsys.readouterr().err == "w ...\nw ...\n"
    assert list(tmp_path.iterdir()) == []


def test_facts_say_what_ran() -> None:
    some = Case(
        "w",
        Recorder(),
        replace(ours("file"), options=("-t", "2")),
        [replace(ours("file"), name="p", filters=3)],
    )

    facts = Plan([some], tcp=True).facts()

    assert facts["ours"].startswith("nbdkitpy 0.")
    assert facts["ours"].endswith(" -t 2")
    assert facts["p"].endswith(", 3 filters")
    assert facts["clients"].startswith("true ")
    assert facts["transport"] == "TCP on loopback"
    assert " × " in facts["machine"]


def test_missing_commands_are_named_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    some = Case("w", Recorder(tools=["fio"]), ours("memory"), [PEERS["nbdkit-memory"], PEERS["nbd-server"]])

    with pytest.raises(BenchmarkError, match="not installed: nbdkit, nbd-server, fio, nbdcopy"):
        Plan([some]).check()


def test_image_is_put_where_the_other_root_can_see_it(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    rooted = replace(PEERS["nbdkit-file"], root=tmp_path)

    with workspace(Plan([replace(case(), peers=[rooted])], size=MIB)) as directory:
        assert directory.parent == tmp_path / "tmp"
        assert sorted(path.name for path in directory.iterdir()) == ["image", "nbdkit_bytearray.py"]

    assert list((tmp_path / "tmp").iterdir()) == []


def test_two_other_roots_are_an_error() -> None:
    peers = [replace(contender(name), root=Path("/srv") / name) for name in "ab"]

    with pytest.raises(BenchmarkError, match="different root directories"):
        Plan([replace(case(), peers=peers)]).root()


def test_options_and_filters_are_described() -> None:
    contender = replace(PEERS["bare"], program=("echo",), says_version="bare 1", filters=3, options=("-t", "1"))

    assert described(contender) == "bare 1, 3 filters -t 1"

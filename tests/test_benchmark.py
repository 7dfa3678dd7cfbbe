"""Test the benchmark: what it calculates and shows, how it runs servers, and one moment of the whole."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import compare as module
from benchmarks.compare import (
    METRICS,
    MIB,
    NBDKITPY,
    PEERS,
    WORKLOADS,
    Address,
    BenchmarkError,
    Comparison,
    Copy,
    Figure,
    Fio,
    ProcessStat,
    Sample,
    Server,
    Setup,
    Target,
    Transfer,
    compare,
    cpu_seconds,
    end,
    free_port,
    heading,
    main,
    make_image,
    markdown,
    median,
    nbdkit_command,
    parse_fio,
    parse_stat,
    qemu_nbd_command,
    ratio,
    receive,
    row,
    run_client,
    select,
    serving,
    shown,
    table,
    tree_ticks,
)

THROUGHPUT, CPU, P99 = METRICS
IDLE = "import signal; print('ready', flush=True); signal.pause()"
BURN = "import time\nwhile time.process_time() < 0.2: pass\n"


def sample(mib: float = 1, seconds: float = 1, cpu: float = 1, p99: float | None = None) -> Sample:
    return Sample(Transfer(int(mib * MIB), seconds, p99), cpu)


@contextmanager
def python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code that prints a line when it is ready."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


# Figures


@pytest.mark.parametrize(
    ("numerator", "denominator", "expected"),
    [(3.0, 2.0, 1.5), (0.0, 2.0, 0.0), (3.0, 0.0, None), (None, 2.0, None), (3.0, None, None)],
)
def test_ratio_is_none_where_it_has_no_meaning(
    numerator: float | None, denominator: float | None, expected: float | None
) -> None:
    assert ratio(numerator, denominator) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0], 2.5), ([None, 5.0, None], 5.0), ([None], None), ([], None)],
)
def test_median_is_of_the_values_that_are_known(values: list[float | None], expected: float | None) -> None:
    assert median(values) == expected


def test_metrics_have_the_units_that_they_claim() -> None:
    one = sample(mib=10, seconds=2, cpu=0.5, p99=70)

    assert [(metric.name, metric.unit, metric.of(one)) for metric in METRICS] == [
        ("throughput", "MiB/s", 5.0),
        ("CPU", "ms/MiB", 50.0),
        ("p99", "µs", 70),
    ]


def test_figure_takes_the_median_of_the_ratios_of_pairs() -> None:
    pairs = [(sample(mib=ours), sample(mib=peer)) for ours, peer in [(10, 10), (20, 5), (30, 15)]]

    figure = Comparison("w", pairs).figure(THROUGHPUT)

    # The ratios are 1, 4 and 2; the ratio of the medians would be 20 ÷ 10.
    assert figure == Figure(ratio=2.0, ours=20.0, peer=10.0)
    assert Comparison("w", pairs[:2]).figure(THROUGHPUT).ratio == 2.5


def test_figure_of_what_was_not_measured_is_unknown() -> None:
    comparison = Comparison("nbdcopy", [(sample(cpu=2), sample(cpu=0))])

    assert comparison.figure(P99) == Figure(None, None, None)
    assert comparison.figure(CPU) == Figure(None, 2000.0, 0.0)


# Report


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0.00"),
        (0.04561, "0.0456"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (45.67, "45.7"),
        (123.4, "123"),
        (1234567.0, "1234567"),
    ],
)
def test_figures_are_shown_with_three_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert shown(value) == text


def test_table_is_aligned_markdown() -> None:
    assert table([["name", "x"], ["a", "1.50"], ["longer", "–"]]) == (
        "| name   |    x |\n| ------ | ---: |\n| a      | 1.50 |\n| longer |    – |"
    )


def test_row_has_ratio_ours_and_peer_for_each_metric() -> None:
    cells = row(Comparison("w", [(sample(mib=4, p99=30), sample(mib=2, p99=60))]))

    assert dict(zip(heading(), cells, strict=True)) == {
        "workload": "w",
        "throughput ratio": "2.00",
        "ours, MiB/s": "4.00",
        "peer, MiB/s": "2.00",
        "CPU ratio": "0.500",
        "ours, ms/MiB": "250",
        "peer, ms/MiB": "500",
        "p99 ratio": "0.500",
        "ours, µs": "30.0",
        "peer, µs": "60.0",
    }


def test_markdown_has_facts_and_a_row_for_each_workload() -> None:
    report = markdown({"peer": "nbdkit-file"}, [Comparison(name, [(sample(), sample())]) for name in ("v", "w")])

    assert "- peer: nbdkit-file\n" in report
    assert [line.split()[1] for line in report.splitlines() if line.startswith("| ")][2:] == ["v", "w"]


def test_json_has_medians_and_samples() -> None:
    comparison = Comparison("w", [(sample(mib=3), sample(cpu=0))])

    report = json.loads(module.as_json({"peer": "p"}, [comparison]))

    assert report["facts"] == {"peer": "p"}
    (result,) = report["results"]
    assert result["workload"] == "w"
    assert result["figures"]["throughput"] == {"unit": "MiB/s", "ratio": 3.0, "ours": 3.0, "peer": 1.0}
    assert result["figures"]["CPU"]["ratio"] is None
    assert result["pairs"][0]["ours"] == {"transfer": {"bytes": 3 * MIB, "seconds": 1, "p99": None}, "cpu": 1}


# Workloads


def fio_output(**sides: object) -> str:
    nothing = {"io_bytes": 0, "runtime": 0, "clat_ns": {}}
    job = {"read": nothing, "write": nothing, **sides}
    return "fio: connected to NBD server\n" + json.dumps({"jobs": [job]})


@pytest.mark.parametrize("side", ["read", "write"])
def test_fio_output_is_read_past_what_its_engine_says(side: str) -> None:
    moved = {"io_bytes": 4096, "runtime": 250, "clat_ns": {"percentile": {"50.000000": 9, "99.000000": 7000}}}

    assert parse_fio(fio_output(**{side: moved})) == Transfer(bytes=4096, seconds=0.25, p99=7.0)


@pytest.mark.parametrize("output", ["", "fio: connected to NBD server\n", "{}", '{"jobs": []}', "{", fio_output()])
def test_fio_output_without_figures_is_an_error(output: str) -> None:
    with pytest.raises(BenchmarkError, match="fio did no input or output"):
        parse_fio(output)


def test_fio_is_told_what_to_do() -> None:
    command = Fio("randread", 4096, 16).command(Target("nbd://here", 8 * MIB), 0.3)

    assert command[0] == "fio"
    assert {
        "--ioengine=nbd",
        "--uri=nbd://here",
        "--rw=randread",
        "--bs=4096",
        "--iodepth=16",
        f"--size={8 * MIB}",
        "--runtime=300ms",
        "--time_based",
        "--output-format=json",
    } <= set(command)


def test_copy_runs_once_at_least_and_counts_what_it_copied() -> None:
    target = Target("nbd://here", 5 * MIB)

    once, often = Copy(tool="true").run(target, 0), Copy(tool="true").run(target, 0.05)

    assert once.bytes == 5 * MIB
    assert often.bytes % (5 * MIB) == 0
    assert often.seconds >= 0.05
    assert often.p99 is None


def test_workloads_have_names_of_their_own() -> None:
    names = [workload.name for workload in WORKLOADS]

    assert len(set(names)) == len(names)
    assert {"randread-4k-d1", "read-64k-d16", "write-1m-d4", "nbdcopy"} <= set(names)


def test_selection_keeps_the_order_of_the_table_and_takes_all_without_patterns() -> None:
    assert [workload.name for workload in select(["nbdcopy", "randread-4k-d?", "nbd*"])] == [
        "randread-4k-d1",
        "nbdcopy",
    ]
    assert select([]) == list(WORKLOADS)


def test_a_client_that_fails_is_an_error_with_what_it_said() -> None:
    with pytest.raises(BenchmarkError, match=r"(?s)sh failed: .*no disk"):
        run_client(["sh", "-c", "echo no disk >&2; exit 3"], 1)


def test_a_client_that_does_not_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)

    with pytest.raises(BenchmarkError, match="tail did not end"):
        run_client(["tail", "-f", "/dev/null"], 0)


@dataclass(frozen=True)
class Recorder:
    """A workload that notes where it ran."""

    uris: list[str] = field(default_factory=list)
    name: str = "recorder"
    tool: str = "true"

    def run(self, target: Target, seconds: float) -> Transfer:
        self.uris.append(target.uri)
        return Transfer(len(self.uris), seconds)


def test_runs_alternate_between_ours_and_the_peer() -> None:
    workload = Recorder()
    ours, peer = (Server(os.getpid(), Target(uri, MIB)) for uri in ("ours", "peer"))
    plan = module.Plan("nbdkit-file", [workload], 3, 0.5, MIB, 0, False, None)

    comparison = compare(workload, ours, peer, plan)

    assert workload.uris == ["ours", "peer"] * 3
    assert [(a.transfer.bytes, b.transfer.bytes) for a, b in comparison.pairs] == [(1, 2), (3, 4), (5, 6)]


# Processor time


def test_stat_is_read_whatever_the_process_is_called() -> None:
    times = "1000 200 30 4"
    text = f"77 (a) R 1 (b) S 42 77 77 0 -1 4194560 1 2 3 4 {times} 20 0 1 0 99 0\n"

    assert parse_stat(text) == ProcessStat(parent=42, ticks=1234)


def test_tree_counts_all_descendants_and_no_strangers() -> None:
    processes = {
        1: ProcessStat(0, 1),
        10: ProcessStat(1, 20),
        11: ProcessStat(10, 300),
        12: ProcessStat(11, 4000),
        13: ProcessStat(1, 50000),
    }

    assert tree_ticks(10, processes) == 4320


def test_cpu_time_includes_threads_and_children_alive_and_dead() -> None:
    burn = "import subprocess, sys, threading\nBURN = " + repr(BURN) + "\n"
    dead = "subprocess.run([sys.executable, '-c', BURN], check=True)\n"
    alive = f"p = subprocess.Popen([sys.executable, '-c', BURN + {IDLE!r}], stdout=subprocess.PIPE)\n"
    thread = "t = threading.Thread(target=exec, args=(BURN,)); t.start(); t.join()\n"
    wait = "p.stdout.readline(); print('ready', flush=True)\ntry:\n sys.stdin.read()\nfinally:\n p.kill(); p.wait()\n"
    with subprocess.Popen(
        [sys.executable, "-c", burn + dead + alive + thread + wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"

        spent = cpu_seconds(process.pid)

        process.communicate()
    # Three times 0.2 s were burnt; the ticks of 0.01 s may miss parts of that, but never one of the three.
    assert spent >= 2.5 * 0.2


def test_cpu_time_of_a_server_that_ended_is_an_error() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()

    with pytest.raises(BenchmarkError, match=f"{process.pid} has ended"):
        cpu_seconds(process.pid)


# Servers


def test_nbdkit_and_ours_are_started_alike() -> None:
    setup = Setup(Path("/tmp/image"), 4 * MIB, filters=2)
    arguments = ["-f", "-U", "/tmp/s", "--filter=ip", "--filter=limit", "file", "/tmp/image", "allow=all", "limit=64"]

    ours = nbdkit_command(NBDKITPY, "file", setup, Address(path="/tmp/s"))
    peer = PEERS["nbdkit-file"].command(setup, Address(path="/tmp/s"))

    assert ours == [sys.executable, "-m", "nbdkitpy", *arguments]
    assert peer == ["nbdkit", *arguments]


def test_memory_is_given_its_size_and_tcp_its_port() -> None:
    command = PEERS["nbdkit-memory"].command(Setup(Path("/tmp/image"), 4096), Address(port=7))

    assert command == ["nbdkit", "-f", "-i", "127.0.0.1", "-p", "7", "memory", "4096"]


@pytest.mark.parametrize(
    ("address", "listen"),
    [(Address(path="/tmp/s"), ["-k", "/tmp/s"]), (Address(port=7), ["-b", "127.0.0.1", "-p", "7"])],
)
def test_qemu_nbd_serves_the_image_raw_to_many(address: Address, listen: list[str]) -> None:
    command = qemu_nbd_command(Setup(Path("/tmp/image"), 4096, filters=3), address)

    assert command == ["qemu-nbd", "--persistent", "--shared=64", "--format=raw", *listen, "/tmp/image"]


@pytest.mark.parametrize(
    ("address", "uri"),
    [(Address(path="/tmp/a b/s"), "nbd+unix:///?socket=/tmp/a%20b/s"), (Address(port=7), "nbd://127.0.0.1:7")],
)
def test_address_has_a_uri(address: Address, uri: str) -> None:
    assert address.uri == uri


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_server_runs_until_the_end_though_its_filter_would_end_it(tmp_path: Path, tcp: bool) -> None:
    address = Address(port=free_port()) if tcp else Address(path=str(tmp_path / "s"))
    setup = Setup(tmp_path / "image", MIB, filters=3)

    with serving(nbdkit_command(NBDKITPY, "memory", setup, address), address, setup.size) as server:
        for _ in range(2):
            address.connect().close()
        assert cpu_seconds(server.pid) > 0
        assert server.target == Target(address.uri, MIB)

    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_server_that_does_not_start_is_an_error_with_what_it_said(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "s"))

    with (
        pytest.raises(BenchmarkError, match=r"(?s)no server at .*no such disk"),
        serving(["sh", "-c", "echo no such disk; exit 1"], address, MIB),
    ):
        pass


def test_failing_client_is_an_error_with_what_the_server_said(tmp_path: Path) -> None:
    address = Address(path=str(tmp_path / "s"))
    command = [*NBDKITPY, "-f", "-v", "-U", address.path, "null", "4096"]

    with pytest.raises(BenchmarkError, match=r"(?s)client went wrong\n.*debug"), serving(command, address, 4096):
        raise BenchmarkError("client went wrong")


def test_server_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.1)

    with python("import signal; signal.signal(15, signal.SIG_IGN)\n" + IDLE) as process:
        end(process)

    assert process.returncode == -9


def test_receiving_less_than_is_due_is_an_error() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"NBDM")
        far.shutdown(socket.SHUT_WR)

        with pytest.raises(BenchmarkError, match="closed the connection in the handshake"):
            receive(near, 8)


def test_image_is_random_and_of_the_size_asked_for(tmp_path: Path) -> None:
    make_image(tmp_path / "image", 2 * MIB)

    data = (tmp_path / "image").read_bytes()

    assert len(data) == 2 * MIB
    assert data[:MIB] != data[MIB:]
    assert len(set(data)) == 256


# Command line


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

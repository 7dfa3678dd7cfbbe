"""Compare nbdkitpy with another NBD server, side by side on this machine.

Both serve the same data at the same time. Each workload runs on the one, then on the other, then on the one again;
what is reported is the median of the ratios of neighbours, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

MIB = 1 << 20
NBDKITPY = (sys.executable, "-m", "nbdkitpy")
# Filters that let everything through, in the order in which --filters N takes them.
FILTERS = (("ip", "allow=all"), ("limit", "limit=64"), ("exitlast", None))
START_SECONDS = 10.0
STOP_SECONDS = 10.0
# What a client may take beyond the time that it was told to run.
GRACE_SECONDS = 60.0

# The few words of the protocol that the idle client speaks; sections "Newstyle negotiation" and "Request message".
GREETING = struct.Struct(">8s8sH")
FLAGS_AND_OPTION = struct.Struct(">I8sII")
EXPORT_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
FIXED_NEWSTYLE_NO_ZEROES = 3
IHAVEOPT = b"IHAVEOPT"
OPT_EXPORT_NAME = 1
REQUEST_MAGIC = 0x25609513
CMD_DISC = 2


class BenchmarkError(Exception):
    """Something that is needed is missing, or a server or client failed."""


# Figures


@dataclass(frozen=True)
class Transfer:
    """What a client moved: `bytes` in `seconds`; `p99` is the 99th percentile of latency in µs, if it was measured."""

    bytes: int
    seconds: float
    p99: float | None = None


@dataclass(frozen=True)
class Sample:
    """One run of one workload on one server, which spent `cpu` seconds on it."""

    transfer: Transfer
    cpu: float


@dataclass(frozen=True)
class Metric:
    """Something to compare, and how to get it out of a sample."""

    name: str
    unit: str
    of: Callable[[Sample], float | None]


METRICS = (
    Metric("throughput", "MiB/s", lambda sample: ratio(sample.transfer.bytes / MIB, sample.transfer.seconds)),
    Metric("CPU", "ms/MiB", lambda sample: ratio(1000 * sample.cpu, sample.transfer.bytes / MIB)),
    Metric("p99", "µs", lambda sample: sample.transfer.p99),
)


@dataclass(frozen=True)
class Figure:
    """Medians of one metric: of ours ÷ peer's, taken pair by pair, and of each side."""

    ratio: float | None
    ours: float | None
    peer: float | None


@dataclass(frozen=True)
class Comparison:
    """A workload's samples: pairs of ours and the peer's that ran one after the other."""

    workload: str
    pairs: Sequence[tuple[Sample, Sample]]

    def figure(self, metric: Metric) -> Figure:
        """Return the medians of `metric`."""
        values = [(metric.of(ours), metric.of(peer)) for ours, peer in self.pairs]
        return Figure(
            median(ratio(ours, peer) for ours, peer in values),
            median(ours for ours, _ in values),
            median(peer for _, peer in values),
        )


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Return the quotient, or None where it is not known or without meaning."""
    return numerator / denominator if numerator is not None and denominator else None


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are known, or None if none is."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# Report

LEGEND = (
    "Ratios are ours ÷ peer, the median of those of each pair of runs: above 1 is good for throughput, below 1 for\n"
    "CPU (the server's, per MiB moved) and p99 (latency). The other columns are the medians of each side."
)


def shown(value: float | None) -> str:
    """Return `value` with three significant digits or all before the point, and no exponent."""
    if value is None:
        return "–"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{max(0, 2 - magnitude)}f}"


def heading() -> list[str]:
    """Return the names of the table's columns."""
    columns = ([f"{metric.name} ratio", f"ours, {metric.unit}", f"peer, {metric.unit}"] for metric in METRICS)
    return ["workload", *(name for names in columns for name in names)]


def row(comparison: Comparison) -> list[str]:
    """Return the table's cells for one workload."""
    figures = [comparison.figure(metric) for metric in METRICS]
    cells = ([shown(figure.ratio), shown(figure.ours), shown(figure.peer)] for figure in figures)
    return [comparison.workload, *(cell for group in cells for cell in group)]


def summary(comparison: Comparison) -> str:
    """Return one line with the ratios."""
    return ", ".join(f"{metric.name} {shown(comparison.figure(metric).ratio)}" for metric in METRICS)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return `rows`, the first of which is the heading, as a Markdown table that is aligned as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        for cells in (rows[0], rule, *rows[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(facts: Mapping[str, str], comparisons: Sequence[Comparison]) -> str:
    """Return the whole report for people."""
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    cells = table([heading(), *map(row, comparisons)])
    return f"# nbdkitpy side by side\n\n{listed}\n\n{cells}\n\n{LEGEND}\n"


def as_json(facts: Mapping[str, str], comparisons: Sequence[Comparison]) -> str:
    """Return the whole report for programs: the medians, and every sample that they come from."""
    results = [
        {
            "workload": comparison.workload,
            "figures": {m.name: {"unit": m.unit, **asdict(comparison.figure(m))} for m in METRICS},
            "pairs": [{"ours": asdict(ours), "peer": asdict(peer)} for ours, peer in comparison.pairs],
        }
        for comparison in comparisons
    ]
    return json.dumps({"facts": dict(facts), "results": results}, indent=2) + "\n"


# Workloads


@dataclass(frozen=True)
class Target:
    """What a client needs to know of a server: its URI, and the size of its disk in bytes."""

    uri: str
    size: int


class Workload(Protocol):
    """Something that a client does to a server."""

    @property
    def name(self) -> str:
        """Name for --only and the report."""
        ...

    @property
    def tool(self) -> str:
        """The client's command."""
        ...

    def run(self, target: Target, seconds: float) -> Transfer:
        """Run the client for about so many seconds, and return what it moved."""
        ...


@dataclass(frozen=True)
class Fio:
    """fio with one connection: `rw` as fio calls it, in blocks of so many bytes, `depth` requests in flight."""

    rw: str
    block: int
    depth: int
    tool: str = "fio"

    @property
    def name(self) -> str:
        size = f"{self.block // MIB}m" if self.block >= MIB else f"{self.block // 1024}k"
        return f"{self.rw}-{size}-d{self.depth}"

    def run(self, target: Target, seconds: float) -> Transfer:
        return parse_fio(run_client(self.command(target, seconds), seconds))

    def command(self, target: Target, seconds: float) -> list[str]:
        """Return fio's command line."""
        options = {
            "name": self.name,
            "ioengine": "nbd",
            "uri": target.uri,
            "rw": self.rw,
            "bs": self.block,
            "iodepth": self.depth,
            "size": target.size,
            "runtime": f"{round(1000 * seconds)}ms",
            "output-format": "json",
        }
        # Without its map of blocks done fio costs less, and so there is more of the servers in what it measures.
        switches = ["--thread", "--time_based", "--norandommap"]
        return [self.tool, *switches, *(f"--{name}={value}" for name, value in options.items())]


@dataclass(frozen=True)
class Copy:
    """nbdcopy of the whole disk to nowhere, over and over for the time given."""

    name: str = "nbdcopy"
    tool: str = "nbdcopy"

    def run(self, target: Target, seconds: float) -> Transfer:
        start = time.monotonic()
        copies, elapsed = 0, 0.0
        while elapsed < seconds or not copies:
            run_client([self.tool, target.uri, "null:"], seconds)
            copies, elapsed = copies + 1, time.monotonic() - start
        return Transfer(copies * target.size, elapsed)


WORKLOADS: tuple[Workload, ...] = (
    Fio("randread", 4096, 1),
    Fio("randread", 4096, 16),
    Fio("randread", 4096, 64),
    Fio("randwrite", 4096, 1),
    Fio("randwrite", 4096, 64),
    Fio("read", 64 << 10, 16),
    Fio("read", MIB, 4),
    Fio("write", 64 << 10, 16),
    Fio("write", MIB, 4),
    Copy(),
)


def run_client(command: Sequence[str], seconds: float) -> str:
    """Run a client that should take about so many seconds; return its output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{command[0]} did not end: {' '.join(command)}") from error
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{command[0]} failed: {' '.join(command)}\n{error.stderr}".rstrip()) from error
    return done.stdout


def parse_fio(output: str) -> Transfer:
    """Return what fio's JSON says of its one job, which reads or writes.

    fio's nbd engine says "fio: connected to NBD server" before it, on the same stream.
    """
    try:
        (job,) = json.loads(output[output.index("{") :])["jobs"]
        side = max((job["read"], job["write"]), key=lambda side: int(side["io_bytes"]))
        p99 = side["clat_ns"]["percentile"]["99.000000"] / 1000
        return Transfer(side["io_bytes"], side["runtime"] / 1000, p99)
    except (KeyError, ValueError) as error:
        raise BenchmarkError(f"fio did no input or output, or its output is not understood:\n{output}") from error


def select(patterns: Sequence[str]) -> list[Workload]:
    """Return the workloads whose name matches one of the patterns; all of them if there is none.

    Raises:
        BenchmarkError: a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatch(workload.name, pattern) for workload in WORKLOADS):
            raise BenchmarkError(f'no workload matches "{pattern}"; --list shows their names')
    wanted = patterns or ["*"]
    return [each for each in WORKLOADS if any(fnmatch.fnmatch(each.name, pattern) for pattern in wanted)]


# Processor time


@dataclass(frozen=True)
class ProcessStat:
    """A process's parent, and the processor time in clock ticks of its threads and of its children that it reaped."""

    parent: int
    ticks: int


def parse_stat(text: str) -> ProcessStat:
    """Return what a /proc/PID/stat says; proc(5) numbers the fields, of which the name may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    parent, *times = (int(fields[number - 3]) for number in (4, 14, 15, 16, 17))
    return ProcessStat(parent, sum(times))


def process_table() -> dict[int, ProcessStat]:
    """Return all processes by their number."""
    stats = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may end at any time.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stats[int(path.parent.name)] = parse_stat(path.read_text(errors="replace"))
    return stats


def tree_ticks(root: int, processes: Mapping[int, ProcessStat]) -> int:
    """Return the clock ticks of process `root` and of all its descendants."""
    children = (number for number, process in processes.items() if process.parent == root)
    return processes[root].ticks + sum(tree_ticks(child, processes) for child in children)


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process and of its descendants so far, in seconds."""
    processes = process_table()
    if pid not in processes:
        raise BenchmarkError(f"server process {pid} has ended")
    return tree_ticks(pid, processes) / os.sysconf("SC_CLK_TCK")


# Servers


@dataclass(frozen=True)
class Setup:
    """What both servers are to serve, and how. `size` is the image's, in bytes."""

    image: Path
    size: int
    filters: int = 0


@dataclass(frozen=True)
class Address:
    """Where a server is to listen: a Unix socket, or a TCP port on loopback."""

    path: str = ""
    port: int = 0

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={quote(self.path)}" if self.path else f"nbd://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        """Return a new connection."""
        connection = socket.socket(socket.AF_UNIX if self.path else socket.AF_INET)
        connection.settimeout(START_SECONDS)
        try:
            connection.connect(self.path or ("127.0.0.1", self.port))
        except OSError:
            connection.close()
            raise
        return connection


def nbdkit_command(program: Sequence[str], plugin: str, setup: Setup, address: Address) -> list[str]:
    """Return the command line of nbdkit, which is nbdkitpy's too."""
    listen = ["-U", address.path] if address.path else ["-i", "127.0.0.1", "-p", str(address.port)]
    filters = FILTERS[: setup.filters]
    source = {"file": str(setup.image), "memory": str(setup.size)}[plugin]
    parameters = [parameter for _, parameter in filters if parameter]
    return [*program, "-f", *listen, *(f"--filter={name}" for name, _ in filters), plugin, source, *parameters]


def qemu_nbd_command(setup: Setup, address: Address) -> list[str]:
    """Return the command line of qemu-nbd, which has no filters."""
    listen = ["-k", address.path] if address.path else ["-b", "127.0.0.1", "-p", str(address.port)]
    return ["qemu-nbd", "--persistent", "--shared=64", "--format=raw", *listen, str(setup.image)]


@dataclass(frozen=True)
class Peer:
    """A server to compare with, the command that starts it, our plugin that does the same, and whether it filters."""

    tool: str
    command: Callable[[Setup, Address], list[str]]
    plugin: str = "file"
    filters: bool = True


PEERS = {
    "nbdkit-file": Peer("nbdkit", partial(nbdkit_command, ["nbdkit"], "file")),
    "nbdkit-memory": Peer("nbdkit", partial(nbdkit_command, ["nbdkit"], "memory"), plugin="memory"),
    "qemu-nbd": Peer("qemu-nbd", qemu_nbd_command, filters=False),
}


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    pid: int
    target: Target


@contextlib.contextmanager
def serving(command: Sequence[str], address: Address, size: int) -> Iterator[Server]:
    """Run a server, with one idle client so that no filter takes it for forsaken, and end it in the end."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            with idle_client(process, address):
                yield Server(process.pid, Target(address.uri, size))
        except (BenchmarkError, OSError) as error:
            log.seek(0)
            raise BenchmarkError(f"{error}\n{log.read()}".rstrip()) from error
        finally:
            end(process)


@contextlib.contextmanager
def idle_client(process: subprocess.Popen[bytes], address: Address) -> Iterator[None]:
    """Wait until the server is there, and stay connected to its default export."""
    with connected(process, address) as connection:
        receive(connection, GREETING.size)
        connection.sendall(FLAGS_AND_OPTION.pack(FIXED_NEWSTYLE_NO_ZEROES, IHAVEOPT, OPT_EXPORT_NAME, 0))
        receive(connection, EXPORT_REPLY.size)
        yield
        # It may have ended already, and whoever notices says so better.
        with contextlib.suppress(OSError):
            connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))


def connected(process: subprocess.Popen[bytes], address: Address) -> socket.socket:
    """Return a connection to a server that has just been started, as soon as it listens."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return address.connect()
        time.sleep(0.01)
    raise BenchmarkError(f"no server at {address.uri}")


def receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes from the server."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise BenchmarkError("the server closed the connection in the handshake")
        data += piece
    return data


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server, by force if need be."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a TCP port that nobody has at this moment: nbdkit 1.32 cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def make_image(path: Path, size: int) -> None:
    """Write `size` bytes of random data, a whole number of MiB, and leave them clean in the page cache."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass


# The benchmark


@dataclass(frozen=True)
class Plan:
    """What to run: each workload `pairs` times on each server, for `seconds`, on a disk of `size` bytes."""

    peer: str
    workloads: Sequence[Workload]
    pairs: int
    seconds: float
    size: int
    filters: int
    tcp: bool
    directory: str | None

    def tools(self) -> list[str]:
        """Return the clients' commands, each once."""
        filler = ["nbdcopy"] if PEERS[self.peer].plugin == "memory" else []
        return sorted({*(workload.tool for workload in self.workloads), *filler})

    def check(self) -> None:
        """Raise BenchmarkError if a command is not installed."""
        missing = [tool for tool in (PEERS[self.peer].tool, *self.tools()) if shutil.which(tool) is None]
        if missing:
            raise BenchmarkError(f"not installed: {', '.join(missing)}")

    def facts(self) -> dict[str, str]:
        """Return what one has to know to make sense of the figures."""
        peer = PEERS[self.peer]
        filters = ", ".join(name for name, _ in FILTERS[: self.filters]) or "none"
        return {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} processors, {platform.platform()}, load {os.getloadavg()[0]:.2f} before",
            "ours": f"{version([*NBDKITPY, '--version'])}, plugin {peer.plugin}, Python {platform.python_version()}",
            "peer": f"{self.peer}, {version([peer.tool, '--version'])}",
            "clients": ", ".join(version([tool, "--version"]) for tool in self.tools()),
            "runs": f"{self.pairs} pairs of {self.seconds:g} s, disk of {self.size // MIB} MiB",
            "transport": "TCP on loopback" if self.tcp else "Unix socket",
            "filters": filters if peer.filters or not self.filters else f"{filters} (ours alone)",
        }


def version(command: Sequence[str]) -> str:
    """Return the first line that a command prints."""
    return run_client(command, 0).partition("\n")[0]


@contextlib.contextmanager
def both(plan: Plan) -> Iterator[tuple[Server, Server]]:
    """Run nbdkitpy and the peer on the same data."""
    peer = PEERS[plan.peer]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdkitpy-", dir=plan.directory)))
        setup = Setup(directory / "image", plan.size, plan.filters)
        make_image(setup.image, setup.size)

        def start(name: str, command: Callable[[Setup, Address], list[str]]) -> Server:
            address = Address(port=free_port()) if plan.tcp else Address(path=str(directory / name))
            server = stack.enter_context(serving(command(setup, address), address, setup.size))
            if peer.plugin == "memory":
                run_client(["nbdcopy", str(setup.image), server.target.uri], 0)
            return server

        yield start("ours", partial(nbdkit_command, NBDKITPY, peer.plugin)), start("peer", peer.command)


def measure(workload: Workload, server: Server, seconds: float) -> Sample:
    """Run a workload once."""
    before = cpu_seconds(server.pid)
    transfer = workload.run(server.target, seconds)
    return Sample(transfer, cpu_seconds(server.pid) - before)


def compare(workload: Workload, ours: Server, peer: Server, plan: Plan) -> Comparison:
    """Run a workload on the one, then on the other, and so on."""
    pairs = [(measure(workload, ours, plan.seconds), measure(workload, peer, plan.seconds)) for _ in range(plan.pairs)]
    return Comparison(workload.name, pairs)


def carry_out(plan: Plan, prefix: Path) -> None:
    """Run the plan; save the report after each workload, and print it in the end."""
    plan.check()
    facts = plan.facts()
    comparisons: list[Comparison] = []
    with both(plan) as (ours, peer):
        for workload in plan.workloads:
            comparison = compare(workload, ours, peer, plan)
            comparisons.append(comparison)
            print(f"{workload.name}: {summary(comparison)}", file=sys.stderr, flush=True)
            save(prefix, facts, comparisons)
    print(markdown(facts, comparisons), end="")


def save(prefix: Path, facts: Mapping[str, str], comparisons: Sequence[Comparison]) -> None:
    """Write PREFIX.json and PREFIX.md."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(f"{prefix.name}.json").write_text(as_json(facts, comparisons), encoding="utf-8")
    prefix.with_name(f"{prefix.name}.md").write_text(markdown(facts, comparisons), encoding="utf-8")


# Command line


def whole_number(text: str) -> int:
    """Return a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, not "{text}"')
    return value


def duration(text: str) -> float:
    """Return a time in seconds: a millisecond at least, which is fio's unit, and an hour at most."""
    value = float(text)
    if not 0.001 <= value <= 3600:
        raise argparse.ArgumentTypeError(f'must be 0.001 to 3600 seconds, not "{text}"')
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--peer", choices=PEERS, default="nbdkit-file", help="server to compare with (%(default)s)")
    add("--pairs", type=whole_number, default=5, metavar="N", help="runs of each workload on each server (%(default)s)")
    add("--runtime", type=duration, default=5.0, metavar="SECONDS", help="length of a run (%(default)s)")
    add("--size", type=whole_number, default=512, metavar="MIB", help="size of the disk, in MiB (%(default)s)")
    add("--only", action="append", default=[], metavar="PATTERN", help="workloads to run, as 'randread-*'; repeatable")
    add("--list", action="store_true", help="show the names of the workloads, and end")
    add("--filters", type=int, choices=range(len(FILTERS) + 1), default=0, help="so many filters that let all through")
    add("--tcp", action="store_true", help="TCP on loopback instead of Unix sockets")
    add("--directory", metavar="DIR", help="where to put the image while it is needed (the system's place)")
    add("--save", default="build/benchmark", metavar="PREFIX", help="write PREFIX.json and .md (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    arguments = parser().parse_args(argv)
    try:
        workloads = select(arguments.only)
        if arguments.list:
            print("\n".join(workload.name for workload in workloads))
        else:
            carry_out(plan_of(arguments, workloads), Path(arguments.save))
    except (BenchmarkError, OSError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    return 0


def plan_of(arguments: argparse.Namespace, workloads: Sequence[Workload]) -> Plan:
    """Return what the command line asks for."""
    return Plan(
        peer=arguments.peer,
        workloads=workloads,
        pairs=arguments.pairs,
        seconds=arguments.runtime,
        size=arguments.size * MIB,
        filters=arguments.filters,
        tcp=arguments.tcp,
        directory=arguments.directory,
    )


if __name__ == "__main__":
    # Leave by way of the cleaning up, which ends the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)

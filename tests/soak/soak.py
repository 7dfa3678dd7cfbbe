"""A soak: many clients do random things at once, and one sees that every block is as it has written it.

``python -m tests.soak.soak --minutes 10`` runs it against two servers, one after the other: one process, and several.
What each of them has at the end, memory, threads and descriptors, has to be what it had at the beginning. It ends with
status 0 if all is well.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.certificates import Authority, make_directory
from tests.interop.harness import Server
from tests.nbdclient import NbdClient, Style
from tests.soak.checker import Checker
from tests.soak.hooligans import Hooligan, Target
from tests.threats.conversation import recorded

__all__ = ["main", "soak"]

KIB, MIB = 1 << 10, 1 << 20

#: Clients at once that do random things.
HOOLIGANS = 16

#: Which servers are soaked.
WORKERS = (0, 2)

#: So much more memory, in each process, is taken for what an allocator keeps.
SLACK = 12 * MIB

#: Seconds in which a server has to come to rest when nobody asks for anything any more.
REST = 30.0

#: What stands in the log for an exception that no one expects; OSErrors are shown without the name of a class.
_DEFECT = re.compile(r"\b[A-Z]\w*(Error|Exception|Exit|Interrupt)\b: |Traceback")


@dataclasses.dataclass
class Weight:
    """What a server and its workers have."""

    memory: int  #: bytes, of all processes
    threads: int
    descriptors: int
    processes: int

    @classmethod
    def of(cls, pid: int) -> Weight:
        """Weigh a process and its children."""
        pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        memory = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in pids)
        return cls(
            memory * os.sysconf("SC_PAGE_SIZE"),
            sum(len(os.listdir(f"/proc/{each}/task")) for each in pids),
            sum(len(os.listdir(f"/proc/{each}/fd")) for each in pids),
            len(pids),
        )

    def __str__(self) -> str:
        return f"{self.memory / MIB:.1f} MiB, {self.threads} threads, {self.descriptors} descriptors"


@dataclasses.dataclass
class Report:
    """What has come of one server."""

    title: str
    counts: Counter[str]
    before: Weight
    after: Weight
    failures: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.title}:",
            *(f"  {count:>10} {what}" for what, count in sorted(self.counts.items())),
            f"  before: {self.before}",
            f"  after:  {self.after}",
            *(f"  FAILED: {failure}" for failure in self.failures),
        ]
        return "\n".join(lines)


def soak(seconds: float, *, workers: int, seed: int) -> Report:
    """Soak one server for so long."""
    with tempfile.TemporaryDirectory(prefix="nbdkitpy-soak") as name:
        directory = Path(name)
        with _serving(directory, workers) as (server, target):
            return _Soak(server, target, random.Random(seed)).run(
                seconds, f"{workers} workers" if workers else "one process"
            )


@contextlib.contextmanager
def _serving(directory: Path, workers: int) -> Iterator[tuple[Server, Target]]:
    disks = directory / "disks"
    disks.mkdir()
    (disks / Checker.NAME).write_bytes(bytes(Checker.SIZE))
    (disks / Hooligan.NAME).write_bytes(random.Random(0).randbytes(Hooligan.SIZE))
    certificates = make_directory(Authority(directory / "authority"), directory / "tls")
    server = Server(
        *("-U", directory / "socket", "--tls=on", f"--tls-certificates={certificates}", f"--workers={workers}"),
        *("--timeout=2", f"--log={directory / 'log'}", "file", f"dir={disks}"),
        directory=directory,
    )
    try:
        path = str(directory / "socket")
        conversations = {style: recorded(path, style, Hooligan.NAME) for style in Style}
        yield server, Target(path, conversations, certificates, disks, directory / "log")
    finally:
        server.kill()


class _Soak:
    """Everybody at once, until the time is over."""

    def __init__(self, server: Server, target: Target, chance: random.Random) -> None:
        self._server = server
        self._target = target
        self._chance = chance
        self._counts: Counter[str] = Counter()
        self._failures: list[str] = []
        self._is_over = threading.Event()

    def run(self, seconds: float, title: str) -> Report:
        """Soak for so long, and report."""
        self._warm_up()
        before = self._rested(None)
        checker = Checker(self._target, self._chance.getrandbits(32))
        hooligans = [Hooligan(self._target, self._chance.getrandbits(32)) for _ in range(HOOLIGANS)]
        self._all_at_once([checker.run, *(hooligan.run for hooligan in hooligans)], seconds)
        self._failures += checker.failures
        for counts in (checker.counts, *(hooligan.counts for hooligan in hooligans)):
            self._counts.update(counts)
        after = self._rested(before)
        self._compare(before, after)
        checker.check_file()
        self._counts["blocks found in the file at the end"] = checker.found
        self._failures += checker.failures
        self._end()
        return Report(title, self._counts, before, after, self._failures)

    def _warm_up(self) -> None:
        """Have each thing done once that may be done, as much is loaded and kept when it is first needed."""
        for number in range(4):
            Hooligan(self._target, number).do_each_once()

    def _all_at_once(self, doers: Sequence[Callable[[threading.Event], None]], seconds: float) -> None:
        threads = [threading.Thread(target=self._guarded, args=(doer,)) for doer in doers]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self._failures:
            self._is_over.wait(min(1.0, seconds))
            self._look_at_log()
            if not self._server.is_running:
                self._failures.append("the server has ended")
        self._is_over.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                self._failures.append("a client hangs")
        self._look_at_log()

    def _guarded(self, doer: Callable[[threading.Event], None]) -> None:
        try:
            doer(self._is_over)
        except Exception as error:  # whatever a client of ours finds wrong
            self._failures.append(f"{type(error).__name__}: {error}")

    def _look_at_log(self) -> None:
        """Look for what must not be there, and empty it: it has a line for each thing that a client does wrong."""
        text = self._target.log.read_text()
        os.truncate(self._target.log, 0)
        self._counts["lines in the log"] += text.count("\n")
        self._failures += [f"in the log: {line}" for line in text.splitlines() if _DEFECT.search(line)][:10]

    def _rested(self, before: Weight | None) -> Weight:
        """What the server has when nobody is connected: as soon as it is what it was before, or after a while."""
        deadline = time.monotonic() + REST
        while True:
            found = Weight.of(self._server.pid)
            is_as_before = before and (found.threads, found.descriptors) <= (before.threads, before.descriptors)
            if is_as_before or time.monotonic() > deadline or (not before and self._is_at_rest(found)):
                return found
            self._pause()

    def _is_at_rest(self, found: Weight) -> bool:
        """Whether nothing changes any more."""
        for _ in range(5):
            self._pause()
            if dataclasses.replace(Weight.of(self._server.pid), memory=found.memory) != found:
                return False
        return True

    def _pause(self) -> None:
        threading.Event().wait(0.1)

    def _compare(self, before: Weight, after: Weight) -> None:
        for what in ("threads", "descriptors", "processes"):
            if getattr(after, what) > getattr(before, what):
                self._failures.append(f"{getattr(after, what) - getattr(before, what)} {what} more than before")
        grown = after.memory - before.memory
        if grown > SLACK * before.processes:
            self._failures.append(f"{grown / MIB:.1f} MiB of memory more than before")

    def _end(self) -> None:
        with NbdClient(self._server.connect()) as idle:
            idle.negotiate(name=Hooligan.NAME)
            os.kill(self._server.pid, signal.SIGTERM)
            begin = time.monotonic()
            status = self._server.status()
        if status or time.monotonic() - begin > 10:
            self._failures.append(f"it ended with status {status} after {time.monotonic() - begin:.1f} s")
        self._failures += [f"on standard error: {line}" for line in self._server.log()][:10]


def main(words: Sequence[str]) -> int:
    """Soak, print what has come of it, and return the exit status."""
    parser = argparse.ArgumentParser(description="Soak servers in random clients.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long, in all (default: 10)")
    parser.add_argument("--seed", type=int, default=None, help="of the random numbers (default: another one each time)")
    given = parser.parse_args(words)
    seed = random.SystemRandom().getrandbits(32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    reports = []
    for workers in WORKERS:
        reports.append(soak(given.minutes * 60 / len(WORKERS), workers=workers, seed=seed))
        print(reports[-1], flush=True)
    return 1 if any(report.failures for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

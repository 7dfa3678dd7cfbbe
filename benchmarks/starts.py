"""What a server costs before it has anything to do: its start, and clients that are quiet."""

from __future__ import annotations

import compileall
import contextlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import MB, Metric, Sample
from benchmarks.processes import Footprint, footprint
from benchmarks.service import Running, Service
from benchmarks.wire import GREETING, negotiate, read_block, receive

GREETING_TIME = Metric("greeting", "ms")
FIRST_REPLY = Metric("first reply", "ms")
OVER_PYTHON = Metric("first reply over python -c pass", "ms")

CLIENTS = (1, 100, 1000)

#: Our packages.
OURS = ("nbdkitpy", "nbdkitpy_plugins", "nbdkitpy_filters")


def compile_ours() -> None:
    """Have bytecode for all modules of ours, as pip does. A checkout may have none."""
    for name in OURS:
        spec = importlib.util.find_spec(name)
        for place in (spec and spec.submodule_search_locations) or ():
            compileall.compile_dir(place, quiet=2)


@dataclass(frozen=True)
class Start:
    """A start, from the exec of the command to the greeting and to the reply to a first READ."""

    name: str = "start"
    tools: Sequence[str] = ()
    metrics: Sequence[Metric] = (FIRST_REPLY, GREETING_TIME, OVER_PYTHON)
    of_file: bool = False

    def run(self, service: Service, seconds: float) -> Sample:
        """Start a server once, and Python once, to compare with."""
        python = python_start()
        begin = time.monotonic()
        with service.launch() as running, running.connect() as connection:
            receive(connection, GREETING.size)
            greeting = time.monotonic() - begin
            negotiate(connection, service.contender.export)
            read_block(connection)
            reply = time.monotonic() - begin
        milliseconds = {GREETING_TIME: greeting, FIRST_REPLY: reply, OVER_PYTHON: reply - python}
        return {metric.name: 1000 * value for metric, value in milliseconds.items()}


def python_start() -> float:
    """Return the seconds that this Python takes to start, in its environment, and to end."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - begin


def memory_at(clients: int) -> Metric:
    """Return the metric of the memory that so many clients take, over that of a server which has none."""
    return Metric(f"memory of {clients}", "MB")


def threads_at(clients: int) -> Metric:
    """Return the metric of the threads that there are with so many clients."""
    return Metric(f"threads at {clients}", "")


@dataclass(frozen=True)
class Idle:
    """Clients that have read one block each, and are quiet then."""

    clients: Sequence[int] = CLIENTS
    name: str = "idle"
    tools: Sequence[str] = ()
    of_file: bool = False

    @property
    def metrics(self) -> Sequence[Metric]:
        most_first = sorted(self.clients, reverse=True)
        return (*map(memory_at, most_first), *map(threads_at, most_first))

    def run(self, service: Service, seconds: float) -> Sample:
        sample: dict[str, float] = {}
        with service.launch() as running, contextlib.ExitStack() as connections:
            none = after_a_client(running)
            connected = 0
            for count in sorted(self.clients):
                for _ in range(count - connected):
                    read_block(connections.enter_context(running.client()))
                connected = count
                now = footprint(running.pid)
                sample[memory_at(count).name] = (now.memory - none.memory) / MB
                sample[threads_at(count).name] = now.threads
        return sample


def after_a_client(running: Running) -> Footprint:
    """Return what a server takes up that has had a client, and has none."""
    with running.client() as connection:
        read_block(connection)
    return footprint(running.pid)

"""The filters for faults do what the real nbdkit's do: delay, error, log, rate and retry."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from nbdkitpy.protocol.constants import Command
from tests.interop.harness import MIB, Servers, full_image, make_distribution
from tests.interop.sidebyside import IMAGE, Request, SideBySide, random_requests
from tests.nbdclient import PATIENCE, NbdClient, Refused, Style

pytestmark = pytest.mark.interop

SIZE = MIB

#: One request of each kind.
EACH = [
    Request("pread", 512, 0),
    Request("pwrite", 512, 512, ("FUA",), 1),
    Request("flush"),
    Request("trim", 4096, 4096),
    Request("zero", 4096, 8192, ("FAST_ZERO",)),
    Request("zero", 4096, 8192, ("NO_HOLE",)),
    Request("cache", 4096, 0),
    Request("extents", 65536, 0),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return full_image(tmp_path / "disk", SIZE)


# --- the same requests, the same answers ---


@pytest.mark.parametrize(
    "words",
    [
        ["error-rate=100%"],
        ["error-rate=1", "error=ENOSPC"],
        ["error-rate=1:1", "error=ENOSPC", "error-pread=EPERM", "error-zero=ESHUTDOWN", "error-cache=ENOMEM"],
        ["error-pread=ENOMEM", "error=EINVAL", "error-rate=1"],
        ["error-pread-rate=100%", "error-rate=0"],
        ["error-rate=100%", "error-extents-rate=0", "error-cache-rate=0%"],
        ["error-pwrite-rate=1", "error-trim-rate=1", "error-zero-rate=1", "error=EPERM"],
        ["error-rate=1", "error-file=/nowhere", "error-trim-file=/tmp"],
    ],
)
def test_error_fails_the_same_requests_in_the_same_way(side_by_side: SideBySide, image: Path, words: list[str]) -> None:
    if "ESHUTDOWN" in "".join(words):
        side_by_side.nbdkit.needs(1, 40)  # older ones do not know it

    side_by_side.compare("--filter=error", "file", IMAGE, *words, requests=EACH, image=image, fast_zero=False)


@pytest.mark.parametrize(
    "words",
    [
        ["rdelay=1ms", "wdelay=1ms"],
        ["delay-fast-zero=false"],
        ["delay-extents=1ms", "delay-cache=1ms", "delay-open=1ms", "delay-close=1ms", "delay-trim=1ms"],
    ],
)
def test_delay_changes_nothing_but_the_time(side_by_side: SideBySide, image: Path, words: list[str]) -> None:
    requests = EACH + random_requests(5, SIZE, 40)

    side_by_side.compare("--filter=delay", "file", IMAGE, *words, requests=requests, image=image, fast_zero=False)


def test_fast_zeroes_are_offered_and_refused(side_by_side: SideBySide, image: Path) -> None:
    outcome = side_by_side.compare(
        "--filter=delay", "file", IMAGE, "delay-zero=1ms", "delay-fast-zero=false", requests=EACH, image=image
    )

    assert outcome is not None
    assert outcome["answers"][4] == "ENOTSUP"


def test_rate_changes_nothing_but_the_time(side_by_side: SideBySide, image: Path) -> None:
    words = ["rate=1G", "connection-rate=1G", "burstiness=1"]

    side_by_side.compare(
        "--filter=rate", "file", IMAGE, *words, image=image, requests=random_requests(6, SIZE), fast_zero=False
    )


# --- the log ---


def log_of(path: Path) -> list[str]:
    """The lines of a log, without times, what depends on the plugin, and the thread model, of which we do not know."""
    lines = [re.sub(r"^(\S+ \S+|!) (?=connection=|\.\.\.|[A-Z])", "", line) for line in path.read_text().splitlines()]
    return [re.sub(r" (thread_model|minsize|prefsize|maxsize)=\w+", "", line) for line in lines]


def use_all(client: NbdClient) -> None:
    """Make requests of all kinds, of which some fail."""
    client.negotiate(Style.STRUCTURED, name='a $disk "x"', contexts=True)
    for command, flags in (
        (Command.READ, 0),
        (Command.TRIM, 0),
        (Command.TRIM, 1),
        (Command.WRITE_ZEROES, 0),
        (Command.WRITE_ZEROES, 3),
        (Command.WRITE_ZEROES, 16),
        (Command.CACHE, 0),
        (Command.BLOCK_STATUS, 0),
        (Command.BLOCK_STATUS, 8),
    ):
        client.call(command, 32768, 32768, flags=flags)
    client.call(Command.WRITE, 0, data=bytes(512), flags=1)
    client.call(Command.FLUSH)
    leave(client)


@pytest.mark.parametrize("error", [[], ["--filter=error"]])
def test_log_has_the_same_lines(serve: Servers, side_by_side: SideBySide, tmp_path: Path, error: list[str]) -> None:
    words = ["--filter=log", *error, "memory", "1M", f"logfile={IMAGE}.log", *(["error-rate=1"] if error else [])]
    image = full_image(tmp_path / "image", 512)

    server = serve(*[word.replace(IMAGE, str(image)) for word in words])
    use_all(NbdClient(server.connect()))
    server.end()
    with side_by_side.nbdkit.copy(image) as copy:
        assert copy is not None
        with side_by_side.nbdkit.serving(words, copy) as uri:
            use_all(dial(uri))
        theirs = log_of(Path(f"{copy}.log"))

    assert log_of(Path(f"{image}.log")) == theirs
    assert len(theirs) >= 25


def leave(client: NbdClient) -> None:
    """Take leave, and do not wait for the server to close the connection, which nbdkit's threads do not do."""
    client.send(Command.DISC)
    client.socket.close()


def dial(uri: str) -> NbdClient:
    """Return a client that is connected."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(uri.partition("socket=")[2])
    return NbdClient(sock)


# --- trying again ---


class Scenario(NamedTuple):
    """A plugin that fails, and what is asked of it."""

    words: Sequence[str]  #: parameters of the filter
    requests: Sequence[Command]  #: of 512 bytes at 4096
    failures: Mapping[str, int]  #: how many of the first calls fail
    sizes: Sequence[int] = (SIZE,) * 9  #: of one opening after the other


SCENARIOS = {
    "a read": Scenario(["retries=3"], [Command.READ], {"pread": 2}),
    "a read, too often": Scenario(["retries=1"], [Command.READ, Command.READ], {"pread": 3}),
    "opening": Scenario(["retries=2"], [Command.READ], {"open": 2}),
    "opening, too often": Scenario(["retries=1"], [Command.READ], {"open": 9}),
    "never": Scenario(["retries=0"], [Command.WRITE, Command.WRITE], {"pwrite": 1}),
    "read-only": Scenario(["retry-readonly=yes"], [Command.WRITE, Command.READ], {"pwrite": 1}),
    "shrunk": Scenario(["retries=2"], [Command.READ], {"pread": 1}, (SIZE, 4096, 4096)),
    "shrunk, for a while": Scenario(["retries=2"], [Command.WRITE], {"pwrite": 1}, (SIZE, 4096, SIZE)),
}

#: The plugin for nbdkit. Beside it there is a directory for what it has to remember.
SCRIPT = """#!/bin/sh
state="${{0%/*}}"
count() {{ n=$(($(cat "$state/$1" 2>/dev/null || echo 0) + 1)); echo $n >"$state/$1"; }}
fail_first() {{ count $1; if [ $n -le $2 ]; then echo EIO fails >&2; exit 1; fi; }}
case $1 in
    open) echo "open $2" >>"$state/calls"; fail_first open {open} ;;
    close) echo close >>"$state/calls" ;;
    get_size) set -- {sizes}; shift $(($(cat "$state/open") - 1)); echo $1 ;;
    can_write) ;;
    pread) echo "pread $3 $4" >>"$state/calls"; fail_first pread {pread}; head -c $3 /dev/zero ;;
    pwrite) cat >/dev/null; echo "pwrite $3 $4" >>"$state/calls"; fail_first pwrite {pwrite} ;;
    *) exit 2 ;;
esac
"""

#: The same for us.
PLUGIN = """
import collections, errno
from nbdkitpy import Handle, Plugin, hookimpl

FAILURES = dict(open={open}, pread={pread}, pwrite={pwrite})
SIZES = [int(size) for size in {sizes!r}.split()]

class Flaky(Plugin):
    name = "flaky"

    def load(self):
        self.made = collections.Counter()

    def call(self, name, *words):
        if words or name == "close":
            with open({calls!r}, "a") as calls:
                print(name, *words, file=calls)
        self.made[name] += 1
        if self.made[name] <= FAILURES.get(name, 0):
            raise OSError(errno.EIO, "fails")

    def open(self, export_name, readonly, client):
        self.call("open", str(readonly).lower())
        return FlakyHandle(self, SIZES[self.made["open"] - 1])

class FlakyHandle(Handle):
    def __init__(self, plugin, size):
        self.call, self.size = plugin.call, size

    def get_size(self):
        return self.size

    def pread(self, count, offset):
        self.call("pread", count, offset)
        return bytes(count)

    def pwrite(self, data, offset, flags):
        self.call("pwrite", len(data), offset)

    def close(self):
        self.call("close")

@hookimpl
def register_plugins(register):
    register(Flaky)
"""


def errors(client: NbdClient, requests: Sequence[Command]) -> list[int] | str:
    """The error of each request, or what happened instead."""
    try:
        client.negotiate()
    except Refused as error:
        client.socket.close()
        return error.reply.name
    found = [
        client.call(command, 4096, **({"data": bytes(512)} if command is Command.WRITE else {"length": 512})).error
        for command in requests
    ]
    leave(client)
    return found


def calls(directory: Path) -> str:
    """The calls of a plugin, without the last close: nbdkit leaves that out if it is told to end just then."""
    return (directory / "calls").read_text().removesuffix("close\n")


@pytest.mark.parametrize("name", SCENARIOS)
def test_retry_makes_the_same_calls(serve: Servers, side_by_side: SideBySide, tmp_path: Path, name: str) -> None:
    side_by_side.nbdkit.needs(1, 40)  # older ones count in whole seconds, and do not open again
    words, requests, failures, sizes = SCENARIOS[name]
    delay = "retry-delay=10ms"
    values = {"open": 0, "pread": 0, "pwrite": 0, **failures, "sizes": " ".join(map(str, sizes))}

    make_distribution(tmp_path, "flaky", plugins=PLUGIN.format(**values, calls=str(tmp_path / "calls")))
    server = serve("--filter=retry", "flaky", delay, *words, env={"PYTHONPATH": str(tmp_path)})
    answers = errors(NbdClient(server.connect()), requests)
    server.end()
    ours = answers, calls(tmp_path)
    script = tmp_path / "script"
    script.write_text(SCRIPT.format(**values))
    script.chmod(0o755)
    with side_by_side.nbdkit.copy(script) as copy:
        assert copy is not None
        with side_by_side.nbdkit.serving(["--filter=retry", "sh", IMAGE, delay, *words], copy) as uri:
            answers = errors(dial(uri), requests)
        theirs = answers, calls(copy.parent)

    assert ours == theirs

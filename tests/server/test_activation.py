"""Sockets handed over by a service manager: taken if they are for us and right, and nothing else in their place."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server import activation
from nbdkitpy.server.activation import CONFLICTS, Activation, conflicts, receive

PID = 4711

#: Where the tests put the descriptors that a service manager puts at 3, which pytest uses itself.
FIRST = 300


class Handed:
    """Descriptors from :data:`FIRST` on, as a service manager leaves them to its child."""

    def __init__(self, ends: contextlib.ExitStack) -> None:
        self._ends = ends
        self._next = FIRST

    def over(self, fd: int) -> None:
        """Hand over a copy of a descriptor, which the test keeps."""
        os.dup2(fd, self._next)
        self._ends.callback(os.close, self._next)
        self._next += 1

    def sockets(self, count: int) -> None:
        """Hand over that many sockets that listen."""
        with listening_unix() as sock:
            for _ in range(count):
                self.over(sock.fileno())


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handed]:
    monkeypatch.setattr(activation, "FIRST_DESCRIPTOR", FIRST)
    with contextlib.ExitStack() as ends:
        yield Handed(ends)


def listening_unix() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")  # the system finds a name, which is not in the file system
    sock.listen()
    return sock


def listening_vsock() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_VSOCK)
    except OSError as error:
        pytest.skip(f"this kernel has no AF_VSOCK: {error.strerror}")
    sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
    sock.listen()
    return sock


def environment(count: str | None, names: str | None = None, pid: str = str(PID)) -> dict[str, str]:
    """What a service manager sets, and a variable that it does not."""
    said = {"LISTEN_PID": pid, "LISTEN_FDS": count, "LISTEN_FDNAMES": names, "HOME": "/"}
    return {key: value for key, value in said.items() if value is not None}


# --- for whom they are ---


def test_without_the_variables_there_are_no_sockets() -> None:
    environ = {"HOME": "/"}

    assert receive(environ, PID) is None
    assert environ == {"HOME": "/"}


def test_count_without_a_process_is_for_nobody() -> None:
    environ = {"LISTEN_FDS": "garbage", "LISTEN_FDNAMES": "a"}

    assert receive(environ, PID) is None
    assert environ == {"LISTEN_FDS": "garbage", "LISTEN_FDNAMES": "a"}


@pytest.mark.parametrize(
    "whose",
    ["4712", "471", "-4711", "+4711", " 4711", "4711 ", "4711x", "47_11", "٤٧١١", "", "9" * 5000, "\n", "\udcff"],
)
def test_A13_sockets_for_another_process_are_left_alone_and_mentioned(
    handed: Handed, whose: str, caplog: pytest.LogCaptureFixture
) -> None:
    handed.sockets(1)
    environ = environment("99", "a:b", pid=whose)
    before = dict(environ)

    assert receive(environ, PID) is None

    assert environ == before
    assert os.get_inheritable(FIRST)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"socket activation: LISTEN_PID is {whose!r}, not that of this process, 4711: ignored"
    )


def test_sockets_for_this_process_are_for_us(handed: Handed) -> None:
    handed.sockets(1)

    assert receive(environment("1", pid=str(os.getpid()))) == Activation((FIRST,), ("",))


# --- how many ---


@pytest.mark.parametrize("count", [1, 2, 16])
def test_A13_all_sockets_are_taken(handed: Handed, count: int, caplog: pytest.LogCaptureFixture) -> None:
    handed.sockets(count)
    environ = environment(str(count))

    assert receive(environ, PID) == Activation(tuple(range(FIRST, FIRST + count)), ("",) * count)

    assert environ == {"HOME": "/"}
    assert not any(os.get_inheritable(fd) for fd in range(FIRST, FIRST + count))
    assert not caplog.records


WRONG_COUNTS = [
    "-1",
    "1x",
    "",
    "99999999999",
    "0",
    "17",
    "١",
    "１",
    "1.0",
    " 1",
    "1\n",
    "01",
    "+1",
    "0x1",
    "1_0",
    "9" * 5000,
]


@pytest.mark.parametrize("count", WRONG_COUNTS, ids=lambda count: ascii(count[:20]))
def test_A13_wrong_count_is_an_error_though_there_are_sockets(handed: Handed, count: str) -> None:
    handed.sockets(1)
    environ = environment(count, "a")

    with pytest.raises(ConfigError) as caught:
        receive(environ, PID)

    assert str(caught.value) == f"socket activation: LISTEN_FDS must be a number from 1 to 16, not {count!r}"
    assert environ == {"HOME": "/"}


def test_A13_missing_count_is_an_error() -> None:
    environ = environment(None, "a")

    with pytest.raises(ConfigError) as caught:
        receive(environ, PID)

    assert str(caught.value) == "socket activation: LISTEN_FDS must be a number from 1 to 16, but it is not set"
    assert environ == {"HOME": "/"}


# --- what they are called ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("web:admin:spare", ("web", "admin", "spare")),
        (None, ("", "", "")),
        ("", ("", "", "")),
        ("web", ("web", "", "")),
        ("web:admin:spare:more:", ("web", "admin", "spare")),
        ("::spare", ("", "", "spare")),
        ("unknown:disk.socket:unknown", ("", "disk.socket", "")),
    ],
)
def test_names_are_those_of_the_service_manager(handed: Handed, names: str | None, expected: tuple[str, ...]) -> None:
    handed.sockets(3)
    environ = environment("3", names)

    received = receive(environ, PID)

    assert received is not None
    assert received.names == expected
    assert environ == {"HOME": "/"}


# --- what they are ---


def listening_tcp(family: int, address: str) -> Callable[[], socket.socket]:
    dual = address.startswith("::ffff:")
    return lambda: socket.create_server((address, 0), family=family, dualstack_ipv6=dual)


@pytest.mark.parametrize(
    "make",
    [
        listening_tcp(socket.AF_INET, "127.0.0.1"),
        listening_tcp(socket.AF_INET6, "::1"),
        listening_tcp(socket.AF_INET6, "::ffff:127.0.0.1"),
        listening_unix,
        listening_vsock,
    ],
    ids=["IPv4", "IPv6", "IPv4 on IPv6", "Unix", "vsock"],
)
def test_every_kind_of_socket_that_we_serve_is_taken(handed: Handed, make: Callable[[], socket.socket]) -> None:
    with make() as sock:
        handed.over(sock.fileno())

    assert receive(environment("1"), PID) == Activation((FIRST,), ("",))

    assert fcntl.fcntl(FIRST, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_kinds_may_be_mixed_and_go_on_working(handed: Handed) -> None:
    with listening_unix() as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        addresses = [unix.getsockname(), tcp.getsockname()]
        for sock in (unix, tcp):
            handed.over(sock.fileno())

    assert receive(environment("2"), PID) is not None

    for fd, address in zip((FIRST, FIRST + 1), addresses):
        with socket.socket(fileno=os.dup(fd)) as listening, socket.socket(listening.family) as client:
            client.connect(address)
            listening.settimeout(30)
            listening.accept()[0].close()


def connection() -> socket.socket:
    """One client, as a service manager hands it over that accepts clients itself."""
    with listening_unix() as listening:
        client = socket.socket(socket.AF_UNIX)
        client.connect(listening.getsockname())
        return client


def listening_for_packets() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind("")
    sock.listen()
    return sock


DOES_NOT_LISTEN = "a stream socket that does not listen (a socket unit needs Accept=no)"

WRONG_SOCKETS: list[tuple[Callable[[], socket.socket], str]] = [
    (lambda: socket.socket(socket.AF_INET), DOES_NOT_LISTEN),
    (lambda: socket.socket(socket.AF_UNIX), DOES_NOT_LISTEN),
    (connection, DOES_NOT_LISTEN),
    (lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM), "a socket of type SOCK_DGRAM"),
    (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), "a socket of type SOCK_DGRAM"),
    (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET), "a socket of type SOCK_SEQPACKET"),
    (listening_for_packets, "a socket of type SOCK_SEQPACKET"),
    (lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), "a socket of family AF_NETLINK"),
]


MUST = f"socket activation: descriptor {FIRST} must be a stream socket that listens on TCP, Unix or vsock;"


@pytest.mark.parametrize(("make", "what"), WRONG_SOCKETS)
def test_A13_CVE_2025_40080_socket_of_another_kind_is_an_error(
    handed: Handed, make: Callable[[], socket.socket], what: str
) -> None:
    with make() as sock:
        handed.over(sock.fileno())

    assert error_of("1") == f"{MUST} it is {what}"
    os.fstat(FIRST)  # it has not been closed behind its owner's back


def a_pipe(path: Path) -> int:
    os.mkfifo(path / "pipe")
    return os.open(path / "pipe", os.O_RDWR)


def an_epoll(path: Path) -> int:
    with select.epoll() as poll:
        return os.dup(poll.fileno())


WRONG_FILES: list[tuple[Callable[[Path], int], str]] = [
    (lambda path: os.open(path / "file", os.O_RDWR | os.O_CREAT), "a regular file"),
    (lambda path: os.open(path, os.O_RDONLY), "a directory"),
    (lambda path: os.open("/dev/null", os.O_RDWR), "a character device"),
    (a_pipe, "a pipe"),
    (an_epoll, "no socket"),
]


@pytest.mark.parametrize(("make", "what"), WRONG_FILES, ids=[what for _, what in WRONG_FILES])
def test_A13_what_is_no_socket_is_an_error(
    handed: Handed, tmp_path: Path, make: Callable[[Path], int], what: str
) -> None:
    fd = make(tmp_path)
    handed.over(fd)
    os.close(fd)

    assert error_of("1") == f"{MUST} it is {what}"


def test_A13_descriptor_that_is_closed_is_an_error(handed: Handed) -> None:
    assert error_of("1") == f"{MUST} it is unusable: Bad file descriptor"


def test_error_names_the_descriptor_and_what_it_is_called(handed: Handed) -> None:
    handed.sockets(2)

    text = error_of("3", "web:admin:a\nb")

    assert text.startswith(f"socket activation: descriptor {FIRST + 2} (called 'a\\nb') must be ")
    assert text.endswith(" it is unusable: Bad file descriptor")


def error_of(count: str, names: str | None = None) -> str:
    """Return the text of the error that there has to be; the variables have to be gone all the same."""
    environ = environment(count, names)
    with pytest.raises(ConfigError) as caught:
        receive(environ, PID)
    assert environ == {"HOME": "/"}
    return str(caught.value)


# --- in a process of its own ---

#: Puts the descriptors that its arguments name at 3 and after, then does what a server does, and has a child look.
_PROGRAM = """
import json, os, subprocess, sys
given = [os.dup(int(fd)) for fd in sys.argv[1:]]
for number, fd in enumerate(given):
    os.dup2(fd, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(given)), LISTEN_FDNAMES="a:b")
from nbdkitpy.server.activation import receive
received = receive(os.environ)
child = "import json, os; print(json.dumps([os.listdir('/proc/self/fd'), dict(os.environ)]))"
fds, environ = json.loads(subprocess.check_output([sys.executable, "-c", child], close_fds=False))
print(json.dumps([received, fds, [name for name in environ if name.startswith("LISTEN")]]))
"""


def test_A13_P2_descriptors_begin_at_3_and_children_get_neither_them_nor_the_variables() -> None:
    with listening_unix() as unix, socket.create_server(("127.0.0.1", 0)) as tcp:
        given = (unix.fileno(), tcp.fileno())
        output = subprocess.check_output([sys.executable, "-c", _PROGRAM, *map(str, given)], pass_fds=given, timeout=60)

    received, child_fds, child_variables = json.loads(output)
    assert received == [[3, 4], ["a", "b"]]
    assert child_variables == []
    # What the program was given to copy stays open in it. The child's own listing takes the lowest free number.
    assert {int(fd) for fd in child_fds} - {0, 1, 2, *given} <= {3}


# --- the command line ---


@pytest.mark.parametrize("option", ["-i", "-p", "--run", "-s", "-U"])
def test_option_that_says_where_clients_come_from_is_in_conflict(option: str) -> None:
    assert conflicts(["-f", option, "--verbose"]) == [f"cannot use socket activation with the {option} option"]


def test_each_option_in_conflict_is_named_once() -> None:
    lines = conflicts(["-U", "--unix", "-p", "-U"])

    assert lines == [f"cannot use socket activation with the {option} option" for option in ("-p", "-U")]


def test_other_options_are_not_in_conflict() -> None:
    others = ["-4", "-6", "-e", "-f", "-g", "-P", "-u", "-v", "--exit-with-parent", "--print-uri", "--vsock"]

    assert conflicts(others) == []
    assert not set(others) & set(CONFLICTS)

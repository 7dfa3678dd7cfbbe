"""Socket activation: by systemd-socket-activate, and by a test that plays systemd from one client to the next."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from nbdkitpy.protocol.constants import Option
from tests.environment import NBDKITPY
from tests.interop.harness import MIB, PATIENCE, Tool, make_distribution
from tests.nbdclient import NbdClient

pytestmark = pytest.mark.interop


def a_tcp_address() -> str:
    """Return one that nobody else uses: of the sixteen million of the loopback network, any will do."""
    a, b, c = random.SystemRandom().randbytes(3)
    return f"127.{a}.{b}.{1 + c % 254}:10809"


# --- systemd-socket-activate ---

#: What it says itself. It says it on the standard error of the server.
_CHATTER = re.compile(
    r"Listening on|Communication attempt|Execing|The number of fd names|Connection from|Spawned|Child"
)

#: What the server's Python has to know, also where it measures coverage.
_PASSED_ON = ("PYTHON", "COV")


class Activated:
    """systemd-socket-activate, which listens, and when the first client comes becomes ``nbdkitpy``.

    Args:
        tool: The program.
        listen: Where: addresses with ports, or paths.
        words: Of nbdkitpy's command line.
        options: Of systemd-socket-activate.
        through: A command that executes nbdkitpy, in place of executing it directly.
    """

    def __init__(
        self,
        tool: Tool,
        listen: Sequence[str | Path],
        *words: str | Path,
        options: Sequence[str] = (),
        through: Sequence[str] = (),
    ) -> None:
        variables = [f"--setenv={name}" for name in os.environ if name.startswith(_PASSED_ON)]
        where = [f"--listen={address}" for address in listen]
        self._process = subprocess.Popen(
            [tool.path, *variables, *options, *where, *through, *NBDKITPY, *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # lines are read one by one here, and what is left by communicate()
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.stdout = self._process.stdout
        self._said = b""
        for _ in where:
            self._said += self._process.stderr.readline()

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def wait(self, status: int) -> list[str]:
        """Wait until it ends by itself, with this exit status, and return what the server said on standard error."""
        _, said = self._process.communicate(timeout=PATIENCE)
        lines = (self._said + said).decode().splitlines()
        assert self._process.returncode == status, lines
        assert not any("Traceback" in line for line in lines), lines
        return [line for line in lines if not _CHATTER.match(line)]

    def end(self, status: int = 0) -> list[str]:
        """End it by SIGTERM; then as :meth:`wait`."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait(status)

    def kill(self) -> None:
        """Make sure that it has ended."""
        self._process.kill()  # nothing happens if it has
        with self._process:  # closes the pipes
            pass


class Activate(Protocol):
    """See :class:`Activated`."""

    def __call__(
        self,
        listen: Sequence[str | Path],
        *words: str | Path,
        options: Sequence[str] = (),
        through: Sequence[str] = (),
    ) -> Activated: ...


@pytest.fixture
def activate() -> Iterator[Activate]:
    tool = Tool("systemd-socket-activate", "systemd")
    with contextlib.ExitStack() as ends:

        def start(
            listen: Sequence[str | Path],
            *words: str | Path,
            options: Sequence[str] = (),
            through: Sequence[str] = (),
        ) -> Activated:
            activated = Activated(tool, listen, *words, options=options, through=through)
            ends.callback(activated.kill)
            return activated

        yield start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "activated.sock"


#: Makes a connection to an address and port, or a path, on which nothing has been said yet; the test's end closes it.
Connect = Callable[["str | Path"], NbdClient]


@pytest.fixture
def connect() -> Iterator[Connect]:
    with contextlib.ExitStack() as ends:

        def connect(address: str | Path) -> NbdClient:
            if isinstance(address, Path):
                sock = socket.socket(socket.AF_UNIX)
                ends.callback(sock.close)
                sock.connect(str(address))
                return NbdClient(sock)
            host, _, port = address.rpartition(":")
            sock = socket.create_connection((host, int(port)), timeout=PATIENCE)
            ends.callback(sock.close)
            return NbdClient(sock)

        yield connect


def test_clients_of_a_tcp_socket_are_served(activate: Activate, nbdinfo: Tool) -> None:
    address = a_tcp_address()
    server = activate([address], "memory", "1M")

    sizes = [nbdinfo("--size", f"nbd://{address}").strip() for _ in range(2)]

    assert sizes == [str(MIB)] * 2
    assert server.end() == []


def test_clients_of_a_unix_socket_are_served_and_the_socket_is_left(
    activate: Activate, nbdinfo: Tool, path: Path
) -> None:
    server = activate([path], "memory", "1M")

    sizes = [nbdinfo("--size", f"nbd+unix:///?socket={path}").strip() for _ in range(2)]

    assert sizes == [str(MIB)] * 2
    assert server.end() == []
    assert path.is_socket()  # the service manager made it, and will listen on it again


def test_clients_of_several_sockets_are_served_by_one_server(activate: Activate, connect: Connect, path: Path) -> None:
    addresses: list[str | Path] = [a_tcp_address(), path, a_tcp_address()]
    server = activate(addresses, "memory", "1M", options=["--fdname=one:two"])

    clients = [connect(address).negotiate() for address in addresses]
    for number, client in enumerate(clients):
        client.write(number * 512, bytes([number + 1]) * 512)
    read = {client.read(0, 1536) for client in clients}
    for client in clients:
        client.disconnect()

    assert read == {b"\1" * 512 + b"\2" * 512 + b"\3" * 512}
    assert server.end() == []


def test_server_stays_in_the_foreground_and_where_it_was_started(
    activate: Activate, connect: Connect, path: Path, tmp_path: Path
) -> None:
    pidfile = tmp_path / "pid"
    server = activate([path], "-P", pidfile, "memory", "1M")

    connect(path).negotiate().disconnect()

    assert server.is_running
    assert pidfile.read_text() == f"{server.pid}\n"
    assert os.readlink(f"/proc/{server.pid}/cwd") == os.getcwd()
    assert server.end() == []
    assert not pidfile.exists()


def test_idle_client_does_not_keep_the_server(activate: Activate, connect: Connect, path: Path) -> None:
    server = activate([path], "memory", "1M")
    idle, silent = connect(path).negotiate(), connect(path)
    silent.greet()

    assert server.end() == []

    assert [idle.at_end(), silent.at_end()] == [True, True]


#: A plugin that has a command look at what it inherits.
_LOOK = """
import subprocess
from nbdkitpy import Parameter, Plugin, hookimpl, parse_path

class Look(Plugin):
    name = "look"
    out = Parameter(parse_path, required=True)

    def get_ready(self):
        with open(self.out, "w") as out:
            subprocess.run(["/bin/sh", "-c", "ls -l /proc/self/fd; env"], stdout=out, close_fds=False, check=True)

    def open(self, export_name, readonly, client):
        raise OSError(5, "there is nothing here")

@hookimpl
def register_plugins(register):
    register(Look)
"""


def test_A13_P2_children_of_the_server_get_neither_the_sockets_nor_the_variables(
    activate: Activate, connect: Connect, path: Path, tmp_path: Path
) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    make_distribution(packages, "look", plugins=_LOOK)
    search = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    out = tmp_path / "out"
    server = activate([path, a_tcp_address()], "look", f"out={out}", options=[f"--setenv=PYTHONPATH={search}"])

    connect(path).greet()  # get_ready has been called

    assert server.end() == []
    seen = out.read_text()
    assert "/dev/null" in seen
    assert "PYTHONPATH=" in seen
    assert "socket:" not in seen
    assert "LISTEN_" not in seen


def test_A13_sockets_for_another_process_are_ignored(
    activate: Activate, connect: Connect, path: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.sock"
    words: list[str | Path] = ["--filter=exitlast", "-f", "--print-uri", "-U", own, "memory", "1M"]
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]  # the one that the variables are for; the server is its child
    server = activate([path], *words, through=shell)

    activated = connect(path)
    uri = server.stdout.readline().decode()  # comes when the server can be reached
    connect(own).negotiate().disconnect()

    assert str(own) in uri
    (line,) = server.wait(0)
    assert re.search(rf"LISTEN_PID is '{server.pid}', not that of this process, \d+: ignored", line)
    assert activated.at_end()  # without a byte


@pytest.mark.parametrize("count", ["0", "17", "-1", "1x", "", "99999999999", "１"])
def test_A13_wrong_count_ends_the_server(activate: Activate, connect: Connect, path: Path, count: str) -> None:
    server = activate([path], "memory", "1M", through=["env", f"LISTEN_FDS={count}"])

    client = connect(path)

    (line,) = server.wait(1)
    assert client.at_end()

    expected = f"socket activation: LISTEN_FDS must be a number from 1 to 16, not {count!r}"
    assert line == f"nbdkitpy: error: {expected}"


def test_A13_missing_count_ends_the_server(activate: Activate, connect: Connect, path: Path) -> None:
    server = activate([path], "memory", "1M", through=["env", "-u", "LISTEN_FDS"])

    connect(path)

    (line,) = server.wait(1)
    assert line == "nbdkitpy: error: socket activation: LISTEN_FDS must be a number from 1 to 16, but it is not set"


def by_shell(redirection: str) -> list[str]:
    return ["sh", "-c", f'exec {redirection}; exec "$@"', "sh"]


@pytest.mark.parametrize(
    ("through", "number", "what"),
    [
        (by_shell("3<&-"), 3, "unusable: Bad file descriptor"),
        (by_shell("3</etc/passwd"), 3, "a regular file"),
        (by_shell("3</dev/null"), 3, "a character device"),
        (by_shell("3</"), 3, "a directory"),
        (["env", "LISTEN_FDS=2"], 4, "unusable: Bad file descriptor"),
        (["env", "LISTEN_FDS=16"], 4, "unusable: Bad file descriptor"),
        (["sh", "-c", 'exec 3<&-; exec "$@" 3>/dev/null', "sh"], 3, "a character device"),
    ],
    ids=["closed", "file", "device", "directory", "one too few", "many too few", "device to write to"],
)
def test_A13_descriptor_that_is_no_socket_ends_the_server(
    activate: Activate, connect: Connect, path: Path, through: list[str], number: int, what: str
) -> None:
    server = activate([path], "memory", "1M", options=["--fdname=disk:spare"], through=through)

    connect(path)

    (line,) = server.wait(1)
    name = {3: "disk", 4: "spare"}[number]
    assert line == f"nbdkitpy: error: {wrong_descriptor(number, name)} it is {what}"


def wrong_descriptor(number: int, name: str) -> str:
    called = f" (called {name!r})" if name else ""
    return f"socket activation: descriptor {number}{called} must be a stream socket that listens on TCP, Unix or vsock;"


@pytest.mark.parametrize(
    ("option", "kind"), [("--datagram", socket.SOCK_DGRAM), ("--seqpacket", socket.SOCK_SEQPACKET)]
)
def test_A13_socket_of_another_kind_ends_the_server(
    activate: Activate, path: Path, option: str, kind: socket.SocketKind
) -> None:
    server = activate([path], "memory", "1M", options=[option])

    with socket.socket(socket.AF_UNIX, kind) as client:
        client.connect(str(path))
        client.send(b"hello")

    (line,) = server.wait(1)
    assert line == f"nbdkitpy: error: {wrong_descriptor(3, '')} it is a socket of type {kind.name}"


def test_A13_connection_in_place_of_a_listening_socket_ends_the_server(
    activate: Activate, connect: Connect, path: Path
) -> None:
    server = activate([path], "memory", "1M", options=["--accept"])

    assert connect(path).at_end()  # the server has ended, as nobody else has the connection

    (line,) = server.end(status=-signal.SIGTERM)
    what = "a stream socket that does not listen (a socket unit needs Accept=no)"
    assert line.endswith(f"{wrong_descriptor(3, '')} it is {what}")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-i", ["-i", "127.0.0.1"]),
        ("-p", ["-p", "0"]),
        ("--run", ["--run", "true"]),
        ("-s", ["-s"]),
        ("-U", ["-U", "-"]),
        ("-i", ["--ipaddr=127.0.0.1"]),
        ("-p", ["--port=10809"]),
        ("-s", ["--stdin"]),
        ("-U", ["--unix=/nowhere/socket"]),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_option_that_says_where_clients_come_from_is_refused(
    activate: Activate, connect: Connect, path: Path, option: str, words: list[str]
) -> None:
    server = activate([path], *words, "memory", "1M")

    connect(path)

    lines = server.wait(2)
    assert any(line.endswith(f"cannot use socket activation with the {option} option") for line in lines), lines


@pytest.mark.parametrize(
    "words", [["-4"], ["-6"], ["-e", "x"], ["-f"], ["--vsock"], ["--exit-with-parent"], ["--print-uri"]], ids=" ".join
)
def test_other_options_are_accepted(activate: Activate, connect: Connect, path: Path, words: list[str]) -> None:
    server = activate([path], *words, "memory", "1M")

    connect(path).negotiate().disconnect()

    assert server.end() == []


# --- a test that plays systemd ---

#: Puts the descriptors at 3 and after, sets the variables, and becomes the server.
_BECOME_SERVER = """
import fcntl, json, os, sys
fds, words = json.loads(sys.argv[1])
copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]
for fd in fds:
    os.close(fd)
for number, fd in enumerate(copies):
    os.dup2(fd, 3 + number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)))
os.execv(words[0], words)
"""


def start_server(sockets: Sequence[socket.socket], words: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start ``nbdkitpy`` with sockets that listen, as systemd does; its standard error is added to `log`."""
    fds = [sock.fileno() for sock in sockets]
    what = json.dumps([fds, [*NBDKITPY, *map(str, words)]])
    with log.open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BECOME_SERVER, what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=fds,
        )


def ended(server: subprocess.Popen[bytes]) -> int:
    """Wait until a server ends, and return its exit status; if it does not end, kill it."""
    try:
        return server.wait(PATIENCE)
    finally:
        server.kill()
        server.wait()


class Manager:
    """Plays systemd: listens, starts the server when a client is there, and again whenever it has ended.

    Args:
        sockets: They listen; whoever made them closes them.
        words: Of nbdkitpy's command line.
        log: For the standard error of all servers.
    """

    def __init__(self, sockets: Sequence[socket.socket], words: Sequence[str | Path], log: Path) -> None:
        self._sockets = sockets
        self._words = words
        self._log = log
        self._stop_read, self._stop_write = os.pipe()
        self._changed = threading.Condition()
        self._server: subprocess.Popen[bytes] | None = None
        self._statuses: list[int] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        for fd in (self._stop_read, *(sock.fileno() for sock in self._sockets)):
            poll.register(fd, select.POLLIN)
        while self._stop_read not in dict(poll.poll()):
            server = start_server(self._sockets, self._words, self._log)
            with self._changed:
                self._server = server
                self._changed.notify_all()
            status = server.wait()
            with self._changed:
                self._server = None
                self._statuses.append(status)
                self._changed.notify_all()
            if status != 0:  # it would only fail again
                return

    def wait_for_ends(self, count: int) -> None:
        """Wait until so many servers have ended since the beginning."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._statuses) >= count, PATIENCE), "the server does not end"

    def wait_until_idle(self) -> None:
        """Wait until no server is running; there must be no clients left."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._server is None, PATIENCE), "the server does not end"

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server that is running."""
        with self._changed:
            assert self._server is not None
            self._server.send_signal(number)

    @property
    def statuses(self) -> list[int]:
        """Exit statuses of the servers that have ended."""
        with self._changed:
            return list(self._statuses)

    def log(self) -> list[str]:
        """Return what all servers have said on standard error."""
        return self._log.read_text().splitlines()

    def finish(self) -> None:
        """Stop. A server that is still running is killed."""
        os.write(self._stop_write, b"\0")
        with self._changed:
            if self._server is not None:
                self._server.kill()
        self._thread.join(PATIENCE)
        for fd in (self._stop_read, self._stop_write):
            os.close(fd)


@pytest.fixture
def listening(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP and a Unix socket that listen, as those of a socket unit do whether there is a server or not."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        yield tcp, unix


#: Makes a new connection, by TCP and by Unix in turn.
Dial = Callable[[], NbdClient]


@pytest.fixture
def dial(listening: tuple[socket.socket, socket.socket], path: Path, connect: Connect) -> Dial:
    port = listening[0].getsockname()[1]
    turns: Iterator[str | Path] = itertools.cycle([f"127.0.0.1:{port}", path])
    return lambda: connect(next(turns))


class Manage(Protocol):
    """Play systemd with a server of these words."""

    def __call__(self, *words: str | Path) -> Manager: ...


@pytest.fixture
def manage(listening: tuple[socket.socket, socket.socket], tmp_path: Path) -> Iterator[Manage]:
    with contextlib.ExitStack() as ends:

        def start(*words: str | Path) -> Manager:
            manager = Manager(listening, words, tmp_path / "servers.log")
            ends.callback(manager.finish)
            return manager

        yield start


EXITLAST = ("--filter=exitlast", "memory", "1M")


def test_server_with_exitlast_ends_with_its_last_client_and_is_started_by_the_next(
    manage: Manage, dial: Dial, path: Path
) -> None:
    manager = manage(*EXITLAST)

    for round_ in range(4):
        first, second = dial().negotiate(), dial().negotiate()
        first.write(0, b"x" * 512)
        first.disconnect()
        assert second.read(0, 512) == b"x" * 512
        assert len(manager.statuses) == round_  # one client is left
        second.disconnect()
        manager.wait_for_ends(round_ + 1)
        assert path.is_socket()

    assert manager.statuses == [0] * 4
    assert manager.log() == []


def test_each_server_with_exitlast_is_a_new_one(manage: Manage, dial: Dial) -> None:
    manager = manage(*EXITLAST)

    for round_ in range(2):
        client = dial().negotiate()
        assert client.read(0, 512) == bytes(512)  # nothing of what the last one was given
        client.write(0, b"x" * 512)
        client.disconnect()
        manager.wait_for_ends(round_ + 1)


@pytest.mark.parametrize("clients", [1, 4])
def test_no_client_is_refused_while_servers_with_exitlast_come_and_go(manage: Manage, dial: Dial, clients: int) -> None:
    manager = manage(*EXITLAST)
    rounds = 25

    def come_and_go(number: int) -> int:
        served = 0
        for _ in range(rounds):
            client = dial().negotiate()
            client.write(number * 512, bytes([number]) * 512)
            served += client.read(number * 512, 512) == bytes([number]) * 512
            client.disconnect()
        return served

    with ThreadPoolExecutor(clients) as pool:
        served = list(pool.map(come_and_go, range(clients)))

    assert served == [rounds] * clients
    manager.wait_until_idle()
    assert set(manager.statuses) == {0}
    assert manager.log() == []


def greeted(client: NbdClient) -> None:
    client.greet()


def asked(client: NbdClient) -> None:
    client.greet()
    client.exports()
    client.go(option=Option.INFO)


@pytest.mark.parametrize("begin", [greeted, asked])
def test_client_that_is_in_its_handshake_when_the_last_one_leaves_is_served(
    manage: Manage, dial: Dial, begin: Callable[[NbdClient], None]
) -> None:
    manager = manage(*EXITLAST)
    last, late = dial().negotiate(), dial()
    begin(late)

    last.disconnect()  # returns when the server has closed the connection
    late.go()
    data = late.read(0, 512)
    late.disconnect()

    assert data == bytes(512)
    manager.wait_for_ends(1)
    assert manager.statuses == [0]
    assert manager.log() == []


def test_client_that_never_finishes_its_handshake_does_not_keep_a_server_with_exitlast(
    manage: Manage, dial: Dial
) -> None:
    manager = manage("--timeout=500ms", *EXITLAST)
    last, silent = dial().negotiate(), dial()
    silent.greet()

    last.disconnect()

    manager.wait_for_ends(1)
    assert silent.at_end()
    assert manager.statuses == [0]


def test_client_that_comes_when_a_server_is_told_to_end_is_served_by_the_next(manage: Manage, dial: Dial) -> None:
    manager = manage("memory", "1M")
    before = dial().negotiate()

    manager.signal(signal.SIGTERM)
    assert before.at_end()  # from here on the old one accepts nobody
    after = dial().negotiate()

    assert after.read(0, 512) == bytes(512)
    assert manager.statuses == [0]
    manager.signal(signal.SIGTERM)
    manager.wait_for_ends(2)
    assert manager.statuses == [0, 0]
    assert manager.log() == []


class Start(Protocol):
    """Start a server with sockets that listen, and words of its command line."""

    def __call__(self, sockets: Sequence[socket.socket], *words: str) -> subprocess.Popen[bytes]: ...


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """What servers say on standard error."""
    return tmp_path / "server.log"


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    """Start servers; at the end they end in order."""
    servers: list[subprocess.Popen[bytes]] = []

    def start(sockets: Sequence[socket.socket], *words: str) -> subprocess.Popen[bytes]:
        servers.append(start_server(sockets, words, log))
        return servers[-1]

    yield start
    for server in servers:
        server.send_signal(signal.SIGTERM)  # nothing happens if it has ended
    assert [ended(server) for server in servers] == [0] * len(servers)


def test_vsock_is_served_beside_the_others(
    listening: tuple[socket.socket, socket.socket], dial: Dial, start: Start, log: Path
) -> None:
    with socket.socket(socket.AF_VSOCK) as vsock:  # nobody can connect to it here, but it must not be in the way
        vsock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        vsock.listen()
        server = start([vsock, *listening], *EXITLAST)

    clients = [dial().negotiate() for _ in range(2)]
    for client in clients:
        client.disconnect()

    assert ended(server) == 0
    assert log.read_text() == ""


# --- IPv4 clients of a socket that is for IPv6 and IPv4 ---


@pytest.fixture
def dual() -> Iterator[socket.socket]:
    """A socket that takes IPv4 clients for IPv6 ones, as that of ``ListenStream=10809`` does."""
    with socket.create_server(("::ffff:127.0.0.1", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        yield sock


def ipv4_client(dual: socket.socket, source: str = "127.0.0.1") -> NbdClient:
    port = dual.getsockname()[1]
    return NbdClient(socket.create_connection(("127.0.0.1", port), PATIENCE, source_address=(source, 0)))


@pytest.mark.parametrize(
    "rules",
    [
        ["allow=anyipv4", "deny=all"],
        ["allow=127.0.0.1", "deny=all"],
        ["allow=127.0.0.0/8", "deny=all"],
        ["allow=loopback4", "deny=all"],
        ["deny=anyipv6"],
        ["deny=::/0"],
        ["deny=127.0.0.2"],
    ],
    ids=" ".join,
)
def test_A1_ipv4_client_of_an_ipv6_socket_is_permitted_by_rules_for_ipv4(
    dual: socket.socket, start: Start, log: Path, rules: list[str]
) -> None:
    start([dual], "--filter=ip", "memory", "1M", *rules)

    with ipv4_client(dual) as client:
        assert client.negotiate().read(0, 512) == bytes(512)
        client.disconnect()

    assert log.read_text() == ""


@pytest.mark.parametrize(
    "rules",
    [
        ["deny=anyipv4"],
        ["deny=127.0.0.1"],
        ["deny=127.0.0.0/8"],
        ["deny=0.0.0.0/0"],
        ["deny=loopback4"],
        ["allow=anyipv6", "deny=all"],
        ["allow=::/0", "deny=all"],
        ["allow=127.0.0.2", "deny=all"],
    ],
    ids=" ".join,
)
def test_A1_ipv4_client_of_an_ipv6_socket_is_refused_by_rules_for_ipv4(
    dual: socket.socket, start: Start, log: Path, rules: list[str]
) -> None:
    start([dual], "--filter=ip", "memory", "1M", *rules)

    with ipv4_client(dual) as client:
        assert client.at_end()  # without a byte

    (line,) = log.read_text().splitlines()
    assert "refused" in line
    assert "127.0.0.1" in line
    assert "::ffff" not in line


def test_A1_ipv4_clients_of_an_ipv6_socket_are_told_from_each_other(dual: socket.socket, start: Start) -> None:
    start([dual], "--filter=ip", "memory", "1M", "allow=127.0.0.4/30", "deny=all")

    ends = []
    for last in (1, 4, 7, 8):
        with ipv4_client(dual, f"127.0.0.{last}") as client:
            ends.append(client.at_end())

    assert ends == [True, False, False, True]

"""``--reload``: the sockets stay, and what serves is begun anew when its code changes; nobody is turned away."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy import log
from nbdkitpy.log import NOTICE
from nbdkitpy.protocol.constants import Command
from nbdkitpy.server import supervisor as module
from nbdkitpy.server.failures import Reported
from nbdkitpy.server.supervisor import Elsewhere, Link, Supervisor, signature
from tests.interop.harness import PATIENCE
from tests.nbdclient import NbdClient
from tests.pools import dial, ended, eventually, surroundings
from tests.serving import open_descriptors, unix_options

#: Reads as a letter, and then the process that serves.
DISK = """
import os, signal, sys, threading
from nbdkitpy import Handle, Parameter, Plugin, choice, parse_string
{imports}

class DiskHandle(Handle):
    def __init__(self, plugin):
        self.plugin = plugin
    def get_size(self):
        return 1 << 20
    def pread(self, count, offset):
        if offset == 8192:
            self.plugin.server.shutdown()
        if offset == 4096:
            print("pread", file=sys.stderr, flush=True)
            open("fifo").close()  # which waits for someone to open its other end
        return f"{{LETTER}}{{self.plugin.word}} {{os.getpid()}} ".encode().ljust(count)[:count]
    def close(self):
        print("close", file=sys.stderr, flush=True)

class Disk(Plugin):
    word = Parameter(parse_string, default="", live=True)
    bad = Parameter(choice("", "cleanup", "after_fork"), default="")
    def after_fork(self):
        if self.bad == "after_fork":
            raise OSError("the disk is on fire")
    def open(self, export_name, readonly, client):
        return DiskHandle(self)
    def cleanup(self):
        print("cleanup", file=sys.stderr, flush=True)
        if self.bad == "cleanup":
            threading.Event().wait()

LETTER = "{letter}"
"""

CHANGED = "nbdkitpy: reload: {} has changed\n"
SERVED = "nbdkitpy: reload: what is new is served\n"
WAITING = "nbdkitpy: reload: clients wait until a file is changed\n"


class Development:
    """The program with ``--reload``, and what it says on standard error, line by line."""

    def __init__(self, directory: Path, *words: str | Path) -> None:
        self.path = directory / "socket"
        command = [sys.executable, "-m", "nbdkitpy", "--reload", "-U", self.path, "--print-uri", *words]
        self.process: subprocess.Popen[str] = subprocess.Popen(
            command,
            env={**os.environ, **surroundings(directory)},
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._clients: list[NbdClient] = []
        self.uri = self.process.stdout.readline()  # printed when clients can connect

    def line(self) -> str:
        """Wait for the next line that it says."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def lines_to(self, last: str) -> list[str]:
        """Wait for a line, and return those before it."""
        return list(iter(self.line, last))

    def connected(self) -> NbdClient:
        """Return a client that has neither sent nor received anything."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        self._clients.append(NbdClient(sock))
        return self._clients[-1]

    def read(self, client: NbdClient | None = None) -> tuple[str, int]:
        """Return the letter that is read, and the process that serves it."""
        client = client or self.connected()
        if not client.size:
            client.negotiate()
        letter, pid = client.read(0, 64).split()
        return letter.decode(), int(pid)

    def wait(self) -> tuple[int, str]:
        """Wait until it ends of itself; return its status, and the rest of what it has said."""
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """End it, and wait."""
        self.process.send_signal(number)
        return self.wait()

    def kill(self) -> None:
        """See that it has ended, and its clients."""
        for client in self._clients:
            client.socket.close()
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


Develop = Callable[..., Development]


@pytest.fixture
def develop(tmp_path: Path) -> Iterator[Develop]:
    with contextlib.ExitStack() as ends:

        def begin(*words: str | Path) -> Development:
            development = Development(tmp_path, *words)
            ends.callback(development.kill)
            return development

        yield begin


def write(path: Path, letter: str = "a", imports: str = "") -> Path:
    path.write_text(DISK.format(letter=letter, imports=imports))
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return write(tmp_path / "disk.py")


# --- new code ---


def test_new_code_is_served_on_the_same_socket_when_the_file_has_changed(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    inode = server.path.stat().st_ino
    client = server.connected()
    before = server.read(client)

    write(disk, "b")

    assert server.line() == CHANGED.format(disk)
    assert [server.line() for _ in range(3)] == ["close\n", "cleanup\n", SERVED]
    assert client.at_end()
    after = server.read()
    assert (before[0], after[0]) == ("a", "b")
    assert len({before[1], after[1], server.process.pid}) == 3
    assert server.path.stat().st_ino == inode
    assert server.uri == f"nbd+unix://?socket={server.path}\n"


def test_clients_that_connect_while_nothing_can_be_served_wait_for_the_new_code(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    write(disk, "b" + '"')
    assert server.lines_to(WAITING)[-1].startswith(
        f"nbdkitpy: error: plugin ./disk.py cannot be loaded: {disk}:{len(DISK.splitlines())}: SyntaxError: "
    )

    clients = [server.connected() for _ in range(3)]
    write(disk, "c")

    assert [server.read(client)[0] for client in clients] == ["c", "c", "c"]
    assert server.lines_to(SERVED) == [CHANGED.format(disk)]


def test_file_beside_it_that_is_imported_late_is_watched(develop: Develop, tmp_path: Path) -> None:
    write(tmp_path / "disk.py", "?", "def __getattr__(name): pass\nfrom letters import LETTER as x")
    (tmp_path / "disk.py").write_text((tmp_path / "disk.py").read_text().replace('LETTER = "?"', "LETTER = x"))
    (tmp_path / "letters.py").write_text("LETTER = 'a'\n")
    server = develop("disk.py")
    assert server.read()[0] == "a"

    (tmp_path / "letters.py").unlink()  # which is no reason to begin anew
    (tmp_path / "letters.py").write_text("LETTER = 'b'\n")

    server.lines_to(SERVED)
    assert server.read()[0] == "b"


def test_filter_and_package_are_watched(develop: Develop, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    write(tmp_path / "package" / "disk.py")
    (tmp_path / "pass.py").write_text("from nbdkitpy import Filter\nclass Pass(Filter):\n    pass\n")
    server = develop("--filter=./pass.py:Pass", "package.disk:Disk")

    (tmp_path / "pass.py").write_text("from nbdkitpy import Filter\nclass Pass(Filter):\n    a = 1\n")
    assert server.lines_to(SERVED)[0] == CHANGED.format(tmp_path / "pass.py")
    write(tmp_path / "package" / "disk.py", "b")
    assert server.lines_to(SERVED)[0] == CHANGED.format(tmp_path / "package" / "disk.py")

    assert server.read()[0] == "b"


PYTHON_SCRIPT = """
import letters
API_VERSION = 2
def open(readonly): return None
def get_size(h): return 512
def pread(h, buf, offset, flags): buf[:] = b"{}".ljust(len(buf))
"""

SHELL_SCRIPT = """#!/bin/sh
case "$1" in
    get_size) echo 512 ;;
    pread) printf '%-512s' {} ;;
    *) exit 2 ;;
esac
"""


def test_script_of_the_shell_is_watched(develop: Develop, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(SHELL_SCRIPT.format("a"))
    script.chmod(0o755)
    server = develop("sh", "./script")

    script.chmod(0o644)
    script.write_text(SHELL_SCRIPT.format("bb"))
    assert "the path of a script that may be executed" in server.lines_to(WAITING)[-1]
    script.chmod(0o755)
    script.write_text(SHELL_SCRIPT.format("b"))

    server.lines_to(SERVED)
    assert server.connected().negotiate().read(0, 512).split() == [b"b"]


def test_script_of_python_that_has_gone_is_watched_until_it_is_there_again(develop: Develop, tmp_path: Path) -> None:
    script, helper = tmp_path / "script.py", tmp_path / "letters.py"
    script.write_text(PYTHON_SCRIPT.format("a"))
    helper.write_text("x = 1")
    server = develop("python", "script.py")

    script.unlink()
    helper.write_text("x = 22")
    assert "the path of a Python script (there is no such file)" in server.lines_to(WAITING)[-1]
    script.write_text(PYTHON_SCRIPT.format("b"))

    server.lines_to(SERVED)
    assert server.connected().negotiate().read(0, 512).split() == [b"b"]


def test_several_processes_serve_the_new_code(develop: Develop, disk: Path) -> None:
    disk.write_text(disk.read_text().replace("class Disk(Plugin):", "class Disk(Plugin):\n    multi_process = True"))
    disk.write_text(disk.read_text() + "Disk.thread_model = lambda self: 3\n")
    server = develop("--workers=2", "./disk.py")
    before = [server.read() for _ in range(2)]

    disk.write_text(disk.read_text().replace('LETTER = "a"', 'LETTER = "b"'))
    server.lines_to(SERVED)
    after = [server.read() for _ in range(2)]

    assert [letter for letter, _ in (*before, *after)] == ["a", "a", "b", "b"]
    assert len({pid for _, pid in (*before, *after)}) == 4
    assert server.end()[0] == 0


def test_nothing_is_left_of_what_has_been_replaced(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))

    pids = []
    for letter in "bc":
        pids.append(server.read()[1])
        write(disk, letter)
        server.lines_to(SERVED)

    assert len(os.listdir(f"/proc/{server.process.pid}/fd")) == descriptors
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# --- what goes wrong ---


def test_code_that_cannot_be_served_at_first_ends_the_program(tmp_path: Path, develop: Develop) -> None:
    (tmp_path / "disk.py").write_text("1 / 0")

    server = develop("./disk.py", "-P", tmp_path / "pid")

    place = f"{tmp_path}/disk.py:1"
    assert server.wait() == (
        1,
        f"nbdkitpy: error: plugin ./disk.py cannot be loaded: {place}: ZeroDivisionError: division by zero\n",
    )
    assert server.uri == ""
    assert not server.path.exists()
    assert not (tmp_path / "pid").exists()


def test_failure_of_a_step_after_loading_is_one_too(develop: Develop, disk: Path) -> None:
    status, said = develop("./disk.py", "bad=after_fork").wait()

    assert (status, said) == (1, "nbdkitpy: error: after_fork: the disk is on fire\ncleanup\n")


def test_code_that_is_not_there_to_be_watched_is_an_error(develop: Develop) -> None:
    status, said = develop("--filter=ip", "null").wait()

    assert status == 1
    assert said.startswith("nbdkitpy: error: --reload: there is no code to watch: ip, null have been installed, ")


def test_process_that_is_killed_is_followed_when_a_file_changes(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    _, pid = server.read()

    os.kill(pid, signal.SIGKILL)
    assert server.lines_to(WAITING) == ["nbdkitpy: error: the process that serves was killed by SIGKILL\n"]
    client = server.connected()
    write(disk, "b")

    assert server.read(client)[0] == "b"


def test_process_ends_when_the_supervisor_is_killed(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    _, pid = server.read()

    with ended(pid):
        server.process.kill()


def test_process_ends_when_the_supervisor_is_killed_while_it_loads(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    disk.write_text(
        "import os, sys, threading\nprint(os.getpid(), file=sys.stderr, flush=True)\nthreading.Event().wait()"
    )
    *_, pid = [server.line() for _ in range(3)]

    with ended(int(pid)):
        server.process.kill()


# --- the end ---


def test_end_is_in_order_and_leaves_nothing(develop: Develop, disk: Path, tmp_path: Path) -> None:
    server = develop("./disk.py", "-P", tmp_path / "pid")
    client = server.connected()
    _, pid = server.read(client)
    assert int((tmp_path / "pid").read_text()) == server.process.pid

    with ended(pid):
        assert server.end() == (0, "close\ncleanup\n")

    assert client.at_end()
    assert not server.path.exists()
    assert not (tmp_path / "pid").exists()


def test_interrupt_at_a_terminal_which_all_processes_get_ends_in_order(
    develop: Develop, disk: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo")
    server = develop("./disk.py")
    client = server.connected().negotiate()
    client.send(Command.READ, offset=4096, length=512)
    assert server.line() == "pread\n"

    os.killpg(server.process.pid, signal.SIGINT)
    eventually(lambda: not server.path.exists())
    (tmp_path / "fifo").write_text("")

    assert client.reply().error == 0
    assert server.wait() == (0, "close\ncleanup\n")


def test_end_is_in_order_while_nothing_can_be_served(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")
    disk.write_text("1 / 0")
    server.lines_to(WAITING)

    assert server.end() == (0, "")
    assert not server.path.exists()


def test_second_signal_cuts_short_what_does_not_return(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py", "bad=cleanup")

    server.process.send_signal(signal.SIGTERM)
    assert server.line() == "cleanup\n"
    status, said = server.end()

    assert (status, said) == (1, "nbdkitpy: error: cleanup: given up, as a second signal came\n")


def test_unit_that_ends_the_server_ends_all_of_it(develop: Develop, disk: Path) -> None:
    server = develop("./disk.py")

    server.connected().negotiate().read(8192, 1)

    assert server.wait() == (0, "close\ncleanup\n")
    assert not server.path.exists()


def test_command_of_run_goes_on_and_its_status_is_kept(develop: Develop, disk: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    server = develop("--run", f'echo "$uri" >&2; read x < {fifo}; exit 7', "./disk.py")
    uri = server.line()

    write(disk, "b")
    said = server.lines_to(SERVED)
    fifo.write_text("now\n")

    assert uri == server.uri
    assert said == [CHANGED.format(disk), "cleanup\n"]
    assert server.wait() == (7, "cleanup\n")


# --- beside it ---


def test_configuration_file_is_read_again_by_the_process_that_serves(
    develop: Develop, disk: Path, tmp_path: Path
) -> None:
    config = tmp_path / "x.toml"
    config.write_text('[plugin]\nname = "./disk.py"\nword = "x"\n')
    server = develop("--config", config)
    client = server.connected()
    assert server.read(client)[0] == "ax"

    config.write_text('[plugin]\nname = "./disk.py"\nword = "y"\n')
    server.process.send_signal(signal.SIGHUP)

    said = {server.line(), server.line()}
    assert said == {"nbdkitpy: reload: nothing to reload\n", "nbdkitpy: reload: disk: word has been set: y\n"}
    assert server.read(client)[0] == "ay"
    assert server.end() == (0, "close\ncleanup\n")


def test_messages_of_both_processes_are_in_the_log_and_debugged(develop: Develop, disk: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server = develop("--log", log, "--name", "dev", "-v", "./disk.py")
    assert server.line() == "nbdkitpy[dev]: debug: version 0.1.0, layers: disk\n"
    assert server.line() == "nbdkitpy[dev]: debug: thread model of the whole stack: serialize_all_requests\n"
    assert server.line().startswith(f"nbdkitpy[dev]: listening on {server.path} (nbd+unix:")

    disk.write_text("1 / 0")
    eventually(lambda: log.exists() and WAITING.partition(" ")[2] in log.read_text())
    write(disk, "b")
    eventually(lambda: SERVED.partition(" ")[2] in log.read_text())

    said = [line.partition("nbdkitpy[dev]: ")[2] for line in log.read_text().splitlines()]
    assert said[:1] + said[2:] == [
        line.strip().partition(" ")[2] for line in (CHANGED.format(disk), WAITING, CHANGED.format(disk), SERVED)
    ]
    assert said[1].startswith(f"error: plugin ./disk.py cannot be loaded: {disk}:1: ZeroDivisionError")
    assert "debug:   File" in server.end()[1]


def test_sockets_of_a_service_manager_are_kept_too(disk: Path, tmp_path: Path) -> None:
    start = (
        "import os, sys; os.dup2(int(sys.argv.pop(1)), 3);"
        " os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); from nbdkitpy.cli import main; main()"
    )
    path = tmp_path / "activated"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/manager")
        manager.settimeout(PATIENCE)
        listening.bind(str(path))
        listening.listen()
        command = [sys.executable, "-c", start, str(listening.fileno()), "--reload", str(disk)]
        environment = {**os.environ, **surroundings(tmp_path), "NOTIFY_SOCKET": f"{tmp_path}/manager"}
        with subprocess.Popen(
            command, pass_fds=[listening.fileno()], stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stderr is not None
            with dial(str(path)) as client:
                before = client.read(0, 1)
            assert process.stderr.readline() == "close\n"
            write(disk, "b")
            assert list(iter(process.stderr.readline, SERVED)) == [CHANGED.format(disk), "cleanup\n"]
            with dial(str(path)) as client:
                after = client.read(0, 1)
            process.terminate()
            process.communicate(timeout=PATIENCE)
        told = [manager.recv(100), manager.recv(100)]

    assert (before, after) == (b"a", b"b")
    assert told == [b"READY=1", b"STOPPING=1"]  # how many clients there are it does not know
    assert process.returncode == 0
    assert path.exists()


# --- the supervisor alone ---


class Serving:
    """Stands in for processes that serve: each does nothing, and what it would say is said by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[socket.socket] = []
        self.pids: list[int] = []
        self.failures: list[OSError] = []
        self._pair = socket.socketpair
        monkeypatch.setattr(socket, "socketpair", self.pair)
        monkeypatch.setattr(module, "fork", self.fork)

    def pair(self, *args: int) -> tuple[socket.socket, socket.socket]:
        ours, theirs = self._pair(*args)
        self.ends.append(theirs.dup())
        return ours, theirs

    def fork(self) -> int:
        if self.failures:
            self.ends.pop().close()
            raise self.failures.pop()
        Link(self.ends[-1], ()).ready()
        self.pids.append(os.posix_spawn("/bin/sleep", ["sleep", "600"], os.environ))
        return self.pids[-1]

    def reads(self, path: Path) -> None:
        Link(self.ends[-1], ()).reads(str(path))

    def leave(self) -> None:
        for end in self.ends:
            end.close()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Serving:
    return Serving(monkeypatch)


@pytest.fixture
def main(serving: Serving, tmp_path: Path) -> Iterator[Supervisor]:
    """A supervisor that has not begun anything."""
    supervisor = Supervisor(unix_options(f"{tmp_path}/s"), lambda link: 0)
    supervisor.bind()
    yield supervisor
    serving.leave()
    supervisor.close()


def no_workers(serve: object) -> int:
    raise AssertionError("there are none")


NO_ROOM = "Resource temporarily unavailable"


def test_process_that_the_system_has_no_room_for_leaves_nothing_behind(serving: Serving, tmp_path: Path) -> None:
    supervisor = Supervisor(unix_options(f"{tmp_path}/s"), lambda link: 0)
    before = open_descriptors()
    serving.failures.append(OSError(errno.EAGAIN, NO_ROOM))

    with pytest.raises(BlockingIOError):
        supervisor.start_workers(no_workers)

    assert open_descriptors() == before


def test_it_is_tried_again_to_begin_what_serves(
    main: Supervisor, serving: Serving, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(NOTICE, "nbdkitpy")
    file = tmp_path / "disk.py"
    file.write_text("a")
    main.start_workers(no_workers)
    serving.reads(file)
    serving.failures.append(OSError(errno.EAGAIN, NO_ROOM))

    file.write_text("bb")
    while len(caplog.messages) < 1:
        main._wait()
    serving.leave()
    while len(serving.pids) < 2:
        main._wait()

    assert caplog.messages == [
        f"reload: {file} has changed",
        f"cannot begin the process that serves: {NO_ROOM}",
        f"reload: {file} has changed",
    ]


def test_file_is_not_read_as_long_as_it_is_being_written(main: Supervisor, serving: Serving, tmp_path: Path) -> None:
    file, gone = tmp_path / "disk.py", tmp_path / "gone.py"
    file.write_text("")
    main.start_workers(no_workers)
    for each in (file, gone):
        serving.reads(each)
        main._wait()

    looks = [main._changed()]
    for text in ("a", "ab", "abc"):
        file.write_text(text)
        looks.append(main._changed())

    assert looks == [None] * 4
    assert main._changed() == os.fsencode(file)
    file.unlink()
    assert main._changed() is None
    gone.touch()
    assert [main._changed(), main._changed()] == [None, os.fsencode(gone)]


def test_process_that_does_not_end_is_killed(
    main: Supervisor, serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("GRACE", "_MARGIN"):
        monkeypatch.setattr(module, name, 0.0)
    main.start_workers(no_workers)

    main.abort()

    assert not main.serve(Elsewhere(main))
    assert caplog.messages == ["the process that serves does not end, and is killed"]


def test_process_that_is_not_ready_when_the_end_comes_is_ended_by_a_signal(
    main: Supervisor, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Link, "ready", lambda link: link.reads("/a/file"))  # which is not what is waited for
    main.shutdown()

    main.start_workers(no_workers)
    serving.leave()

    assert main.serve(Elsewhere(main))


def test_process_that_fails_in_an_unforeseen_way_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def live(link: Link) -> int:
        raise GeneratorExit("of all things")

    supervisor = Supervisor(unix_options(f"{tmp_path}/s"), live)
    supervisor.bind()
    with log.setup("stderr"), pytest.raises(Reported):
        supervisor.start_workers(no_workers)
    supervisor.close()

    assert capfd.readouterr().err == "nbdkitpy: error: the process that serves: GeneratorExit: of all things\n"


def test_ends_of_children_can_be_told_even_if_who_started_us_ignores_them(main: Supervisor, serving: Serving) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        main.start_workers(no_workers)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_link_to_a_supervisor_that_has_gone_raises_nothing() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()

    with theirs:
        link = Link(theirs, ())
        link.ready()
        link.reads("/a/file")


def test_signature_differs_when_a_file_does(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert signature(str(file)) == signature("/a\0b") == ()
    file.write_text("a")
    first = signature(str(file))

    assert len(first) == 3
    assert signature(str(file)) == first
    os.utime(file, ns=(0, 1))
    assert signature(str(file)) != first

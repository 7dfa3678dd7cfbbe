"""Going into the background: what the caller sees of it, and what the server keeps of the caller."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

import pytest

from nbdkitpy import ConfigError, log
from nbdkitpy.server import background as module
from nbdkitpy.server.background import Background, redirect_to_nothing
from nbdkitpy.server.forking import SIGNALS
from tests.environment import NBDKITPY

ROOT = Path(__file__).parent.parent.parent

NOBODY = pwd.getpwnam("nobody")

#: Seconds after which a process is taken to hang.
PATIENCE = 60

#: Launches a server in the background, on the socket "s" of the directory that it is in, with the pidfile "pid".
PROGRAM = """
import logging, os, signal, sys, threading
sys.path.insert(0, {root!r})
from nbdkitpy import ConfigError, Plugin, log
from nbdkitpy.server.launch import launch
from nbdkitpy.server.service import Server
from nbdkitpy.stack import Stack
from tests.serving import unix_options

directory = os.getcwd()

class Disk(Plugin):
    name = "disk"
    def open(self, export_name, readonly, client):
        raise OSError("nobody opens it")
{methods}

with log.setup({sink!r}, verbose={verbose!r}):
    server = Server(unix_options(directory + "/s"))
    stack = Stack(Disk(), [], server)
    stack.load()
    raise SystemExit(launch(server, stack, background=True, pidfile=directory + "/pid", **{options!r}))
"""


class Caller:
    """Starts servers in `directory`, as a user would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pidfile = directory / "pid"
        self.socket = directory / "s"

    def program(
        self, methods: str = "", *, sink: str = "stderr", verbose: bool = False, **options: object
    ) -> list[str]:
        """Return the command that starts a server whose plugin has `methods`; `options` are those of launch."""
        indented = "\n".join(f"    {line}" for line in methods.splitlines())
        code = PROGRAM.format(root=str(ROOT), methods=indented, sink=sink, verbose=verbose, options=options)
        return [sys.executable, "-c", code]

    def __call__(
        self,
        methods: str = "",
        *,
        sink: str = "stderr",
        verbose: bool = False,
        pass_fds: tuple[int, ...] = (),
        **options: object,
    ) -> subprocess.CompletedProcess[str]:
        """Start a server, and return what its launcher has said when that has exited."""
        # Both pipes are read to the end: the server may not keep them open.
        return subprocess.run(
            self.program(methods, sink=sink, verbose=verbose, **options),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            cwd=self.directory,
            pass_fds=pass_fds,
        )

    @property
    def pid(self) -> int:
        """The server's process number."""
        return int(self.pidfile.read_text())

    def stop(self) -> None:
        """End the server in order, if there is one."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid = self.pid
            with ended(pid):
                os.kill(pid, signal.SIGTERM)

    def left(self) -> list[str]:
        """Return the names of the files that are there."""
        return sorted(path.name for path in self.directory.iterdir())


@contextlib.contextmanager
def ended(pid: int) -> Iterator[None]:
    """Wait at the end until a process, which need not be a child of ours, has ended."""
    fd = os.pidfd_open(pid)
    try:
        yield
        assert select.select([fd], [], [], PATIENCE)[0], "the server does not end"
    finally:
        os.close(fd)


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    caller = Caller(tmp_path)
    yield caller
    caller.stop()


@pytest.fixture
def nobodys() -> Iterator[Caller]:
    """Starts servers in a directory of the user nobody."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies where only root may go
        os.chown(name, NOBODY.pw_uid, NOBODY.pw_gid)
        caller = Caller(Path(name))
        yield caller
        caller.stop()


def connect(path: Path) -> bytes:
    """Connect to the server, and return how its greeting begins."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        return sock.recv(8)


# --- what the caller sees ---


def test_P8_launcher_exits_when_clients_can_connect(caller: Caller) -> None:
    done = caller()

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert connect(caller.socket) == b"NBDMAGIC"
    assert caller.left() == ["pid", "s"]


def test_sigterm_ends_the_server_and_leaves_nothing(caller: Caller) -> None:
    caller()

    caller.stop()

    assert caller.left() == []


def test_launcher_says_where_the_server_is(caller: Caller) -> None:
    done = caller(print_uri=True, announce=True)

    uri = f"nbd+unix://?socket={caller.socket}"
    assert done.stdout.splitlines()[0] == uri
    assert done.stderr == f"nbdkitpy: listening on {caller.socket} ({uri})\n"


@pytest.mark.parametrize(
    ("methods", "line"),
    [
        ("def get_ready(self): raise ConfigError('disk: no such disk')", "disk: no such disk"),
        ("def after_fork(self): raise ConfigError('disk: no such disk')", "disk: no such disk"),
        ("def after_fork(self): raise OSError(13, 'Permission denied', '/x')", "after_fork: /x: Permission denied"),
        ("def after_fork(self): raise ValueError('a\\nb')", "after_fork: ValueError: a\\nb"),
        ("def after_fork(self): sys.exit(0)", "after_fork: SystemExit: 0"),
        ("def after_fork(self): raise ConfigError('\\udcff ü')", "\\udcff ü"),
        (
            "def after_fork(self): os.kill(os.getpid(), signal.SIGKILL)",
            "the server ended before it was ready: killed by signal 9 (Killed)",
        ),
        ("def after_fork(self): os._exit(0)", "the server ended before it was ready: exit status 0"),
        ("def after_fork(self): os._exit(3)", "the server ended before it was ready: exit status 3"),
        (
            "def get_ready(self): threading.Thread(target=threading.Event().wait, name='t', daemon=True).start()",
            "cannot go into the background: a back end has started threads (t) before after_fork; use -f",
        ),
    ],
)
def test_failure_of_any_step_is_told_in_one_line_and_leaves_no_socket(caller: Caller, methods: str, line: str) -> None:
    done = caller(methods)

    assert (done.returncode, done.stderr) == (1, f"nbdkitpy: error: {line}\n")
    assert not caller.socket.exists()


def test_failure_leaves_no_pidfile(caller: Caller) -> None:
    assert caller("def after_fork(self): raise ConfigError('no')").returncode == 1

    assert caller.left() == []


def test_pidfile_that_cannot_be_written_is_a_failure(caller: Caller) -> None:
    caller.pidfile.mkdir()

    done = caller()

    assert done.returncode == 1
    assert "--pidfile" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert caller.left() == ["pid"]
    caller.pidfile.rmdir()


def test_failure_with_debugging_is_told_once_and_with_its_traceback(caller: Caller) -> None:
    done = caller("def after_fork(self): raise ValueError('a')", verbose=True)

    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert len([line for line in lines if "error: after_fork: ValueError: a" in line]) == 1
    assert any("Traceback" in line for line in lines)
    assert not any("ended before it was ready" in line for line in lines)


def test_messages_of_the_start_reach_the_terminal(caller: Caller) -> None:
    done = caller("def after_fork(self): logging.getLogger('nbdkitpy.disk').warning('it is %s', 'slow')")

    assert (done.returncode, done.stderr) == (0, "nbdkitpy: disk: warning: it is slow\n")


def test_message_of_the_start_is_in_the_log_once(caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / "log"

    done = caller("def after_fork(self): raise ConfigError('no disk')", sink=str(path))

    assert done.stderr == "nbdkitpy: error: no disk\n"
    assert len(path.read_text().splitlines()) == 1


def test_server_logs_by_itself_after_the_start(caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / "log"
    caller("def cleanup(self): logging.getLogger('nbdkitpy.disk').warning('gone')", sink=str(path))

    caller.stop()

    assert path.read_text().endswith("nbdkitpy: disk: warning: gone\n")


def test_launcher_that_cannot_say_it_leaves_no_server(caller: Caller) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        process = subprocess.run(
            caller.program(print_uri=True),
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
            check=False,
            cwd=caller.directory,
        )
    finally:
        os.close(writing)

    assert process.returncode == 1
    assert "nbdkitpy: error: cannot say that the server is ready: " in process.stderr
    assert caller.left() == []


# --- failures of each kind, by the command line ---


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


@pytest.mark.parametrize("mode", [["-f"], []], ids=["foreground", "background"])
@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-i", "127.0.0.1", "-p", "PORT", "memory", "1M"], "127.0.0.1 port PORT: Address already in use"),
        (["-U", "/DIRECTORY/file", "memory", "1M"], "/DIRECTORY/file: Address already in use"),
        (["-U", "/DIRECTORY/" + "x" * 108, "memory", "1M"], "unix: the path must have at most 107 bytes"),
        (["-U", "/DIRECTORY/s", "file", "/DIRECTORY/none"], "No such file or directory"),
        (["-U", "/DIRECTORY/s", "memory", "1M", "key=1"], "key"),
        (["-U", "/DIRECTORY/s", "memory", "size=much"], "much"),
        (["-U", "/DIRECTORY/s", "no-such-plugin"], "no-such-plugin"),
        (["-U", "/DIRECTORY/s", "-u", "no-such-user", "memory", "1M"], "'no-such-user'"),
        (["-U", "/DIRECTORY/s", "--selinux-label", "x", "memory", "1M"], "--selinux-label: "),
        (["-U", "/DIRECTORY/s", "-P", "/DIRECTORY/none/pid", "memory", "1M"], "--pidfile: cannot write"),
        (["-U", "/DIRECTORY/s", "-P", "/DIRECTORY/link", "memory", "1M"], "it is a symbolic link"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_A11_A12_P3_S4_start_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, taken: socket.socket, mode: list[str], words: list[str], text: str
) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("file")
    known = {"/DIRECTORY": str(tmp_path), "PORT": str(taken.getsockname()[1])}
    for name, value in known.items():
        words, text = [word.replace(name, value) for word in words], text.replace(name, value)
    if "-P" not in words:
        words = ["-P", str(tmp_path / "pid"), *words]

    done = subprocess.run(
        [*NBDKITPY, *mode, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=ROOT,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "precious"


# --- signals while it starts ---


HANGING = """
def after_fork(self):
    # Each of the opens waits for the other side.
    open(directory + "/started", "w").close()
    open(directory + "/go").close()
"""


@pytest.fixture
def hanging(caller: Caller) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose server waits in after_fork until the FIFO "go" is opened."""
    for name in ("started", "go"):
        os.mkfifo(caller.directory / name)
    process = subprocess.Popen(
        caller.program(HANGING), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, cwd=caller.directory
    )
    with process, (caller.directory / "started").open():
        yield process


def test_S4_second_signal_to_the_launcher_ends_a_server_that_hangs(
    caller: Caller, hanging: subprocess.Popen[str]
) -> None:
    server = caller.pid
    with ended(server):
        # The second one only after the first has been passed on, as two of the same kind may become one.
        hanging.send_signal(signal.SIGTERM)
        os.kill(server, signal.SIGINT)
        _, stderr = hanging.communicate(timeout=PATIENCE)

    assert stderr == "nbdkitpy: error: after_fork: given up, as a second signal came\n"
    assert hanging.returncode == 1
    assert caller.left() == ["go", "started"]


def test_one_signal_to_the_launcher_ends_the_server_when_it_has_started(
    caller: Caller, hanging: subprocess.Popen[str]
) -> None:
    with ended(caller.pid):
        hanging.send_signal(signal.SIGTERM)
        (caller.directory / "go").open("w").close()
        hanging.communicate(timeout=PATIENCE)
        if hanging.returncode == 0:  # it had not been passed on yet
            caller.stop()

    assert caller.left() == ["go", "started"]


def test_server_whose_launcher_was_killed_ends(caller: Caller, hanging: subprocess.Popen[str]) -> None:
    with ended(caller.pid):
        hanging.kill()
        hanging.wait(PATIENCE)
        (caller.directory / "go").open("w").close()

    assert caller.left() == ["go", "started"]


# --- what the server keeps ---


def descriptors(pid: int) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def test_P8_server_has_left_the_callers_session_and_directory(caller: Caller) -> None:
    caller()

    assert os.getsid(caller.pid) == caller.pid
    assert os.readlink(f"/proc/{caller.pid}/cwd") == "/"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def test_P2_P8_server_keeps_no_descriptor_of_the_caller(caller: Caller, pipe: tuple[int, int]) -> None:
    reading, writing = pipe

    caller(pass_fds=(writing,))
    os.close(writing)

    assert os.read(reading, 1) == b""  # the end: nobody else has it
    open_ones = descriptors(caller.pid)
    assert [open_ones[fd] for fd in (0, 1, 2)] == ["/dev/null"] * 3
    # Of its own it has the listening socket, and the pipe that wakes it up.
    assert sorted(name.partition(":")[0] for fd, name in open_ones.items() if fd > 2) == ["pipe", "pipe", "socket"]


def test_descriptor_that_a_back_end_takes_over_is_kept(caller: Caller, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    methods = f"""
def get_ready(self):
    os.set_inheritable({writing}, False)
def cleanup(self):
    os.write({writing}, b"still there")
"""

    caller(methods, pass_fds=(writing,))
    os.close(writing)
    caller.stop()

    assert os.read(reading, 100) == b"still there"


def test_standard_error_is_kept_for_debugging(caller: Caller, tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        subprocess.run(
            caller.program("def cleanup(self): logging.getLogger('nbdkitpy.disk').debug('gone')", verbose=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            timeout=PATIENCE,
            check=True,
            cwd=tmp_path,
        )
        caller_says = descriptors(caller.pid)
        caller.stop()

    assert caller_says[2] == str(tmp_path / "stderr")
    assert caller_says[1] == "/dev/null"
    assert "nbdkitpy: disk: debug: gone" in (tmp_path / "stderr").read_text()


def test_P1_P8_server_of_another_user_serves_and_leaves_nothing(nobodys: Caller) -> None:
    done = nobodys(user="nobody")

    assert done.returncode == 0, done
    status = Path(f"/proc/{nobodys.pid}/status").read_text()
    assert f"\nUid:\t{NOBODY.pw_uid}\t{NOBODY.pw_uid}\t{NOBODY.pw_uid}\t" in status
    assert connect(nobodys.socket) == b"NBDMAGIC"
    nobodys.stop()
    assert nobodys.left() == []


def test_kernel_closes_the_callers_descriptor_and_gives_nothing_back(nobodys: Caller, pipe: tuple[int, int]) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (Debian's package strace)")
    trace = nobodys.directory / "trace"
    calls = "setsid,chdir,close,setgroups,setresgid,setresuid,setuid,setgid,prctl,listen,accept,accept4"
    words = [strace, "-f", "--seccomp-bpf", "-qq", "-o", str(trace), "-e", f"trace={calls}"]
    words += nobodys.program(print_uri=True, user="nobody")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=nobodys.directory, pass_fds=(pipe[1],))
    with process:
        assert process.stdout is not None
        process.stdout.readline()  # said when it is ready
        connect(nobodys.socket)
        server = str(nobodys.pid)
        nobodys.stop()
        assert process.wait(PATIENCE) == 0

    made = [line.split(maxsplit=1) for line in trace.read_text().splitlines()]
    of_server = [call for pid, call in made if pid == server]
    of_launcher = [call for pid, call in made if pid == made[0][0]]
    in_order(
        of_launcher,
        "listen(",
        "prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) = 0",
        f"setgroups(1, [{NOBODY.pw_gid}]) = 0",
        f"setresgid({NOBODY.pw_gid}, {NOBODY.pw_gid}, {NOBODY.pw_gid}) = 0",
        f"setresuid({NOBODY.pw_uid}, {NOBODY.pw_uid}, {NOBODY.pw_uid}) = 0",
        "setuid(0) = -1 EPERM",
        "setgid(0) = -1 EPERM",
    )
    in_order(of_server, "setsid() = ", 'chdir("/") = 0', f"close({pipe[1]}) = 0", "accept")


def in_order(calls: list[str], *beginnings: str) -> None:
    """Check that there are calls that begin like this, in this order."""
    left = iter([" ".join(call.split()) for call in calls])
    for beginning in beginnings:
        assert any(call.startswith(beginning) for call in left), (beginning, calls)


# --- the launcher, in this process ---


class Launcher:
    """The launcher's side, of a process that says on the pipe what the test writes, and does nothing else."""

    def __init__(self, pid: int, pipe: int, said: IO[str]) -> None:
        self.pid = pid
        self.pipe = pipe
        self.said = said
        self.events: list[str] = []

    def run(self, *lines: str, tell: Callable[[], None] | None = None) -> int:
        self.said.writelines(lines)
        self.said.close()
        note = self.events.append
        return module._launch(self.pipe, self.pid, tell or (lambda: note("told")), lambda: note("cleaned up"))


@pytest.fixture
def launcher() -> Iterator[Callable[[str], Launcher]]:
    numbers = list(SIGNALS)
    before = [signal.getsignal(number) for number in numbers]

    def start(command: str) -> Launcher:
        receiving, sending = os.pipe()
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], {})
        return Launcher(pid, receiving, open(sending, "w"))

    yield start
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What has been logged so far, as lines on standard error."""
    stderr = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        setup = log.setup()
        setup.__enter__()
    yield lambda: stderr.getvalue().splitlines()
    setup.__exit__(None, None, None)


def test_launcher_is_done_when_the_server_is_ready(launcher: Callable[[str], Launcher]) -> None:
    launched = launcher("exit 0")

    assert launched.run("ready\n") == 0
    assert launched.events == ["told"]


def test_launcher_that_is_told_why_says_no_more(
    launcher: Callable[[str], Launcher], messages: Callable[[], list[str]]
) -> None:
    launched = launcher("exit 1")
    record = json.dumps([logging.ERROR, "nbdkitpy.disk", "100 %s", True])

    assert launched.run(f"{record}\n", "failed\n") == 1
    assert launched.events == ["cleaned up"]
    assert messages() == ["nbdkitpy: disk: error: 100 %s"]


@pytest.mark.parametrize("line", ["[40, ", "[]\n", "nonsense\n", "read"])
def test_launcher_is_not_confused_by_a_line_that_was_cut_off(
    launcher: Callable[[str], Launcher], messages: Callable[[], list[str]], line: str
) -> None:
    assert launcher("kill -SEGV $$").run(line) == 1
    assert messages() == [
        "nbdkitpy: error: the server ended before it was ready: killed by signal 11 (Segmentation fault)"
    ]


def test_launcher_that_cannot_tell_ends_the_server(
    launcher: Callable[[str], Launcher], messages: Callable[[], list[str]]
) -> None:
    def tell() -> NoReturn:
        raise BrokenPipeError(32, "Broken pipe")

    launched = launcher("while :; do :; done")

    assert launched.run("ready\n", tell=tell) == 1
    with pytest.raises(ChildProcessError):
        os.waitpid(launched.pid, 0)
    assert messages() == ["nbdkitpy: error: cannot say that the server is ready: [Errno 32] Broken pipe"]


def test_launcher_passes_signals_on(
    launcher: Callable[[str], Launcher], messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = launcher("while :; do :; done")
    becomes_ready = module._becomes_ready

    def interrupted(pipe: int, pid: int) -> bool:
        signal.raise_signal(signal.SIGHUP)
        ready = becomes_ready(pipe, pid)
        signal.raise_signal(signal.SIGTERM)  # there is no such process any more
        return ready

    monkeypatch.setattr(module, "_becomes_ready", interrupted)

    assert launched.run() == 1
    assert messages() == ["nbdkitpy: error: the server ended before it was ready: killed by signal 1 (Hangup)"]


# --- the server's side, in this process ---


class Exited(BaseException):
    """The process would have exited."""


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Notes what would be done to this process."""
    events: list[str] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    monkeypatch.setattr(os, "setsid", lambda: events.append("setsid"))
    monkeypatch.setattr(os, "chdir", lambda path: events.append(f"chdir {path}"))
    monkeypatch.setattr(module, "redirect_to_nothing", lambda fds: events.append(f"redirect {fds}"))
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread()])
    yield events
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def enter(place: Background) -> None:
    place.enter(lambda: None, lambda: None)


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors of pipes that have been made; of the ends to read from there is a second one in front."""
    made: list[int] = []
    make = os.pipe

    def noting() -> tuple[int, int]:
        receiving, sending = make()
        made.extend((os.dup(receiving), receiving, sending))
        return receiving, sending

    monkeypatch.setattr(os, "pipe", noting)
    return made


@pytest.mark.parametrize(("verbose", "redirected", "relayed"), [(False, (0, 1, 2), True), (True, (0, 1), False)])
def test_new_process_gives_up_what_it_has_of_the_caller(
    system: list[str],
    pipes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    messages: Callable[[], list[str]],
    verbose: bool,
    redirected: tuple[int, ...],
    relayed: bool,
) -> None:
    logger = logging.getLogger("nbdkitpy")
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    foreign, taken = os.dup(0), os.dup(0)
    for fd in (foreign, taken):
        os.set_inheritable(fd, True)
    place = Background()
    os.set_inheritable(taken, False)
    monkeypatch.setattr(os, "fork", lambda: 0)

    enter(place)
    logger.error("%s", "it begins", extra=log.TERMINAL)
    if relayed:
        logger.error("%d", "no number")
    place.ready()
    place.failed()
    logger.error("it goes on")

    assert system == ["setsid", "chdir /", f"redirect {redirected}"]
    os.close(taken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(foreign)
    with open(pipes[0]) as said:
        lines = said.read().splitlines()
    assert lines[-1] == "ready"
    assert [json.loads(line) for line in lines[:-1]] == relayed * [
        [logging.ERROR, "nbdkitpy", "it begins", True],
        [logging.ERROR, "nbdkitpy", "%d (the rest of this message cannot be shown: TypeError)", False],
    ]
    assert len(messages()) == (1 if relayed else 2)


@pytest.mark.parametrize("is_ready", [True, False])
def test_launcher_that_is_gone_is_an_error_for_who_is_ready(
    system: list[str], pipes: list[int], monkeypatch: pytest.MonkeyPatch, is_ready: bool
) -> None:
    monkeypatch.setattr(os, "fork", lambda: 0)
    handlers = logging.getLogger("nbdkitpy").handlers
    place = Background()
    enter(place)
    os.close(pipes[0])

    logging.getLogger("nbdkitpy").error("nobody reads it")
    with pytest.raises(BrokenPipeError) if is_ready else contextlib.nullcontext():
        place.ready() if is_ready else place.failed()

    assert logging.getLogger("nbdkitpy").handlers == handlers


def test_old_process_exits_with_the_launchers_status(system: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> NoReturn:
        raise Exited(status)

    def launch(pipe: int, pid: int, *callbacks: object) -> int:
        os.close(pipe)
        return pid

    monkeypatch.setattr(os, "fork", lambda: 4711)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(module, "_launch", launch)

    with pytest.raises(Exited, match="4711"):
        enter(Background())


def test_process_that_is_not_to_be_had_leaves_all_as_it_was(
    system: list[str], pipes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> NoReturn:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    with pytest.raises(OSError, match="temporarily unavailable"):
        enter(Background())

    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    assert system == []
    for fd in pipes:
        os.close(fd)


def test_P8_threads_prevent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = threading.Thread(name="t")
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.main_thread(), other])

    with pytest.raises(ConfigError, match=r"a back end has started threads \(t\) before after_fork; use -f"):
        enter(Background())


def test_nothing_comes_from_nowhere_and_all_goes_there() -> None:
    fd = os.dup(0)

    redirect_to_nothing([fd])

    assert os.write(fd, b"data") == 4
    assert os.read(fd, 1) == b""
    os.close(fd)

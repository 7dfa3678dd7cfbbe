"""The order of a server's life, what is left after a failure at any step, signals, the pidfile."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle, Plugin, log
from nbdkitpy.server import launch as module
from nbdkitpy.server.launch import Pidfile, exit_with_parent, launch, report
from nbdkitpy.stack import Stack


class FakeServer:
    """Notes what is asked of it; serves until it is shut down, or as `during` says."""

    uri = "nbd+unix://?socket=/run/x y"
    listening = ("127.0.0.1:10809", "[::1]:10809")
    port: int | None = 10809
    unix_path: str | None = None

    def __init__(self, events: list[str], during: Callable[[], object] | None = None) -> None:
        self.events = events
        self.during = during
        self.stopped = threading.Event()
        self.all_ended = True
        self.fails: dict[str, Exception] = {}

    def note(self, event: str) -> None:
        self.events.append(event)
        if event in self.fails:
            raise self.fails[event]

    def bind(self) -> None:
        self.note("bind")

    def serve(self, stack: Stack) -> bool:
        self.note("serve")
        if self.during is not None:
            self.during()
        assert self.stopped.wait(30)
        return self.all_ended

    def close(self) -> None:
        self.note("close")

    def shutdown(self) -> None:
        self.note("shutdown")
        self.stopped.set()

    def abort(self) -> None:
        self.note("abort")
        self.stopped.set()


def noting(name: str) -> Callable[[Any], None]:
    return lambda unit: unit.server.note(f"{unit.name}.{name}")


class Disk(Plugin):
    name = "disk"
    load, get_ready, after_fork = noting("load"), noting("get_ready"), noting("after_fork")
    config_complete, cleanup, unload = noting("config_complete"), noting("cleanup"), noting("unload")

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        raise NotImplementedError


@pytest.fixture
def server() -> FakeServer:
    server = FakeServer([])
    server.during = server.stopped.set
    return server


@pytest.fixture
def stack(server: FakeServer) -> Stack:
    return Stack(Disk(), [], server)


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    """What has been logged so far, as lines on standard error."""
    stderr = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        setup = log.setup()
        setup.__enter__()
    yield lambda: stderr.getvalue().splitlines()
    setup.__exit__(None, None, None)


LIFE = [
    "disk.config_complete",
    "disk.get_ready",
    "bind",
    "disk.after_fork",
    "serve",
    "disk.cleanup",
    "close",
    "disk.unload",
]


def test_life_has_nbdkits_order(server: FakeServer, stack: Stack) -> None:
    assert launch(server, stack) == 0
    assert server.events == LIFE


@pytest.mark.parametrize(
    ("step", "undone"),
    [
        ("disk.config_complete", ["disk.unload"]),
        ("disk.get_ready", ["disk.unload"]),
        ("bind", ["close", "disk.unload"]),
        ("disk.after_fork", ["disk.cleanup", "close", "disk.unload"]),
        ("serve", ["disk.cleanup", "close", "disk.unload"]),
    ],
)
def test_failure_undoes_what_was_done_and_is_told_in_one_line(
    server: FakeServer,
    stack: Stack,
    messages: Callable[[], list[str]],
    tmp_path: Path,
    step: str,
    undone: list[str],
) -> None:
    server.fails[step] = ConfigError(f"{step} does not work")

    status = launch(server, stack, pidfile=str(tmp_path / "pid"), command="exec sleep 60")

    assert status == 1
    assert server.events[: server.events.index(step) + 1] == LIFE[: LIFE.index(step) + 1]
    assert [event for event in server.events[server.events.index(step) + 1 :] if event != "shutdown"] == undone
    assert messages() == [f"nbdkitpy: error: {step} does not work"]
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize("step", ["disk.cleanup", "close", "disk.unload"])
def test_failure_at_the_end_is_a_failure_and_keeps_nothing_from_its_end(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]], step: str
) -> None:
    server.fails[step] = OSError(errno.ENOSPC, "No space left on device")

    assert launch(server, stack) == 1
    assert server.events == LIFE
    assert len(messages()) == 1


def test_every_failure_is_told_the_first_one_first(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    server.fails = {"bind": ConfigError("no address"), "disk.unload": ConfigError("no unload")}

    assert launch(server, stack) == 1
    assert messages() == ["nbdkitpy: error: no address", "nbdkitpy: error: no unload"]


def test_what_a_backend_holds_up_is_not_cleaned_up(server: FakeServer, stack: Stack) -> None:
    server.all_ended = False

    assert launch(server, stack) == 1
    assert server.events == [event for event in LIFE if event not in ("disk.cleanup", "disk.unload")]


# --- announcement ---


def test_announcement_says_where_and_the_uri(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    launch(server, stack, announce=True)

    assert messages() == [f"nbdkitpy: listening on 127.0.0.1:10809, [::1]:10809 ({server.uri})"]


def test_uri_is_printed_alone_on_the_first_line_and_then_quoted(
    server: FakeServer, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(server, stack, print_uri=True)

    first, *others = capsys.readouterr().out.splitlines()
    assert first == server.uri
    assert others == [
        "Quoted for a shell: 'nbd+unix://?socket=/run/x y'",
        "To look at it: nbdinfo 'nbd+unix://?socket=/run/x y'",
    ]


def test_silent_unless_asked(
    server: FakeServer, stack: Stack, capsys: pytest.CaptureFixture[str], messages: Callable[[], list[str]]
) -> None:
    launch(server, stack)

    assert messages() == []
    assert capsys.readouterr().out == ""


# --- --run ---


def test_command_gets_the_variables_and_its_end_ends_the_server(
    server: FakeServer, stack: Stack, tmp_path: Path
) -> None:
    server.during = None
    out = tmp_path / "out"

    status = launch(
        server,
        stack,
        command=f'echo "$uri;$nbd;$exportname;$port;$unixsocket" > {out}; exit 9',
        export_name="a b",
    )

    assert status == 9
    assert out.read_text() == f"{server.uri};{server.uri};a b;10809;\n"
    assert "shutdown" in server.events


def test_command_has_the_path_of_a_unix_socket_and_no_port(server: FakeServer, stack: Stack, tmp_path: Path) -> None:
    server.port, server.unix_path, server.during = None, "/run/x y", None
    out = tmp_path / "out"

    assert launch(server, stack, command=f'echo "$port;$unixsocket" > {out}') == 0
    assert out.read_text() == ";/run/x y\n"


def test_server_that_ends_first_waits_for_the_command(server: FakeServer, stack: Stack, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    done = threading.Thread(target=lambda: (server.stopped.wait(30), fifo.write_text("go\n")))
    done.start()

    assert launch(server, stack, command=f"read word < {fifo}; exit 4") == 4
    done.join()


def test_command_that_cannot_be_started_is_a_failure(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*args: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_process)

    assert launch(server, stack, command="true") == 1
    assert messages() == ["nbdkitpy: error: --run: Resource temporarily unavailable"]
    assert "serve" not in server.events


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP])
def test_signal_ends_the_server_in_order(server: FakeServer, stack: Stack, number: signal.Signals) -> None:
    server.during = lambda: signal.raise_signal(number)

    assert launch(server, stack) == 0
    assert server.events == [*LIFE[:5], "shutdown", *LIFE[5:]]


def test_second_signal_ends_it_at_once(server: FakeServer, stack: Stack) -> None:
    def during() -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)

    server.during = during

    assert launch(server, stack) == 0
    assert server.events[5:8] == ["shutdown", "abort", "abort"]


def test_signal_before_the_server_serves_is_not_lost(server: FakeServer, stack: Stack) -> None:
    server.during = None
    server.bind = lambda: signal.raise_signal(signal.SIGTERM)  # type: ignore[method-assign]

    assert launch(server, stack) == 0


def test_signal_ends_the_command_too(server: FakeServer, stack: Stack) -> None:
    server.during = lambda: signal.raise_signal(signal.SIGTERM)

    assert launch(server, stack, command="while :; do :; done") == 128 + signal.SIGTERM


@pytest.mark.parametrize("fails", ["", "bind", "serve"])
def test_handlers_are_put_back(server: FakeServer, stack: Stack, fails: str) -> None:
    before = [signal.getsignal(number) for number in module.SIGNALS]
    server.fails[fails] = ConfigError("no")

    launch(server, stack)

    assert [signal.getsignal(number) for number in module.SIGNALS] == before


def test_interrupt_while_backends_get_ready_unloads_them(server: FakeServer, stack: Stack) -> None:
    class Slow(Filter):
        name = "slow"

        def get_ready(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(server, Stack(stack.plugin, [Slow()], server))

    assert server.events == ["disk.config_complete", "disk.get_ready", "disk.unload"]


# --- what is reported ---


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("disk: size is wrong"), "disk: size is wrong"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "get_ready: /x: Permission denied"),
        (OSError(errno.EACCES, "Permission denied", b"/x\xff"), "get_ready: /x\\udcff: Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "get_ready: Input/output error"),
        (OSError("only text"), "get_ready: only text"),
        (OSError(), "get_ready: OSError"),
        (ValueError("two\nlines"), "get_ready: ValueError: two\\nlines"),
        (KeyError(), "get_ready: KeyError"),
        (Unspeakable(), "get_ready: Unspeakable"),
    ],
)
def test_error_is_reported_in_one_line(error: Exception, line: str, messages: Callable[[], list[str]]) -> None:
    report("get_ready", error)

    assert messages() == [f"nbdkitpy: error: {line}"]


def test_step_without_a_name_is_not_named(messages: Callable[[], list[str]]) -> None:
    report("", OSError(errno.EIO, "Input/output error"))

    assert messages() == ["nbdkitpy: error: Input/output error"]


def test_only_defects_have_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("nbdkitpy")
    logger.addHandler(caplog.handler)
    try:
        report("x", ConfigError("x"))
        report("x", OSError("x"))
        report("x", ValueError("x"))
    finally:
        logger.removeHandler(caplog.handler)

    assert [bool(record.exc_info) for record in caplog.records] == [False, False, True]


# --- the pidfile ---


def test_pidfile_is_there_while_the_server_serves(server: FakeServer, stack: Stack, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    seen: list[str] = []

    def during() -> None:
        seen.append(path.read_text())
        server.stopped.set()

    server.during = during
    launch(server, stack, pidfile=str(path))

    assert seen == [f"{os.getpid()}\n"]
    assert list(tmp_path.iterdir()) == []


def test_pidfile_replaces_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("12345678901234567890")
    before = os.umask(0o022)
    try:
        Pidfile(str(path)).write()
    finally:
        os.umask(before)

    assert path.read_text() == f"{os.getpid()}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("target", ["victim", "dangling"])
def test_pidfile_does_not_follow_a_symbolic_link(tmp_path: Path, target: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "pid"
    path.symlink_to(target)
    pidfile = Pidfile(str(path))

    with pytest.raises(ConfigError, match="must be a regular file or not exist; it is a symbolic link"):
        pidfile.write()
    pidfile.remove()

    assert victim.read_text() == "precious"
    assert path.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pid", "victim"]


def test_pidfile_does_not_replace_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is something else"):
        Pidfile(str(tmp_path)).write()


def test_pidfile_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pidfile: cannot write .*/none/pid: No such file or directory"):
        Pidfile(str(tmp_path / "none" / "pid")).write()


def test_pidfile_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)

    with pytest.raises(ConfigError, match="Operation not permitted"):
        Pidfile(str(tmp_path / "pid")).write()

    assert list(tmp_path.iterdir()) == []


def test_pidfile_of_another_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pidfile = Pidfile(str(path))
    pidfile.write()
    other = tmp_path / "other"
    other.write_text("1\n")
    os.rename(other, path)

    pidfile.remove()

    assert path.read_text() == "1\n"


def test_pidfile_that_somebody_removed_is_no_error(tmp_path: Path) -> None:
    pidfile = Pidfile(str(tmp_path / "pid"))
    pidfile.write()
    os.unlink(tmp_path / "pid")

    pidfile.remove()


# --- the parent ---


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_parents_end_will_end_us() -> None:
    code = """
import ctypes, os
from nbdkitpy.server.launch import exit_with_parent
exit_with_parent(os.getppid())
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))
print(number.value)
"""

    assert in_a_process(code).stdout == f"{int(signal.SIGTERM)}\n"


def test_parent_that_has_ended_already_is_noticed() -> None:
    code = "import os; from nbdkitpy.server.launch import exit_with_parent; exit_with_parent(os.getppid() + 1)"

    assert "--exit-with-parent: the parent process has ended already" in in_a_process(code).stderr


class FakeLibrary:
    def __init__(self, error: int) -> None:
        self.error = error

    def prctl(self, *args: object) -> int:
        ctypes.set_errno(self.error)
        return -1 if self.error else 0


def test_parent_is_compared_only_after_the_system_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: FakeLibrary(0))

    exit_with_parent(os.getppid())
    with pytest.raises(ConfigError, match="has ended already"):
        exit_with_parent(os.getppid() + 1)


def test_system_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: FakeLibrary(errno.EINVAL))

    with pytest.raises(ConfigError, match="--exit-with-parent: Invalid argument"):
        exit_with_parent(os.getppid())


def test_system_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")

    with pytest.raises(ConfigError, match="--exit-with-parent is for Linux only; this system is plan9"):
        exit_with_parent(os.getppid())

"""The order of a server's life, what is left after a failure at any step, signals, the pidfile."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle, Plugin, SharedCount, log
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server import launch as module
from nbdkitpy.server import linux, privileges
from nbdkitpy.server.launch import launch, report
from nbdkitpy.server.notify import Notifier
from nbdkitpy.server.privileges import Identity
from nbdkitpy.server.tls import Tls
from nbdkitpy.stack import Stack
from tests.threats.saboteur import RAISED


class FakeServer:
    """Notes what is asked of it; serves until it is shut down, or as `during` says."""

    uri = "nbd+unix://?socket=/run/x y"
    listening: tuple[str, ...] = ("127.0.0.1:10809", "[::1]:10809")
    port: int | None = 10809
    unix_path: str | None = None
    notifier: Notifier | None = None
    tls: Tls | None = None

    def __init__(self, events: list[str], during: Callable[[], object] | None = None) -> None:
        self.events = events
        self.during = during
        self.stopped = threading.Event()
        self.all_ended = True
        self.fails: dict[str, Exception] = {}
        self.wakeup_fd = -1

    def note(self, event: str) -> None:
        self.events.append(event)
        if event in self.fails:
            raise self.fails[event]

    def bind(self) -> None:
        self.note("bind")

    def start_workers(self, live: Callable[[Callable[[Stack], bool]], int]) -> bool:
        return False

    def change_options(self, **changes: object) -> None:
        raise AssertionError("nothing has changed")

    def reloaded(self, stack: Stack) -> None:
        self.note("reloaded")

    def serve(self, stack: Stack) -> bool:
        self.note("serve")
        if self.during is not None:
            self.during()
        assert self.stopped.wait(30)
        return self.all_ended

    def close(self) -> None:
        self.note("close")

    def finish(self) -> None:
        raise AssertionError("nobody asked for it")

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        raise AssertionError("nobody counts")

    def shutdown(self) -> None:
        self.note("shutdown")
        self.stopped.set()

    def abort(self) -> None:
        self.note("abort")
        self.stopped.set()

    def call_soon(self, function: Callable[[], object]) -> None:
        self.note("call_soon")
        function()


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


@pytest.mark.parametrize(
    ("listening", "lines"), [(("/run/s",), ["nbdkitpy: listening on /run/s"]), ((), [])], ids=["activated", "-s"]
)
def test_server_without_a_uri_says_what_it_can(
    server: FakeServer,
    stack: Stack,
    messages: Callable[[], list[str]],
    capsys: pytest.CaptureFixture[str],
    listening: tuple[str, ...],
    lines: list[str],
) -> None:
    server.uri, server.listening = "", listening

    launch(server, stack, announce=True, print_uri=True)

    assert messages() == lines
    assert capsys.readouterr().out == ""


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


@pytest.mark.parametrize(
    ("mode", "parameters", "variables"),
    [
        (TlsMode.ON, {}, "1;;"),
        (TlsMode.REQUIRE, {"tls-certificates": "/a b"}, "2;/a b;"),
        (TlsMode.REQUIRE, {"tls-psk-file": "/keys"}, "2;;/keys"),
    ],
)
def test_command_knows_of_tls(
    server: FakeServer, stack: Stack, tmp_path: Path, mode: TlsMode, parameters: dict[str, str], variables: str
) -> None:
    server.tls, server.during = Tls(mode, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), parameters), None
    out = tmp_path / "out"

    assert launch(server, stack, command=f'echo "$tls;$tls_certificates;$tls_psk" > {out}') == 0
    assert out.read_text() == f"{variables}\n"


def test_S6_server_that_ends_first_waits_for_the_command(server: FakeServer, stack: Stack, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_signal_ends_the_server_in_order(server: FakeServer, stack: Stack, number: signal.Signals) -> None:
    server.during = lambda: signal.raise_signal(number)

    assert launch(server, stack) == 0
    assert server.events == [*LIFE[:5], "shutdown", *LIFE[5:]]


def test_S4_second_signal_ends_it_at_once(server: FakeServer, stack: Stack) -> None:
    def during() -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)

    server.during = during

    assert launch(server, stack) == 0
    assert server.events[5:8] == ["shutdown", "abort", "abort"]


def test_S4_signal_before_the_server_serves_is_not_lost(server: FakeServer, stack: Stack) -> None:
    server.during = None
    server.bind = lambda: signal.raise_signal(signal.SIGTERM)  # type: ignore[method-assign]

    assert launch(server, stack) == 0


def test_S6_signal_ends_the_command_too(server: FakeServer, stack: Stack) -> None:
    server.during = lambda: signal.raise_signal(signal.SIGTERM)

    assert launch(server, stack, command="while :; do :; done") == 128 + signal.SIGTERM


@pytest.mark.parametrize("fails", ["", "bind", "serve"])
def test_handlers_are_put_back(server: FakeServer, stack: Stack, fails: str) -> None:
    numbers = [*module.SIGNALS, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    server.fails[fails] = ConfigError("no")

    launch(server, stack)

    assert [signal.getsignal(number) for number in numbers] == before


def test_S4_interrupt_while_backends_get_ready_unloads_them(server: FakeServer, stack: Stack) -> None:
    class Slow(Filter):
        name = "slow"

        def get_ready(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(server, Stack(stack.plugin, [Slow()], server))

    assert server.events == ["disk.config_complete", "disk.get_ready", "disk.unload"]


def test_P7_signal_that_another_thread_gets_wakes_the_server_up(server: FakeServer, stack: Stack) -> None:
    reading, server.wakeup_fd = os.pipe()
    os.set_blocking(server.wakeup_fd, False)
    woken: list[bytes] = []

    def during() -> None:
        signal.raise_signal(signal.SIGTERM)
        woken.append(os.read(reading, 1))

    server.during = during

    assert launch(server, stack) == 0
    assert woken == [bytes([signal.SIGTERM])]
    assert signal.set_wakeup_fd(-1) == -1  # it has been put back
    for fd in (reading, server.wakeup_fd):
        os.close(fd)


def raise_twice() -> None:
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("step", "undone"),
    [
        ("after_fork", ["disk.cleanup", "close", "disk.unload"]),
        ("cleanup", ["close", "disk.unload"]),
    ],
)
def test_S4_second_signal_gives_up_what_a_unit_does_not_return_from(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]], step: str, undone: list[str]
) -> None:
    class Hanging(Filter):
        name = "hanging"

    def hang(unit: Filter) -> None:
        try:
            raise_twice()
        except Exception:  # such as units have
            pytest.fail("a unit can prevent it")
        pytest.fail("it goes on")

    setattr(Hanging, step, hang)

    assert launch(server, Stack(stack.plugin, [Hanging()], server)) == 1
    assert messages() == [f"nbdkitpy: error: {step}: given up, as a second signal came"]
    assert [event for event in server.events if event not in ("shutdown", "abort")][-len(undone) :] == undone


def test_unit_that_exits_does_not_end_the_process(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    class Leaving(Filter):
        name = "leaving"

        def after_fork(self) -> None:
            raise SystemExit(0)

    assert launch(server, Stack(stack.plugin, [Leaving()], server)) == 1
    assert messages() == ["nbdkitpy: error: after_fork: SystemExit: 0"]


@pytest.mark.parametrize("step", ["config_complete", "thread_model", "get_ready", "after_fork", "cleanup", "unload"])
@pytest.mark.parametrize("what", RAISED.keys() - {"KeyboardInterrupt"})
def test_G1_whatever_a_step_raises_is_one_line_and_the_end_in_order(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]], what: str, step: str
) -> None:
    class Failing(Filter):
        name = "failing"

    def fail(unit: Filter) -> None:
        raise RAISED[what]()

    setattr(Failing, step, fail)

    assert launch(server, Stack(stack.plugin, [Failing()], server)) == 1
    assert len(messages()) == 1
    ends = [] if step in ("config_complete", "thread_model", "get_ready") else ["disk.cleanup", "close"]
    assert [event for event in server.events if event in LIFE[5:]] == [*ends, "disk.unload"]


# --- reload ---


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: False)


def hung_up(server: FakeServer) -> Callable[[], None]:
    """What happens while the server serves: it gets SIGHUP, and is ended if it does not by that."""

    def during() -> None:
        signal.raise_signal(signal.SIGHUP)
        server.events.append("goes on")
        server.stopped.set()

    return during


@pytest.mark.parametrize("lines", [["ip: allow is any", "log file reopened"], []])
def test_P7_sighup_reloads_and_logs_what_that_did(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]], lines: list[str]
) -> None:
    server.during = hung_up(server)

    assert launch(server, stack, reload=lambda: lines) == 0
    assert messages() == [f"nbdkitpy: reload: {line}" for line in lines or ["nothing to reload"]]
    assert server.events[4:8] == ["serve", "call_soon", "reloaded", "goes on"]


def test_P7_signals_that_come_before_the_reload_begins_are_one(
    server: FakeServer, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue: list[Callable[[], object]] = []
    monkeypatch.setattr(server, "call_soon", queue.append)

    def during() -> None:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert len(queue) == 1
        queue.pop()()
        signal.raise_signal(signal.SIGHUP)
        assert len(queue) == 1
        server.stopped.set()

    server.during = during

    assert launch(server, stack, reload=list) == 0


def test_sighup_reads_certificates_again(server: FakeServer, stack: Stack, messages: Callable[[], list[str]]) -> None:
    made: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        made.append(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
        return made[-1]

    server.tls, server.during = Tls(TlsMode.ON, make, {}), hung_up(server)

    assert launch(server, stack, reload=lambda: ["done"]) == 0
    assert messages() == ["nbdkitpy: reload: done", "nbdkitpy: reload: certificates and keys have been read again"]
    assert len(made) == 2


def test_certificates_that_cannot_be_read_again_leave_all_else_as_it_is(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)]

    def make() -> ssl.SSLContext:
        if not contexts:
            raise ConfigError("key.pem cannot be read")
        return contexts.pop()

    server.tls, server.during = Tls(TlsMode.ON, make, {}), hung_up(server)

    assert launch(server, stack, reload=lambda: ["done"]) == 0
    assert messages() == ["nbdkitpy: reload: done", "nbdkitpy: error: key.pem cannot be read"]
    assert "goes on" in server.events


def test_reload_that_fails_leaves_all_as_it_was(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    def fail() -> list[str]:
        raise ConfigError("disk.toml: unknown key")

    server.during = hung_up(server)

    assert launch(server, stack, reload=fail) == 0
    assert messages() == ["nbdkitpy: error: disk.toml: unknown key"]
    assert server.events[4:7] == ["serve", "call_soon", "goes on"]


@pytest.mark.parametrize("what", RAISED)
def test_G1_whatever_a_reload_raises_ends_nothing(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]], what: str
) -> None:
    def fail() -> list[str]:
        raise RAISED[what]()

    server.during = hung_up(server)

    assert launch(server, stack, reload=fail) == 0
    assert len(messages()) == 1
    assert server.events[4:7] == ["serve", "call_soon", "goes on"]


def test_G3_second_signal_gives_up_a_reload_that_does_not_return(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    def hang() -> list[str]:
        raise_twice()
        pytest.fail("it goes on")

    server.during = hung_up(server)

    assert launch(server, stack, reload=hang) == 1
    assert messages() == ["nbdkitpy: error: given up, as a second signal came"]
    assert server.events[-1] == "close"  # neither cleanup nor unload, as clients may be served still


def test_sighup_opens_the_log_anew_if_there_is_nothing_else(
    server: FakeServer, stack: Stack, tmp_path: Path, no_terminal: None
) -> None:
    path = tmp_path / "log"
    server.during = hung_up(server)

    with log.setup(str(path)):
        os.rename(path, tmp_path / "old")
        assert launch(server, stack) == 0

    assert (tmp_path / "old").read_text() == ""
    assert f"log file {path} reopened" in path.read_text()


@pytest.mark.parametrize(("is_open", "ends"), [(True, False), (False, True)])
def test_sighup_of_a_terminal_that_is_closed_ends_the_server(
    server: FakeServer, stack: Stack, monkeypatch: pytest.MonkeyPatch, is_open: bool, ends: bool
) -> None:
    terminal = [True]
    monkeypatch.setattr(os, "isatty", lambda fd: fd == 0 and terminal[0])

    def during() -> None:
        terminal[0] = is_open
        hung_up(server)()

    server.during = during

    assert launch(server, stack) == 0
    assert ("shutdown" in server.events) == ends


def test_sighup_of_a_closed_terminal_reloads_if_there_is_a_configuration(
    server: FakeServer, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = [True]
    monkeypatch.setattr(os, "isatty", lambda fd: terminal[0])
    reloads: list[str] = []

    def during() -> None:
        terminal[0] = False
        hung_up(server)()

    server.during = during

    assert launch(server, stack, reload=lambda: reloads) == 0
    assert "shutdown" not in server.events


# --- the service manager ---


class FakeNotifier(Notifier):
    """Notes with the server's events what it is told."""

    def __init__(self, events: list[str]) -> None:
        super().__init__({})
        self._events = events

    def _send(self, message: str) -> None:
        self._events.append(message.split("\n")[0])


def test_service_manager_is_told_of_the_beginning_and_the_server_has_the_rest(server: FakeServer, stack: Stack) -> None:
    notifier = FakeNotifier(server.events)

    assert launch(server, stack, notifier=notifier) == 0

    assert server.events == [*LIFE[:4], "READY=1", *LIFE[4:]]
    assert server.notifier is notifier


def test_service_manager_is_told_of_a_reload(server: FakeServer, stack: Stack) -> None:
    def reload() -> list[str]:
        server.events.append("reload")
        return []

    server.during = hung_up(server)

    launch(server, stack, notifier=FakeNotifier(server.events), reload=reload)

    assert server.events[6:11] == ["call_soon", "RELOADING=1", "reload", "reloaded", "READY=1"]


@pytest.mark.parametrize("step", LIFE[:4])
def test_service_manager_is_not_told_of_a_start_that_fails(server: FakeServer, stack: Stack, step: str) -> None:
    server.fails[step] = ConfigError("no")

    assert launch(server, stack, notifier=FakeNotifier(server.events)) == 1
    assert "READY=1" not in server.events


# --- the process ---


class FakeBackground:
    """Goes nowhere, and notes when."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def enter(self, tell: Callable[[], None], clean_up: Callable[[], None]) -> None:
        self.events.append("background")
        self.tell = tell

    def ready(self) -> None:
        self.events.append("ready")

    def failed(self) -> None:
        self.events.append("failed")


@pytest.fixture
def process(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeBackground:
    """The process's properties, changes of which are noted with the server's events and not made."""
    place = FakeBackground(server.events)
    monkeypatch.setattr(module, "_background", lambda: place)
    monkeypatch.setattr(privileges, "find_identity", lambda user, group: Identity(1, 2) if user else None)
    for name in ("allow_locking", "lock_memory"):
        monkeypatch.setattr(privileges, name, lambda name=name: server.note(name))
    monkeypatch.setattr(privileges, "become", lambda identity: server.note(f"become {identity.uid}"))
    monkeypatch.setattr(linux, "death_signal", lambda: 0)
    return place


def test_process_changes_between_the_sockets_and_the_threads(
    server: FakeServer, stack: Stack, process: FakeBackground
) -> None:
    assert launch(server, stack, background=True, user="disk", swap=True) == 0

    changes = ["allow_locking", "become 1", "background", "lock_memory"]
    assert server.events == [*LIFE[:3], *changes, "disk.after_fork", "ready", *LIFE[4:]]


@pytest.mark.parametrize("step", ["become 1", "lock_memory", "disk.after_fork"])
def test_change_that_fails_is_undone(
    server: FakeServer, stack: Stack, process: FakeBackground, messages: Callable[[], list[str]], step: str
) -> None:
    server.fails[step] = ConfigError("it does not work")

    assert launch(server, stack, background=True, user="disk", swap=True) == 1
    assert messages() == ["nbdkitpy: error: it does not work"]
    assert server.events[-3:] == ["close", "disk.unload", "failed"]
    assert "ready" not in server.events


def test_launcher_tells_where_the_server_is(
    server: FakeServer, stack: Stack, process: FakeBackground, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(server, stack, background=True, print_uri=True)
    assert capsys.readouterr().out == ""

    process.tell()

    assert capsys.readouterr().out.startswith(f"{server.uri}\n")


def test_users_are_looked_up_before_anything_is_opened(
    server: FakeServer, stack: Stack, messages: Callable[[], list[str]]
) -> None:
    assert launch(server, stack, user="no such user") == 1

    assert server.events == ["disk.unload"]
    assert len(messages()) == 1


def test_sockets_get_their_label_while_they_are_bound(
    server: FakeServer, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def label(label: str | None) -> Iterator[None]:
        server.note(f"label {label}")
        yield
        server.note("no label")

    monkeypatch.setattr(privileges, "socket_label", label)

    launch(server, stack, selinux_label="x_t")

    assert server.events[2:5] == ["label x_t", "bind", "no label"]


@pytest.mark.parametrize(("number", "renewed"), [(0, False), (signal.SIGTERM, True)])
def test_parents_end_still_ends_us_after_a_change_of_user(
    server: FakeServer,
    stack: Stack,
    process: FakeBackground,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    renewed: bool,
) -> None:
    parents: list[int] = []
    monkeypatch.setattr(linux, "death_signal", lambda: number)
    monkeypatch.setattr(module, "exit_with_parent", parents.append)

    assert launch(server, stack, user="disk") == 0
    assert parents == [os.getppid()] * renewed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_kernel_forgets_the_parents_end_with_the_user_and_is_reminded() -> None:
    code = """
import os
from nbdkitpy.server import launch, linux
from nbdkitpy.server.privileges import Identity, become
for change in (become, launch._become):
    linux.exit_with_parent(os.getppid())
    if not os.fork():
        linux.exit_with_parent(os.getppid())
        change(Identity(65534, 65534))
        print(linux.death_signal(), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.stdout.split() == ["0", str(int(signal.SIGTERM))], done


# --- what is reported ---


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


UNSPEAKABLE = {
    RAISED["odd text"]: "OSError",
    RAISED["UnprintableOs"]: "UnprintableOs",
    RAISED["Hostile"]: "[Errno 5] x",
    RAISED["Odd"]: "Odd",
}


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
        *((make(), f"get_ready: {line}") for make, line in UNSPEAKABLE.items()),
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

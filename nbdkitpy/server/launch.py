"""From a stack that has its parameters to the end of the process: the order of a server's life.

config_complete, get_ready, bind, change of user, background, pidfile, after_fork, announcement, service, cleanup,
unload. What was begun is undone in reverse, whichever step fails. A user sees a failure of any step on the terminal and
in the exit status.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from nbdkitpy import log
from nbdkitpy.backend import ServerControl
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server import linux, privileges
from nbdkitpy.server.failures import GivenUp, Reported, report, reported
from nbdkitpy.server.linux import exit_with_parent
from nbdkitpy.server.pidfile import Pidfile
from nbdkitpy.stack import Stack

if TYPE_CHECKING:
    from nbdkitpy.server.background import Background
    from nbdkitpy.server.captive import Captive
    from nbdkitpy.server.notify import Notifier
    from nbdkitpy.server.tls import Tls

__all__ = ["Servable", "exit_with_parent", "launch", "report"]

_logger = logging.getLogger("nbdkitpy")

#: Each of them ends the server in an orderly way; the second one ends it at once.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)

T = TypeVar("T")


class Servable(ServerControl, Protocol):
    """What a server is to the one who launches it."""

    @property
    def uri(self) -> str:
        """Where clients find it, "" if they cannot look for it; known once it is bound, as are the next three."""

    @property
    def listening(self) -> Sequence[str]:
        """What it listens on, for people."""

    @property
    def port(self) -> int | None:
        """TCP or vsock port."""

    @property
    def unix_path(self) -> str | None:
        """Path of the Unix socket."""

    @property
    def wakeup_fd(self) -> int:
        """What :meth:`serve` looks up at when something is written to it. It does not block."""

    #: The service manager's, if there is one. While it serves, the server says how it is, and when the end begins.
    notifier: Notifier | None

    #: By which clients may go over to TLS; None if they may not.
    tls: Tls | None

    def bind(self) -> None:
        """Open the listeners."""

    def start_workers(self, live: Callable[[Callable[[Stack], bool]], int]) -> bool:
        """Start the processes that serve in place of this one, if there are to be any; tell whether there are.

        Args:
            live: What each of them calls, with a function that serves as :meth:`serve` does; returns the exit status.

        Raises:
            Reported: one has ended before it could serve, and has said why.
        """

    def reloaded(self, stack: Stack) -> None:
        """Take note that live parameters of `stack`, or the log, have been read anew; while it serves."""

    def change_options(self, **changes: Any) -> None:
        """Set fields of ServerOptions that may change while it serves; they hold for clients that come."""

    def abort(self) -> None:
        """End at once."""

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have :meth:`serve` call `function` between two clients; for signal handlers too."""

    def serve(self, stack: Stack) -> bool:
        """Serve clients until the shutdown; return whether every connection has ended, or a backend holds one up."""

    def close(self) -> None:
        """Close the listeners and remove their files; nothing happens if that is done."""


def launch(
    server: Servable,
    stack: Stack,
    *,
    command: str | None = None,
    pidfile: str | None = None,
    export_name: str = "",
    announce: bool = False,
    print_uri: bool = False,
    background: bool = False,
    user: str | None = None,
    group: str | None = None,
    swap: bool = False,
    selinux_label: str | None = None,
    notifier: Notifier | None = None,
    reload: Callable[[], Sequence[str]] | None = None,
) -> int:
    """Serve `stack`, loaded and configured, until the server is told to end, and return the exit status.

    Args:
        server: Not yet bound.
        stack: Unloaded at the end in any case.
        command: For the shell; the server ends when it does, and its exit status becomes ours.
        pidfile: Absolute path of a file that holds our process number while clients can connect.
        export_name: What the command is told to ask for.
        announce: Say on standard error what we listen on.
        print_uri: Print the URI on standard output.
        background: Serve in another process. This one exits, when clients can connect to that one or it has failed.
        user: Name or number of whom to become when the sockets are open.
        group: Likewise; None is that of `user`.
        swap: Keep the memory of the server from being swapped out.
        selinux_label: Of the sockets that listen.
        notifier: Tells the service manager how we are.
        reload: Called for SIGHUP, between two clients; returns what it did, for people. None opens the log anew, and
            ends the server if it was the terminal's end that we were told of.
    """
    captive = None if command is None else _captive(command)
    # The system sends SIGHUP also when a terminal is closed, and what was started there ends with it.
    terminals = [] if background or reload else [fd for fd in (0, 1, 2) if os.isatty(fd)]
    life = _Life(server, stack, captive, notifier, swap)
    try:
        with contextlib.ExitStack() as undo:
            life.begin(undo, background)
            identity = _call("", privileges.find_identity, user, group)
            life.make_ready(_Reload(server, stack, reload or log.reopen, notifier, terminals))
            life.bind(selinux_label)
            life.settle(identity)
            life.go_into_background(lambda: _tell(server, announce, print_uri))
            life.lock_memory()  # only now, as a process does not inherit that
            life.open_for_clients(pidfile)
            if not background:
                _call("", _tell, server, announce, print_uri)
            return life.serve(export_name)
    except (Reported, GivenUp):
        life.has_failed()
        return 1


class _Life:
    """The steps of a server's life, each of which leaves in `undo` what undoes it."""

    def __init__(
        self, server: Servable, stack: Stack, captive: Captive | None, notifier: Notifier | None, swap: bool
    ) -> None:
        self._server = server
        self._stack = stack
        self._captive = captive
        self._notifier = notifier
        self._swap = swap
        self._undo = contextlib.ExitStack()
        self._background: Background | None = None
        self._held_up = False  # a backend has not returned: what it has can be neither closed nor cleaned up
        self._is_hung_up = False  # SIGHUP has come, of which nothing has come yet
        self._in_unit = False  # a unit is doing something that a second signal cuts short

    def begin(self, undo: contextlib.ExitStack, background: bool) -> None:
        self._undo = undo
        undo.callback(self._end, "unload", self._stack.unload)
        if background:
            self._background = _call("", _background)

    def make_ready(self, reload: Callable[[], None]) -> None:
        _call("config_complete", self._stack.config_complete)
        _call("get_ready", self._stack.get_ready)
        # From here on there are files to remove, so a signal must no longer end us where we stand.
        self._undo.enter_context(self._signals(reload))

    def bind(self, selinux_label: str | None) -> None:
        self._undo.callback(_call, "", self._server.close)
        _call("", self._bind, selinux_label)

    def _bind(self, selinux_label: str | None) -> None:
        with privileges.socket_label(selinux_label):
            self._server.bind()

    def settle(self, identity: privileges.Identity | None) -> None:
        """Give up what is not needed any more once the sockets are open."""
        if self._swap:
            privileges.allow_locking()
        if identity is not None:
            _call("", _become, identity)

    def go_into_background(self, tell: Callable[[], None]) -> None:
        if self._background is not None:
            _call("", self._background.enter, tell, self._server.close)

    def lock_memory(self) -> None:
        if self._swap:
            _call("", privileges.lock_memory)

    def open_for_clients(self, pidfile: str | None) -> None:
        if pidfile is not None:
            file = Pidfile(pidfile)
            self._undo.callback(file.remove)
            _call("", file.write)
        if not self._call_unit("after_fork", self._server.start_workers, self.live_as_worker):
            self._begin_units()

    def _begin_units(self) -> None:
        self._undo.callback(self._end, "cleanup", self._stack.cleanup)
        self._call_unit("after_fork", self._stack.after_fork)

    def live_as_worker(self, serve: Callable[[Stack], bool]) -> int:
        """Be a process that was forked to serve by `serve`, until it ends; return its exit status."""
        try:
            with contextlib.ExitStack() as self._undo:  # what there was to be undone is the main process's
                self.lock_memory()
                self._begin_units()
                if self._background is not None:
                    self._background.leave()
                self._held_up = not _call("", serve, self._stack)
        except (Reported, GivenUp):
            return 1
        return int(self._held_up)

    def serve(self, export_name: str) -> int:
        if self._captive is not None:
            self._undo.callback(self._captive.reap)
            variables = _variables(self._server, export_name)
            _call("--run", self._captive.start, variables, self._server.shutdown)
        if self._background is not None:
            _call("", self._background.ready)
        self._server.notifier = self._notifier
        if self._notifier is not None:
            self._notifier.ready()
        self._held_up = not _call("", self._serve)
        status = 0 if self._captive is None else self._captive.wait()
        return status or int(self._held_up)

    def _serve(self) -> bool:
        try:
            return self._server.serve(self._stack)
        except GivenUp:  # clients may be served still
            self._held_up = True
            raise

    def has_failed(self) -> None:
        if self._background is not None:
            self._background.failed()

    def _end(self, step: str, function: Callable[[], None]) -> None:
        if not self._held_up:
            self._call_unit(step, function)

    def _call_unit(self, step: str, function: Callable[..., T], *args: object) -> T:
        with self._unit():
            return _call(step, function, *args)

    @contextlib.contextmanager
    def _unit(self) -> Iterator[None]:
        """A unit does something meanwhile, which a second signal cuts short."""
        self._in_unit = True
        try:
            yield
        finally:
            self._in_unit = False

    @contextlib.contextmanager
    def _signals(self, reload: Callable[[], None]) -> Iterator[None]:
        """Have the first signal end the server in order, the next at once; then put back what they did before."""
        ways = iter((self._server.shutdown,))

        def stop(number: int, frame: FrameType | None) -> None:
            next(ways, self._abort)()
            if self._captive is not None:
                self._captive.end()

        def reload_units() -> None:
            self._is_hung_up = False
            with self._unit():
                reload()

        def hang_up(number: int, frame: FrameType | None) -> None:
            if not self._is_hung_up:  # else what is still to be done is for this one too
                self._is_hung_up = True
                self._server.call_soon(reload_units)

        # Were SIGPIPE not ignored, a client that leaves would end us. Python does that, but a unit may have undone it.
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | signal.Handlers] = {
            **dict.fromkeys(SIGNALS, stop),
            signal.SIGHUP: hang_up,
            signal.SIGPIPE: signal.SIG_IGN,
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        # The system may give a signal to any thread, but handlers run in this one only, when it wakes up.
        wakeup = signal.set_wakeup_fd(self._server.wakeup_fd, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _abort(self) -> None:
        self._server.abort()
        if self._in_unit:
            raise GivenUp


class _Reload:
    """What SIGHUP brings about."""

    def __init__(
        self,
        server: Servable,
        stack: Stack,
        reload: Callable[[], Sequence[str]],
        notifier: Notifier | None,
        terminals: list[int],
    ) -> None:
        self._server = server
        self._stack = stack
        self._reload = reload
        self._notifier = notifier
        self._terminals = terminals

    def __call__(self) -> None:
        """Reload, and log what came of it."""
        if not all(map(os.isatty, self._terminals)):
            _logger.info("the terminal has been closed")
            self._server.shutdown()
            return
        if self._notifier is not None:
            self._notifier.reloading()
        try:
            lines = self._reload()
        except GivenUp:
            raise
        except BaseException as error:  # a unit's may be anything; all is as it was
            report("reload", error)
        else:
            self._server.reloaded(self._stack)
            for line in lines or ["nothing to reload"]:
                _logger.log(log.NOTICE, "reload: %s", line)
        if self._server.tls is not None:
            _renew(self._server.tls)
        if self._notifier is not None:
            self._notifier.ready()


def _renew(tls: Tls) -> None:
    try:
        tls.renew()
    except Exception as error:  # the old certificates or keys stay in use
        report("reload", error)
    else:
        _logger.log(log.NOTICE, "reload: certificates and keys have been read again")


def _become(identity: privileges.Identity) -> None:
    parent, number = os.getppid(), linux.death_signal()
    privileges.become(identity)
    if number:  # the system has forgotten it
        exit_with_parent(parent)


def _background() -> Background:
    from nbdkitpy.server.background import Background  # not needed by those who stay in the foreground

    return Background()


def _captive(command: str) -> Captive:
    from nbdkitpy.server.captive import Captive  # it needs subprocess, which takes a while to import

    return Captive(command)


def _variables(server: Servable, export_name: str) -> dict[str, str]:
    return {
        "uri": server.uri,
        "nbd": server.uri,
        "exportname": export_name,
        "port": "" if server.port is None else str(server.port),
        "unixsocket": server.unix_path or "",
        **_tls_variables(server.tls),
    }


def _tls_variables(tls: Tls | None) -> dict[str, str]:
    if tls is None:
        return {}
    return {
        "tls": "2" if tls.mode is TlsMode.REQUIRE else "1",
        "tls_certificates": tls.parameters.get("tls-certificates", ""),
        "tls_psk": tls.parameters.get("tls-psk-file", ""),
    }


def _tell(server: Servable, announce: bool, print_uri: bool) -> None:
    # There is no URI for sockets that somebody else has made, and with -s nothing is listened on either.
    if announce and server.listening:
        uri = f" ({server.uri})" if server.uri else ""
        _logger.info("listening on %s%s", ", ".join(server.listening), uri, extra={"terminal": True})
    if print_uri and server.uri:
        quoted = shlex.quote(server.uri)
        # The URI alone on the first line is what scripts read.
        print(f"{server.uri}\nQuoted for a shell: {quoted}\nTo look at it: nbdinfo {quoted}", flush=True)


# --- failures ---


def _call(step: str, function: Callable[..., T], *args: object) -> T:
    with reported(step):
        return function(*args)

"""The main process of a server that is begun anew whenever its code changes (``--reload``): for development.

It listens, but leaves clients in the queue, for another process to accept and serve them. That one is forked before any
unit is loaded, so the next one finds their code as it then is. Between the two nobody is turned away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import TypeAlias

from nbdkitpy import log
from nbdkitpy.backend import Plugin
from nbdkitpy.server import linux
from nbdkitpy.server.failures import Reported
from nbdkitpy.server.forking import SIGNALS, described_exit, exit_status, fork, live_and_exit, unblock_signals
from nbdkitpy.server.front import Front
from nbdkitpy.server.notify import Notifier
from nbdkitpy.server.options import Endpoint, ServerOptions
from nbdkitpy.server.service import GRACE
from nbdkitpy.stack import Stack

__all__ = ["Elsewhere", "Link", "Supervisor"]

#: Seconds from one look at the files to the next. One that has changed must not change again between two looks, so that
#: no half of a file is read.
_INTERVAL = 0.2

#: Bytes that no message is longer than. One about a file has its path, and how it was.
_MAX_MESSAGE = 1 << 16
_READY = b"ready"

_NEVER = float("inf")

#: Seconds that the process has, beyond those that its sessions have, when it is to end at once.
_MARGIN = 1.0

#: When a file was written, its size, and which one it is; nothing for one that is not there.
Signature: TypeAlias = "tuple[int, ...]"


def signature(path: str | bytes) -> Signature:
    """Return what is different about a file that has been changed."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


class Link(Notifier):
    """What the serving process has of its supervisor. Nothing here ever raises.

    Args:
        sock: Its other end is the supervisor's, and ends when we are to end.
        endpoints: What the supervisor listens on.
    """

    def __init__(self, sock: socket.socket, endpoints: tuple[Endpoint, ...]) -> None:
        super().__init__({})
        self._sock = sock
        self.endpoints = endpoints

    def fileno(self) -> int:
        """Return a descriptor that can be read when we are to end."""
        return self._sock.fileno()

    def ready(self) -> None:
        self._say(_READY)

    def reads(self, path: str) -> None:
        """Say that the file of this path is part of the code, before it is read."""
        numbers = " ".join(map(str, signature(path)))
        self._say(b"%s\0%s" % (os.fsencode(path), numbers.encode("ascii")))

    def _say(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the supervisor has gone, which ends us
            self._sock.send(message)


class Elsewhere(Stack):
    """What there is in place of the layers, which are in the process that serves."""

    def __init__(self, server: Supervisor) -> None:
        super().__init__(Plugin(), (), server)

    def config_complete(self) -> None:
        """Do nothing: there is neither a parameter nor a thread model."""


@dataclasses.dataclass(eq=False)
class _Process:
    """The process that serves, as the supervisor sees it."""

    pid: int
    sock: socket.socket
    is_ready: bool = False
    is_told: bool = False  #: to end


class Supervisor(Front):
    """Listens, and has another process serve; ends when that one ends of itself, in order.

    Args:
        options: Of the whole server.
        live: What that process does; returns its exit status.
    """

    def __init__(self, options: ServerOptions, live: Callable[[Link], int]) -> None:
        linux.require("--reload")
        super().__init__(options)
        self._live = live
        self._process: _Process | None = None
        self._files: dict[bytes, Signature] = {}  # of the code, as they were when they were read
        self._seen: dict[bytes, Signature] = {}  # as they were when they were last looked at
        self._next_look = _NEVER
        self._is_ending = False
        self._all_well = True

    # --- the beginning ---

    def start_workers(self, live: Callable[[Callable[[Stack], bool]], int]) -> bool:
        """Start the process that serves; if it cannot, that is the end, as it is without a supervisor."""
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # then nobody could tell how it ends
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        process = self._begin()
        self._wait_until(lambda: process.is_ready or self._process is None or self._stopping)
        if self._process is None:
            raise Reported
        self._next_look = time.monotonic() + _INTERVAL
        return True

    def _begin(self) -> _Process:
        """Fork the process that serves.

        Raises:
            OSError: the system has no room for it.
        """
        supervisor = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if not pid:
            ours.close()
            live_and_exit(lambda: self._live_as_process(supervisor, theirs), "the process that serves")
        unblock_signals()
        theirs.close()
        self._files = {}
        self._process = _Process(pid, ours)
        self._watch(ours.fileno(), functools.partial(self._hear, self._process))
        return self._process

    def _live_as_process(self, supervisor: int, sock: socket.socket) -> int:
        signal.set_wakeup_fd(-1)  # which is the supervisor's
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        unblock_signals()
        linux.exit_with_parent(supervisor)
        endpoints = tuple(Endpoint(fd=os.dup(listener.socket.fileno())) for listener in self._listeners)
        for listener in self._listeners:
            listener.socket.close()
        return self._live(Link(sock, endpoints))

    # --- what the process says, and what becomes of it ---

    def _hear(self, process: _Process) -> bool:
        message = process.sock.recv(_MAX_MESSAGE)
        if not message:
            self._bury(process)
        elif message == _READY:
            self._note_ready(process)
        else:
            path, _, numbers = message.rpartition(b"\0")
            self._files[path] = tuple(map(int, numbers.split()))
        return True

    def _note_ready(self, process: _Process) -> None:
        if not process.is_ready and self._next_look != _NEVER:  # it is not the first one
            self._log.log(log.NOTICE, "reload: what is new is served")
        process.is_ready = True

    def _bury(self, process: _Process) -> None:
        """See what the end of the process means."""
        self._unwatch(process.sock.fileno())
        process.sock.close()
        self._process = None
        status = exit_status(process.pid)
        if self._is_over:
            self._all_well &= status == 0 or not process.is_ready
        elif process.is_told:
            self._begin_again()
        elif process.is_ready and status == 0:  # a unit has asked for it
            self.shutdown()
        else:
            self._note_failure(process, status)

    def _note_failure(self, process: _Process, status: int) -> None:
        if process.is_ready or status < 0:  # else it has said itself what there is to say
            self._log.error("the process that serves %s", described_exit(status), extra=log.TERMINAL)
        if self._next_look != _NEVER:
            self._log.log(log.NOTICE, "reload: clients wait until a file is changed")

    def reloaded(self, stack: Stack) -> None:
        if self._process is not None and self._process.is_ready:
            os.kill(self._process.pid, signal.SIGHUP)

    def _report_clients(self, notifier: Notifier) -> None:
        """Do nothing: how many there are only the other process knows."""

    # --- changes ---

    @property
    def _is_over(self) -> bool:
        return self._stopping or self._is_ending

    def _next_deadline(self) -> float:
        return min(_NEVER if self._is_over else self._next_look, super()._next_deadline())

    def _do_what_is_due(self) -> None:
        """Look whether a file has changed."""
        now = time.monotonic()
        if self._is_over or now < self._next_look:
            return
        self._next_look = now + _INTERVAL
        changed = self._changed()
        if changed is None or (self._process is not None and self._process.is_told):
            return
        self._log.log(log.NOTICE, "reload: %s has changed", os.fsdecode(changed))
        if self._process is None:
            self._begin_again()
        else:
            self._tell_to_end(self._process)

    def _changed(self) -> bytes | None:
        """The path of a file that has changed since it was read, but not since the last look."""
        before, self._seen = self._seen, {path: signature(path) for path in self._files}
        for path, as_read in self._files.items():
            now = self._seen[path]
            if now not in ((), as_read) and now == before.get(path):
                return path
        return None

    def _begin_again(self) -> None:
        try:
            self._begin()
        except OSError as error:  # the next look tries it again
            self._complain("cannot begin the process that serves: %s", error.strerror)

    # --- the end ---

    def serve(self, stack: Stack) -> bool:
        """Have clients served until the shutdown; return whether the process that did so has ended in order."""
        try:
            self._serve_while(lambda: not self._finishing)
        finally:
            Front.close(self)
        if self.notifier is not None:
            self.notifier.stopping()
        return self._end()

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> bool:
        self._is_ending = True
        if self._process is not None:
            self._tell_to_end(self._process)
        self._wait_until(lambda: self._aborting or self._process is None)
        if self._process is not None:
            # One of these is its second signal, whether it has had one from a terminal or not.
            os.kill(self._process.pid, signal.SIGTERM)
            os.kill(self._process.pid, signal.SIGINT)
            self._wait_until(lambda: self._process is None, GRACE + _MARGIN)
        if self._process is not None:
            self._log.error("the process that serves does not end, and is killed", extra=log.TERMINAL)
            self._all_well = False
            self._bury(self._process)
        return self._all_well

    def _tell_to_end(self, process: _Process) -> None:
        """Have it end in order. Not by a signal, as it has had that of a terminal, and the second one cuts it short."""
        process.is_told = True
        with contextlib.suppress(OSError):  # it has ended already
            process.sock.shutdown(socket.SHUT_WR)
        if not process.is_ready:  # and so does not listen
            os.kill(process.pid, signal.SIGTERM)

"""A worker: a process that serves the clients which the main process hands over to it."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import ClassVar

from nbdkitpy import log
from nbdkitpy.server.channel import Channel, Kind, Message
from nbdkitpy.server.failures import report
from nbdkitpy.server.forking import SIGNALS, unblock_signals
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.service import Server
from nbdkitpy.server.session import Session
from nbdkitpy.stack import Stack

__all__ = ["Worker", "pack_reload", "settle"]


class Worker(Server):
    """Serves clients as a server does that listens, but hears of them, and of all else, from the main process.

    Args:
        options: Of the whole server.
        channel: To the main process.
    """

    _are_admitted = True

    def __init__(self, options: ServerOptions, channel: Channel) -> None:
        # Who has to give way is for the main process to say, which knows all clients.
        super().__init__(
            options._replace(endpoints=(), max_connections=0, max_connections_per_source=0, max_handshakes=0)
        )
        self._channel = channel

    def serve(self, stack: Stack) -> bool:
        """Serve clients until the main process says that it is over, or is there no more."""
        self._watch(self._channel.fileno(), functools.partial(self._hear, stack))
        self._tell(Kind.READY)
        try:
            return super().serve(stack)
        finally:
            self._tell(Kind.DONE)

    def _tell(self, kind: Kind, number: int = 0) -> None:
        with contextlib.suppress(OSError):  # the main process has gone, which ends us
            self._channel.send(kind, number)

    def _established(self, session: Session) -> None:
        super()._established(session)
        self._tell(Kind.ESTABLISHED, session.number)

    def _has_left(self, number: int) -> None:
        self._tell(Kind.LEFT, number)
        super()._has_left(number)

    def _hear(self, stack: Stack) -> bool:
        """Do what one message asks for; False if there was no room for its client."""
        try:
            message = self._channel.receive()
        except BlockingIOError:
            return True
        if message is None:  # the main process was killed
            self._unwatch(self._channel.fileno())
            self.shutdown()
        elif message.kind is Kind.CLIENT:
            return self._take_over(message, stack)
        else:
            self._ORDERS[message.kind](self, message, stack)
        return True

    def _reload(self, message: Message, stack: Stack) -> None:
        _set_reloaded(message, stack)
        self._renew()

    def _renew(self) -> None:
        """Read certificates and keys again, as the main process does."""
        try:
            if self.tls is not None:
                self.tls.renew()
        except Exception as error:  # the old ones stay in use
            report(f"worker {os.getpid()}: reload", error)

    def _take_over(self, message: Message, stack: Stack) -> bool:
        if message.fd is None:
            self._complain("cannot take a client over: %s", os.strerror(errno.EMFILE))
            self._has_left(message.number)
            return False
        return self._take(socket.socket(fileno=message.fd), message.number, stack)

    def _drop(self, message: Message, stack: Stack) -> None:
        # Also if the handshake has been finished meanwhile: the main process does not count it any more.
        for session in self._left():
            if session.number == message.number:
                session.abort()

    _ORDERS: ClassVar[dict[Kind, Callable[[Worker, Message, Stack], None]]] = {
        Kind.RELOAD: _reload,
        Kind.DROP: _drop,
        Kind.STOP: lambda worker, *_: worker.shutdown(),
        Kind.ABORT: lambda worker, *_: worker.abort(),
    }


def settle(number: int) -> None:
    """Become the process of worker `number`, after the fork: the main process sees to signals from now on."""
    signal.set_wakeup_fd(-1)  # which is the main process's
    for each in SIGNALS:
        # Not SIG_IGN, which programs that a unit starts would inherit.
        signal.signal(each, _leave_to_main)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    unblock_signals()
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as name:
        name.write(f"nbdkitpy-{number}")


def _leave_to_main(number: int, frame: FrameType | None) -> None:
    """Do nothing: who interrupts at a terminal, or stops a service, sends the signal to all of its processes."""


# --- live parameters ---


def pack_reload(stack: Stack) -> int:
    """Return the descriptor of a file in memory that says what has last been reloaded; there may be much of it.

    Raises:
        OSError: there is no room.
    """
    changes = [[stack.layers.index(layer), keys] for layer, keys in stack.last_reload.items()]
    fd = os.memfd_create("nbdkitpy-reload", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps(changes).encode("ascii"))
    return fd


def _set_reloaded(message: Message, stack: Stack) -> None:
    try:
        if message.fd is None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        try:
            # From its beginning, wherever others have read, as they share the position.
            changes = json.loads(os.pread(message.fd, os.fstat(message.fd).st_size, 0))
        finally:
            os.close(message.fd)
        stack.reload({stack.layers[index]: keys for index, keys in changes})
        log.reopen()
    except BaseException as error:  # a unit's may be anything
        report(f"worker {os.getpid()}: reload", error)

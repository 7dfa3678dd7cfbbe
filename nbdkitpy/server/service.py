"""The server: accepts clients, gives each a thread, and ends in bounded time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdkitpy.server.listener import Listener, listen
from nbdkitpy.server.options import ServerOptions, Transport
from nbdkitpy.server.session import Session
from nbdkitpy.server.transport import SocketTransport, describe_client
from nbdkitpy.server.uri import make_uri
from nbdkitpy.stack import Stack

if TYPE_CHECKING:
    from nbdkitpy.server.notify import Notifier

__all__ = ["Server"]

#: Out of descriptors or memory: seconds without accepting, and seconds between two lines about it in the log.
_BREATHER = 0.1
_COMPLAINT_INTERVAL = 1.0

#: Seconds that the main loop waits at most; poll takes some weeks, a deadline may be years away.
_LONGEST_WAIT = 3600.0

#: Errors of accept that are the client's and of no consequence.
_CLIENT_GONE = frozenset({errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO, errno.EPERM})

#: Seconds that aborted sessions have to end.
_GRACE = 2.0


class Server:
    """Listens, and serves clients from a stack. What backends see of it is :class:`~nbdkitpy.ServerControl`."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._log = logging.getLogger("nbdkitpy")
        self._listeners: list[Listener] = []
        self._clients = 0  # connections so far
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._handshakes: dict[Session, float] = {}  # unfinished ones and when they have to end, oldest first
        self._ended = threading.Condition(self._lock)  # a session has
        self._complained = 0.0

        #: The service manager's, if there is one: told how many clients there are, and that we do not hang.
        self.notifier: Notifier | None = None
        self._told_clients = -1
        self._next_alive = 0.0

        # What signal handlers and other threads set, and the pipe that wakes the main loop up to look at it.
        self._finishing = False
        self._stopping = False
        self._aborting = False
        self._calls: deque[Callable[[], object]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for fd in (self._wake_read, self._wake_write):
            weakref.finalize(self, os.close, fd)  # not in close(), after which a signal may still come

    # --- before and after ---

    def bind(self) -> None:
        """Begin to listen.

        Raises:
            ConfigError: that is not possible; the text says where and why.
        """
        self._listeners = listen(self.options.endpoints)
        for listener in self._listeners:
            listener.socket.setblocking(False)

    @property
    def listening(self) -> list[str]:
        """Where the server listens, for people."""
        return [str(listener) for listener in self._listeners]

    @property
    def port(self) -> int | None:
        """The TCP or vsock port of the first listener."""
        return self._listeners[0].port

    @property
    def unix_path(self) -> str | None:
        """The path of the Unix socket, if the first listener is one."""
        return self._listeners[0].unix_path

    @property
    def uri(self) -> str:
        """The NBD URI by which a client on this machine finds the server, or "" if somebody else chose the place."""
        first = self._listeners[0]
        if not first.is_ours:
            return ""
        name, path = self.options.export_name, first.unix_path
        host = first.host if first.transport is Transport.TCP else ""
        return make_uri(first.transport, name, port=first.port, unix_path=path, host=host)

    @property
    def wakeup_fd(self) -> int:
        """A descriptor that wakes the main loop up when something is written to it, for signal.set_wakeup_fd."""
        return self._wake_write

    def close(self) -> None:
        """Stop listening, and remove the sockets that were made."""
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    # --- from any thread, and from signal handlers ---

    def finish(self) -> None:
        """Accept no more clients, and end when the last of those that are connected has left."""
        self._finishing = True
        self._wake()

    def shutdown(self) -> None:
        """Begin an orderly shutdown: no new clients, and those that are connected may take their replies."""
        self._stopping = True
        self._wake()

    def abort(self) -> None:
        """End at once: all connections break."""
        self._aborting = True
        self.shutdown()

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the thread that accepts clients call `function`."""
        self._calls.append(function)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    # --- the main loop ---

    def serve(self, stack: Stack) -> bool:
        """Serve clients until :meth:`shutdown`; then end, in bounded time.

        Returns whether every session ended; one may be held up by a backend that does not return.
        """
        try:
            self._loop(stack, lambda: self._finishing)
        finally:
            self.close()
        self._log.debug("accepting no more clients")
        if self.notifier is not None:
            self.notifier.stopping()
        self._loop(stack, lambda: not self._sessions)
        return self._end_sessions()

    def _loop(self, stack: Stack, is_over: Callable[[], bool]) -> None:
        """Accept clients and do what is due, until `is_over` or the shutdown begins."""
        by_fd = {listener.socket.fileno(): listener.socket for listener in self._listeners}
        poll = select.poll()
        for fd in (self._wake_read, *by_fd):
            poll.register(fd, select.POLLIN)
        self._report()
        while not (self._stopping or is_over()):
            for fd, _ in poll.poll(self._until_next_deadline()):
                if fd in by_fd and not self._accept(by_fd[fd], stack):
                    self._take_a_breather()
            self._end_late_handshakes()
            self._drain_wakeups()
            while self._calls:
                self._calls.popleft()()
            self._report()

    def _accept(self, listening: socket.socket, stack: Stack) -> bool:
        """Accept one client; False if the system has no room for it now."""
        try:
            sock, _ = listening.accept()
        except OSError as error:
            if error.errno in _CLIENT_GONE:
                return True
            self._complain("cannot accept a client: %s", error.strerror)
            return False
        self._clients += 1
        try:
            transport, client = (
                SocketTransport(sock, keepalive=self.options.keepalive),
                describe_client(sock, self._clients),
            )
        except OSError as error:  # gone before it could be looked at
            self._log.info("connection %d: %s", self._clients, error)
            sock.close()
            return True
        return self._start(Session(transport, client, stack, self.options, self._log, self._established), sock)

    def _start(self, session: Session, sock: socket.socket) -> bool:
        thread = threading.Thread(target=self._run, args=(session,), name=session.name, daemon=True)
        with self._lock:
            self._sessions[session] = thread
            self._handshakes[session] = time.monotonic() + (self.options.handshake_timeout or float("inf"))
            crowded = len(self._handshakes) > self.options.max_handshakes
            oldest = next(iter(self._handshakes))
        if crowded:
            self._complain("too many unfinished handshakes, the oldest is closed: %s", oldest.name)
            self._established(oldest)
            oldest.abort()
        try:
            thread.start()
        except RuntimeError as error:
            self._forget(session)
            sock.close()
            self._complain("cannot serve a client: %s", error)
            return False
        return True

    def _run(self, session: Session) -> None:
        try:
            session.run()
        finally:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        with self._ended:
            self._handshakes.pop(session, None)
            self._sessions.pop(session, None)
            self._ended.notify_all()
        self._wake()  # to report it, or to end

    def _established(self, session: Session) -> None:
        with self._lock:
            self._handshakes.pop(session, None)

    # --- deadlines ---

    def _until_next_deadline(self) -> float | None:
        """Milliseconds until there is something to do without anybody asking for it; None if there is nothing."""
        with self._lock:
            deadline = next(iter(self._handshakes.values()), float("inf"))
        if self.notifier is not None and self.notifier.watchdog_interval is not None:
            deadline = min(deadline, self._next_alive)
        if deadline == float("inf"):
            return None
        # A little late rather than a little early, which would mean to come back at once.
        return max(0.0, min(deadline - time.monotonic(), _LONGEST_WAIT) * 1000 + 1)

    def _report(self) -> None:
        """Tell the service manager what it wants to know, when there is something new."""
        notifier = self.notifier
        if notifier is None:
            return
        clients = len(self._sessions)
        if clients != self._told_clients:
            self._told_clients = clients
            notifier.status("1 client is connected" if clients == 1 else f"{clients} clients are connected")
        now = time.monotonic()
        if notifier.watchdog_interval is not None and now >= self._next_alive:
            self._next_alive = now + notifier.watchdog_interval
            notifier.alive()

    def _end_late_handshakes(self) -> None:
        now = time.monotonic()
        with self._lock:
            late = [session for session, deadline in self._handshakes.items() if deadline <= now]
            for session in late:
                del self._handshakes[session]
            # Who waits for a backend, or for its turn with one, is not late: the time begins anew.
            waiting = [session for session in late if session.waits_for_backend]
            self._handshakes.update(dict.fromkeys(waiting, now + self.options.handshake_timeout))
        for session in late:
            if session in waiting:
                continue
            self._log.error("%s: handshake not finished in time, closed", session.name)
            session.abort()

    def _take_a_breather(self) -> None:
        """Leave clients in the queue for a moment, as there is no room; but wake up for a shutdown."""
        poll = select.poll()  # select.select cannot take a descriptor of 1024 or more
        poll.register(self._wake_read, select.POLLIN)
        poll.poll(_BREATHER * 1000)

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)

    def _complain(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._complained >= _COMPLAINT_INTERVAL:
            self._complained = now
            self._log.error(message, *args)

    # --- the end ---

    def _end_sessions(self) -> bool:
        """Let sessions finish what they are at, break those that do not in time."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.stop()
        self._wait_for_sessions(self.options.drain)
        with self._lock:
            left = list(self._sessions)
        for session in left:
            session.abort()
        self._aborting = False
        self._wait_for_sessions(_GRACE)
        with self._lock:
            stuck = [session.name for session in self._sessions]
        if stuck:
            self._log.error("still held up in the backend, abandoned: %s", ", ".join(stuck))
        return not stuck

    def _wait_for_sessions(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._ended:
            while self._sessions and not self._aborting and time.monotonic() < deadline:
                # In short steps, since a signal handler may not take the lock to notify us.
                self._ended.wait(min(0.05, max(0.0, deadline - time.monotonic())))
                self._report()

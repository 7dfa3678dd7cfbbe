"""The server: accepts clients, gives each a thread, and ends in bounded time."""

from __future__ import annotations

import socket
import threading
import time

from nbdkitpy.server.front import Front
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.session import Session
from nbdkitpy.server.transport import SocketTransport, describe_client
from nbdkitpy.stack import Stack

__all__ = ["GRACE", "Server"]

#: Seconds that aborted sessions have to end.
GRACE = 2.0


class Server(Front):
    """Listens, and serves clients from a stack. What backends see of it is :class:`~nbdkitpy.ServerControl`."""

    #: Whether the layers have let clients in before they come here.
    _are_admitted = False

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._handshakes: dict[Session, float] = {}  # unfinished ones and when they have to end, oldest first

    def _take(self, sock: socket.socket, number: int, stack: Stack) -> bool:
        try:
            transport, client = (
                SocketTransport(sock, keepalive=self.options.keepalive),
                describe_client(sock, number),
            )
        except OSError as error:  # gone before it could be looked at
            self._log.info("connection %d: %s", number, error)
            sock.close()
            self._has_left()
            return True
        session = Session(
            transport,
            client,
            stack,
            self.options,
            self._log,
            self._established,
            self.tls,
            is_admitted=self._are_admitted,
        )
        return self._start(session, sock)

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
        except (RuntimeError, MemoryError) as error:  # the system has no room for one more
            sock.close()
            self._forget(session)
            self._complain("cannot serve a client: %s", str(error) or "no memory")
            return False
        return True

    def _run(self, session: Session) -> None:
        try:
            session.run()
        finally:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        with self._lock:
            self._handshakes.pop(session, None)
            self._sessions.pop(session, None)
        self._has_left()

    def _has_left(self) -> None:
        """Take note that one client fewer is there, in its own thread."""
        self._wake()  # to report it, or to end

    def _established(self, session: Session) -> None:
        with self._lock:
            self._handshakes.pop(session, None)

    def _connected(self) -> int:
        return len(self._sessions)

    # --- deadlines ---

    def _next_deadline(self) -> float:
        with self._lock:
            handshake = next(iter(self._handshakes.values()), float("inf"))
        return min(handshake, super()._next_deadline())

    def _do_what_is_due(self) -> None:
        """End late handshakes."""
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

    # --- the end ---

    def _end(self) -> bool:
        """Let sessions finish what they are at, break those that do not in time."""
        for session in self._left():
            session.stop()
        self._wait_until(lambda: self._aborting or not self._sessions, self.options.drain)
        for session in self._left():
            session.abort()
        self._wait_until(lambda: not self._sessions, GRACE)
        stuck = [session.name for session in self._left()]
        if stuck:
            self._log.error("still held up in the backend, abandoned: %s", ", ".join(stuck))
        return not stuck

    def _left(self) -> list[Session]:
        with self._lock:
            return list(self._sessions)

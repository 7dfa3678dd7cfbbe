"""The server: accepts clients, gives each a thread, and ends in bounded time."""

from __future__ import annotations

import math
import socket
import threading
import time

from nbdkitpy.backend import Client
from nbdkitpy.server.budget import Memory
from nbdkitpy.server.connections import Connections
from nbdkitpy.server.front import Front
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.session import Session
from nbdkitpy.server.transport import SocketTransport, describe_client
from nbdkitpy.stack import Stack

__all__ = ["GRACE", "LEAVING", "Server"]

#: Seconds that aborted sessions have to end.
GRACE = 2.0

#: So many that had to give way may not have gone yet; with more, clients wait in the queue of the socket for a moment.
LEAVING = 100


class Server(Front):
    """Listens, and serves clients from a stack. What backends see of it is :class:`~nbdkitpy.ServerControl`."""

    #: Whether the layers have let clients in before they come here.
    _are_admitted = False

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._connections: Connections[Session] = Connections()
        self._memory = Memory(options.max_buffered, patience=options.stall_timeout, wake=self._wake)

    def _has_room(self) -> bool:
        # Those that have to give way are not counted, but need a moment to go.
        most = self.options.max_connections
        return not most or len(self._sessions) < most + LEAVING

    def _take(self, sock: socket.socket, number: int, stack: Stack) -> bool:
        try:
            client = describe_client(sock, number)
            refusal = self._connections.refusal(client, self.options)
            if refusal is None:
                return self._start(SocketTransport(sock, keepalive=self.options.keepalive), client, stack)
            self._complain("%s: %s is disconnected", refusal, client)
        except OSError as error:  # gone before it could be looked at
            self._log.info("connection %d: %s", number, error)
        sock.close()
        self._has_left(number)
        return True

    def _start(self, transport: SocketTransport, client: Client, stack: Stack) -> bool:
        session = Session(
            transport,
            client,
            stack,
            self.options,
            self._log,
            self._established,
            self.tls,
            is_admitted=self._are_admitted,
            memory=self._memory,
        )
        thread = threading.Thread(target=self._run, args=(session,), name=session.name, daemon=True)
        with self._lock:
            self._sessions[session] = thread
        self._connections.enter(session, client, time.monotonic() + (self.options.handshake_timeout or math.inf))
        self._make_room()
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:  # the system has no room for one more
            transport.close()
            self._forget(session)
            self._complain("cannot serve a client: %s", str(error) or "no memory")
            return False
        return True

    def _make_room(self) -> None:
        """Disconnect who has to give way to the newcomer."""
        displaced = self._connections.displaced(self.options)
        if displaced is not None:
            session, why = displaced
            self._complain("%s: %s", why, session.name)
            session.abort()

    def _run(self, session: Session) -> None:
        try:
            session.run()
        finally:
            self._forget(session)

    def _forget(self, session: Session) -> None:
        self._connections.leave(session)
        with self._lock:
            self._sessions.pop(session, None)
        self._has_left(session.number)

    def _has_left(self, number: int) -> None:
        """Take note, in its own thread, that a client has gone."""
        self._wake()  # to report it, or to end

    def _established(self, session: Session) -> None:
        self._connections.established(session)

    def _connected(self) -> int:
        return len(self._sessions)

    # --- deadlines ---

    def _next_deadline(self) -> float:
        return min(self._connections.deadline, self._memory.deadline, super()._next_deadline())

    def _do_what_is_due(self) -> None:
        self._end_late_handshakes()
        if self._memory.is_short:
            self._end_stalled()

    def _end_late_handshakes(self) -> None:
        now = time.monotonic()
        # Who waits for a backend, or for its turn with one, is not late: the time begins anew.
        anew = now + self.options.handshake_timeout
        for session in self._connections.late(now, lambda session: session.waits_for_backend, anew):
            self._log.error("%s: handshake not finished in time, closed", session.name)
            session.abort()

    def _end_stalled(self) -> None:
        """Disconnect clients that keep memory for which others wait: as many as it takes, who has most first."""
        overdue = self._memory.overdue(time.monotonic())
        sessions = {session.budget: session for session in self._left()} if overdue else {}
        wanted = self._memory.wanted
        for budget in overdue:
            session = sessions.get(budget)
            if wanted > 0 and session is not None and session.waits_for_client:
                wanted -= budget.drawn
                self._log.error("%s: keeps memory that others wait for, and is disconnected", session.name)
                session.abort()

    # --- the end ---

    def _end(self) -> bool:
        """Let sessions finish what they are at, break those that do not in time."""
        for session in self._left():
            session.stop()
        self._wait_until(lambda: self._aborting or not self._sessions, self.options.drain)
        for session in self._left():
            session.give_up()
        self._wait_until(lambda: not self._sessions, GRACE)
        stuck = [session.name for session in self._left()]
        if stuck:
            self._log.error("still held up in the backend, abandoned: %s", ", ".join(stuck))
        return not stuck

    def _left(self) -> list[Session]:
        with self._lock:
            return list(self._sessions)

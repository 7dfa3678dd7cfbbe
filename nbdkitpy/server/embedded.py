"""A server within another program, of whose process it takes nothing."""

from __future__ import annotations

import errno
import functools
import os
import socket
import threading
import weakref
from collections import deque

from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.service import Server
from nbdkitpy.server.session import Session
from nbdkitpy.stack import Stack

__all__ = ["Embedded"]


class Embedded(Server):
    """Listens and serves as any server does, in a thread that is not the main one; clients may come by :meth:`connect`.

    The umask, signals and standard streams are left alone. :meth:`free` follows :meth:`close`.
    """

    def __init__(self, options: ServerOptions) -> None:
        super().__init__(options)
        self._gate = threading.Lock()  # held to let somebody in, and to close
        self._is_open = True
        self._arrivals: deque[socket.socket] = deque()
        self._threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # of sessions, maybe also of former ones

    @property
    def uri(self) -> str:
        return super().uri if self._listeners else ""

    @property
    def port(self) -> int | None:
        return super().port if self._listeners else None

    @property
    def unix_path(self) -> str | None:
        return super().unix_path if self._listeners else None

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return self._connected()

    def bind(self, umask: int | None = None) -> None:
        super().bind(umask)

    def connect(self, stack: Stack) -> socket.socket:
        """Return a socket, at the other end of which a client is served: there needs to be no listener.

        Args:
            stack: What is served.

        Raises:
            ConnectionRefusedError: no more clients are accepted.
        """
        ours, theirs = socket.socketpair()
        with self._gate:
            if self._is_open and not (self._stopping or self._finishing):
                self._arrivals.append(ours)
                self.call_soon(functools.partial(self._take_arrival, stack))
                return theirs
        ours.close()
        theirs.close()
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    def _take_arrival(self, stack: Stack) -> None:
        sock = self._arrivals.popleft()
        if self._finishing:
            sock.close()
            return
        self._accepted += 1
        self._take(sock, self._accepted, stack)

    def _run(self, session: Session) -> None:
        self._threads.add(threading.current_thread())
        super()._run(session)

    def serve(self, stack: Stack) -> bool:
        try:
            return super().serve(stack)
        finally:
            self._shut()
            for thread in set(self._threads).difference(self._sessions.values()):
                thread.join()  # its session has ended, so it is about to

    def _shut(self) -> None:
        """Refuse who comes from now on, and who has come but has not been taken."""
        with self._gate:
            self._is_open = False
        for sock in self._arrivals:
            sock.close()
        self._arrivals.clear()
        self._calls.clear()  # they refer to the stack, which refers to us

    def free(self) -> None:
        """Free what :meth:`close` leaves for those who may still say something: they may, but nothing comes of it."""
        self._shut()
        self._wakeup.close()

"""The front of a server: the sockets that clients connect to, what it is told, and the loop that waits for both."""

from __future__ import annotations

import errno
import functools
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdkitpy.backend import SharedCount
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server.listener import UMASK, Listener, listen
from nbdkitpy.server.options import ServerOptions, Transport
from nbdkitpy.server.uri import make_uri
from nbdkitpy.server.wakeup import Wakeup
from nbdkitpy.stack import Stack

if TYPE_CHECKING:
    from nbdkitpy.server.notify import Notifier
    from nbdkitpy.server.tls import Tls

__all__ = ["Front", "described_clients"]

#: Out of descriptors or memory: seconds without accepting, and seconds between two lines about it in the log.
_BREATHER = 0.1
_COMPLAINT_INTERVAL = 1.0

#: Seconds that the main loop waits at most; poll takes some weeks, a deadline may be years away.
_LONGEST_WAIT = 3600.0

#: Errors of accept that are the client's and of no consequence.
_CLIENT_GONE = frozenset({errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO, errno.EPERM})

_NEVER = float("inf")


class Front:
    """Listens, and waits for clients; what becomes of them, and how they end, is a subclass's to say."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._log = logging.getLogger("nbdkitpy")
        self._listeners: list[Listener] = []
        self._accepted = 0  # connections so far
        self._complained = 0.0

        #: The service manager's, if there is one: told how many clients there are, and that we do not hang.
        self.notifier: Notifier | None = None
        #: By which clients may go over to TLS; None if they may not. Set before :meth:`serve`.
        self.tls: Tls | None = None
        self._told_clients = -1
        self._next_alive = 0.0

        # What signal handlers and other threads set, and the pipe that wakes the main loop up to look at it.
        self._finishing = False
        self._stopping = False
        self._aborting = False
        self._calls: deque[Callable[[], object]] = deque()
        self._wakeup = Wakeup()

        # What the main loop waits for, and what it does when that can be read.
        self._poll = select.poll()
        self._sources: dict[int, Callable[[], bool]] = {}
        self._poll.register(*self._wakeup.watch)

    # --- before and after ---

    def bind(self, umask: int | None = UMASK) -> None:
        """Begin to listen.

        Args:
            umask: As for :func:`listen`.

        Raises:
            ConfigError: that is not possible; the text says where and why.
        """
        self._listeners = listen(self.options.endpoints, umask)
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
        tls = self.tls.parameters if self.tls is not None and self.tls.mode is TlsMode.REQUIRE else None
        return make_uri(first.transport, name, port=first.port, unix_path=path, host=host, tls=tls)

    @property
    def wakeup_fd(self) -> int:
        """A descriptor that wakes the main loop up when something is written to it, for signal.set_wakeup_fd."""
        return self._wakeup.write_fd

    def close(self) -> None:
        """Stop listening, and remove the sockets that were made."""
        for listener in self._listeners:
            self._unwatch(listener.socket.fileno())
            listener.close()
        self._listeners = []

    def follow(self, fd: int) -> None:
        """Shut down when `fd` can be read: who has the other end closes it when the server is to end."""

        def end() -> bool:
            self._unwatch(fd)
            self.shutdown()
            return True

        self._watch(fd, end)

    def start_workers(self, live: Callable[[Callable[[Stack], bool]], int]) -> bool:
        """Start the processes that serve in place of this one, if there are to be any; tell whether there are."""
        return False

    def change_options(self, **changes: Any) -> None:
        """Set limits anew, for clients that come from now on; between two clients."""
        self.options = self.options._replace(**changes)

    def reloaded(self, stack: Stack) -> None:
        """Take note that live parameters of `stack`, or the log, have been read anew; between two clients."""

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

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        """Return a count, of this process alone as no other one serves."""
        from nbdkitpy.server.counts import LocalCount  # few units count

        return LocalCount(on_zero)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the thread that accepts clients call `function`."""
        self._calls.append(function)
        self._wake()

    def _wake(self) -> None:
        self._wakeup.set()

    # --- the main loop ---

    def serve(self, stack: Stack) -> bool:
        """Serve clients until :meth:`shutdown`; then end, in bounded time.

        Returns whether every connection ended; one may be held up by a backend that does not return.
        """
        for listener in self._listeners:
            self._watch(listener.socket.fileno(), functools.partial(self._accept, listener.socket, stack))
        try:
            self._serve_while(lambda: not self._finishing)
        finally:
            Front.close(self)  # the listeners alone, whatever else a subclass closes
        self._log.debug("accepting no more clients")
        if self.notifier is not None:
            self.notifier.stopping()
        self._serve_while(lambda: self._connected() > 0)
        return self._end()

    def _serve_while(self, condition: Callable[[], bool]) -> None:
        while not self._stopping and condition():
            self._wait()
            for _ in range(len(self._calls)):  # those that come meanwhile do not keep it from the rest
                self._calls.popleft()()

    def _wait_until(self, is_over: Callable[[], bool], seconds: float = _NEVER) -> None:
        """Do what is due, but for calls, until `is_over`; at most so many seconds."""
        deadline = time.monotonic() + seconds
        while not is_over() and time.monotonic() < deadline:
            self._wait(deadline)

    def _wait(self, deadline: float = _NEVER) -> None:
        """Wait until there is something to do, and do it."""
        self._report()
        for fd, _ in self._poll.poll(_milliseconds(min(deadline, self._next_deadline()))):
            source = self._sources.get(fd)  # none has the pipe, nor what is not watched any more
            if source is not None and not source():
                self._take_a_breather()
        self._wakeup.clear()
        self._do_what_is_due()
        self._report()

    def _watch(self, fd: int, ready: Callable[[], bool]) -> None:
        """Call `ready` whenever `fd` can be read; it returns False if the system has no room for more now."""
        self._sources[fd] = ready
        self._poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._sources.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _accept(self, listening: socket.socket, stack: Stack) -> bool:
        """Accept one client; False if there is no room for it now."""
        if not self._has_room():
            return False
        try:
            sock, _ = listening.accept()
        except OSError as error:
            if error.errno in _CLIENT_GONE:
                return True
            self._complain("cannot accept a client: %s", error.strerror)
            return False
        self._accepted += 1
        try:
            return self._take(sock, self._accepted, stack)
        except MemoryError:
            sock.close()
            self._complain("cannot serve a client: no memory")
            return False

    def _take_a_breather(self) -> None:
        """Leave clients in the queue for a moment, as there is no room; but wake up for a shutdown."""
        poll = select.poll()  # select.select cannot take a descriptor of 1024 or more
        poll.register(*self._wakeup.watch)
        poll.poll(_BREATHER * 1000)

    def _report(self) -> None:
        """Tell the service manager what it wants to know, when there is something new."""
        notifier = self.notifier
        if notifier is None:
            return
        self._report_clients(notifier)
        now = time.monotonic()
        if notifier.watchdog_interval is not None and now >= self._next_alive:
            self._next_alive = now + notifier.watchdog_interval
            notifier.alive()

    def _report_clients(self, notifier: Notifier) -> None:
        clients = self._connected()
        if clients != self._told_clients:
            self._told_clients = clients
            notifier.status(f"{described_clients(clients)} connected")

    def _complain(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._complained >= _COMPLAINT_INTERVAL:
            self._complained = now
            self._log.error(message, *args)

    # --- for subclasses ---

    def _has_room(self) -> bool:
        """Whether one more client could be served."""
        return True

    def _take(self, sock: socket.socket, number: int, stack: Stack) -> bool:
        """Serve the client at the other end of `sock`, or see to it; False if the system has no room for it now."""
        raise NotImplementedError

    def _connected(self) -> int:
        """How many clients there are."""
        raise NotImplementedError

    def _next_deadline(self) -> float:
        """When there is something to do without anybody asking for it."""
        if self.notifier is not None and self.notifier.watchdog_interval is not None:
            return self._next_alive
        return _NEVER

    def _do_what_is_due(self) -> None:
        """Do what nobody asks for."""

    def _end(self) -> bool:
        """Let clients finish what they are at, break those that do not in time; whether all have ended."""
        raise NotImplementedError


def described_clients(count: int) -> str:
    """Return the beginning of a sentence about so many clients."""
    return "1 client is" if count == 1 else f"{count} clients are"


def _milliseconds(deadline: float) -> float | None:
    """Milliseconds until then, as poll wants them."""
    if deadline == _NEVER:
        return None
    # A little late rather than a little early, which would mean to come back at once.
    return max(0.0, min(deadline - time.monotonic(), _LONGEST_WAIT) * 1000 + 1)

"""The server of ``-s``: one client, on standard input and output, which may be a socket or a pair of pipes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nbdkitpy.backend import Buffer, Client, SharedCount
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server.background import redirect_to_nothing
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.session import Session
from nbdkitpy.server.transport import (
    SocketTransport,
    describe_client,
    is_broken,
    is_full,
    send_by_reading,
    sleep_unless,
)
from nbdkitpy.server.wakeup import Wakeup
from nbdkitpy.stack import Stack

if TYPE_CHECKING:
    from nbdkitpy.server.notify import Notifier
    from nbdkitpy.server.tls import Tls

__all__ = ["PipeTransport", "Single"]

_logger = logging.getLogger("nbdkitpy")

#: The kernel takes at most so many pieces in one call (IOV_MAX on Linux).
_MOST_PIECES = 1024

#: Seconds that an aborted session has to end.
_GRACE = 2.0

#: Seconds that the main loop waits at most; poll takes some weeks.
_LONGEST_WAIT = 3600.0

_STDIN, _STDOUT, _STDERR = 0, 1, 2


# --- pipes ---


class PipeTransport:
    """Receives on one descriptor and sends on another, pipes for example; does for the engine what Transport does.

    Args:
        receiving: Descriptor, owned by the transport like `sending`.
        sending: It is made non-blocking, also for others who have it open, until :meth:`close`.
    """

    def __init__(self, receiving: int, sending: int) -> None:
        self._receiving = receiving
        self._sending = sending
        self._patience: float | None = None  # milliseconds
        self._stopped = Wakeup()
        self._aborted = Wakeup()
        self._was_blocking = os.get_blocking(sending)
        os.set_blocking(sending, False)  # else nothing could wake up who waits for the client to take replies

    def receive_into(self, buffer: memoryview | bytearray) -> int:
        """Fill `buffer` with what has arrived; 0 at the end.

        Raises:
            BlockingIOError: nothing came within the time of :meth:`set_patience`.
        """
        while True:
            ready = _wait(self._patience, (self._receiving, select.POLLIN), self._stopped.watch, self._aborted.watch)
            if self._aborted.is_set:
                return 0
            if self._receiving in ready:
                with contextlib.suppress(BlockingIOError):  # another process has got it
                    return os.readv(self._receiving, [buffer])
            elif self._stopped.is_set:
                return 0
            else:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    receive_soon = receive_into

    def set_patience(self, seconds: float) -> None:
        """Have receiving give up with BlockingIOError after so long; 0 is never."""
        self._patience = seconds * 1000 or None

    def send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None:
        """Send all pieces, in order.

        Raises:
            OSError: the client cannot be reached any more.
        """
        left = deque(memoryview(piece).cast("B") for piece in pieces if len(piece))
        while left:
            if self._aborted.is_set:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
            try:
                sent = os.writev(self._sending, [left[i] for i in range(min(len(left), _MOST_PIECES))])
            except BlockingIOError:
                _wait(None, (self._sending, select.POLLOUT), self._aborted.watch)
                continue
            _drop(left, sent)

    def send_file(self, head: bytes, fd: int, position: int, count: int) -> int:
        """Send `head`, then `count` bytes of a file; return how many of these went: fewer if the file has no more.

        Raises:
            OSError: the client cannot be reached any more.
        """
        self.send([head], more=True)
        return send_by_reading(self.send, fd, position, count)

    def is_gone(self) -> bool:
        """Tell whether the client hears nothing any more."""
        return self._aborted.is_set or is_broken(self._sending)

    def is_full(self) -> bool:
        """Tell whether nothing can be sent before the client has taken something."""
        return is_full(self._sending)

    def send_now(self, data: bytes) -> None:
        """Send what can be sent without waiting, and do not care for the rest."""
        with contextlib.suppress(OSError):
            os.write(self._sending, data)

    def sleep(self, seconds: float) -> None:
        """Wait, in any thread.

        Raises:
            OSError: ESHUTDOWN, as soon as the client has hung up, or :meth:`stop_receiving` or :meth:`abort` is called.
        """
        # What is asked of the pipes is nothing; that the other end is closed is told all the same.
        sleep_unless(seconds, (self._receiving, 0), (self._sending, 0), self._stopped.watch, self._aborted.watch)

    def stop_receiving(self) -> None:
        """Have the receiving thread find the end of the stream, after what has already arrived."""
        self._stopped.set()

    def abort(self) -> None:
        """Break the connection: whoever waits to send or to receive finds out at once."""
        self._aborted.set()

    def close(self) -> None:
        """End the connection and free the descriptors. Only :meth:`abort` and the like may be called after this."""
        self.abort()
        receiving, self._receiving = self._receiving, -1
        sending, self._sending = self._sending, -1
        if sending >= 0:
            os.set_blocking(sending, self._was_blocking)
            os.close(sending)
            os.close(receiving)


def _wait(milliseconds: float | None, *watched: tuple[int, int]) -> set[int]:
    """Wait until one of the descriptors is ready for the events given with it, or is broken; return which are."""
    poll = select.poll()
    for fd, events in watched:
        poll.register(fd, events)
    return {fd for fd, _ in poll.poll(milliseconds)}


def _drop(pieces: deque[memoryview], sent: int) -> None:
    """Take the first `sent` bytes away."""
    while pieces and sent >= len(pieces[0]):
        sent -= len(pieces.popleft())
    if sent:
        pieces[0] = pieces[0][sent:]


# --- the server ---


class Single:
    """Serves the client on standard input and output, and ends with it. It can be launched like a server that listens.

    Make it before any code of a unit runs: from then on standard input is empty, and standard output is not the
    client's, so that whatever a unit prints does no harm.

    Raises:
        ConfigError: standard input is a socket on which no client can be served.
    """

    uri = ""
    listening: Sequence[str] = ()
    port: int | None = None
    unix_path: str | None = None

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self.notifier: Notifier | None = None
        self.tls: Tls | None = None
        self._connection = _take_standard_streams()

        # What signal handlers and the session's thread set for the main loop.
        self._wake = Wakeup()
        self.wakeup_fd = self._wake.write_fd
        self._stopping = False
        self._aborting = False
        self._established = False
        self._ended = False
        self._calls: deque[Callable[[], object]] = deque()

    def bind(self) -> None:
        """Do nothing: the client is there."""

    def start_workers(self, live: Callable[[Callable[[Stack], bool]], int]) -> bool:
        """Start none: this process serves."""
        return False

    def close(self) -> None:
        """Leave the client, if it has not been served."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # --- from any thread, and from signal handlers ---

    def finish(self) -> None:
        """Do nothing: there is one client, and we end when it leaves."""

    def shutdown(self) -> None:
        """Begin an orderly shutdown: the client may take its replies."""
        self._stopping = True
        self._wake.set()

    def abort(self) -> None:
        """End at once: the connection breaks."""
        self._aborting = True
        self.shutdown()

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        """Return a count, of this process alone as no other one serves."""
        from nbdkitpy.server.counts import LocalCount  # few units count

        return LocalCount(on_zero)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have the thread that serves, which is not that of the session, call `function`."""
        self._calls.append(function)
        self._wake.set()

    def change_options(self, **changes: Any) -> None:
        """Do nothing: what may change is about clients that come."""

    def reloaded(self, stack: Stack) -> None:
        """Do nothing: no other process serves."""

    # --- the main loop ---

    def serve(self, stack: Stack) -> bool:
        """Serve the client until it leaves, or until :meth:`shutdown`; then end, in bounded time.

        Returns whether the session ended; it may be held up by a backend that does not return.
        """
        connection, self._connection = self._connection, None
        assert connection is not None, "there is one client only"
        session = connection.session(stack, self._options, self._on_established, self.tls)
        thread = threading.Thread(target=self._run, args=(session,), name=session.name, daemon=True)
        thread.start()
        self._watch_handshake(session)
        self._wait_until(lambda: self._ended or self._stopping)
        if self.notifier is not None:
            self.notifier.stopping()
        self._end_session(session)
        if self._ended:
            thread.join()
        return self._ended

    def _run(self, session: Session) -> None:
        try:
            session.run()
        finally:
            self._ended = True
            self._wake.set()

    def _on_established(self, session: Session) -> None:
        self._established = True
        self._wake.set()

    def _watch_handshake(self, session: Session) -> None:
        seconds = self._options.handshake_timeout or float("inf")
        while not self._wait_until(lambda: self._established or self._ended or self._stopping, seconds):
            if not session.waits_for_backend:  # else the client is not late: its time begins anew
                _logger.error("%s: handshake not finished in time, closed", session.name)
                session.abort()
                return

    def _end_session(self, session: Session) -> None:
        """Let the session finish what it is at, break the connection if it does not in time."""
        if not self._ended:
            session.stop()
            self._wait_until(lambda: self._ended or self._aborting, self._options.drain)
        if not self._ended:
            session.give_up()
            self._wait_until(lambda: self._ended, _GRACE)
        if not self._ended:
            _logger.error("still held up in the backend, abandoned: %s", session.name)

    def _wait_until(self, condition: Callable[[], bool], seconds: float = float("inf")) -> bool:
        """Wait for `condition`, and return whether it holds. Do meanwhile what :meth:`call_soon` asks for."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # A little late rather than a little early, which would mean to come back at once.
            _wait(min(left, self._report(), _LONGEST_WAIT) * 1000 + 1, self._wake.watch)
            self._wake.clear()
            for _ in range(len(self._calls)):
                self._calls.popleft()()
        return True

    def _report(self) -> float:
        """Tell the service manager that we do not hang, if it wants to know, and return when to do so again."""
        if self.notifier is None or self.notifier.watchdog_interval is None:
            return float("inf")
        self.notifier.alive()
        return self.notifier.watchdog_interval


# --- standard input and output ---


class _Socket:
    """A client at the other end of one socket, as inetd starts us."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def session(
        self, stack: Stack, options: ServerOptions, established: Callable[[Session], None], tls: Tls | None
    ) -> Session:
        transport = SocketTransport(self._socket, keepalive=options.keepalive)
        return Session(transport, describe_client(self._socket, 1), stack, options, _logger, established, tls)

    def close(self) -> None:
        self._socket.close()


class _Pipes:
    """A client at the other ends of two descriptors, of which nothing is known."""

    def __init__(self, receiving: int, sending: int) -> None:
        self._transport = PipeTransport(receiving, sending)

    def session(
        self, stack: Stack, options: ServerOptions, established: Callable[[Session], None], tls: Tls | None
    ) -> Session:
        return Session(self._transport, Client(1), stack, options, _logger, established, tls)

    def close(self) -> None:
        self._transport.close()


def _take_standard_streams() -> _Socket | _Pipes | None:
    """Move the client away from standard input and output, so that nobody else speaks with it."""
    sys.stdout.flush()
    receiving, sending = os.dup(_STDIN), os.dup(_STDOUT)
    # inetd makes the client's socket our standard error as well.
    talks_to_client = any(_is_same(_STDERR, fd) and not os.isatty(fd) for fd in (receiving, sending))
    redirect_to_nothing([_STDIN, *([_STDERR] if talks_to_client else [])])
    os.dup2(_STDERR, _STDOUT)
    if not (_is_same(receiving, sending) and stat.S_ISSOCK(os.fstat(receiving).st_mode)):
        return _Pipes(receiving, sending)
    os.close(sending)
    return _Socket(_checked(socket.socket(fileno=receiving)))


def _is_same(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def _checked(sock: socket.socket) -> socket.socket:
    what = ""
    if sock.type != socket.SOCK_STREAM:
        what = "no stream socket"
    elif sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        what = "a socket that listens (inetd: nowait; xinetd: wait = no; systemd: Accept=yes)"
    if what:
        sock.close()
        raise ConfigError(f"-s: standard input must be a connection with a client; it is {what}")
    return sock

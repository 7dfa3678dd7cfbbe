"""A connected stream socket, as the engine wants it: whole gather writes, and files sent without being copied."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nbdkitpy.backend import Buffer, Client, Family

__all__ = [
    "Connection",
    "SocketTransport",
    "Stream",
    "describe_client",
    "is_broken",
    "is_full",
    "send_by_reading",
    "sleep_unless",
]

#: The kernel takes at most so many pieces in one call (IOV_MAX on Linux).
_MOST_PIECES = 1024

#: What sendfile says of its socket; any other error is of the file.
_CONNECTION_ERRORS = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT}
)

#: Bytes of a file that are read at once, where the system cannot send it by itself.
_FILE_PIECE = 1 << 20

#: So many bytes that came after the client's last request are dropped at the end; with more it is not in earnest.
_MOST_UNREAD = 16 << 20
_UNREAD_PIECE = 64 << 10

_MAPPED = "::ffff:"  # before an IPv4 address, in dotted notation
#: Bytes that a Unix socket holds for the client. With the system's 208 KiB a large reply goes out in small steps, each
#: of which waits for the client: with this, reads of 1 MiB ran at 1.4 times the speed, at half the cost in CPU time.
_UNIX_SEND_BUFFER = 1 << 20

#: Milliseconds that poll can be told to wait at most, more or less; it takes an int of C.
_LONGEST_POLL = 2_000_000_000

#: To look so often whether something has come takes about as long as to fall asleep and be woken up.
_LOOKS = 30

#: Who said more within so many seconds, while we slept, is looked out for the next time.
_SOON = 100e-6

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SO_PEERSEC = 31  # Python does not name it
_FAMILIES = {
    socket.AF_INET: Family.INET,
    socket.AF_INET6: Family.INET6,
    socket.AF_UNIX: Family.UNIX,
    getattr(socket, "AF_VSOCK", None): Family.VSOCK,
}


class Stream(Protocol):
    """What an engine and its sender need of a connection; :class:`SocketTransport` says what each member does."""

    @property
    def receive_into(self) -> Callable[[memoryview], int]: ...
    def receive_soon(self, buffer: memoryview) -> int: ...
    def set_patience(self, seconds: float) -> None: ...
    def send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None: ...
    def send_file(self, head: bytes, fd: int, position: int, count: int) -> int: ...
    def is_gone(self) -> bool: ...
    def is_full(self) -> bool: ...
    def stop_receiving(self) -> None: ...
    def abort(self) -> None: ...
    def close(self) -> None: ...


class Connection(Stream, Protocol):
    """What a session begins with: a stream in clear text, over which there may be TLS later."""

    def send_now(self, data: bytes) -> None: ...
    def sleep(self, seconds: float) -> None: ...


class SocketTransport:
    """Sends and receives on `sock`, which it owns. One thread receives; who sends holds the lock of the sender."""

    def __init__(self, sock: socket.socket, *, keepalive: bool = False) -> None:
        self._socket = sock
        self._ending = threading.Lock()  # so that no other thread ends what has got our descriptor's number next
        sock.setblocking(True)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if keepalive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_SEND_BUFFER)
        #: Fill a buffer with what has arrived; 0 at the end. Raises BlockingIOError after :meth:`set_patience`.
        self.receive_into = sock.recv_into
        self._is_quick = False  # the client, at saying more

    def receive_soon(self, buffer: memoryview) -> int:
        """As :attr:`receive_into`, from a client that waits for each reply before it says more.

        One that has been quick at that is looked out for before this thread sleeps: to fall asleep and to be woken up
        takes longer than what such a client asks for.
        """
        receive = self.receive_into
        for _ in range(_LOOKS if self._is_quick else 0):
            try:
                return receive(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:  # noqa: PERF203  # there is nothing to do but to look again
                continue
        begin = time.perf_counter()
        try:
            return receive(buffer)
        finally:
            self._is_quick = time.perf_counter() - begin < _SOON

    def set_patience(self, seconds: float) -> None:
        """Have receiving give up with BlockingIOError after so long, at no cost to each call; 0 is never."""
        whole = int(seconds)
        timeval = struct.pack("@ll", whole, int((seconds - whole) * 1_000_000))
        # Under the name of another family, as Python takes nothing but numbers for options of vsock.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self._socket.fileno())
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        finally:
            sock.detach()
            self._socket.setblocking(True)  # a default timeout, which a unit may have set, has just undone that

    def send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None:
        """Send all pieces, in order; `more` says that what follows belongs in the same packet."""
        flags = socket.MSG_MORE if more else 0
        if len(pieces) == 1:
            sent = self._socket.send(pieces[0], flags)
            if sent != len(pieces[0]):
                self._send_rest(pieces, sent)
            return
        for first in range(0, len(pieces), _MOST_PIECES):
            some = pieces[first : first + _MOST_PIECES] if len(pieces) > _MOST_PIECES else pieces
            sent = self._socket.sendmsg(some, (), flags)
            if sent != sum(map(len, some)):
                self._send_rest(some, sent)

    def _send_rest(self, pieces: Sequence[Buffer], sent: int) -> None:
        for piece in pieces:
            if sent < len(piece):
                self._socket.sendall(memoryview(piece)[sent:])
            sent = max(0, sent - len(piece))

    def send_file(self, head: bytes, fd: int, position: int, count: int) -> int:
        """Send `head`, then `count` bytes of a file; return how many of these went: fewer if the file has no more.

        Raises:
            OSError: the connection is broken.
        """
        sock = self._socket
        sent = sock.send(head, socket.MSG_MORE)
        if sent != len(head):
            sock.sendall(head[sent:], socket.MSG_MORE)
        out = sock.fileno()
        left = count
        while left:
            try:
                sent = os.sendfile(out, fd, position, left)
            except OSError as error:
                if error.errno in _CONNECTION_ERRORS:
                    raise
                break
            if not sent:
                break
            position += sent
            left -= sent
        return count - left

    def is_full(self) -> bool:
        """Tell whether nothing can be sent before the client has taken something. From any thread."""
        with self._ending:
            return is_full(self._socket.fileno())

    def sleep(self, seconds: float) -> None:
        """Wait, in any thread.

        Raises:
            OSError: ESHUTDOWN, as soon as the client has hung up, or :meth:`stop_receiving` or :meth:`abort` is called.
        """
        sleep_unless(seconds, (self._socket.fileno(), select.POLLRDHUP))  # which our own shutdowns bring about too

    def is_gone(self) -> bool:
        """Tell whether the client hears nothing any more. Who has only said all that he had to say may listen still."""
        return is_broken(self._socket.fileno())

    def send_now(self, data: bytes) -> None:
        """Send what can be sent without waiting, and do not care for the rest."""
        with contextlib.suppress(OSError):
            self._socket.send(data, socket.MSG_DONTWAIT)

    def stop_receiving(self) -> None:
        """Have the receiving thread find the end of the stream, after what has already arrived."""
        self._shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        """Break the connection: whoever waits to send or to receive finds out at once."""
        self._shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and free the descriptor. Only :meth:`abort` and the like may be called after this."""
        self.abort()
        self._drop_unread()
        with self._ending:
            self._socket.close()

    def _shutdown(self, how: int) -> None:
        with self._ending, contextlib.suppress(OSError):
            self._socket.shutdown(how)

    def _drop_unread(self) -> None:
        """Read what the client has sent that nobody wants: TCP takes replies back if that is there at the end."""
        with contextlib.suppress(OSError):
            for _ in range(_MOST_UNREAD // _UNREAD_PIECE):
                if not self._socket.recv(_UNREAD_PIECE, socket.MSG_DONTWAIT):
                    return


def is_broken(fd: int) -> bool:
    """Tell whether the other end of a connection or pipe is closed, as far as the system knows."""
    poll = select.poll()
    poll.register(fd, 0)  # that is told all the same
    return bool(poll.poll(0))


def sleep_unless(seconds: float, *watched: tuple[int, int]) -> None:
    """Wait, unless one of these descriptors is ready for the events of poll given with it, or broken.

    Raises:
        OSError: ESHUTDOWN, one of them was or became so.
    """
    poll = select.poll()
    for fd, events in watched:
        poll.register(fd, events)
    deadline = time.monotonic() + seconds
    left = seconds
    while True:
        milliseconds = min(max(int(left * 1000), 0), _LONGEST_POLL)
        if poll.poll(milliseconds):
            raise OSError(errno.ESHUTDOWN, "the connection is at its end")
        left = deadline - time.monotonic()
        if left < 0.001:  # which poll cannot do
            time.sleep(max(0.0, left))
            return


def is_full(fd: int) -> bool:
    """Tell whether a descriptor takes nothing now; one that has been closed, -1, has no need to."""
    if fd < 0:
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return not poll.poll(0)


def send_by_reading(send: Callable[[Sequence[Buffer]], None], fd: int, position: int, count: int) -> int:
    """Send `count` bytes of a file by `send`, and return how many went: fewer only if no more can be had of the file.

    Raises:
        OSError: of `send`.
    """
    end = position + count
    while position < end:
        try:
            data = os.pread(fd, min(end - position, _FILE_PIECE), position)
        except OSError:
            break
        if not data:
            break
        send([data])
        position += len(data)
    return count - (end - position)


def describe_client(sock: socket.socket, number: int) -> Client:
    """Return what the system knows of the peer of `sock`. What it does not know stays None."""
    family = _FAMILIES.get(sock.family, Family.UNKNOWN)
    try:
        name = sock.getpeername()
    except OSError:  # it has gone already
        return Client(number, Family.UNKNOWN)
    label = _security_label(sock)
    if family is Family.UNIX:
        pid, uid, gid = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        known = {name: value for name, value in (("pid", pid), ("uid", uid), ("gid", gid)) if value >= 0}
        return Client(number, family, security_label=label, **known)
    if family is Family.VSOCK:
        return Client(number, family, cid=name[0], port=name[1], security_label=label)
    if family is Family.UNKNOWN:
        return Client(number, family)
    address = name[0].partition("%")[0]
    if family is Family.INET6 and address.startswith(_MAPPED):  # an IPv4 client of a socket for both
        family, address = Family.INET, address.removeprefix(_MAPPED)
    return Client(number, family, address=address, port=name[1], security_label=label)


def _security_label(sock: socket.socket) -> str | None:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERSEC, 256).rstrip(b"\0").decode("utf-8", "backslashreplace")
    except OSError:  # no security module that labels sockets
        return None

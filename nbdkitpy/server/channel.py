"""What the main process and a worker say to each other, and hand to each other."""

from __future__ import annotations

import enum
import select
import socket
import struct
from typing import NamedTuple

__all__ = ["Channel", "Kind", "Message"]

_MESSAGE = struct.Struct("=BQ")  # kind, number
_DESCRIPTOR = struct.Struct("i")


class Kind(enum.IntEnum):
    """What a message is about."""

    # From the main process.
    CLIENT = 1  #: with a client's number, and its socket
    RELOAD = 2  #: with a file that says which live parameters have changed
    STOP = 3  #: the shutdown begins
    ABORT = 4  #: end at once
    DROP = 5  #: with the number of a client, which has to give way to another one

    # From a worker.
    READY = 6  #: clients may come
    ESTABLISHED = 7  #: with the number of a client, which has finished the handshake
    LEFT = 8  #: with the number of a client, which has gone
    DONE = 9  #: no client is there any more, and the layers are being told of the end
    FINISH = 10  #: a layer asks the server to finish
    SHUTDOWN = 11  #: a layer asks the server to shut down


class Message(NamedTuple):
    """One message. Its descriptor, if there is one, belongs to who has received it."""

    kind: Kind
    number: int
    fd: int | None


class Channel:
    """One end of a connection between two of our processes: messages arrive whole, or not at all.

    Args:
        sock: It keeps the borders of messages; owned by the channel.
        waits: Whether :meth:`send` waits for room. Several threads may send.
    """

    def __init__(self, sock: socket.socket, *, waits: bool) -> None:
        self._socket = sock
        sock.setblocking(True)  # whatever default timeout a unit may have set
        self._flags = 0 if waits else socket.MSG_DONTWAIT

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return the end of the main process, which never waits, and that of a worker.

        Raises:
            OSError: the system has no room for it.
        """
        main, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(main, waits=False), cls(worker, waits=True)

    def fileno(self) -> int:
        """Return the descriptor, to wait for messages."""
        return self._socket.fileno()

    def has_room(self) -> bool:
        """Tell whether there is room for more than one message."""
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(0))

    def send(self, kind: Kind, number: int = 0, fd: int | None = None) -> None:
        """Send one message; a copy of `fd` goes with it.

        Raises:
            OSError: the other end is not there any more, or there is no room.
        """
        passed = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))]
        self._socket.sendmsg([_MESSAGE.pack(kind, number)], passed, self._flags)

    def receive(self) -> Message | None:
        """Return the next message, None at the end. A descriptor for which this process has no room is missing.

        Raises:
            BlockingIOError: there is none now.
        """
        # Not by socket.recv_fds, which does not pass these flags on.
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            data, passed, _, _ = self._socket.recvmsg(_MESSAGE.size, socket.CMSG_SPACE(_DESCRIPTOR.size), flags)
        except ConnectionResetError:  # the other end was closed with messages unread
            return None
        if not data:
            return None
        kind, number = _MESSAGE.unpack(data)
        fd = next((_DESCRIPTOR.unpack(content)[0] for _, _, content in passed if content), None)
        return Message(Kind(kind), number, fd)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

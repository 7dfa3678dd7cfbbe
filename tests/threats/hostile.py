"""Servers in processes of their own, what they take of the machine, and clients that mean them no good."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from nbdkitpy.protocol.constants import Command
from tests.interop.harness import Server
from tests.nbdclient import PATIENCE, NbdClient

OPTION_MAGIC = b"IHAVEOPT"

MIB = 1 << 20


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """An option whose length may be a lie."""
    return struct.pack(">8sII", OPTION_MAGIC, number, len(data) if length is None else length) + data


def meta_data(name: bytes = b"") -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    query = b"base:allocation"
    return struct.pack(f">I{len(name)}sII", len(name), name, 1, len(query)) + query


class Clients:
    """Clients of one server, which are gone at the end.

    Args:
        server: To whom they connect.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._all: list[NbdClient] = []

    def dial(self, *, greeted: bool = False) -> NbdClient:
        """Return a client that has connected, and has taken the greeting if `greeted`."""
        client = NbdClient(self._server.connect())
        self._all.append(client)
        if greeted:
            client.greet()
        return client

    def connect(self) -> NbdClient:
        """Return a client with the handshake behind it, for the server as well."""
        client = self.dial().negotiate()
        client.read(0, 1)
        return client

    def leave(self) -> None:
        """Close all connections."""
        for client in self._all:
            client.socket.close()
        self._all.clear()


@contextmanager
def clients_of(server: Server) -> Iterator[Clients]:
    """Make clients, and see that they leave."""
    clients = Clients(server)
    try:
        yield clients
    finally:
        clients.leave()


# --- what a server takes ---


def status_of(server: Server, key: str) -> int:
    """Return what the system says of its process; memory in bytes."""
    with open(f"/proc/{server.pid}/status", encoding="ascii") as lines:
        (line,) = (line for line in lines if line.startswith(f"{key}:"))
    value = line.split()
    return int(value[1]) * (1024 if value[-1] == "kB" else 1)


def memory_of(server: Server) -> int:
    """Return how much memory it has now, in bytes."""
    return status_of(server, "VmRSS")


def peak_of(server: Server) -> int:
    """Return how much memory it had at most since it began."""
    return status_of(server, "VmHWM")


def processor_time_of(server: Server) -> float:
    """Return how much processor time it has had, in seconds."""
    with open(f"/proc/{server.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors_of(server: Server) -> int:
    """Return how many descriptors it has."""
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def within(seconds: float, condition: Callable[[], bool], client: NbdClient | None = None) -> bool:
    """Tell whether `condition` comes to hold in time. Between two looks at it, `client` is served by the server."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        if client is not None:
            client.read(0, 1)
        pause(0.02)
    return True


def time_of(action: Callable[[], object]) -> float:
    """Return how many seconds it takes."""
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def pause(seconds: float) -> None:
    """Let so much time go by, where the time itself is what a test is about: nothing else can be waited for."""
    select.poll().poll(seconds * 1000)


# --- what clients do ---


def header(command: int, length: int, cookie: int = 1) -> bytes:
    """Return a request for so many bytes from the beginning of the disk."""
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, 0, length)


def ask_without_reading(client: NbdClient, count: int, length: int) -> None:
    """Send so many READs, and take no reply."""
    client.send_bytes(b"".join(header(Command.READ, length, cookie) for cookie in range(count)))


def send_what_goes(clients: Iterable[NbdClient], pieces: Iterable[bytes], quiet: float = 0.3) -> int:
    """Send `pieces` to each of the clients' servers as long as any of them takes something; return how many bytes went.

    Args:
        quiet: Seconds after which it is taken that no more goes.
    """
    data = memoryview(b"".join(pieces))
    left = {client.socket.fileno(): (client.socket, data) for client in clients}
    poll = select.poll()
    for fd, (sock, _) in left.items():
        sock.setblocking(False)
        poll.register(fd, select.POLLOUT)
    total = 0
    while left and (ready := poll.poll(quiet * 1000)):
        for fd, _ in ready:
            sent = _send_some(*left[fd])
            sock, rest = left[fd]
            left[fd] = (sock, rest[sent:])
            total += sent
            if not sent or sent == len(rest):
                poll.unregister(fd)
                del left[fd]
                sock.settimeout(PATIENCE)
    for sock, _ in left.values():
        sock.settimeout(PATIENCE)
    return total


def _send_some(sock: socket.socket, data: memoryview) -> int:
    try:
        return sock.send(data[:MIB])
    except OSError:  # the server has had enough
        return 0


def is_closed(client: NbdClient, seconds: float = PATIENCE) -> bool:
    """Tell whether the server closes the connection in time, whatever it sends before."""
    client.socket.settimeout(seconds)
    try:
        while client.socket.recv(MIB):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True

"""Servers and sessions within the tests' own process, and plugins for them to serve."""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from nbdkitpy import Client, Filter, Handle, Plugin, SharedCount, ThreadModel
from nbdkitpy.server.counts import LocalCount
from nbdkitpy.server.options import Endpoint, ServerOptions, Transport
from nbdkitpy.server.service import Server
from nbdkitpy.server.session import Session
from nbdkitpy.server.transport import SocketTransport, describe_client
from nbdkitpy.stack import Stack
from tests.nbdclient import PATIENCE, NbdClient, Style

SIZE = 1 << 20
CONTENT = random.Random(10809).randbytes(SIZE)


class Disk(Handle):
    """Reads as :data:`CONTENT`. Tests override what they are about."""

    def __init__(self, plugin: Disks) -> None:
        self.plugin = plugin

    def get_size(self) -> int:
        return SIZE

    def pread(self, count: int, offset: int) -> bytes:
        return CONTENT[offset : offset + count]

    def close(self) -> None:
        self.plugin.count_closed()


class Disks(Plugin):
    """Makes a handle for each client, and counts how many there were.

    Args:
        handle: Called with this plugin.
        model: The thread model.
    """

    name = "disks"

    def __init__(self, handle: Callable[[Disks], Handle] = Disk, model: ThreadModel = ThreadModel.PARALLEL) -> None:
        super().__init__()
        self._handle = handle
        self._model = model
        self._lock = threading.Lock()
        self.opened = 0
        self.closed = 0

    def thread_model(self) -> ThreadModel:
        return self._model

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        handle = self._handle(self)
        with self._lock:
            self.opened += 1
        return handle

    def count_closed(self) -> None:
        with self._lock:
            self.closed += 1


class NoServer:
    """For stacks that are served without a server."""

    def finish(self) -> None:
        raise AssertionError("nobody asked for it")

    def shutdown(self) -> None:
        raise AssertionError("nobody has to end the server")

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        return LocalCount(on_zero)


class AskedServer(NoServer):
    """Takes note of what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def shutdown(self) -> None:
        self.asked.append("shutdown")


def make_stack(plugin: Plugin, filters: Sequence[Filter] = (), server: Any = None) -> Stack:
    """Return a stack that is ready to be served."""
    stack = Stack(plugin, filters, server or NoServer())
    stack.load()
    stack.config_complete()
    stack.get_ready()
    stack.after_fork()
    return stack


class NotingServer(Server):
    """Lets tests wait for the end of sessions, and for what the main loop is woken for."""

    def __init__(self, options: ServerOptions) -> None:
        self.wakes = threading.Semaphore(0)
        super().__init__(options)
        self.ends = threading.Semaphore(0)

    def _wake(self) -> None:
        super()._wake()
        self.wakes.release()

    def _has_left(self, number: int) -> None:
        super()._has_left(number)
        self.ends.release()


class Running:
    """A server that listens and serves, in a thread of its own."""

    def __init__(self, plugin: Plugin, filters: Sequence[Filter], options: ServerOptions) -> None:
        self.server = NotingServer(options)
        self.stack = make_stack(plugin, filters, self.server)
        self.server.bind()
        self.path = self.server.unix_path or ""
        self.result: bool | None = None  #: of serve()
        self._thread = threading.Thread(target=self._serve, name="test server")
        self._clients: list[NbdClient] = []

    def begin(self) -> Running:
        """Begin to serve."""
        self._thread.start()
        return self

    def _serve(self) -> None:
        self.result = self.server.serve(self.stack)

    def dial(self) -> NbdClient:
        """Return a client that is connected, and has neither sent nor received anything."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(self.path)
        return self._known(NbdClient(sock))

    def connect(self, style: Style = Style.SIMPLE, *, name: str = "", contexts: bool = False) -> NbdClient:
        """Return a client with the handshake behind it."""
        return self.dial().negotiate(style, name=name, contexts=contexts)

    def _known(self, client: NbdClient) -> NbdClient:
        self._clients.append(client)
        return client

    def sessions(self) -> list[Session]:
        """Return those that have not ended, oldest first."""
        with self.server._lock:
            return list(self.server._sessions)

    def wait_for_sessions(self, count: int) -> None:
        """Wait until so few are left."""
        while len(left := self.sessions()) > count:
            assert self.server.ends.acquire(timeout=PATIENCE), f"{len(left)} sessions have not ended"

    def stop(self) -> bool:
        """End the server in order, and return whether all sessions have ended."""
        self.server.shutdown()
        return self.join()

    def join(self) -> bool:
        """Wait for the server to end, and return whether all sessions have."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "the server does not end"
        assert self.result is not None, "serve() raised"
        return self.result

    def finish(self) -> None:
        """Close the clients, end the server, and see that nothing is left of it."""
        for client in self._clients:
            client.socket.close()
        if self._thread.ident is not None:
            self.stop()
        self.server.close()
        self.stack.cleanup()
        self.stack.unload()


class Solo:
    """One session, on one end of a pair of sockets, and a client on the other."""

    def __init__(self, plugin: Plugin, filters: Sequence[Filter], options: ServerOptions) -> None:
        ours, theirs = socket.socketpair()
        self.client = NbdClient(theirs)
        self.stack = make_stack(plugin, filters)
        self.established = threading.Event()
        transport, log = SocketTransport(ours, keepalive=options.keepalive), logging.getLogger("nbdkitpy")
        self.session = Session(
            transport, describe_client(ours, 1), self.stack, options, log, lambda _: self.established.set()
        )
        self.thread = threading.Thread(target=self.session.run, name="test session")

    def begin(self) -> Solo:
        """Begin to serve the client."""
        self.thread.start()
        return self

    def join(self) -> None:
        """Wait until the session has ended."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the session does not end"

    def finish(self) -> None:
        """Close the client, and see that the session ends."""
        self.client.socket.close()
        if self.thread.ident is not None:
            self.join()
        else:
            self.session._transport.close()
        self.stack.cleanup()


def unix_options(path: str, **changes: Any) -> ServerOptions:
    """Return options of a server on a Unix socket, which does not wait long for anybody at the end."""
    endpoints = (Endpoint(Transport.UNIX, unix_path=path),)
    return ServerOptions(**{"endpoints": endpoints, "drain": 1.0, **changes})


def open_descriptors() -> set[str]:
    """Return the numbers of this process's open files, without those that only wait for the garbage collector."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))


def join_others(before: Sequence[threading.Thread]) -> None:
    """Wait until no thread is left but those that there were before.

    Raises:
        AssertionError: some do not end.
    """
    for thread in threading.enumerate():
        if thread not in before:
            thread.join(PATIENCE)
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not left, f"threads are left: {left}"

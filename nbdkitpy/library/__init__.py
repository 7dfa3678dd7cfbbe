"""A server as a part of another program: ``with nbdkitpy.serve(plugin) as server:``.

Here is what such a program sees; ``life`` is what the server's thread does. Of the server nothing is imported before
that thread needs it, since plugins import :mod:`nbdkitpy` too.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar

from nbdkitpy.backend import Filter, Plugin

if TYPE_CHECKING:
    from socket import socket

    from nbdkitpy.server.embedded import Embedded
    from nbdkitpy.stack import Stack

__all__ = ["EmbeddedServer", "FilterLayer", "Parameters", "Request", "Value", "serve"]

T = TypeVar("T")

#: A value of a parameter: text as on the command line, or what stands for such a text.
Value: TypeAlias = "str | int | float | os.PathLike[str]"

#: Values by key, as on the command line; of a parameter that may be given several times, all of them.
Parameters: TypeAlias = "Mapping[str, Value | Sequence[Value]]"

#: A filter: its name, its class or an instance of it, and maybe parameters for it alone.
FilterLayer: TypeAlias = "str | type[Filter] | Filter | tuple[str | type[Filter] | Filter, Parameters]"

_NONE: Parameters = MappingProxyType({})


class Request(NamedTuple):
    """What :func:`serve` was asked for."""

    plugin: str | type[Plugin] | Plugin
    parameters: Parameters
    filters: tuple[FilterLayer, ...]
    unix: str | os.PathLike[str] | None
    tcp: tuple[str, int] | None
    listen: bool
    options: Mapping[str, Any]  #: fields of ServerOptions by name, as far as they were given


def serve(
    plugin: str | type[Plugin] | Plugin,
    parameters: Parameters = _NONE,
    *,
    filters: Sequence[FilterLayer] = (),
    unix: str | os.PathLike[str] | None = None,
    tcp: tuple[str, int] | None = None,
    listen: bool = True,
    export_name: str | None = None,
    readonly: bool | None = None,
    threads: int | None = None,
    handshake_timeout: float | None = None,
    idle_timeout: float | None = None,
    drain: float | None = None,
    max_connections: int | None = None,
    max_connections_per_source: int | None = None,
    max_handshakes: int | None = None,
    max_options: int | None = None,
    max_buffered: int | str | None = None,
    max_buffered_per_connection: int | str | None = None,
    stall_timeout: float | None = None,
    keepalive: bool | None = None,
    tls: Literal["off", "on", "require"] | None = None,
    tls_certificates: str | os.PathLike[str] | None = None,
    tls_psk: str | os.PathLike[str] | None = None,
    tls_verify_peer: bool | None = None,
    tls_priority: str | None = None,
) -> EmbeddedServer:
    """Return a server, which serves `plugin` within a ``with`` or ``async with`` block.

    A program may have any number of them. Each has its own threads, and uses nothing that is the whole process's: no
    signals, no standard streams; messages go to the logger ``nbdkitpy``, to which no handler is added.

    Args:
        plugin: The name of one that is installed, the path of a file that has one, ``package.module:Class``, a class,
            or an instance, which serves once.
        parameters: As on the command line: each goes to the outermost layer that takes it. Text is read as it is read
            there, and so are numbers, truth values and paths when they have been made texts.
        filters: Outermost first; a pair of one and parameters gives those to it alone.
        unix: Path of a Unix socket to listen on. Without `unix` and `tcp` it is a temporary one.
        tcp: Address and port to listen on, 0 for any free one; the address "any" is every interface.
        listen: False to listen nowhere: then clients come by :meth:`EmbeddedServer.connect` only.
        export_name: For the URI.
        readonly: Refuse all writes.
        threads: Requests of one connection that are served at once; 16.
        handshake_timeout: Seconds for a client's handshake, 0 for no limit; 10.
        idle_timeout: Seconds after which a client that asks for nothing is disconnected, 0 for never; 0.
        drain: Seconds for clients to take their replies at the end; 5.
        max_connections: Clients at once, 0 for any number; 1000.
        max_connections_per_source: Those of one address, or of one user of a Unix socket, 0 for any number; 0.
        max_handshakes: Unfinished handshakes at once, 0 for any number; 1000.
        max_options: Options of one handshake; 32.
        max_buffered: Bytes for payloads and replies of all clients, or a size such as "512M", 0 for no limit; 512 MiB.
        max_buffered_per_connection: The same for one client; 128 MiB.
        stall_timeout: Seconds that a client may keep memory which others wait for, 0 for ever; 30.
        keepalive: Have the system find out about TCP clients that have vanished.
        tls: Whether clients may use TLS, or have to; "on" if there are certificates or keys, which are not looked for
            elsewhere than here.
        tls_certificates: Directory with ca-cert.pem, server-cert.pem, server-key.pem, and maybe ca-crl.pem.
        tls_psk: File of pre-shared keys, in place of certificates.
        tls_verify_peer: Serve by TLS only clients that show a certificate which the authority has signed.
        tls_priority: Ciphers in OpenSSL's terms.
    """
    given = {
        "export_name": export_name,
        "readonly": readonly,
        "threads": threads,
        "handshake_timeout": handshake_timeout,
        "idle_timeout": idle_timeout,
        "drain": drain,
        "max_connections": max_connections,
        "max_connections_per_source": max_connections_per_source,
        "max_handshakes": max_handshakes,
        "max_options": max_options,
        "max_buffered": max_buffered,
        "max_buffered_per_connection": max_buffered_per_connection,
        "stall_timeout": stall_timeout,
        "keepalive": keepalive,
        "tls": tls,
        "tls_certificates": tls_certificates,
        "tls_psk": tls_psk,
        "tls_verify_peer": tls_verify_peer,
        "tls_priority": tls_priority,
    }
    options = {name: value for name, value in given.items() if value is not None}
    return EmbeddedServer(Request(plugin, parameters, tuple(filters), unix, tcp, listen, options))


class EmbeddedServer:
    """A server within this program, which lives as long as a ``with`` or ``async with`` block: once.

    When the block is entered, clients can connect. When it is left, in whatever way, the server ends in bounded time,
    and nothing is left of it: no thread, no descriptor, no file. Nothing waits in the thread of an ``async with``.

    Entering raises :class:`~nbdkitpy.ConfigError`, OSError, or what else a layer raises at its start. Leaving raises
    what a layer raises at its end, or TimeoutError if one does not return, which is then abandoned; if the block
    itself raises, that is only logged.

    A process that is forked meanwhile may connect like any other, but does not have the server: leaving the block has
    no effect there.
    """

    def __init__(self, request: Request) -> None:
        #: NBD URI for clients on this machine; "" without a listener. This and the next two are known in the block.
        self.uri = ""
        #: Path of the Unix socket, if it listens on one.
        self.unix_path: str | None = None
        #: TCP port, if it listens on one.
        self.port: int | None = None

        self._request = request
        self._pid = 0
        self._lock = threading.Lock()
        self._running: tuple[Embedded, Stack] | None = None
        self._is_to_end = False
        # Waited for by a thread or by a task.
        self._started: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._live, name="nbdkitpy server", daemon=True)

    # --- from any thread ---

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        running = self._running
        return 0 if running is None else running[0].clients

    def connect(self) -> socket:
        """Return a socket whose other end is served, as if it had connected to a listener. It is the caller's.

        Raises:
            ConnectionRefusedError: the server has not started, or accepts no more clients.
        """
        running = self._running
        if running is None or self._pid != os.getpid():
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the server does not run")
        server, stack = running
        return server.connect(stack)

    def shutdown(self) -> None:
        """Begin an orderly end, also for clients that are connected. Returns at once; leaving the block waits."""
        with self._lock:
            self._is_to_end = True
            if self._running is not None:
                self._running[0].shutdown()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has ended, by :meth:`shutdown` or because a layer wants it to; tell whether it has.

        Args:
            timeout: Seconds to wait at most.
        """
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the block ---

    def __enter__(self) -> EmbeddedServer:
        self._check_new()
        try:
            self._begin()
            self._started.result()
        except BaseException:
            self._break_off()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pid != os.getpid():
            return
        try:
            self.shutdown()
            failure = self._ended.exception()
        except BaseException:
            self._break_off()
            raise
        self._finish(failure, error)

    async def __aenter__(self) -> EmbeddedServer:
        import asyncio

        self._check_new()
        try:
            self._begin()
            await asyncio.wrap_future(self._started)
        except BaseException as error:
            await self._end(cancelled=isinstance(error, asyncio.CancelledError))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._pid != os.getpid():
            return
        await self._end()
        self._finish(self._ended.exception(), error)

    def _check_new(self) -> None:
        if self._pid:
            raise RuntimeError("this server has been started before: call nbdkitpy.serve() for another one")
        self._pid = os.getpid()

    def _begin(self) -> None:
        for milestone in (self._started, self._ended):
            milestone.set_running_or_notify_cancel()  # so that no task that is cancelled cancels it
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more of them
            self._ended.set_result(None)
            raise

    def _break_off(self) -> None:
        """Wait no more: the start has failed, or who waits has pressed Ctrl-C. What does not return is left alone."""
        self.shutdown()
        running = self._running
        if running is not None:
            running[0].abort()
        if self._ended.done():
            self._join()

    async def _end(self, *, cancelled: bool = False) -> None:
        """Have the server end, and wait for that, also if the task is cancelled; unless it is `cancelled` already."""
        import asyncio

        self.shutdown()
        ended = asyncio.wrap_future(self._ended)
        try:
            await asyncio.wait([ended])
        except asyncio.CancelledError:
            if cancelled:
                self._break_off()
            else:
                await self._end(cancelled=True)
            raise
        finally:
            if not ended.cancel():
                ended.exception()  # else asyncio says that nobody has looked at it
        self._join()

    def _finish(self, failure: BaseException | None, error: BaseException | None) -> None:
        self._join()
        if failure is None:
            return
        if error is None:
            raise failure
        logging.getLogger("nbdkitpy").error("the server has not ended in order: %s", failure, exc_info=failure)

    def _join(self) -> None:
        """Wait for the thread when it has nothing left to do, if it has begun at all."""
        if self._thread.is_alive():
            self._thread.join()

    # --- the server's thread ---

    def _live(self) -> None:
        try:
            from nbdkitpy.library.life import live

            live(self._request, self._has_started)
        except BaseException as error:
            failure: BaseException | None = error
        else:
            failure = None
        with self._lock:
            self._running = None
        if self._started.done():
            self._ended.set_exception(failure)
        else:
            self._ended.set_result(None)
            self._started.set_exception(failure)

    def _has_started(self, server: Embedded, stack: Stack) -> None:
        self.uri, self.unix_path, self.port = server.uri, server.unix_path, server.port
        with self._lock:
            self._running = server, stack
            if self._is_to_end:
                server.shutdown()
        self._started.set_result(None)

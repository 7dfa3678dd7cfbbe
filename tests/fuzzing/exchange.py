"""A client that sends and receives at the same time, so that neither side waits for the other, over TLS or without."""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
from collections.abc import Iterable

from tests.nbdclient import PATIENCE

__all__ = ["exchange"]

_PIECE = 1 << 16


class _Clear:
    """Bytes as they are."""

    def outgoing(self, data: bytes) -> bytes:
        """Return what is to be sent for `data`."""
        return data

    def incoming(self, data: bytes) -> bytes:
        """Return what `data`, which was received, means."""
        return data

    def goodbye(self) -> bytes:
        """Return what is to be sent at the end."""
        return b""


class _Tls(_Clear):
    """Bytes that TLS protects. The handshake is the first thing that is said."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._received, self._sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._sent, server_hostname="localhost")
        self._waiting = bytearray()  # for the handshake to be over
        self._is_up = False
        self._is_leaving = False

    def outgoing(self, data: bytes) -> bytes:
        self._waiting += data
        with contextlib.suppress(ssl.SSLWantReadError):
            if not self._is_up:
                self._tls.do_handshake()
                self._is_up = True
            while self._waiting:
                del self._waiting[: self._tls.write(self._waiting)]
            if self._is_leaving:
                self._tls.unwrap()
        return self._sent.read()

    def incoming(self, data: bytes) -> bytes:
        self._received.write(data)
        found = b""
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while self._is_up and (part := self._tls.read(_PIECE)):
                found += part
        return found

    def goodbye(self) -> bytes:
        self._is_leaving = True
        return self.outgoing(b"")


def exchange(sock: socket.socket, pieces: Iterable[bytes], context: ssl.SSLContext | None = None) -> bytes:
    """Send `pieces`, each when there is room, then end the stream; return all that the server sends until its end.

    Args:
        sock: Connected.
        pieces: Of what is said.
        context: For TLS, of which the handshake comes first.
    """
    layer = _Clear() if context is None else _Tls(context)
    coming = iter([*pieces, None])  # None is the end
    received, unsent, is_over = bytearray(), b"", False
    sock.setblocking(False)
    with selectors.DefaultSelector() as selector:
        key = selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while True:
            ready = selector.select(PATIENCE)
            assert ready, "the server says nothing, and does not end"
            if ready[0][1] & selectors.EVENT_READ:
                try:
                    data = sock.recv(_PIECE)
                except ConnectionResetError:
                    data = b""
                if not data:
                    return bytes(received)
                received += layer.incoming(data)
                unsent += layer.outgoing(b"")
            if ready[0][1] & selectors.EVENT_WRITE:
                if not unsent and not is_over:
                    piece = next(coming)
                    is_over = piece is None
                    unsent = layer.goodbye() if piece is None else layer.outgoing(piece)
                try:
                    unsent = unsent[sock.send(unsent) :] if unsent else b""
                except (BrokenPipeError, ConnectionResetError):
                    unsent, is_over = b"", True
            done = is_over and not unsent
            if done and context is None and key.events & selectors.EVENT_WRITE:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            key = selector.modify(sock, selectors.EVENT_READ | (0 if done else selectors.EVENT_WRITE))

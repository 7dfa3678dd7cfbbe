"""A connection that is a recording: the real session, its engine and a plugin, without a socket or a thread."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import cast

from nbdkitpy import Client, Plugin
from nbdkitpy.backend import Buffer
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.session import Session
from nbdkitpy.server.tls import Secured, Tls, TlsTransport
from nbdkitpy.server.transport import Connection
from tests.serving import make_stack

__all__ = ["Log", "Tape", "play"]


class Log(logging.Logger):
    """Formats each message, and keeps those with a traceback, which a client must not be able to cause."""

    def __init__(self) -> None:
        super().__init__("session", logging.DEBUG)
        self.failures: list[str] = []

    def handle(self, record: logging.LogRecord) -> None:
        """Look at one message."""
        text = record.getMessage()
        if record.exc_info:
            self.failures.append(f"{text}: {record.exc_info[1]!r}")


class Tape:
    """What a client sends, in these pieces; and a record of what it was sent."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = list(pieces)
        self._at = 0  # of the first piece
        self.taken: list[bytes] = []  #: what was received, as it was
        self.sent: list[bytes] = []
        self.is_closed = False

    def receive_into(self, buffer: memoryview) -> int:
        """Put the next piece, or as much of it as there is room for, into `buffer`."""
        assert not self.is_closed, "used after its end"
        while self._pieces and self._at == len(self._pieces[0]):
            del self._pieces[0]
            self._at = 0
        if not self._pieces:
            return 0
        part = self._pieces[0][self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        self.taken.append(part)
        return len(part)

    receive_soon = receive_into

    def set_patience(self, seconds: float) -> None:
        """Do nothing: nobody waits."""

    def send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None:
        """Write down."""
        assert not self.is_closed, "used after its end"
        self.sent += map(bytes, pieces)

    def send_file(self, head: bytes, fd: int, position: int, count: int) -> int:
        """Write down `head`, and what is in a file."""
        self.send([head], more=True)
        self.sent.append(os.pread(fd, count, position))
        return len(self.sent[-1])

    def is_full(self) -> bool:
        """Tell that there is room."""
        return False

    def send_now(self, data: bytes) -> None:
        """Write down."""
        self.sent.append(data)

    def sleep(self, seconds: float) -> None:
        """Not wait."""

    def is_gone(self) -> bool:
        """Tell that the client still takes what it is sent."""
        return False

    def stop_receiving(self) -> None:
        """Have nothing more."""
        self._pieces.clear()

    def abort(self) -> None:
        """Have nothing more."""
        self._pieces.clear()

    def close(self) -> None:
        """Take note that this is the end."""
        assert not self.is_closed, "closed once"
        self.is_closed = True


class _NoTls(Tls):
    """Goes over to TLS by leaving everything as it is."""

    def __init__(self, mode: TlsMode) -> None:
        self.mode = mode

    def accept(self, raw: Connection) -> Secured:
        return Secured(cast(TlsTransport, raw), None, None, "none")


def play(plugin: Plugin, tape: Tape, options: ServerOptions, log: logging.Logger) -> None:
    """Serve the client on `tape` until it has left."""
    tls = None if options.tls in (None, TlsMode.OFF) else _NoTls(options.tls)
    Session(tape, Client(1), make_stack(plugin), options, log, lambda _: None, tls).run()

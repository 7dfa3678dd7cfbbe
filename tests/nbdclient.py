"""The client of the tests: that which authors have, and what no sane client would do."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from nbdkitpy.protocol.constants import Command, TransmissionFlag
from nbdkitpy.testing.wire import OptionAnswer, Refused, Reply, Style, Wire, go_data

__all__ = ["PATIENCE", "NbdClient", "OptionAnswer", "ProtocolError", "Refused", "Reply", "Style", "go_data"]

#: Seconds after which the server is taken to hang.
PATIENCE = 20


class ProtocolError(AssertionError):
    """The server broke the protocol."""


class NbdClient(Wire):
    """One connection to a server.

    Args:
        sock: Connected; the client owns it.
    """

    violation = ProtocolError

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, PATIENCE)
        self._held: list[bytes] | None = None

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    # --- bytes ---

    def send_bytes(self, data: bytes) -> None:
        if self._held is not None:
            self._held.append(data)
        else:
            super().send_bytes(data)

    @contextlib.contextmanager
    def batched(self) -> Iterator[None]:
        """Send all that is sent meanwhile at once, at the end."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            self.send_bytes(b"".join(held))

    def at_end(self) -> bool:
        """Wait for the server to close the connection, or to send something, which is then False."""
        try:
            return not self.socket.recv(1)
        except ConnectionResetError:
            return True

    def wait_for_end(self) -> None:
        """Wait until the server has closed the connection, whatever it sends before."""
        with contextlib.suppress(ConnectionResetError):
            while self.socket.recv(1 << 16):
                pass

    def reset(self) -> None:
        """Break the connection, so that a TCP server sees a reset rather than an orderly end."""
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # --- handshake ---

    def exports(self) -> list[str]:
        """Return the names that the server lists."""
        return [name for name, _ in self.list_exports()]

    def negotiate(self, style: Style = Style.SIMPLE, *, name: str = "", contexts: bool = False) -> NbdClient:
        """Go through a whole handshake, and return this client.

        Args:
            style: Of the replies.
            name: Of the export.
            contexts: Select base:allocation, so that the block status can be asked for.
        """
        self.greet()
        return self.negotiate_rest(style, name=name, contexts=contexts)

    def negotiate_rest(self, style: Style = Style.SIMPLE, *, name: str = "", contexts: bool = False) -> NbdClient:
        """Go through what is left of a handshake after :meth:`greet`, and return this client."""
        self.negotiate_style(style)
        if contexts:
            self.require(self.select_base_allocation(name), "there is no base:allocation")
        self.go(name)
        return self

    def expect_oldstyle(self) -> NbdClient:
        """Take the greeting of an oldstyle server, and return this client."""
        magic, version, size, high, low = struct.unpack(">8sQQHH124x", self.receive_bytes(152))
        self.require((magic, version, high) == (b"NBDMAGIC", 0x0000420281861253, 0), magic, version, high)
        self.size, self.flags = size, TransmissionFlag(low)
        return self

    # --- requests ---

    def call(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Reply:
        """Send one request and return its reply, which has to be the next one."""
        cookie = self.send(command, offset, length, flags=flags, data=data)
        reply = self.reply()
        self.require(reply.cookie == cookie, "the reply is to another request", reply, cookie)
        return reply

    def read(self, offset: int, length: int) -> bytes:
        """Read, and fail the test if that fails."""
        reply = self.call(Command.READ, offset, length)
        self.require(not reply.error, reply)
        return reply.data

    def write(self, offset: int, data: bytes) -> None:
        """Write, and fail the test if that fails."""
        reply = self.call(Command.WRITE, offset, data=data)
        self.require(not reply.error, reply)

    def disconnect(self) -> None:
        """Say DISC, wait until the server has closed the connection, and close it."""
        self.send(Command.DISC)
        self.require(self.at_end(), "there is something after the last reply")
        self.socket.close()

    def replies(self, count: int) -> dict[int, Reply]:
        """Return the next replies by their cookies, each of which occurs once."""
        found = {reply.cookie: reply for reply in (self.reply() for _ in range(count))}
        self.require(len(found) == count, "a cookie came twice")
        return found

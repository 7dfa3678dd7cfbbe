"""A whole conversation of a client with a server, from the first byte to the last."""

from __future__ import annotations

import socket
import struct

from nbdkitpy.protocol.constants import BASE_ALLOCATION, Command, CommandFlag, InfoType, Option
from tests.nbdclient import PATIENCE, NbdClient, Style, go_data

__all__ = ["LEAVE", "PAYLOAD", "WHERE", "recorded"]

#: What is written in it, and where.
PAYLOAD = b"new" * 30
WHERE = 4096

#: So many bytes at the end are the client's leave.
LEAVE = {Style.SIMPLE: 28, Style.STRUCTURED: 28, Style.EXTENDED: 32}


class _Recorded(socket.socket):
    """Keeps what goes through it."""

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX)
        self.sent = bytearray()
        self.received = bytearray()

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
        super().sendall(data, flags)
        self.sent += data

    def recv_into(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = super().recv_into(buffer)
        self.received += buffer[:count]
        return count


def recorded(path: str, style: Style, name: str = "") -> tuple[bytes, bytes]:
    """Return what a client sends to the server at `path`, and receives, when it does all that can be done.

    Args:
        path: Of a Unix socket.
        style: Of the replies.
        name: Of the export.
    """
    sock = _Recorded()
    sock.settimeout(PATIENCE)
    sock.connect(path)
    _converse(NbdClient(sock), style, name)
    assert all((sock.sent, sock.received)), "the client sends or receives by other calls now"
    return bytes(sock.sent), bytes(sock.received)


def _converse(client: NbdClient, style: Style, name: str) -> None:
    client.greet()
    if style is not Style.SIMPLE:
        client.option(Option.STRUCTURED_REPLY if style is Style.STRUCTURED else Option.EXTENDED_HEADERS)
        export, query = name.encode(), BASE_ALLOCATION.encode()
        selection = struct.pack(f">I{len(export)}sII", len(export), export, 1, len(query)) + query
        client.option(Option.SET_META_CONTEXT, selection)
    client.style = style
    client.exports()
    client.option(Option.INFO, go_data(name, InfoType.BLOCK_SIZE))
    client.go(name, InfoType.DESCRIPTION)
    client.read(0, 40)
    client.write(WHERE, PAYLOAD)
    for command, length in ((Command.TRIM, 512), (Command.WRITE_ZEROES, 512), (Command.CACHE, 512), (Command.FLUSH, 0)):
        assert not client.call(command, 0, length, flags=CommandFlag.FUA).error
    if style is not Style.SIMPLE:
        client.call(Command.BLOCK_STATUS, 0, 512)
    client.disconnect()

"""The few words of the protocol that an idle client speaks, as sections "Newstyle negotiation" and so on have them."""

from __future__ import annotations

import socket
import struct

from benchmarks.clients import BenchmarkError

GREETING = struct.Struct(">8s8sH")
FLAGS_AND_OPTION = struct.Struct(">I8sII")
EXPORT_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
FIXED_NEWSTYLE_NO_ZEROES = 3
IHAVEOPT = b"IHAVEOPT"
OPT_EXPORT_NAME = 1
REQUEST_MAGIC = 0x25609513
CMD_DISC = 2


def receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes from the server."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise BenchmarkError("the server closed the connection in the handshake")
        data += piece
    return data

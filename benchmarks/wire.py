"""The few words of the protocol that an idle client speaks.

Sections "Newstyle negotiation", "Request message" and "Simple reply message" of the specification.
"""

from __future__ import annotations

import contextlib
import socket
import struct

from benchmarks.clients import BenchmarkError

GREETING = struct.Struct(">8s8sH")
FLAGS_AND_OPTION = struct.Struct(">I8sII")
EXPORT_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
FIXED_NEWSTYLE_NO_ZEROES = 3
IHAVEOPT = b"IHAVEOPT"
OPT_EXPORT_NAME = 1
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
CMD_READ = 0
CMD_DISC = 2
BLOCK = 4096


def negotiate(connection: socket.socket, export: str) -> None:
    """Go from the greeting, which has been received, to the transmission phase."""
    name = export.encode()
    connection.sendall(
        FLAGS_AND_OPTION.pack(FIXED_NEWSTYLE_NO_ZEROES, IHAVEOPT, OPT_EXPORT_NAME, len(name)) + name,
    )
    receive(connection, EXPORT_REPLY.size)


def read_block(connection: socket.socket) -> None:
    """Read the first block of the disk."""
    connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 0, 0, BLOCK))
    reply = REPLY.unpack(receive(connection, REPLY.size))
    if reply != (REPLY_MAGIC, 0, 0):
        raise BenchmarkError(f"the server answers a READ with {reply}")
    receive(connection, BLOCK)


def disconnect(connection: socket.socket) -> None:
    """Say good-bye, and wait for the server to hang up. It may have ended already; whoever notices says so better."""
    with contextlib.suppress(OSError):
        connection.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
        connection.shutdown(socket.SHUT_WR)  # nbdkit 1.48 waits for this too
        while connection.recv(BLOCK):
            pass


def receive(connection: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes from the server."""
    data = b""
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise BenchmarkError("the server closed the connection too early")
        data += piece
    return data

"""Test the idle client of the benchmark."""

import socket

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.wire import receive


def test_receiving_less_than_is_due_is_an_error() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"NBDM")
        far.shutdown(socket.SHUT_WR)

        with pytest.raises(BenchmarkError, match="closed the connection in the handshake"):
            receive(near, 8)

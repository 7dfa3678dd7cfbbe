"""Test the idle client of the benchmark."""

import socket
from collections.abc import Iterator

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.wire import BLOCK, REPLY, REPLY_MAGIC, disconnect, negotiate, read_block, receive


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def test_receiving_less_than_is_due_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(b"NBDM")
    far.shutdown(socket.SHUT_WR)

    with pytest.raises(BenchmarkError, match="closed the connection too early"):
        receive(near, 8)


def test_export_is_asked_for_by_its_name(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(bytes(10))

    negotiate(near, "disk")

    assert far.recv(100) == b"\0\0\0\3IHAVEOPT\0\0\0\1\0\0\0\4disk"


def test_block_is_read(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(REPLY.pack(REPLY_MAGIC, 0, 0) + bytes(BLOCK) + b"next")

    read_block(near)

    assert far.recv(100) == bytes.fromhex("25609513 0000 0000") + bytes(8) + bytes(8) + bytes.fromhex("00001000")
    assert near.recv(100) == b"next"


def test_read_that_fails_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.sendall(REPLY.pack(REPLY_MAGIC, 5, 0))

    with pytest.raises(BenchmarkError, match="answers a READ with"):
        read_block(near)


def test_disconnecting_waits_for_the_server_to_hang_up(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.shutdown(socket.SHUT_WR)

    disconnect(near)

    assert far.recv(100)[:8] == bytes.fromhex("25609513 0000 0002")
    assert far.recv(100) == b""


def test_disconnecting_from_a_server_that_has_gone_is_no_error(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.close()

    disconnect(near)

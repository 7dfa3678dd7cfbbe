"""Clients that come to a server without a listener."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from nbdkitpy.server.embedded import Embedded
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.stack import Stack
from tests.nbdclient import PATIENCE, NbdClient
from tests.serving import CONTENT, Disks, make_stack


@pytest.fixture
def server() -> Iterator[Embedded]:
    server = Embedded(ServerOptions(endpoints=()))
    server.bind()
    yield server
    server.close()
    server.free()


@pytest.fixture
def stack(server: Embedded) -> Stack:
    return make_stack(Disks(), server=server)


def begin(server: Embedded, stack: Stack) -> threading.Thread:
    thread = threading.Thread(target=server.serve, args=(stack,))
    thread.start()
    return thread


def end(server: Embedded, thread: threading.Thread) -> None:
    server.shutdown()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_clients_are_served_and_counted(server: Embedded, stack: Stack) -> None:
    early = NbdClient(server.connect(stack))
    thread = begin(server, stack)

    with early, NbdClient(server.connect(stack)) as late:
        for client in (early, late):
            assert client.negotiate().read(0, 512) == CONTENT[:512]
        assert server.clients == 2
        assert {session.name for session in server._sessions} == {"disks[1]", "disks[2]"}

    end(server, thread)


def test_who_has_not_been_taken_at_the_end_is_left(server: Embedded, stack: Stack) -> None:
    with NbdClient(server.connect(stack)) as client:
        server.shutdown()
        server.serve(stack)

        assert client.at_end()


def test_nobody_can_come_after_the_end(server: Embedded, stack: Stack) -> None:
    server.free()

    with pytest.raises(ConnectionRefusedError):
        server.connect(stack)


def test_nobody_can_come_when_the_end_has_begun(server: Embedded, stack: Stack) -> None:
    server.finish()

    with pytest.raises(ConnectionRefusedError):
        server.connect(stack)


def test_who_comes_after_the_last_is_refused(server: Embedded, stack: Stack) -> None:
    with NbdClient(server.connect(stack)) as last:
        server.call_soon(server.finish)
        with NbdClient(server.connect(stack)) as late:
            thread = begin(server, stack)

            assert late.at_end()
        assert last.negotiate().read(0, 512) == CONTENT[:512]
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_nothing_comes_of_what_is_said_after_the_end(server: Embedded) -> None:
    server.free()

    server.shutdown()
    server.finish()
    server.call_soon(lambda: pytest.fail("it has ended"))


def test_the_threads_of_clients_have_ended_when_it_has(
    server: Embedded, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_left = server._has_left

    def take_a_while(number: int) -> None:
        has_left(number)
        for _ in range(1000):
            os.sched_yield()

    monkeypatch.setattr(server, "_has_left", take_a_while)
    before = threading.enumerate()
    with NbdClient(server.connect(stack)) as client:
        thread = begin(server, stack)
        client.negotiate()

        end(server, thread)

    assert threading.enumerate() == before

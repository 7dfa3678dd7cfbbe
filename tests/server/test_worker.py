"""A worker, in a thread of the tests' process: what it does when the main process says something."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from nbdkitpy import Client, Parameter
from nbdkitpy.parameters import parse_string
from nbdkitpy.server.channel import Channel, Kind, Message
from nbdkitpy.server.worker import Worker, pack_reload
from tests.nbdclient import PATIENCE, NbdClient
from tests.serving import CONTENT, Disks, join_others, make_stack, open_descriptors, unix_options


class Live(Disks):
    """Has a parameter that can be reloaded, and lets nobody in."""

    word = Parameter(parse_string, default="-", live=True)

    def __init__(self) -> None:
        super().__init__()
        self.has_changed = threading.Event()

    def preconnect(self, client: Client, readonly: bool) -> None:
        raise AssertionError("the main process has asked this")

    def reload(self, values: dict[str, str]) -> None:  # type: ignore[override]
        super().reload(values)
        self.has_changed.set()


class Serving:
    """A worker that serves."""

    def __init__(self, **options: object) -> None:
        self.plugin = Live()
        self.main, theirs = Channel.pair()
        self.worker = Worker(unix_options("", workers=3, **options), theirs)
        self.stack = make_stack(self.plugin)
        self.well: bool | None = None
        self._theirs = theirs
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        assert self.hears() == Message(Kind.READY, 0, None)

    def _serve(self) -> None:
        self.well = self.worker.serve(self.stack)
        self._theirs.close()

    def hears(self) -> Message | None:
        """What the main process is told next; None if nothing more."""
        poll = select.poll()
        poll.register(self.main, select.POLLIN)
        assert poll.poll(PATIENCE * 1000)
        return self.main.receive()

    def client(self, number: int = 1) -> NbdClient:
        ours, theirs = socket.socketpair()
        self.main.send(Kind.CLIENT, number, theirs.fileno())
        theirs.close()
        return NbdClient(ours)

    def join(self) -> bool | None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.well


@pytest.fixture
def serving() -> Iterator[Serving]:
    before = threading.enumerate()
    made = Serving()
    yield made
    made.main.close()
    made.join()
    join_others(before)


def test_a_client_that_is_handed_over_is_served_and_its_leaving_told(serving: Serving) -> None:
    client = serving.client(41).negotiate()

    assert client.read(0, 100) == CONTENT[:100]
    assert [session.name for session in serving.worker._sessions] == ["disks[41]"]
    client.disconnect()

    assert serving.hears() == Message(Kind.ESTABLISHED, 41, None)
    assert serving.hears() == Message(Kind.LEFT, 41, None)


def test_a_client_without_a_descriptor_counts_as_gone(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    serving.main.send(Kind.CLIENT, 7)

    assert serving.hears() == Message(Kind.LEFT, 7, None)
    assert caplog.messages == ["cannot take a client over: Too many open files"]
    with serving.client().negotiate() as client:
        assert client.read(0, 1) == CONTENT[:1]


def test_a_client_that_was_never_there_counts_as_gone(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(sock: socket.socket, number: int) -> Client:
        raise OSError("gone")

    monkeypatch.setattr("nbdkitpy.server.service.describe_client", gone)

    with serving.client(7) as client:
        assert client.at_end()

    assert serving.hears() == Message(Kind.LEFT, 7, None)


def test_who_has_to_give_way_does(serving: Serving) -> None:
    other, unfinished = serving.client(5).negotiate(), serving.client(6)
    unfinished.greet()
    assert serving.hears() == Message(Kind.ESTABLISHED, 5, None)

    for number in (6, 7):
        serving.main.send(Kind.DROP, number)

    assert serving.hears() == Message(Kind.LEFT, 6, None)
    assert unfinished.at_end()
    assert other.read(0, 1) == CONTENT[:1]
    for client in (other, unfinished):
        client.socket.close()


def test_clients_are_not_counted_as_the_main_process_does_that(serving: Serving) -> None:
    options = serving.worker.options

    assert options.max_connections == options.max_connections_per_source == options.max_handshakes == 0


@pytest.mark.parametrize("kind", [Kind.STOP, Kind.ABORT, None])
def test_it_ends_in_order_when_it_is_told_to_or_left_alone(kind: Kind | None, serving: Serving) -> None:
    client = serving.client().negotiate()

    if kind is None:
        serving.main.close()
    else:
        serving.main.send(kind)

    assert client.at_end()
    assert serving.join()
    client.socket.close()
    assert serving.plugin.closed == 1
    if kind is not None:
        kinds = [message.kind for message in iter(serving.hears, None)]
        assert kinds == [Kind.ESTABLISHED, Kind.LEFT, Kind.DONE]


def test_it_sets_what_was_reloaded(serving: Serving) -> None:
    other = make_stack(Live())
    other.reload({other.plugin: {"word": ["new\udcff"]}})

    for _ in range(2):  # workers share the position in the file
        serving.plugin.has_changed.clear()
        fd = pack_reload(other)
        serving.main.send(Kind.RELOAD, 0, fd)
        os.close(fd)
        assert serving.plugin.has_changed.wait(PATIENCE)

    assert serving.plugin.word == "new\udcff"


def test_a_reload_that_fails_is_logged_and_nothing_else(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    serving.main.send(Kind.RELOAD)
    with serving.client().negotiate() as client:
        assert client.read(0, 1) == CONTENT[:1]

    assert caplog.messages == [f"worker {os.getpid()}: reload: Too many open files"]
    assert serving.plugin.word == "-"


def test_nothing_is_left_open() -> None:
    before = open_descriptors()
    serving = Serving()
    serving.main.close()
    serving.join()
    del serving

    assert open_descriptors() == before

"""The sender: whole messages, nobody waits who need not, and a client that is gone holds nothing up."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nbdkitpy.backend import Buffer
from nbdkitpy.server.budget import Budget
from nbdkitpy.server.sender import FilePart, Sender
from nbdkitpy.server.transport import SocketTransport
from tests.nbdclient import PATIENCE, NbdClient


class Recorder(SocketTransport):
    """Notes each gather write. A closed gate holds it up; a failure breaks it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.sent: list[bytes] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.failure: BaseException | None = None
        self.aborted = False

    def send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None:
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        if self.failure:
            raise self.failure
        self.sent.append(b"".join(pieces))

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    ours, theirs = socket.socketpair()
    recorder = Recorder(ours)
    yield recorder
    recorder.close()
    theirs.close()


def spent(budget: Budget, *costs: int) -> Budget:
    for cost in costs:
        budget.take(cost)
    return budget


def in_thread(function: object, *args: object) -> threading.Thread:
    thread = threading.Thread(target=function, args=args)  # type: ignore[arg-type]
    thread.start()
    return thread


# --- messages ---


def test_a_worker_does_not_wait_for_a_client_that_another_one_waits_for(recorder: Recorder) -> None:
    budget = spent(Budget(100), 3)
    sender = Sender(recorder, budget)
    recorder.gate.clear()
    slow = in_thread(sender.send, [b"first"])
    assert recorder.entered.wait(PATIENCE)
    assert sender.is_sending

    for message in (b"second", b"third", b"fourth"):
        sender.post([message[:3], message[3:]], 1)  # would wait here
    assert not budget.unused
    recorder.gate.set()
    slow.join(PATIENCE)

    assert recorder.sent == [b"first", b"secondthirdfourth"]
    assert budget.unused
    assert not sender.is_sending


def test_messages_of_many_threads_stay_whole() -> None:
    ours, theirs = socket.socketpair()
    transport, client = SocketTransport(ours), NbdClient(theirs)
    budget = spent(Budget(1 << 20), 400)
    sender = Sender(transport, budget)
    start = threading.Barrier(4)

    def post(letter: bytes) -> None:
        start.wait(PATIENCE)
        for _ in range(100):
            sender.post([letter * 1000, letter * 24], 1)

    threads = [in_thread(post, letter) for letter in (b"a", b"b", b"c", b"d")]
    messages = [client.receive_bytes(1024) for _ in range(400)]

    assert all(len(set(message)) == 1 for message in messages)
    assert sorted(message[:1] for message in messages) == [bytes([c]) for c in b"abcd" for _ in range(100)]
    for thread in threads:
        thread.join(PATIENCE)
    assert budget.unused
    transport.close()
    theirs.close()


@pytest.mark.parametrize("failure", [BrokenPipeError(errno.EPIPE, "gone"), MemoryError()])
def test_after_a_failure_everything_is_dropped_and_the_receiver_finds_out(
    recorder: Recorder, failure: BaseException
) -> None:
    budget = spent(Budget(100), 10)
    sender = Sender(recorder, budget)
    recorder.failure = failure

    sender.post([b"lost"], 5)
    recorder.failure = None
    sender.post([b"lost as well"], 5)
    sender.send([b"and this"])
    end = sender.send_files([b"and a file"], -1, [FilePart(b"head", 0, 10, b"tail")], None)

    assert (sender.broken, recorder.aborted, recorder.sent, end) == (True, True, [], b"")
    assert budget.unused
    assert budget.is_cancelled, "so that nothing more is waited for"


# --- files ---


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk"
    path.write_bytes(b"0123456789")
    with path.open("rb") as disk:
        yield disk.fileno()


@pytest.fixture
def pair() -> Iterator[tuple[Sender, NbdClient]]:
    ours, theirs = socket.socketpair()
    transport = SocketTransport(ours)
    yield Sender(transport, Budget(100)), NbdClient(theirs)
    transport.close()
    theirs.close()


def test_a_file_follows_its_head_and_what_was_queued_meanwhile_follows_that(
    pair: tuple[Sender, NbdClient], file: int
) -> None:
    sender, client = pair
    sender._budget.take(1)
    sender._queue.append(([b"queued"], 1))

    assert sender.send_files([b"a", b"b"], file, [FilePart(b"head", 2, 5, b"tail")], None) == b"tail"

    assert client.receive_bytes(17) == b"abhead23456queued"
    assert sender._budget.unused


def test_between_files_stands_the_tail_of_one_and_the_head_of_the_next(
    pair: tuple[Sender, NbdClient], file: int
) -> None:
    sender, client = pair
    parts = [FilePart(b"<a>", 0, 2, b"</a>"), FilePart(b"<b>", 9, 1, b""), FilePart(b"<c>", 3, 3, b"</c>")]

    assert sender.send_files([], file, parts, None) == b"</c>"

    assert client.receive_bytes(19) == b"<a>01</a><b>9<c>345"


def test_a_file_that_is_too_short_is_made_up_for(pair: tuple[Sender, NbdClient], file: int) -> None:
    sender, client = pair
    parts = [FilePart(b"<a>", 8, 4, b"</a>"), FilePart(b"<b>", 0, 2, b"</b>")]

    end = sender.send_files([], file, parts, lambda index, missing: [b"%d:" % index, b"-" * missing])

    assert end == b"</b>"
    assert client.receive_bytes(14) == b"<a>890:--<b>01"
    assert not sender.broken


def test_after_a_last_one_that_is_too_short_nothing_is_left_to_say(pair: tuple[Sender, NbdClient], file: int) -> None:
    sender, client = pair

    end = sender.send_files(
        [], file, [FilePart(b"head", 2, 11, b"tail")], lambda _, missing: [b"-" * missing, b"error"]
    )

    assert end is None
    assert client.receive_bytes(20) == b"head23456789---error"
    assert not sender.broken


def test_without_that_the_connection_breaks(pair: tuple[Sender, NbdClient], file: int) -> None:
    sender, client = pair
    parts = [FilePart(b"header", 2, 11, b""), FilePart(b"another", 2, 1, b"")]

    sender.send_files([], file, parts, None)

    assert client.receive_bytes(14) == b"header23456789"
    assert client.at_end()
    assert sender.broken


def test_a_file_for_who_has_left_is_dropped(pair: tuple[Sender, NbdClient], file: int) -> None:
    sender, client = pair
    client.socket.close()

    assert sender.send_files([], file, [FilePart(b"header", 2, 5, b"tail")] * 2, None) == b"tail"
    assert sender.broken

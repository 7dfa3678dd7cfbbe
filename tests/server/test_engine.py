"""The engine: every request is answered once and rightly, by whoever should do it, and nothing piles up."""

from __future__ import annotations

import errno
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Buffer, Extent, ExtentType, FileRange, Handle, Support, ThreadModel
from nbdkitpy.exceptions import describe
from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError, ReplyType
from nbdkitpy.protocol.transmission import Request
from nbdkitpy.server import batch, reads, session
from nbdkitpy.server import engine as module
from nbdkitpy.server.budget import Budget
from nbdkitpy.server.checks import checked_data, checked_range
from nbdkitpy.server.commands import Commands
from nbdkitpy.server.engine import Engine
from nbdkitpy.server.transport import SocketTransport
from tests.budgets import Waiting, watched_budget
from tests.conftest import StartServer, StartSession
from tests.misdeeds import BAD_DATA, GOOD_DATA, RAISED, Unprintable
from tests.nbdclient import PATIENCE, NbdClient, Style
from tests.requests import EACH_VERB, VERBS, ask, check_pipeline, use_each_verb
from tests.serving import CONTENT, SIZE, Disk, Disks, Solo

ALL_STYLES = pytest.mark.parametrize("style", list(Style), ids=lambda style: style.value)
CHUNKED = pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED], ids=lambda style: style.value)

DATA, HOLE = int(ExtentType.DATA), int(ExtentType.HOLE | ExtentType.ZERO)


class Whole(Disk):
    """A disk that can do everything, and notes what it is asked for and in which thread."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.store = bytearray(CONTENT)
        self.calls: list[tuple[object, ...]] = []
        self.threads: list[threading.Thread] = []

    def noted(self, *call: object) -> None:
        self.calls.append(call)
        self.threads.append(threading.current_thread())

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        self.noted("pread", count, offset)
        return bytes(self.store[offset : offset + count])

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.noted("pwrite", len(data), offset, flags)
        self.store[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.noted("flush")

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.noted("trim", count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.noted("zero", count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self.noted("cache", count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self.noted("extents", count, offset, flags)
        return [Extent(offset, count)]


class Inline(Whole):
    inline = frozenset(VERBS)


class Handles(Disks):
    """Keeps the handles that it makes."""

    def __init__(self, handle: Callable[[Disks], Handle] = Whole, model: ThreadModel = ThreadModel.PARALLEL) -> None:
        super().__init__(self._keep, model)
        self._make = handle
        self.handles: list[Any] = []
        self.held: list[int] = []  # see Noting

    def _keep(self, plugin: Disks) -> Handle:
        self.handles.append(self._make(self))
        return self.handles[-1]  # type: ignore[no-any-return]


Serve = Callable[..., tuple[NbdClient, Any, Solo]]


@pytest.fixture
def serve(start_session: StartSession) -> Serve:
    """Serve a handle to one client; return client, handle and session."""

    def start(
        handle: Callable[[Disks], Handle] = Whole,
        style: Style = Style.STRUCTURED,
        model: ThreadModel = ThreadModel.PARALLEL,
        **options: Any,
    ) -> tuple[NbdClient, Any, Solo]:
        plugin = Handles(handle, model)
        solo = start_session(plugin, **options)
        solo.client.negotiate(style, contexts=style is not Style.SIMPLE)
        return solo.client, plugin.handles[0], solo

    return start


@pytest.fixture
def to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers make every call that is not inline."""
    monkeypatch.setattr(module, "_QUICK_AT_FIRST", frozenset())


# --- every request is answered, and rightly ---


@ALL_STYLES
@pytest.mark.parametrize("handle", [Whole, Inline])
@pytest.mark.parametrize("model", list(ThreadModel), ids=lambda model: model.name.lower())
def test_R6_requests_in_a_pipeline_are_all_answered(
    handle: Callable[[Disks], Handle], style: Style, model: ThreadModel, serve: Serve
) -> None:
    client, _, _ = serve(handle, style, model)

    check_pipeline(client)


@ALL_STYLES
def test_R6_a_cookie_may_be_used_twice_at_once(style: Style, serve: Serve) -> None:
    client, _, _ = serve(Inline, style)

    with client.batched():
        client.send(Command.READ, 0, 10, cookie=0)
        client.send(Command.READ, 0, 10, cookie=0)

    assert [client.reply().data for _ in range(2)] == [CONTENT[:10]] * 2


@pytest.mark.parametrize("model", [ThreadModel.PARALLEL, ThreadModel.SERIALIZE_ALL_REQUESTS], ids=["workers", "alone"])
@ALL_STYLES
def test_each_command_reaches_its_verb(style: Style, model: ThreadModel, serve: Serve) -> None:
    client, handle, _ = serve(Whole, style, model)

    use_each_verb(client)

    assert handle.calls == EACH_VERB


@ALL_STYLES
def test_invalid_requests_are_answered_between_valid_ones_and_logged_ten_times(
    style: Style, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client, _, _ = serve(Inline, style)

    with client.batched():
        bad = {client.send(Command.READ, SIZE, 1) for _ in range(50)}
        good = client.send(Command.READ, 0, 1)
    replies = client.replies(51)

    assert {cookie for cookie, reply in replies.items() if reply.error == NbdError.EINVAL} == bad
    assert replies[good].data == CONTENT[:1]
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 11
    assert all("beyond the end" in text for text in texts[:10])
    assert texts[10] == "disks[1]: further invalid requests of this client are not logged"


def test_a_long_batch_is_sent_in_parts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (module, batch):
        monkeypatch.setattr(user, "FULL", 10_000)
    client, _, _ = serve(Inline, Style.SIMPLE)
    sizes = note_sends(monkeypatch)

    with client.batched():
        for _ in range(10):
            client.send(Command.READ, 0, 4096)
        for _ in range(2):
            client.send(Command.READ, 0, 20000)
    client.replies(12)

    assert max(sizes) <= 10_000 + 20_000 + 16
    assert len(sizes) >= 5


def note_sends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    send = SocketTransport.send

    def noted(self: SocketTransport, pieces: list[Buffer], *, more: bool = False) -> None:
        sizes.append(sum(map(len, pieces)))
        send(self, pieces, more=more)

    monkeypatch.setattr(SocketTransport, "send", noted)
    return sizes


def test_small_reads_in_a_batch_cost_one_send(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, _, _ = serve(Inline, Style.SIMPLE)
    sizes = note_sends(monkeypatch)

    with client.batched():
        for _ in range(50):
            client.send(Command.READ, 0, 100)
    client.replies(50)

    assert sizes == [50 * 116]


# --- who makes the call ---


def by_session(handle: Any, solo: Solo) -> list[bool]:
    """For each call so far, whether the thread that reads requests made it."""
    return [thread is solo.thread for thread in handle.threads]


@pytest.mark.parametrize("verb", VERBS)
def test_what_never_waits_is_done_by_the_thread_that_reads(verb: str, serve: Serve, to_workers: None) -> None:
    client, handle, solo = serve(Inline)

    for _ in range(3):
        ask(client, verb)

    assert by_session(handle, solo) == [True] * 3


@pytest.mark.parametrize("verb", VERBS)
def test_what_may_wait_is_done_by_workers(verb: str, serve: Serve, to_workers: None) -> None:
    client, handle, solo = serve(Whole)

    for _ in range(3):
        ask(client, verb)

    assert by_session(handle, solo) == [False] * 3
    assert all(thread.name.startswith("disks[1].") for thread in handle.threads)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("model", "threads"),
    [(model, 16) for model in ThreadModel if model < ThreadModel.PARALLEL] + [(ThreadModel.PARALLEL, 1)],
)
def test_where_one_call_at_a_time_is_allowed_there_are_no_workers(
    verb: str, model: ThreadModel, threads: int, serve: Serve, to_workers: None
) -> None:
    client, handle, solo = serve(Whole, model=model, threads=threads)

    for _ in range(3):
        ask(client, verb)

    assert by_session(handle, solo) == [True] * 3


@pytest.mark.parametrize("verb", ["pread", "pwrite", "extents"])
def test_what_moves_memory_is_taken_as_quick_at_first(verb: str, serve: Serve) -> None:
    client, handle, solo = serve(Whole)

    ask(client, verb)

    assert by_session(handle, solo) == [True]


class Clock:
    """In place of the time: it goes by only as far as a backend says."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(Whole):
    """Takes as long as it is told."""

    clock: Clock
    takes = 0.0

    def noted(self, *call: object) -> None:
        super().noted(*call)
        self.clock.now += self.takes


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files sent that would be copied, as they are small."""
    monkeypatch.setattr(reads, "_COPIED", 32767)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for user in (module, reads):
        monkeypatch.setattr(user, "time", clock)
    monkeypatch.setattr(Timed, "clock", clock, raising=False)
    return clock


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_moves_to_the_workers_when_it_is_slow_and_back_when_it_is_quick(
    verb: str, serve: Serve, clock: Clock
) -> None:
    client, handle, solo = serve(Timed)
    for _ in range(64):
        ask(client, verb)  # those that have to show it have shown it now
    handle.threads.clear()

    ask(client, verb)
    handle.takes = 1.0
    ask(client, verb)
    ask(client, verb)
    handle.takes = 0.0
    for _ in range(65):
        ask(client, verb)

    assert by_session(handle, solo) == [True, True] + [False] * 65 + [True]


def test_a_slow_write_says_nothing_of_reads(serve: Serve, clock: Clock) -> None:
    client, handle, solo = serve(Timed)
    handle.takes = 1.0
    ask(client, "pwrite")

    ask(client, "pwrite")
    ask(client, "pread")

    assert by_session(handle, solo) == [True, False, True]


def test_a_durable_write_keeps_the_pace_of_a_flush(serve: Serve, clock: Clock) -> None:
    client, handle, solo = serve(Timed)

    ask(client, "pwrite", flags=CommandFlag.FUA)
    ask(client, "pwrite")

    assert by_session(handle, solo) == [False, True]


def test_an_inline_write_is_durable_inline_only_if_a_flush_is(serve: Serve) -> None:
    class Writer(Whole):
        inline = frozenset({"pwrite"})

    client, handle, solo = serve(Writer)

    ask(client, "pwrite")
    ask(client, "pwrite", flags=CommandFlag.FUA)

    assert by_session(handle, solo) == [True, False]


class Cached(Whole):
    """Has the first 64 KiB at hand; the rest has to be waited for."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.tried: list[threading.Thread] = []
        self.pread_into = self._pread_into

    def _pread_into(self, buffer: memoryview, offset: int) -> bool:
        self.tried.append(threading.current_thread())
        if offset + len(buffer) > 65536:
            return False
        buffer[:] = CONTENT[offset : offset + len(buffer)]
        return True


@ALL_STYLES
@pytest.mark.parametrize("length", [512, 20000, 40000])
def test_a_read_that_would_wait_goes_to_a_worker(length: int, style: Style, serve: Serve) -> None:
    client, handle, solo = serve(Cached, style)

    assert client.read(0, length) == CONTENT[:length]
    assert not handle.calls
    assert client.read(65536, length) == CONTENT[65536 : 65536 + length]

    assert by_session(handle, solo) == [False]
    assert handle.tried == [solo.thread] * 2


def test_a_read_that_waits_holds_up_no_other(serve: Serve) -> None:
    gate = threading.Event()

    class Stuck(Cached):
        def pread(self, count: int, offset: int) -> bytes:
            assert gate.wait(PATIENCE)
            return super().pread(count, offset)

    client, _, _ = serve(Stuck)
    stuck = client.send(Command.READ, 65536, 512)

    for _ in range(20):
        assert client.read(0, 512) == CONTENT[:512]
    gate.set()

    assert client.reply().cookie == stuck


@pytest.mark.parametrize("model", list(ThreadModel)[:3], ids=lambda model: model.name.lower())
def test_a_try_is_not_made_where_calls_are_serialised(model: ThreadModel, serve: Serve) -> None:
    client, handle, _ = serve(Cached, model=model)

    client.read(0, 512)

    assert not handle.tried


@pytest.mark.parametrize("first", ["pread", "flush"])
@pytest.mark.parametrize("then", ["pread", "flush"])
def test_where_calls_are_slow_a_reply_does_not_wait_for_the_next_one(
    first: str, then: str, serve: Serve, clock: Clock
) -> None:
    gate = threading.Event()

    class Slow(Timed):
        takes = 1.0

        def noted(self, *call: object) -> None:
            super().noted(*call)
            assert len(self.calls) != 4 or gate.wait(PATIENCE)

    client, _, _ = serve(Slow, model=ThreadModel.SERIALIZE_REQUESTS)
    for verb in (first, then):
        ask(client, verb)

    with client.batched():
        client.send(VERBS[first], 0, 512 if first == "pread" else 0)
        client.send(VERBS[then], 0, 512 if then == "pread" else 0)
    client.reply()
    gate.set()

    client.reply()


def test_without_threads_the_work_is_done_all_the_same(
    serve: Serve, to_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, handle, solo = serve(Whole)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)

    for verb in VERBS:
        assert not ask(client, verb).error
    assert by_session(handle, solo) == [True] * len(VERBS)
    client.disconnect()


# --- payloads ---


@ALL_STYLES
@pytest.mark.parametrize("handle", [Whole, Inline])
def test_each_write_has_its_own_data_however_late_it_is_done(
    handle: type[Whole], style: Style, serve: Serve, to_workers: None
) -> None:
    gate = threading.Event()
    gate.set()

    class Late(handle):  # type: ignore[valid-type, misc]
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            assert gate.wait(PATIENCE)
            super().pwrite(data, offset, flags)

    client, disk, _ = serve(Late, style)
    if handle is Whole:
        gate.clear()
    some = random.Random(3)
    expected = bytearray(CONTENT)
    offset, sent = 0, 0

    for length in (512, 4096, 100_000, 200_000, 7, 300_000, 200_000, 1):
        data = some.randbytes(length)
        client.send(Command.WRITE, offset, data=data)
        expected[offset : offset + length] = data
        offset, sent = offset + length, sent + 1
    gate.set()
    replies = client.replies(sent)

    assert not any(reply.error for reply in replies.values())
    assert disk.store == expected


# --- reads straight from a file ---


class FromFile(Whole):
    """Says where its bytes lie, in a file of its own."""

    path: Path

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.path.write_bytes(CONTENT)
        self.fd = os.open(self.path, os.O_RDWR)
        self.file_range = self._file_range
        self.asked: list[tuple[int, int]] = []

    def _file_range(self, count: int, offset: int) -> FileRange | None:
        self.asked.append((count, offset))
        return FileRange(self.fd, offset)

    def close(self) -> None:
        os.close(self.fd)
        super().close()


@pytest.fixture(autouse=True)
def _file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FromFile, "path", tmp_path / "disk", raising=False)


@ALL_STYLES
def test_large_reads_are_sent_from_the_file(style: Style, serve: Serve) -> None:
    client, handle, _ = serve(FromFile, style)

    with client.batched():
        small = client.send(Command.READ, 5, 1000)
        large = client.send(Command.READ, 1000, 300_000)
        other = client.send(Command.READ, 6, 1000)
        exact = client.send(Command.READ, 0, 32768)
    replies = client.replies(4)

    assert replies[small].data == CONTENT[5:1005]
    assert replies[large].data == CONTENT[1000:301_000]
    assert replies[other].data == CONTENT[6:1006]
    assert replies[exact].data == CONTENT[:32768]
    assert handle.asked == [(300_000, 1000), (32768, 0)]
    assert handle.calls == [("pread", 1000, 5), ("pread", 1000, 6)]
    if style is not Style.SIMPLE:  # DONE is not on what can still fail
        assert replies[large].kinds == [ReplyType.OFFSET_DATA, ReplyType.NONE]


def read_in_a_batch(client: NbdClient, *ranges: tuple[int, int]) -> None:
    """Read ranges (length, offset) in one batch, and see that each has its own data."""
    with client.batched():
        cookies = [client.send(Command.READ, offset, length) for length, offset in ranges]
    replies = client.replies(len(ranges))
    for cookie, (length, offset) in zip(cookies, ranges):
        assert replies[cookie].data == CONTENT[offset : offset + length]


@ALL_STYLES
def test_reads_that_follow_each_other_are_looked_for_together(style: Style, serve: Serve) -> None:
    client, handle, _ = serve(FromFile, style)

    read_in_a_batch(client, (40_000, 0), (50_000, 40_000), (10, 5), (60_000, 90_000), (40_000, 0), (40_000, 50_000))

    assert handle.asked == [(150_000, 0), (40_000, 0), (40_000, 50_000)]


def test_not_too_many_are_looked_for_together(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_LONGEST_RUN", 100_000)
    client, handle, _ = serve(FromFile)

    read_in_a_batch(client, *((40_000, start) for start in range(0, 200_000, 40_000)))

    assert handle.asked == [(120_000, 0), (80_000, 120_000)]


@ALL_STYLES
@pytest.mark.parametrize("why", [None, OSError(errno.EIO, "too much at once")], ids=repr)
def test_if_they_are_not_together_each_is_looked_for(why: OSError | None, style: Style, serve: Serve) -> None:
    class OneByOne(FromFile):
        def _file_range(self, count: int, offset: int) -> FileRange | None:
            found = super()._file_range(count, offset)
            if count == 40_000:
                return found if offset else None
            if why is not None:
                raise why
            return None

    client, handle, solo = serve(OneByOne, style)

    read_in_a_batch(client, (40_000, 0), (40_000, 40_000))

    assert handle.asked == [(80_000, 0), (40_000, 0), (40_000, 40_000)]
    assert handle.calls == [("pread", 40_000, 0)]
    assert by_session(handle, solo) == [True]


@CHUNKED
def test_of_those_that_follow_each_other_one_may_have_become_too_short(style: Style, serve: Serve) -> None:
    client, handle, _ = serve(FromFile, style)
    os.truncate(handle.fd, 100_000)

    with client.batched():
        cookies = [client.send(Command.READ, start, 40_000) for start in (0, 40_000, 80_000, 120_000)]
    replies = client.replies(4)

    assert handle.asked == [(160_000, 0)]
    assert [replies[cookie].error for cookie in cookies] == [0, 0, NbdError.EIO, NbdError.EIO]
    assert [replies[cookie].data for cookie in cookies[:2]] == [CONTENT[:40_000], CONTENT[40_000:80_000]]


@CHUNKED
def test_a_file_can_be_sent_in_one_piece_where_that_is_asked_for(style: Style, serve: Serve) -> None:
    client, handle, _ = serve(FromFile, style)

    reply = client.call(Command.READ, 0, 40000, flags=CommandFlag.DF)

    assert reply.data == CONTENT[:40000]
    assert handle.asked == [(40000, 0)]


def test_what_is_not_at_hand_in_the_file_is_read(serve: Serve) -> None:
    class NotThere(FromFile):
        def _file_range(self, count: int, offset: int) -> FileRange | None:
            super()._file_range(count, offset)
            return None

    client, handle, _ = serve(NotThere)

    assert client.read(0, 40000) == CONTENT[:40000]
    assert handle.asked == [(40000, 0)]
    assert handle.calls == [("pread", 40000, 0)]


@pytest.mark.parametrize("model", [ThreadModel.SERIALIZE_CONNECTIONS, ThreadModel.SERIALIZE_ALL_REQUESTS])
def test_a_file_is_not_asked_for_where_a_lock_would_be_held_while_it_is_sent(model: ThreadModel, serve: Serve) -> None:
    client, handle, _ = serve(FromFile, model=model)

    assert client.read(0, 40000) == CONTENT[:40000]
    assert not handle.asked


@CHUNKED
@pytest.mark.parametrize("length", [0, 1000, 40000])
def test_CVE_2022_0485_a_file_that_has_become_shorter_is_an_error_of_that_read_alone(
    length: int, style: Style, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client, handle, _ = serve(FromFile, style)
    os.truncate(handle.fd, length)

    with client.batched():
        before = client.send(Command.READ, 0, 100)
        large = client.send(Command.READ, 0, 50000)
        after = client.send(Command.READ, 0, 100)
    replies = client.replies(3)

    assert replies[large].error == NbdError.EIO
    assert replies[large].text == "the file has become shorter"
    assert replies[large].kinds == [ReplyType.OFFSET_DATA, ReplyType.ERROR]
    assert replies[before].data == replies[after].data == CONTENT[:100]
    assert "disks[1]: pread of 50000 bytes at 0: [Errno 5] the file has become shorter" in caplog.messages


def test_where_that_cannot_be_said_the_connection_ends(serve: Serve) -> None:
    client, handle, solo = serve(FromFile, Style.SIMPLE)
    os.truncate(handle.fd, 1000)

    client.send(Command.READ, 0, 50000)

    client.receive_bytes(16 + 1000)
    assert client.at_end()
    solo.join()


@ALL_STYLES
@pytest.mark.parametrize(
    "where",
    [
        "here",
        (),
        (1, 2, 3),
        [0, 0],
        (None, 0),
        (0, "0"),
        (0, 1.5),
        (-1, 0),
        (1 << 31, 0),
        (0, -1),
        (0, 1 << 63),
        ValueError("broken"),
        SystemExit(1),
    ],
    ids=repr,
)
def test_a_place_that_is_none_is_an_error_of_that_read_alone(where: object, style: Style, serve: Serve) -> None:
    class Lost(FromFile):
        def _file_range(self, count: int, offset: int) -> FileRange | None:
            if isinstance(where, BaseException):
                raise where
            return where  # type: ignore[return-value]

    client, _, _ = serve(Lost, style)

    assert client.call(Command.READ, 0, 50000).error == NbdError.EIO
    assert client.read(0, 100) == CONTENT[:100]


@CHUNKED
def test_a_descriptor_that_is_closed_is_an_error_of_that_read_alone(style: Style, serve: Serve) -> None:
    class Gone(FromFile):
        def _file_range(self, count: int, offset: int) -> FileRange | None:
            return FileRange(1 << 20, 0)

    client, _, _ = serve(Gone, style)

    assert client.call(Command.READ, 0, 50000).error == NbdError.EIO
    assert client.read(0, 100) == CONTENT[:100]


# --- holes ---


class Sparse(Whole):
    """Every other 16 KiB are a hole."""

    sparse = True
    step = 16384

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        for start in range(0, SIZE, 2 * self.step):
            self.store[start : start + self.step] = bytes(self.step)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self.noted("extents", count, offset, flags)
        first = offset - offset % self.step
        for start in range(first, offset + count, self.step):
            yield Extent(start, self.step, DATA if start // self.step % 2 else HOLE)


class SparseInline(Sparse):
    inline = frozenset(VERBS)


class SparseFile(Sparse, FromFile):
    inline = frozenset({"extents"})


SPARSE = pytest.mark.parametrize("handle", [Sparse, SparseInline, SparseFile])


@CHUNKED
@SPARSE
@pytest.mark.parametrize("model", [ThreadModel.PARALLEL, ThreadModel.SERIALIZE_REQUESTS], ids=["parallel", "serialize"])
def test_holes_are_told_and_not_sent(
    handle: Callable[[Disks], Handle], model: ThreadModel, style: Style, serve: Serve
) -> None:
    client, disk, _ = serve(handle, style, model)

    reply = client.call(Command.READ, 8192, 40960)

    assert reply.data == disk.store[8192:49152]
    assert reply.holes == [(8192, 8192), (32768, 16384)]
    assert reply.kinds == [
        ReplyType.OFFSET_HOLE,
        ReplyType.OFFSET_DATA,
        ReplyType.OFFSET_HOLE,
        ReplyType.NONE,
    ]
    assert [call for call in disk.calls if call[0] == "pread"] == [("pread", 16384, 16384)]


@CHUNKED
@SPARSE
def test_a_range_without_holes_is_sent_as_it_is(handle: Any, style: Style, serve: Serve) -> None:
    client, disk, _ = serve(handle, style)
    disk.store[:] = CONTENT

    reply = client.call(Command.READ, 16384, 16384)

    assert reply.data == CONTENT[16384:32768]
    assert not reply.holes


def test_a_file_without_holes_in_the_range_is_sent_from_the_file(serve: Serve) -> None:
    class Dense(SparseFile):
        step = SIZE

        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            return [Extent(offset, count)]

    client, handle, _ = serve(Dense)

    assert client.read(0, 40000) == CONTENT[:40000]
    assert handle.asked == [(40000, 0)]


@SPARSE
@pytest.mark.parametrize(
    ("style", "length", "flags"),
    [(Style.SIMPLE, 40960, 0), (Style.STRUCTURED, 40960, int(CommandFlag.DF)), (Style.STRUCTURED, 16383, 0)],
    ids=["simple replies", "DF", "too small"],
)
def test_where_holes_cannot_be_told_nobody_asks_for_them(
    handle: Any, style: Style, length: int, flags: int, serve: Serve
) -> None:
    client, disk, _ = serve(handle, style)
    if isinstance(disk, FromFile):
        os.pwrite(disk.fd, disk.store, 0)

    reply = client.call(Command.READ, 0, length, flags=flags)

    assert reply.data == disk.store[:length]
    assert not reply.holes
    assert "extents" not in [call[0] for call in disk.calls]


def test_a_range_in_too_many_pieces_is_sent_whole(serve: Serve) -> None:
    class Fine(Sparse):
        step = 512

    client, disk, _ = serve(Fine)

    reply = client.call(Command.READ, 0, 32768)

    assert reply.data == disk.store[:32768]
    assert not reply.holes


def test_extents_that_do_not_cover_the_range_are_not_relied_upon(serve: Serve) -> None:
    class Vague(Sparse):
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            return [Extent(offset, 512, HOLE)]

    client, disk, _ = serve(Vague)

    reply = client.call(Command.READ, 0, 32768)

    assert reply.data == disk.store[:32768]
    assert not reply.holes


class SparseLarge(SparseFile, Cached):
    """Has more data at once than are copied at once."""

    step = 65536


@CHUNKED
def test_large_data_between_holes_are_sent_from_the_file(style: Style, serve: Serve) -> None:
    client, disk, _ = serve(SparseLarge, style)

    reply = client.call(Command.READ, 0, SIZE)

    assert reply.data == disk.store
    assert len(reply.holes) == 8
    assert not [call for call in disk.calls if call[0] == "pread"]
    assert not disk.tried


@CHUNKED
def test_large_data_between_holes_that_are_not_all_at_hand_go_to_a_worker(style: Style, serve: Serve) -> None:
    class Partly(SparseLarge):
        def _file_range(self, count: int, offset: int) -> FileRange | None:
            return super()._file_range(count, offset) if offset < SIZE // 2 else None

    client, disk, solo = serve(Partly, style)

    assert client.call(Command.READ, 0, SIZE).data == disk.store
    assert by_session(disk, solo)[1:] == [False] * 9  # it asks for the holes once more


@CHUNKED
def test_large_data_between_holes_go_to_a_worker_if_there_is_no_file(style: Style, serve: Serve) -> None:
    class NoFile(SparseLarge):
        def __init__(self, plugin: Disks) -> None:
            super().__init__(plugin)
            self.file_range = None

    client, disk, solo = serve(NoFile, style)

    assert client.call(Command.READ, 0, SIZE).data == disk.store
    assert by_session(disk, solo)[1:] == [False] * 9


@CHUNKED
def test_CVE_2022_0485_a_file_that_becomes_shorter_ends_a_read_with_holes(style: Style, serve: Serve) -> None:
    client, disk, _ = serve(SparseLarge, style)
    os.truncate(disk.fd, SIZE // 2)

    reply = client.call(Command.READ, 0, SIZE)

    assert (reply.error, reply.text) == (NbdError.EIO, "the file has become shorter")
    assert client.read(65536, 100) == CONTENT[65536:][:100]


@CHUNKED
def test_a_read_with_holes_whose_data_would_wait_goes_to_a_worker(style: Style, serve: Serve) -> None:
    class Half(SparseInline, Cached):
        inline = frozenset({"extents"})

    client, disk, solo = serve(Half, style)

    reply = client.call(Command.READ, 32768, 131072)

    assert reply.data == disk.store[32768:163840]
    assert len(reply.holes) == 4
    assert [thread is solo.thread for thread in disk.tried] == [True] * 2  # the second one is not at hand
    preads = [thread for call, thread in zip(disk.calls, disk.threads) if call[0] == "pread"]
    assert len(preads) == 4
    assert solo.thread not in preads


@pytest.mark.parametrize("handle", [Sparse, SparseInline])
def test_extents_that_fail_fail_the_read(handle: type[Sparse], serve: Serve) -> None:
    class Broken(handle):  # type: ignore[valid-type, misc]
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            raise OSError(errno.ENOMEM, "too much")

    client, disk, _ = serve(Broken)

    assert client.call(Command.READ, 0, 32768).error == NbdError.ENOMEM
    assert client.read(0, 100) == disk.store[:100]


# --- block status ---


@CHUNKED
def test_R7_the_block_status_is_what_the_handle_says_of_the_range(style: Style, serve: Serve) -> None:
    client, _, _ = serve(Sparse, style)

    assert ask(client, "extents", 100, 40000).extents == [(16284, HOLE), (16384, DATA), (7332, HOLE)]
    assert ask(client, "extents", 100, 40000, flags=CommandFlag.REQ_ONE).extents == [(16284, HOLE)]


@CHUNKED
def test_of_what_does_not_know_its_extents_all_is_data(style: Style, serve: Serve) -> None:
    client, _, _ = serve(Disk, style)

    assert ask(client, "extents", 100, 40000).extents == [(40000, DATA)]


@CHUNKED
@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "text",
        [(0,)],
        [(0, -1, 0)],
        [(0, 4096, 9)],
        [(1, 4096, 0)],
        [(0, 512, 0), (100, 512, 0)],
        [(0, 512, 0), (1024, 512, 0)],
        [(0, 0, 0), (0, 0, 3)],
        [(0, 4096, -1)],
        [(4096, 4096, 0), (0, 4096, 0)],
        [(0, 1.5, 0)],
    ],
    ids=repr,
)
def test_G4_R7_extents_that_cannot_be_are_an_error(answer: object, style: Style, serve: Serve) -> None:
    class Odd(Whole):
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            return answer  # type: ignore[return-value]

    client, _, _ = serve(Odd, style)

    assert ask(client, "extents").error == NbdError.EIO
    assert client.read(0, 100) == CONTENT[:100]


@CHUNKED
@pytest.mark.parametrize("flags", [0, CommandFlag.REQ_ONE])
def test_R7_CVE_2023_5871_extents_are_cut_to_the_request_however_long_they_are(
    style: Style, flags: int, serve: Serve
) -> None:
    class Long(Whole):
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            yield (0, 0, HOLE)
            yield (0, offset + 512, HOLE)
            yield (offset + 512, 1 << 70, DATA)
            raise AssertionError("nobody asks for more")

    client, _, _ = serve(Long, style)

    expected = [(512, HOLE)] if flags else [(512, HOLE), (3584, DATA)]
    assert ask(client, "extents", SIZE - 4096, 4096, flags=flags).extents == expected


# --- what a backend may raise ---


def raising(verb: str, error: BaseException, base: type[Whole]) -> type[Whole]:
    def fail(self: Whole, *args: object) -> None:
        self.noted(verb, *args)
        raise error

    return type("Raising", (base,), {verb: fail})


@pytest.mark.parametrize("base", [Inline, Whole], ids=["inline", "worker"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("error", "wire"), RAISED, ids=lambda value: f"{type(value).__name__}")
def test_G1_whatever_a_verb_raises_is_an_error_of_that_request_alone(
    error: BaseException, wire: NbdError, verb: str, base: type[Whole], serve: Serve, to_workers: None
) -> None:
    client, handle, _ = serve(raising(verb, error, base))

    for _ in range(2):
        assert ask(client, verb).error == wire
    assert handle.calls[0][0] == verb

    for other in VERBS.keys() - {verb}:
        assert not ask(client, other).error


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("model", list(ThreadModel)[:3], ids=lambda model: model.name.lower())
def test_the_same_where_calls_are_serialised(verb: str, model: ThreadModel, serve: Serve) -> None:
    client, _, _ = serve(raising(verb, SystemExit(1), Whole), model=model)

    for _ in range(2):
        assert ask(client, verb).error == NbdError.EIO

    for other in VERBS.keys() - {verb}:
        assert not ask(client, other).error


def test_where_not_even_an_error_can_be_told_the_connection_ends(
    serve: Serve, to_workers: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Commands, "failure", fail)
    client, _, solo = serve(raising("flush", MemoryError(), Whole))

    client.send(Command.FLUSH)

    assert client.at_end()
    solo.join()
    assert "disks[1]: MemoryError" in caplog.messages


def test_an_error_is_logged_with_its_text_and_a_defect_with_its_traceback(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client, _, _ = serve(raising("pread", OSError(errno.EIO, "worn out"), Inline))
    ask(client, "pread", 512, 100)
    other, _, _ = serve(raising("pread", KeyError("missing"), Inline))
    ask(other, "pread", 512, 100)

    expected, defect = caplog.records
    assert expected.getMessage() == "disks[1]: pread of 100 bytes at 512: [Errno 5] worn out"
    assert not expected.exc_info
    assert defect.getMessage() == "disks[1]: pread of 100 bytes at 512: KeyError: 'missing'"
    assert defect.exc_info


def test_the_client_is_told_the_text_of_an_error_but_not_that_of_a_defect(serve: Serve) -> None:
    client, _, _ = serve(raising("pread", OSError(errno.EIO, "worn out\n" + "x" * 9000), Inline))
    text = ask(client, "pread").text
    assert text.startswith("worn out\\nxxx")
    assert len(text) < 4096
    other, _, _ = serve(raising("pread", ValueError("secret"), Inline))

    assert ask(other, "pread").text == "internal error of the server"


@pytest.mark.parametrize(
    ("verb", "number", "flags", "wire"),
    [
        ("zero", errno.EOPNOTSUPP, CommandFlag.FAST_ZERO, NbdError.ENOTSUP),
        ("pread", errno.EOVERFLOW, CommandFlag.DF, NbdError.EOVERFLOW),
        ("pread", errno.EOVERFLOW, 0, NbdError.EINVAL),
        ("trim", errno.EOPNOTSUPP, 0, NbdError.EINVAL),
    ],
)
def test_R9_some_errors_are_for_some_flags_only(
    verb: str, number: int, flags: int, wire: NbdError, serve: Serve
) -> None:
    client, _, _ = serve(raising(verb, OSError(number, "no"), Whole))

    assert ask(client, verb, flags=flags).error == wire


# --- what a backend may return ---


BAD = pytest.mark.parametrize("data", BAD_DATA, ids=lambda data: f"{type(data).__name__}")


def returning(data: object, base: type[Whole]) -> type[Whole]:
    """A handle whose next read returns `data`, and those after it what they should."""

    def pread(self: Whole, count: int, offset: int) -> object:
        bad = not any(call[0] == "bad" for call in self.calls) or offset == 0
        self.noted("bad")
        return data if bad and offset == 0 else CONTENT[offset : offset + count]

    return type("Returning", (base,), {"pread": pread})


@BAD
@ALL_STYLES
@pytest.mark.parametrize(
    ("base", "model"),
    [
        (Inline, ThreadModel.PARALLEL),
        (Whole, ThreadModel.PARALLEL),
        (Whole, ThreadModel.SERIALIZE_ALL_REQUESTS),
        (Inline, ThreadModel.SERIALIZE_REQUESTS),
    ],
    ids=["inline", "worker", "alone", "alone inline"],
)
def test_G2_nbdkit_b1ce255e_what_is_not_the_data_is_an_error_and_no_byte_of_it_is_sent(
    data: object, style: Style, base: type[Whole], model: ThreadModel, serve: Serve, to_workers: None
) -> None:
    client, _, _ = serve(returning(data, base), style, model)

    for _ in range(2):
        assert client.call(Command.READ, 0, 4096).error == NbdError.EIO

    assert client.read(4096, 4096) == CONTENT[4096:8192]


def test_a_read_into_memory_may_fail(serve: Serve) -> None:
    class Failing(Cached):
        def _pread_into(self, buffer: memoryview, offset: int) -> bool:
            if not offset:
                raise OSError(errno.EIO, "a bad place")
            return super()._pread_into(buffer, offset)

    client, handle, _ = serve(Failing)

    assert client.call(Command.READ, 0, 4096).error == NbdError.EIO
    assert not handle.calls
    assert client.read(4096, 4096) == CONTENT[4096:8192]


@BAD
@CHUNKED
def test_the_same_of_a_part_between_holes(data: object, style: Style, serve: Serve) -> None:
    class Bad(Sparse):
        step = 4096

        def pread(self, count: int, offset: int) -> bytes:
            return data if offset == 4096 else super().pread(count, offset)  # type: ignore[return-value]

    client, disk, _ = serve(Bad, style)

    assert client.call(Command.READ, 0, 16384).error == NbdError.EIO
    assert client.read(8192, 4096) == disk.store[8192:12288]


@pytest.mark.parametrize("data", GOOD_DATA, ids=lambda data: type(data).__name__)
@ALL_STYLES
def test_every_kind_of_buffer_is_sent_as_its_bytes(data: object, style: Style, serve: Serve) -> None:
    client, _, _ = serve(returning(data, Inline), style)

    assert client.read(0, 4096) == CONTENT[:4096]


def test_data_is_not_copied() -> None:
    data, view = bytes(10), memoryview(bytearray(10))

    assert checked_data(data, 10) is data
    assert checked_data(view, 10).obj is view.obj  # type: ignore[union-attr]


def test_what_is_wrong_with_data_is_said() -> None:
    with pytest.raises(TypeError, match="pread must return bytes, a bytearray or a memoryview, not str"):
        checked_data("text", 4)
    with pytest.raises(ValueError, match="pread must return 4 bytes, not 3"):
        checked_data(b"abc", 4)


def test_what_is_wrong_with_a_place_is_said() -> None:
    assert checked_range((3, 4)) == FileRange(3, 4)
    with pytest.raises(TypeError, match=r"file_range must return a FileRange or None, not 'x'"):
        checked_range("x")
    with pytest.raises(ValueError, match=r"file_range must return a file descriptor and a position, not \(-1, 0\)"):
        checked_range((-1, 0))


def test_an_exception_is_described_whatever_it_does() -> None:
    assert describe(ValueError("wrong")) == "ValueError: wrong"
    assert describe(OSError(5, "broken")) == "[Errno 5] broken"
    assert describe(Unprintable()) == "Unprintable"


# --- nothing piles up ---


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> type[Waiting]:
    """Budgets of connections, and an event that is set when one is used up."""
    return watched_budget(monkeypatch)


class Cold(Whole):
    """Has nothing at hand: workers read everything."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = lambda buffer, offset: False


def test_a_client_that_takes_no_replies_is_not_served_without_end(
    start_server: StartServer, budget: type[Waiting]
) -> None:
    plugin = Handles(Cold)
    server = start_server(plugin, max_buffered_per_connection=4 << 20)
    greedy, good = server.connect(), server.connect()
    with greedy.batched():
        cookies = {greedy.send(Command.READ, 0, SIZE) for _ in range(50)}

    assert budget.waits.wait(PATIENCE)
    good_reads = [good.read(offset, 4096) for offset in range(0, SIZE, 65536)]

    assert good_reads == [CONTENT[offset : offset + 4096] for offset in range(0, SIZE, 65536)]
    assert budget.most <= 4 << 20
    assert len(plugin.handles[0].calls) <= 5  # what is in hand, and what the socket holds
    replies = greedy.replies(50)
    assert replies.keys() == cookies
    assert all(reply.data == CONTENT for reply in replies.values())


def test_a_client_that_sends_faster_than_is_written_is_not_read_without_end(
    serve: Serve, budget: type[Waiting], to_workers: None
) -> None:
    gate = threading.Event()

    class Stuck(Whole):
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            assert gate.wait(PATIENCE)
            super().pwrite(data, offset, flags)

    client, handle, _ = serve(Stuck, max_buffered_per_connection=4 << 20)

    def send() -> None:
        for _ in range(30):
            client.send(Command.WRITE, 0, data=CONTENT)

    sender = threading.Thread(target=send)
    sender.start()
    assert budget.waits.wait(PATIENCE)
    gate.set()
    replies = client.replies(30)
    sender.join(PATIENCE)

    assert not any(reply.error for reply in replies.values())
    assert budget.most <= 4 << 20
    assert handle.store == CONTENT


def test_what_is_read_in_the_reading_thread_waits_for_the_client_too(serve: Serve) -> None:
    ahead: list[int] = []
    received = 0

    class Counting(Inline):
        def pread(self, count: int, offset: int) -> bytes:
            ahead.append(len(self.calls) * SIZE - received)
            return super().pread(count, offset)

    client, _, _ = serve(Counting, Style.SIMPLE)
    with client.batched():
        for _ in range(50):
            client.send(Command.READ, 0, SIZE)

    for _ in range(50):
        assert client.reply().data == CONTENT
        received += SIZE

    assert max(ahead) <= 4 * SIZE


class Fragments(Whole):
    """Has so many extents that what tells of them is large."""

    def get_size(self) -> int:
        return 1 << 30

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [Extent(offset + at, 512, DATA if at % 1024 else HOLE) for at in range(0, 200_000 * 512, 512)]


class InlineFragments(Fragments):
    inline = frozenset({"extents"})


class Taken(Budget):
    """Notes what was taken and given back."""

    costs: list[int]

    def take(self, cost: int, *, has_payload: bool = False) -> None:
        self.costs.append(cost)
        super().take(cost, has_payload=has_payload)

    def give(self, cost: int) -> None:
        self.costs.append(-cost)
        super().give(cost)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(Taken, "costs", [], raising=False)
    monkeypatch.setattr(session, "Budget", Taken)
    return Taken.costs


@pytest.mark.parametrize("handle", [Fragments, InlineFragments])
def test_a_long_block_status_counts_for_what_it_is(
    handle: type[Fragments], serve: Serve, costs: list[int], to_workers: None
) -> None:
    client, _, solo = serve(handle)

    reply = client.call(Command.BLOCK_STATUS, 0, 1 << 30)
    client.disconnect()
    solo.join()

    assert len(reply.extents) == 200_000
    assert sum(costs) == 0
    assert 200_000 * 8 < -costs[-1] < 200_000 * 8 + (65 << 10)


class Noting(Disk):
    """Notes what counts as held while it reads."""

    def pread(self, count: int, offset: int) -> bytes:
        assert isinstance(self.plugin, Handles)
        self.plugin.held.append(sum(Taken.costs))
        return super().pread(count, offset)


class NotingInline(Noting):
    inline = frozenset({"pread"})


class NotingHoles(NotingInline):
    inline = frozenset({"pread", "extents"})
    sparse = True

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        half = count // 2
        return [Extent(offset, half, HOLE), Extent(offset + half, count - half, DATA)]


@pytest.mark.parametrize(
    ("handle", "length", "held"),
    [
        (Noting, SIZE, SIZE),
        (NotingInline, SIZE, SIZE),
        (NotingInline, SIZE - 1, 0),  # which goes out with others
        (NotingHoles, SIZE, SIZE // 2),
    ],
)
def test_a_large_read_counts_from_before_it_is_made_until_it_is_sent(
    handle: type[Noting], length: int, held: int, serve: Serve, costs: list[int]
) -> None:
    client, disk, solo = serve(handle)

    reply = client.call(Command.READ, 0, length)
    client.disconnect()
    solo.join()

    assert len(reply.data) == length
    assert disk.plugin.held == [held]
    assert sum(costs) == 0


def test_a_large_read_for_workers_counts_once(serve: Serve, costs: list[int], to_workers: None) -> None:
    client, disk, _ = serve(Noting)

    client.read(0, SIZE)

    assert disk.plugin.held == [SIZE + (64 << 10)]
    assert len([cost for cost in costs if cost >= SIZE]) == 1


@pytest.mark.parametrize(
    ("command", "length", "cost"),
    [
        (Command.READ, 1 << 20, 1 << 20),
        (Command.WRITE, 1 << 20, 1 << 20),
        (Command.TRIM, 1 << 40, 0),
        (Command.FLUSH, 0, 0),
        (Command.WRITE_ZEROES, 1 << 40, 0),
        (Command.CACHE, 1 << 40, 0),
        (Command.BLOCK_STATUS, 1 << 20, 1 << 20),
        (Command.BLOCK_STATUS, 1 << 40, 16 << 20),  # its reply has at most a million extents
    ],
)
def test_a_request_counts_for_the_memory_that_it_may_take(command: Command, length: int, cost: int) -> None:
    request = Request(command, 0, 1, 0, length, memoryview(b""))

    assert module.cost_of(request) == cost + (64 << 10)


# --- quiet times ---


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Have a client's silence be noticed at once; released each time that it is."""
    monkeypatch.setattr(module, "_QUIET", 0.005)
    rested = threading.Semaphore(0)
    rest = Engine._rest

    def noted(self: Engine) -> None:
        rest(self)
        rested.release()

    monkeypatch.setattr(Engine, "_rest", noted)
    return rested


def test_a_quiet_connection_gives_back_its_workers_and_memory(
    serve: Serve, to_workers: None, rests: threading.Semaphore
) -> None:
    client, _, solo = serve(Whole)
    with client.batched():
        for _ in range(20):
            client.send(Command.WRITE, 0, data=CONTENT[:300_000])
    client.replies(20)
    engine = solo.session._engine
    assert engine is not None

    for _ in range(3):  # the first may have been before all that
        assert rests.acquire(timeout=PATIENCE)

    assert not engine._workers._threads
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("disks[1].")]
    assert len(engine._transmission._view) <= 8192
    assert not engine._budget._kept
    assert not engine._batch.memory
    assert client.read(0, 512) == CONTENT[:512]


def test_a_quiet_connection_holds_no_payload(serve: Serve, rests: threading.Semaphore) -> None:
    client, _, solo = serve(Whole)
    client.write(0, CONTENT)
    engine = solo.session._engine
    assert engine is not None
    client.write(0, b"x")
    kept = engine._budget._kept
    assert kept is not None
    payload = weakref.ref(kept.obj)
    del kept

    for _ in range(3):
        assert rests.acquire(timeout=PATIENCE)

    assert payload() is None


def test_a_quiet_connection_does_not_wait_for_its_workers(serve: Serve, rests: threading.Semaphore) -> None:
    gate = threading.Event()

    class Stuck(Cached):
        def pread(self, count: int, offset: int) -> bytes:
            assert gate.wait(PATIENCE)
            return super().pread(count, offset)

    client, _, _ = serve(Stuck)
    stuck = client.send(Command.READ, 65536, 512)

    for _ in range(3):
        assert rests.acquire(timeout=PATIENCE)
    assert client.read(0, 512) == CONTENT[:512]
    gate.set()

    assert client.reply().cookie == stuck


# --- the end ---


class Together(Whole):
    """Reads wait until there are 16 of them."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.all_here = threading.Barrier(17)
        self.gate = threading.Event()
        self.pread_into = lambda buffer, offset: False

    def pread(self, count: int, offset: int) -> bytes:
        self.all_here.wait(PATIENCE)
        assert self.gate.wait(PATIENCE)
        return super().pread(count, offset)


@ALL_STYLES
@pytest.mark.parametrize("end", ["DISC", "DISC with bytes behind it", "half-close"])
def test_R8_all_that_was_asked_for_is_answered_before_the_connection_ends(end: str, style: Style, serve: Serve) -> None:
    client, handle, solo = serve(Together, style)
    with client.batched():
        cookies = {client.send(Command.READ, number * 512, 512): number for number in range(16)}
    handle.all_here.wait(PATIENCE)

    if end == "half-close":
        client.socket.shutdown(1)
    else:
        client.send(Command.DISC)
    if end == "DISC with bytes behind it":
        client.send_bytes(b"x" * 100)
    handle.gate.set()
    replies = client.replies(16)

    assert {cookie: reply.data for cookie, reply in replies.items()} == {
        cookie: CONTENT[number * 512 : number * 512 + 512] for cookie, number in cookies.items()
    }
    assert client.at_end()
    solo.join()
    assert handle.plugin.closed == 1


def test_the_export_is_not_closed_under_a_request(serve: Serve) -> None:
    client, handle, solo = serve(Together)
    with client.batched():
        for number in range(16):
            client.send(Command.READ, number, 1)
    handle.all_here.wait(PATIENCE)

    client.reset()
    assert handle.plugin.closed == 0
    handle.gate.set()
    solo.join()

    assert handle.plugin.closed == 1
    assert len(handle.calls) == 16


def test_what_came_before_a_violation_is_done_and_answered(serve: Serve) -> None:
    client, handle, _ = serve(Cold)

    with client.batched():
        write = client.send(Command.WRITE, 0, data=b"new")
        read = client.send(Command.READ, 3, 100)
        client.send_bytes(b"\0" * 28)

    assert client.replies(2).keys() == {write, read}
    assert client.at_end()
    assert handle.store[:3] == b"new"


def test_what_was_asked_for_before_disc_is_done_though_the_client_does_not_wait(serve: Serve) -> None:
    client, handle, solo = serve(Whole)

    with client.batched():
        for offset in range(0, 100 * 512, 512):
            client.send(Command.WRITE, offset, data=b"x" * 512)
        client.send(Command.DISC)
    client.reset()

    solo.join()
    assert handle.store == b"x" * 51200 + CONTENT[51200:]


@pytest.mark.parametrize("sent", [0, 1, 1000, 199_999])
def test_D6_a_write_that_was_cut_off_is_not_done(sent: int, serve: Serve) -> None:
    client, handle, solo = serve(Whole)
    client.send_bytes(
        bytes.fromhex("25609513 0000 0001 0000000000000001 0000000000000000") + (200_000).to_bytes(4, "big")
    )
    client.send_bytes(b"x" * sent)

    client.reset()

    solo.join()
    assert handle.store == CONTENT

"""Requests that coroutines carry out: all are answered, any number at once, and whatever coroutines do."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from nbdkitpy import AsyncHandle, Buffer, Extent, ExtentType, Filter, FilterHandle, Flags, Handle, ThreadModel, log
from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError
from nbdkitpy.server import engine as engine_module
from nbdkitpy.server import service
from nbdkitpy.server.commands import Commands
from nbdkitpy.server.coroutines import CoroutineEngine
from tests.budgets import Waiting, watched_budget
from tests.conftest import StartServer, StartSession
from tests.coroutines import AsyncDisks, AsyncWhole, Gate
from tests.misdeeds import BAD_DATA, GOOD_DATA, RAISED
from tests.nbdclient import PATIENCE, NbdClient, Style
from tests.requests import EACH_VERB, VERBS, ask, check_pipeline, use_each_verb
from tests.serving import CONTENT, SIZE, Solo

ALL_STYLES = pytest.mark.parametrize("style", list(Style), ids=lambda style: style.value)

#: Seconds that are not long enough for anybody to have waited.
AT_ONCE = PATIENCE / 2


class Everything(FilterHandle):
    """Stands before each verb, so that threads wait for the coroutines."""

    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset, flags)

    def flush(self) -> None:
        self.next.flush()

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self.next.cache(count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return self.next.extents(count, offset, flags)


class Reads(FilterHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset)


class Over(Filter):
    """Puts a handle of some class around each."""

    name = "over"

    def __init__(self, kind: type[FilterHandle]) -> None:
        super().__init__()
        self._kind = kind

    def wrap(self, handle: Handle, client: Any) -> Handle:
        return self._kind(handle)


Serve = Callable[..., tuple[NbdClient, Any, Solo]]


@pytest.fixture
def serve(start_session: StartSession) -> Serve:
    """Serve a handle to one client; return client, handle and session."""

    def start(
        handle: Callable[[AsyncDisks], AsyncHandle] = AsyncWhole,
        style: Style = Style.STRUCTURED,
        *filters: Filter,
        model: ThreadModel | None = None,
        **options: Any,
    ) -> tuple[NbdClient, Any, Solo]:
        plugin = AsyncDisks(handle, model)
        solo = start_session(plugin, *filters, **options)
        solo.client.negotiate(style, contexts=style is not Style.SIMPLE)
        return solo.client, plugin.handles[0], solo

    return start


#: Ways in which requests come to their coroutines: filters, and what else is said to :func:`serve`.
WAYS: dict[str, tuple[list[type[FilterHandle]], dict[str, Any]]] = {
    "loop": ([], {}),
    "filter that passes on": ([FilterHandle], {}),
    "filter before reads": ([Reads], {}),
    "filter before everything": ([Everything], {}),
    "one at a time": ([], {"threads": 1}),
    "serialised": ([], {"model": ThreadModel.SERIALIZE_ALL_REQUESTS}),
}
ALL_WAYS = pytest.mark.parametrize("way", WAYS)


def on_the_way(way: str) -> tuple[list[Filter], dict[str, Any]]:
    kinds, options = WAYS[way]
    return [Over(kind) for kind in kinds], options


# --- every request is answered, and rightly ---


@ALL_STYLES
@ALL_WAYS
def test_requests_in_a_pipeline_are_all_answered(way: str, style: Style, serve: Serve) -> None:
    filters, options = on_the_way(way)
    client, _, solo = serve(AsyncWhole, style, *filters, **options)

    check_pipeline(client)

    assert isinstance(solo.session._engine, CoroutineEngine) == (way in list(WAYS)[:3])


@ALL_STYLES
@ALL_WAYS
def test_each_command_reaches_its_verb(way: str, style: Style, serve: Serve) -> None:
    filters, options = on_the_way(way)
    client, handle, _ = serve(AsyncWhole, style, *filters, **options)

    use_each_verb(client)

    assert handle.calls == EACH_VERB
    assert handle.threads == {"coroutines"}


@ALL_WAYS
def test_the_block_status_is_what_the_handle_says_of_the_range(way: str, serve: Serve) -> None:
    class Holes(AsyncWhole):
        async def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            self.noted("extents", count, offset, flags)
            return iter([Extent(0, 8192, ExtentType.HOLE), Extent(8192, SIZE)])

    filters, options = on_the_way(way)
    client, handle, _ = serve(Holes, Style.EXTENDED, *filters, **options)

    assert ask(client, "extents", 4096, 8192).extents == [(4096, 1), (4096, 0)]
    assert ask(client, "extents", 0, 16384, flags=CommandFlag.REQ_ONE).extents == [(8192, 1)]
    assert handle.calls == [("extents", 8192, 4096, 0), ("extents", 16384, 0, int(Flags.REQ_ONE))]


def test_of_what_does_not_know_its_extents_all_is_data(serve: Serve) -> None:
    class Ignorant(AsyncWhole):
        def can_extents(self) -> bool:
            return False

    client, handle, _ = serve(Ignorant)

    assert ask(client, "extents", 4096, 8192).extents == [(8192, 0)]
    assert handle.calls == []


def test_invalid_requests_are_answered_between_valid_ones(serve: Serve) -> None:
    client, _, _ = serve()

    with client.batched():
        bad = {client.send(Command.READ, SIZE, 1) for _ in range(5)}
        good = client.send(Command.READ, 0, 1)
    replies = client.replies(6)

    assert {cookie for cookie, reply in replies.items() if reply.error == NbdError.EINVAL} == bad
    assert replies[good].data == CONTENT[:1]


# --- many at once ---


class Gated(AsyncWhole):
    """Reads wait at a gate, each of them at its own if there are several."""

    def __init__(self, plugin: AsyncDisks) -> None:
        super().__init__(plugin)
        self.gate = Gate()

    async def pread(self, count: int, offset: int) -> Buffer:
        await self.gate.wait()
        return await super().pread(count, offset)


@ALL_STYLES
def test_many_more_requests_are_under_way_than_there_are_threads(style: Style, serve: Serve) -> None:
    client, handle, _ = serve(Gated, style, threads=2)
    before = threading.active_count()

    with client.batched():
        for number in range(200):
            client.send(Command.READ, number * 512, 512)
    handle.gate.wait_for(200)

    assert threading.active_count() == before + 1  # which sends replies
    handle.gate.open()
    assert {reply.data for reply in client.replies(200).values()} == {
        CONTENT[number * 512 : number * 512 + 512] for number in range(200)
    }


def test_a_request_that_is_done_does_not_wait_for_those_before_it(serve: Serve) -> None:
    class Slow(Gated):
        async def pread(self, count: int, offset: int) -> Buffer:
            return await (super().pread(count, offset) if offset == 0 else AsyncWhole.pread(self, count, offset))

    client, handle, _ = serve(Slow)

    with client.batched():
        slow = client.send(Command.READ, 0, 512)
        quick = [client.send(Command.READ, 512, 512), client.send(Command.WRITE, 4096, data=b"x")]
    assert client.replies(2).keys() == set(quick)
    handle.gate.open()

    assert client.reply().cookie == slow


def test_what_is_done_at_once_is_sent_at_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[int] = []
    post = CoroutineEngine._post_done

    def noted(self: CoroutineEngine) -> None:
        posted.append(len(self._done))
        post(self)

    monkeypatch.setattr(CoroutineEngine, "_post_done", noted)
    client, handle, _ = serve(Gated, Style.SIMPLE)

    with client.batched():
        for _ in range(50):
            client.send(Command.READ, 0, 100)
    handle.gate.wait_for(50)
    handle.gate.open()
    client.replies(50)

    assert len(posted) < 25


def test_many_that_sleep_take_about_as_long_as_one(serve: Serve) -> None:
    class Sleeping(AsyncWhole):
        async def pread(self, count: int, offset: int) -> Buffer:
            await asyncio.sleep(0.2)
            return await super().pread(count, offset)

    client, _, _ = serve(Sleeping)
    begin = time.monotonic()

    with client.batched():
        for number in range(64):
            client.send(Command.READ, number * 512, 512)
    client.replies(64)

    assert 0.2 <= time.monotonic() - begin < 64 * 0.2 / 8


@pytest.mark.parametrize("length", [512, 300_000])
def test_data_that_is_written_stays_as_it_is_while_more_comes(length: int, serve: Serve) -> None:
    gate = Gate()

    class Late(AsyncWhole):
        async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            await gate.wait()
            await super().pwrite(data, offset, flags)

    client, handle, _ = serve(Late)
    pieces = [bytes([number]) * length for number in range(3)]

    for number, piece in enumerate(pieces):
        client.send(Command.WRITE, number * length, data=piece)
        gate.wait_for(1)
    gate.open()

    assert not any(reply.error for reply in client.replies(3).values())
    assert handle.store[: 3 * length] == b"".join(pieces)


def test_clients_share_one_loop(start_server: StartServer) -> None:
    plugin = AsyncDisks(Gated)
    server = start_server(plugin)
    clients = [server.connect() for _ in range(8)]
    for client in clients:
        with client.batched():
            for number in range(20):
                client.send(Command.READ, number * 512, 512)
    for handle in plugin.handles:
        handle.gate.wait_for(20)

    for handle in reversed(plugin.handles):
        handle.gate.open()

    for client in clients:
        assert len(client.replies(20)) == 20
    assert [thread.name for thread in threading.enumerate()].count("coroutines") == 1


# --- whatever a coroutine does ---


def raising(verb: str, error: BaseException) -> type[AsyncWhole]:
    async def fail(self: AsyncWhole, *args: object) -> None:
        self.noted(verb, *args)
        await asyncio.sleep(0)
        raise error

    return type("Raising", (AsyncWhole,), {verb: fail})


@pytest.mark.parametrize("way", ["loop", "filter before everything"])
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("error", "wire"), RAISED, ids=lambda value: f"{type(value).__name__}")
def test_whatever_a_verb_raises_is_an_error_of_that_request_alone(
    error: BaseException, wire: NbdError, verb: str, way: str, serve: Serve
) -> None:
    filters, options = on_the_way(way)
    client, handle, _ = serve(raising(verb, error), Style.STRUCTURED, *filters, **options)

    for _ in range(2):
        assert ask(client, verb).error == wire
    assert handle.calls[0][0] == verb

    for other in VERBS.keys() - {verb}:
        assert not ask(client, other).error


def test_an_error_is_logged_with_its_text_and_a_defect_with_its_traceback(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    client, _, _ = serve(raising("pread", OSError(errno.EIO, "worn out")))
    assert ask(client, "pread", 512, 100).text == "worn out"
    other, _, _ = serve(raising("pread", KeyError("missing")))
    assert ask(other, "pread", 512, 100).text == "internal error of the server"

    expected, defect = caplog.records
    assert expected.getMessage() == "disks[1]: pread of 100 bytes at 512: [Errno 5] worn out"
    assert not expected.exc_info
    assert defect.getMessage() == "disks[1]: pread of 100 bytes at 512: KeyError: 'missing'"
    assert defect.exc_info


def test_the_log_knows_whose_request_has_failed(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup("stderr", format="json"):
        client, _, _ = serve(raising("pread", OSError(errno.EIO, "worn out")))
        ask(client, "pread")

    assert json.loads(capsys.readouterr().err)["connection"] == 1


@pytest.mark.parametrize("data", BAD_DATA, ids=lambda data: f"{type(data).__name__}")
@ALL_STYLES
def test_what_is_not_the_data_is_an_error_and_no_byte_of_it_is_sent(data: object, style: Style, serve: Serve) -> None:
    class Returning(AsyncWhole):
        async def pread(self, count: int, offset: int) -> Buffer:
            return await super().pread(count, offset) if offset else data  # type: ignore[return-value]

    client, _, _ = serve(Returning, style)

    assert client.call(Command.READ, 0, 4096).error == NbdError.EIO
    assert client.read(4096, 4096) == CONTENT[4096:8192]


@pytest.mark.parametrize("data", GOOD_DATA, ids=lambda data: type(data).__name__)
def test_every_kind_of_buffer_is_sent_as_its_bytes(data: Buffer, serve: Serve) -> None:
    class Returning(AsyncWhole):
        async def pread(self, count: int, offset: int) -> Buffer:
            return data

    client, _, _ = serve(Returning)

    assert client.read(0, 4096) == CONTENT[:4096]


@pytest.mark.parametrize("way", ["loop", "filter before everything"])
@pytest.mark.parametrize(
    "answer", [None, [], [(0, 10)], [Extent(4096, 4096)], [Extent(0, 10), Extent(20, 10)], 7, [Extent(0, 4096, 9)]]
)
def test_extents_that_cannot_be_are_an_error(answer: Any, way: str, serve: Serve) -> None:
    class Wrong(AsyncWhole):
        async def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            return answer  # type: ignore[no-any-return]

    filters, options = on_the_way(way)
    client, _, _ = serve(Wrong, Style.STRUCTURED, *filters, **options)

    assert ask(client, "extents").error == NbdError.EIO
    assert not ask(client, "pread").error


def test_a_verb_that_is_no_coroutine_is_a_defect(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(AsyncWhole):
        def pread(self, count: int, offset: int) -> bytes:  # type: ignore[override]
            return bytes(count)

        async def extents(self, count: int, offset: int, flags: int) -> Any:
            yield Extent(offset, count)

    client, _, _ = serve(Forgetful)

    assert ask(client, "pread").error == NbdError.EIO
    assert ask(client, "extents").error == NbdError.EIO
    assert "object bytes can't be used in 'await' expression" in caplog.messages[0]
    assert "object async_generator can't be used in 'await' expression" in caplog.messages[1]


# --- nothing piles up ---


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> type[Waiting]:
    """Budgets of connections, and an event that is set when one is used up."""
    return watched_budget(monkeypatch)


def test_a_client_that_takes_no_replies_holds_up_no_other_on_the_loop(
    start_server: StartServer, budget: type[Waiting]
) -> None:
    plugin = AsyncDisks()
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


def test_a_client_that_asks_faster_than_is_answered_is_not_read_without_end(
    serve: Serve, budget: type[Waiting]
) -> None:
    client, handle, _ = serve(Gated, max_buffered_per_connection=4 << 20)
    sender = threading.Thread(target=lambda: [client.send(Command.READ, 0, SIZE) for _ in range(30)])
    sender.start()
    assert budget.waits.wait(PATIENCE)
    handle.gate.wait_for(3)  # what has been taken is under way

    handle.gate.open()
    replies = client.replies(30)
    sender.join(PATIENCE)

    assert all(reply.data == CONTENT for reply in replies.values())
    assert budget.most <= 4 << 20


# --- the end ---


@ALL_STYLES
@pytest.mark.parametrize("end", ["DISC", "half-close"])
def test_all_that_was_asked_for_is_answered_before_the_connection_ends(end: str, style: Style, serve: Serve) -> None:
    client, handle, solo = serve(Gated, style)
    with client.batched():
        cookies = {client.send(Command.READ, number * 512, 512): number for number in range(50)}
    handle.gate.wait_for(50)

    if end == "half-close":
        client.socket.shutdown(1)
    else:
        client.send(Command.DISC)
    handle.gate.open()
    replies = client.replies(50)

    assert {cookie: reply.data for cookie, reply in replies.items()} == {
        cookie: CONTENT[number * 512 : number * 512 + 512] for cookie, number in cookies.items()
    }
    assert client.at_end()
    solo.join()
    assert handle.plugin.closed == 1


def test_of_a_client_that_leaves_the_requests_are_finished_before_the_handle_is_closed(serve: Serve) -> None:
    client, handle, solo = serve(Gated)
    with client.batched():
        for number in range(50):
            client.send(Command.READ, number, 1)
    handle.gate.wait_for(50)

    client.reset()
    assert handle.plugin.closed == 0
    handle.gate.open()
    solo.join()

    assert handle.plugin.closed == 1
    assert len(handle.calls) == 50


def test_requests_that_have_not_begun_when_a_client_vanishes_are_dropped(
    serve: Serve, budget: type[Waiting], caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    class Late(AsyncWhole):
        async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            await gate.wait()
            await super().pwrite(data, offset, flags)

    client, handle, solo = serve(Late, max_buffered_per_connection=4 << 20)
    caplog.set_level("INFO")
    with client.batched():
        for _ in range(100):
            client.send(Command.WRITE, 0, data=CONTENT[:512])
    assert budget.waits.wait(PATIENCE)  # for those that are under way

    client.reset()
    gate.open()
    solo.join()

    assert handle.plugin.closed == 1
    begun = len(handle.calls)
    assert 0 < begun < 100
    assert f"disks[1]: gone, {100 - begun} requests that had not begun are dropped" in caplog.messages


def test_when_no_reply_can_be_made_the_connection_breaks(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Commands, "failure", fail)
    client, handle, solo = serve(raising("pread", OSError(errno.EIO, "worn out")))

    client.send(Command.READ, 0, 1)

    assert client.at_end()
    solo.join()
    assert caplog.messages == ["disks[1]: MemoryError"]
    assert handle.plugin.closed == 1


def test_without_a_thread_to_send_replies_the_connection_ends(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, handle, solo = serve()

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    client.send(Command.READ, 0, 1)

    assert client.at_end()
    solo.join()
    assert caplog.messages[-1].endswith("RuntimeError: can't start new thread")
    assert (handle.calls, handle.plugin.closed) == ([], 1)


def test_what_is_under_way_when_the_server_ends_is_finished(start_server: StartServer) -> None:
    plugin = AsyncDisks(Gated)
    server = start_server(plugin, drain=60.0)
    client = server.connect()
    with client.batched():
        for number in range(50):
            client.send(Command.READ, number * 512, 512)
    plugin.handles[0].gate.wait_for(50)

    server.server.shutdown()
    plugin.handles[0].gate.open()

    assert not any(reply.error for reply in client.replies(50).values())
    assert client.at_end()
    assert server.join()
    assert plugin.closed == 1


@pytest.mark.parametrize(("over", "count"), [(None, 5), (Everything, 1)], ids=["loop", "thread"])
def test_coroutines_that_do_not_end_are_cancelled_after_the_drain_time(
    over: type[FilterHandle] | None, count: int, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = AsyncDisks(Gated)
    server = start_server(plugin, *([Over(over)] if over else []), drain=0.1)
    client = server.connect()
    with client.batched():
        for number in range(count):
            client.send(Command.READ, number, 1)
    plugin.handles[0].gate.wait_for(count)

    begin = time.monotonic()

    assert server.stop()
    assert 0.1 <= time.monotonic() - begin < AT_ONCE
    assert plugin.closed == 1
    assert set(caplog.messages) == {
        f"disks[1]: pread of 1 bytes at {number}: [Errno 108] given up, as the server ends" for number in range(count)
    }
    assert not any(record.exc_info for record in caplog.records)


def test_a_client_that_waits_for_its_export_is_given_up_too(start_server: StartServer) -> None:
    gate = Gate()

    class Opening(AsyncDisks):
        async def open_async(self, *args: Any) -> AsyncHandle:
            await gate.wait()
            return await super().open_async(*args)

    server = start_server(Opening(), drain=0.1)
    client = server.dial()
    client.greet()
    client.send_option(7, bytes(6))
    gate.wait_for(1)

    assert server.stop()


def test_a_coroutine_that_ignores_that_is_abandoned(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(Gated):
        async def pread(self, count: int, offset: int) -> Buffer:
            try:
                return await super().pread(count, offset)
            except asyncio.CancelledError:
                await self.gate.wait()
                return b"x"

    monkeypatch.setattr(service, "GRACE", 0.1)
    plugin = AsyncDisks(Stubborn)
    server = start_server(plugin, drain=0.1)
    server.connect().send(Command.READ, 0, 1)
    plugin.handles[0].gate.wait_for(1)

    assert not server.stop()

    assert "still held up in the backend, abandoned: disks[1]" in caplog.messages
    plugin.handles[0].gate.open()
    server.wait_for_sessions(0)
    assert plugin.closed == 1


def test_a_quiet_connection_gives_back_its_threads(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_QUIET", 0.005)
    rested = threading.Semaphore(0)
    rest = CoroutineEngine._rest

    def noted(self: CoroutineEngine) -> None:
        rest(self)
        rested.release()

    monkeypatch.setattr(CoroutineEngine, "_rest", noted)
    client, _, _ = serve(AsyncWhole, Style.STRUCTURED, Over(Reads))
    for _ in range(3):
        client.read(0, 4096)
        client.write(0, CONTENT[:4096])

    while [thread for thread in threading.enumerate() if thread.name.startswith("disks[1].")]:
        assert rested.acquire(timeout=PATIENCE)

    assert client.read(0, 512) == CONTENT[:512]

"""Coroutines behind a stack: one loop, plain handles over it, and an end in any case."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import pytest

from nbdkitpy import (
    AsyncHandle,
    AsyncPlugin,
    Buffer,
    Client,
    Extent,
    ExtentType,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Plugin,
    Support,
    ThreadModel,
)
from nbdkitpy import (
    coroutines as module,
)
from nbdkitpy.backend import VERBS
from nbdkitpy.coroutines import Loop
from nbdkitpy.stack import OpenExport, Stack
from tests.coroutines import AsyncDisks, AsyncWhole, Gate
from tests.nbdclient import PATIENCE
from tests.recorder import REQUESTS
from tests.serving import CONTENT, SIZE, Disks, make_stack

CLIENT = Client(1)
FUA, FAST_ZERO = int(Flags.FUA), int(Flags.FAST_ZERO)


@pytest.fixture
def stacks() -> Iterator[Callable[..., Stack]]:
    """Make stacks; at the end their loops have ended."""
    made: list[Stack] = []

    def make(plugin: Plugin, *filters: Filter) -> Stack:
        made.append(make_stack(plugin, filters))
        return made[-1]

    yield make
    for stack in made:
        stack.cleanup()
    assert "coroutines" not in [thread.name for thread in threading.enumerate()]


Opened = Callable[..., tuple[OpenExport, Any]]


@pytest.fixture
def opened(stacks: Callable[..., Stack]) -> Opened:
    """Open a handle behind filters; return the export and the handle itself."""

    def open_one(
        make: Callable[[AsyncDisks], AsyncHandle] = AsyncWhole, *filters: Filter, readonly: bool = False
    ) -> tuple[OpenExport, Any]:
        plugin = AsyncDisks(make)
        export = stacks(plugin, *filters).open("", readonly, CLIENT)
        return export, plugin.handles[0]

    return open_one


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that ends with the test."""
    loop = Loop()
    yield loop
    loop.stop()


# --- plain handles over coroutines ---


def test_each_verb_is_a_call_that_waits_for_its_coroutine(opened: Opened) -> None:
    export, handle = opened()

    results = {verb: getattr(export.handle, verb)(*REQUESTS[verb]) for verb in VERBS}

    assert results.pop("pread") == CONTENT[4096:4608]
    assert results.pop("extents") == [Extent(4096, 512)]
    assert set(results.values()) == {None}
    assert [call[0] for call in handle.calls] == list(VERBS)
    assert handle.threads == {"coroutines"}


def test_the_questions_are_asked_once_and_answered_from_the_snapshot(opened: Opened) -> None:
    class Asked(AsyncWhole):
        asked = 0

        def get_size(self) -> int:
            self.asked += 1
            return SIZE

        def export_description(self) -> str | None:
            return "a disk"

    export, handle = opened(Asked)

    assert export.capabilities.size == export.handle.get_size() == SIZE
    assert export.capabilities.can_multi_conn is False
    assert handle.asked == 1
    assert export.description() == "a disk"


def test_what_a_coroutine_raises_is_raised(opened: Opened) -> None:
    class Failing(AsyncWhole):
        async def pread(self, count: int, offset: int) -> Buffer:
            raise [OSError(errno.ENOSPC, "full"), SystemExit(1), StopIteration(), asyncio.CancelledError()][offset]

    export, _ = opened(Failing)

    for offset, error in enumerate((OSError, SystemExit, RuntimeError, asyncio.CancelledError)):
        with pytest.raises(error):
            export.handle.pread(1, offset)
    assert export.handle.extents(1, 0, 0) == [Extent(0, 1)]


def test_closing_waits_for_the_coroutine(opened: Opened) -> None:
    export, handle = opened()

    export.close()

    assert handle.plugin.closed == 1


def test_a_handle_that_cannot_be_asked_is_closed(stacks: Callable[..., Stack]) -> None:
    class Endless(AsyncWhole):
        def get_size(self) -> int:
            return 1 << 63

    plugin = AsyncDisks(Endless)

    with pytest.raises(ValueError, match="Endless: get_size must be 0 to"):
        stacks(plugin).open("", False, CLIENT)

    assert plugin.closed == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no such disk"), SystemExit(1)])
def test_open_that_fails_leaves_nothing(error: BaseException, stacks: Callable[..., Stack]) -> None:
    class Failing(AsyncDisks):
        async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
            await asyncio.sleep(0)
            raise error

    with pytest.raises(type(error)):
        stacks(Failing()).open("", False, CLIENT)


def test_what_is_no_async_handle_is_named(stacks: Callable[..., Stack]) -> None:
    class Wrong(AsyncDisks):
        async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
            return None  # type: ignore[return-value]

    with pytest.raises(TypeError, match="open_async must return an AsyncHandle, not None"):
        stacks(Wrong()).open("", False, CLIENT)


class Late(Handle):
    """A mistake: its verbs are coroutines."""

    def get_size(self) -> int:
        return SIZE

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:  # type: ignore[override]
        raise AssertionError("nobody awaits it")


class LateFilterHandle(FilterHandle):
    async def flush(self) -> None:  # type: ignore[override]
        raise AssertionError("nobody awaits it")


class LateFilter(Filter):
    name = "late"

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return LateFilterHandle(handle)


@pytest.mark.parametrize(
    ("plugin", "filters", "message"),
    [
        (Disks(lambda _: Late()), [], "Late: pwrite is a coroutine, which only an AsyncHandle may have"),
        (Disks(), [LateFilter()], "LateFilterHandle: flush is a coroutine"),
    ],
)
def test_a_coroutine_that_nobody_would_await_keeps_the_export_from_being_opened(
    plugin: Plugin, filters: list[Filter], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        make_stack(plugin, filters).open("", False, CLIENT)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_that_are_not_overridden_say_so(verb: str, loop: Loop) -> None:
    class Empty(AsyncHandle):
        pass

    with pytest.raises(NotImplementedError, match=r"^Empty does not "):
        loop.run(getattr(Empty(), verb)(*REQUESTS[verb]))


# --- emulation ---


class Least(AsyncHandle):
    """Reads, and can be written; what else it can do comes with the classes below."""

    def __init__(self, plugin: AsyncDisks) -> None:
        self.data = bytearray(b"\xff") * (3 << 20)
        self.calls: list[tuple[object, ...]] = []

    def get_size(self) -> int:
        return len(self.data)

    async def pread(self, count: int, offset: int) -> Buffer:
        self.calls.append(("pread", count, offset))
        return self.data[offset : offset + count]

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.calls.append(("pwrite", len(data), offset, flags))
        self.data[offset : offset + len(data)] = data


class Flushing(Least):
    async def flush(self) -> None:
        self.calls.append(("flush",))

    async def trim(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("trim", count, offset, flags))


class Zeroing(Flushing):
    refusal = errno.ENOTSUP

    async def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset, flags))
        if offset:
            raise OSError(self.refusal, "only at the beginning")


class NativeFua(Zeroing):
    def can_fua(self) -> Support:
        return Support.NATIVE


def test_what_is_missing_is_answered_as_for_plain_handles(opened: Opened) -> None:
    export, _ = opened(Least)

    capabilities = export.capabilities

    assert (capabilities.can_write, capabilities.can_flush, capabilities.can_trim) == (True, False, False)
    assert (capabilities.can_zero, capabilities.can_fast_zero) == (Support.EMULATE, True)
    assert (capabilities.can_fua, capabilities.can_cache) == (Support.NONE, Support.NONE)
    assert not capabilities.can_extents


def test_a_readonly_export_can_do_nothing_else(opened: Opened) -> None:
    export, _ = opened(readonly=True)

    assert not export.capabilities.can_write
    assert export.capabilities.can_zero is Support.NONE


@pytest.mark.parametrize("verb", ["pwrite", "trim", "zero"])
def test_fua_is_emulated_by_a_flush_after_the_verb(verb: str, opened: Opened) -> None:
    export, handle = opened(Zeroing)
    subject = memoryview(b"data") if verb == "pwrite" else 4

    getattr(export.handle, verb)(subject, 0, 0)
    getattr(export.handle, verb)(subject, 0, FUA | int(Flags.MAY_TRIM if verb == "zero" else 0))

    plain, durable = (verb, 4, 0, 0), (verb, 4, 0, int(Flags.MAY_TRIM if verb == "zero" else 0))
    assert handle.calls == [plain, durable, ("flush",)]


def test_native_fua_reaches_the_handle_also_where_zeroes_are_written(opened: Opened) -> None:
    export, handle = opened(NativeFua)

    export.handle.pwrite(memoryview(b"x"), 0, FUA)
    export.handle.zero(1, 0, FUA)
    export.handle.zero(1, 512, FUA)

    zero = ("zero", 1, 512, FUA)
    assert handle.calls == [("pwrite", 1, 0, FUA), ("zero", 1, 0, FUA), zero, ("pwrite", 1, 512, FUA)]


@pytest.mark.parametrize("refusal", [errno.ENOTSUP, errno.EOPNOTSUPP])
def test_zeroes_are_written_where_zero_refuses(refusal: int, opened: Opened) -> None:
    export, handle = opened(Zeroing)
    handle.refusal = refusal

    export.handle.zero((1 << 20) + 5, 7, FUA)

    assert handle.data == b"\xff" * 7 + bytes((1 << 20) + 5) + b"\xff" * ((2 << 20) - 12)
    assert [call[0] for call in handle.calls] == ["zero", "pwrite", "flush", "pwrite", "flush"]


def test_zero_that_fails_otherwise_or_has_to_be_fast_is_not_emulated(opened: Opened) -> None:
    export, handle = opened(Zeroing)

    with pytest.raises(OSError, match="only at the beginning"):
        export.handle.zero(1, 512, FAST_ZERO)
    handle.refusal = errno.EIO
    with pytest.raises(OSError, match="only at the beginning"):
        export.handle.zero(1, 512, 0)

    assert handle.data.count(0) == 0


def test_without_zero_a_fast_one_fails_and_any_other_is_written(opened: Opened) -> None:
    export, handle = opened(Least)

    with pytest.raises(OSError, match="would have to be written") as caught:
        export.handle.zero(1, 512, FAST_ZERO)
    export.handle.zero(1, 512, 0)

    assert caught.value.errno == errno.ENOTSUP
    assert handle.calls == [("pwrite", 1, 512, 0)]


class Caching(Least):
    answer = Support.EMULATE

    def can_cache(self) -> Support:
        return self.answer


def test_cache_is_emulated_by_reading_in_pieces(opened: Opened) -> None:
    export, handle = opened(Caching)

    export.handle.cache((1 << 20) + 1, 5)

    assert handle.calls == [("pread", 1 << 20, 5), ("pread", 1, (1 << 20) + 5)]


def test_cache_that_is_claimed_without_the_verb_does_nothing(opened: Opened) -> None:
    export, handle = opened(type("Claiming", (Caching,), {"answer": Support.NATIVE}))

    export.handle.cache(512, 0)

    assert handle.calls == []


def test_extents_that_are_a_generator_are_gone_through_on_the_loop(opened: Opened) -> None:
    threads: list[str] = []

    class Generating(AsyncWhole):
        async def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            def found() -> Iterator[tuple[int, int, int]]:
                threads.append(threading.current_thread().name)
                yield 0, 1000, ExtentType.HOLE
                yield 1000, SIZE, ExtentType.DATA

            return found()

    export, _ = opened(Generating)

    assert list(export.handle.extents(100, 950, 0)) == [Extent(950, 50, ExtentType.HOLE), Extent(1000, 50)]
    assert threads == ["coroutines"]


# --- which verbs can be awaited ---


class Passing(Filter):
    name = "passing"


class ReadingHandle(FilterHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset)


class Wrapping(Filter):
    """Puts a handle of some class around each."""

    name = "wrapping"

    def __init__(self, kind: type[FilterHandle]) -> None:
        super().__init__()
        self._kind = kind

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return self._kind(handle)


class Swapping(FilterHandle):
    dynamic_next = True


#: What it takes to write zeroes in place of a zero that is refused is not a coroutine.
AWAITED = set(VERBS) - {"zero"}


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ([], AWAITED),
        ([Passing(), Wrapping(FilterHandle)], AWAITED),
        ([Wrapping(ReadingHandle), Passing()], AWAITED - {"pread"}),
        ([Wrapping(Swapping)], set()),
    ],
    ids=["none", "passing", "reading", "swapping"],
)
def test_verbs_can_be_awaited_as_far_as_no_filter_stands_before_them(
    filters: list[Filter], left: set[str], opened: Opened
) -> None:
    export, _ = opened(AsyncWhole, *filters)

    found = set() if export.coroutines is None else set(export.coroutines.verbs)

    assert found == left


def test_verbs_after_which_there_may_be_a_flush_can_be_awaited(opened: Opened) -> None:
    export, _ = opened(Flushing)

    assert export.coroutines is not None
    assert {"pwrite", "trim"} <= export.coroutines.verbs.keys()


@pytest.mark.parametrize("model", list(ThreadModel)[:3])
def test_where_one_call_at_a_time_is_allowed_none_can(model: ThreadModel, stacks: Callable[..., Stack]) -> None:
    assert stacks(AsyncDisks(model=model)).open("", False, CLIENT).coroutines is None


def test_without_coroutines_there_are_none_and_no_loop() -> None:
    stack = make_stack(Disks())

    assert stack.open("", False, CLIENT).coroutines is None
    stack.give_up()
    stack.cleanup()


def test_asyncio_is_imported_only_for_those_who_need_it() -> None:
    code = "import sys, nbdkitpy, nbdkitpy.server.session; print('asyncio' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)

    assert done.stdout == "False\n"


# --- a plugin's own coroutines ---


class Connecting(AsyncDisks):
    """Does something on the loop from its plain methods."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    async def note(self, event: str) -> str:
        await asyncio.sleep(0)
        self.events.append(f"{event} in {threading.current_thread().name}")
        return event

    def after_fork(self) -> None:
        assert self.run(self.note("after_fork")) == "after_fork"

    def default_export(self, client: Client, readonly: bool) -> str:
        return self.run(self.note("default_export"))

    def cleanup(self) -> None:
        self.run(self.note("cleanup"))


def test_a_plugin_can_run_coroutines_as_long_as_it_serves() -> None:
    plugin = Connecting()
    stack = make_stack(plugin)

    assert stack.default_export(CLIENT, False) == "default_export"
    stack.cleanup()

    assert plugin.events == [f"{event} in coroutines" for event in ("after_fork", "default_export", "cleanup")]


def test_before_and_after_that_it_cannot() -> None:
    plugin = Connecting()
    with pytest.raises(RuntimeError, match="disks: coroutines are run from after_fork to cleanup only"):
        plugin.run(plugin.note("early"))
    with pytest.raises(RuntimeError, match="disks: coroutines are run from after_fork"):
        plugin.open("", False, CLIENT)

    make_stack(plugin).cleanup()

    with pytest.raises(RuntimeError, match="the loop for coroutines has ended"):
        plugin.run(plugin.note("late"))


def test_on_the_loop_it_cannot_wait_for_itself(stacks: Callable[..., Stack]) -> None:
    plugin = Connecting()
    stacks(plugin)

    async def impatient() -> str:
        return plugin.run(plugin.note("inner"))

    with pytest.raises(RuntimeError, match="other means than await"):
        plugin.run(impatient())


def test_a_plugin_that_does_not_open_says_so(stacks: Callable[..., Stack]) -> None:
    class Unfinished(AsyncPlugin):
        name = "unfinished"

    with pytest.raises(NotImplementedError):
        stacks(Unfinished()).open("", False, CLIENT)


# --- the loop ---


def test_what_happens_to_tasks_of_a_unit_is_logged_and_the_loop_goes_on(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave() -> None:
        raise SystemExit(7)

    async def fail() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 // 0)

    async def begin(coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(coroutine)

    task = loop.run(begin(leave()))
    loop.run(fail())
    loop.run(asyncio.sleep(0))

    assert loop.run(asyncio.sleep(0, "alive")) == "alive"
    assert isinstance(task.exception(), SystemExit)
    texts = [record.getMessage() for record in caplog.records]
    assert texts[0] == "coroutines: SystemExit: 7"
    assert texts[1].startswith("coroutines: Exception in callback")
    assert all(record.exc_info for record in caplog.records)


def test_requests_that_are_given_up_are_cancelled_and_those_to_come_too(loop: Loop) -> None:
    gate, cancelled = Gate(), threading.Event()

    async def request() -> None:
        try:
            await gate.wait()
        finally:
            cancelled.set()

    errors: list[BaseException] = []

    def ask() -> None:
        try:
            loop.run(loop.cancellable(request()))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    gate.wait_for(1)

    loop.give_up()
    loop.give_up()
    thread.join(PATIENCE)
    ask()

    assert cancelled.is_set()
    assert [str(error) for error in errors] == ["[Errno 108] given up, as the server ends"] * 2
    assert loop.run(asyncio.sleep(0, "others go on")) == "others go on"


def test_a_request_that_is_cancelled_by_somebody_else_says_so(loop: Loop) -> None:
    async def cancel() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        loop.run(loop.cancellable(cancel()))


def test_at_the_end_tasks_are_cancelled_and_may_tidy_up(caplog: pytest.LogCaptureFixture) -> None:
    loop, gate, tidied = Loop(), Gate(), []

    async def generator() -> Any:
        try:
            yield 1
        finally:
            await asyncio.sleep(0)
            tidied.append("generator")

    async def background() -> None:
        try:
            await gate.wait()
        finally:
            await asyncio.sleep(0)
            tidied.append("task")

    async def begin() -> tuple[object, object]:
        unfinished = generator()
        await anext_of(unfinished)
        return asyncio.create_task(background()), unfinished

    async def anext_of(iterator: Any) -> None:
        await iterator.__anext__()

    kept = loop.run(begin())
    gate.wait_for(1)

    loop.stop()
    loop.give_up()

    assert tidied == ["task", "generator"]
    assert kept
    assert not caplog.messages


def test_a_task_that_does_not_end_is_abandoned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.05)
    loop, gate = Loop(), Gate()

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await gate.wait()

    async def begin() -> asyncio.Task[None]:
        return asyncio.create_task(stubborn())

    task = loop.run(begin())
    gate.wait_for(1)

    loop.stop()

    (text,) = caplog.messages
    assert text.startswith("coroutines: abandoned, as it does not end when it is cancelled: <Task ")
    assert "stubborn" in text
    finish(task)


def finish(task: asyncio.Task[None]) -> None:
    """Have a task of an ended loop not complain when it is freed."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_call_that_blocks_the_loop_is_abandoned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_GRACE", 0.05)
    loop, blocked, gate = Loop(), threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        assert gate.wait(PATIENCE)

    loop.call(block)
    assert blocked.wait(PATIENCE)
    begin = time.monotonic()

    loop.stop()

    assert time.monotonic() - begin < PATIENCE / 2
    assert caplog.messages == ["coroutines: still held up by a call that blocks, abandoned"]
    gate.set()
    loop._thread.join(PATIENCE)
    assert not loop._thread.is_alive()


class Noted:
    """Stands in the place of select(), which it calls too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timeouts: list[float] = []
        self._select = select.select
        monkeypatch.setattr(select, "select", self)

    def __call__(self, read: Any, write: Any, other: Any, timeout: float) -> object:
        self.timeouts.append(timeout)
        return self._select(read, write, other, timeout)


def test_the_loop_waits_for_parts_of_a_millisecond(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    noted = Noted(monkeypatch)

    loop.run(asyncio.sleep(0.0013))

    assert any(0 < timeout < 0.0013 for timeout in noted.timeouts)


def test_where_select_cannot_wait_the_loop_does_as_asyncio_does(monkeypatch: pytest.MonkeyPatch, loop: Loop) -> None:
    noted = Noted(monkeypatch)
    monkeypatch.setattr(module, "_SELECTABLE", 0)

    loop.run(asyncio.sleep(0.0013))

    assert not noted.timeouts


def test_without_a_thread_there_is_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)

    with pytest.raises(RuntimeError, match="can't start new thread"):
        Loop()

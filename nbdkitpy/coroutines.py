"""Coroutines: the loop that they run on, and a plain handle over one whose verbs are coroutines.

Imported only where there is such a handle, as asyncio takes a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import select
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeAlias, TypeVar

from nbdkitpy.backend import QUESTIONS, VERBS, AsyncHandle, Flags, Handle, Support
from nbdkitpy.extents import Extent, normalise_extents

__all__ = ["CoroutineVerb", "Coroutines", "Loop"]

T = TypeVar("T")
CoroutineVerb: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]

_logger = logging.getLogger("nbdkitpy")

#: Seconds that cancelled tasks have to end, when the loop does.
_GRACE = 2.0

#: The descriptors that select() takes are below this (FD_SETSIZE).
_SELECTABLE = 1024


class _PreciseSelector(selectors.EpollSelector):
    """Waits no longer than it is told to, where asyncio's own goes up to the next whole millisecond.

    With 64 coroutines that sleep for 5 ms each, all would wake up together, and a server with its client were busy for
    a while and idle for the rest: 8,800 requests a second in place of 11,000.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout and self.fileno() < _SELECTABLE:
            select.select([self], (), (), timeout)
            timeout = 0
        return super().select(timeout)


class Loop:
    """An asyncio loop in a daemon thread of its own, from when it is made until :meth:`stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.SelectorEventLoop(_PreciseSelector())
        self._loop.set_exception_handler(_log_unhandled)
        self._lock = threading.Lock()
        self._ending = False  # nothing more is taken
        self._ended = False  # the thread is to end
        self._given_up = False
        self._cancellable: set[asyncio.Task[Any]] = set()
        self._thread = threading.Thread(target=self._work, name="coroutines", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more of them
            self._loop.close()
            raise

    def _work(self) -> None:
        while not self._ended:
            self._work_until_it_breaks()
        self._loop.close()

    def _work_until_it_breaks(self) -> None:
        try:
            self._loop.run_forever()
        except BaseException as error:  # of a task that a unit has begun: SystemExit and KeyboardInterrupt come here
            _logger.error("coroutines: %s: %s", type(error).__name__, error, exc_info=error)

    # --- from other threads ---

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Have the loop call `function`, which must not wait for anything.

        Raises:
            RuntimeError: the loop has been told to stop.
        """
        with self._lock:
            if self._ending:
                raise RuntimeError("the loop for coroutines has ended")
            self._loop.call_soon_threadsafe(function, *args)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop, wait for it, and return its result.

        Raises:
            RuntimeError: this is the loop's own thread, or the loop has been told to stop.
        """
        done: Future[T] = Future()
        try:
            if threading.current_thread() is self._thread:
                raise RuntimeError("a coroutine cannot wait for another one by other means than await")
            self.call(self._begin_for, done, coroutine)
        except RuntimeError:
            coroutine.close()
            raise
        return done.result()  # and refer to the coroutine meanwhile, as the loop does so weakly

    def open(self, coroutine: Coroutine[Any, Any, AsyncHandle]) -> Handle:
        """Run `coroutine`, and return a plain handle over the one that it returns.

        Raises:
            TypeError: it returns something else.
        """
        handle = self.run(self.cancellable(coroutine))
        if not isinstance(handle, AsyncHandle):
            raise TypeError(f"open_async must return an AsyncHandle, not {handle!r}")
        # Named as what its author knows, since messages name the class of a handle.
        kind: type[_WaitingHandle] = type(type(handle).__name__, (_WaitingHandle,), {})
        return kind(handle, self)

    def coroutines_of(self, handle: Handle) -> Coroutines | None:
        """Return what of `handle` is coroutines, with nothing of another layer before them; None if nothing is."""
        verbs = {name: getattr(handle, name) for name in VERBS}
        found = {name: verb.verb for name, verb in verbs.items() if isinstance(verb, _Waiting)}
        return Coroutines(self, found) if found else None

    def give_up(self) -> None:
        """Cancel what :meth:`cancellable` has begun or is going to begin; nothing happens if that is done."""
        with contextlib.suppress(RuntimeError):
            self.call(self._give_up)

    def stop(self) -> None:
        """Cancel all tasks, and end the loop, in bounded time."""
        with self._lock:
            self._ending = True
            self._loop.call_soon_threadsafe(lambda: self.begin(self._end()))
        self._thread.join(2 * _GRACE)
        if self._thread.is_alive():
            _logger.error("coroutines: still held up by a call that blocks, abandoned")

    # --- on the loop ---

    def soon(self, function: Callable[[], object]) -> None:
        """Call `function` when what is ready now has been seen to."""
        self._loop.call_soon(function)

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin `coroutine` as a task. The loop refers to that weakly: what it awaits has to be :meth:`cancellable`."""
        return self._loop.create_task(coroutine)

    async def cancellable(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await what is not to go on once it is given up.

        Raises:
            OSError: ESHUTDOWN, it was given up.
        """
        task = asyncio.current_task()
        assert task is not None, "this is awaited in one"
        if self._given_up:
            coroutine.close()
            raise _given_up()
        self._cancellable.add(task)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if self._given_up:
                raise _given_up() from None
            raise
        finally:
            self._cancellable.discard(task)

    def _begin_for(self, done: Future[T], coroutine: Coroutine[Any, Any, T]) -> None:
        self.begin(_finish(done, coroutine))

    def _give_up(self) -> None:
        if not self._given_up:
            self._given_up = True
            for task in self._cancellable:
                task.cancel()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            _, pending = await asyncio.wait(tasks, timeout=_GRACE)
            for task in pending:
                _logger.error("coroutines: abandoned, as it does not end when it is cancelled: %r", task)
        await self._loop.shutdown_asyncgens()
        self._ended = True
        self._loop.stop()


async def _finish(done: Future[T], coroutine: Coroutine[Any, Any, T]) -> None:
    try:
        done.set_result(await coroutine)
    except BaseException as error:  # SystemExit too, which would end the loop
        done.set_exception(error)


def _given_up() -> OSError:
    return OSError(errno.ESHUTDOWN, "given up, as the server ends")


def _log_unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    _logger.error("coroutines: %s", context["message"], exc_info=context.get("exception"))


class Coroutines(NamedTuple):
    """Verbs of an open export that are coroutines, by name, and the loop that they are to be run on."""

    loop: Loop
    verbs: Mapping[str, CoroutineVerb]


class _WaitingHandle(Handle):
    """An :class:`~nbdkitpy.AsyncHandle` as a plain one: for filters to call, and for threads to wait in.

    What it is asked the other one answers. FUA is emulated here already, so that writes need no thread for it.
    """

    def __init__(self, handle: AsyncHandle, loop: Loop) -> None:
        self._handle = handle
        self._loop = loop
        for name in QUESTIONS - {"can_fua"} | {"overrides"}:
            setattr(self, name, getattr(handle, name))
        self._set(VERBS, lambda verb: verb)
        self._set(["extents"], _normalising)

    def can_fua(self) -> Support:
        answer = self._handle.can_fua()
        if answer is not Support.EMULATE:
            return answer
        self._set(["pwrite", "trim", "zero"], lambda verb: _flushing(verb, self._handle.flush))
        return Support.NATIVE

    def close(self) -> None:
        self._loop.run(self._handle.close())

    def _set(self, names: Iterable[str], change: Callable[[CoroutineVerb], CoroutineVerb]) -> None:
        for name in names:
            setattr(self, name, _Waiting(self._loop, change(getattr(self._handle, name))))


class _Waiting:
    """A verb that is a coroutine, as a call that waits for it."""

    def __init__(self, loop: Loop, verb: CoroutineVerb) -> None:
        self._loop = loop
        self.verb = verb

    def __call__(self, *args: object) -> object:
        return self._loop.run(self._loop.cancellable(self.verb(*args)))


def _flushing(verb: CoroutineVerb, flush: CoroutineVerb) -> CoroutineVerb:
    """Return `verb` with FUA emulated by a flush after it."""

    async def then_flush(subject: object, offset: int, flags: int) -> None:
        await verb(subject, offset, flags & ~Flags.FUA)
        await flush()

    def flushing(subject: object, offset: int, flags: int) -> Coroutine[Any, Any, None]:
        return (then_flush if flags and flags & Flags.FUA else verb)(subject, offset, flags)

    return flushing


def _normalising(verb: CoroutineVerb) -> CoroutineVerb:
    """Return `verb`, which returns extents, so that it returns a list: a generator would do its work elsewhere."""

    async def extents(count: int, offset: int, flags: int) -> list[Extent]:
        return normalise_extents(await verb(count, offset, flags), count, offset)

    return extents

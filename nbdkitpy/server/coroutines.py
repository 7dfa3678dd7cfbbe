"""The engine of a connection whose requests are carried out by coroutines, as far as no filter stands before those.

The reading thread hands each batch of requests over to the loop, where each of them becomes a task. What is done in one
turn of the loop goes to a third thread, which sends it: the loop waits for no client.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from nbdkitpy.backend import Buffer
from nbdkitpy.protocol.constants import Command
from nbdkitpy.protocol.transmission import Request
from nbdkitpy.server.checks import checked_data
from nbdkitpy.server.commands import ARGUMENTS, VERBS
from nbdkitpy.server.engine import Engine, cost_of
from nbdkitpy.server.transport import Stream
from nbdkitpy.stack import OpenExport

__all__ = ["CoroutineEngine"]


class CoroutineEngine(Engine):
    """Serves an export of which some verbs are coroutines; the others are served as those of any export.

    Args:
        transport: As for any engine, like what follows the export.
        export: What is served; it has :attr:`~nbdkitpy.stack.OpenExport.coroutines`.
    """

    def __init__(self, transport: Stream, export: OpenExport, *args: Any, **kwargs: Any) -> None:
        super().__init__(transport, export, *args, **kwargs)
        assert export.coroutines is not None, "this engine is chosen because there are some"
        self._loop, verbs = export.coroutines
        self._verbs = {command: verbs[verb] for command, verb in VERBS.items() if verb in verbs}
        if not export.capabilities.can_extents:
            self._verbs.pop(Command.BLOCK_STATUS, None)  # all is data, which is known without asking
        self._ready: list[Request] = []  # taken in hand, but not handed over yet
        self._post = _Post(self._sender.post, f"{self._name}.post")
        self._done: list[Buffer] = []  # replies of this turn of the loop, and what to give back when they are sent
        self._done_cost = 0

    # --- the connection's thread ---

    def run(self, received: bytes) -> None:
        try:
            super().run(received)
        finally:
            self._post.stop()

    def _rest(self) -> None:
        if self._budget.unused:
            self._post.stop()
        super()._rest()

    def _serve(self, requests: list[Request]) -> None:
        verbs, ready = self._verbs, self._ready
        others: list[Request] = []
        try:
            for request in requests:
                if request.command not in verbs:
                    others.append(request)
                    continue
                taken = self._take_in_hand(request)
                if taken is not None:
                    ready.append(taken)
        finally:
            self._begin()
        super()._serve(others)

    def _prepare_to_wait(self) -> None:
        self._begin()  # what we wait for is used up by these, perhaps
        super()._prepare_to_wait()

    def _begin(self) -> None:
        """Hand over what has been taken in hand."""
        if not self._ready:
            return
        requests = self._ready[:]
        self._ready.clear()
        try:
            self._post.begin()
            self._loop.call(self._begin_on_loop, requests)
        except BaseException:
            self._budget.give(sum(map(cost_of, requests)))
            raise

    # --- on the loop ---

    def _begin_on_loop(self, requests: list[Request]) -> None:
        begin, perform = self._loop.begin, self._perform
        for request in requests:
            begin(perform(request))

    async def _perform(self, request: Request) -> None:
        """Carry out a request and have it answered, whatever happens, or put it aside."""
        pieces: list[Buffer] = []
        try:
            if not self._puts_aside(request):
                pieces = await self._carried_out(request)
        except BaseException as error:
            self._cannot_answer(error)
        if not self._done_cost:
            self._loop.soon(self._post_done)
        self._done += pieces
        self._done_cost += self._cost_of_reply(request, pieces)

    async def _carried_out(self, request: Request) -> list[Buffer]:
        try:
            verb = self._verbs[request.command](*ARGUMENTS[request.command](request))
            return self._reply(request, await self._loop.cancellable(verb))
        except BaseException as error:  # SystemExit too, which would end the loop
            return [self._commands.failure(request, error)]

    def _reply(self, request: Request, result: Any) -> list[Buffer]:
        _, _, cookie, offset, length, _ = request
        if request.command == Command.READ:
            data = checked_data(result, length)
            return [self._replies.data(cookie, offset, length), data]
        if request.command == Command.BLOCK_STATUS:
            return self._commands.status(request, result)
        return [self._replies.success(cookie, offset)]

    def _post_done(self) -> None:
        done, cost = self._done, self._done_cost
        self._done, self._done_cost = [], 0
        self._post.put(done, cost)


class _Post:
    """A thread that sends what is put in, from :meth:`begin` to :meth:`stop`, which one thread calls."""

    def __init__(self, send: Callable[[Sequence[Buffer], int], None], name: str) -> None:
        self._send = send
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Sequence[Buffer], int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Have the thread there.

        Raises:
            RuntimeError: the system has no more of them.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def put(self, pieces: Sequence[Buffer], cost: int) -> None:
        """Have whole messages sent: see :meth:`Sender.post`."""
        self._queue.put((pieces, cost))

    def _run(self) -> None:
        while self._send_next():
            pass

    def _send_next(self) -> bool:
        message = self._queue.get()
        if message is None:
            return False
        self._send(*message)  # and then it is not kept until there is another one
        return True

    def stop(self) -> None:
        """End the thread when all is sent, and wait for that."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

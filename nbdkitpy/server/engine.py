"""The engine: takes the requests of one connection, and has them carried out and answered, a batch at a time.

One thread reads whatever has arrived, carries out every complete request in it that does not have to wait, and
answers them all with one gather write. What may have to wait goes to workers, which send their replies themselves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from nbdkitpy.backend import Buffer
from nbdkitpy.exceptions import describe
from nbdkitpy.extents import MAX_EXTENTS
from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.protocol.replies import Replies
from nbdkitpy.protocol.transmission import Request, Transmission
from nbdkitpy.server.batch import FULL, Batch
from nbdkitpy.server.budget import Budget, CancelledError
from nbdkitpy.server.checks import checked_data
from nbdkitpy.server.commands import VERBS, Commands, Log
from nbdkitpy.server.reads import Reads
from nbdkitpy.server.sender import Sender
from nbdkitpy.server.transport import Stream
from nbdkitpy.server.workers import Pace, Workers
from nbdkitpy.stack import OpenExport

__all__ = ["Engine", "cost_of"]

#: What a request in the hands of workers counts for beyond its data.
_REQUEST_COST = 64 << 10

#: Bytes of the longest reply to a BLOCK_STATUS.
_MOST_STATUS = 16 * MAX_EXTENTS

#: After so many seconds without a request, memory and workers are given back.
_QUIET = 5.0

#: So many refused requests of one client are logged; a client can send millions.
_REFUSALS_LOGGED = 10

# Plain numbers: operations on members of an enum take many times as long.
_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_BLOCK_STATUS = int(Command.BLOCK_STATUS)
_WIRE_FUA = int(CommandFlag.FUA)

#: What moves bytes within memory, mostly, is taken as quick until it is not; the rest has to show that it is.
_QUICK_AT_FIRST = frozenset({Command.READ, Command.WRITE, Command.BLOCK_STATUS})


class Engine:
    """Serves one open export on one connection, until the client leaves or :meth:`stop` is called.

    Args:
        transport: Where requests come from.
        export: What is served. The engine does not close it.
        transmission: Cuts the stream into requests.
        replies: The form in which this client wants its answers.
        threads: The most workers that there may be; with 0 every call is made by the reading thread.
        lock: Held during each call into the export, if not None.
        log: Where errors go.
        name: Of the connection, for logs and threads.
        budget: What payloads and replies are counted by. Nothing else is while the engine runs.
        idle_timeout: Seconds without a request after which the client is left; 0 is for ever.
    """

    def __init__(
        self,
        transport: Stream,
        export: OpenExport,
        transmission: Transmission,
        replies: Replies,
        *,
        threads: int,
        lock: threading.Lock | None,
        log: Log,
        name: str,
        budget: Budget,
        idle_timeout: float = 0.0,
    ) -> None:
        self._transport = transport
        self._transmission = transmission
        self._replies = replies
        self._log = log
        self._name = name
        self._idle_timeout = idle_timeout
        self._refusals = 0
        self._is_at_end = False  # nothing more comes from the client
        self._is_left = False  # the client has gone without a word, as far as is known: what waits is put aside

        # Who carries out what. There may be no workers: then every call is made by the reading thread.
        handle = export.handle
        self._alone = threads == 0
        self._commands = Commands(export, replies, lock, log, name)
        self._inline = handle.inline
        self._paces = {command: Pace(quick=command in _QUICK_AT_FIRST) for command in VERBS}
        self._write_now = self._commands.pwrite if "pwrite" in handle.inline else None
        self._workers = Workers(self._work_on, threads, name)
        self._postponed: list[Request] = []  # what has been put aside

        # Replies on their way out.
        self._budget = budget
        self._was_landing: Request | None = None  # when others began to wait; the same of the next
        self._was_full = False
        self._sender = Sender(transport, budget)
        self._batch = Batch(self._sender)
        self._reads = Reads(
            handle,
            self._commands,
            replies,
            self._batch,
            budget,
            locked=lock is not None,
            alone=self._alone,
            pace=self._paces[_READ],
        )

    # --- the connection's thread ---

    def run(self, received: bytes) -> None:
        """Serve the client, beginning with the bytes already received, until it leaves.

        Raises:
            RemoteProtocolError: the client broke the protocol. All that it asked for before is done.
            OSError: the connection broke.
        """
        transmission = self._transmission
        receive_into, receive_soon = self._transport.receive_into, self._transport.receive_soon
        patience = min(_QUIET, self._idle_timeout or _QUIET)
        self._transport.set_patience(patience)
        self._budget.others_wait, self._budget.before_waiting = self._others_wait, self._prepare_to_wait
        try:
            for requests in transmission.feed(received):
                self._serve(requests)
            waits, receive = 0, receive_into
            while not transmission.finished:
                try:
                    count = receive(transmission.buffer())
                except BlockingIOError:
                    waits += 1
                    self._rest()
                    if self._is_idle(waits * patience):
                        break
                    continue
                if not count:
                    break
                waits = 0
                requests = transmission.received(count)
                self._serve(requests)
                receive = receive_soon if len(requests) < 2 else receive_into
                del requests  # or else their payloads would be held while we wait for the next
        finally:
            self._is_at_end = True
            self._look_out()
            self._budget.finish()
            self._workers.stop()
            del self._workers  # which refer to us: buffers of megabytes would wait for the garbage collector
            self._settle_postponed()
        if transmission.failure is not None:
            # Not itself, as its traceback would refer to what refers to it, and keep all that from being freed.
            raise RemoteProtocolError(*transmission.failure.args)
        if not transmission.finished and not transmission.at_boundary:
            self._log.info("%s: left in the middle of a request, which is dropped", self._name)

    def stop(self) -> None:
        """Refuse what the client still asks for, and end when what it has asked for is done. From any thread."""
        self.refuse()
        self._transport.stop_receiving()

    def refuse(self) -> None:
        """Refuse what the client still asks for. From any thread."""
        self._transmission.refuse_all()

    @property
    def waits_for_client(self) -> bool:
        """Whether it is, and was when others began to wait, for the client to take replies or to send a payload."""
        if self._was_full and self._is_full():
            return True
        landing = self._transmission.landing
        return landing is not None and landing is self._was_landing and not self._budget.is_waiting

    def _is_full(self) -> bool:
        return self._sender.is_sending and self._transport.is_full()

    def _others_wait(self) -> None:
        """Take note of how things are when others begin to wait for memory. From any thread."""
        self._was_landing, self._was_full = self._transmission.landing, self._is_full()

    def _prepare_to_wait(self) -> None:
        """Send the replies that are ready."""
        self._reads.send_run()
        self._batch.send()

    def _is_idle(self, seconds: float) -> bool:
        """Whether the client, quiet for so long, is to be left. One whose requests are at work is not quiet."""
        if not self._idle_timeout or seconds < self._idle_timeout or not self._budget.unused:
            return False
        self._log.info("%s: quiet for %g seconds, disconnected", self._name, seconds)
        return True

    def _look_out(self) -> None:
        """Notice that the client has gone, to whom nothing can be said any more, unless it has taken its leave.

        It may have come again by now, and a write that is late would destroy what it has written since.
        """
        self._is_left = self._is_left or (not self._transmission.finished and self._transport.is_gone())

    def _rest(self) -> None:
        if self._budget.unused:  # else to stop the workers would be to wait for what they are at
            self._workers.stop()
        self._batch.rest()
        self._transmission.rest()

    def _serve(self, requests: list[Request]) -> None:
        """Carry out requests, or have it done, and send what replies there are."""
        batch, reads, data_header = self._batch, self._reads, self._replies.data
        pieces, copy, read_now, plain = batch.pieces, reads.copy, reads.now, reads.plain
        write_now, success = self._write_now, self._replies.success
        for request in requests:
            command, flags, cookie, offset, length, payload = request
            # The common cases, spelt out: small reads, and writes, that do not have to wait.
            try:
                if command == _READ and not flags and length <= plain:
                    if copy is not None:
                        if not copy(cookie, offset, length):
                            self._have_done(request)
                        continue
                    data = read_now(length, offset)
                    if data is None:
                        self._have_done(request)
                        continue
                    if not (type(data) is bytes and len(data) == length):
                        data = checked_data(data, length)
                    header = data_header(cookie, offset, length)
                    pieces.append(header)
                    pieces.append(data)
                    batch.size += len(header) + length
                    if batch.size >= FULL:
                        batch.send()
                elif command == _WRITE and not flags and write_now is not None:
                    write_now(payload, offset, 0)
                    header = success(cookie, offset)
                    pieces.append(header)
                    batch.size += len(header)
                elif command != _READ:
                    self._dispatch(request)
                elif not reads.at_once(request):
                    self._have_done(request)
            except CancelledError:
                raise
            except BaseException as error:
                batch.append([self._commands.failure(request, error)])
        if reads.run:
            for request in reads.finish():
                self._have_done(request)
        if self._transmission.refusals:
            self._answer_refusals()
        batch.send()

    def _answer_refusals(self) -> None:
        refusals, self._transmission.refusals = self._transmission.refusals, []
        for refusal in refusals:
            self._batch.append([self._replies.error(*refusal)])
            if refusal.error is NbdError.ESHUTDOWN:
                continue  # there is nothing wrong with the request
            self._refusals += 1
            if self._refusals <= _REFUSALS_LOGGED:
                self._log.error("%s: %s", self._name, refusal.message)
            elif self._refusals == _REFUSALS_LOGGED + 1:
                self._log.error("%s: further invalid requests of this client are not logged", self._name)

    # --- who carries out what ---

    def _dispatch(self, request: Request) -> None:
        """Carry out a request that is no READ here if that is quick, else have a worker do it."""
        verb, command = VERBS[request.command], request.command
        durable = request.flags & _WIRE_FUA
        if verb in self._inline and not (durable and "flush" not in self._inline):
            self._answer(request, self._commands.perform(request))
        else:
            self._schedule(request, self._paces[Command.FLUSH if durable else command])

    def _schedule(self, request: Request, pace: Pace) -> None:
        if not (self._alone or pace.quick):
            self._hand_over(request)
            return
        if not pace.quick:
            self._batch.send()  # replies do not wait for what comes after them
            self._look_out()
        if self._is_left:
            self._put_aside(request)
            return
        self._answer(request, self._timed(request, pace))
        if not pace.quick:
            self._look_out()

    def _answer(self, request: Request, pieces: list[Buffer]) -> None:
        """Have a reply sent: of those that are no data only that to BLOCK_STATUS can be large."""
        size = sum(map(len, pieces)) if request.command == _BLOCK_STATUS else 0
        if size < FULL:
            self._batch.append(pieces)
            return
        with self._budget.holding(size):
            self._batch.append(pieces)  # which sends it

    def _have_done(self, request: Request) -> None:
        """Have a read done that has to wait."""
        if self._alone:
            self._schedule(request, self._paces[_READ])
        else:
            self._hand_over(request)

    def _hand_over(self, request: Request) -> None:
        """Give a request to the workers, when there is room for one more."""
        taken = self._take_in_hand(request)
        if taken is not None:
            self._workers.put(taken)

    def _take_in_hand(self, request: Request) -> Request | None:
        """Return a request as others may have it, when there is room for one more; None if nobody is to.

        Raises:
            CancelledError: nobody waits for room any more.
        """
        if self._is_left:
            self._put_aside(request)
            return None
        if request.command == _READ and self._budget.is_cancelled:
            return None  # there is nobody to take it
        has_payload = False
        if request.payload:
            kept = self._transmission.keep_payload(request.payload)
            has_payload = kept is request.payload
            request = request._replace(payload=kept)
        self._budget.take(cost_of(request), has_payload=has_payload)
        return request

    def _put_aside(self, request: Request) -> None:
        if request.payload:
            request = request._replace(payload=self._transmission.keep_payload(request.payload))
        self._postponed.append(request)

    def _work_on(self, request: Request) -> None:
        """What a worker does with one request."""
        pieces: Sequence[Buffer] = ()
        try:
            if not self._puts_aside(request):
                durable = request.flags & _WIRE_FUA and request.command != _READ
                pieces = self._timed(request, self._paces[Command.FLUSH if durable else request.command])
        except BaseException as error:
            self._cannot_answer(error)
        self._sender.post(pieces, self._cost_of_reply(request, pieces))

    def _puts_aside(self, request: Request) -> bool:
        """Put a request aside that is about to begin, if the client has gone. In any thread."""
        if self._is_at_end or self._sender.broken:
            self._look_out()
        if self._is_left:
            self._postponed.append(request)
        return self._is_left

    def _cannot_answer(self, error: BaseException) -> None:
        """Break the connection, as not even a reply could be made of `error`, for want of memory perhaps."""
        self._transport.abort()
        self._log.error("%s: %s", self._name, describe(error))

    def _cost_of_reply(self, request: Request, pieces: Sequence[Buffer]) -> int:
        """Return what a request counts for until its reply is sent, and give back the rest."""
        cost = cost_of(request)
        if request.command != _BLOCK_STATUS:
            return cost
        less = min(cost, _REQUEST_COST + sum(map(len, pieces)))  # it is seldom as long as it could be
        self._budget.give(cost - less)
        return less

    def _timed(self, request: Request, pace: Pace) -> list[Buffer]:
        begin = time.perf_counter()
        pieces = self._commands.perform(request)
        pace.took(time.perf_counter() - begin)
        return pieces

    def _settle_postponed(self) -> None:
        """Do what has been put aside if the client turns out to have taken its leave, else drop it."""
        postponed, self._postponed = self._postponed, []
        if self._transmission.finished:
            for request in postponed:
                self._commands.perform(request)
        elif postponed:
            self._log.info("%s: gone, %d requests that had not begun are dropped", self._name, len(postponed))


def cost_of(request: Request) -> int:
    """Return how many bytes a request counts for while somebody is at work on it."""
    # What no data goes with counts for itself only: a TRIM of a terabyte is no larger than one of a block.
    if request.command in (Command.READ, Command.WRITE):
        return _REQUEST_COST + request.length
    return _REQUEST_COST + (min(request.length, _MOST_STATUS) if request.command == Command.BLOCK_STATUS else 0)

"""The engine: carries out the requests of one connection and answers them, a batch at a time.

One thread reads whatever has arrived, carries out every complete request in it that does not have to wait, and
answers them all with one gather write. What may have to wait goes to workers, which send their replies themselves.
Large reads go from the file to the socket without passing through here, where the handle can name the file.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from nbdkitpy.backend import Buffer, FileRange, Flags
from nbdkitpy.extents import MAX_EXTENTS, Extent, ExtentType, normalise_extents
from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError
from nbdkitpy.protocol.errors import RemoteProtocolError, nbd_error
from nbdkitpy.protocol.replies import Replies
from nbdkitpy.protocol.transmission import MAX_PAYLOAD, Request, Transmission
from nbdkitpy.server.sender import Budget, Sender
from nbdkitpy.server.transport import Stream
from nbdkitpy.server.workers import Pace, Workers
from nbdkitpy.stack import OpenExport

__all__ = ["Engine", "checked_data", "checked_range", "describe", "reason"]

#: Replies of a batch are sent when there are so many bytes of them, so that they do not pile up.
_BATCH = 1 << 20

#: Reads of at least so many bytes are sent straight from the file, if the handle can name one.
_FROM_FILE = 32 << 10

#: Reads of at least so many bytes are asked for holes, if the handle has any; with more pieces it does not pay.
_SPARSE = 16 << 10
_MOST_PIECES = 32

#: Bytes that requests in the hands of workers may hold, and what one counts for beyond its data.
_IN_HAND = MAX_PAYLOAD
_REQUEST_COST = 64 << 10

#: Bytes of the longest reply to a BLOCK_STATUS.
_MOST_STATUS = 16 * MAX_EXTENTS

#: After so many seconds without a request, memory and workers are given back.
_QUIET = 5.0

#: What the system can take.
_MAX_FD = (1 << 31) - 1
_MAX_POSITION = (1 << 63) - 1

#: So many refused requests of one client are logged; a client can send millions.
_REFUSALS_LOGGED = 10

# Plain numbers: operations on members of an enum take many times as long.
_READ = int(Command.READ)
_WIRE_FUA = int(CommandFlag.FUA)
_WIRE_DF = int(CommandFlag.DF)
_FUA = int(Flags.FUA)
_ZERO = int(ExtentType.ZERO)

_VERBS: dict[int, str] = {
    Command.READ: "pread",
    Command.WRITE: "pwrite",
    Command.FLUSH: "flush",
    Command.TRIM: "trim",
    Command.CACHE: "cache",
    Command.WRITE_ZEROES: "zero",
    Command.BLOCK_STATUS: "extents",
}

#: What moves bytes within memory, mostly, is taken as quick until it is not; the rest has to show that it is.
_QUICK_AT_FIRST = frozenset({Command.READ, Command.WRITE, Command.BLOCK_STATUS})

P = ParamSpec("P")
R = TypeVar("R")


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
        log: logging.Logger,
        name: str,
        idle_timeout: float = 0.0,
    ) -> None:
        self._transport = transport
        self._transmission = transmission
        self._replies = replies
        self._log = log
        self._name = name
        self._idle_timeout = idle_timeout
        self._refusals = 0

        # Calls, looked up once.
        handle = export.handle
        self._sparse = handle.sparse and export.capabilities.can_extents and replies.chunked
        self._knows_extents = export.capabilities.can_extents
        self._pread = _locked(handle.pread, lock)
        self._pwrite = _locked(handle.pwrite, lock)
        self._flush = _locked(handle.flush, lock)
        self._trim = _locked(handle.trim, lock)
        self._zero = _locked(handle.zero, lock)
        self._cache = _locked(handle.cache, lock)
        self._extents = _locked(_normalised(handle.extents), lock)
        self._file_range = handle.file_range if lock is None else None
        #: There are no workers: every call is made by the reading thread.
        self._alone = threads == 0
        #: A read that does not wait, or None if there is no way to be sure of that.
        self._pread_now: Callable[[int, int], Buffer | None] | None = handle.pread_nowait
        if self._alone:
            self._pread_now = self._paced_pread
        if "pread" in handle.inline:
            self._pread_now = self._pread
        self._inline = handle.inline
        self._paces = {command: Pace(quick=command in _QUICK_AT_FIRST) for command in _VERBS}

        # Replies on their way out.
        self._batch: list[Buffer] = []
        self._batch_size = 0
        self._budget = Budget(_IN_HAND)
        self._sender = Sender(transport, self._budget)
        self._workers = Workers(self._work_on, threads, name)

    # --- the connection's thread ---

    def run(self, received: bytes) -> None:
        """Serve the client, beginning with the bytes already received, until it leaves.

        Raises:
            RemoteProtocolError: the client broke the protocol. All that it asked for before is done.
            OSError: the connection broke.
        """
        transmission = self._transmission
        receive_into = self._transport.receive_into
        patience = min(_QUIET, self._idle_timeout or _QUIET)
        self._transport.set_patience(patience)
        try:
            for requests in transmission.feed(received):
                self._serve(requests)
            waits = 0
            while not transmission.finished:
                try:
                    count = receive_into(transmission.buffer())
                except BlockingIOError:
                    waits += 1
                    self._rest()
                    if self._is_idle(waits * patience):
                        break
                    continue
                if not count:
                    break
                waits = 0
                self._serve(transmission.received(count))
        finally:
            self._budget.wait_until_unused()
            self._workers.stop()
            del self._workers  # which refer to us: buffers of megabytes would wait for the garbage collector
        if transmission.failure is not None:
            # Not itself, as its traceback would refer to what refers to it, and keep all that from being freed.
            raise RemoteProtocolError(*transmission.failure.args)
        if not transmission.finished and not transmission.at_boundary:
            self._log.info("%s: left in the middle of a request, which is dropped", self._name)

    def stop(self) -> None:
        """Refuse what the client still asks for, and end when what it has asked for is done. From any thread."""
        self._transmission.refuse_all()
        self._transport.stop_receiving()

    def _is_idle(self, seconds: float) -> bool:
        """Whether the client, quiet for so long, is to be left. One whose requests are at work is not quiet."""
        if not self._idle_timeout or seconds < self._idle_timeout or not self._budget.unused:
            return False
        self._log.info("%s: quiet for %g seconds, disconnected", self._name, seconds)
        return True

    def _rest(self) -> None:
        if self._budget.unused:  # else to stop the workers would be to wait for what they are at
            self._workers.stop()
        self._transmission.rest()

    def _serve(self, requests: list[Request]) -> None:
        """Carry out a batch of requests, or have it done, and send what replies there are."""
        pread_now, batch, data_header = self._pread_now, self._batch, self._replies.data
        for request in requests:
            command, flags, cookie, offset, length, _ = request
            if command != _READ:
                self._dispatch(request)
                continue
            if flags or length >= _SPARSE or pread_now is None:
                self._dispatch_read(request)
                continue
            # The common case, spelt out: a small read that does not have to wait.
            try:
                data = pread_now(length, offset)
            except BaseException as error:
                batch.append(self._failure(request, error))
                continue
            if (type(data) is bytes or type(data) is bytearray) and len(data) == length:
                batch.append(data_header(cookie, offset, length))
                batch.append(data)
                self._batch_size += length
                if self._batch_size >= _BATCH:
                    self._send_batch()
            elif data is None and not self._alone:
                self._hand_over(request)  # it was tried, and has to wait
            else:
                self._dispatch_read(request)
        if self._transmission.refusals:
            self._answer_refusals()
        if batch:
            self._send_batch()

    def _append(self, pieces: list[Buffer]) -> None:
        self._batch += pieces
        self._batch_size += sum(map(len, pieces))
        if self._batch_size >= _BATCH:
            self._send_batch()

    def _send_batch(self) -> None:
        self._sender.send(self._batch)
        self._batch.clear()
        self._batch_size = 0

    def _answer_refusals(self) -> None:
        refusals, self._transmission.refusals = self._transmission.refusals, []
        for refusal in refusals:
            self._batch.append(self._replies.error(*refusal))
            if refusal.error is NbdError.ESHUTDOWN:
                continue  # there is nothing wrong with the request
            self._refusals += 1
            if self._refusals <= _REFUSALS_LOGGED:
                self._log.error("%s: %s", self._name, refusal.message)
            elif self._refusals == _REFUSALS_LOGGED + 1:
                self._log.error("%s: further invalid requests of this client are not logged", self._name)

    # --- who carries out what ---

    def _dispatch(self, request: Request) -> None:
        """Carry out a request that is no READ: here if that is quick, else by a worker."""
        verb, pace = _VERBS[request.command], request.command
        durable = request.flags & _WIRE_FUA
        if verb in self._inline and not (durable and "flush" not in self._inline):
            self._append(self._perform(request))
        else:
            self._schedule(request, self._paces[Command.FLUSH if durable else pace])

    def _dispatch_read(self, request: Request) -> None:
        try:
            done = self._read_at_once(request)
        except BaseException as error:
            self._append([self._failure(request, error)])
            return
        if done:
            return
        if self._pread_now is None or self._alone:
            self._schedule(request, self._paces[_READ])
        else:
            self._hand_over(request)  # it was tried, and has to wait

    def _read_at_once(self, request: Request) -> bool:
        """Answer a read if that can be done without waiting."""
        holes = None
        if self._may_have_holes(request):
            if "extents" not in self._inline and not self._alone:
                return False
            holes = self._holes(request)
        if holes is None and self._read_from_file(request):
            return True
        pieces = self._read(request, holes, self._pread_now) if self._pread_now is not None else None
        if pieces is not None:
            self._append(pieces)
        return pieces is not None

    def _read_from_file(self, request: Request) -> bool:
        """Answer a read by sending a part of a file, if the handle says where it lies."""
        _, _, cookie, offset, length, _ = request
        if length < _FROM_FILE or self._file_range is None:
            return False
        found = self._file_range(length, offset)
        if found is None:
            return False
        where = checked_range(found)
        replies = self._replies
        if not replies.chunked:
            self._sender.send_file([*self._batch, replies.data(cookie, offset, length)], where, length, None)
            self._batch.clear()
        else:
            # DONE may not stand on a chunk that can still fail ("Structured reply flags"), hence one more chunk.
            header = replies.part(cookie, offset, offset, length)
            whole = self._sender.send_file([*self._batch, header], where, length, lambda n: self._too_short(request, n))
            self._batch[:] = [replies.end(cookie, offset)] if whole else []
        self._batch_size = 0
        return True

    def _too_short(self, request: Request, missing: int) -> list[Buffer]:
        """What completes a chunk whose file has become shorter: what was announced, and that it is not the data."""
        return [bytes(missing), self._failure(request, OSError(errno.EIO, "the file has become shorter"))]

    def _schedule(self, request: Request, pace: Pace) -> None:
        if self._alone or pace.quick:
            self._send_if_slow(pace)
            self._append(self._timed(request, pace))
        else:
            self._hand_over(request)

    def _send_if_slow(self, pace: Pace) -> None:
        """Send the batch before a call that may take its time: replies do not wait for what comes after them."""
        if self._batch and not pace.quick:
            self._send_batch()

    def _paced_pread(self, count: int, offset: int) -> Buffer:
        pace = self._paces[_READ]
        self._send_if_slow(pace)
        begin = time.perf_counter()
        data = self._pread(count, offset)
        pace.took(time.perf_counter() - begin)
        return data

    def _hand_over(self, request: Request) -> None:
        """Give a request to the workers, when there is room for one more."""
        if request.payload:
            request = request._replace(payload=self._transmission.keep_payload(request.payload))
        self._budget.take(_cost(request))
        self._workers.put(request)

    def _work_on(self, request: Request) -> None:
        """What a worker does with one request."""
        durable = request.flags & _WIRE_FUA and request.command != _READ
        pieces = self._timed(request, self._paces[Command.FLUSH if durable else request.command])
        self._sender.post(pieces, _cost(request))

    def _timed(self, request: Request, pace: Pace) -> list[Buffer]:
        begin = time.perf_counter()
        pieces = self._perform(request)
        pace.took(time.perf_counter() - begin)
        return pieces

    # --- carrying out ---

    def _perform(self, request: Request) -> list[Buffer]:
        """Carry out a request and return its reply, whatever happens."""
        try:
            return _WORK[request.command](self, request)
        except BaseException as error:  # SystemExit too: nothing that a backend raises ends more than its request
            return [self._failure(request, error)]

    def _failure(self, request: Request, error: BaseException) -> bytes:
        """Log why a request failed, and return the reply that says so."""
        number, text, trace = _error_number(error), "internal error of the server", None
        if isinstance(error, OSError):
            text = reason(error) or "input/output error"
        else:
            trace = error
        what = f"{_VERBS[request.command]} of {request.length} bytes at {request.offset}"
        self._log.error("%s: %s: %s", self._name, what, describe(error), exc_info=trace)
        fast_zero = bool(request.flags & CommandFlag.FAST_ZERO)
        wire = nbd_error(number, fast_zero=fast_zero, dont_fragment=bool(request.flags & _WIRE_DF))
        return self._replies.error(request.cookie, request.offset, wire, text)

    def _do_read(self, request: Request) -> list[Buffer]:
        holes = self._holes(request) if self._may_have_holes(request) else None
        pieces = self._read(request, holes, self._pread)
        if pieces is None:
            raise TypeError("pread must return a buffer, not None")
        return pieces

    def _read(
        self, request: Request, holes: list[Extent] | None, pread: Callable[[int, int], Buffer | None]
    ) -> list[Buffer] | None:
        """Return the reply to a read by means of `pread`, or None if that returned None."""
        _, _, cookie, offset, length, _ = request
        if holes is None:
            data = pread(length, offset)
            return None if data is None else [self._replies.data(cookie, offset, length), checked_data(data, length)]
        pieces: list[Buffer] = []
        for start, count, kind in holes:
            if kind & _ZERO:
                pieces.append(self._replies.hole(cookie, offset, start, count))
                continue
            data = pread(count, start)
            if data is None:
                return None
            pieces += (self._replies.part(cookie, offset, start, count), checked_data(data, count))
        pieces.append(self._replies.end(cookie, offset))
        return pieces

    def _may_have_holes(self, request: Request) -> bool:
        return self._sparse and request.length >= _SPARSE and not request.flags & _WIRE_DF

    def _holes(self, request: Request) -> list[Extent] | None:
        """Return the extents of a read if some of them need not be sent, else None."""
        extents = self._extents(request.length, request.offset, 0)
        covered = extents[-1].offset + extents[-1].length == request.offset + request.length
        if not covered or len(extents) > _MOST_PIECES or not any(extent.type & _ZERO for extent in extents):
            return None
        return extents

    def _do_write(self, request: Request) -> list[Buffer]:
        self._pwrite(request.payload, request.offset, _FUA if request.flags & _WIRE_FUA else 0)
        return [self._replies.success(request.cookie, request.offset)]

    def _do_flush(self, request: Request) -> list[Buffer]:
        self._flush()
        return [self._replies.success(request.cookie, request.offset)]

    def _do_trim(self, request: Request) -> list[Buffer]:
        self._trim(request.length, request.offset, _FUA if request.flags & _WIRE_FUA else 0)
        return [self._replies.success(request.cookie, request.offset)]

    def _do_cache(self, request: Request) -> list[Buffer]:
        self._cache(request.length, request.offset)
        return [self._replies.success(request.cookie, request.offset)]

    def _do_zero(self, request: Request) -> list[Buffer]:
        flags = Flags.NONE if request.flags & CommandFlag.NO_HOLE else Flags.MAY_TRIM
        if request.flags & _WIRE_FUA:
            flags |= Flags.FUA
        if request.flags & CommandFlag.FAST_ZERO:
            flags |= Flags.FAST_ZERO
        self._zero(request.length, request.offset, int(flags))
        return [self._replies.success(request.cookie, request.offset)]

    def _do_block_status(self, request: Request) -> list[Buffer]:
        _, flags, cookie, offset, length, _ = request
        first_only = flags & CommandFlag.REQ_ONE
        if self._knows_extents:
            extents = self._extents(length, offset, int(Flags.REQ_ONE) if first_only else 0)
        else:
            extents = [Extent(offset, length)]
        told = [(extent.length, extent.type) for extent in (extents[:1] if first_only else extents)]
        return [self._replies.block_status(cookie, offset, told)]


_WORK: dict[int, Callable[[Engine, Request], list[Buffer]]] = {
    Command.READ: Engine._do_read,
    Command.WRITE: Engine._do_write,
    Command.FLUSH: Engine._do_flush,
    Command.TRIM: Engine._do_trim,
    Command.CACHE: Engine._do_cache,
    Command.WRITE_ZEROES: Engine._do_zero,
    Command.BLOCK_STATUS: Engine._do_block_status,
}


def _locked(verb: Callable[P, R], lock: threading.Lock | None) -> Callable[P, R]:
    """Return `verb`, so that it is called under `lock`."""
    if lock is None:
        return verb

    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock:
            return verb(*args, **kwargs)

    return locked


def _normalised(
    verb: Callable[[int, int, int], Iterable[tuple[int, int, int]]],
) -> Callable[[int, int, int], list[Extent]]:
    """Return `verb` so that it returns a list; as a generator it would do its work after it has been called."""
    return lambda count, offset, flags: normalise_extents(verb(count, offset, flags), count, offset)


def _cost(request: Request) -> int:
    # What no data goes with counts for itself only: a TRIM of a terabyte is no larger than one of a block.
    if request.command in (Command.READ, Command.WRITE):
        return _REQUEST_COST + request.length
    return _REQUEST_COST + (min(request.length, _MOST_STATUS) if request.command == Command.BLOCK_STATUS else 0)


def checked_data(data: object, length: int) -> Buffer:
    """Return `data`, which a backend read, as what can be sent.

    Raises:
        TypeError: it is no buffer, or its bytes do not lie one after the other.
        ValueError: it does not have `length` bytes.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"pread must return bytes, a bytearray or a memoryview, not {type(data).__name__}")
    # Not len(), which a class of the plugin's own may define as it likes.
    view = memoryview(data)
    if view.nbytes != length:
        raise ValueError(f"pread must return {length} bytes, not {view.nbytes}")
    return data if type(data) is bytes else view.cast("B")


def checked_range(found: object) -> FileRange:
    """Return `found`, where a backend says that data lies, so that nothing can be wrong with it but the file.

    Raises:
        TypeError: it is no pair of integers.
        ValueError: they cannot be a file descriptor and a position.
    """
    if not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(number, int) for number in found):
        raise TypeError(f"file_range must return a FileRange or None, not {found!r}")
    where = FileRange(*found)
    if not (0 <= where.fd <= _MAX_FD and 0 <= where.position <= _MAX_POSITION):
        raise ValueError(f"file_range must return a file descriptor and a position, not {found!r}")
    return where


def _error_number(error: BaseException) -> int | None:
    # A backend may have put anything in its place, or nothing.
    number = getattr(error, "errno", None) if isinstance(error, OSError) else errno.EIO
    return number if isinstance(number, int) else None


def reason(error: OSError) -> str:
    """Return what the client is told of an error: the text beside its number, or "" if there is none."""
    return error.strerror if isinstance(error.strerror, str) else ""


def describe(error: BaseException) -> str:
    """Return the text of an exception, whatever it does to prevent that."""
    try:
        return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)
    except BaseException:
        return type(error).__name__

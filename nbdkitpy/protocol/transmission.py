"""The transmission phase: requests out of a stream of bytes, checked against what the export can do.

The stream is cut into requests here and nowhere else, so this is where it is kept in step: every payload is consumed,
also that of a request which is refused. A request that comes out of here lies within the export, has only flags that
were offered and that its command takes, and asks for nothing that was not advertised.

The driver asks where the next bytes go (:meth:`Transmission.buffer`), puts them there, says how many came
(:meth:`Transmission.received`), and carries out what it gets.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from nbdkitpy.protocol.buffers import page_aligned
from nbdkitpy.protocol.constants import (
    BASE_ALLOCATION_ID,
    Command,
    CommandFlag,
    Magic,
    NbdError,
    TransmissionFlag,
)
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.protocol.messages import COMPACT_REQUEST, EXTENDED_HEADER

__all__ = ["MAX_PAYLOAD", "Refusal", "Request", "Room", "Transmission"]

#: The most data in one READ or WRITE, as in nbdkit ("Block size constraints" asks for 32 MiB at least).
MAX_PAYLOAD = 64 << 20

#: A payload that is too large is skipped up to here, to stay in step; one larger still ends the connection.
_MAX_SKIPPED = 2 * MAX_PAYLOAD

#: The buffer of a connection at rest, and of a busy one. A payload of more than half the latter lands in its own.
_SMALL_BUFFER = 8 << 10
_LARGE_BUFFER = 256 << 10

#: The large buffer begins so many bytes after a page, so that a payload does not begin the 28 bytes of a header after
#: one: see :mod:`nbdkitpy.protocol.buffers`.
_BESIDE_PAGE = 64

_CHOSEN_CONTEXT = struct.Struct(">QI")  # payload of a BLOCK_STATUS that chooses one context: effect length, context id

# Plain numbers: comparing with members of an enum takes many times as long.
_READ = int(Command.READ)
_WRITE = int(Command.WRITE)
_PAYLOAD_LEN = int(CommandFlag.PAYLOAD_LEN)
_NO_PAYLOAD = memoryview(b"")
_NO_BUFFER = memoryview(bytearray())


class Request(NamedTuple):
    """One request, checked. `payload` is valid until more bytes are asked for."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    payload: memoryview


#: Makes a request of a tuple, in half the time that the class takes to be called.
_request: Callable[[tuple[int, int, int, int, int, memoryview]], Request] = functools.partial(tuple.__new__, Request)


class Refusal(NamedTuple):
    """A request that is answered with an error without having reached a back end."""

    cookie: int
    offset: int
    error: NbdError
    message: str


class Room(Protocol):
    """Memory for payloads that have a buffer of their own, which may be kept for the next one."""

    def claim(self, size: int) -> None:
        """Have the payload that arrives take `size` bytes. May wait; what it raises ends the connection."""

    def keep(self, buffer: memoryview) -> None:
        """Keep `buffer`, whose payload is done with, as long as the memory is not needed elsewhere."""

    def kept(self, size: int) -> memoryview | None:
        """Return what was kept if it has `size` bytes or more. It is not kept any more in any case."""

    def drop(self) -> None:
        """Keep nothing, and have a payload that has begun to arrive take nothing for now."""


class _Endless:
    """Room without limit."""

    def __init__(self) -> None:
        self._kept: memoryview | None = None

    def claim(self, size: int) -> None:
        """Do nothing."""

    def keep(self, buffer: memoryview) -> None:
        """Keep a buffer."""
        self._kept = buffer

    def kept(self, size: int) -> memoryview | None:
        """Return it."""
        buffer, self._kept = self._kept, None
        return buffer if buffer is not None and len(buffer) >= size else None

    def drop(self) -> None:
        """Forget it."""
        self._kept = None


class _Rule(NamedTuple):
    """What a command must keep to."""

    name: str
    flags: CommandFlag = CommandFlag(0)  # that it may have, if they were offered; FUA goes with every command
    needs: TransmissionFlag = TransmissionFlag(0)  # that must have been advertised
    writes: bool = False
    ranged: bool = True
    beyond: NbdError = NbdError.EINVAL  # the answer to a range outside the export
    has_data: bool = False  # its length is that of data on the wire, one way or the other


_RULES: dict[int, _Rule] = {
    Command.READ: _Rule("READ", CommandFlag.DF, has_data=True),
    Command.WRITE: _Rule("WRITE", writes=True, beyond=NbdError.ENOSPC, has_data=True),
    Command.FLUSH: _Rule("FLUSH", needs=TransmissionFlag.SEND_FLUSH, ranged=False),
    Command.TRIM: _Rule("TRIM", needs=TransmissionFlag.SEND_TRIM, writes=True),
    Command.CACHE: _Rule("CACHE", needs=TransmissionFlag.SEND_CACHE),
    Command.WRITE_ZEROES: _Rule(
        "WRITE_ZEROES",
        CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
        TransmissionFlag.SEND_WRITE_ZEROES,
        writes=True,
        beyond=NbdError.ENOSPC,
    ),
    Command.BLOCK_STATUS: _Rule("BLOCK_STATUS", CommandFlag.REQ_ONE),
}

#: Flags of a command that must have been offered by one of the export's.
_OFFERED_BY = {
    CommandFlag.FUA: TransmissionFlag.SEND_FUA,
    CommandFlag.DF: TransmissionFlag.SEND_DF,
    CommandFlag.FAST_ZERO: TransmissionFlag.SEND_FAST_ZERO,
}


class Transmission:
    """The server's end of the transmission phase of one connection.

    Args:
        size: Of the export, in bytes.
        flags: That were sent to the client; they are what is enforced.
        minimum: Minimum block size: offsets and lengths have to be multiples of it.
        maximum: The most data in one READ or WRITE, up to :data:`MAX_PAYLOAD`.
        structured: Whether structured replies were negotiated.
        extended: Whether extended headers were.
        contexts: Whether base:allocation was selected.
        room: For large payloads; None is without limit.
    """

    def __init__(
        self,
        size: int,
        flags: TransmissionFlag,
        *,
        minimum: int = 1,
        maximum: int = MAX_PAYLOAD,
        structured: bool = False,
        extended: bool = False,
        contexts: bool = False,
        room: Room | None = None,
    ) -> None:
        # What was agreed.
        self._size = size
        self._flags = flags
        self._misaligned = minimum - 1  # bits that are zero in every aligned number
        self._maximum = min(maximum, MAX_PAYLOAD)
        self._chunked = structured or extended
        self._extended = extended
        self._contexts = contexts
        self._header = EXTENDED_HEADER if extended else COMPACT_REQUEST
        self._magic = int(Magic.EXTENDED_REQUEST if extended else Magic.REQUEST)
        offered = CommandFlag.FUA | CommandFlag.DF | CommandFlag.FAST_ZERO
        for flag, by in _OFFERED_BY.items():
            if not flags & by:
                offered &= ~flag
        self._allowed = {
            command: int((rule.flags | CommandFlag.FUA) & (offered | CommandFlag.NO_HOLE | CommandFlag.REQ_ONE))
            for command, rule in _RULES.items()
        }
        # Requests without flags and up to these lengths need no closer look; none once all are refused.
        self._plain_read = self._maximum
        self._plain_write = 0 if flags & TransmissionFlag.READ_ONLY else self._maximum
        self._plain_write_flags = _PAYLOAD_LEN if extended else 0  # that a plain WRITE may have

        # Bytes that have arrived: view[start:end] are not consumed yet.
        self._view = memoryview(bytearray(_SMALL_BUFFER))
        self._start = 0
        self._end = 0
        self._wanted = _SMALL_BUFFER  # size that the buffer should have next time
        self._needed = self._header.size  # bytes from start on that have to fit, to get any further

        # A payload that lands in a buffer of its own: request, and how much of it is there.
        self._landing: Request | None = None
        self._landed = 0
        self._own_buffer = _NO_BUFFER
        self._has_landed = False  # the last one did
        self._room = room or _Endless()  # where that buffer is in the meantime

        # A payload that is skipped: bytes left, and the answer when it is gone.
        self._skipping = 0
        self._skipped_for: Refusal | None = None

        #: Nothing more is taken from the client: carry out what came before, then close.
        self.finished = False
        #: Why, if that is not because the client said DISC.
        self.failure: RemoteProtocolError | None = None
        #: Requests refused since the driver last took them from here.
        self.refusals: list[Refusal] = []
        self._refuse_all = False

    # --- bytes in ---

    def buffer(self) -> memoryview:
        """Return where the next bytes from the client go; it is never empty. Payloads given out before end here."""
        if self._landing is not None:
            return self._own_view()
        size = len(self._view)
        if self._start == self._end:
            self._start = self._end = 0
            if self._needed <= size >= self._wanted:
                return self._first_view()
        if self._has_landed:
            self._keep_own()
        self._wanted = max(self._wanted, 1 << (self._needed - 1).bit_length())
        if self._wanted > size:
            self._replace_buffer()
        elif self._start + self._needed > size:
            left = self._end - self._start
            self._view[:left] = self._view[self._start : self._end]
            self._start, self._end = 0, left
        return self._view[self._end :]

    def _first_view(self) -> memoryview:
        if not self._has_landed:
            return self._view
        self._keep_own()
        # The next request may be of the same kind: without its payload here, which would have to be copied from here.
        return self._view[: self._header.size]

    def received(self, count: int) -> list[Request]:
        """Take note that `count` bytes were put into :meth:`buffer`; return the requests that are now complete.

        A violation is no exception here, since the requests before it are to be carried out: see :attr:`failure`.
        """
        if self._landing is not None:
            return self._received_own(count)
        self._end += count
        if self._end == len(self._view) < _LARGE_BUFFER:
            self._wanted = _LARGE_BUFFER  # the client sends more at a time than we take
        return self._parse()

    def feed(self, data: bytes) -> Iterator[list[Request]]:
        """Put `data` through :meth:`buffer` and :meth:`received`, and yield what comes of each step."""
        left = memoryview(data)
        while left:
            room = self.buffer()
            count = min(len(room), len(left))
            room[:count] = left[:count]
            left = left[count:]
            yield self.received(count)

    @property
    def landing(self) -> Request | None:
        """The request whose payload, a large one, has begun to arrive, and of which the client has to send more."""
        return self._landing

    @property
    def at_boundary(self) -> bool:
        """Whether the client has sent whole requests so far, so that it may leave without cutting one off."""
        return self._start == self._end and self._landing is None and not self._skipping

    def refuse_all(self) -> None:
        """Refuse every further request with ESHUTDOWN."""
        self._refuse_all = True
        self._plain_read = self._plain_write = 0

    def keep_payload(self, payload: memoryview) -> memoryview:
        """Return `payload` so that it stays valid: as it is if it has a buffer of its own, else as a copy.

        What is kept holds at most twice the memory of its length, so that lengths can be counted for memory.
        """
        # The buffer may be that of a larger payload before this one.
        if payload.obj is self._own_buffer.obj and len(self._own_buffer) <= 2 * len(payload):
            self._own_buffer = _NO_BUFFER
            return payload
        return memoryview(bytes(payload))

    def rest(self) -> None:
        """Give memory back: the client has been quiet for a while. Payloads given out before end here."""
        self._has_landed = False
        if self._landing is None:
            self._own_buffer = _NO_BUFFER
            self._room.drop()
        elif len(self._own_buffer) > self._own_limit():  # from a larger payload before this one
            self._own_buffer = self._copied(self._own_buffer[: self._landed], self._own_limit())
            if len(self._own_buffer) == _LARGE_BUFFER:
                self._room.drop()
        if self._end - self._start < _SMALL_BUFFER < len(self._view):
            self._wanted = _SMALL_BUFFER
            self._replace_buffer()

    def _replace_buffer(self) -> None:
        left, size = self._view[self._start : self._end], self._wanted
        self._view = (
            page_aligned(_BESIDE_PAGE + size)[_BESIDE_PAGE:]
            if size > _SMALL_BUFFER
            else memoryview(bytearray(_SMALL_BUFFER))
        )
        self._view[: len(left)] = left
        self._start, self._end = 0, len(left)

    @staticmethod
    def _copied(data: memoryview, size: int) -> memoryview:
        """Return a buffer of `size` bytes that begins with `data`."""
        buffer = page_aligned(size)
        buffer[: len(data)] = data
        return buffer

    # --- payloads with a buffer of their own ---

    def _own_view(self) -> memoryview:
        assert self._landing is not None  # our own doing, not the client's
        length = self._landing.length
        if self._landed == len(self._own_buffer):
            size = min(length, self._own_limit())
            if size > _LARGE_BUFFER:
                self._room.claim(length)  # all of it: who had a part would wait for others who have one
            self._own_buffer = self._copied(self._own_buffer, size)
        return self._own_buffer[self._landed : length]

    def _keep_own(self) -> None:
        self._has_landed = False
        if len(self._own_buffer):
            self._room.keep(self._own_buffer)
            self._own_buffer = _NO_BUFFER

    def _own_limit(self) -> int:
        # It grows with what arrives, not with what is announced: 28 bytes must not buy megabytes.
        return max(_LARGE_BUFFER, 4 * self._landed)

    def _received_own(self, count: int) -> list[Request]:
        assert self._landing is not None
        self._landed += count
        request = self._landing
        requests: list[Request] = []
        if self._landed == request.length:
            self._landing = None
            self._has_landed = True
            self._accept(requests, request._replace(payload=self._own_buffer[: request.length]))
        return requests

    # --- requests ---

    def _parse(self) -> list[Request]:
        requests: list[Request] = []
        if self._skipping and not self._skip():
            return requests
        unpack, header_size, expected, view = self._header.unpack_from, self._header.size, self._magic, self._view
        size, misaligned, start, end = self._size, self._misaligned, self._start, self._end
        longest_read, longest_write, no_write_flags = self._plain_read, self._plain_write, ~self._plain_write_flags
        self._needed = header_size
        while end - start >= header_size and not self.finished:
            magic, flags, command, cookie, offset, length = unpack(view, start)
            if magic != expected:
                self._fail(f"request magic is {magic:#x}, not {expected:#x}")
                break
            # What nearly all are, spelt out: a READ or WRITE in which :meth:`_check` would find nothing.
            if length and offset + length <= size and not (offset | length) & misaligned:
                body = start + header_size
                if command == _READ and not flags and length <= longest_read:
                    requests.append(_request((_READ, 0, cookie, offset, length, _NO_PAYLOAD)))
                    start = body
                    continue
                behind = body + length
                if command == _WRITE and not flags & no_write_flags and length <= longest_write and behind <= end:
                    requests.append(_request((_WRITE, 0, cookie, offset, length, view[body:behind])))
                    start = behind
                    continue
            self._start = start
            has_all = self._step(requests, Request(command, flags, cookie, offset, length, _NO_PAYLOAD))
            start = self._start
            if not has_all:
                break
        # What is behind the end is not looked at, and must not fill the buffer.
        self._start = end if self.finished else start
        return requests

    def _step(self, requests: list[Request], request: Request) -> bool:
        """Take the request whose header is the next thing in the buffer; False if more bytes have to come first."""
        body = self._start + self._header.size
        if request.command == Command.DISC:
            self._start = body
            self.finished = True
            return True
        payload_size = self._payload_size(request)
        refusal = self._check(request, payload_size)
        if refusal is not None:
            self._start = body
            return self._refuse(refusal, payload_size)
        if payload_size > self._end - body:
            self._await_payload(request, body)
            return False
        self._start = body + payload_size
        if payload_size:
            request = request._replace(payload=self._view[body : self._start])
        self._accept(requests, request)
        return True

    def _payload_size(self, request: Request) -> int:
        """How many bytes follow the header. A command that we do not know has none ("Request message").

        With extended headers PAYLOAD_LEN says it. But qemu 10 sends a WRITE, and its payload, without the flag.
        """
        has_payload = request.command == _WRITE or (self._extended and request.flags & _PAYLOAD_LEN)
        return request.length if has_payload else 0

    def _await_payload(self, request: Request, body: int) -> None:
        if self._header.size + request.length <= _LARGE_BUFFER // 2:
            self._needed = self._header.size + request.length  # comes to lie behind its header
            return
        arrived = self._view[body : self._end]
        self._own_buffer = self._room.kept(request.length) or _NO_BUFFER
        if len(self._own_buffer) < len(arrived):
            self._own_buffer = page_aligned(_LARGE_BUFFER)
        self._own_buffer[: len(arrived)] = arrived
        self._landing, self._landed = request, len(arrived)
        self._start = self._end

    def _accept(self, requests: list[Request], request: Request) -> None:
        """Pass on a request that is complete."""
        if request.command == Command.BLOCK_STATUS and request.payload:
            # The payload chooses contexts. There is one, so it is chosen once, or the request is wrong
            # ("Extended headers": duplicate or unknown ids are refused).
            length, *contexts = _CHOSEN_CONTEXT.unpack(request.payload)
            request = request._replace(flags=request.flags & ~_PAYLOAD_LEN, length=length, payload=_NO_PAYLOAD)
            if contexts != [BASE_ALLOCATION_ID]:
                self._refuse(self._refusal(request, NbdError.EINVAL, f"context {contexts[0]} was not negotiated"), 0)
                return
            refusal = self._check(request, 0)
            if refusal is not None:
                self._refuse(refusal, 0)
                return
        elif request.flags & _PAYLOAD_LEN:
            request = request._replace(flags=request.flags & ~_PAYLOAD_LEN)
        requests.append(request)

    # --- refusals ---

    def _check(self, request: Request, payload_size: int) -> Refusal | None:
        """Return what is wrong with a request; the first of several reasons, in nbdkit's order."""
        rule = _RULES.get(request.command)
        if self._refuse_all:
            return self._refusal(request, NbdError.ESHUTDOWN, "the server is shutting down")
        if rule is None:
            return self._refusal(request, NbdError.EINVAL, "unknown command")
        if rule.writes and self._flags & TransmissionFlag.READ_ONLY:
            return self._refusal(request, NbdError.EPERM, "the export is read-only")
        for check in (self._payload_problem, self._range_problem, self._flag_problem, self._support_problem):
            problem = check(rule, request, payload_size)
            if problem is not None:
                return self._refusal(request, *problem)
        return None

    def _payload_problem(self, rule: _Rule, request: Request, payload_size: int) -> tuple[NbdError, str] | None:
        if request.command == _WRITE or not (self._extended and request.flags & _PAYLOAD_LEN):
            return None
        if request.command != Command.BLOCK_STATUS or not self._flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD:
            return NbdError.EINVAL, "it takes no payload"
        if payload_size != _CHOSEN_CONTEXT.size:
            return NbdError.EINVAL, f"a payload of {payload_size} bytes does not choose one context"
        return None

    def _range_problem(self, rule: _Rule, request: Request, payload_size: int) -> tuple[NbdError, str] | None:
        offset, length = request.offset, request.length
        if not rule.ranged:
            return (NbdError.EINVAL, "offset and length must be 0") if offset or length else None
        if request.command == Command.BLOCK_STATUS and payload_size:
            return None  # the length is the payload's; the range is checked when that is there
        if not length:
            return rule.beyond, "the length is 0"
        if offset + length > self._size:
            return rule.beyond, f"beyond the end of the export, which has {self._size} bytes"
        if (offset | length) & self._misaligned:
            return NbdError.EINVAL, f"not aligned to the minimum block size of {self._misaligned + 1}"
        return None

    def _flag_problem(self, rule: _Rule, request: Request, payload_size: int) -> tuple[NbdError, str] | None:
        bad = request.flags & ~self._allowed[request.command]
        if self._extended and payload_size:
            bad &= ~_PAYLOAD_LEN
        return (NbdError.EINVAL, f"flags {bad:#x} are not for it, or were not offered") if bad else None

    def _support_problem(self, rule: _Rule, request: Request, payload_size: int) -> tuple[NbdError, str] | None:
        if rule.has_data and request.length > self._maximum:
            too_long = NbdError.EOVERFLOW if request.command == _READ and self._chunked else NbdError.EINVAL
            return too_long, f"longer than the maximum of {self._maximum} bytes"
        if rule.needs & ~self._flags:
            return NbdError.EINVAL, "the export does not support it"
        if request.command == Command.BLOCK_STATUS and not self._contexts:
            return NbdError.EINVAL, "no metadata context was negotiated"
        return None

    @staticmethod
    def _refusal(request: Request, error: NbdError, why: str) -> Refusal:
        rule = _RULES.get(request.command)
        name = rule.name if rule is not None else f"command {request.command}"
        text = f"{name} (flags {request.flags:#x}, offset {request.offset}, length {request.length}): {why}"
        return Refusal(request.cookie, request.offset, error, text)

    def _refuse(self, refusal: Refusal, payload_size: int) -> bool:
        """Have a request answered with an error once its payload is gone; False if more of that has to come."""
        if payload_size > _MAX_SKIPPED:
            self._fail(f"{refusal.message}: its payload is too large to be skipped")
            return False
        self._skipping, self._skipped_for = payload_size, refusal
        return self._skip()

    def _fail(self, why: str) -> None:
        self.finished = True
        self.failure = RemoteProtocolError(why)

    def _skip(self) -> bool:
        skipped = min(self._skipping, self._end - self._start)
        self._start += skipped
        self._skipping -= skipped
        if self._skipping:
            return False
        assert self._skipped_for is not None
        self.refusals.append(self._skipped_for)
        self._skipped_for = None
        return True

"""Reads what a server sends, and compares every byte of it with what it has to send."""

from __future__ import annotations

import itertools
import struct
from collections import defaultdict, deque
from collections.abc import Sequence

from nbdkitpy.protocol.constants import Command, CommandFlag, ReplyType
from tests.fuzzing.model import Answer, Expected
from tests.nbdclient import ProtocolError, Style

__all__ = ["Output", "ReplyReader", "read_answers", "read_greeting"]

_SIMPLE, _STRUCTURED, _EXTENDED = 0x67446698, 0x668E33EF, 0x6E8A278C
_MAX_TEXT = 4096
_HOLE, _ZERO = 1, 2


def require(condition: object, *what: object) -> None:
    """Fail the test unless `condition` holds; `what` says what the server sent."""
    if not condition:
        raise ProtocolError(*what)


class Output:
    """Bytes that came from a server, of which all are to be taken."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def __len__(self) -> int:
        return len(self._data)

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes.

        Raises:
            ProtocolError: there are not so many.
        """
        require(len(self._data) >= count, "the output ends within a message", bytes(self._data[:64]), count)
        taken, self._data = bytes(self._data[:count]), self._data[count:]
        return taken

    def unpack(self, layout: str) -> tuple[int, ...]:
        """Return the numbers that come next."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def _check_text(data: bytes) -> None:
    require(len(data) <= _MAX_TEXT and data.decode().isprintable(), "not a text to be shown", data)


def read_greeting(output: Output, handshake_flags: int) -> None:
    """Take the greeting."""
    require(output.take(18) == struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", handshake_flags))


def read_answers(output: Output, expected: Sequence[Answer | bytes]) -> None:
    """Take the answers to options, which are to be these."""
    for answer in expected:
        if isinstance(answer, bytes):
            require(output.take(len(answer)) == answer, "answer to EXPORT_NAME", answer)
            continue
        magic, option, reply, length = output.unpack(">QIII")
        require((magic, option, reply) == (0x0003E889045565A9, answer.option, answer.reply), option, hex(reply), answer)
        data = output.take(length)
        if answer.data is None:
            _check_text(data)
        else:
            require(data == answer.data, data, answer)


class ReplyReader:
    """Takes replies to requests, in any order, but none torn apart by another.

    Where several requests have one cookie, those that fail before they reach a back end may be answered before or after
    the others, and both kinds each in their order.

    Args:
        style: Of the replies.
    """

    def __init__(self, style: Style) -> None:
        self._style = style
        self._waiting: defaultdict[int, list[deque[Expected]]] = defaultdict(lambda: [deque(), deque()])

    @property
    def unanswered(self) -> int:
        """How many requests have no reply yet."""
        return sum(len(queue) for queues in self._waiting.values() for queue in queues)

    def expect(self, expected: Expected) -> None:
        """Have a reply come."""
        self._waiting[expected.request.cookie][bool(expected.request.error)].append(expected)

    def read(self, output: Output) -> None:
        """Take whole replies, until there is no more."""
        while output:
            (magic,) = output.unpack(">I")
            if magic == _SIMPLE:
                self._simple(output)
            else:
                require(
                    magic == {Style.STRUCTURED: _STRUCTURED, Style.EXTENDED: _EXTENDED}.get(self._style), hex(magic)
                )
                self._chunks(output)

    def _answered(self, cookie: int, error: int) -> Expected:
        """Return the request that a reply is to."""
        for queue in self._waiting[cookie]:
            if queue and queue[0].error == error:
                return queue.popleft()
        raise ProtocolError("no request is to have this reply", hex(cookie), error, dict(self._waiting))

    def _simple(self, output: Output) -> None:
        error, cookie = output.unpack(">IQ")
        expected = self._answered(cookie, error)
        if self._style is Style.SIMPLE:
            require(expected.request.command != Command.BLOCK_STATUS or error, "block status in a simple reply")
            if expected.request.command == Command.READ and not error:
                data = output.take(expected.request.length)
                require(expected.content in (None, data), "content", expected.request)
            return
        require(self._style is Style.STRUCTURED and not error, "a simple reply", expected)
        require(expected.request.command not in (Command.READ, Command.BLOCK_STATUS), "a simple reply", expected)

    # --- chunks ---

    def _chunks(self, output: Output) -> None:
        """Take all chunks of one reply, after the first one's magic."""
        chunks: list[tuple[int, bytes]] = []
        cookies: set[int] = set()
        offsets: set[int] = set()
        while True:
            flags, kind, cookie, *offset, length = output.unpack(
                ">HHQI" if self._style is Style.STRUCTURED else ">HHQQQ"
            )
            chunks.append((kind, output.take(length)))
            cookies.add(cookie)
            offsets.update(offset)
            require(flags in (0, 1), "flags of a chunk", flags)
            if flags:
                break
            require(
                output.unpack(">I") == (_STRUCTURED if self._style is Style.STRUCTURED else _EXTENDED,), "torn apart"
            )
        (cookie,) = cookies
        self._check_chunks(cookie, offsets, chunks)

    def _check_chunks(self, cookie: int, offsets: set[int], chunks: list[tuple[int, bytes]]) -> None:
        errors = [payload for kind, payload in chunks if kind & 0x8000]
        require(len(errors) <= 1, "several errors")
        error = int.from_bytes(errors[0][:4], "big") if errors else 0
        require(not errors or error, "an error that is none")
        expected = self._answered(cookie, error)
        request = expected.request
        require(offsets <= {request.offset}, "not the offset of the request", offsets, request)
        (last, payload), before = chunks[-1], chunks[:-1]
        if error:
            require(last == ReplyType.ERROR, "an error that is not the last chunk")
            require(int.from_bytes(payload[4:6], "big") == len(payload) - 6, "length of the text")
            _check_text(payload[6:])
        if request.command == Command.READ:
            self._check_content(expected, before if error else chunks, is_whole=not error)
        elif not error:
            require(not before, "more than one chunk", chunks)
            self._check_last(expected, last, payload)
        else:
            require(not before, "more than an error", chunks)

    def _check_content(self, expected: Expected, chunks: list[tuple[int, bytes]], *, is_whole: bool) -> None:
        request, covered = expected.request, []
        for kind, payload in chunks:
            if kind == ReplyType.NONE:
                require(not payload and (kind, payload) == chunks[-1] and is_whole, "NONE")
                continue
            start = int.from_bytes(payload[:8], "big")
            if kind == ReplyType.OFFSET_HOLE:
                require(len(payload) == 12, "a hole", payload)
                data = bytes(int.from_bytes(payload[8:], "big"))
            else:
                require(kind == ReplyType.OFFSET_DATA, "kind of a chunk", kind)
                data = payload[8:]
            require(data and request.offset <= start, "outside of the request", start, len(data))
            place = start - request.offset
            if is_whole and expected.content is not None:  # else the error may be about it
                require(data == expected.content[place : place + len(data)], "content", start, len(data), request)
            require(place + len(data) <= request.length, "outside of the request", start, len(data))
            covered.append((place, len(data)))
        covered.sort()
        require(all(a + b <= c for (a, b), (c, _) in itertools.pairwise(covered)), "twice", covered)
        require(not is_whole or sum(length for _, length in covered) == request.length, "not all of it", covered)
        require(not request.flags & CommandFlag.DF or len(covered) <= 1, "fragments", covered)

    def _check_last(self, expected: Expected, kind: int, payload: bytes) -> None:
        """Check the only chunk of a reply that tells no content."""
        if expected.request.command != Command.BLOCK_STATUS:
            require(self._style is Style.EXTENDED and kind == ReplyType.NONE and not payload, expected, kind, payload)
            return
        if self._style is Style.STRUCTURED:
            require(kind == ReplyType.BLOCK_STATUS and len(payload) % 8 == 4, kind, payload)
            extents = list(struct.iter_unpack(">II", payload[4:]))
        else:
            require(kind == ReplyType.BLOCK_STATUS_EXT and len(payload) % 16 == 8, kind, payload)
            extents = list(struct.iter_unpack(">QQ", payload[8:]))
            require(int.from_bytes(payload[4:8], "big") == len(extents), "count of extents")
        require(payload[:4] == b"\0\0\0\1", "context", payload[:4])
        require(extents, "no extents")
        require(len(extents) == 1 or not expected.request.flags & CommandFlag.REQ_ONE, "more than one extent")
        place = 0
        for length, status in extents:
            require(length and place + length <= expected.request.length, "extents", extents)
            require(status <= _HOLE | _ZERO, "status", status)
            content = (expected.content or b"")[place : place + length]
            require(not status & _ZERO or not any(content), "not zeroes", place, length)
            place += length

"""Replies of the transmission phase, in the three forms that a client may have negotiated.

A reply is one message, or several chunks of which the last is marked DONE. The pieces made here are headers and small
payloads; the data of a READ follows its header untouched ("Transmission phase": simple, structured and extended
replies).
"""

from __future__ import annotations

import abc
import itertools
import struct
from collections.abc import Sequence

from nbdkitpy.protocol.constants import BASE_ALLOCATION_ID, Magic, NbdError, ReplyFlag, ReplyType
from nbdkitpy.protocol.messages import CHUNK_HEADER, EXTENDED_HEADER, SIMPLE_REPLY, error_text

__all__ = ["ExtendedReplies", "Replies", "SimpleReplies", "StructuredReplies"]

_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")
_CHUNK_WITH_OFFSET = struct.Struct(">IHHQIQ")  # a structured chunk's header and the offset of its data
_EXTENDED_WITH_OFFSET = struct.Struct(">IHHQQQQ")

# Plain numbers, since these are packed for every request.
_DONE = int(ReplyFlag.DONE)
_OFFSET_DATA = int(ReplyType.OFFSET_DATA)
_SIMPLE_MAGIC = int(Magic.SIMPLE_REPLY)
_STRUCTURED_MAGIC = int(Magic.STRUCTURED_REPLY)
_EXTENDED_MAGIC = int(Magic.EXTENDED_REPLY)


class Replies(abc.ABC):
    """How one connection is answered. `cookie` and `offset` are always those of the request."""

    #: Whether one READ may be answered by several chunks, holes and an error among them.
    chunked = True

    @abc.abstractmethod
    def success(self, cookie: int, offset: int) -> bytes:
        """Return the reply to a request that has no data to return, and was carried out."""

    @abc.abstractmethod
    def error(self, cookie: int, offset: int, error: NbdError, message: str) -> bytes:
        """Return the reply to a request that failed, or the last chunk of one of which some chunks were sent."""

    @abc.abstractmethod
    def data(self, cookie: int, offset: int, length: int) -> bytes:
        """Return what stands before the `length` bytes (at least 1) of a READ that is answered whole."""

    #: Bytes of what :meth:`data` returns.
    data_size: int

    @abc.abstractmethod
    def put_data(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        """Put what :meth:`data` returns into a buffer, from there on."""

    def part(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        """Return what stands before the `length` bytes from `start` on, a part of a READ after which more follows."""
        raise NotImplementedError("simple replies have no parts")

    def hole(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        """Return a chunk that says that `length` bytes from `start` on are zeroes, after which more follows."""
        raise NotImplementedError("simple replies have no holes")

    def end(self, cookie: int, offset: int) -> bytes:
        """Return the last chunk of a reply, which says nothing more."""
        raise NotImplementedError("simple replies have no chunks")

    def block_status(self, cookie: int, offset: int, extents: Sequence[tuple[int, int]]) -> bytes:
        """Return the status of base:allocation: lengths and types of consecutive extents from `offset` on."""
        raise NotImplementedError("simple replies cannot tell a block status")


class SimpleReplies(Replies):
    """Before anything else is negotiated: a header of 16 bytes, then the data of a READ, if it went well."""

    chunked = False

    def success(self, cookie: int, offset: int) -> bytes:
        return SIMPLE_REPLY.pack(_SIMPLE_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, error: NbdError, message: str) -> bytes:
        return SIMPLE_REPLY.pack(_SIMPLE_MAGIC, error, cookie)

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        return SIMPLE_REPLY.pack(_SIMPLE_MAGIC, 0, cookie)

    data_size = SIMPLE_REPLY.size

    def put_data(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        SIMPLE_REPLY.pack_into(buffer, at, _SIMPLE_MAGIC, 0, cookie)


class StructuredReplies(Replies):
    """After STRUCTURED_REPLY: chunks with a header of 20 bytes.

    What returns no data may be answered by a simple reply as well; for success that is the shorter one.
    """

    def success(self, cookie: int, offset: int) -> bytes:
        return SIMPLE_REPLY.pack(_SIMPLE_MAGIC, 0, cookie)

    def error(self, cookie: int, offset: int, error: NbdError, message: str) -> bytes:
        return self._chunk(_DONE, ReplyType.ERROR, cookie, _error_payload(error, message))

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        return _CHUNK_WITH_OFFSET.pack(_STRUCTURED_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)

    data_size = _CHUNK_WITH_OFFSET.size

    def put_data(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        _CHUNK_WITH_OFFSET.pack_into(buffer, at, _STRUCTURED_MAGIC, _DONE, _OFFSET_DATA, cookie, length + 8, offset)

    def part(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return _CHUNK_WITH_OFFSET.pack(_STRUCTURED_MAGIC, 0, _OFFSET_DATA, cookie, length + 8, start)

    def hole(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return self._chunk(0, ReplyType.OFFSET_HOLE, cookie, _HOLE.pack(start, length))

    def end(self, cookie: int, offset: int) -> bytes:
        return self._chunk(_DONE, ReplyType.NONE, cookie, b"")

    def block_status(self, cookie: int, offset: int, extents: Sequence[tuple[int, int]]) -> bytes:
        # Each length fits: the extents lie within a request whose length has 32 bits.
        payload = struct.pack(f">{1 + 2 * len(extents)}I", BASE_ALLOCATION_ID, *itertools.chain.from_iterable(extents))
        return self._chunk(_DONE, ReplyType.BLOCK_STATUS, cookie, payload)

    @staticmethod
    def _chunk(flags: int, kind: ReplyType, cookie: int, payload: bytes) -> bytes:
        return CHUNK_HEADER.pack(_STRUCTURED_MAGIC, flags, kind, cookie, len(payload)) + payload


class ExtendedReplies(Replies):
    """After EXTENDED_HEADERS: chunks with a header of 32 bytes, 64-bit lengths, and nothing else."""

    def success(self, cookie: int, offset: int) -> bytes:
        return EXTENDED_HEADER.pack(_EXTENDED_MAGIC, _DONE, ReplyType.NONE, cookie, offset, 0)

    def error(self, cookie: int, offset: int, error: NbdError, message: str) -> bytes:
        return self._chunk(_DONE, ReplyType.ERROR, cookie, offset, _error_payload(error, message))

    def data(self, cookie: int, offset: int, length: int) -> bytes:
        return _EXTENDED_WITH_OFFSET.pack(_EXTENDED_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, length + 8, offset)

    data_size = _EXTENDED_WITH_OFFSET.size

    def put_data(self, buffer: memoryview, at: int, cookie: int, offset: int, length: int) -> None:
        _EXTENDED_WITH_OFFSET.pack_into(
            buffer, at, _EXTENDED_MAGIC, _DONE, _OFFSET_DATA, cookie, offset, length + 8, offset
        )

    def part(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return _EXTENDED_WITH_OFFSET.pack(_EXTENDED_MAGIC, 0, _OFFSET_DATA, cookie, offset, length + 8, start)

    def hole(self, cookie: int, offset: int, start: int, length: int) -> bytes:
        return self._chunk(0, ReplyType.OFFSET_HOLE, cookie, offset, _HOLE.pack(start, length))

    def end(self, cookie: int, offset: int) -> bytes:
        return self.success(cookie, offset)

    def block_status(self, cookie: int, offset: int, extents: Sequence[tuple[int, int]]) -> bytes:
        head = struct.pack(">II", BASE_ALLOCATION_ID, len(extents))
        payload = head + struct.pack(f">{2 * len(extents)}Q", *itertools.chain.from_iterable(extents))
        return self._chunk(_DONE, ReplyType.BLOCK_STATUS_EXT, cookie, offset, payload)

    @staticmethod
    def _chunk(flags: int, kind: ReplyType, cookie: int, offset: int, payload: bytes) -> bytes:
        return EXTENDED_HEADER.pack(_EXTENDED_MAGIC, flags, kind, cookie, offset, len(payload)) + payload


def _error_payload(error: NbdError, message: str) -> bytes:
    text = error_text(message)
    return _ERROR.pack(error, len(text)) + text

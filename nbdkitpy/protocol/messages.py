"""Layouts of the messages: what is sent is packed here, what arrives is unpacked here.

All numbers on the wire are unsigned and big-endian, without padding.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from nbdkitpy.protocol.constants import MAX_STRING, InfoType, Magic, OptionReply
from nbdkitpy.protocol.errors import OptionError, printable

__all__ = [
    "CHUNK_HEADER",
    "CLIENT_FLAGS",
    "COMPACT_REQUEST",
    "EXTENDED_HEADER",
    "MAX_INFO_REQUEST",
    "MAX_QUERIES",
    "OPTION_HEADER",
    "OPTION_REPLY_HEADER",
    "SIMPLE_REPLY",
    "BlockSizeInfo",
    "InfoRequest",
    "MetaContextRequest",
    "error_text",
    "export_name_answer",
    "greeting",
    "info_block_size",
    "info_export",
    "info_text",
    "meta_context",
    "oldstyle_greeting",
    "option_reply",
    "parse_info_request",
    "parse_meta_context_request",
    "parse_name",
    "server_entry",
]

CLIENT_FLAGS = struct.Struct(">I")
OPTION_HEADER = struct.Struct(">QII")  # magic, option, length of data
OPTION_REPLY_HEADER = struct.Struct(">QIII")  # magic, option, reply type, length of data
COMPACT_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, cookie, offset, length
EXTENDED_HEADER = struct.Struct(
    ">IHHQQQ"
)  # of requests: as above; of replies: magic, flags, type, cookie, offset, length
SIMPLE_REPLY = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK_HEADER = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length of payload

_GREETING = struct.Struct(">QQH")
_OLDSTYLE = struct.Struct(">QQQHH124x")
_EXPORT_NAME_ANSWER = struct.Struct(">QH")
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_UINT16 = struct.Struct(">H")
_UINT32 = struct.Struct(">I")

#: Zero bytes after the answer to EXPORT_NAME, unless both sides agreed to leave them out.
_EXPORT_NAME_ZEROES = bytes(124)

#: No well-formed data of INFO or GO is longer, in bytes: the longest name, and as many types as can be counted.
MAX_INFO_REQUEST = _UINT32.size + MAX_STRING + _UINT16.size + _UINT16.size * 0xFFFF

#: More queries than these for metadata contexts are not looked at. Real clients send a few.
MAX_QUERIES = 1024


class BlockSizeInfo(NamedTuple):
    """Size constraints of an export in bytes ("Block size constraints")."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 64 << 20


class InfoRequest(NamedTuple):
    """What INFO and GO ask for. The types may be any number, known or not."""

    name: str
    types: frozenset[int]


class MetaContextRequest(NamedTuple):
    """What LIST_META_CONTEXT and SET_META_CONTEXT ask for. The queries are as they came, not even known to be text."""

    name: str
    queries: list[bytes]


def greeting(flags: int) -> bytes:
    """Return the first message of a newstyle server."""
    return _GREETING.pack(Magic.NBDMAGIC, Magic.IHAVEOPT, flags)


def oldstyle_greeting(size: int, flags: int) -> bytes:
    """Return the whole handshake of an oldstyle server."""
    return _OLDSTYLE.pack(Magic.NBDMAGIC, Magic.OLDSTYLE, size, 0, flags)


def option_reply(option: int, reply: OptionReply, data: bytes = b"") -> bytes:
    """Return one reply to `option`, which may be a number that we do not know."""
    return OPTION_REPLY_HEADER.pack(Magic.OPTION_REPLY, option, reply, len(data)) + data


def error_text(message: str) -> bytes:
    """Return `message` as data of an error reply: printable UTF-8 of a length that every client takes."""
    return printable(message).encode()


def export_name_answer(size: int, flags: int, *, zeroes: bool) -> bytes:
    """Return the answer to EXPORT_NAME, the only one without a header."""
    return _EXPORT_NAME_ANSWER.pack(size, flags) + (_EXPORT_NAME_ZEROES if zeroes else b"")


def info_export(size: int, flags: int) -> bytes:
    """Return the data of an INFO reply with the export's size in bytes and its transmission flags."""
    return _INFO_EXPORT.pack(InfoType.EXPORT, size, flags)


def info_block_size(sizes: BlockSizeInfo) -> bytes:
    """Return the data of an INFO reply with the size constraints."""
    return _INFO_BLOCK_SIZE.pack(InfoType.BLOCK_SIZE, *sizes)


def info_text(kind: InfoType, text: str) -> bytes:
    """Return the data of an INFO reply with the export's name or description."""
    return _UINT16.pack(kind) + text.encode()


def server_entry(name: str, description: str) -> bytes:
    """Return the data of a SERVER reply: one line of the list of exports."""
    encoded = name.encode()
    return _UINT32.pack(len(encoded)) + encoded + description.encode()


def meta_context(context_id: int, name: str) -> bytes:
    """Return the data of a META_CONTEXT reply."""
    return _UINT32.pack(context_id) + name.encode()


def parse_name(data: bytes) -> str:
    """Return the export name that `data` is; the empty one means the default export.

    Raises:
        OptionError: it is no string as "Values" of the protocol has them. Nothing is mended here: a name that is
            compared up to its first NUL, say, opens an export that the client did not name.
    """
    if len(data) > MAX_STRING:
        raise _invalid(f"an export name has at most {MAX_STRING} bytes, not {len(data)}")
    if b"\0" in data:
        raise _invalid("an export name must not contain a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _invalid(f"an export name must be UTF-8, which it is not at byte {error.start}") from None


def parse_info_request(data: bytes) -> InfoRequest:
    """Take the data of INFO or GO apart.

    Raises:
        OptionError: the lengths inside do not add up to that of `data`, or the name cannot be one.
    """
    name, rest = _split_name(data)
    if len(rest) < _UINT16.size:
        raise _invalid(f"data of {len(data)} bytes ends before the number of information requests")
    (count,) = _UINT16.unpack_from(rest)
    types = rest[_UINT16.size :]
    if len(types) != _UINT16.size * count:
        raise _invalid(f"{count} information requests take {_UINT16.size * count} bytes, not {len(types)}")
    return InfoRequest(parse_name(name), frozenset(struct.unpack(f">{count}H", types)))


def parse_meta_context_request(data: bytes) -> MetaContextRequest:
    """Take the data of LIST_META_CONTEXT or SET_META_CONTEXT apart.

    Bytes after the last query are ignored, as in nbdkit.

    Raises:
        OptionError: an inner length does not fit, a string is too long, the name cannot be one, or there are more than
            :data:`MAX_QUERIES`.
    """
    name, rest = _split_name(data)
    if len(rest) < _UINT32.size:
        raise _invalid(f"data of {len(data)} bytes ends before the number of queries")
    (count,) = _UINT32.unpack_from(rest)
    if count > len(rest) // _UINT32.size - 1:  # each has at least its length
        raise _invalid(f"{count} queries do not fit into data of {len(data)} bytes")
    if count > MAX_QUERIES:
        raise OptionError(OptionReply.ERR_TOO_BIG, f"at most {MAX_QUERIES} queries are looked at, not {count}")
    return MetaContextRequest(parse_name(name), _split_queries(rest, count))


def _split_name(data: bytes) -> tuple[bytes, bytes]:
    """Return the name, whose length comes first, and what follows it."""
    start = _UINT32.size
    if len(data) < start:
        raise _invalid(f"data of {len(data)} bytes ends before the export name")
    (length,) = _UINT32.unpack_from(data)
    if length > len(data) - start:
        raise _invalid(f"an export name of {length} bytes does not fit into data of {len(data)} bytes")
    return data[start : start + length], data[start + length :]


def _split_queries(data: bytes, count: int) -> list[bytes]:
    """Return the queries, whose number comes first and is not yet known to be true."""
    queries: list[bytes] = []
    end = _UINT32.size
    for _ in range(count):
        start = end + _UINT32.size
        if start > len(data):
            raise _invalid(f"data ends after {len(queries)} of {count} queries")
        (length,) = _UINT32.unpack_from(data, end)
        end = start + length
        if end > len(data):
            raise _invalid(f"a query of {length} bytes does not fit into the {len(data) - start} that are left")
        if length > MAX_STRING:
            raise _invalid(f"a query has at most {MAX_STRING} bytes, not {length}")
        queries.append(data[start:end])
    return queries


def _invalid(message: str) -> OptionError:
    return OptionError(OptionReply.ERR_INVALID, message)

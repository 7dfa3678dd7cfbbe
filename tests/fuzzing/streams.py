"""What clients say, as strategies: sensible, at the edges of what is allowed, or spoilt."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from hypothesis import strategies as st

from tests.nbdclient import Style

__all__ = [
    "client_flags",
    "conversations",
    "haggling",
    "info",
    "infos",
    "junk",
    "meta",
    "names",
    "option",
    "options",
    "request",
    "requests",
    "split",
    "spoilt",
    "spoilt_data",
    "starttls",
    "types",
]

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))

#: Content for writes, of which no part is like another.
NOISE = b"".join(struct.pack(">I", i * 2654435761 & 0xFFFFFFFF) for i in range(1 << 17))
#: A payload longer than this is never there: such a request is the last one.
_MOST_PAYLOAD = 400_000


# --- options ---


def info(name: bytes, types: Sequence[int]) -> bytes:
    """Return data of INFO or GO."""
    return struct.pack(f">I{len(name)}sH{len(types)}H", len(name), name, len(types), *types)


def meta(name: bytes, queries: Sequence[bytes]) -> bytes:
    """Return data of LIST_META_CONTEXT or SET_META_CONTEXT."""
    parts = (struct.pack(">I", len(query)) + query for query in queries)
    return struct.pack(f">I{len(name)}sI", len(name), name, len(queries)) + b"".join(parts)


def option(number: int, data: bytes = b"") -> bytes:
    """Return an option."""
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


names = st.sampled_from([b"", b"disk", b"missing", b"a\0b", b"\xff", "é\n".encode(), b"x" * 4096, b"x" * 4097])
_exports = st.sampled_from([b"", b"", b"disk", b"disk", b"large", b"broken", b"read-only", b"blocks", b"poor"])
types = st.lists(st.integers(0, 5) | st.integers(0, 0xFFFF), max_size=5)
queries = st.lists(st.sampled_from([b"base:allocation", b"base:", b"x:y", b""]) | st.binary(max_size=9), max_size=5)
_names = _exports | names
infos = st.builds(info, _names, types)
metas = st.builds(meta, _names, queries)
_lengths = st.sampled_from([0, 1, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF9, 0xFFFFFFFF]).map(
    lambda n: struct.pack(">I", n)
)
junk = st.binary(max_size=40)
spoilt_data = st.builds(
    lambda data, at, patch: data[: at % (len(data) + 1)] + patch + data[at % (len(data) + 1) + len(patch) :],
    infos | metas,
    st.integers(0, 50),
    _lengths | junk,
)
#: All that may be said before an export is opened for good, but for STARTTLS and ABORT.
haggling = st.one_of(
    st.builds(option, st.sampled_from([3, 8, 11, 0, 4, 99, 0xFFFFFFFF]), st.just(b"") | junk),
    st.builds(option, st.just(6), infos | spoilt_data),
    st.builds(option, st.sampled_from([9, 10]), metas | spoilt_data),
)
starttls = st.builds(option, st.just(5), st.sampled_from([b"", b"", b"", b"x"]))
_endings = st.one_of(
    st.builds(option, st.just(7), infos | spoilt_data),
    st.builds(option, st.just(1), _names | junk),
    st.builds(option, st.just(2), st.just(b"") | junk),
)
#: Any option.
options = haggling | starttls | _endings
client_flags = st.sampled_from([3, 3, 3, 3, 1, 2, 0, 4, 0xFFFFFFFF]).map(lambda n: struct.pack(">I", n))


# --- requests ---


def request(
    command: int, flags: int, cookie: int, offset: int, length: int, data: bytes = b"", *, extended: bool
) -> bytes:
    """Return a request; what does not fit its layout is cut."""
    if extended:
        return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + data
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length & 0xFFFFFFFF) + data


commands = st.integers(0, 9).filter(lambda n: n != DISC) | st.sampled_from([READ, WRITE, WRITE, BLOCK_STATUS, 0xFFFF])
request_flags = (
    st.sampled_from([0, 0, 0, 0, PAYLOAD_LEN, FUA, FUA | PAYLOAD_LEN, DF, REQ_ONE, NO_HOLE | FAST_ZERO])
    | st.integers(0, 0x3F)
    | st.integers(0, 0xFFFF)
)
_edges = (0, 1, 511, 512, 1000, 4096, 1 << 15, 1 << 16, 1 << 19)
offsets = st.one_of(
    st.sampled_from([0, 0, 0, *_edges, *(edge - 512 for edge in _edges[4:])]),
    st.sampled_from([(1 << 63) - 512, (1 << 64) - 1, (1 << 64) - 4096]),
    st.integers(0, 1 << 16),
)
lengths = st.one_of(
    st.sampled_from([*_edges, 12, 1025, 8192, 8193, 16384, 131_044, 200_000]),
    st.integers(0, 3000),
    st.sampled_from([(64 << 20) + 1, (128 << 20) + 1, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]),
)
_choices = st.builds(
    lambda effect, ids: struct.pack(">Q", effect) + ids,
    st.sampled_from([0, 1, 512, 4096, 1 << 16, (1 << 64) - 1]),
    st.sampled_from([b"\0\0\0\1", b"\0\0\0\1", b"", b"\0\0\0\2", b"\0\0\0\1" * 2, b"\0\0\0"]),
)


#: Commands with flags that go with them, and ranges that lie within most exports: what sensible clients send.
_sensible = st.sampled_from(
    [
        *((READ, 0),) * 4,
        (READ, DF),
        *((WRITE, 0),) * 3,
        (WRITE, FUA),
        (FLUSH, 0),
        (TRIM, 0),
        (TRIM, FUA),
        (CACHE, 0),
        (WRITE_ZEROES, 0),
        (WRITE_ZEROES, NO_HOLE | FUA),
        (WRITE_ZEROES, FAST_ZERO),
        (BLOCK_STATUS, 0),
        (BLOCK_STATUS, REQ_ONE),
    ]
)
_ranges = st.sampled_from(
    [(0, 488), (512, 488), (0, 512), (512, 1024), (0, 8192), (4096, 4096), (12288, 4096), (0, 16384), (0, 1 << 16),
     (4096, 20480), (1, 40_000), (8192, 57344), (0, 150_000), (1 << 16, 1 << 18)]
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn, *, extended: bool, cookie: int) -> bytes:
    """A request, with its payload. Most are sensible."""
    kind = draw(st.sampled_from(["sensible"] * 6 + ["any", "choosing"]))
    if kind == "choosing":
        data = draw(_choices)
        flags = draw(st.sampled_from([PAYLOAD_LEN, PAYLOAD_LEN | REQ_ONE]))
        return request(BLOCK_STATUS, flags, cookie, draw(offsets), len(data), data, extended=extended)
    if kind == "sensible":
        command, flags = draw(_sensible)
        flags |= PAYLOAD_LEN if extended and command == WRITE else 0
        offset, length = (0, 0) if command == FLUSH else draw(_ranges)
    else:
        command, flags, offset, length = draw(commands), draw(request_flags), draw(offsets), draw(lengths)
    length = length if extended else length & 0xFFFFFFFF
    has_payload = command == WRITE or (extended and flags & PAYLOAD_LEN)
    data = NOISE[cookie % 997 : cookie % 997 + length] if has_payload and length <= _MOST_PAYLOAD else b""
    return request(command, flags, cookie, offset, length, data, extended=extended)


# --- whole conversations ---


_often_right = st.sampled_from([True] * 9 + [False])


@st.composite
def conversations(draw: st.DrawFn, *, first: bytes | None = None) -> bytes:
    """All that a client says from its flags on, each thing well-formed, and most of it sensible.

    Args:
        draw: Hypothesis's.
        first: What it begins with in place of its flags.
    """
    style = draw(st.sampled_from(Style))
    name = draw(_exports)
    parts = [(b"\0\0\0\3" if draw(_often_right) else draw(client_flags)) if first is None else first]
    parts += draw(st.lists(haggling, max_size=2))
    parts += [] if draw(_often_right) else [draw(starttls)]
    if style is not Style.SIMPLE:
        parts.append(option(11 if style is Style.EXTENDED else 8))
    if draw(st.booleans()):
        parts.append(option(10, meta(name if draw(_often_right) else draw(_exports), [b"base:allocation"])))
    parts.append(option(7, info(name, draw(types))) if draw(_often_right) else draw(_endings))
    extended = style is Style.EXTENDED
    count = draw(st.integers(0, 8))
    parts += [draw(requests(extended=extended, cookie=0xC0 << 56 | cookie)) for cookie in range(count)]
    if draw(st.booleans()):
        parts.append(request(DISC, 0, 0xD15C, 0, 0, extended=extended))
    return b"".join(parts)


# --- what is made of them ---


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """Cut `data` at places that are counted from its beginning again where they are past its end."""
    places = sorted({cut % (len(data) + 1) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)])]


@st.composite
def spoilt(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """A stream in which something is changed, missing, too much, or twice; or two streams in one."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        half = (
            len(data) // 2 if draw(st.booleans()) else 0
        )  # in the first half are options, of which one may be the end
        at = half + draw(st.integers(0, 1 << 20)) % (len(data) - half + 1)
        kind = draw(st.sampled_from(["change", "change", "lose", "insert", "repeat", "truncate", "append"]))
        if kind == "change":
            patch = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(patch)] = patch
        elif kind == "lose":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(junk)
        elif kind == "repeat":
            data[at:at] = data[max(0, at - draw(st.integers(1, 200))) : at]
        elif kind == "truncate":
            del data[at:]
        else:
            data += draw(whole)
    return bytes(data)

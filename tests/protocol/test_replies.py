"""Replies: exact bytes, and the rules of each form as a client's parser sees them."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest

from nbdkitpy.extents import Extent, ExtentType
from nbdkitpy.protocol.constants import NbdError
from nbdkitpy.protocol.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies

COOKIE, OFFSET = 0x0123456789ABCDEF, 0xFEDCBA9876543210
DONE = 1
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR = 0, 1, 2, 5, 6, 0x8001
CHUNKED: list[Replies] = [StructuredReplies(), ExtendedReplies()]
STYLES: list[Replies] = [SimpleReplies(), *CHUNKED]

EVERY_STYLE = pytest.mark.parametrize("replies", STYLES, ids=lambda style: type(style).__name__)
EVERY_CHUNKED_STYLE = pytest.mark.parametrize("replies", CHUNKED, ids=lambda style: type(style).__name__)
COOKIES = pytest.mark.parametrize("cookie", [0, 1, 1 << 63, (1 << 64) - 1, COOKIE])


class Chunk(NamedTuple):
    """One message, as a client takes it apart; a simple reply has neither type nor flags nor offset."""

    form: str
    flags: int
    kind: int
    cookie: int
    offset: int | None
    payload: bytes
    error: int = 0


def parse(stream: bytes) -> list[Chunk]:
    """Take messages apart; a simple reply takes all that follows it for data."""
    chunks = []
    while stream:
        magic = stream[:4].hex()
        if magic == "67446698":
            error, cookie = struct.unpack(">IQ", stream[4:16])
            chunks.append(Chunk("simple", DONE, NONE, cookie, None, stream[16:], error))
            return chunks
        flags, kind, cookie = struct.unpack(">HHQ", stream[4:16])
        offset = None
        if magic == "668e33ef":
            form, start = "structured", 20
            (length,) = struct.unpack(">I", stream[16:20])
        else:
            assert magic == "6e8a278c"
            form, start = "extended", 32
            offset, length = struct.unpack(">QQ", stream[16:32])
        assert len(stream) >= start + length, "nothing is announced that does not follow"
        chunks.append(Chunk(form, flags, kind, cookie, offset, stream[start : start + length]))
        stream = stream[start + length :]
    return chunks


def parse_one(stream: bytes) -> Chunk:
    (chunk,) = parse(stream)
    return chunk


# --- exact bytes ---


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (SimpleReplies(), "67446698 00000000 0123456789abcdef"),
        (StructuredReplies(), "67446698 00000000 0123456789abcdef"),
        (ExtendedReplies(), "6e8a278c 0001 0000 0123456789abcdef fedcba9876543210 0000000000000000"),
    ],
)
def test_success(replies: Replies, expected: str) -> None:
    assert replies.success(COOKIE, OFFSET) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (SimpleReplies(), "67446698 0000001c 0123456789abcdef"),
        (StructuredReplies(), "668e33ef 0001 8001 0123456789abcdef 0000000a 0000001c 0004 66756c6c"),
        (
            ExtendedReplies(),
            "6e8a278c 0001 8001 0123456789abcdef fedcba9876543210 000000000000000a 0000001c 0004 66756c6c",
        ),
    ],
)
def test_error(replies: Replies, expected: str) -> None:
    assert replies.error(COOKIE, OFFSET, NbdError.ENOSPC, "full") == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (SimpleReplies(), "67446698 00000000 0123456789abcdef"),
        (StructuredReplies(), "668e33ef 0001 0001 0123456789abcdef 0000000b fedcba9876543210"),
        (
            ExtendedReplies(),
            "6e8a278c 0001 0001 0123456789abcdef fedcba9876543210 000000000000000b fedcba9876543210",
        ),
    ],
)
def test_header_of_data(replies: Replies, expected: str) -> None:
    assert replies.data(COOKIE, OFFSET, 3) == bytes.fromhex(expected)


@EVERY_STYLE
def test_header_of_data_may_be_put_before_data_that_is_there(replies: Replies) -> None:
    buffer = bytearray(b"-" * 100)

    replies.put_data(memoryview(buffer), 10, COOKIE, OFFSET, 3)

    header = replies.data(COOKIE, OFFSET, 3)
    assert replies.data_size == len(header)
    assert buffer == b"-" * 10 + header + b"-" * (90 - len(header))


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (StructuredReplies(), "668e33ef 0000 0001 0123456789abcdef 00001008 fedcba9876543410"),
        (
            ExtendedReplies(),
            "6e8a278c 0000 0001 0123456789abcdef fedcba9876543210 0000000000001008 fedcba9876543410",
        ),
    ],
)
def test_header_of_a_part(replies: Replies, expected: str) -> None:
    assert replies.part(COOKIE, OFFSET, OFFSET + 0x200, 0x1000) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (StructuredReplies(), "668e33ef 0000 0002 0123456789abcdef 0000000c fedcba9876543410 04000000"),
        (
            ExtendedReplies(),
            "6e8a278c 0000 0002 0123456789abcdef fedcba9876543210 000000000000000c fedcba9876543410 04000000",
        ),
    ],
)
def test_hole(replies: Replies, expected: str) -> None:
    assert replies.hole(COOKIE, OFFSET, OFFSET + 0x200, 64 << 20) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (StructuredReplies(), "668e33ef 0001 0000 0123456789abcdef 00000000"),
        (ExtendedReplies(), "6e8a278c 0001 0000 0123456789abcdef fedcba9876543210 0000000000000000"),
    ],
)
def test_end(replies: Replies, expected: str) -> None:
    assert replies.end(COOKIE, OFFSET) == bytes.fromhex(expected)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        (
            StructuredReplies(),
            "668e33ef 0001 0005 0123456789abcdef 00000014 00000001 00001000 00000003 ffffffff 00000000",
        ),
        (
            ExtendedReplies(),
            "6e8a278c 0001 0006 0123456789abcdef fedcba9876543210 0000000000000028 00000001 00000002"
            " 0000000000001000 0000000000000003 00000000ffffffff 0000000000000000",
        ),
    ],
)
def test_block_status(replies: Replies, expected: str) -> None:
    extents = [(0x1000, 3), (0xFFFFFFFF, 0)]

    assert replies.block_status(COOKIE, OFFSET, extents) == bytes.fromhex(expected)


def test_only_extended_block_status_has_64_bit_lengths() -> None:
    chunk = parse_one(ExtendedReplies().block_status(COOKIE, OFFSET, [((1 << 63) - 1, 2)]))

    assert chunk.kind == STATUS_EXT
    assert struct.unpack(">IIQQ", chunk.payload) == (1, 1, (1 << 63) - 1, 2)


# --- rules, in every form ---

Message = Callable[[Replies, int], bytes]
ANY_STYLE: dict[str, Message] = {
    "success": lambda replies, cookie: replies.success(cookie, OFFSET),
    "error": lambda replies, cookie: replies.error(cookie, OFFSET, NbdError.EIO, "gone"),
    "data": lambda replies, cookie: replies.data(cookie, OFFSET, 5) + b"bytes",
}
CHUNKS: dict[str, Message] = {
    "part": lambda replies, cookie: replies.part(cookie, OFFSET, OFFSET + 1, 5) + b"bytes",
    "hole": lambda replies, cookie: replies.hole(cookie, OFFSET, OFFSET + 1, 5),
    "end": lambda replies, cookie: replies.end(cookie, OFFSET),
    "block_status": lambda replies, cookie: replies.block_status(cookie, OFFSET, [(5, 0)]),
}
MESSAGES = [
    *itertools.product(STYLES, ANY_STYLE.values()),
    *itertools.product(CHUNKED, CHUNKS.values()),
]
NAMES = [
    *(f"{type(style).__name__}-{name}" for style, name in itertools.product(STYLES, ANY_STYLE)),
    *(f"{type(style).__name__}-{name}" for style, name in itertools.product(CHUNKED, CHUNKS)),
]


@COOKIES
@pytest.mark.parametrize(("replies", "make"), MESSAGES, ids=NAMES)
def test_every_message_has_the_cookie_and_its_length(replies: Replies, make: Message, cookie: int) -> None:
    assert parse_one(make(replies, cookie)).cookie == cookie


@pytest.mark.parametrize(("replies", "make"), MESSAGES, ids=NAMES)
def test_forms_do_not_mix(replies: Replies, make: Message) -> None:
    form = parse_one(make(replies, COOKIE)).form

    allowed = {SimpleReplies: {"simple"}, StructuredReplies: {"structured", "simple"}, ExtendedReplies: {"extended"}}
    assert form in allowed[type(replies)]


@pytest.mark.parametrize("make", [*ANY_STYLE.values(), *CHUNKS.values()], ids=[*ANY_STYLE, *CHUNKS])
def test_every_extended_chunk_has_the_offset_of_the_request(make: Message) -> None:
    assert parse_one(make(ExtendedReplies(), COOKIE)).offset == OFFSET


def test_with_structured_replies_only_success_without_data_is_a_simple_reply() -> None:
    simple = [
        name
        for name, make in (ANY_STYLE | CHUNKS).items()
        if parse_one(make(StructuredReplies(), COOKIE)).form == "simple"
    ]

    assert simple == ["success"]


@EVERY_CHUNKED_STYLE
def test_done_is_on_what_ends_a_reply_and_on_nothing_else(replies: Replies) -> None:
    flags = {name: parse_one(make(replies, COOKIE)).flags for name, make in (ANY_STYLE | CHUNKS).items()}

    assert flags == {
        "success": DONE,
        "error": DONE,
        "data": DONE,
        "part": 0,
        "hole": 0,
        "end": DONE,
        "block_status": DONE,
    }


@EVERY_CHUNKED_STYLE
def test_a_sparse_read_is_a_reply_that_covers_its_range_once(replies: Replies) -> None:
    stream = (
        (replies.part(COOKIE, 4096, 4096, 512) + bytes(512))
        + replies.hole(COOKIE, 4096, 4608, 3072)
        + (replies.part(COOKIE, 4096, 7680, 512) + bytes(512))
        + replies.end(COOKIE, 4096)
    )

    chunks = parse(stream)

    assert [(chunk.kind, chunk.flags) for chunk in chunks] == [(DATA, 0), (HOLE, 0), (DATA, 0), (NONE, DONE)]
    starts = [struct.unpack_from(">Q", chunk.payload)[0] for chunk in chunks[:3]]
    lengths = [len(chunks[0].payload) - 8, struct.unpack(">QI", chunks[1].payload)[1], len(chunks[2].payload) - 8]
    assert starts == [4096, 4608, 7680]
    assert list(itertools.accumulate(lengths, initial=4096)) == [*starts, 8192]
    assert {chunk.cookie for chunk in chunks} == {COOKIE}


@EVERY_STYLE
@pytest.mark.parametrize("error", NbdError)
def test_every_error_keeps_its_number(replies: Replies, error: NbdError) -> None:
    chunk = parse_one(replies.error(COOKIE, OFFSET, error, "why"))

    number = chunk.error if chunk.form == "simple" else struct.unpack_from(">I", chunk.payload)[0]
    assert number == error != 0


def test_a_simple_error_has_no_data() -> None:
    assert parse_one(SimpleReplies().error(COOKIE, OFFSET, NbdError.EIO, "a text")).payload == b""


@EVERY_CHUNKED_STYLE
@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("", ""),
        ("plain", "plain"),
        ("Grüße, 中文 und 🎈", "Grüße, 中文 und 🎈"),
        ("x" * 256, "x" * 256),
        ("x" * 10_000, "x" * 256 + "…"),
        ("🎈" * 10_000, "🎈" * 256 + "…"),
        ("\n" * 10_000, "\\n" * 128 + "…"),
        ("nul \0, escape \x1b[2J, newline \n", "nul \\x00, escape \\x1b[2J, newline \\n"),
        ("\udcff lone \ud800", "\\udcff lone \\ud800"),
        ("\U0010ffff", "\\U0010ffff"),
    ],
    ids=range(10),
)
def test_the_text_of_an_error_is_printable_utf8_of_at_most_4096_bytes(
    replies: Replies, message: str, shown: str
) -> None:
    chunk = parse_one(replies.error(COOKIE, OFFSET, NbdError.EINVAL, message))

    error, length = struct.unpack_from(">IH", chunk.payload)
    text = chunk.payload[6:]
    assert error == NbdError.EINVAL
    assert length == len(text) <= 4096
    assert text.decode("utf-8", "strict") == shown
    assert shown.isprintable()


@EVERY_CHUNKED_STYLE
@pytest.mark.parametrize("length", [1, 65536, 64 << 20])
def test_the_length_of_data_counts_its_offset(replies: Replies, length: int) -> None:
    for header in (replies.data(COOKIE, 7, length), replies.part(COOKIE, 7, 7, length)):
        start = 20 if isinstance(replies, StructuredReplies) else 32
        announced = int.from_bytes(header[16:20] if start == 20 else header[24:32], "big")

        assert announced == length + 8
        assert len(header) == start + 8


@EVERY_CHUNKED_STYLE
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_extents_are_told_in_order(replies: Replies, count: int) -> None:
    kinds = [ExtentType.DATA, ExtentType.HOLE, ExtentType.ZERO, ExtentType.HOLE | ExtentType.ZERO]
    extents = [Extent(512 * i, 512 * (i + 1), kinds[i % 4]) for i in range(count)]

    chunk = parse_one(replies.block_status(COOKIE, 0, [(extent.length, extent.type) for extent in extents]))

    if isinstance(replies, StructuredReplies):
        assert (chunk.kind, len(chunk.payload)) == (STATUS, 4 + 8 * count)
        context, *fields = struct.unpack(f">{1 + 2 * count}I", chunk.payload)
    else:
        assert (chunk.kind, len(chunk.payload)) == (STATUS_EXT, 8 + 16 * count)
        context, told, *fields = struct.unpack(f">II{2 * count}Q", chunk.payload)
        assert told == count
    assert context == 1
    assert list(zip(fields[::2], fields[1::2])) == [(512 * (i + 1), i % 4) for i in range(count)]


# --- what simple replies cannot do ---


def test_simple_replies_say_that_they_have_no_chunks() -> None:
    assert [style.chunked for style in STYLES] == [False, True, True]


@pytest.mark.parametrize("make", CHUNKS.values(), ids=CHUNKS)
def test_simple_replies_refuse_to_make_chunks(make: Message) -> None:
    with pytest.raises(NotImplementedError, match="simple replies"):
        make(SimpleReplies(), COOKIE)

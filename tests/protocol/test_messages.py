"""Layouts: bytes written down by hand against what is packed and unpacked."""

import struct

import pytest

from nbdkitpy.protocol import messages
from nbdkitpy.protocol.constants import InfoType, OptionReply, TransmissionFlag
from nbdkitpy.protocol.errors import OptionError
from nbdkitpy.protocol.messages import (
    MAX_INFO_REQUEST,
    MAX_QUERIES,
    BlockSizeInfo,
    parse_info_request,
    parse_meta_context_request,
    parse_name,
)


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (messages.CLIENT_FLAGS, 4),
        (messages.OPTION_HEADER, 16),
        (messages.OPTION_REPLY_HEADER, 20),
        (messages.COMPACT_REQUEST, 28),
        (messages.SIMPLE_REPLY, 16),
        (messages.CHUNK_HEADER, 20),
        (messages.EXTENDED_HEADER, 32),
    ],
)
def test_layout_has_the_size_that_the_protocol_gives(layout: struct.Struct, size: int) -> None:
    assert layout.size == size


def test_greeting() -> None:
    assert messages.greeting(3) == b"NBDMAGICIHAVEOPT\0\3"


def test_oldstyle_greeting() -> None:
    flags = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY

    greeting = messages.oldstyle_greeting(0x0102030405060708, flags)

    assert greeting == (
        b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes.fromhex("0102030405060708") + b"\0\0\0\3" + bytes(124)
    )
    assert len(greeting) == 152


def test_oldstyle_greeting_of_the_largest_export() -> None:
    assert messages.oldstyle_greeting(2**63 - 1, 1)[16:28] == bytes.fromhex("7fffffffffffffff 0000 0001")


def test_option_reply_has_the_options_number_also_if_that_is_unknown() -> None:
    reply = messages.option_reply(0xFFFFFFFE, OptionReply.ERR_UNSUP, b"why")

    assert reply == bytes.fromhex("0003e889045565a9 fffffffe 80000001 00000003") + b"why"


def test_ack_has_no_data() -> None:
    assert messages.option_reply(2, OptionReply.ACK) == bytes.fromhex("0003e889045565a9 00000002 00000001 00000000")


@pytest.mark.parametrize(("zeroes", "length"), [(True, 134), (False, 10)])
def test_export_name_answer(zeroes: bool, length: int) -> None:
    answer = messages.export_name_answer(0x10000, 0x0109, zeroes=zeroes)

    assert answer == (bytes.fromhex("0000000000010000 0109") + bytes(124))[:length]
    assert len(answer) == length


def test_information_replies() -> None:
    assert messages.info_export(2**40, 3) == bytes.fromhex("0000 0000010000000000 0003")
    assert messages.info_block_size(BlockSizeInfo(512, 4096, 0xFFFFFFFF)) == bytes.fromhex(
        "0003 00000200 00001000 ffffffff"
    )
    assert messages.info_text(InfoType.NAME, "é") == b"\0\1\xc3\xa9"
    assert messages.info_text(InfoType.DESCRIPTION, "") == b"\0\2"


def test_default_block_sizes_are_those_that_clients_assume() -> None:
    minimum, preferred, maximum = BlockSizeInfo()

    assert (minimum, preferred) == (1, 4096)
    assert maximum >= 32 << 20


def test_server_entry_counts_bytes_and_appends_the_description() -> None:
    assert messages.server_entry("é", "disk") == b"\0\0\0\2\xc3\xa9disk"
    assert messages.server_entry("", "") == b"\0\0\0\0"


def test_meta_context() -> None:
    assert messages.meta_context(1, "base:allocation") == b"\0\0\0\1base:allocation"


def test_error_text_is_cut_and_printable() -> None:
    assert messages.error_text("no such export") == b"no such export"
    assert messages.error_text("a\nb\0\udcff") == b"a\\nb\\x00\\udcff"


@pytest.mark.parametrize("character", ["x", "é", "€", "😀", "\n", "\0", "\udcff"])
def test_CVE_2020_10761_error_text_stays_short_and_whole(character: str) -> None:
    for lead in range(8):
        text = messages.error_text("x" * lead + character * 4096)

        assert len(text) <= 4096
        assert text.decode().endswith("…")


# Names.


@pytest.mark.parametrize("name", ["", "disk", "dir/sub", "Größe", " ", "x" * 4096, "é" * 2048, "a\nb"])
def test_name_of_any_characters_up_to_the_limit(name: str) -> None:
    assert parse_name(name.encode()) == name


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x" * 4097, "an export name has at most 4096 bytes, not 4097"),
        (b"\0", "an export name must not contain a NUL"),
        (b"disk\0junk", "an export name must not contain a NUL"),
        (b"ab\xff", "an export name must be UTF-8, which it is not at byte 2"),
        (b"\xed\xa0\x80", "an export name must be UTF-8, which it is not at byte 0"),  # a surrogate
        (b"\xc0\xaf", "an export name must be UTF-8, which it is not at byte 0"),  # an overlong slash
        ("é".encode()[:1], "an export name must be UTF-8, which it is not at byte 0"),
    ],
)
def test_malformed_name_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_name(data)

    assert caught.value.reply is OptionReply.ERR_INVALID
    assert str(caught.value) == text
    assert caught.value.__cause__ is None


# INFO and GO.


def info_data(name: bytes, *types: int) -> bytes:
    return struct.pack(f">I{len(name)}sH{len(types)}H", len(name), name, len(types), *types)


@pytest.mark.parametrize("name", ["", "disk", "x" * 4096])
@pytest.mark.parametrize("types", [(), (3,), (1, 2, 3), (0, 65535)])
def test_info_request(name: str, types: tuple[int, ...]) -> None:
    request = parse_info_request(info_data(name.encode(), *types))

    assert request == (name, frozenset(types))


def test_longest_info_request() -> None:
    data = info_data(b"x" * 4096, *range(65535))

    request = parse_info_request(data)

    assert len(data) == MAX_INFO_REQUEST
    assert request.types == frozenset(range(65535))


GOOD_INFO = info_data(b"disk", 1, 3)


@pytest.mark.parametrize("length", range(len(GOOD_INFO)))
def test_cut_info_request_is_refused(length: int) -> None:
    with pytest.raises(OptionError) as caught:
        parse_info_request(GOOD_INFO[:length])

    assert caught.value.reply is OptionReply.ERR_INVALID


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "data of 0 bytes ends before the export name"),
        (b"\0\0\0\5disk\0\0", "data of 10 bytes ends before the number of information requests"),
        (b"\0\0\0\7disk\0\0", "an export name of 7 bytes does not fit into data of 10 bytes"),
        (b"\xff\xff\xff\xffdisk\0\0", "an export name of 4294967295 bytes does not fit into data of 10 bytes"),
        (b"\0\0\0\4disk\0\1", "1 information requests take 2 bytes, not 0"),
        (b"\0\0\0\4disk\xff\xff\0\0", "65535 information requests take 131070 bytes, not 2"),
        (b"\0\0\0\4disk\0\1\0\3\0", "1 information requests take 2 bytes, not 3"),
        (b"\0\0\0\4disk\0\1\0\3\0\1", "1 information requests take 2 bytes, not 4"),
        (b"\0\0\0\4disk\0\0\0\3", "0 information requests take 0 bytes, not 2"),
        (info_data(b"a\0b"), "an export name must not contain a NUL"),
        (info_data(b"x" * 4097), "an export name has at most 4096 bytes, not 4097"),
    ],
)
def test_malformed_info_request_is_refused_with_the_reason(data: bytes, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_info_request(data)

    assert caught.value.reply is OptionReply.ERR_INVALID
    assert str(caught.value) == text


# Metadata contexts.


def meta_data(name: bytes, *queries: bytes) -> bytes:
    parts = (struct.pack(">I", len(part)) + part for part in queries)
    return struct.pack(f">I{len(name)}sI", len(name), name, len(queries)) + b"".join(parts)


@pytest.mark.parametrize("name", ["", "disk", "x" * 4096])
@pytest.mark.parametrize("queries", [[], [b""], [b"base:"], [b"base:allocation", b"\xff\0", b"q" * 4096]])
def test_meta_context_request(name: str, queries: list[bytes]) -> None:
    assert parse_meta_context_request(meta_data(name.encode(), *queries)) == (name, queries)


def test_bytes_after_the_last_query_are_ignored() -> None:
    request = parse_meta_context_request(meta_data(b"disk", b"base:") + b"IHAVEOPT")

    assert request == ("disk", [b"base:"])


GOOD_META = meta_data(b"disk", b"base:", b"base:allocation")


@pytest.mark.parametrize("length", range(len(GOOD_META)))
def test_cut_meta_context_request_is_refused(length: int) -> None:
    with pytest.raises(OptionError) as caught:
        parse_meta_context_request(GOOD_META[:length])

    assert caught.value.reply is OptionReply.ERR_INVALID


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\0\0\0", "data of 3 bytes ends before the export name"),
        (b"\0\0\0\0", "data of 4 bytes ends before the number of queries"),
        (b"\0\0\0\2d\0\0\0\0", "data of 9 bytes ends before the number of queries"),
        (b"\xff\xff\xff\xff\0\0\0\0", "an export name of 4294967295 bytes does not fit into data of 8 bytes"),
        (b"\0\0\0\0\0\0\0\1", "1 queries do not fit into data of 8 bytes"),
        (b"\0\0\0\0\xff\xff\xff\xff\0\0\0\0", "4294967295 queries do not fit into data of 12 bytes"),
        (
            b"\0\0\0\0\0\0\0\1\0\0\0\2b",
            "a query of 2 bytes does not fit into the 1 that are left",
        ),
        (
            b"\0\0\0\0\0\0\0\1\xff\xff\xff\xff",
            "a query of 4294967295 bytes does not fit into the 0 that are left",
        ),
        (b"\0\0\0\0\0\0\0\2\0\0\0\4base", "data ends after 1 of 2 queries"),
        (meta_data(b"", b"q" * 4097), "a query has at most 4096 bytes, not 4097"),
        (meta_data(b"a\0", b"base:"), "an export name must not contain a NUL"),
    ],
)
def test_malformed_meta_context_request_is_refused_with_the_reason(data: bytes, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_meta_context_request(data)

    assert caught.value.reply is OptionReply.ERR_INVALID
    assert str(caught.value) == text


def test_as_many_queries_as_are_looked_at_and_one_more() -> None:
    most = parse_meta_context_request(meta_data(b"", *[b"x:"] * MAX_QUERIES))

    assert len(most.queries) == MAX_QUERIES
    with pytest.raises(OptionError, match="at most 1024 queries are looked at, not 1025") as caught:
        parse_meta_context_request(meta_data(b"", *[b"x:"] * (MAX_QUERIES + 1)))
    assert caught.value.reply is OptionReply.ERR_TOO_BIG

"""The handshake as a dialogue: bytes that a client sends, and the exact bytes and events that come of them."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest

from nbdkitpy.protocol.constants import Option, OptionReply, TransmissionFlag
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.protocol.handshake import (
    MAX_OPTION_DATA,
    MAX_OPTIONS,
    Closed,
    Event,
    ExportFacts,
    Handshake,
    ListExports,
    Negotiated,
    OpenExport,
    Ready,
)
from nbdkitpy.protocol.messages import MAX_INFO_REQUEST, MAX_QUERIES, BlockSizeInfo

FACTS = ExportFacts(size=0x10000, flags=TransmissionFlag(0x0145))
EXPORT_INFO = bytes.fromhex("0000 0000000000010000 0145")
EXPORT_NAME_ANSWER = EXPORT_INFO[2:]

NO_DATA = [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS]
INFO_AND_GO = [Option.INFO, Option.GO]
META = [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT]


class Reply(NamedTuple):
    """One option reply as it was sent."""

    option: int
    reply: int
    data: bytes


def flags(value: int = 3) -> bytes:
    return struct.pack(">I", value)


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">8sII", b"IHAVEOPT", number, len(data)) + data


def info(name: bytes, *types: int) -> bytes:
    return struct.pack(f">I{len(name)}sH{len(types)}H", len(name), name, len(types), *types)


def meta(name: bytes, *queries: bytes) -> bytes:
    parts = (struct.pack(">I", len(part)) + part for part in queries)
    return struct.pack(f">I{len(name)}sI", len(name), name, len(queries)) + b"".join(parts)


def reply(number: int, kind: OptionReply, data: bytes = b"") -> bytes:
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", number, kind, len(data)) + data


def ack(number: int) -> bytes:
    return reply(number, OptionReply.ACK)


def replies(stream: bytes) -> list[Reply]:
    """Take a stream of option replies apart; it has to consist of nothing else."""
    found = []
    while stream:
        magic, number, kind, length = struct.unpack_from(">QIII", stream)
        assert magic == 0x3E889045565A9
        assert len(stream) >= 20 + length
        found.append(Reply(number, kind, stream[20 : 20 + length]))
        stream = stream[20 + length :]
    return found


class Client:
    """The other end of a handshake, which acts as the driver too."""

    def __init__(self, handshake: Handshake | None = None, *, client_flags: int | None = 3) -> None:
        self.handshake = handshake or Handshake()
        self.greeting = self.handshake.data_to_send()
        if client_flags is not None:
            assert self.send(flags(client_flags)) is None

    def send(self, data: bytes) -> Event | None:
        self.handshake.receive_data(data)
        return self.handshake.next_event()

    def option(self, number: int, data: bytes = b"") -> Event | None:
        return self.send(option(number, data))

    def received(self) -> bytes:
        return self.handshake.data_to_send()

    def ask(self, number: int, data: bytes = b"") -> bytes:
        """Send an option that is answered without the driver."""
        assert self.option(number, data) is None
        return self.received()

    def refused(self, number: int, kind: OptionReply, data: bytes = b"") -> str:
        """Send an option that gets exactly one error reply, and return its text."""
        return self.is_error(self.ask(number, data), number, kind)

    def is_error(self, stream: bytes, number: int, kind: OptionReply) -> str:
        (answer,) = replies(stream)
        assert (answer.option, answer.reply) == (number, kind)
        assert len(answer.data) <= 4096
        text = answer.data.decode()
        assert text.isprintable()
        assert text
        return text

    def is_in_step(self) -> None:
        """Show that the next option is understood."""
        assert self.option(Option.LIST) == ListExports()
        self.handshake.exports_listed([])
        assert self.received() == ack(Option.LIST)

    def is_closed(self) -> None:
        """Show that nothing more comes of this handshake."""
        assert self.option(Option.LIST) is None
        assert self.received() == b""
        assert self.handshake.take_unprocessed() == b""


# Greeting and flags.


@pytest.mark.parametrize("offered", [0, 1, 2, 3])
def test_greeting_is_there_from_the_start_and_sent_once(offered: int) -> None:
    handshake = Handshake(handshake_flags=offered)

    assert handshake.data_to_send() == b"NBDMAGICIHAVEOPT" + bytes([0, offered])
    assert handshake.data_to_send() == b""
    assert handshake.next_event() is None


def test_both_flags_are_offered_unless_masked() -> None:
    assert Client().greeting == b"NBDMAGICIHAVEOPT\0\3"


def test_nothing_follows_the_greeting_until_an_option_arrives() -> None:
    client = Client(client_flags=None)

    for byte in flags(3):
        assert client.send(bytes([byte])) is None

    assert client.received() == b""


@pytest.mark.parametrize("offered", [0, 1, 2, 3])
@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_N11_client_flags_have_to_be_among_those_offered(offered: int, taken: int) -> None:
    client = Client(Handshake(handshake_flags=offered), client_flags=None)

    if taken & ~offered:
        with pytest.raises(RemoteProtocolError, match=f"client flags 0x{taken:x} .* 0x{offered:x} that were offered"):
            client.send(flags(taken))
        client.is_closed()
    else:
        assert client.send(flags(taken)) is None


@pytest.mark.parametrize("value", [1 << bit for bit in range(2, 32)] + [7, 0xFFFFFFFF, 0x03000000])
def test_N11_undefined_client_flag_closes(value: int) -> None:
    client = Client(client_flags=None)

    with pytest.raises(RemoteProtocolError, match="client flags"):
        client.send(flags(value))

    assert client.received() == b""
    client.is_closed()


@pytest.mark.parametrize("client_flags", [0, 2])
@pytest.mark.parametrize("number", [0, *range(3, 13), 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", b"IHAVEOPT" + bytes(8), info(b"disk")])
def test_N11_client_without_fixed_newstyle_is_refused_in_step(client_flags: int, number: int, data: bytes) -> None:
    client = Client(client_flags=client_flags)

    text = client.refused(number, OptionReply.ERR_INVALID, data)

    assert "FIXED_NEWSTYLE" in text
    assert client.option(Option.EXPORT_NAME, b"disk") == OpenExport("disk", Option.EXPORT_NAME, False)


@pytest.mark.parametrize("client_flags", [0, 2])
def test_N11_client_without_fixed_newstyle_may_leave(client_flags: int) -> None:
    client = Client(client_flags=client_flags)

    assert client.option(Option.ABORT) == Closed()
    assert client.received() == ack(Option.ABORT)


# EXPORT_NAME.


@pytest.mark.parametrize("client_flags", [0, 1, 2, 3])
def test_N10_export_name_is_answered_with_zeroes_unless_both_leave_them_out(client_flags: int) -> None:
    client = Client(client_flags=client_flags)

    assert client.option(Option.EXPORT_NAME, b"disk") == OpenExport("disk", Option.EXPORT_NAME, False)
    client.handshake.export_opened(FACTS)

    assert client.handshake.next_event() == Ready()
    assert client.received() == EXPORT_NAME_ANSWER + (b"" if client_flags & 2 else bytes(124))


@pytest.mark.parametrize("name", ["", "disk", "Größe", "a/b", "x" * 255, "x" * 256, "x" * 257, "x" * 4096])
def test_export_name_of_any_allowed_length(name: str) -> None:
    client = Client()

    assert client.option(Option.EXPORT_NAME, name.encode()) == OpenExport(name, Option.EXPORT_NAME, False)


@pytest.mark.parametrize("name", [b"\xff", b"a\0b", b"\0", b"x" * 4097, b"x" * 65536, b"x" * MAX_OPTION_DATA])
def test_N10_malformed_export_name_closes_without_a_byte(name: bytes) -> None:
    client = Client()

    with pytest.raises(RemoteProtocolError, match="EXPORT_NAME"):
        client.option(Option.EXPORT_NAME, name)

    assert client.received() == b""
    client.is_closed()


def test_N10_refused_export_name_closes_without_a_byte() -> None:
    client = Client()
    client.option(Option.EXPORT_NAME, b"missing")

    with pytest.raises(RemoteProtocolError, match="EXPORT_NAME was refused: no such export"):
        client.handshake.export_refused(OptionReply.ERR_UNKNOWN, "no such export")

    assert client.received() == b""
    client.is_closed()


def test_export_name_keeps_what_was_negotiated() -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"disk", b"base:allocation"))

    client.option(Option.EXPORT_NAME, b"disk")
    client.handshake.export_opened(FACTS)

    assert client.handshake.negotiated == Negotiated(True, False, ("base:allocation",))


# ABORT.


@pytest.mark.parametrize("size", [0, 1, 16, MAX_OPTION_DATA])
def test_abort_is_acknowledged_and_its_data_ignored(size: int) -> None:
    client = Client()

    assert client.option(Option.ABORT, bytes(size)) == Closed()
    assert client.received() == ack(Option.ABORT)
    client.is_closed()


def test_nothing_behind_an_abort_is_looked_at() -> None:
    client = Client()

    assert client.send(option(Option.ABORT) + option(Option.GO, info(b"disk"))) == Closed()
    assert client.received() == ack(Option.ABORT)
    assert client.handshake.next_event() is None
    client.is_closed()


# LIST.


def test_list_gives_one_reply_for_each_export_then_ack() -> None:
    client = Client()

    assert client.option(Option.LIST) == ListExports()
    client.handshake.exports_listed([("", ""), ("disk", "a disk"), ("é", "")])

    assert client.received() == (
        reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\0")
        + reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\4diska disk")
        + reply(Option.LIST, OptionReply.SERVER, b"\0\0\0\2\xc3\xa9")
        + ack(Option.LIST)
    )
    client.is_in_step()


def test_list_may_be_refused_by_the_driver() -> None:
    client = Client()

    client.option(Option.LIST)
    client.handshake.list_refused(OptionReply.ERR_PLATFORM, "the plugin failed")

    assert client.received() == reply(Option.LIST, OptionReply.ERR_PLATFORM, b"the plugin failed")
    client.is_in_step()


def test_list_that_cannot_be_encoded_sends_nothing_and_can_still_be_refused() -> None:
    client = Client()
    client.option(Option.LIST)

    with pytest.raises(UnicodeEncodeError):
        client.handshake.exports_listed([("good", ""), ("\udcff", "")])

    assert client.received() == b""
    client.handshake.list_refused(OptionReply.ERR_PLATFORM, "a name is not text")
    client.is_error(client.received(), Option.LIST, OptionReply.ERR_PLATFORM)


# INFO and GO.


@pytest.mark.parametrize("name", [b"", b"disk"])
def test_go_sends_size_and_flags_unasked_and_begins_transmission(name: bytes) -> None:
    client = Client()

    assert client.option(Option.GO, info(name)) == OpenExport(name.decode(), Option.GO, False)
    client.handshake.export_opened(FACTS)

    assert client.received() == reply(Option.GO, OptionReply.INFO, EXPORT_INFO) + ack(Option.GO)
    assert client.handshake.next_event() == Ready()
    assert client.handshake.next_event() is None


@pytest.mark.parametrize("client_flags", [1, 3])
def test_go_never_adds_zeroes(client_flags: int) -> None:
    client = Client(client_flags=client_flags)

    client.option(Option.GO, info(b"disk"))
    client.handshake.export_opened(FACTS)

    assert client.received() == reply(Option.GO, OptionReply.INFO, EXPORT_INFO) + ack(Option.GO)


def test_info_goes_on_haggling() -> None:
    client = Client()

    assert client.option(Option.INFO, info(b"disk")) == OpenExport("disk", Option.INFO, False)
    client.handshake.export_opened(FACTS)

    assert client.received() == reply(Option.INFO, OptionReply.INFO, EXPORT_INFO) + ack(Option.INFO)
    client.is_in_step()


ALL_FACTS = FACTS._replace(name="canonical", description="Beschreibung é", block_size=BlockSizeInfo(512, 4096))
NAME_INFO = b"\0\1canonical"
DESCRIPTION_INFO = b"\0\2" + "Beschreibung é".encode()
BLOCK_SIZE_INFO = bytes.fromhex("0003 00000200 00001000 04000000")


@pytest.mark.parametrize("number", INFO_AND_GO)
@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ([], []),
        ([0], []),
        ([1], [NAME_INFO]),
        ([2], [DESCRIPTION_INFO]),
        ([3], [BLOCK_SIZE_INFO]),
        ([3, 2, 1, 0], [NAME_INFO, DESCRIPTION_INFO, BLOCK_SIZE_INFO]),
        ([3, 3, 3, 1, 1], [NAME_INFO, BLOCK_SIZE_INFO]),
        ([4, 65535, 0x8000], []),
        ([99, 3], [BLOCK_SIZE_INFO]),
        (list(range(65535)), [NAME_INFO, DESCRIPTION_INFO, BLOCK_SIZE_INFO]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_information_is_sent_once_and_only_if_asked_for(
    number: Option, types: list[int], expected: list[bytes]
) -> None:
    client = Client()

    event = client.option(number, info(b"disk", *types))
    client.handshake.export_opened(ALL_FACTS)

    assert event == OpenExport("disk", number, wants_description=2 in types)
    parts = [reply(number, OptionReply.INFO, part) for part in [EXPORT_INFO, *expected]]
    assert client.received() == b"".join(parts) + ack(number)


@pytest.mark.parametrize("number", INFO_AND_GO)
def test_information_that_is_not_known_is_left_out(number: Option) -> None:
    client = Client()

    client.option(number, info(b"disk", 0, 1, 2, 3))
    client.handshake.export_opened(FACTS)

    assert client.received() == reply(number, OptionReply.INFO, EXPORT_INFO) + ack(number)


@pytest.mark.parametrize("number", INFO_AND_GO)
def test_empty_texts_are_information_too(number: Option) -> None:
    client = Client()

    client.option(number, info(b"", 1, 2))
    client.handshake.export_opened(FACTS._replace(name="", description=""))

    parts = [reply(number, OptionReply.INFO, part) for part in [EXPORT_INFO, b"\0\1", b"\0\2"]]
    assert client.received() == b"".join(parts) + ack(number)


@pytest.mark.parametrize("number", INFO_AND_GO)
def test_refused_export_gets_an_error_alone_and_another_try(number: Option) -> None:
    client = Client()

    client.option(number, info(b"missing", 1, 2, 3))
    client.handshake.export_refused(OptionReply.ERR_UNKNOWN, "no such export")
    first = client.received()
    again = client.option(Option.GO, info(b"disk"))

    assert first == reply(number, OptionReply.ERR_UNKNOWN, b"no such export")
    assert again == OpenExport("disk", Option.GO, False)


def test_CVE_2019_14851_options_after_info_in_any_order() -> None:
    options = [Option.INFO, Option.LIST, Option.SET_META_CONTEXT, Option.STRUCTURED_REPLY, 99]

    for order in itertools.permutations(options):
        client = Client()
        for number in order:
            data = (
                info(b"disk") if number == Option.INFO else meta(b"disk") if number == Option.SET_META_CONTEXT else b""
            )
            event = client.option(number, data)
            if isinstance(event, OpenExport):
                client.handshake.export_opened(FACTS)
            elif isinstance(event, ListExports):
                client.handshake.exports_listed([("disk", "")])
            assert replies(client.received())[-1].option == number
        assert client.option(Option.EXPORT_NAME, b"disk") == OpenExport("disk", Option.EXPORT_NAME, False)


def test_CVE_2020_10761_reason_of_a_refused_export_name_has_nothing_raw_either() -> None:
    client = Client()
    client.option(Option.EXPORT_NAME, "\x1bé\n".encode() * 1000)

    with pytest.raises(RemoteProtocolError) as caught:
        client.handshake.export_refused(OptionReply.ERR_UNKNOWN, "no export has the name " + "\x1bé\n" * 1000)

    assert str(caught.value).startswith("EXPORT_NAME was refused: no export has the name \\x1bé\\n")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 257


@pytest.mark.parametrize("size", [255, 256, 257, 3000, 4095, 4096])
@pytest.mark.parametrize("number", INFO_AND_GO)
def test_CVE_2017_15118_long_names_are_fine(number: Option, size: int) -> None:
    client = Client()

    assert client.option(number, info(b"x" * size)) == OpenExport("x" * size, number, False)


@pytest.mark.parametrize("size", [4097, 65536, 1_000_000])
@pytest.mark.parametrize("number", [*INFO_AND_GO, *META])
def test_CVE_2017_15118_names_over_the_limit_are_refused(number: Option, size: int) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    data = (meta if number in META else info)(b"x" * size)
    expected = OptionReply.ERR_TOO_BIG if number in META and len(data) > MAX_INFO_REQUEST else OptionReply.ERR_INVALID

    client.refused(number, expected, data)

    client.is_in_step()


@pytest.mark.parametrize("number", INFO_AND_GO)
def test_CVE_2020_10761_refusal_of_the_longest_name_has_a_short_text(number: Option) -> None:
    client = Client()

    client.option(number, info("é".encode() * 2048))
    client.handshake.export_refused(OptionReply.ERR_UNKNOWN, f"no export has the name {'é' * 2048}\n\udcff")

    text = client.is_error(client.received(), number, OptionReply.ERR_UNKNOWN)
    assert text.startswith("no export has the name éé")


# Malformed data: one ERR_INVALID, nothing opened or selected, and the next option is understood.

LYING_LENGTHS = [0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFF9, 0xFFFFFFFC, 2**31, 2**31 - 1, 9, 70_000]

MALFORMED_INFO = {
    **{f"{size} bytes": bytes(size) for size in range(6)},
    **{f"name length {length}": struct.pack(">I", length) + b"disk\0\0\0\0" for length in LYING_LENGTHS},
    "name takes the count's place": struct.pack(">I4s", 4, b"disk"),
    "name takes half the count's place": struct.pack(">I4sB", 4, b"disk", 0),
    "count 65535": info(b"disk")[:-2] + b"\xff\xff",
    "count 65535 and one type": info(b"disk")[:-2] + b"\xff\xff\0\3",
    "count too small": info(b"disk", 3)[:-4] + b"\0\0\0\3",
    "odd trailing byte": info(b"disk", 3) + b"\0",
    "trailing bytes": info(b"disk", 3) + b"\0\0",
    "second option inside": info(b"disk") + option(Option.LIST),
    "NUL in name": info(b"disk\0junk"),
    "name not UTF-8": info(b"\xff\xfe"),
    "surrogate in name": info(b"\xed\xb3\xbf"),
    "longest and one more byte": info(b"x" * 4096, *range(65535)) + b"\0",
}

MALFORMED_META = {
    **{f"{size} bytes": bytes(size) for size in range(8)},
    **{f"name length {length}": struct.pack(">I", length) + b"disk\0\0\0\0" for length in LYING_LENGTHS},
    "name takes the count's place": struct.pack(">I4s", 4, b"disk"),
    "4294967295 queries": struct.pack(">I4sI", 4, b"disk", 0xFFFFFFFF),
    "4294967295 queries and some": struct.pack(">I4sI", 4, b"disk", 0xFFFFFFFF) + bytes(1000),
    "65535 queries": struct.pack(">I4sI", 4, b"disk", 65535) + bytes(1000),
    "one query fewer than announced": struct.pack(">II", 0, 2) + struct.pack(">I5s", 5, b"base:"),
    "one query fewer, odd byte": struct.pack(">II", 0, 2) + struct.pack(">I5sB", 5, b"base:", 0),
    **{f"query length {length}": struct.pack(">III", 0, 1, length) + b"base:" for length in LYING_LENGTHS},
    "query of 4097 bytes": meta(b"", b"x" * 4097),
    "NUL in name": meta(b"a\0", b"base:allocation"),
    "name not UTF-8": meta(b"\xff", b"base:allocation"),
}


@pytest.mark.parametrize("number", INFO_AND_GO)
@pytest.mark.parametrize("data", MALFORMED_INFO.values(), ids=MALFORMED_INFO.keys())
def test_malformed_info_or_go_is_refused_in_step(number: Option, data: bytes) -> None:
    client = Client()

    client.refused(number, OptionReply.ERR_INVALID, data)

    client.is_in_step()


@pytest.mark.parametrize("number", META)
@pytest.mark.parametrize("data", MALFORMED_META.values(), ids=MALFORMED_META.keys())
def test_malformed_meta_context_is_refused_in_step(number: Option, data: bytes) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)

    client.refused(number, OptionReply.ERR_INVALID, data)

    assert client.handshake.negotiated.contexts == ()
    client.is_in_step()


@pytest.mark.parametrize("number", NO_DATA)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 4096, MAX_OPTION_DATA])
def test_data_where_none_belongs_is_refused_in_step(number: Option, size: int) -> None:
    client = Client()

    text = client.refused(number, OptionReply.ERR_INVALID, bytes(size))

    assert f"{number.name} takes at most 0 bytes of data, not {size}" == text
    assert client.handshake.negotiated == Negotiated(False, False, ())
    client.is_in_step()


@pytest.mark.parametrize("number", [0, 4, 12, 13, 255, 0x10007, 2**31, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 1, 16, 135_177, MAX_OPTION_DATA])
def test_unknown_option_is_refused_in_step(number: int, size: int) -> None:
    client = Client()

    text = client.refused(number, OptionReply.ERR_UNSUP, bytes(size))

    assert str(number) in text
    client.is_in_step()


@pytest.mark.parametrize("number", INFO_AND_GO)
@pytest.mark.parametrize("length", [2**32 - 1, 2**32 - 2, 2**32 - 7, 2**31, 2**31 - 1, 5])
def test_CVE_2022_26495_name_length_overflow(number: Option, length: int) -> None:
    client = Client()

    client.refused(number, OptionReply.ERR_INVALID, struct.pack(">I", length) + b"disk" + b"\0\0")

    client.is_in_step()


@pytest.mark.parametrize("length", [2**32 - 1, 2**32 - 2, 2**32 - 7, 2**31, 2**31 - 1])
def test_CVE_2022_26495_export_name_length_overflow(length: int) -> None:
    client = Client()

    with pytest.raises(RemoteProtocolError, match=f"option 1 has {length} bytes of data"):
        client.send(struct.pack(">8sII", b"IHAVEOPT", 1, length))

    assert client.received() == b""


@pytest.mark.parametrize("number", INFO_AND_GO)
@pytest.mark.parametrize("size", [300, 70_000])
def test_CVE_2022_26496_large_inner_length(number: Option, size: int) -> None:
    client = Client()

    client.refused(number, OptionReply.ERR_INVALID, struct.pack(">I", size + 1) + b"x" * size)

    client.is_in_step()


@pytest.mark.parametrize("number", META)
def test_qemu_4843_option_inside_a_meta_context_is_not_carried_out(number: Option) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)

    answer = client.ask(number, meta(b"disk", b"x:y") + option(Option.ABORT))

    assert answer == ack(number)
    client.is_in_step()


# Framing.


@pytest.mark.parametrize("magic", [bytes(8), b"NBDMAGIC", b"IHAVEOPU", b"\xff" * 8, bytes.fromhex("0003e889045565a9")])
def test_wrong_option_magic_closes(magic: bytes) -> None:
    client = Client()

    with pytest.raises(RemoteProtocolError, match=f"option begins with 0x{magic.hex()}, not with 0x4948415645"):
        client.send(magic + bytes(8))

    assert client.received() == b""
    client.is_closed()


@pytest.mark.parametrize("number", [0, *Option, 99])
@pytest.mark.parametrize("length", [MAX_OPTION_DATA + 1, 2**31, 0xFFFFFFF0, 0xFFFFFFFF])
def test_CVE_2017_15119_huge_option_closes_before_its_data(number: int, length: int) -> None:
    client = Client()

    with pytest.raises(
        RemoteProtocolError, match=f"option {int(number)} has {length} bytes of data, more than 1048576"
    ):
        client.send(struct.pack(">8sII", b"IHAVEOPT", number, length))

    assert client.received() == b""
    client.is_closed()


def test_replies_to_earlier_options_can_be_sent_after_an_error() -> None:
    client = Client()

    with pytest.raises(RemoteProtocolError):
        client.send(option(Option.STRUCTURED_REPLY) + bytes(16))

    assert client.received() == ack(Option.STRUCTURED_REPLY)


def test_options_sent_at_once_are_answered_in_order() -> None:
    client = Client()

    event = client.send(option(99) + option(Option.STRUCTURED_REPLY) + option(Option.INFO, info(b"disk")) + option(98))
    before = [(answer.option, answer.reply) for answer in replies(client.received())]
    client.handshake.export_opened(FACTS)
    assert client.handshake.next_event() is None
    after = [(answer.option, answer.reply) for answer in replies(client.received())]

    assert event == OpenExport("disk", Option.INFO, False)
    assert before == [(99, OptionReply.ERR_UNSUP), (Option.STRUCTURED_REPLY, OptionReply.ACK)]
    assert after == [
        (Option.INFO, OptionReply.INFO),
        (Option.INFO, OptionReply.ACK),
        (98, OptionReply.ERR_UNSUP),
    ]


@pytest.mark.parametrize("number", [Option.INFO, Option.LIST])
def test_no_option_is_read_while_the_driver_owes_an_answer(number: Option) -> None:
    client = Client()

    client.send(option(number, info(b"disk") if number is Option.INFO else b"") + option(Option.ABORT))

    assert client.handshake.next_event() is None
    assert client.received() == b""


DIALOGUE = b"".join(
    [
        flags(1),
        option(99, b"data"),
        option(Option.STRUCTURED_REPLY),
        option(Option.LIST),
        option(Option.SET_META_CONTEXT, meta(b"disk", b"base:allocation")),
        option(Option.INFO, info(b"missing", 3)),
        option(Option.GO, info(b"disk", 1, 3)),
        b"\x25\x60\x95\x13 and the rest of the first request",
    ]
)


def play(pieces: Iterable[bytes]) -> tuple[list[Event], bytes, bytes, Negotiated]:
    """Play the dialogue against a driver that knows one export."""
    handshake = Handshake()
    events: list[Event] = []
    output = b""
    for piece in pieces:
        handshake.receive_data(piece)
        while (event := handshake.next_event()) is not None:
            events.append(event)
            if isinstance(event, ListExports):
                handshake.exports_listed([("disk", "")])
            elif isinstance(event, OpenExport) and event.name == "disk":
                handshake.export_opened(ALL_FACTS)
            elif isinstance(event, OpenExport):
                handshake.export_refused(OptionReply.ERR_UNKNOWN, "no such export")
        output += handshake.data_to_send()
    return events, output, handshake.take_unprocessed(), handshake.negotiated


def test_dialogue_is_the_same_however_it_is_split() -> None:
    whole = play([DIALOGUE])

    assert whole[0] == [
        ListExports(),
        OpenExport("missing", Option.INFO, False),
        OpenExport("disk", Option.GO, False),
        Ready(),
    ]
    assert whole[2:] == (
        DIALOGUE[-len(b"%`\x95\x13 and the rest of the first request") :],
        Negotiated(True, False, ("base:allocation",)),
    )
    for cut in range(1, len(DIALOGUE)):
        assert play([DIALOGUE[:cut], DIALOGUE[cut:]]) == whole
    assert play(bytes([byte]) for byte in DIALOGUE) == whole


def test_memoryview_is_taken_as_well() -> None:
    handshake = Handshake()

    handshake.receive_data(memoryview(DIALOGUE))

    assert handshake.next_event() == ListExports()


@pytest.mark.parametrize("number", [Option.GO, Option.EXPORT_NAME])
def test_requests_behind_the_last_option_are_handed_over_once(number: Option) -> None:
    client = Client()

    client.send(option(number, info(b"disk") if number is Option.GO else b"disk") + b"first request")
    client.handshake.export_opened(FACTS)
    assert client.handshake.next_event() == Ready()
    client.handshake.receive_data(b", second request")

    assert client.handshake.next_event() is None
    assert client.handshake.take_unprocessed() == b"first request, second request"
    assert client.handshake.take_unprocessed() == b""


# Structured replies and extended headers.


def test_structured_replies() -> None:
    client = Client()

    assert client.ask(Option.STRUCTURED_REPLY) == ack(Option.STRUCTURED_REPLY)
    assert client.handshake.negotiated == Negotiated(True, False, ())


def test_structured_replies_asked_for_twice_stay_on() -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)

    client.refused(Option.STRUCTURED_REPLY, OptionReply.ERR_INVALID)

    assert client.handshake.negotiated.structured_replies


@pytest.mark.parametrize("before", [False, True])
def test_extended_headers_with_and_without_structured_replies(before: bool) -> None:
    client = Client()
    if before:
        client.ask(Option.STRUCTURED_REPLY)

    assert client.ask(Option.EXTENDED_HEADERS) == ack(Option.EXTENDED_HEADERS)
    assert client.handshake.negotiated == Negotiated(before, True, ())


@pytest.mark.parametrize("before", [False, True])
def test_structured_replies_after_extended_headers_are_refused(before: bool) -> None:
    client = Client()
    if before:
        client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.EXTENDED_HEADERS)

    client.refused(Option.STRUCTURED_REPLY, OptionReply.ERR_EXT_HEADER_REQD)

    assert client.handshake.negotiated == Negotiated(before, True, ())


def test_extended_headers_asked_for_twice_stay_on() -> None:
    client = Client()
    client.ask(Option.EXTENDED_HEADERS)

    client.refused(Option.EXTENDED_HEADERS, OptionReply.ERR_INVALID)

    assert client.handshake.negotiated.extended_headers


def test_export_name_after_extended_headers_closes() -> None:
    client = Client()
    client.ask(Option.EXTENDED_HEADERS)

    with pytest.raises(RemoteProtocolError, match="extended headers"):
        client.option(Option.EXPORT_NAME, b"disk")

    assert client.received() == b""
    client.is_closed()


@pytest.mark.parametrize("number", INFO_AND_GO)
def test_what_is_negotiated_outlives_a_refused_export(number: Option) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"disk", b"base:allocation"))

    client.option(number, info(b"disk"))
    client.handshake.export_refused(OptionReply.ERR_UNKNOWN, "not now")

    assert client.handshake.negotiated == Negotiated(True, False, ("base:allocation",))


@pytest.mark.parametrize("number", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_without_structured_replies_their_options_are_unknown(number: Option, size: int) -> None:
    client = Client(Handshake(structured_replies=False))

    client.refused(number, OptionReply.ERR_UNSUP, bytes(size))

    assert client.handshake.negotiated == Negotiated(False, False, ())
    client.is_in_step()


# Metadata contexts.


@pytest.mark.parametrize("number", META)
@pytest.mark.parametrize("data", [b"", b"junk", meta(b"disk", b"base:allocation"), bytes(200_000)])
def test_without_meta_contexts_their_options_are_unknown(number: Option, data: bytes) -> None:
    client = Client(Handshake(meta_contexts=False))
    client.ask(Option.STRUCTURED_REPLY)

    client.refused(number, OptionReply.ERR_UNSUP, data)

    assert client.handshake.negotiated == Negotiated(True, False, ())
    client.is_in_step()


def test_without_either_all_four_options_are_unknown() -> None:
    client = Client(Handshake(structured_replies=False, meta_contexts=False))

    for number in (Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, *META):
        client.refused(number, OptionReply.ERR_UNSUP)


LISTED = reply(Option.LIST_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\0base:allocation")


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([], True),
        ([b"base:"], True),
        ([b"base:allocation"], True),
        ([b"base:", b"base:allocation", b"base:"], True),
        ([b"x:y", b"base:allocation"], True),
        ([b""], False),
        ([b":"], False),
        ([b"base"], False),
        ([b"base:allocationx"], False),
        ([b"base:allocation\0"], False),
        ([b"BASE:allocation"], False),
        ([b"base:\xff"], False),
        ([b"qemu:", b"x-mine:all", b"nonsense"], False),
    ],
)
def test_list_meta_context(structured: bool, queries: list[bytes], found: bool) -> None:
    client = Client()
    if structured:
        client.ask(Option.STRUCTURED_REPLY)

    answer = client.ask(Option.LIST_META_CONTEXT, meta(b"any export", *queries))

    assert answer == (LISTED if found else b"") + ack(Option.LIST_META_CONTEXT)
    assert client.handshake.negotiated.contexts == ()


SELECTED = reply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, b"\0\0\0\1base:allocation")


@pytest.mark.parametrize("enable", [Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS])
@pytest.mark.parametrize(
    ("queries", "found"),
    [
        ([b"base:allocation"], True),
        ([b"base:allocation", b"base:allocation"], True),
        ([b"x:y", b"base:unknown", b"base:allocation"], True),
        ([], False),
        ([b"base:"], False),
        ([b""], False),
        ([b"base:unknown"], False),
        ([b"base:allocationx"], False),
        ([b"base:allocation\0"], False),
        ([b"qemu:allocation-depth"], False),
        ([b"\xff"], False),
    ],
)
def test_set_meta_context(enable: Option, queries: list[bytes], found: bool) -> None:
    client = Client()
    client.ask(enable)

    answer = client.ask(Option.SET_META_CONTEXT, meta(b"disk", *queries))

    assert answer == (SELECTED if found else b"") + ack(Option.SET_META_CONTEXT)
    assert client.handshake.negotiated.contexts == (("base:allocation",) if found else ())


def test_set_meta_context_needs_structured_replies() -> None:
    client = Client()

    client.refused(Option.SET_META_CONTEXT, OptionReply.ERR_INVALID, meta(b"disk", b"base:allocation"))
    client.ask(Option.STRUCTURED_REPLY)

    assert client.handshake.negotiated.contexts == ()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (meta(b"disk"), OptionReply.ACK),
        (meta(b"disk", b"x:y"), OptionReply.ACK),
        (b"", OptionReply.ERR_INVALID),
        (meta(b"a\0", b"base:allocation"), OptionReply.ERR_INVALID),
        (meta(b"disk", b"base:allocation")[:-1], OptionReply.ERR_INVALID),
        (meta(b"disk", *[b"base:allocation"] * (MAX_QUERIES + 1)), OptionReply.ERR_TOO_BIG),
        (bytes(MAX_INFO_REQUEST + 1), OptionReply.ERR_TOO_BIG),
        (bytes(MAX_OPTION_DATA), OptionReply.ERR_TOO_BIG),
    ],
    ids=["no query", "other query", "empty", "bad name", "cut", "too many queries", "too long", "far too long"],
)
def test_every_set_meta_context_replaces_the_selection_even_if_it_fails(data: bytes, expected: OptionReply) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"disk", b"base:allocation"))

    (answer,) = replies(client.ask(Option.SET_META_CONTEXT, data))

    assert answer.reply == expected
    assert client.handshake.negotiated.contexts == ()
    client.option(Option.GO, info(b"disk"))
    client.handshake.export_opened(FACTS)
    assert client.handshake.negotiated.contexts == ()


@pytest.mark.parametrize("data", [b"", meta(b"disk"), meta(b"disk", b"x:y"), meta(b"other", b"base:allocation")])
def test_list_meta_context_leaves_the_selection_alone(data: bytes) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"disk", b"base:allocation"))

    client.ask(Option.LIST_META_CONTEXT, data)
    client.option(Option.GO, info(b"disk"))

    assert client.handshake.negotiated.contexts == ("base:allocation",)


@pytest.mark.parametrize("number", META)
def test_so_many_queries_are_answered_by_one_context(number: Option) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)

    answer = client.ask(number, meta(b"", *[b"base:allocation"] * MAX_QUERIES))
    text = client.refused(number, OptionReply.ERR_TOO_BIG, meta(b"", *[b"base:allocation"] * (MAX_QUERIES + 1)))

    assert answer == (LISTED if number is Option.LIST_META_CONTEXT else SELECTED) + ack(number)
    assert str(MAX_QUERIES + 1) in text


@pytest.mark.parametrize("number", [Option.GO, Option.EXPORT_NAME])
@pytest.mark.parametrize(
    ("selected_for", "opened", "holds"),
    [("disk", "disk", True), ("", "", True), ("disk", "", False), ("", "disk", False), ("disk", "disk2", False)],
)
def test_selection_holds_only_for_the_export_that_it_was_made_for(
    number: Option, selected_for: str, opened: str, holds: bool
) -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(selected_for.encode(), b"base:allocation"))
    expected = ("base:allocation",) if holds else ()

    client.option(number, info(opened.encode()) if number is Option.GO else opened.encode())
    while_opening = client.handshake.negotiated.contexts
    client.handshake.export_opened(FACTS)

    assert while_opening == expected
    assert client.handshake.next_event() == Ready()
    assert client.handshake.negotiated.contexts == expected


def test_info_about_another_export_leaves_the_selection_for_go() -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"disk", b"base:allocation"))

    client.option(Option.INFO, info(b"other"))
    during_info = client.handshake.negotiated.contexts
    client.handshake.export_opened(FACTS)
    client.option(Option.GO, info(b"disk"))

    assert during_info == ()
    assert client.handshake.negotiated.contexts == ("base:allocation",)


def test_last_selection_counts() -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"first", b"base:allocation"))
    client.ask(Option.SET_META_CONTEXT, meta(b"second", b"base:allocation"))

    client.option(Option.GO, info(b"first"))

    assert client.handshake.negotiated.contexts == ()


# Shutting down.


@pytest.mark.parametrize("number", [0, *range(3, 13)])
@pytest.mark.parametrize("data", [b"", b"junk", info(b"disk"), bytes(200_000)])
def test_while_shutting_down_options_are_refused_in_step(number: int, data: bytes) -> None:
    client = Client()
    client.handshake.shutting_down = True

    client.refused(number, OptionReply.ERR_SHUTDOWN, data)

    assert client.handshake.negotiated == Negotiated(False, False, ())
    client.handshake.shutting_down = False
    client.is_in_step()


def test_while_shutting_down_clients_may_leave() -> None:
    client = Client()
    client.handshake.shutting_down = True

    assert client.option(Option.ABORT) == Closed()
    assert client.received() == ack(Option.ABORT)


def test_while_shutting_down_export_name_closes() -> None:
    client = Client()
    client.handshake.shutting_down = True

    with pytest.raises(RemoteProtocolError, match="the server is shutting down"):
        client.option(Option.EXPORT_NAME, b"disk")

    assert client.received() == b""


def test_option_that_was_under_way_when_the_shutdown_began_is_refused() -> None:
    client = Client()
    request = option(Option.GO, info(b"disk"))
    client.send(request[:20])

    client.handshake.shutting_down = True

    assert client.send(request[20:]) is None
    client.is_error(client.received(), Option.GO, OptionReply.ERR_SHUTDOWN)


# Limits.


def refused_option(client: Client) -> None:
    client.refused(99, OptionReply.ERR_UNSUP)


def probing(client: Client) -> None:
    client.option(Option.INFO, info(b"disk"))
    client.handshake.export_opened(FACTS)


def malformed(client: Client) -> None:
    client.refused(Option.GO, OptionReply.ERR_INVALID, b"?")


def failing_list(client: Client) -> None:
    client.option(Option.LIST)
    client.handshake.list_refused(OptionReply.ERR_POLICY, "no")


def empty_list(client: Client) -> None:
    client.option(Option.LIST)
    client.handshake.exports_listed([])


@pytest.mark.parametrize("haggle", [refused_option, probing, malformed, failing_list, empty_list])
def test_haggling_ends_after_32_options(haggle: Callable[[Client], None]) -> None:
    client = Client()
    for _ in range(MAX_OPTIONS):
        haggle(client)
    client.received()

    with pytest.raises(RemoteProtocolError, match="too many options"):
        client.option(Option.GO, info(b"disk"))

    assert MAX_OPTIONS == 32
    assert client.received() == b""
    client.is_closed()


def test_other_numbers_of_options_may_be_allowed() -> None:
    client = Client(Handshake(max_options=2))
    client.option(Option.LIST)
    client.handshake.exports_listed([("disk", "")])
    for _ in range(3):
        client.option(99)

    with pytest.raises(RemoteProtocolError, match="too many options"):
        client.option(99)


@pytest.mark.parametrize("lists", [1, 2, 5])
def test_list_allows_32_more_options_for_each_export_but_only_once(lists: int) -> None:
    client = Client()
    for _ in range(lists):
        assert client.option(Option.LIST) == ListExports()
        client.handshake.exports_listed(iter([("one", ""), ("two", "")]))

    for _ in range(3 * MAX_OPTIONS - lists):
        client.option(99)

    with pytest.raises(RemoteProtocolError, match="too many options"):
        client.option(99)


def test_list_that_failed_first_may_still_allow_more() -> None:
    client = Client()
    failing_list(client)
    client.option(Option.LIST)
    client.handshake.exports_listed([("disk", "")])

    for _ in range(2 * MAX_OPTIONS - 2):
        client.option(99)

    with pytest.raises(RemoteProtocolError, match="too many options"):
        client.option(99)


def memory_of(action: Callable[[], object]) -> int:
    """Return how many bytes more are in use while the result of `action` is."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        result = action()
        used = tracemalloc.get_traced_memory()[0] - before
        del result
        return used
    finally:
        tracemalloc.stop()


def test_idle_handshake_takes_less_than_2_kib() -> None:
    def idle() -> list[Handshake]:
        handshakes = [Handshake(structured_replies=False, meta_contexts=False) for _ in range(50)]
        for handshake in handshakes:
            handshake.data_to_send()
            handshake.receive_data(flags(3))
            handshake.next_event()
        return handshakes

    assert memory_of(idle) < 50 * 2048


@pytest.mark.parametrize("number", [Option.ABORT, Option.LIST, Option.GO, Option.SET_META_CONTEXT, 99])
def test_data_that_does_not_matter_is_not_kept(number: int) -> None:
    def nearly_finished() -> Client:
        client = Client()
        client.ask(Option.STRUCTURED_REPLY)
        client.send(struct.pack(">8sII", b"IHAVEOPT", number, MAX_OPTION_DATA))
        for _ in range(31):
            client.send(bytes(MAX_OPTION_DATA // 32))
        return client

    assert memory_of(nearly_finished) < 16384


def test_memory_is_given_back_when_an_option_is_done() -> None:
    def finished() -> Client:
        client = Client()
        client.option(Option.INFO, info(b"x" * 4096, *range(65535)))
        client.handshake.export_refused(OptionReply.ERR_UNKNOWN, "no")
        client.received()
        return client

    assert memory_of(finished) < 16384


# Misuse by the driver.


def test_answers_that_were_not_asked_for_are_the_drivers_mistake() -> None:
    client = Client()

    with pytest.raises(AssertionError):
        client.handshake.export_opened(FACTS)
    with pytest.raises(AssertionError):
        client.handshake.export_refused(OptionReply.ERR_UNKNOWN, "")
    with pytest.raises(AssertionError):
        client.handshake.exports_listed([])
    with pytest.raises(AssertionError):
        client.handshake.list_refused(OptionReply.ERR_POLICY, "")

    assert client.received() == b""


def test_export_is_opened_once() -> None:
    client = Client()
    client.option(Option.GO, info(b"disk"))
    client.handshake.export_opened(FACTS)

    with pytest.raises(AssertionError):
        client.handshake.export_opened(FACTS)


# What is to be logged.


@pytest.mark.parametrize("number", [Option.GO, Option.INFO, Option.LIST_META_CONTEXT, Option.STRUCTURED_REPLY])
def test_malformed_option_is_told_to_the_driver(number: Option) -> None:
    client = Client()

    client.refused(number, OptionReply.ERR_INVALID, b"\x1b[1m")

    (text,) = client.handshake.refusals
    assert number.name in text
    assert text.isprintable()


@pytest.mark.parametrize("number", [0, 4, 0xFFFFFFFF])
def test_option_that_is_not_supported_is_nobodys_fault(number: int) -> None:
    client = Client()

    client.refused(number, OptionReply.ERR_UNSUP)

    assert client.handshake.refusals == []


def test_unknown_option_of_a_client_that_may_send_none_is_told_by_its_number() -> None:
    client = Client(client_flags=0)

    client.refused(77, OptionReply.ERR_INVALID)

    assert client.handshake.refusals[0].startswith("option 77: ")

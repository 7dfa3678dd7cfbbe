"""The handshake against clients that say anything at all, in pieces of any size."""

from __future__ import annotations

import struct
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from fuzz import targets
from fuzz.targets import Config
from nbdkitpy.protocol.constants import Option, OptionReply, TlsMode, TransmissionFlag
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.protocol.handshake import (
    Closed,
    Event,
    ExportFacts,
    Handshake,
    ListExports,
    Negotiated,
    OpenExport,
    Ready,
)
from nbdkitpy.protocol.messages import MAX_INFO_REQUEST, OPTION_HEADER, BlockSizeInfo
from tests.fuzzing import streams
from tests.fuzzing.effort import fuzz
from tests.fuzzing.streams import option, split

FACTS = ExportFacts(1 << 30, TransmissionFlag.HAS_FLAGS, "disk", "a disk", BlockSizeInfo())
GREETING = 18
INTERMEDIATE = {OptionReply.SERVER, OptionReply.INFO, OptionReply.META_CONTEXT}

FUZZ = fuzz(300)


class Outcome(NamedTuple):
    """All that a handshake came to."""

    events: list[Event]
    output: bytes
    error: str | None
    left: bytes
    negotiated: Negotiated


def play(pieces: list[bytes], handshake: Handshake) -> Outcome:
    """Feed the pieces, with a driver that knows the exports "" and "disk"."""
    events: list[Event] = []
    error = None
    output = b""
    for piece in pieces:
        handshake.receive_data(piece)
        try:
            while (event := handshake.next_event()) is not None:
                events.append(event)
                answer(handshake, event)
        except RemoteProtocolError as violation:
            assert error is None, "it is raised once"
            error = str(violation)
        output += handshake.data_to_send()
    return Outcome(events, output, error, handshake.take_unprocessed(), handshake.negotiated)


def answer(handshake: Handshake, event: Event) -> None:
    if isinstance(event, ListExports):
        handshake.exports_listed([("", ""), ("disk", "a disk")])
    elif isinstance(event, OpenExport) and event.name in ("", "disk"):
        handshake.export_opened(FACTS)
    elif isinstance(event, OpenExport):
        handshake.export_refused(OptionReply.ERR_UNKNOWN, f"no export has the name {event.name}")


def check(outcome: Outcome) -> list[int]:
    """Check what holds whatever a client sent, and return the options that got a final reply."""
    output = outcome.output[GREETING:]
    if Ready() in outcome.events:
        assert outcome.events[-1] == Ready()
        opened = outcome.events[-2]
        assert isinstance(opened, OpenExport)
        if opened.option is Option.EXPORT_NAME:  # 10 bytes, or 134, end the output
            zeroes = 124 if output.endswith(bytes(124)) else 0
            output = output[: len(output) - 10 - zeroes]
    else:
        assert len(outcome.left) < OPTION_HEADER.size + MAX_INFO_REQUEST
    if outcome.error is not None or Closed() in outcome.events:
        assert outcome.left == b""
    if outcome.error is not None:
        assert outcome.error.isprintable()
    negotiated = outcome.negotiated
    assert not negotiated.contexts or negotiated.structured_replies or negotiated.extended_headers
    return final_replies(output)


def final_replies(output: bytes) -> list[int]:
    finals = []
    pending = None
    while output:
        magic, option, kind, length = struct.unpack_from(">QIII", output)
        assert magic == 0x3E889045565A9
        assert pending in (None, option), "replies to one option are not torn apart"
        assert len(output) >= 20 + length
        data, output = output[20 : 20 + length], output[20 + length :]
        pending = option if kind in INTERMEDIATE else None
        if kind == OptionReply.ACK:
            assert not data
        if kind & 1 << 31:
            assert len(data) <= 4096
            assert data.decode().isprintable()
        if pending is None:
            finals.append(option)
    assert pending is None, "every option gets a final reply"
    return finals


# What clients say.

haggling_options = (
    streams.haggling | streams.starttls | st.builds(option, st.just(7), streams.infos | streams.spoilt_data)
)
options = haggling_options | st.builds(option, st.sampled_from([1, 2]), streams.names | streams.junk)
client_flags = st.sampled_from([3, 3, 3, 1, 2, 0]).map(lambda n: struct.pack(">I", n))
dialogues = st.builds(lambda flags, parts: flags + b"".join(parts), client_flags, st.lists(options, max_size=12))
known = st.sampled_from([(True, True), (True, True), (False, True), (True, False)])


@FUZZ
@given(dialogues, st.lists(st.integers(0, 20_000), max_size=30), known)
def test_events_and_output_do_not_depend_on_how_the_stream_is_split(
    stream: bytes, cuts: list[int], knows: tuple[bool, bool]
) -> None:
    whole = play([stream], Handshake(structured_replies=knows[0], meta_contexts=knows[1]))

    pieces = play(split(stream, cuts), Handshake(structured_replies=knows[0], meta_contexts=knows[1]))

    assert pieces == whole
    check(whole)


@FUZZ
@given(st.lists(haggling_options, max_size=12), known)
def test_every_option_gets_one_final_reply_in_order(parts: list[bytes], knows: tuple[bool, bool]) -> None:
    outcome = play([struct.pack(">I", 3), *parts], Handshake(structured_replies=knows[0], meta_contexts=knows[1]))
    sent = [int(struct.unpack_from(">I", part, 8)[0]) for part in parts]

    answered = check(outcome)

    assert outcome.error is None
    if Ready() in outcome.events:
        assert answered == sent[: len(answered)]
        assert answered[-1] == Option.GO
    else:
        assert answered == sent


@FUZZ
@given(st.binary(max_size=400), st.booleans(), st.lists(st.integers(0, 500), max_size=10))
def test_random_bytes_end_in_nothing_worse_than_a_protocol_error(
    noise: bytes, after_flags: bool, cuts: list[int]
) -> None:
    stream = struct.pack(">I", 3) + b"IHAVEOPT" + noise if after_flags else noise

    check(play(split(stream, cuts), Handshake()))


@FUZZ
@given(dialogues, st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_mutated_dialogues_end_in_nothing_worse_than_a_protocol_error(
    stream: bytes, changes: list[tuple[int, int]]
) -> None:
    mutant = bytearray(stream)
    for place, value in changes:
        mutant[place % len(mutant)] = value

    check(play([bytes(mutant)], Handshake()))


@FUZZ
@given(dialogues, st.integers(0, 20_000), st.integers(0, 40), streams.junk)
def test_dialogues_with_bytes_lost_and_inserted(stream: bytes, place: int, lost: int, inserted: bytes) -> None:
    at = place % (len(stream) + 1)

    check(play([stream[:at] + inserted + stream[at + lost :]], Handshake()))


@FUZZ
@given(dialogues, st.integers(0, 12))
def test_shutting_down_in_the_middle_leaves_every_option_answered(stream: bytes, after: int) -> None:
    handshake = Handshake()
    cut = min(len(stream), 4 + after * 20)
    first = play([stream[:cut]], handshake)  # takes what was left, too
    handshake.receive_data(first.left)
    ended = first.error is not None or Closed() in first.events or Ready() in first.events

    handshake.shutting_down = True
    second = play([stream[cut:]], handshake)

    check(first)
    if not ended:
        assert all(event == Closed() for event in second.events)
        final_replies(second.output)


configs = st.builds(
    lambda tls, structured, meta, offered, cuts: Config(tls, structured, meta, handshake_flags=offered, cuts=cuts),
    st.sampled_from(TlsMode),
    st.sampled_from([True, True, False]),
    st.sampled_from([True, True, False]),
    st.sampled_from([3, 3, 3, 1, 2, 0]),
    st.integers(0, 0xFFFF),
)


@FUZZ
@given(configs, dialogues | streams.spoilt(dialogues))
def test_answers_and_what_is_agreed_on_are_what_the_model_says(config: Config, stream: bytes) -> None:
    targets.handshake(config.pack() + stream)

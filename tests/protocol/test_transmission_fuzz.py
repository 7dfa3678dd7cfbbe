"""The transmission phase against clients that say anything at all, in pieces of any size."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy.protocol.constants import NbdError, TransmissionFlag
from nbdkitpy.protocol.replies import ExtendedReplies, StructuredReplies
from nbdkitpy.protocol.transmission import Request, Transmission
from tests.fuzzing.core import BUFFERS, held, transmission_of
from tests.fuzzing.effort import fuzz
from tests.fuzzing.model import Agreement, Phase, TransmissionModel, Verdict
from tests.fuzzing.streams import (
    BLOCK_STATUS,
    CACHE,
    DISC,
    FLUSH,
    FUA,
    NOISE,
    PAYLOAD_LEN,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    commands,
    request_flags,
    split,
)

FUZZ = fuzz(300)

LARGE = 256 << 10


@dataclass
class Said:
    """One request of a client, without its cookie. `choice` is the payload of a BLOCK_STATUS."""

    command: int
    flags: int
    offset: int
    length: int
    choice: bytes | None = None

    def header(self, cookie: int, extended: bool) -> bytes:
        if extended:
            return struct.pack(
                ">IHHQQQ", 0x21E41C71, self.flags, self.command, cookie, self.offset, self.header_length(True)
            )
        length = self.header_length(False) & 0xFFFFFFFF
        return struct.pack(">IHHQQI", 0x25609513, self.flags, self.command, cookie, self.offset, length)

    def header_length(self, extended: bool) -> int:
        return len(self.choice) if extended and self.choice is not None and self.flags & PAYLOAD_LEN else self.length

    def payload_length(self, extended: bool) -> int:
        if extended:
            return self.header_length(True) if self.flags & PAYLOAD_LEN or self.command == WRITE else 0
        return self.length & 0xFFFFFFFF if self.command == WRITE else 0

    def payload(self, cookie: int, extended: bool) -> bytes:
        length = self.payload_length(extended)
        if length > LARGE * 2:
            return b""  # such a request is the last one
        if extended and self.choice is not None and self.flags & PAYLOAD_LEN:
            return self.choice
        return NOISE[cookie % 997 : cookie % 997 + length]


# --- what has to come of a request, by the model ---


def verdict(said: Said, cookie: int, export: Agreement) -> Verdict | None:
    """Return what has to become of a request that is the only one; None for the end of the connection."""
    model = TransmissionModel(export)
    found = model.hear(said.header(cookie, export.extended) + said.payload(cookie, export.extended))
    assert len(found) == (model.phase is Phase.TRANSMISSION)
    return found[0] if found else None


# --- a driver ---


class Outcome(NamedTuple):
    """All that came of a stream; payloads are copies."""

    requests: list[tuple[int, tuple[int, int, int, int, bytes]]]  # cookie; command, flags, offset, length, payload
    refusals: list[tuple[int, int, int, str]]  # cookie, error, offset, message
    finished: bool
    failure: str | None
    at_boundary: bool


class Driver:
    """Plays a connection: puts bytes where they are wanted, and checks what always holds."""

    def __init__(self, transmission: Transmission, *, rests: bool = False, keeps: bool = False) -> None:
        self._transmission = transmission
        self._rests, self._keeps = rests, keeps
        self._sent = 0
        self._requests: list[tuple[int, tuple[int, int, int, int, bytes]]] = []
        self._kept: list[tuple[memoryview, bytes]] = []

    def play(self, pieces: list[bytes]) -> Outcome:
        for piece in pieces:
            left = memoryview(piece)
            while left:
                left = left[self._put(left) :]
            if self._rests:
                self._transmission.rest()
        assert all(bytes(view) == copy for view, copy in self._kept), "kept payloads do not change"
        transmission = self._transmission
        failure = transmission.failure
        return Outcome(
            self._requests,
            [(refusal.cookie, refusal.error, refusal.offset, refusal.message) for refusal in transmission.refusals],
            transmission.finished,
            None if failure is None else str(failure),
            transmission.at_boundary,
        )

    def _put(self, data: memoryview) -> int:
        room = self._transmission.buffer()
        assert len(room) > 0, "there is always room"
        room[:] = b"\xee" * len(room)  # what was there is not used again, and nothing beyond what has come
        count = min(len(room), len(data))
        room[:count] = data[:count]
        self._sent += count
        for request in self._transmission.received(count):
            self._take(request)
        assert held(self._transmission) <= BUFFERS + 4 * self._sent, "memory is bought with bytes"
        return count

    def _take(self, request: Request) -> None:
        copy = bytes(request.payload)
        if self._keeps and copy:
            self._kept.append((self._transmission.keep_payload(request.payload), copy))
        fields = (request.command, request.flags, request.offset, request.length, copy)
        self._requests.append((request.cookie, fields))


# --- what clients say ---

sizes = st.sampled_from([0, 1, 512, 4096, 1 << 20, 1 << 32, (1 << 63) - 1])
advertised = st.integers(0, 0x1FFF).map(TransmissionFlag) | st.sampled_from(
    [TransmissionFlag(number) for number in (0x1DFD, 0x1DFD, 0x1DFF, 0x0001)]  # all, all but for reading only, none
)
exports = st.builds(
    Agreement,
    sizes | st.just(1 << 20),
    advertised,
    st.sampled_from([1, 1, 1, 512, 65536]),
    st.sampled_from([1024, 65536, 200_000, 64 << 20]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
offsets = st.one_of(
    st.sampled_from([0, 0, 0, 1, 512, 4096, 1 << 16, (1 << 20) - 1, 1 << 20, (1 << 63) - 512, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
short_lengths = st.sampled_from([0, 1, 12, 511, 512, 1024, 1025, 8192, 65536]) | st.integers(0, 3000)
long_lengths = st.sampled_from([131_043, 131_044, 131_045, 131_072, 200_000, 200_001, 300_000])
contexts = st.sampled_from([b"", b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\1" * 2, b"\0\0\0"])
choices = st.builds(
    lambda effect, ids: struct.pack(">Q", effect) + ids,
    st.sampled_from([0, 1, 512, 4096, 1 << 20, (1 << 64) - 1]),
    contexts,
)
ordinary = st.builds(Said, commands, request_flags, offsets, short_lengths)
good = st.builds(  # valid for most exports
    Said,
    st.sampled_from([READ, WRITE, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS]),
    st.sampled_from([0, PAYLOAD_LEN]),
    st.sampled_from([0, 512, 65536]),
    st.sampled_from([512, 1024, 65536]),
)
large = st.builds(Said, st.just(WRITE), st.sampled_from([0, PAYLOAD_LEN, FUA | PAYLOAD_LEN]), offsets, long_lengths)
choosing = st.builds(Said, st.just(BLOCK_STATUS), st.just(PAYLOAD_LEN) | request_flags, offsets, st.just(512), choices)
flushes = st.builds(Said, st.just(FLUSH), st.sampled_from([0, FUA]), st.just(0), st.just(0))
requests = st.one_of(ordinary, ordinary, good, good, large, choosing, flushes)

huge = st.sampled_from([(1 << 28) + 1, 0xFFFFFFFF])
#: What ends a conversation: a soft disconnect, a payload too large to skip, something that is no request, or nothing.
endings = st.one_of(
    st.none(),
    st.builds(Said, st.just(DISC), request_flags.filter(lambda f: not f & PAYLOAD_LEN), offsets, st.just(0)),
    st.builds(Said, st.just(WRITE), st.just(PAYLOAD_LEN), offsets, huge),
    st.binary(min_size=32, max_size=64).map(lambda data: b"\0" + data),
)


class Conversation(NamedTuple):
    """Requests with their number as cookie, and an ending with what follows it."""

    requests: list[Said]
    ending: Said | bytes | None
    behind: bytes

    def stream(self, extended: bool) -> bytes:
        parts = [
            said.header(cookie, extended) + said.payload(cookie, extended) for cookie, said in enumerate(self.requests)
        ]
        if isinstance(self.ending, Said):
            parts.append(self.ending.header(len(self.requests), extended) + self.behind)
        elif self.ending is not None:
            parts.append(self.ending + self.behind)
        return b"".join(parts)


conversations = st.builds(Conversation, st.lists(requests, max_size=12), endings, st.binary(max_size=40))
cuttings = st.lists(st.integers(0, 1_000_000), max_size=30)


@FUZZ
@given(exports, conversations)
def test_each_request_has_the_one_outcome_that_it_should_have(export: Agreement, conversation: Conversation) -> None:
    expected = [verdict(said, cookie, export) for cookie, said in enumerate(conversation.requests)]

    outcome = Driver(transmission_of(export)).play([conversation.stream(export.extended)])

    refused = {cookie: error for cookie, error, _, _ in outcome.refusals}
    assert len(refused) == len(outcome.refusals)
    accepted = dict(outcome.requests)
    assert len(accepted) == len(outcome.requests)
    assert not refused.keys() & accepted.keys()
    assert None not in expected, "there is an ending for that"
    assert refused == {came.cookie: came.error for came in expected if came is not None and came.error}
    assert accepted == {came.cookie: came[2:] for came in expected if came is not None and not came.error}
    assert [cookie for cookie, _ in outcome.requests] == sorted(accepted)
    ending = conversation.ending
    disconnects = isinstance(ending, Said) and ending.command == DISC
    assert outcome.finished == (ending is not None)
    assert (outcome.failure is not None) == (ending is not None and not disconnects)
    assert outcome.at_boundary


@FUZZ
@given(exports, conversations, cuttings, st.booleans(), st.booleans())
def test_what_comes_out_does_not_depend_on_how_the_stream_is_split(
    export: Agreement, conversation: Conversation, cuts: list[int], rests: bool, keeps: bool
) -> None:
    stream = conversation.stream(export.extended)
    whole = Driver(transmission_of(export)).play([stream])

    pieces = Driver(transmission_of(export), rests=rests, keeps=keeps).play(split(stream, cuts))

    assert pieces == whole


@FUZZ
@given(exports, st.lists(ordinary, max_size=4), endings)
def test_byte_by_byte_is_as_good_as_at_once(export: Agreement, said: list[Said], ending: Said | bytes | None) -> None:
    stream = Conversation(said, ending, b"behind").stream(export.extended)[:4000]
    whole = Driver(transmission_of(export)).play([stream])

    pieces = Driver(transmission_of(export)).play([stream[i : i + 1] for i in range(len(stream))])

    assert pieces == whole


@FUZZ
@given(exports, conversations, cuttings, st.integers(0, 1_000_000))
def test_shutting_down_in_the_middle_leaves_each_request_with_one_outcome(
    export: Agreement, conversation: Conversation, cuts: list[int], at: int
) -> None:
    stream = Conversation(conversation.requests, None, b"").stream(export.extended)
    at %= len(stream) + 1
    transmission = transmission_of(export)
    driver = Driver(transmission)
    before = driver.play(split(stream[:at], cuts))
    answered = len(before.requests) + len(before.refusals)

    transmission.refuse_all()
    after = driver.play(split(stream[at:], cuts))

    cookies = [cookie for cookie, _ in after.requests] + [cookie for cookie, *_ in after.refusals]
    assert sorted(cookies) == list(range(len(conversation.requests)))
    errors = {cookie: error for cookie, error, _, _ in after.refusals}
    # The one that was underway may have been looked at already.
    assert all(errors[cookie] == NbdError.ESHUTDOWN for cookie in range(answered + 1, len(cookies)))
    assert after.at_boundary


@FUZZ
@given(exports, st.binary(max_size=500), st.booleans(), cuttings, st.booleans())
def test_random_bytes_end_in_nothing_worse_than_a_failure(
    export: Agreement, noise: bytes, with_magic: bool, cuts: list[int], rests: bool
) -> None:
    magic = bytes.fromhex("21e41c71" if export.extended else "25609513")
    stream = magic + noise if with_magic else noise

    outcome = Driver(transmission_of(export), rests=rests).play(split(stream, cuts))

    if outcome.failure is not None:
        assert outcome.finished
        assert outcome.failure.isprintable()


@FUZZ
@given(exports, conversations, st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=8), cuttings)
def test_mutated_conversations_end_in_nothing_worse_than_a_failure(
    export: Agreement, conversation: Conversation, changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    mutant = bytearray(conversation.stream(export.extended) or b"\0")
    for place, value in changes:
        mutant[place % len(mutant)] = value

    whole = Driver(transmission_of(export)).play([bytes(mutant)])
    pieces = Driver(transmission_of(export)).play(split(bytes(mutant), cuts))

    assert pieces == whole
    assert all(message.isprintable() and len(message) < 250 for *_, message in whole.refusals)


@FUZZ
@given(exports, conversations, st.integers(0, 5000), st.integers(0, 40), st.binary(max_size=40))
def test_conversations_with_bytes_lost_and_inserted(
    export: Agreement, conversation: Conversation, place: int, lost: int, inserted: bytes
) -> None:
    stream = conversation.stream(export.extended)
    at = place % (len(stream) + 1)

    Driver(transmission_of(export), keeps=True).play([stream[:at], inserted, stream[at + lost :]])


WRITABLE = Agreement(1 << 32, TransmissionFlag.HAS_FLAGS, extended=True)
ANNOUNCED = st.integers(1, 64 << 20) | st.sampled_from([64 << 20, 40 << 20, 2 << 20, 300_000, 131_044])
SENT = st.integers(0, len(NOISE)) | st.sampled_from([0, 1, 8192, LARGE, LARGE + 1, 300_000, len(NOISE)])


@FUZZ
@given(ANNOUNCED, SENT, cuttings, st.booleans())
def test_a_payload_that_is_announced_and_does_not_come_takes_no_memory(
    announced: int, sent: int, cuts: list[int], rests: bool
) -> None:
    header = Said(WRITE, PAYLOAD_LEN, 0, announced).header(1, extended=True)
    driver = Driver(transmission_of(WRITABLE), rests=rests)

    outcome = driver.play(split(header + NOISE[: min(sent, announced - 1)], cuts))  # looks at the memory at each step

    assert not outcome.requests
    assert not outcome.refusals
    assert not outcome.finished


@FUZZ
@given(st.lists(st.sampled_from([1, 512, 4000, 8192, 65536, 131_044, 200_000]), min_size=2, max_size=6), cuttings)
def test_payloads_that_are_kept_stay_as_they_are(lengths: list[int], cuts: list[int]) -> None:
    said = [Said(WRITE, PAYLOAD_LEN, 0, length) for length in lengths]
    driver = Driver(transmission_of(WRITABLE), keeps=True)

    outcome = driver.play(split(Conversation(said, None, b"").stream(extended=True), cuts))  # compares them at the end

    assert [request[3] for _, request in outcome.requests] == lengths


@FUZZ
@given(st.text(max_size=600), st.sampled_from(NbdError))
def test_any_text_of_an_error_becomes_a_chunk_that_clients_take(text: str, error: NbdError) -> None:
    for chunk, header in [
        (StructuredReplies().error(1, 2, error, text), 20),
        (ExtendedReplies().error(1, 2, error, text), 32),
    ]:
        number, length = struct.unpack_from(">IH", chunk, header)
        shown = chunk[header + 6 :]
        assert number == error
        assert length == len(shown) <= 4096
        assert shown.decode().isprintable()

"""The transmission phase as a dialogue: bytes that a client sends, and the requests and refusals that come of them."""

from __future__ import annotations

import mmap
import struct
import tracemalloc
from typing import NamedTuple

import pytest

from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError, TransmissionFlag
from nbdkitpy.protocol.transmission import MAX_PAYLOAD, Request, Transmission

KIB, MIB = 1 << 10, 1 << 20
SIZE = 1 * MIB
SMALL, LARGE = 8 * KIB, 256 * KIB
HELD = LARGE + 64  # what a large buffer takes
OWN = 128 * KIB  # header and payload of more than this are not kept together

ALL = TransmissionFlag(0x1FFF) & ~TransmissionFlag.READ_ONLY & ~TransmissionFlag.SEND_RESIZE
PAYLOAD_LEN = CommandFlag.PAYLOAD_LEN
RANGED = [Command.READ, Command.WRITE, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS]
KNOWN = [*RANGED, Command.FLUSH]
UNKNOWN = [8, 9, 0x100, 0x101, 0x8001, 0xFFFF]
BEYOND = dict.fromkeys(RANGED, NbdError.EINVAL) | {
    Command.WRITE: NbdError.ENOSPC,
    Command.WRITE_ZEROES: NbdError.ENOSPC,
}
NEEDS = {
    Command.FLUSH: TransmissionFlag.SEND_FLUSH,
    Command.TRIM: TransmissionFlag.SEND_TRIM,
    Command.CACHE: TransmissionFlag.SEND_CACHE,
    Command.WRITE_ZEROES: TransmissionFlag.SEND_WRITE_ZEROES,
}

FORMS = pytest.mark.parametrize("extended", [False, True], ids=["compact", "extended"])


class Outcome(NamedTuple):
    """What came of some bytes: requests with copies of their payloads, and cookies and errors of refused ones."""

    requests: list[Request]
    refused: list[tuple[int, NbdError]]


def compact(command: int, *, cookie: int = 1, flags: int = 0, offset: int = 0, length: int = 512) -> bytes:
    return bytes.fromhex("25609513") + struct.pack(">HHQQI", flags, command, cookie, offset, length)


def extended_header(command: int, *, cookie: int = 1, flags: int = 0, offset: int = 0, length: int = 512) -> bytes:
    return bytes.fromhex("21e41c71") + struct.pack(">HHQQQ", flags, command, cookie, offset, length)


def message(
    command: int, *, extended: bool, cookie: int = 1, flags: int = 0, offset: int = 0, length: int = 512
) -> bytes:
    """Return a request as it should be: a WRITE has its payload, and FLUSH no range unless one is given."""
    header = extended_header if extended else compact
    if command == Command.FLUSH and (offset, length) == (0, 512):
        length = 0
    payload = b""
    if command == Command.WRITE:
        payload = pattern(cookie, length)
        flags |= PAYLOAD_LEN if extended else 0
    return header(command, cookie=cookie, flags=flags, offset=offset, length=length) + payload


def pattern(seed: int, length: int) -> bytes:
    """Return bytes in which a piece in the wrong place shows."""
    block = b"".join(struct.pack(">HI", seed & 0xFFFF, i) for i in range(0x400))
    return (block * (length // len(block) + 1))[:length]


def chosen(effect: int, *contexts: int) -> bytes:
    """Return the payload of a BLOCK_STATUS that chooses contexts."""
    return struct.pack(f">Q{len(contexts)}I", effect, *contexts)


def transmission(
    *,
    extended: bool = False,
    size: int = SIZE,
    flags: TransmissionFlag = ALL,
    structured: bool = True,
    contexts: bool = True,
    minimum: int = 1,
    maximum: int = MAX_PAYLOAD,
) -> Transmission:
    return Transmission(
        size,
        flags,
        minimum=minimum,
        maximum=maximum,
        structured=structured,
        extended=extended,
        contexts=contexts,
    )


def pour(transmission: Transmission, data: bytes, step: int | None = None) -> Outcome:
    """Feed `data`, at most `step` bytes at a time, and return what came of it."""
    requests = []
    for at in range(0, len(data), step or max(1, len(data))):
        for batch in transmission.feed(data[at : at + step] if step else data):
            requests += [request._replace(payload=memoryview(bytes(request.payload))) for request in batch]
    return Outcome(requests, take_refusals(transmission))


def take_refusals(transmission: Transmission) -> list[tuple[int, NbdError]]:
    taken, transmission.refusals = transmission.refusals, []
    assert all(refusal.message.isprintable() for refusal in taken)
    return [(refusal.cookie, refusal.error) for refusal in taken]


def outcome_of(transmission: Transmission, *messages: bytes) -> Request | NbdError:
    """Feed one request, and then a READ, which has to come out: return what became of the former."""
    extended = messages[0][:4] == bytes.fromhex("21e41c71")
    probe = message(Command.READ, extended=extended, cookie=0xFEDCBA9876543210, offset=0, length=SMALL)

    requests, refused = pour(transmission, b"".join(messages) + probe)

    after = [request for request in requests if request.cookie == 0xFEDCBA9876543210]
    refused_after = [error for cookie, error in refused if cookie == 0xFEDCBA9876543210]
    assert len(after) + len(refused_after) == 1, "the stream is in step"
    first = [request for request in requests if request.cookie != 0xFEDCBA9876543210]
    errors = [error for cookie, error in refused if cookie != 0xFEDCBA9876543210]
    assert len(first) + len(errors) == 1, "a request has one outcome"
    assert transmission.failure is None
    assert not transmission.finished
    return (first + errors)[0]


def held(transmission: Transmission) -> int:
    """Return how many bytes its buffers have, whatever they are called, with what is kept for it."""
    values = [*vars(transmission).values(), *vars(transmission._room).values()]
    views = [value for value in values if isinstance(value, memoryview)]
    return sum({id(view.obj): len(view.obj) for view in views if isinstance(view.obj, (bytearray, mmap.mmap))}.values())


def text_of_refusal(transmission: Transmission, data: bytes) -> str:
    for _ in transmission.feed(data):
        pass
    (refusal,) = transmission.refusals
    return refusal.message


# --- requests come out as they were sent ---


@FORMS
@pytest.mark.parametrize("command", KNOWN)
def test_each_command_comes_out_with_all_its_fields(extended: bool, command: Command) -> None:
    length = 0 if command == Command.FLUSH else 0x8000
    offset = 0 if command == Command.FLUSH else 0x12345
    sent = message(command, extended=extended, cookie=0x0123456789ABCDEF, offset=offset, length=length)

    requests, refused = pour(transmission(extended=extended), sent)

    payload = pattern(0x0123456789ABCDEF, length) if command == Command.WRITE else b""
    assert requests == [Request(command, 0, 0x0123456789ABCDEF, offset, length, memoryview(payload))]
    assert not refused


@FORMS
def test_cookies_are_opaque_and_may_repeat(extended: bool) -> None:
    cookies = [0, 0, 1 << 63, (1 << 64) - 1, 0]
    sent = b"".join(message(Command.READ, extended=extended, cookie=cookie) for cookie in cookies)

    requests, _ = pour(transmission(extended=extended), sent)

    assert [request.cookie for request in requests] == cookies


@FORMS
def test_pipelined_requests_come_out_in_one_batch_and_in_order(extended: bool) -> None:
    commands = [Command.READ, Command.WRITE, Command.FLUSH, Command.READ, Command.WRITE, Command.TRIM]
    sent = b"".join(message(command, extended=extended, cookie=i) for i, command in enumerate(commands))

    (batch,) = transmission(extended=extended).feed(sent)

    assert [(request.command, request.cookie) for request in batch] == [(c, i) for i, c in enumerate(commands)]
    assert [bytes(request.payload) for request in batch if request.payload] == [pattern(1, 512), pattern(4, 512)]


@FORMS
@pytest.mark.parametrize("step", [1, 7, 27, 28, 29, 31, 32, 33, 100])
def test_requests_in_pieces_come_out_whole(extended: bool, step: int) -> None:
    sent = b"".join(message(command, extended=extended, cookie=i) for i, command in enumerate([*KNOWN, *KNOWN]))
    whole = pour(transmission(extended=extended), sent)

    pieces = pour(transmission(extended=extended), sent, step)

    assert pieces == whole
    assert len(whole.requests) == 2 * len(KNOWN)


@FORMS
def test_nothing_comes_out_before_the_last_byte(extended: bool) -> None:
    receiver = transmission(extended=extended)
    sent = message(Command.WRITE, extended=extended)

    before, after = pour(receiver, sent[:-1], 1), pour(receiver, sent[-1:])

    assert before == ([], [])
    assert len(after.requests) == 1


@FORMS
@pytest.mark.parametrize("length", [512, OWN + 1], ids=["small", "landing"])
@pytest.mark.parametrize("offset", [0, SIZE], ids=["accepted", "refused"])
def test_at_boundary_tells_whether_a_request_is_cut_off(extended: bool, length: int, offset: int) -> None:
    receiver = transmission(extended=extended)
    assert receiver.at_boundary
    sent = message(Command.WRITE, extended=extended, offset=offset, length=length)

    for at in (0, 27, 32, 33, len(sent) - 2):
        fresh = transmission(extended=extended)
        pour(fresh, sent[: at + 1])
        assert not fresh.at_boundary
    pour(receiver, sent)

    assert receiver.at_boundary


# --- commands and flags ---


@FORMS
@pytest.mark.parametrize("command", UNKNOWN)
@pytest.mark.parametrize("flags", [0, 1, 0x20, 0xFFDF])
def test_R5_an_unknown_command_is_refused_and_has_no_payload_of_its_own(
    extended: bool, command: int, flags: int
) -> None:
    payload = bytes(512) if extended and flags & PAYLOAD_LEN else b""
    sent = message(command, extended=extended, flags=flags)

    assert outcome_of(transmission(extended=extended), sent, payload) == NbdError.EINVAL


def flag_is_for(command: int, flag: int, advertised: TransmissionFlag) -> bool:
    """Say what "Command flags" does of a flag, for a command that is advertised."""
    return {
        CommandFlag.FUA: bool(advertised & TransmissionFlag.SEND_FUA),
        CommandFlag.NO_HOLE: command == Command.WRITE_ZEROES,
        CommandFlag.DF: command == Command.READ and bool(advertised & TransmissionFlag.SEND_DF),
        CommandFlag.REQ_ONE: command == Command.BLOCK_STATUS,
        CommandFlag.FAST_ZERO: command == Command.WRITE_ZEROES and bool(advertised & TransmissionFlag.SEND_FAST_ZERO),
    }.get(CommandFlag(flag), False)


@pytest.mark.parametrize(
    ("extended", "flag"),
    # With extended headers PAYLOAD_LEN decides what follows: it has tests of its own.
    [(extended, 1 << bit) for extended in (False, True) for bit in range(16) if not (extended and bit == 5)],
)
@pytest.mark.parametrize("command", KNOWN)
def test_R5_each_flag_is_accepted_where_it_is_valid_and_advertised(extended: bool, flag: int, command: Command) -> None:
    advertisements = [
        ALL,
        TransmissionFlag.HAS_FLAGS | NEEDS.get(command, TransmissionFlag(0)),
        ALL & ~TransmissionFlag.SEND_FUA,
        ALL & ~TransmissionFlag.SEND_DF,
        ALL & ~TransmissionFlag.SEND_FAST_ZERO,
        ALL & ~NEEDS.get(command, TransmissionFlag(0)),
    ]

    for advertised in advertisements:
        sent = message(command, extended=extended, flags=flag)
        came_of_it = outcome_of(transmission(extended=extended, flags=advertised), sent)

        supported = not NEEDS.get(command, TransmissionFlag(0)) & ~advertised
        if supported and flag_is_for(command, flag, advertised):
            assert isinstance(came_of_it, Request), advertised
            assert (came_of_it.command, came_of_it.flags) == (command, flag)
        else:
            assert came_of_it == NbdError.EINVAL, advertised


@FORMS
@pytest.mark.parametrize("command", KNOWN)
def test_valid_flags_go_together_and_one_wrong_one_spoils_them(extended: bool, command: Command) -> None:
    valid = sum(1 << bit for bit in range(16) if flag_is_for(command, 1 << bit, ALL))

    accepted = outcome_of(transmission(extended=extended), message(command, extended=extended, flags=valid))
    spoilt = outcome_of(transmission(extended=extended), message(command, extended=extended, flags=valid | 0x8000))

    assert isinstance(accepted, Request)
    assert accepted.flags == valid
    assert spoilt == NbdError.EINVAL


@FORMS
@pytest.mark.parametrize(("command", "flag"), NEEDS.items())
def test_a_command_that_was_not_advertised_is_refused(extended: bool, command: Command, flag: TransmissionFlag) -> None:
    sent = message(command, extended=extended)

    assert isinstance(outcome_of(transmission(extended=extended), sent), Request)
    assert outcome_of(transmission(extended=extended, flags=ALL & ~flag), sent) == NbdError.EINVAL


@FORMS
def test_read_and_write_need_nothing_advertised(extended: bool) -> None:
    for command in (Command.READ, Command.WRITE):
        receiver = transmission(extended=extended, flags=TransmissionFlag.HAS_FLAGS)

        assert isinstance(outcome_of(receiver, message(command, extended=extended)), Request)


@FORMS
def test_block_status_needs_a_selected_context(extended: bool) -> None:
    sent = message(Command.BLOCK_STATUS, extended=extended)

    assert isinstance(outcome_of(transmission(extended=extended), sent), Request)
    assert outcome_of(transmission(extended=extended, contexts=False), sent) == NbdError.EINVAL


# --- ranges ---

HUGE = (1 << 63) - 1
RANGES = [
    (0, 1, True),
    (0, SIZE, True),
    (SIZE - 1, 1, True),
    (1, SIZE - 1, True),
    (0, 0, False),
    (SIZE, 0, False),
    (SIZE - 1, 2, False),
    (SIZE, 1, False),
    (SIZE + 1, 1, False),
    (1, SIZE, False),
    (0, SIZE + 1, False),
    (0, 0xFFFFFFFF, False),
    (SIZE - 1, 0xFFFFFFFF, False),
    (1 << 31, 1, False),
    ((1 << 32) - 1, 1, False),
    (1 << 32, 1, False),
    ((1 << 63) - 1, 1, False),
    (1 << 63, 1, False),
    ((1 << 63) + 512, 512, False),
    ((1 << 64) - 1, 1, False),
    ((1 << 64) - 1, 2, False),
    ((1 << 64) - 512, 512, False),
    ((1 << 64) - 512, 513, False),
    ((1 << 64) - 1, 0, False),
    ((1 << 64) - 1, 0xFFFFFFFF, False),
]
LONG_RANGES = [  # outside, with 64-bit lengths
    (0, 1 << 32),
    (0, (1 << 63) - 1),
    (0, 1 << 63),
    (0, (1 << 64) - 1),
    (1, (1 << 64) - 1),
    (SIZE, (1 << 64) - SIZE),
    ((1 << 64) - 1, (1 << 64) - 1),
]
WITHOUT_PAYLOAD = [command for command in RANGED if command != Command.WRITE]


@FORMS
@pytest.mark.parametrize(
    ("command", "offset", "length", "inside"),
    # The payload of a WRITE of 4 GiB would have to follow.
    [(c, *a_range) for c in RANGED for a_range in RANGES if not (c == Command.WRITE and a_range[1] == 0xFFFFFFFF)],
)
def test_R1_a_range_is_served_only_if_it_lies_within_the_export(
    extended: bool, command: Command, offset: int, length: int, inside: bool
) -> None:
    sent = message(command, extended=extended, offset=offset, length=length)

    came_of_it = outcome_of(transmission(extended=extended), sent)

    if inside:
        assert isinstance(came_of_it, Request)
        assert (came_of_it.offset, came_of_it.length) == (offset, length)
    else:
        assert came_of_it == BEYOND[command]


@pytest.mark.parametrize("command", WITHOUT_PAYLOAD)
@pytest.mark.parametrize(("offset", "length"), LONG_RANGES)
def test_R1_a_64_bit_range_outside_the_export_is_refused(command: Command, offset: int, length: int) -> None:
    sent = extended_header(command, offset=offset, length=length)

    assert outcome_of(transmission(extended=True), sent) == BEYOND[command]


@FORMS
@pytest.mark.parametrize("command", RANGED)
def test_R1_the_end_of_the_largest_export_is_the_end(extended: bool, command: Command) -> None:
    last = message(command, extended=extended, offset=HUGE - 512)
    beyond = message(command, extended=extended, offset=HUGE - 511)

    assert isinstance(outcome_of(transmission(extended=extended, size=HUGE), last), Request)
    assert outcome_of(transmission(extended=extended, size=HUGE), beyond) == BEYOND[command]


@FORMS
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (1, 0), (512, 512), ((1 << 64) - 1, 0xFFFFFFFF)])
def test_flush_takes_no_range(extended: bool, offset: int, length: int) -> None:
    sent = message(Command.FLUSH, extended=extended, offset=offset, length=length)

    assert outcome_of(transmission(extended=extended), sent) == NbdError.EINVAL


@pytest.mark.parametrize("command", RANGED)
def test_nothing_of_an_empty_export_can_be_had(command: Command) -> None:
    assert pour(transmission(size=0), message(command, extended=False)) == ([], [(1, BEYOND[command])])


@FORMS
@pytest.mark.parametrize("command", RANGED)
@pytest.mark.parametrize(
    ("offset", "length", "aligned"),
    [(0, 512, True), (512, 1024, True), (1, 512, False), (511, 1, False), (0, 511, False), (512, 513, False)],
)
def test_the_minimum_block_size_is_enforced(
    extended: bool, command: Command, offset: int, length: int, aligned: bool
) -> None:
    sent = message(command, extended=extended, offset=offset, length=length)

    came_of_it = outcome_of(transmission(extended=extended, minimum=512), sent)

    assert isinstance(came_of_it, Request) if aligned else came_of_it == NbdError.EINVAL


@pytest.mark.parametrize("command", [Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS])
def test_commands_without_data_may_be_longer_than_the_maximum(command: Command) -> None:
    for extended, length in [(False, 0xFFFFFFFF), (True, 0xFFFFFFFF), (True, 1 << 32), (True, HUGE)]:
        receiver = transmission(extended=extended, size=HUGE, maximum=64 * KIB)

        assert isinstance(outcome_of(receiver, message(command, extended=extended, length=length)), Request)


# --- read-only exports ---


@FORMS
@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, 1, 2, 4, 8, 16, 31, 0xFFDF])
def test_R2_nothing_is_written_to_a_read_only_export(extended: bool, command: Command, flags: int) -> None:
    for offset, length in [(0, 512), (SIZE, 512), (0, 0), (1, 3), ((1 << 64) - 1, 512)]:
        receiver = transmission(extended=extended, flags=ALL | TransmissionFlag.READ_ONLY, minimum=512)
        sent = message(command, extended=extended, flags=flags, offset=offset, length=length)

        assert outcome_of(receiver, sent) == NbdError.EPERM


@FORMS
@pytest.mark.parametrize("command", [Command.READ, Command.FLUSH, Command.CACHE, Command.BLOCK_STATUS])
def test_a_read_only_export_takes_what_does_not_write(extended: bool, command: Command) -> None:
    receiver = transmission(extended=extended, flags=ALL | TransmissionFlag.READ_ONLY)

    assert isinstance(outcome_of(receiver, message(command, extended=extended)), Request)


# --- refused writes stay in step ---


@FORMS
@pytest.mark.parametrize("step", [None, 1, 30, 1000])
@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("range", NbdError.ENOSPC),
        ("read-only", NbdError.EPERM),
        ("flags", NbdError.EINVAL),
        ("fua", NbdError.EINVAL),
        ("alignment", NbdError.EINVAL),
        ("too large", NbdError.EINVAL),
        ("shutdown", NbdError.ESHUTDOWN),
    ],
)
def test_R3_the_payload_of_a_refused_write_is_consumed(
    extended: bool, step: int | None, case: str, error: NbdError
) -> None:
    length = 3000
    receiver = transmission(
        extended=extended,
        flags={"read-only": ALL | TransmissionFlag.READ_ONLY, "fua": ALL & ~TransmissionFlag.SEND_FUA}.get(case, ALL),
        minimum=1024 if case == "alignment" else 1,
        maximum=2999 if case == "too large" else MAX_PAYLOAD,
    )
    if case == "shutdown":
        receiver.refuse_all()
    sent = message(
        Command.WRITE,
        extended=extended,
        cookie=7,
        length=length,
        offset=SIZE - 2999 if case == "range" else 0,
        flags={"flags": 0x80, "fua": 1}.get(case, 0),
    )
    # What is in the payload looks like a request.
    disguise = message(Command.DISC, extended=extended) * 200
    sent = sent[:-length] + disguise[:length]
    probe = message(Command.READ, extended=extended, cookie=8)

    requests, refused = pour(receiver, sent + probe, step)

    assert refused[0] == (7, error)
    assert [r.cookie for r in requests] + [cookie for cookie, _ in refused[1:]] == [8]
    assert not receiver.finished


@FORMS
def test_a_refused_write_is_answered_when_its_payload_is_gone(extended: bool) -> None:
    receiver = transmission(extended=extended)
    sent = message(Command.WRITE, extended=extended, offset=SIZE)

    assert pour(receiver, sent[:-1]) == ([], [])
    assert pour(receiver, sent[-1:]) == ([], [(1, NbdError.ENOSPC)])


def test_a_refused_request_that_is_no_write_has_no_payload() -> None:
    for command in (Command.READ, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES, Command.BLOCK_STATUS, 9):
        sent = compact(command, offset=SIZE, length=0x8000)

        assert isinstance(outcome_of(transmission(), sent), NbdError)


# --- huge lengths ---


@pytest.mark.parametrize("length", [33 * MIB, MAX_PAYLOAD - 1, MAX_PAYLOAD])
def test_reads_up_to_64_mib_are_served(length: int) -> None:
    for extended in (False, True):
        sent = message(Command.READ, extended=extended, length=length)

        assert isinstance(outcome_of(transmission(extended=extended, size=HUGE), sent), Request)


@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 2 * MAX_PAYLOAD, 1 << 31, 0xFFFFFFFF])
def test_longer_reads_are_refused_as_the_form_of_replies_asks(length: int) -> None:
    sent = compact(Command.READ, length=length)
    sent_extended = extended_header(Command.READ, length=length << 30)

    assert outcome_of(transmission(size=HUGE, structured=False), sent) == NbdError.EINVAL
    assert outcome_of(transmission(size=HUGE), sent) == NbdError.EOVERFLOW
    assert outcome_of(transmission(size=HUGE, extended=True, structured=False), sent_extended) == NbdError.EOVERFLOW


def test_df_changes_nothing_about_the_maximum() -> None:
    receiver = transmission(maximum=64 * KIB)

    assert isinstance(outcome_of(receiver, compact(Command.READ, flags=CommandFlag.DF, length=64 * KIB)), Request)
    too_long = compact(Command.READ, flags=CommandFlag.DF, length=64 * KIB + 1)
    assert outcome_of(receiver, too_long) == NbdError.EOVERFLOW


@FORMS
def test_the_maximum_of_the_export_holds_for_reads_and_writes(extended: bool) -> None:
    for command, error in [(Command.READ, NbdError.EOVERFLOW), (Command.WRITE, NbdError.EINVAL)]:
        at_most, longer = (message(command, extended=extended, length=n) for n in (4 * KIB, 4 * KIB + 1))

        assert isinstance(outcome_of(transmission(extended=extended, maximum=4 * KIB), at_most), Request)
        assert outcome_of(transmission(extended=extended, maximum=4 * KIB), longer) == error


@pytest.mark.parametrize("maximum", [MAX_PAYLOAD, 0xFFFFFFFF])
def test_no_maximum_is_larger_than_64_mib(maximum: int) -> None:
    sent = compact(Command.READ, length=MAX_PAYLOAD + 1)

    assert outcome_of(transmission(size=HUGE, maximum=maximum), sent) == NbdError.EOVERFLOW


@FORMS
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 2 * MAX_PAYLOAD])
def test_R4_a_write_of_up_to_128_mib_is_skipped_in_small_buffers(extended: bool, length: int) -> None:
    receiver = transmission(extended=extended, size=HUGE)
    piece = bytes(4 * MIB)
    sent = message(Command.WRITE, extended=extended, cookie=5, length=0)
    sent = sent[:-8] + struct.pack(">Q", length) if extended else sent[:-4] + struct.pack(">I", length)

    outcome = pour(receiver, sent)
    for _ in range(length // len(piece)):
        assert outcome == ([], [])
        outcome = pour(receiver, piece)
        assert held(receiver) <= HELD
    if length % len(piece):
        assert outcome == ([], [])
        outcome = pour(receiver, bytes(length % len(piece)))

    assert outcome == ([], [(5, NbdError.EINVAL)])
    assert receiver.at_boundary
    assert isinstance(outcome_of(receiver, message(Command.READ, extended=extended)), Request)


@pytest.mark.parametrize(
    "sent",
    [
        compact(Command.WRITE, length=2 * MAX_PAYLOAD + 1),
        compact(Command.WRITE, length=0xFFFFFFFF),
        extended_header(Command.WRITE, flags=PAYLOAD_LEN, length=2 * MAX_PAYLOAD + 1),
        extended_header(Command.WRITE, flags=PAYLOAD_LEN, length=(1 << 64) - 1),
        extended_header(Command.READ, flags=PAYLOAD_LEN, length=2 * MAX_PAYLOAD + 1),
        extended_header(Command.BLOCK_STATUS, flags=PAYLOAD_LEN, length=(1 << 64) - 1),
        extended_header(99, flags=PAYLOAD_LEN, length=1 << 63),
    ],
)
def test_R4_a_payload_that_is_larger_still_ends_the_connection(sent: bytes) -> None:
    extended = sent[:4] == bytes.fromhex("21e41c71")
    receiver = transmission(extended=extended, size=HUGE)

    outcome = pour(receiver, message(Command.READ, extended=extended, cookie=3) + sent)

    assert [request.cookie for request in outcome.requests] == [3]
    assert outcome.refused == []
    assert receiver.finished
    assert "too large to be skipped" in str(receiver.failure)


@FORMS
def test_R4_lengths_that_are_only_announced_allocate_nothing(extended: bool) -> None:
    receivers = [transmission(extended=extended, size=HUGE) for _ in range(5)]
    pour(receivers[0], message(Command.READ, extended=extended))  # whatever is made at the first use
    header = extended_header if extended else compact
    flags = PAYLOAD_LEN if extended else 0

    tracemalloc.start()
    try:
        for receiver, length in zip(receivers, [33 * MIB, MAX_PAYLOAD, MAX_PAYLOAD + 1, 2 * MAX_PAYLOAD, 0xFFFFFFFF]):
            pour(receiver, header(Command.WRITE, flags=flags, length=length))
            if not receiver.finished:
                assert len(receiver.buffer()) <= LARGE
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 5 * 2 * LARGE
    assert all(held(receiver) <= 2 * LARGE for receiver in receivers)


# --- extended headers ---


@pytest.mark.parametrize("extended", [False, True])
def test_the_other_forms_magic_is_a_violation(extended: bool) -> None:
    receiver = transmission(extended=extended)

    pour(receiver, message(Command.READ, extended=not extended) * 2)

    assert receiver.failure is not None


def test_an_extended_write_comes_out_without_payload_len() -> None:
    for length in (512, OWN - 32, OWN, 2 * LARGE):
        for step in (None, 50_000):
            sent = message(Command.WRITE, extended=True, length=length, flags=CommandFlag.FUA)

            (request,), _ = pour(transmission(extended=True), sent, step)

            assert request.flags == CommandFlag.FUA
            assert request.payload == pattern(1, length)


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
@pytest.mark.parametrize("length", [512, OWN, 2 * LARGE])
def test_an_extended_write_without_payload_len_has_its_payload_all_the_same(flags: int, length: int) -> None:
    sent = extended_header(Command.WRITE, flags=flags, length=length) + pattern(1, length)  # as qemu 10 sends it

    (request,), _ = pour(transmission(extended=True), sent)

    assert (request.flags, request.length) == (flags, length)
    assert request.payload == pattern(1, length)


def test_an_extended_write_with_an_empty_payload_is_refused() -> None:
    sent = extended_header(Command.WRITE, flags=PAYLOAD_LEN, length=0)

    assert outcome_of(transmission(extended=True), sent) == NbdError.ENOSPC


@pytest.mark.parametrize("command", [*WITHOUT_PAYLOAD, Command.FLUSH, *UNKNOWN])
@pytest.mark.parametrize("length", [0, 1, 12, 16, 512, LARGE])
def test_a_payload_where_none_belongs_is_consumed_and_refused(command: int, length: int) -> None:
    receiver = transmission(extended=True, flags=ALL & ~TransmissionFlag.BLOCK_STATUS_PAYLOAD)
    sent = extended_header(command, flags=PAYLOAD_LEN, length=length)

    assert outcome_of(receiver, sent, bytes(length)) == NbdError.EINVAL


@pytest.mark.parametrize("command", [*KNOWN, *UNKNOWN])
def test_payload_len_means_nothing_with_compact_headers(command: int) -> None:
    sent = message(command, extended=False, flags=PAYLOAD_LEN)

    assert outcome_of(transmission(), sent) == NbdError.EINVAL


@pytest.mark.parametrize("flags", [0, CommandFlag.REQ_ONE, CommandFlag.FUA])
@pytest.mark.parametrize(("offset", "effect"), [(0, SIZE), (1, 1), (SIZE - 1, 1)])
def test_block_status_may_choose_the_one_context(flags: int, offset: int, effect: int) -> None:
    header = extended_header(Command.BLOCK_STATUS, flags=flags | PAYLOAD_LEN, offset=offset, length=12)

    request = outcome_of(transmission(extended=True), header, chosen(effect, 1))

    assert request == Request(Command.BLOCK_STATUS, flags, 1, offset, effect, memoryview(b""))


@pytest.mark.parametrize(
    ("payload", "offset"),
    [
        (chosen(512), 0),
        (chosen(512, 0), 0),
        (chosen(512, 2), 0),
        (chosen(512, 0xFFFFFFFF), 0),
        (chosen(512, 1, 1), 0),
        (chosen(512, 1, 2), 0),
        (chosen(512, *range(1000)), 0),
        (chosen(512, 1)[:-1], 0),
        (chosen(512, 1) + b"\0", 0),
        (b"", 0),
        (b"\1", 0),
        (chosen(0, 1), 0),
        (chosen(SIZE + 1, 1), 0),
        (chosen(SIZE, 1), 1),
        (chosen(1, 1), SIZE),
        (chosen((1 << 64) - 1, 1), 0),
        (chosen((1 << 64) - 1, 1), 1),
        (chosen(1, 1), (1 << 64) - 1),
    ],
)
@pytest.mark.parametrize("step", [None, 1])
def test_block_status_with_any_other_payload_is_refused(payload: bytes, offset: int, step: int | None) -> None:
    header = extended_header(Command.BLOCK_STATUS, flags=PAYLOAD_LEN, cookie=5, offset=offset, length=len(payload))
    probe = extended_header(Command.READ, cookie=6)

    requests, refused = pour(transmission(extended=True), header + payload + probe, step)

    assert refused == [(5, NbdError.EINVAL)]
    assert [request.cookie for request in requests] == [6]


def test_block_status_that_chooses_is_held_to_all_other_rules() -> None:
    def choose(receiver: Transmission, flags: int = 0, offset: int = 0, effect: int = 512) -> Request | NbdError:
        header = extended_header(Command.BLOCK_STATUS, flags=PAYLOAD_LEN | flags, offset=offset, length=12)
        return outcome_of(receiver, header, chosen(effect, 1))

    usual, blocks = transmission(extended=True), transmission(extended=True, minimum=512)
    without_fua = transmission(extended=True, flags=ALL & ~TransmissionFlag.SEND_FUA)

    assert isinstance(choose(usual), Request)
    assert isinstance(choose(blocks), Request), "the length of the payload need not be aligned"
    assert choose(transmission(extended=True, contexts=False)) == NbdError.EINVAL
    assert choose(usual, flags=CommandFlag.DF) == NbdError.EINVAL
    assert choose(without_fua, flags=CommandFlag.FUA) == NbdError.EINVAL
    assert choose(blocks, offset=1) == NbdError.EINVAL
    assert choose(blocks, effect=511) == NbdError.EINVAL


def test_the_refusal_of_a_choice_names_the_range_that_was_asked_about() -> None:
    header = extended_header(Command.BLOCK_STATUS, flags=PAYLOAD_LEN, offset=4096, length=12)

    message = text_of_refusal(transmission(extended=True), header + chosen(77, 9))

    assert message == "BLOCK_STATUS (flags 0x0, offset 4096, length 77): context 9 was not negotiated"


# --- the end ---


@FORMS
@pytest.mark.parametrize(("flags", "offset", "length"), [(0, 0, 0), (1, 2, 3), (0xFFFF, (1 << 64) - 1, 0xFFFFFFFF)])
def test_disc_ends_whatever_its_fields_are_and_what_is_behind_it_is_ignored(
    extended: bool, flags: int, offset: int, length: int
) -> None:
    receiver = transmission(extended=extended)
    header = extended_header if extended else compact
    before = message(Command.WRITE, extended=extended, cookie=1) + message(9, extended=extended, cookie=2)
    disc = header(Command.DISC, flags=flags, offset=offset, length=length)
    behind = message(Command.READ, extended=extended, cookie=3) + bytes(100)

    requests, refused = pour(receiver, before + disc + behind)

    assert [request.cookie for request in requests] == [1]
    assert refused == [(2, NbdError.EINVAL)]
    assert receiver.finished
    assert receiver.failure is None


@FORMS
@pytest.mark.parametrize("step", [None, 1, 33])
def test_a_wrong_magic_ends_after_the_requests_before_it(extended: bool, step: int | None) -> None:
    receiver = transmission(extended=extended)
    good = message(Command.READ, extended=extended, cookie=1) + message(Command.WRITE, extended=extended, cookie=2)
    refused = message(9, extended=extended, cookie=3)
    bad = b"\x25\x60\x95\x14" + message(Command.READ, extended=extended, cookie=4)[4:]
    behind = message(Command.READ, extended=extended, cookie=5)

    outcome = pour(receiver, good + refused + bad + behind, step)

    assert [request.cookie for request in outcome.requests] == [1, 2]
    assert outcome.refused == [(3, NbdError.EINVAL)]
    assert receiver.finished
    expected = "0x21e41c71" if extended else "0x25609513"
    assert str(receiver.failure) == f"request magic is 0x25609514, not {expected}"


@FORMS
@pytest.mark.parametrize("end", ["DISC", "violation"])
def test_any_amount_behind_the_end_is_ignored_within_small_buffers(extended: bool, end: str) -> None:
    receiver = transmission(extended=extended)
    last = message(Command.DISC, extended=extended) if end == "DISC" else bytes(32)

    for data in (last + bytes(MIB), message(Command.READ, extended=extended) * 20_000):
        assert pour(receiver, data) == ([], [])
        assert len(receiver.buffer()) > 0

    assert held(receiver) <= HELD
    assert receiver.finished
    assert (receiver.failure is None) == (end == "DISC")


# --- shutting down ---


@FORMS
def test_everything_after_refuse_all_is_refused_with_eshutdown(extended: bool) -> None:
    receiver = transmission(extended=extended)
    before = pour(receiver, message(Command.READ, extended=extended, cookie=0))
    commands = [Command.READ, Command.WRITE, *KNOWN, *UNKNOWN]

    receiver.refuse_all()
    sent = b"".join(message(command, extended=extended, cookie=i) for i, command in enumerate(commands))
    after = pour(receiver, sent + message(Command.WRITE, extended=extended, offset=SIZE, cookie=99), 50)

    assert len(before.requests) == 1
    expected = [*range(len(commands)), 99]
    assert after == ([], [(cookie, NbdError.ESHUTDOWN) for cookie in expected])


def test_a_choosing_block_status_is_refused_while_shutting_down() -> None:
    receiver = transmission(extended=True)
    sent = extended_header(Command.BLOCK_STATUS, flags=PAYLOAD_LEN, length=12) + chosen(512, 1)
    pour(receiver, sent[:40])

    receiver.refuse_all()
    outcome = pour(receiver, sent[40:] + sent)

    assert outcome == ([], [(1, NbdError.ESHUTDOWN)] * 2)


@FORMS
@pytest.mark.parametrize("length", [5000, OWN])
def test_a_write_whose_payload_is_underway_at_shutdown_has_one_outcome(extended: bool, length: int) -> None:
    receiver = transmission(extended=extended)
    sent = message(Command.WRITE, extended=extended, length=length)
    probe = message(Command.READ, extended=extended, cookie=2)
    pour(receiver, sent[:4000])

    receiver.refuse_all()
    requests, refused = pour(receiver, sent[4000:] + probe)

    assert [request.cookie for request in requests] + [cookie for cookie, _ in refused] == [1, 2]
    assert all(error == NbdError.ESHUTDOWN for _, error in refused)
    assert refused[-1][0] == 2
    assert all(request.payload == pattern(1, length) for request in requests)


def test_disc_still_ends_while_shutting_down() -> None:
    receiver = transmission()
    receiver.refuse_all()

    assert pour(receiver, compact(Command.DISC)) == ([], [])

    assert receiver.finished
    assert receiver.failure is None


# --- payloads ---

BOUNDARIES = [SMALL, 16 * KIB, OWN, LARGE, 2 * LARGE, 4 * LARGE]
LENGTHS = sorted({n + d for n in BOUNDARIES for d in (-33, -32, -29, -28, -27, -1, 0, 1)})


@FORMS
@pytest.mark.parametrize("length", LENGTHS)
def test_payloads_of_sizes_around_those_of_the_buffers_arrive_unharmed(extended: bool, length: int) -> None:
    first, second = (message(Command.WRITE, extended=extended, cookie=i, length=length) for i in (1, 2))
    between = message(Command.READ, extended=extended, cookie=3)

    for step in (None, 4093, LARGE):
        requests, refused = pour(transmission(extended=extended, size=HUGE), first + between + second + between, step)

        assert not refused
        assert [request.cookie for request in requests] == [1, 3, 2, 3]
        assert requests[0].payload == pattern(1, length)
        assert requests[2].payload == pattern(2, length)


@pytest.mark.parametrize("length", [MAX_PAYLOAD - 1, MAX_PAYLOAD])
def test_the_largest_payload_arrives_unharmed(length: int) -> None:
    receiver = transmission(size=HUGE)
    sent = pattern(1, length)

    (request,), _ = pour(receiver, compact(Command.WRITE, length=length) + sent)

    assert request.payload == sent
    assert isinstance(outcome_of(receiver, compact(Command.WRITE) + bytes(512)), Request)


def receive(receiver: Transmission, data: bytes) -> list[Request]:
    """Feed `data` and return the requests as they are, with payloads that will not stay valid."""
    return [request for batch in receiver.feed(data) for request in batch]


@FORMS
@pytest.mark.parametrize("length", [1, 512, SMALL, OWN - 32, OWN, LARGE, 3 * LARGE])
def test_a_kept_payload_does_not_change_when_more_arrives(extended: bool, length: int) -> None:
    receiver = transmission(extended=extended, size=HUGE)
    kept = []

    for i in range(4):
        (request,) = receive(receiver, message(Command.WRITE, extended=extended, cookie=i, length=length))
        kept.append(receiver.keep_payload(request.payload))
        receive(receiver, message(Command.WRITE, extended=extended, cookie=100, length=length))
        receiver.rest()

    assert [bytes(payload) for payload in kept] == [pattern(i, length) for i in range(4)]


def test_several_payloads_of_one_batch_can_be_kept() -> None:
    receiver = transmission()
    requests = receive(receiver, b"".join(message(Command.WRITE, extended=False, cookie=i) for i in range(8)))

    kept = [receiver.keep_payload(request.payload) for request in requests]
    receive(receiver, bytes(8) * 10_000)

    assert [bytes(payload) for payload in kept] == [pattern(i, 512) for i in range(8)]


def test_a_large_payload_is_kept_without_a_copy() -> None:
    receiver = transmission(size=HUGE)
    (request,) = receive(receiver, message(Command.WRITE, extended=False, length=2 * LARGE))

    assert receiver.keep_payload(request.payload) is request.payload


def test_a_kept_payload_holds_little_more_memory_than_its_length() -> None:
    receiver = transmission(size=HUGE)
    kept = []

    for i in range(3):
        receive(receiver, message(Command.WRITE, extended=False, length=8 * MIB))  # done at once: leaves its buffer
        (request,) = receive(receiver, message(Command.WRITE, extended=False, cookie=i, length=LARGE))
        kept.append(receiver.keep_payload(request.payload))

    assert [bytes(payload) for payload in kept] == [pattern(i, LARGE) for i in range(3)]
    assert all(len(memoryview(payload.obj)) <= 2 * LARGE for payload in kept)


def test_large_payloads_land_in_the_same_buffer_again() -> None:
    receiver = transmission(size=HUGE)
    (first,) = receive(receiver, message(Command.WRITE, extended=False, length=4 * LARGE))
    (second,) = receive(receiver, message(Command.WRITE, extended=False, length=4 * LARGE))

    assert first.payload.obj is second.payload.obj


def test_after_a_large_payload_the_next_one_lands_without_a_detour() -> None:
    receiver = transmission(size=HUGE)
    receive(receiver, compact(Command.READ) * 100_000)  # now the buffer is large
    receive(receiver, message(Command.WRITE, extended=False, length=LARGE))

    assert len(receiver.buffer()) == 28
    put(receiver, compact(Command.WRITE, length=LARGE))
    assert receiver.buffer().obj is not receiver._view.obj
    put(receiver, bytes(LARGE))
    put(receiver, compact(Command.READ))

    assert len(receiver.buffer()) == LARGE, "it was not of the same kind"


# --- memory ---


def test_a_quiet_connection_has_a_small_buffer() -> None:
    receiver = transmission()

    assert len(receiver.buffer()) == SMALL
    assert held(receiver) == SMALL


def test_the_buffer_grows_while_the_client_fills_it_and_only_to_its_limit() -> None:
    receiver = transmission()
    sizes = []

    for _ in range(10):
        room = receiver.buffer()
        sizes.append(len(room))
        whole = compact(Command.READ) * (len(room) // 28 + 1)
        room[:] = whole[: len(room)]
        receiver.received(len(room))
        receive(receiver, whole[len(room) :])  # the rest of the last request

    assert sizes[0] == SMALL
    assert max(sizes) == LARGE
    assert sizes == sorted(sizes)
    assert receiver.failure is None


def test_the_buffer_stays_small_for_a_client_that_does_not_fill_it() -> None:
    receiver = transmission()

    receive(receiver, compact(Command.READ) * 100)
    for _ in range(1000):
        receive(receiver, compact(Command.READ))

    assert held(receiver) == SMALL


def put(receiver: Transmission, data: bytes) -> list[Request]:
    """Feed `data` in one step; there has to be room for it."""
    room = receiver.buffer()
    room[: len(data)] = data
    return receiver.received(len(data))


def test_there_is_always_room_for_the_rest_of_what_has_begun() -> None:
    for begun in range(1, 28):
        receiver = transmission()

        put(receiver, compact(Command.READ) * 292 + compact(Command.READ)[:begun][: SMALL - 292 * 28])
        assert len(receiver.buffer()) >= 28 - begun

    receiver = transmission()
    put(receiver, compact(Command.READ) * 200 + compact(Command.WRITE, length=SMALL - 28))
    assert len(receiver.buffer()) >= SMALL - 28


def test_a_payload_may_be_held_on_to_while_the_next_one_lands() -> None:
    receiver = transmission(size=HUGE)
    receive(receiver, compact(Command.READ) * 100_000)  # now the buffer is large
    put(receiver, compact(Command.WRITE, length=OWN))
    (first,) = put(receiver, pattern(1, OWN))

    (second,) = receive(receiver, message(Command.WRITE, extended=False, cookie=2, length=LARGE))

    assert second.payload == pattern(2, LARGE)
    assert len(first.payload) == OWN, "it is another's by now, but a reference to it does no harm"


def test_rest_gives_memory_back() -> None:
    receiver = transmission(size=HUGE)
    receive(receiver, compact(Command.READ) * 100_000)
    (small,) = [*receive(receiver, compact(Command.WRITE, length=OWN - 28)), *receive(receiver, bytes(OWN - 28))]
    assert len(small.payload) == OWN - 28
    receive(receiver, message(Command.WRITE, extended=False, length=4 * LARGE))
    assert held(receiver) >= 5 * LARGE

    receiver.rest()

    assert held(receiver) == SMALL
    assert len(receiver.buffer()) == SMALL
    assert isinstance(outcome_of(receiver, compact(Command.WRITE, length=20_000) + bytes(20_000)), Request)


def test_rest_gives_memory_back_in_the_middle_of_a_header() -> None:
    receiver = transmission()
    receive(receiver, compact(Command.READ) * 100_000)
    receive(receiver, compact(Command.READ, cookie=77)[:27])

    receiver.rest()

    assert held(receiver) == SMALL
    (request,) = receive(receiver, compact(Command.READ, cookie=77)[27:])
    assert request.cookie == 77


@FORMS
@pytest.mark.parametrize("length", [100, 20_000, OWN - 32, OWN, 3 * LARGE])
def test_rest_loses_nothing_wherever_the_client_pauses(extended: bool, length: int) -> None:
    sent = message(Command.WRITE, extended=extended, length=length, cookie=3)
    for pause in (1, 27, 28, 32, 50, length // 2, length, length + 27):
        receiver = transmission(extended=extended, size=HUGE)
        receive(receiver, message(Command.WRITE, extended=extended, length=4 * LARGE))

        before = receive(receiver, sent[:pause])
        receiver.rest()
        receiver.rest()
        (request,) = before + receive(receiver, sent[pause:])

        assert request.payload == pattern(3, length)


def test_rest_in_a_payload_that_is_skipped_keeps_the_stream_in_step() -> None:
    receiver = transmission()
    sent = message(Command.WRITE, extended=False, offset=SIZE, length=LARGE)
    pour(receiver, sent[:100_000])

    receiver.rest()

    assert held(receiver) == SMALL
    assert outcome_of(receiver, sent[100_000:]) == NbdError.ENOSPC


@FORMS
@pytest.mark.parametrize("arrived", [0, 1, 100_000, 2 * MIB])
def test_a_payload_takes_memory_as_it_arrives_and_not_as_it_is_announced(extended: bool, arrived: int) -> None:
    receiver = transmission(extended=extended, size=HUGE)
    header = message(Command.WRITE, extended=extended, length=MAX_PAYLOAD)[: 32 if extended else 28]

    receive(receiver, header + bytes(arrived))
    room = receiver.buffer()

    assert 0 < len(room) <= max(LARGE, 4 * arrived)
    assert held(receiver) <= HELD + max(LARGE, 4 * arrived)


def test_a_payload_that_is_only_announced_does_not_keep_the_memory_of_one_before_it() -> None:
    receiver = transmission(size=HUGE)
    receive(receiver, message(Command.WRITE, extended=False, length=16 * MIB))
    receive(receiver, compact(Command.WRITE, length=16 * MIB) + bytes(1000))

    receiver.rest()

    assert held(receiver) <= SMALL + LARGE
    (request,) = receive(receiver, bytes(16 * MIB - 1000))
    assert request.payload == bytes(16 * MIB)


# --- memory that others want ---


class Scarce:
    """Room that notes what is asked of it, and may have none."""

    def __init__(self) -> None:
        self.claims: list[int] = []
        self.buffer: memoryview | None = None
        self.dropped = 0
        self.failure: Exception | None = None

    def claim(self, size: int) -> None:
        self.claims.append(size)
        if self.failure:
            raise self.failure

    def keep(self, buffer: memoryview) -> None:
        self.buffer = buffer

    def kept(self, size: int) -> memoryview | None:
        buffer, self.buffer = self.buffer, None
        return buffer if buffer is not None and len(buffer) >= size else None

    def drop(self) -> None:
        self.buffer = None
        self.dropped += 1


@pytest.fixture
def room() -> Scarce:
    return Scarce()


def with_room(room: Scarce) -> Transmission:
    return Transmission(HUGE, ALL, room=room)


@pytest.mark.parametrize("length", [1, OWN, OWN + 1, LARGE])
def test_small_payloads_ask_for_no_room(room: Scarce, length: int) -> None:
    receiver = with_room(room)

    (request,) = receive(receiver, message(Command.WRITE, extended=False, length=length))

    assert len(request.payload) == length
    assert room.claims == []


def test_a_large_payload_asks_for_all_of_its_room_when_some_of_it_is_there(room: Scarce) -> None:
    receiver = with_room(room)

    for data in (compact(Command.WRITE, length=8 * MIB), pattern(1, LARGE - 1)):
        receive(receiver, data)
        receiver.buffer()
        assert room.claims == []
    receive(receiver, pattern(1, LARGE)[-1:])
    receiver.buffer()

    assert room.claims == [8 * MIB]


def test_a_payload_for_which_there_is_no_room_ends_it_all(room: Scarce) -> None:
    receiver = with_room(room)
    room.failure = KeyError()

    with pytest.raises(KeyError):
        receive(receiver, message(Command.WRITE, extended=False, length=8 * MIB))

    assert held(receiver) <= HELD + LARGE


@pytest.mark.parametrize("begun", [0, 27])
def test_a_buffer_is_kept_when_its_payload_is_done_with(room: Scarce, begun: int) -> None:
    receiver = with_room(room)
    receive(receiver, compact(Command.READ) * 100_000)  # now the buffer for requests is large

    (request,) = receive(receiver, message(Command.WRITE, extended=False, length=4 * MIB))
    assert not room.buffer
    receive(receiver, compact(Command.READ)[:begun])  # a client may never stop between two requests
    receiver.buffer()

    assert room.buffer is not None
    assert room.buffer.obj is request.payload.obj
    assert held(receiver) <= HELD + len(room.buffer)


def test_a_payload_that_is_carried_out_elsewhere_leaves_no_buffer(room: Scarce) -> None:
    receiver = with_room(room)
    (request,) = receive(receiver, message(Command.WRITE, extended=False, length=4 * MIB))

    receiver.keep_payload(request.payload)
    receive(receiver, compact(Command.READ))

    assert not room.buffer


def test_what_was_kept_may_have_gone_meanwhile(room: Scarce) -> None:
    receiver = with_room(room)
    receive(receiver, message(Command.WRITE, extended=False, length=4 * MIB))
    receive(receiver, compact(Command.READ) * 100)
    room.buffer = None

    (request,) = receive(receiver, message(Command.WRITE, extended=False, cookie=2, length=4 * MIB))

    assert request.payload == pattern(2, 4 * MIB)
    assert set(room.claims) == {4 * MIB}


@pytest.mark.parametrize(("arrived", "dropped"), [(1000, 1), (4 * MIB, 0)])
def test_a_payload_that_pauses_early_holds_no_room(room: Scarce, arrived: int, dropped: int) -> None:
    receiver = with_room(room)
    receive(receiver, message(Command.WRITE, extended=False, length=32 * MIB))
    receive(receiver, compact(Command.WRITE, length=32 * MIB) + pattern(1, 32 * MIB)[:arrived])
    assert receiver.landing is not None
    assert receiver.landing.length == 32 * MIB

    receiver.rest()
    assert room.dropped == dropped
    (request,) = receive(receiver, pattern(1, 32 * MIB)[arrived:])

    assert request.payload == pattern(1, 32 * MIB)
    assert receiver.landing is None
    assert room.claims[-1] == 32 * MIB


def test_a_quiet_client_holds_no_room(room: Scarce) -> None:
    receiver = with_room(room)
    receive(receiver, message(Command.WRITE, extended=False, length=4 * MIB))

    receiver.rest()

    assert room.dropped == 1
    assert held(receiver) <= HELD


# --- what the client and the log are told ---


@pytest.mark.parametrize(
    ("sent", "text"),
    [
        (compact(8), "command 8 (flags 0x0, offset 0, length 512): unknown command"),
        (compact(Command.READ, length=0), "READ (flags 0x0, offset 0, length 0): the length is 0"),
        (
            compact(Command.READ, offset=SIZE),
            "READ (flags 0x0, offset 1048576, length 512): beyond the end of the export, which has 1048576 bytes",
        ),
        (
            compact(Command.READ, offset=1),
            "READ (flags 0x0, offset 1, length 512): not aligned to the minimum block size of 512",
        ),
        (
            compact(Command.READ, flags=0x8001),
            "READ (flags 0x8001, offset 0, length 512): flags 0x8000 are not for it, or were not offered",
        ),
        (
            compact(Command.READ, length=64 * KIB),
            "READ (flags 0x0, offset 0, length 65536): longer than the maximum of 32768 bytes",
        ),
        (
            compact(Command.TRIM),
            "TRIM (flags 0x0, offset 0, length 512): the export does not support it",
        ),
        (
            compact(Command.FLUSH),
            "FLUSH (flags 0x0, offset 0, length 512): offset and length must be 0",
        ),
        (
            compact(Command.BLOCK_STATUS),
            "BLOCK_STATUS (flags 0x0, offset 0, length 512): no metadata context was negotiated",
        ),
    ],
)
def test_a_refusal_says_what_was_asked_and_what_is_wrong(sent: bytes, text: str) -> None:
    receiver = transmission(minimum=512, maximum=32 * KIB, contexts=False, flags=ALL & ~TransmissionFlag.SEND_TRIM)

    assert text_of_refusal(receiver, sent) == text


def test_the_first_of_several_reasons_is_the_one_that_is_told() -> None:
    read_only = ALL & ~TransmissionFlag.SEND_TRIM | TransmissionFlag.READ_ONLY
    everything_wrong = compact(Command.TRIM, offset=SIZE, length=0, flags=0x8000)

    assert outcome_of(transmission(flags=read_only), everything_wrong) == NbdError.EPERM
    wrong_range_and_flags = compact(Command.WRITE, offset=SIZE, length=4, flags=0x8000) + bytes(4)
    assert outcome_of(transmission(), wrong_range_and_flags) == NbdError.ENOSPC
    wrong_flags_and_length = compact(Command.READ, length=SIZE, flags=0x8000)
    assert outcome_of(transmission(maximum=512), wrong_flags_and_length) == NbdError.EINVAL

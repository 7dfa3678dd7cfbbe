"""The numbers, once more, as the protocol's document gives them: a slip there would be hard to see anywhere else."""

import enum

import pytest

from nbdkitpy.protocol import constants
from nbdkitpy.protocol.constants import (
    ClientFlag,
    Command,
    CommandFlag,
    HandshakeFlag,
    InfoType,
    Magic,
    NbdError,
    Option,
    OptionReply,
    ReplyFlag,
    ReplyType,
    TransmissionFlag,
)

NUMBERS: list[tuple[type[enum.IntEnum] | type[enum.IntFlag], dict[str, int]]] = [
    (
        Magic,
        {
            "NBDMAGIC": int.from_bytes(b"NBDMAGIC", "big"),
            "IHAVEOPT": int.from_bytes(b"IHAVEOPT", "big"),
            "OLDSTYLE": 0x420281861253,
            "OPTION_REPLY": 0x3E889045565A9,
            "REQUEST": 0x25609513,
            "SIMPLE_REPLY": 0x67446698,
            "STRUCTURED_REPLY": 0x668E33EF,
            "EXTENDED_REQUEST": 0x21E41C71,
            "EXTENDED_REPLY": 0x6E8A278C,
        },
    ),
    (HandshakeFlag, {"FIXED_NEWSTYLE": 1, "NO_ZEROES": 2}),
    (ClientFlag, {"FIXED_NEWSTYLE": 1, "NO_ZEROES": 2}),
    (
        Option,
        {
            "EXPORT_NAME": 1,
            "ABORT": 2,
            "LIST": 3,
            "STARTTLS": 5,
            "INFO": 6,
            "GO": 7,
            "STRUCTURED_REPLY": 8,
            "LIST_META_CONTEXT": 9,
            "SET_META_CONTEXT": 10,
            "EXTENDED_HEADERS": 11,
        },
    ),
    (
        OptionReply,
        {
            "ACK": 1,
            "SERVER": 2,
            "INFO": 3,
            "META_CONTEXT": 4,
            "ERR_UNSUP": 2**31 + 1,
            "ERR_POLICY": 2**31 + 2,
            "ERR_INVALID": 2**31 + 3,
            "ERR_PLATFORM": 2**31 + 4,
            "ERR_TLS_REQD": 2**31 + 5,
            "ERR_UNKNOWN": 2**31 + 6,
            "ERR_SHUTDOWN": 2**31 + 7,
            "ERR_BLOCK_SIZE_REQD": 2**31 + 8,
            "ERR_TOO_BIG": 2**31 + 9,
            "ERR_EXT_HEADER_REQD": 2**31 + 10,
        },
    ),
    (InfoType, {"EXPORT": 0, "NAME": 1, "DESCRIPTION": 2, "BLOCK_SIZE": 3}),
    (
        TransmissionFlag,
        {
            "HAS_FLAGS": 0x0001,
            "READ_ONLY": 0x0002,
            "SEND_FLUSH": 0x0004,
            "SEND_FUA": 0x0008,
            "ROTATIONAL": 0x0010,
            "SEND_TRIM": 0x0020,
            "SEND_WRITE_ZEROES": 0x0040,
            "SEND_DF": 0x0080,
            "CAN_MULTI_CONN": 0x0100,
            "SEND_RESIZE": 0x0200,
            "SEND_CACHE": 0x0400,
            "SEND_FAST_ZERO": 0x0800,
            "BLOCK_STATUS_PAYLOAD": 0x1000,
        },
    ),
    (
        Command,
        {
            "READ": 0,
            "WRITE": 1,
            "DISC": 2,
            "FLUSH": 3,
            "TRIM": 4,
            "CACHE": 5,
            "WRITE_ZEROES": 6,
            "BLOCK_STATUS": 7,
            "RESIZE": 8,
        },
    ),
    (CommandFlag, {"FUA": 1, "NO_HOLE": 2, "DF": 4, "REQ_ONE": 8, "FAST_ZERO": 16, "PAYLOAD_LEN": 32}),
    (ReplyFlag, {"DONE": 1}),
    (
        ReplyType,
        {
            "NONE": 0,
            "OFFSET_DATA": 1,
            "OFFSET_HOLE": 2,
            "BLOCK_STATUS": 5,
            "BLOCK_STATUS_EXT": 6,
            "ERROR": 0x8001,
            "ERROR_OFFSET": 0x8002,
        },
    ),
    (
        NbdError,
        {
            "EPERM": 1,
            "EIO": 5,
            "ENOMEM": 12,
            "EINVAL": 22,
            "ENOSPC": 28,
            "EOVERFLOW": 75,
            "ENOTSUP": 95,
            "ESHUTDOWN": 108,
        },
    ),
]


@pytest.mark.parametrize(("kind", "numbers"), NUMBERS, ids=[kind.__name__ for kind, _ in NUMBERS])
def test_numbers_are_those_of_the_protocol_and_none_is_missing(
    kind: type[enum.IntEnum] | type[enum.IntFlag], numbers: dict[str, int]
) -> None:
    assert {name: int(member) for name, member in kind.__members__.items()} == numbers


def test_every_kind_of_number_is_checked_here() -> None:
    kinds = {value for value in vars(constants).values() if isinstance(value, type) and issubclass(value, int)}

    assert kinds - {enum.IntEnum, enum.IntFlag} == {kind for kind, _ in NUMBERS}


def test_limits_and_names() -> None:
    assert constants.DEFAULT_PORT == 10809
    assert constants.MAX_STRING == 4096
    assert constants.BASE_ALLOCATION == "base:allocation"
    assert constants.BASE_ALLOCATION_ID == 1

"""Errors on the wire, and what clients sent, made fit to be shown."""

import errno

import pytest

from nbdkitpy.protocol.constants import NbdError, OptionReply
from nbdkitpy.protocol.errors import OptionError, nbd_error, printable


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EACCES, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EFBIG, 28),
        (errno.EDQUOT, 28),
        (errno.ESHUTDOWN, 108),
        (errno.ENOENT, 22),
        (errno.ETIMEDOUT, 22),
        (errno.EBADF, 22),
        (0, 22),
        (-1, 22),
        (99999, 22),
        (None, 5),
    ],
)
def test_R9_errno_maps_to_its_number_on_the_wire(number: int | None, expected: int) -> None:
    assert nbd_error(number) == expected


@pytest.mark.parametrize("number", [*errno.errorcode, None])
@pytest.mark.parametrize("fast_zero", [False, True])
@pytest.mark.parametrize("dont_fragment", [False, True])
def test_R9_no_errno_escapes_the_numbers_of_the_protocol(
    number: int | None, fast_zero: bool, dont_fragment: bool
) -> None:
    answer = nbd_error(number, fast_zero=fast_zero, dont_fragment=dont_fragment)

    assert isinstance(answer, NbdError)
    assert fast_zero or answer is not NbdError.ENOTSUP
    assert dont_fragment or answer is not NbdError.EOVERFLOW


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP])
def test_R9_enotsup_is_only_for_fast_zero(number: int) -> None:
    assert nbd_error(number, fast_zero=True) == NbdError.ENOTSUP
    assert nbd_error(number, dont_fragment=True) == NbdError.EINVAL


def test_R9_eoverflow_is_only_for_dont_fragment() -> None:
    assert nbd_error(errno.EOVERFLOW, dont_fragment=True) == NbdError.EOVERFLOW
    assert nbd_error(errno.EOVERFLOW, fast_zero=True) == NbdError.EINVAL


def test_option_error_carries_its_reply_and_text() -> None:
    error = OptionError(OptionReply.ERR_POLICY, "not today")

    assert error.reply is OptionReply.ERR_POLICY
    assert str(error) == "not today"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("disk 1", "disk 1"),
        ("Größe €", "Größe €"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("nul\0", "nul\\x00"),
        ("\x85\x9b", "\\x85\\x9b"),
        ("\u202eright to left", "\\u202eright to left"),
        ("\udcff", "\\udcff"),
        (b"plain", "plain"),
        ("é".encode(), "é"),
        (b"\xff\xfe\n", "\\xff\\xfe\\n"),
        ("", ""),
    ],
)
def test_printable_escapes_what_a_terminal_would_act_on(text: str | bytes, shown: str) -> None:
    assert printable(text) == shown


def test_printable_cuts_long_text_and_marks_it() -> None:
    assert printable("x" * 8, 8) == "x" * 8
    assert printable("x" * 9, 8) == "x" * 8 + "…"
    assert printable("x" * 1_000_000) == "x" * 256 + "…"


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
@pytest.mark.parametrize("lead", ["", "x", "xx", "xxx"])
def test_printable_treats_bytes_as_the_text_that_they_encode(character: str, lead: str) -> None:
    text = lead + character * 20

    for limit in range(1, 30):
        assert printable(text.encode(), limit) == printable(text, limit)


def test_printable_keeps_to_its_limit_when_escapes_lengthen_the_text() -> None:
    assert len(printable("\0" * 100, 16)) == 17
    assert len(printable(b"\xff" * 100_000, 16)) == 17

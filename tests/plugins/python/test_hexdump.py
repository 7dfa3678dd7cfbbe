"""Buffers as lines, as nbdkit 1.48 lays them out."""

from __future__ import annotations

import pytest

from nbdkitpy_plugins.python.hexdump import hexdiff, hexdump

TEXT = b"hello world 12345 abcdef"


@pytest.mark.parametrize(
    ("data", "prefix", "start", "lines"),
    [
        (
            TEXT,
            "pfx",
            0x1000,
            [
                "pfx00001000: 68 65 6c 6c 6f 20 77 6f  72 6c 64 20 31 32 33 34  |hello world 1234|",
                "pfx00001010: 35 20 61 62 63 64 65 66                           |5 abcdef        |",
            ],
        ),
        (b"hello", "", 3, ["00000000:          68 65 6c 6c 6f                           |   hello        |"]),
        (b"\0\x7f~ \xff", "", 0, ["00000000: 00 7f 7e 20 ff                                    |..~ .           |"]),
        (b"", "", 7, []),
        (b"", "", 16, []),
    ],
)
def test_hexdump(data: bytes, prefix: str, start: int, lines: list[str]) -> None:
    assert list(hexdump(memoryview(data), prefix, start)) == lines


def test_hexdiff_shows_what_is_different_below() -> None:
    other = b"hellO world 12345 abcdef"

    assert list(hexdiff(memoryview(TEXT), memoryview(other), "pfx", 5)) == [
        "pfx-00000000:                68 65 6c  6c 6f 20 77 6f 72 6c 64  |     hello world|",
        "pfx+00000000:                             4f                    |         O      |",
        "pfx 00000010: 20 31 32 33 34 35 20 61  62 63 64 65 66           | 12345 abcdef   |",
    ]


def test_hexdump_takes_items_of_any_size() -> None:
    words = memoryview(bytes(range(8))).cast("I")

    assert list(hexdump(words, "", 0)) == list(hexdump(memoryview(bytes(range(8))), "", 0))

"""Buffers as lines of hexadecimal digits and text, laid out like those of nbdkit and of hexdump -C."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["hexdiff", "hexdump"]

_ROW = 16


def hexdump(buffer: memoryview, prefix: str, start: int) -> Iterator[str]:
    """Yield the lines that show `buffer`, whose first byte is said to lie at `start`."""
    for address, row in _rows(buffer, start):
        yield f"{prefix}{_line(address, row)}"


def hexdiff(one: memoryview, other: memoryview, prefix: str, start: int) -> Iterator[str]:
    """Yield lines as :func:`hexdump` does; where the buffers differ, the other's different bytes stand below."""
    for (address, row), (_, other_row) in zip(_rows(one, start), _rows(other, start)):
        if row == other_row:
            yield f"{prefix} {_line(address, row)}"
            continue
        yield f"{prefix}-{_line(address, row)}"
        changed = [new if new != old else None for old, new in zip(row, other_row)]
        yield f"{prefix}+{_line(address, changed)}"


def _rows(buffer: memoryview, start: int) -> Iterator[tuple[int, list[int | None]]]:
    """Yield the address of each row, and its bytes; None where there are none."""
    data = buffer.cast("B")
    for address in range(start - start % _ROW, start + len(data), _ROW) if len(data) else ():
        places = range(address - start, address - start + _ROW)
        yield address, [data[place] if 0 <= place < len(data) else None for place in places]


def _line(address: int, row: Sequence[int | None]) -> str:
    digits = ["  " if byte is None else f"{byte:02x}" for byte in row]
    text = "".join(" " if byte is None else chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
    half = _ROW // 2
    return f"{address:08x}: {' '.join(digits[:half])}  {' '.join(digits[half:])}  |{text}|"

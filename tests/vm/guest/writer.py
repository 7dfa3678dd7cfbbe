"""Writes block after block until the server refuses: writer.py URI BLOCK-SIZE ENOUGH.

As soon as ENOUGH blocks are acknowledged, says so on standard output. At the end, prints the numbers of the blocks that
were acknowledged. Block N is of bytes that say N, at N times the size.
"""

from __future__ import annotations

import itertools
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]

IN_FLIGHT = 16


def block(number: int, size: int) -> bytes:
    """Return what is in a block."""
    return number.to_bytes(8, "big") * (size // 8)


def write(uri: str, size: int, enough: int) -> list[int]:
    """Write until the connection ends; return the numbers of the blocks that were acknowledged."""
    client = nbd.NBD()
    client.connect_uri(uri)
    acknowledged: list[int] = []
    refused: list[int] = []

    def sent(number: int) -> None:
        def completed(error: int) -> int:
            (refused if error else acknowledged).append(number)
            if len(acknowledged) == enough:
                print("enough", flush=True)
            return 1  # it needs no further attention

        buffer = nbd.Buffer.from_bytearray(bytearray(block(number, size)))
        client.aio_pwrite(buffer, number * size, completion=completed)

    try:
        for number in itertools.count():
            sent(number)
            while client.aio_in_flight() >= IN_FLIGHT and not refused:
                client.poll(-1)
            if refused:
                break
        while client.aio_in_flight():
            client.poll(-1)
    except nbd.Error:
        pass  # the server has closed the connection
    return acknowledged


if __name__ == "__main__":
    print(*write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))

"""Keeps 64 requests of all kinds in flight, and checks each answer against a model of the disk.

pipeline.py URI COUNT: sends COUNT requests. The export must have 32 MiB at least, all of them zeroes.
"""

import random
import sys
from collections.abc import Callable

import nbd  # type: ignore[import-not-found, unused-ignore]

DEPTH = 64
SLOT = 512 << 10  # each request in flight has one to itself
LENGTHS = (1, 512, 4096, 16 << 10, 40_000, 128 << 10, SLOT)


class Pipeline:
    """The requests in flight, at most one in each slot."""

    def __init__(self, handle: nbd.NBD) -> None:
        self.handle = handle
        self.random = random.Random(64)
        self.model = bytearray(DEPTH * SLOT)
        self.free = list(range(DEPTH))
        self.done = 0
        self.most = 0

    def run(self, count: int) -> None:
        sent = 0
        while self.done < count:
            while sent < count and self.free:
                self.send(self.free.pop(self.random.randrange(len(self.free))))
                sent += 1
            self.most = max(self.most, self.handle.aio_in_flight())
            self.handle.poll(-1)

    def send(self, slot: int) -> None:
        length = self.random.choice(LENGTHS)
        offset = slot * SLOT + self.random.randrange(SLOT - length + 1)
        self.random.choice([self.read, self.read, self.write, self.write, self.zero, self.flush])(slot, offset, length)

    def read(self, slot: int, offset: int, length: int) -> None:
        buffer = nbd.Buffer(length)

        def check() -> None:
            assert buffer.to_bytearray() == self.model[offset : offset + length], (offset, length)

        self.handle.aio_pread(buffer, offset, completion=self.completion(slot, check))

    def write(self, slot: int, offset: int, length: int) -> None:
        data = self.random.randbytes(length)
        self.model[offset : offset + length] = data
        flags = nbd.CMD_FLAG_FUA if self.random.random() < 0.05 else 0
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        self.handle.aio_pwrite(buffer, offset, completion=self.completion(slot), flags=flags)

    def zero(self, slot: int, offset: int, length: int) -> None:
        self.model[offset : offset + length] = bytes(length)
        flags = self.random.choice((0, nbd.CMD_FLAG_NO_HOLE))
        self.handle.aio_zero(length, offset, completion=self.completion(slot), flags=flags)

    def flush(self, slot: int, offset: int, length: int) -> None:
        self.handle.aio_flush(completion=self.completion(slot))

    def completion(self, slot: int, check: Callable[[], None] = lambda: None) -> Callable[[object], int]:
        def completed(error: "nbd.Buffer") -> int:
            assert error.value == 0, error.value
            check()
            self.free.append(slot)
            self.done += 1
            return 1  # forget the request

        return completed


def main(uri: str, count: str) -> None:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    pipeline = Pipeline(handle)
    pipeline.run(int(count))
    assert pipeline.most == DEPTH, pipeline.most
    for start in range(0, len(pipeline.model), SLOT):
        assert handle.pread(SLOT, start) == pipeline.model[start : start + SLOT]
    handle.shutdown()


main(*sys.argv[1:])

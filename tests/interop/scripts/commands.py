"""Sends every command with every flag that is offered, and checks what the disk holds after each.

commands.py URI STRUCTURED CONTEXT: the last two are 1 or 0, whether to ask for structured replies and for
base:allocation. Prints what the server offers, as JSON. The export must have 4 MiB at least, all of them zeroes.
"""

import json
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]

SIZE = 4 << 20
BLOCK = 64 << 10


def connected(uri: str, structured: bool, context: bool) -> nbd.NBD:
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    if context:
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    return handle


def facts(handle: nbd.NBD) -> dict[str, object]:
    questions = (
        "can_cache",
        "can_df",
        "can_fast_zero",
        "can_flush",
        "can_fua",
        "can_multi_conn",
        "can_trim",
        "can_zero",
    )
    return {
        "protocol": handle.get_protocol(),
        "structured": handle.get_structured_replies_negotiated(),
        "context": handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION),
        "size": handle.get_size(),
        "read_only": handle.is_read_only(),
        **{question: getattr(handle, question)() for question in questions},
    }


class Disk:
    """The export, and what it should hold."""

    def __init__(self, handle: nbd.NBD) -> None:
        self.handle = handle
        self.model = bytearray(SIZE)

    def write(self, offset: int, data: bytes, flags: int) -> None:
        self.handle.pwrite(data, offset, flags)
        self.model[offset : offset + len(data)] = data

    def zero(self, offset: int, count: int, flags: int) -> None:
        try:
            self.handle.zero(count, offset, flags)
        except nbd.Error as error:
            # A fast zero may be refused, and then nothing has changed.
            if not (flags & nbd.CMD_FLAG_FAST_ZERO and error.errno in ("ENOTSUP", "EOPNOTSUPP")):
                raise
        else:
            self.model[offset : offset + count] = bytes(count)

    def trim(self, offset: int, count: int, flags: int) -> None:
        self.handle.trim(count, offset, flags)
        found = bytes(self.handle.pread(count, offset))  # it may hold anything now: what it did, or zeroes, here
        assert found in (bytes(count), bytes(self.model[offset : offset + count]))
        self.model[offset : offset + count] = found

    def check(self) -> None:
        for start in range(0, SIZE, 1 << 20):
            assert self.handle.pread(1 << 20, start) == self.model[start : start + (1 << 20)]
        assert self.handle.pread(3, BLOCK - 1) == self.model[BLOCK - 1 : BLOCK + 2]


def pieces(handle: nbd.NBD, count: int, offset: int, flags: int) -> dict[str, object]:
    """Read by the call that shows the chunks of the reply."""
    kinds: list[int] = []

    def chunk(data: bytes, start: int, kind: int, error: object) -> None:
        kinds.append(kind)
        assert kind != nbd.READ_HOLE or len(data) > 0

    data = handle.pread_structured(count, offset, chunk, flags)
    return {"data": bytes(data), "kinds": kinds}


def extents(handle: nbd.NBD, count: int, offset: int, flags: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []

    def extent(context: str, start: int, entries: list[int], error: object) -> None:
        assert (context, start) == (nbd.CONTEXT_BASE_ALLOCATION, offset)
        found.extend(zip(entries[::2], entries[1::2]))

    handle.block_status(count, offset, extent, flags)
    return found


def subsets(flags: list[int]) -> list[int]:
    sums = [0]
    for flag in flags:
        sums += [total | flag for total in sums]
    return sums


def exercise(handle: nbd.NBD) -> None:
    disk = Disk(handle)
    fua = [nbd.CMD_FLAG_FUA] if handle.can_fua() else []
    fast = [nbd.CMD_FLAG_FAST_ZERO] if handle.can_fast_zero() else []
    for number, flags in enumerate(subsets(fua)):
        disk.write(number * BLOCK + 7, bytes([number + 1]) * (2 * BLOCK), flags)
    disk.write(SIZE - 1, b"\xff", 0)
    disk.write(0, bytes(range(256)) * 4096, 0)
    disk.check()
    if handle.can_flush():
        handle.flush()
    for number, flags in enumerate(subsets([nbd.CMD_FLAG_NO_HOLE, *fua, *fast]) if handle.can_zero() else []):
        disk.zero(number * 3 * BLOCK + 5, 2 * BLOCK, flags)
        disk.zero(number * 3 * BLOCK, BLOCK, flags)
    disk.check()
    for number, flags in enumerate(subsets(fua) if handle.can_trim() else []):
        disk.write(BLOCK, b"t" * (4 * BLOCK), 0)
        disk.trim(BLOCK + number, 3 * BLOCK, flags)
    disk.check()
    if handle.can_cache():
        handle.cache(SIZE, 0)
    check_reads(disk)
    check_extents(disk)


def check_reads(disk: Disk) -> None:
    handle = disk.handle
    for flags in (0, nbd.CMD_FLAG_DF) if handle.can_df() else (0,):
        found = pieces(handle, SIZE, 0, flags)
        assert found["data"] == disk.model
        assert found["kinds"] == [nbd.READ_DATA] or not flags


def check_extents(disk: Disk) -> None:
    handle = disk.handle
    if not handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
        return
    offset = 0
    while offset < SIZE:
        found = extents(handle, SIZE - offset, offset, 0)
        assert extents(handle, SIZE - offset, offset, nbd.CMD_FLAG_REQ_ONE) == found[:1]
        for length, state in found:
            assert length > 0
            if state & nbd.STATE_ZERO:
                assert not any(disk.model[offset : offset + length])
            offset += length
    assert offset == SIZE


def main(uri: str, structured: str, context: str) -> None:
    handle = connected(uri, structured == "1", context == "1")
    print(json.dumps(facts(handle)))
    if not handle.is_read_only():
        exercise(handle)
    handle.shutdown()


main(*sys.argv[1:])

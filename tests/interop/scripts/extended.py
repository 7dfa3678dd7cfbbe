"""Uses lengths of more than 32 bits: extended.py URI LENGTH. Prints what it finds as JSON. Needs libnbd 1.18."""

import json
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]

MIB = 1 << 20


def main(uri: str, length_text: str) -> None:
    length = int(length_text)
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    assert handle.get_extended_headers_negotiated()

    handle.pwrite(b"x" * MIB, MIB)
    handle.pwrite(b"y" * MIB, length - MIB)
    before = extents(handle, length)
    handle.zero(length, 0)
    handle.flush()
    after = extents(handle, length)
    assert not any(handle.pread(2 * MIB, 0))
    assert not any(handle.pread(MIB, length - MIB))
    handle.trim(length, 0)
    handle.cache(length, 0)
    print(json.dumps({"protocol": handle.get_protocol(), "before": before, "after": after}))
    handle.shutdown()


def extents(handle: nbd.NBD, length: int) -> list[list[int]]:
    found: list[list[int]] = []

    def extent(context: str, offset: int, entries: list[tuple[int, int]], error: object) -> None:
        found.extend([size, flags] for size, flags in entries)

    handle.block_status_64(length, 0, extent)
    return found


main(*sys.argv[1:])

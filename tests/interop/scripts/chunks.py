"""Reads a whole export, and prints the chunks of the reply as JSON: chunks.py URI."""

import json
import sys

import nbd  # type: ignore[import-not-found, unused-ignore]

KINDS = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}


def chunks(handle: nbd.NBD, flags: int) -> list[tuple[int, str, int]]:
    found: list[tuple[int, str, int]] = []

    def chunk(data: bytes, offset: int, kind: int, error: object) -> None:
        found.append((offset, KINDS[kind], len(data)))

    handle.pread_structured(handle.get_size(), 0, chunk, flags)
    return sorted(found)


def main(uri: str) -> None:
    handle = nbd.NBD()
    handle.connect_uri(uri)
    print(json.dumps({"chunks": chunks(handle, 0), "chunks without fragments": chunks(handle, nbd.CMD_FLAG_DF)}))
    handle.shutdown()


main(*sys.argv[1:])

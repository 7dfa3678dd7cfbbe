"""Sends requests that are wrong, each of which has to be refused as such, and one that is right after each.

refusals.py URI: prints as JSON, for each wrong request, the errno that it got.
"""

import json
import sys
from collections.abc import Callable

import nbd  # type: ignore[import-not-found, unused-ignore]

NO_FLAG = 1 << 14


def errno_of(call: Callable[[], object]) -> str:
    try:
        call()
    except nbd.Error as error:
        return str(error.errno)
    return "no error"


def main(uri: str) -> None:
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    handle.connect_uri(uri)
    handle.set_strict_mode(0)  # so that libnbd sends them
    size = handle.get_size()
    wrong: dict[str, Callable[[], object]] = {
        "read at the end": lambda: handle.pread(1, size),
        "read across the end": lambda: handle.pread(1024, size - 512),
        "read far beyond": lambda: handle.pread(512, (1 << 63) - 512),
        "read of nothing": lambda: handle.pread(0, 0),
        "read with an unknown flag": lambda: handle.pread(512, 0, NO_FLAG),
        "write at the end": lambda: handle.pwrite(b"x", size),
        "write across the end": lambda: handle.pwrite(bytes(1024), size - 512),
        "write of nothing": lambda: handle.pwrite(b"", 0),
        "write with an unknown flag": lambda: handle.pwrite(bytes(1 << 20), 0, NO_FLAG),
        "write with DF": lambda: handle.pwrite(bytes(512), 0, nbd.CMD_FLAG_DF),
        "trim across the end": lambda: handle.trim(1024, size - 512),
        "zero across the end": lambda: handle.zero(1024, size - 512),
        "zero with an unknown flag": lambda: handle.zero(512, 0, NO_FLAG),
        "cache across the end": lambda: handle.cache(1024, size - 512),
        "block status across the end": lambda: handle.block_status(1024, size - 512, lambda *_: 0),
        "flush with an unknown flag": lambda: handle.flush(NO_FLAG),
    }
    found = {}
    for name, call in wrong.items():
        found[name] = errno_of(call)
        assert len(handle.pread(512, 0)) == 512
    print(json.dumps(found))
    handle.shutdown()


main(*sys.argv[1:])

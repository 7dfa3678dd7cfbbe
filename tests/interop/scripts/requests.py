"""Sends the requests that standard input lists as JSON, one after the other: requests.py URI.

Each is a list of verb, length, offset, names of flags, and seed of the data. Prints as JSON what the server offers,
what became of each request, and the hash of what the export holds at the end; or null if the export cannot be opened.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import nbd  # type: ignore[import-not-found, unused-ignore]

QUESTIONS = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
PIECE = 1 << 20


def facts(handle: nbd.NBD) -> dict[str, Any]:
    return {
        "size": handle.get_size(),
        "read_only": handle.is_read_only(),
        "rotational": handle.is_rotational(),
        "base:allocation": handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION),
        "block_size": [handle.get_block_size(which) for which in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED)],
        **{question: getattr(handle, f"can_{question}")() for question in QUESTIONS},
    }


def status(handle: nbd.NBD, count: int, offset: int, flags: int) -> list[list[int]]:
    """Length and state of each extent of the reply, clipped to the request; equal neighbours are one."""
    found: list[list[int]] = []

    def extent(context: str, start: int, entries: list[int], error: object) -> None:
        left = count
        for length, state in zip(entries[::2], entries[1::2]):
            length = min(length, left)
            left -= length
            if found and found[-1][1] == state:
                found[-1][0] += length
            elif length:
                found.append([length, state])

    handle.block_status(count, offset, extent, flags)
    return found


def extents(handle: nbd.NBD, count: int, offset: int, flags: int) -> list[list[int]]:
    """Of the whole range, also where the server tells only of its beginning at a time."""
    found = status(handle, count, offset, flags)
    while not flags & nbd.CMD_FLAG_REQ_ONE and (done := sum(length for length, _ in found)) < count:
        first, *others = status(handle, count - done, offset + done, flags)
        if found[-1][1] == first[1]:
            found[-1][0] += first[0]
        else:
            found.append(first)
        found += others
    return found


def perform(handle: nbd.NBD, verb: str, count: int, offset: int, flags: int, seed: int) -> object:
    if verb == "extents":
        return extents(handle, count, offset, flags)
    if verb == "pread":
        return hashlib.sha256(handle.pread(count, offset, flags)).hexdigest()
    if verb == "pwrite":
        return handle.pwrite(random.Random(seed).randbytes(count), offset, flags)
    if verb == "flush":
        return handle.flush(flags)
    return getattr(handle, verb)(count, offset, flags)


def answer(handle: nbd.NBD, verb: str, count: int, offset: int, names: list[str], seed: int) -> object:
    if "FAST_ZERO" in names and not handle.can_fast_zero():
        return "not sent"  # nbdkit would abort
    flags = sum(getattr(nbd, f"CMD_FLAG_{name}") for name in names)
    try:
        return perform(handle, verb, count, offset, flags, seed)
    except nbd.Error as error:
        return str(error.errno)


def content(handle: nbd.NBD) -> Iterator[bytes]:
    size = handle.get_size()
    for start in range(0, size, PIECE):
        yield handle.pread(min(PIECE, size - start), start)


def digest(handle: nbd.NBD) -> str:
    whole = hashlib.sha256()
    try:
        for piece in content(handle):
            whole.update(piece)
    except nbd.Error as error:
        return str(error.errno)
    return whole.hexdigest()


def main(uri: str) -> object:
    handle = nbd.NBD()
    handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    try:
        handle.connect_uri(uri)
    except nbd.Error:
        return None
    handle.set_strict_mode(0)  # so that libnbd sends what is wrong, too
    answers = [answer(handle, *request) for request in json.load(sys.stdin)]
    result = {"facts": facts(handle), "answers": answers, "content": digest(handle)}
    handle.shutdown()
    return result


print(json.dumps(main(*sys.argv[1:])))

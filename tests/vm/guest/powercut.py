"""Writes until the power is cut: ``powercut.py write``; and looks at what is left: ``powercut.py check NAME=COUNT…``.

Each writer has a server and a disk of its own, on the third disk of the machine. It writes one block after the other,
and says now and then how many are stable: ``reached NAME COUNT``. Those of one of them, the control, have only been
written: it has nothing flushed, and shows that the cut does cost something.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import nbd  # type: ignore[import-not-found, unused-ignore]

DEVICE = "/dev/vdc"
PLACE = Path("/srv/data")

BLOCK = 4096
BLOCKS = 4096  # of each disk
AT_ONCE = 8  # blocks between two flushes

#: The writer that has nothing flushed.
CONTROL = "control"


class Writer(NamedTuple):
    """How one of them writes, and to what."""

    words: Sequence[str]  #: of the command line; DISK is its file
    is_full: bool = False  #: the file has all of its blocks from the beginning on
    fua: bool = False  #: each block is stable when it is acknowledged
    flushes_elsewhere: bool = False  #: by another connection


WRITERS: Mapping[str, Writer] = {
    "flush": Writer(["file", "DISK"], is_full=True),
    "sparse": Writer(["file", "DISK"]),
    "fua": Writer(["file", "DISK"], fua=True),
    "workers": Writer(["--workers=2", "file", "DISK"], flushes_elsewhere=True),
    "blocks": Writer(["--filter=blocksize", "file", "DISK", "minblock=64k"]),
    "cow": Writer(["--filter=cow", "memory", str(BLOCKS * BLOCK), "cow-file=DISK"]),
    CONTROL: Writer(["file", "DISK"], is_full=True),
}


def block(number: int) -> bytes:
    """Return what is in a block."""
    return (number + 1).to_bytes(8, "big") * (BLOCK // 8)


@contextlib.contextmanager
def mounted() -> Iterator[None]:
    """The third disk is mounted meanwhile."""
    PLACE.mkdir(exist_ok=True)
    subprocess.run(["mount", DEVICE, PLACE], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", PLACE], check=True)


@contextlib.contextmanager
def served(name: str) -> Iterator[str]:
    """The server of a writer runs meanwhile; its URI."""
    words = [word.replace("DISK", str(PLACE / name)) for word in WRITERS[name].words]
    command = ["/usr/local/bin/nbdkitpy", "-f", "--print-uri", "-U", "-", *words]
    with (
        open(f"/srv/tmp/{name}.log", "wb") as log,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True) as server,
    ):
        assert server.stdout is not None
        uri = server.stdout.readline().strip()
        assert uri, Path(log.name).read_text()
        yield uri
        server.terminate()


def connect(uri: str) -> nbd.NBD:
    """Return a client."""
    client = nbd.NBD()
    client.connect_uri(uri)
    return client


def say(*words: object) -> None:
    """Say it in one piece."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


# --- before the cut ---


def write() -> None:
    """Write until somebody cuts the power."""
    subprocess.run(["mount", "--mkdir", DEVICE, PLACE], check=True)
    for name, writer in WRITERS.items():
        with open(PLACE / name, "wb") as disk:
            if writer.is_full:
                disk.write(bytes(BLOCKS * BLOCK))
            elif "cow-file=DISK" not in writer.words:
                disk.truncate(BLOCKS * BLOCK)
    (PLACE / "cow").unlink()
    os.sync()
    say("writers", *WRITERS)
    threads = [threading.Thread(target=_write, args=(name,)) for name in WRITERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raise SystemExit("the power has not been cut")


def _write(name: str) -> None:
    writer = WRITERS[name]
    with served(name) as uri:
        client, other = connect(uri), connect(uri)
        flusher = other if writer.flushes_elsewhere else client
        for number in range(BLOCKS):
            client.pwrite(block(number), number * BLOCK, nbd.CMD_FLAG_FUA if writer.fua else 0)
            if (number + 1) % AT_ONCE:
                continue
            if name == CONTROL:
                threading.Event().wait(0.02)  # so that it lasts, and not much of it is old enough to be written
            elif not writer.fua:
                flusher.flush()
            say("reached", name, number + 1)


# --- after it ---


def check(counts: Mapping[str, int]) -> None:
    """See that of each writer so many blocks are there, and say what the cut has cost."""
    with mounted():
        there = {name: _there(name) for name in counts}
    stable = {name: count for name, count in counts.items() if name != CONTROL}
    lost = {name: missing for name in stable if (missing := set(range(stable[name])) - there[name])}
    for name, missing in lost.items():
        say(f"LOST of {name}: {len(missing)} of {stable[name]} blocks, the first is {min(missing)}")
    control = counts[CONTROL] - len(there[CONTROL] & set(range(counts[CONTROL])))
    say(f"{sum(stable.values())} blocks had been acknowledged as stable; {sum(map(len, lost.values()))} are lost.")
    say(f"{counts[CONTROL]} others had been acknowledged as written; {control} are lost.")
    if not control:
        say("The cut has cost nothing, so it has proved nothing.")
    if lost or not control:
        raise SystemExit(1)


def _there(name: str) -> set[int]:
    """Which blocks of a writer are there."""
    with served(name) as uri:
        client = connect(uri)
        found = {number for number in range(BLOCKS) if client.pread(BLOCK, number * BLOCK) == block(number)}
        client.shutdown()
    return found


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write()
    else:
        check({name: int(count) for name, _, count in (word.partition("=") for word in sys.argv[2:])})

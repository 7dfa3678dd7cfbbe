"""Requests by which every engine is tested, and what has to come of them."""

from __future__ import annotations

import random

from nbdkitpy import Flags
from nbdkitpy.protocol.constants import Command, CommandFlag
from tests.nbdclient import NbdClient, Reply
from tests.serving import CONTENT, SIZE

__all__ = ["EACH_VERB", "VERBS", "ask", "check_pipeline", "use_each_verb"]

#: The command of each verb.
VERBS = {
    "pread": Command.READ,
    "pwrite": Command.WRITE,
    "flush": Command.FLUSH,
    "trim": Command.TRIM,
    "zero": Command.WRITE_ZEROES,
    "cache": Command.CACHE,
    "extents": Command.BLOCK_STATUS,
}

_MAY_TRIM, _DURABLE = int(Flags.MAY_TRIM), int(Flags.FUA)

#: The calls that :func:`use_each_verb` brings about.
EACH_VERB: list[tuple[object, ...]] = [
    ("pread", 20, 10),
    ("pwrite", 512, 0, 0),
    ("pwrite", 512, 512, _DURABLE),
    ("trim", 512, 0, 0),
    ("trim", 512, 512, _DURABLE),
    ("zero", 512, 0, _MAY_TRIM),
    ("zero", 512, 512, _MAY_TRIM | _DURABLE),
    ("zero", 4096, 0, int(Flags.FAST_ZERO)),
    ("flush",),
    ("cache", 65536, 0),
]


def ask(client: NbdClient, verb: str, offset: int = 0, length: int = 4096, *, flags: int = 0) -> Reply:
    """Send the request that comes to `verb`, and return the reply."""
    if verb == "flush":
        return client.call(Command.FLUSH, flags=flags)
    data = CONTENT[offset : offset + length] if verb == "pwrite" else b""
    return client.call(VERBS[verb], offset, length, flags=flags, data=data)


def use_each_verb(client: NbdClient) -> None:
    """Ask for what comes to each verb but that of extents."""
    fua = int(CommandFlag.FUA)
    assert ask(client, "pread", 10, 20).data == CONTENT[10:30]
    for verb in ("pwrite", "trim", "zero"):
        assert not ask(client, verb, 0, 512).error
        assert not ask(client, verb, 512, 512, flags=fua).error
    assert not ask(client, "zero", flags=CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO).error
    assert not ask(client, "flush").error
    assert not ask(client, "cache", 0, 65536).error


def check_pipeline(client: NbdClient) -> None:
    """Send many requests at once, and see that each is answered, and rightly."""
    some = random.Random(7)
    lengths = [1, 512, 4096, 16384, 50000]
    wanted: dict[int, bytes] = {}

    with client.batched():
        for number in range(200):
            length = some.choice(lengths)
            offset = some.randrange(SIZE - length)
            wanted[client.send(Command.READ, offset, length)] = CONTENT[offset : offset + length]
            if number % 10 == 0:
                wanted[client.send(Command.WRITE, 0, data=CONTENT[:3000])] = b""
                wanted[client.send(Command.TRIM, 0, 4096)] = b""
    replies = client.replies(len(wanted))

    assert {cookie: reply.data for cookie, reply in replies.items()} == wanted
    assert not any(reply.error for reply in replies.values())

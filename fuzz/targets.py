"""What is fuzzed: functions that take any bytes, and raise AssertionError if the server does not do with them what it
should.

The first bytes of an input say what the server offers and into what pieces the rest is cut, which is what a client
sends. So an input that was found says all that there is to know.
"""

from __future__ import annotations

import contextlib
import functools
import random
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from nbdkitpy.protocol.constants import TlsMode, TransmissionFlag
from nbdkitpy.server.options import ServerOptions
from tests.fuzzing.answers import Output, ReplyReader, read_answers, read_greeting
from tests.fuzzing.core import HandshakeDriver, TransmissionDriver
from tests.fuzzing.model import (
    Agreement,
    ConversationModel,
    Disk,
    Export,
    HandshakeModel,
    Phase,
    Terms,
    TransmissionModel,
    Verdict,
    unordered,
)
from tests.fuzzing.shelf import Manner, Shelf
from tests.fuzzing.tape import Log, Tape, play
from tests.fuzzing.witness import Witness

__all__ = ["CONFIG", "EXPORTS", "TARGETS", "Config", "conversation", "handshake", "session", "transmission"]

#: Before the stream: what is offered (see :class:`Config`), and a number by which the stream is cut.
CONFIG = struct.Struct(">BBH")

_ALL = TransmissionFlag(0x0D6D)  # what can be written, trimmed, zeroed, flushed and cached, with FUA and FAST_ZERO
_READ_ONLY = TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY | TransmissionFlag.SEND_FLUSH
_SIZE = 1 << 16
_LARGE = 1 << 19

EXPORTS: Mapping[str, Export] = MappingProxyType(
    {
        "": Export(_SIZE, _ALL, "disk", "a disk"),
        "disk": Export(_SIZE, _ALL, "disk", "a disk"),
        "large": Export(_LARGE, _ALL, "large"),
        "broken": Export(_SIZE, _ALL, "broken"),
        "read-only": Export(_SIZE, _READ_ONLY, "read-only", "näher"),
        "blocks": Export(_SIZE, _ALL, "blocks", minimum=512, preferred=4096, maximum=8192),
        "poor": Export(40_000, TransmissionFlag.HAS_FLAGS, "poor"),
    }
)
_BROKEN = range(9000, 12000)

#: What comes behind the stream if that is wanted, so that messages need not be as long as they say they are: writes
#: of some 4 KiB, compact or extended.
_FILL = {
    False: (struct.pack(">IHHQQI", 0x25609513, 0, 1, 0xF111, 0, 4068) + bytes(4068)) * 140,
    True: (struct.pack(">IHHQQQ", 0x21E41C71, 32, 1, 0xF111, 0, 4064) + bytes(4064)) * 140,
}

_STARTTLS = re.compile(re.escape(b"IHAVEOPT\0\0\0\5\0\0\0\0"))


class Config(NamedTuple):
    """What the first bytes of an input say."""

    tls: TlsMode = TlsMode.OFF
    structured_replies: bool = True
    meta_contexts: bool = True
    filled: bool = False  #: more comes behind the stream
    rests: bool = False  #: the client is quiet for a while after each piece
    export: int = 0  #: number of the one that is open from the start, where there is no handshake
    handshake_flags: int = 3
    structured: bool = False  #: where there is no handshake
    extended: bool = False
    contexts: bool = False
    cuts: int = 0  #: which

    def pack(self) -> bytes:
        """Return the bytes that say so."""
        offers = list(TlsMode).index(self.tls) | self.structured_replies << 2 | self.meta_contexts << 3
        offers |= self.filled << 4 | self.rests << 5 | self.handshake_flags << 6
        agreed = self.export | self.structured << 4 | self.extended << 5 | self.contexts << 6
        return CONFIG.pack(offers, agreed, self.cuts)

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        """Return what the bytes say; any do."""
        offers, agreed, cuts = CONFIG.unpack(data)
        modes = list(TlsMode)
        return cls(
            modes[(offers & 3) % len(modes)],
            bool(offers & 4),
            bool(offers & 8),
            bool(offers & 16),
            bool(offers & 32),
            (agreed & 15) % len(EXPORTS),
            offers >> 6,
            bool(agreed & 16),
            bool(agreed & 32),
            bool(agreed & 64),
            cuts,
        )

    @property
    def terms(self) -> Terms:
        """What the server has and offers."""
        listed = [(name, export.description or "") for name, export in EXPORTS.items()]
        return Terms(
            EXPORTS, listed, self.tls, self.structured_replies, self.meta_contexts, handshake_flags=self.handshake_flags
        )

    @property
    def agreement(self) -> Agreement:
        """What holds where there is no handshake."""
        export = list(EXPORTS.values())[self.export]
        flags = export.flags
        if self.structured or self.extended:
            flags |= TransmissionFlag.SEND_DF
        if self.extended and self.contexts:
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return Agreement(
            export.size, flags, export.minimum, export.maximum, self.structured, self.extended, self.contexts
        )


def opened(data: bytes) -> tuple[Config, bytes]:
    """Return what an input says, and the stream in it."""
    head = data[: CONFIG.size].ljust(CONFIG.size, b"\0")
    return Config.unpack(head), data[CONFIG.size :]


def pieces(stream: bytes, cuts: int) -> Iterator[bytes]:
    """Cut a stream into up to nine pieces, with 0 not at all.

    With an even number it is also cut behind each STARTTLS, where a client has to wait before it goes on.
    """
    chance = random.Random(cuts)
    places = [chance.randint(0, len(stream)) for _ in range(cuts % 9)]
    if not cuts & 1:
        places += [found.end() for found in _STARTTLS.finditer(stream)]
    places.sort()
    yield from (stream[start:end] for start, end in zip([0, *places], [*places, len(stream)]))


def _all_pieces(config: Config, stream: bytes, *, extended: bool) -> Iterator[bytes]:
    yield from pieces(stream, config.cuts)
    if config.filled:
        yield from pieces(_FILL[extended], config.cuts)


@functools.cache
def _content(size: int) -> bytes:
    """Blocks of 4 KiB: data, zeroes, zeroes."""
    chance = random.Random(size)
    return b"".join(bytes(4096) if block % 3 else chance.randbytes(4096) for block in range(-(-size // 4096)))[:size]


def disks() -> dict[str, Disk]:
    """Return what is behind the exports."""
    return {
        name: Disk(_content(export.size), _BROKEN if name == "broken" else range(0)) for name, export in EXPORTS.items()
    }


# --- targets ---


def handshake(data: bytes) -> None:
    """The handshake: what is answered, what is agreed on, and what is left over."""
    config, stream = opened(data)
    driver, model = HandshakeDriver(config.terms), HandshakeModel(config.terms)
    greeting = Output(driver.greeting)
    read_greeting(greeting, config.handshake_flags)
    assert not greeting, "something is behind the greeting"
    left = b""
    for piece in _all_pieces(config, stream, extended=False):
        output = Output(driver.hear(piece))
        read_answers(output, model.hear(piece))
        assert not output, "something is behind the answers"
        assert driver.phase is model.phase
        left += driver.handshake.take_unprocessed() if model.phase is Phase.TRANSMISSION else b""
    if model.phase is Phase.TRANSMISSION:
        assert driver.agreement == model.agreement
        assert driver.opened == model.export_name
        assert left == model.rest()


def transmission(data: bytes) -> None:
    """The transmission phase: what comes of each request."""
    config, stream = opened(data)
    driver, model = TransmissionDriver(config.agreement), TransmissionModel(config.agreement)
    for piece in _all_pieces(config, stream, extended=config.extended):
        found = list(driver.verdicts(piece, rest=config.rests))
        expected = model.hear(piece)
        assert [verdict for verdict in found if not verdict.error] == [each for each in expected if not each.error]
        assert list(_refusals(found)) == list(_refusals(expected))
        assert driver.phase is model.phase
        assert driver.transmission.at_boundary == model.at_boundary


def _refusals(verdicts: list[Verdict]) -> Iterator[tuple[int, int, int]]:
    return ((verdict.error, verdict.cookie, verdict.offset) for verdict in verdicts if verdict.error)


def conversation(data: bytes) -> None:
    """Both phases, and replies: every byte that comes back."""
    config, stream = opened(data)
    witness = Witness(config.terms, disks)
    for piece in _all_pieces(config, stream, extended=config.extended):
        witness.hear(piece, rest=config.rests)


def session(data: bytes) -> None:
    """The real session and its engine, over a recording: every byte that comes back, and what is then on the disks."""
    config, stream = opened(data)
    tape = Tape(list(_all_pieces(config, stream, extended=config.extended)))
    log = Log()
    model = ConversationModel(config.terms, disks())
    # What lies in a file is read when it is sent, so that a later write may be in it.
    manner, expectations = (Manner.FILE, unordered) if config.rests else (Manner.INLINE, list)
    shelf = Shelf(EXPORTS, disks(), manner)
    options = ServerOptions(
        tls=config.tls,
        structured_replies=config.structured_replies,
        meta_contexts=config.meta_contexts,
        handshake_flags=config.handshake_flags,
    )
    with contextlib.closing(shelf):
        play(shelf, tape, options, log)
        for part in tape.taken:
            model.hear(part)
        output = Output(b"".join(tape.sent))
        read_greeting(output, config.handshake_flags)
        read_answers(output, model.answers)
        if model.agreement is not None:
            reader = ReplyReader(model.agreement.style)
            for expected in expectations(model.replies):
                reader.expect(expected)
            reader.read(output)
            assert not reader.unanswered, "some requests have no reply"
            assert shelf.content(model.handshake.export_name) == model.disk.content
        assert not output, "something is behind the answers"
    assert not log.failures, log.failures


TARGETS: Mapping[str, Callable[[bytes], None]] = MappingProxyType(
    {"handshake": handshake, "transmission": transmission, "conversation": conversation, "session": session}
)

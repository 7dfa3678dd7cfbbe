"""A server without input and output: the core of the real one, with disks of the model behind it.

Whatever it is fed, what the core holds is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

from nbdkitpy.protocol.constants import BASE_ALLOCATION, Command, CommandFlag, NbdError, OptionReply, TransmissionFlag
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.protocol.handshake import (
    Closed,
    Event,
    ExportFacts,
    Handshake,
    ListExports,
    Negotiated,
    OpenExport,
    Ready,
    StartTls,
)
from nbdkitpy.protocol.messages import BlockSizeInfo
from nbdkitpy.protocol.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from nbdkitpy.protocol.transmission import Refusal, Request, Transmission
from tests.fuzzing.model import LONGEST_GO, Agreement, Disk, Phase, Terms, Verdict
from tests.nbdclient import Style

__all__ = ["BUFFERS", "Core", "HandshakeDriver", "TransmissionDriver", "held", "transmission_of"]

#: What a handshake that is not over may hold beyond an option: names, and why the option is refused.
_NAMES = 3 * 4096

#: What the buffers of the transmission phase have, however little has come: the large one, and one for a payload.
BUFFERS = 2 * (256 << 10) + 4096

#: So much of a buffer is made unlike anything before bytes are put there: they do not count until they have come.
_POISON = b"\xee" * 256

_REPLIES: Mapping[Style, Callable[[], Replies]] = {
    Style.SIMPLE: SimpleReplies,
    Style.STRUCTURED: StructuredReplies,
    Style.EXTENDED: ExtendedReplies,
}
_BLOCK = 4096


def held(thing: object) -> int:
    """Return the bytes that an object of the core holds: in buffers, in texts, and in what there is several of."""
    if isinstance(thing, memoryview):
        return memoryview(thing.obj).nbytes
    if isinstance(thing, (bytes, bytearray, str)):
        return len(thing)
    if isinstance(thing, (tuple, list, set, frozenset)):
        return sum(map(held, thing))
    return sum(map(held, _attributes(thing))) if isinstance(thing, (Handshake, Transmission)) else 0


def _attributes(thing: object) -> Iterator[object]:
    slots = getattr(type(thing), "__slots__", ())
    yield from (getattr(thing, slot) for slot in slots if hasattr(thing, slot))
    yield from getattr(thing, "__dict__", {}).values()


def _check_text(text: str) -> None:
    assert text.isprintable(), text
    assert len(text) < 512, text


class HandshakeDriver:
    """Drives a handshake as a session does, for a server with these terms."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self.handshake = Handshake(
            handshake_flags=terms.handshake_flags,
            structured_replies=terms.structured_replies,
            meta_contexts=terms.meta_contexts,
            tls=terms.tls,
        )
        self.phase = Phase.HANDSHAKE
        self.opened: str | None = None  #: name of the export that requests go to
        self.agreement: Agreement | None = None
        self.greeting = self.handshake.data_to_send()
        self._given = 0

    def hear(self, data: bytes) -> bytes:
        """Take some bytes, and return what is answered."""
        self._given += len(data)
        output = b""
        self.handshake.receive_data(data)
        while self.phase is Phase.HANDSHAKE:
            try:
                event = self.handshake.next_event()
                self._answer(event)
            except RemoteProtocolError as violation:
                _check_text(str(violation))
                self.phase, event = Phase.BROKEN, None
            for text in self.handshake.refusals:
                _check_text(text)
            self.handshake.refusals.clear()
            output += self.handshake.data_to_send()
            if isinstance(event, StartTls):
                self.handshake.tls_started()
            if event is None:
                break
        self._check_memory(len(data))
        return output

    def _check_memory(self, count: int) -> None:
        most = self._given if self.phase is not Phase.HANDSHAKE else min(self._given, 16 + LONGEST_GO)
        assert held(self.handshake) <= most + _NAMES, "memory is bought with bytes"
        if self.phase in (Phase.LEFT, Phase.BROKEN):
            self.handshake.receive_data(bytes(1000))
            assert self.handshake.next_event() is None
            assert self.handshake.take_unprocessed() == self.handshake.data_to_send() == b"", "it is at its end"

    def _answer(self, event: Event | None) -> None:
        if isinstance(event, ListExports):
            self.handshake.exports_listed(self._terms.listed)
        elif isinstance(event, OpenExport):
            self._open(event)
        elif isinstance(event, Closed):
            self.phase = Phase.LEFT
        elif isinstance(event, Ready):
            self.phase = Phase.TRANSMISSION

    def _open(self, event: OpenExport) -> None:
        export = self._terms.exports.get(event.name)
        if export is None:
            self.handshake.export_refused(OptionReply.ERR_UNKNOWN, f"there is no export {event.name}")
            return
        negotiated = self.handshake.negotiated
        flags = export.flags | _flags(negotiated)
        contexts = BASE_ALLOCATION in negotiated.contexts
        self.agreement = Agreement(
            export.size,
            flags,
            export.minimum,
            export.maximum,
            negotiated.structured_replies,
            negotiated.extended_headers,
            contexts,
        )
        self.opened = event.name
        sizes = BlockSizeInfo(export.minimum, export.preferred, export.maximum)
        description = export.description if event.wants_description else None
        self.handshake.export_opened(ExportFacts(export.size, flags, export.name, description, sizes))


def _flags(negotiated: Negotiated) -> TransmissionFlag:
    flags = TransmissionFlag(0)
    if negotiated.structured_replies or negotiated.extended_headers:
        flags |= TransmissionFlag.SEND_DF
    if negotiated.extended_headers and negotiated.contexts:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return flags


def transmission_of(agreement: Agreement) -> Transmission:
    """Return the core of what was agreed on."""
    return Transmission(
        agreement.size,
        agreement.flags,
        minimum=agreement.minimum,
        maximum=agreement.maximum,
        structured=agreement.structured,
        extended=agreement.extended,
        contexts=agreement.contexts,
    )


class TransmissionDriver:
    """Puts bytes where the core wants them, and sees that it does not want too much."""

    def __init__(self, agreement: Agreement) -> None:
        self.transmission = transmission_of(agreement)
        self._given = 0

    @property
    def phase(self) -> Phase:
        """How far it has come."""
        if not self.transmission.finished:
            return Phase.TRANSMISSION
        return Phase.LEFT if self.transmission.failure is None else Phase.BROKEN

    def hear(self, data: bytes, *, rest: bool = False) -> Iterator[Request | Refusal]:
        """Take some bytes, and yield what comes of them. Payloads are valid until the next is asked for.

        Args:
            data: From the client.
            rest: It is quiet for a while then.
        """
        left = memoryview(data)
        while left and not self.transmission.finished:
            room = self.transmission.buffer()
            assert len(room) > 0, "there is always room"
            count = min(len(room), len(left))
            room[: len(_POISON)] = _POISON[: len(room)]
            room[:count] = left[:count]
            room[count : count + len(_POISON)] = _POISON[: len(room) - count]
            left = left[count:]
            self._given += count
            yield from self.transmission.received(count)
            refusals, self.transmission.refusals = self.transmission.refusals, []
            for refusal in refusals:
                _check_text(refusal.message)
            yield from refusals
            assert held(self.transmission) <= BUFFERS + 4 * self._given, "memory is bought with bytes"
        if rest:
            self.transmission.rest()
        if self.transmission.failure is not None:
            assert self.transmission.finished, "it is at its end"
            _check_text(str(self.transmission.failure))

    def verdicts(self, data: bytes, *, rest: bool = False) -> Iterator[Verdict]:
        """Take some bytes, and yield what comes of them in the words of the model."""
        for outcome in self.hear(data, rest=rest):
            if isinstance(outcome, Refusal):
                yield Verdict(int(outcome.error), outcome.cookie, -1, -1, outcome.offset, -1)
            else:
                command, flags, cookie, offset, length, payload = outcome
                yield Verdict(0, cookie, command, flags, offset, length, bytes(payload))


class Core:
    """Serves one client: bytes in, bytes out."""

    def __init__(self, terms: Terms, disks: Mapping[str, Disk]) -> None:
        self._handshake = HandshakeDriver(terms)
        self._disks = disks
        self._disk = Disk(b"")
        self._transmission: TransmissionDriver | None = None
        self._replies: Replies = SimpleReplies()
        self.greeting = self._handshake.greeting

    @property
    def phase(self) -> Phase:
        """How far the conversation has come."""
        return self._handshake.phase if self._transmission is None else self._transmission.phase

    @property
    def agreement(self) -> Agreement | None:
        """What was agreed on, once the handshake is over."""
        return None if self._transmission is None else self._handshake.agreement

    def shut_down(self) -> None:
        """Refuse what is asked from now on."""
        self._handshake.handshake.shutting_down = True
        if self._transmission is not None:
            self._transmission.transmission.refuse_all()

    def hear(self, data: bytes, *, rest: bool = False) -> bytes:
        """Take some bytes, and return what is answered."""
        output = b""
        if self._transmission is None:
            output = self._handshake.hear(data)
            if self.phase is not Phase.TRANSMISSION:
                return output
            self._begin()
            data = self._handshake.handshake.take_unprocessed()
        assert self._transmission is not None, "it has begun"
        return output + b"".join(self._reply(outcome) for outcome in self._transmission.hear(data, rest=rest))

    def _begin(self) -> None:
        agreement, opened = self._handshake.agreement, self._handshake.opened
        assert agreement is not None
        assert opened is not None
        self._transmission = TransmissionDriver(agreement)
        self._disk, self._replies = self._disks[opened], _REPLIES[agreement.style]()

    # --- requests ---

    def _reply(self, outcome: Request | Refusal) -> bytes:
        if isinstance(outcome, Refusal):
            return self._replies.error(*outcome)
        command, flags, cookie, offset, length, payload = outcome
        expected = self._disk.carry_out(Verdict(0, cookie, command, flags, offset, length, bytes(payload)))
        if command == Command.READ and self._replies.chunked and not flags & CommandFlag.DF:
            return b"".join(self._chunks(outcome))
        if expected.error:
            return self._replies.error(cookie, offset, NbdError(expected.error), "it is broken")
        if command == Command.READ:
            return self._replies.data(cookie, offset, length) + (expected.content or b"")
        if command == Command.BLOCK_STATUS:
            extents = [
                (end - start, 0 if has_data else 2) for start, end, has_data in _runs(expected.content or b"", offset)
            ]
            return self._replies.block_status(cookie, offset, extents[:1] if flags & CommandFlag.REQ_ONE else extents)
        return self._replies.success(cookie, offset)

    def _chunks(self, request: Request) -> Iterator[bytes]:
        """The reply to a READ in pieces, as far as there is nothing broken."""
        _, _, cookie, offset, length, _ = request
        content = bytes(self._disk.content[offset : offset + length])
        for start, end, has_data in _runs(content, offset):
            if self._disk.is_broken(start, end):
                yield self._replies.error(cookie, offset, NbdError.EIO, "it is broken from here on")
                return
            if not has_data:
                yield self._replies.hole(cookie, offset, start, end - start)
            else:
                yield self._replies.part(cookie, offset, start, end - start) + content[start - offset : end - offset]
        yield self._replies.end(cookie, offset)


def _runs(content: bytes, offset: int) -> list[tuple[int, int, bool]]:
    """Start, end, and whether there are data, of the pieces of which some content at `offset` consists."""
    edges = [0, *range(-offset % _BLOCK or _BLOCK, len(content), _BLOCK), len(content)]
    pieces = [(start, end, any(content[start:end])) for start, end in itertools.pairwise(edges)]
    groups = (list(group) for _, group in itertools.groupby(pieces, lambda piece: piece[2]))
    return [(offset + group[0][0], offset + group[-1][1], group[0][2]) for group in groups]

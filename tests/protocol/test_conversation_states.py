"""Handshake and transmission against the model, step by step: any option or request, in any order, at any time."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fuzz.targets import EXPORTS, Config, disks
from nbdkitpy.protocol.constants import TlsMode
from tests.fuzzing import streams
from tests.fuzzing.effort import Tally, fuzz
from tests.fuzzing.model import Phase
from tests.fuzzing.streams import option
from tests.fuzzing.witness import Witness
from tests.nbdclient import Style

CUTS = st.lists(st.integers(0, 1 << 20), max_size=3)
EXPORT_NAMES = st.sampled_from([name.encode() for name in EXPORTS])

#: What may well end a conversation is not said before so many steps.
LATE = 6


def during(phase: Phase, *, late: bool = False) -> Callable[[ConversationMachine], bool]:
    return lambda machine: machine.phase is phase and (machine.steps >= LATE or not late)


class ConversationMachine(RuleBasedStateMachine):
    """One client; each step compares every byte that the server answers with what the model has it answer."""

    tally: ClassVar[Tally]

    def __init__(self) -> None:
        super().__init__()
        self._witness = Witness(Config().terms, disks)
        self._cookies = 0
        self.steps = 0
        self._is_ending = False

    @property
    def phase(self) -> Phase:
        return self._witness.phase

    def say(self, data: bytes, cuts: list[int], *, rest: bool = False) -> None:
        self.steps += 1
        for piece in streams.split(data, cuts):
            self._witness.hear(piece, rest=rest)

    def begin(self, config: Config, client_flags: int) -> None:
        self._witness = Witness(config.terms, disks)
        self.tally["conversations step by step"] += 1
        self._witness.hear(client_flags.to_bytes(4, "big"))

    @initialize(
        tls=st.sampled_from(TlsMode),
        structured_replies=st.sampled_from([True, True, True, False]),
        meta_contexts=st.sampled_from([True, True, True, False]),
        handshake_flags=st.sampled_from([3, 3, 3, 1, 2, 0]),
        client_flags=st.sampled_from([3, 3, 3, 1, 2, 0, 4]),
        is_over=st.booleans(),
        style=st.sampled_from(Style),
        context_of=st.none() | EXPORT_NAMES,
        name=EXPORT_NAMES,
        says_too_early=st.booleans(),
    )
    def begins(
        self,
        tls: TlsMode,
        structured_replies: bool,
        meta_contexts: bool,
        handshake_flags: int,
        client_flags: int,
        is_over: bool,
        style: Style,
        context_of: bytes | None,
        name: bytes,
        says_too_early: bool,
    ) -> None:
        if is_over:  # the handshake: without hurry it takes most steps
            self.begin(Config(tls), 3)
            if tls is not TlsMode.OFF:
                if says_too_early:
                    self.negotiate(Style.EXTENDED, name)
                self.say(option(5), [])
            self.negotiate(style, context_of)
            self.say(option(7, streams.info(name, [])), [])
            assert self.phase is Phase.TRANSMISSION
            return
        # What was not offered is asked for seldom, as that is the end.
        flags = client_flags if client_flags == 4 else client_flags & handshake_flags
        self.begin(Config(tls, structured_replies, meta_contexts, handshake_flags=handshake_flags), flags)

    def negotiate(self, style: Style, context_of: bytes | None) -> None:
        if style is not Style.SIMPLE:
            self.say(option(11 if style is Style.EXTENDED else 8), [])
        if context_of is not None:
            self.say(option(10, streams.meta(context_of, [b"base:allocation"])), [])

    # --- options ---

    @precondition(during(Phase.HANDSHAKE))
    @rule(data=streams.haggling, cuts=CUTS)
    def haggles(self, data: bytes, cuts: list[int]) -> None:
        self.say(data, cuts)

    @precondition(during(Phase.HANDSHAKE))
    @rule(number=st.sampled_from([8, 11]))
    def asks_for_chunked_replies(self, number: int) -> None:
        self.say(option(number), [])

    @precondition(during(Phase.HANDSHAKE))
    @rule(name=EXPORT_NAMES, number=st.sampled_from([9, 10, 10]))
    def asks_for_block_status(self, name: bytes, number: int) -> None:
        self.say(option(number, streams.meta(name, [b"base:allocation"])), [])

    @precondition(during(Phase.HANDSHAKE))
    @rule(cuts=CUTS)
    def starts_tls(self, cuts: list[int]) -> None:
        self.say(option(5), cuts)

    @precondition(during(Phase.HANDSHAKE, late=True))
    @rule(behind=streams.options)
    def sends_clear_text_behind_starttls(self, behind: bytes) -> None:
        self.say(option(5) + behind, [])

    @precondition(during(Phase.HANDSHAKE))
    @rule(name=EXPORT_NAMES, number=st.sampled_from([6, 7, 7]), types=streams.types, cuts=CUTS)
    def asks_for_an_export(self, name: bytes, number: int, types: list[int], cuts: list[int]) -> None:
        self.say(option(number, streams.info(name, types)), cuts)

    @precondition(during(Phase.HANDSHAKE, late=True))
    @rule(name=EXPORT_NAMES | streams.names, cuts=CUTS)
    def names_an_export(self, name: bytes, cuts: list[int]) -> None:
        self.say(option(1, name), cuts)

    @precondition(during(Phase.HANDSHAKE, late=True))
    @rule(data=streams.options, cuts=CUTS)
    def says_anything(self, data: bytes, cuts: list[int]) -> None:
        self.say(data, cuts)

    # --- requests ---

    @property
    def extended(self) -> bool:
        agreement = self._witness.model.agreement
        return agreement is not None and agreement.extended

    @precondition(during(Phase.TRANSMISSION))
    @rule(data=st.data(), count=st.integers(1, 4), cuts=CUTS, rest=st.booleans())
    def asks_for_several_things(self, data: st.DataObject, count: int, cuts: list[int], rest: bool) -> None:
        said = []
        for _ in range(count):
            self._cookies += 1
            said.append(data.draw(streams.requests(extended=self.extended, cookie=self._cookies)))
        self.tally["requests step by step"] += count
        self.say(b"".join(said), cuts, rest=rest)

    @precondition(during(Phase.TRANSMISSION))
    @rule(payload=st.integers(1, 1 << 17), cuts=CUTS, rest=st.booleans())
    def writes_and_reads_again(self, payload: int, cuts: list[int], rest: bool) -> None:
        self._cookies += 2
        flags = streams.PAYLOAD_LEN if self.extended else 0
        data = streams.NOISE[self._cookies : self._cookies + payload]
        write = streams.request(streams.WRITE, flags, self._cookies, 0, payload, data, extended=self.extended)
        read = streams.request(streams.READ, 0, self._cookies - 1, 0, payload, extended=self.extended)
        self.say(write + read, cuts, rest=rest)

    @precondition(during(Phase.TRANSMISSION, late=True))
    @rule(flags=st.sampled_from([0, 1, 0xFFFF]))
    def disconnects(self, flags: int) -> None:
        self.say(streams.request(streams.DISC, flags, 1, 0, 0, extended=self.extended), [])

    @precondition(during(Phase.TRANSMISSION, late=True))
    @rule(data=st.binary(min_size=32, max_size=64))
    def sends_what_is_no_request(self, data: bytes) -> None:
        self.say(b"\0" + data, [])

    # --- the end ---

    @precondition(lambda machine: not machine._is_ending and machine.steps >= LATE and machine.is_between_messages)
    @rule()
    def server_is_about_to_end(self) -> None:
        self._is_ending = True
        self._witness.shut_down()

    @property
    def is_between_messages(self) -> bool:
        return self._witness.model.is_between_messages

    @precondition(lambda machine: machine.phase in (Phase.LEFT, Phase.BROKEN))
    @rule(data=streams.options)
    def goes_on_though_it_is_over(self, data: bytes) -> None:
        self.say(data, [])


def test_each_step_is_answered_as_the_model_says(tally: Tally) -> None:
    class Counted(ConversationMachine):
        pass

    Counted.tally = tally

    run_state_machine_as_test(Counted, settings=fuzz(200, steps=15))

"""Feeds a server without input and output, and the model, the same bytes, and compares what comes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tests.fuzzing.answers import Output, ReplyReader, read_answers, read_greeting
from tests.fuzzing.core import Core
from tests.fuzzing.model import ConversationModel, Disk, Phase, Terms

__all__ = ["Witness"]


class Witness:
    """One conversation with :class:`Core`.

    Args:
        terms: Of the server.
        disks: Called twice, for what is behind the server and what is behind the model.
    """

    def __init__(self, terms: Terms, disks: Callable[[], Mapping[str, Disk]]) -> None:
        self._core, self.model = Core(terms, disks()), ConversationModel(terms, disks())
        self._reader: ReplyReader | None = None
        greeting = Output(self._core.greeting)
        read_greeting(greeting, terms.handshake_flags)
        assert not greeting, "something is behind the greeting"

    @property
    def phase(self) -> Phase:
        """How far the conversation has come, of which both are of one opinion."""
        return self.model.phase

    def shut_down(self) -> None:
        """Have the server be about to end. Nothing may be underway."""
        self._core.shut_down()
        self.model.shut_down()

    def hear(self, data: bytes, *, rest: bool = False) -> None:
        """Take some bytes, and check each byte of the answer.

        Args:
            data: From the client.
            rest: It is quiet for a while then.

        Raises:
            AssertionError: the server does not do what it should.
        """
        output = Output(self._core.hear(data, rest=rest))
        answered, replied = len(self.model.answers), len(self.model.replies)
        self.model.hear(data)
        read_answers(output, self.model.answers[answered:])
        assert self._core.phase is self.model.phase
        agreement = self.model.agreement
        assert self._core.agreement == agreement
        if agreement is None:
            assert not output, "something is behind the answers"
            return
        self._reader = self._reader or ReplyReader(agreement.style)
        for expected in self.model.replies[replied:]:
            self._reader.expect(expected)
        self._reader.read(output)
        assert not self._reader.unanswered, "some requests have no reply"

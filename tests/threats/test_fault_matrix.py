"""Every call of a plugin or filter goes wrong in every way, and nobody is hurt but the client it was made for."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from nbdkitpy import ThreadModel
from nbdkitpy.backend import VERBS
from tests.conftest import StartServer
from tests.serving import CONTENT, Running
from tests.threats.saboteur import (
    IN_TRANSMISSION,
    NEEDS,
    NONSENSE,
    RAISED,
    Fault,
    SabotagedFilter,
    SabotagedPlugin,
    Saboteur,
    raising,
    returning,
    use_all,
)

#: What makes the other ways to read lead nowhere, so that pread is called.
NO_SHORTCUTS: dict[str, Fault] = {"pread_into": lambda: False, "file_range": lambda: None}

#: Who makes the calls: workers, the reading thread, or the reading thread under a lock.
ENGINES: dict[str, tuple[ThreadModel, frozenset[str]]] = {
    "workers": (ThreadModel.PARALLEL, frozenset()),
    "inline": (ThreadModel.PARALLEL, frozenset(VERBS)),
    "serialised": (ThreadModel.SERIALIZE_ALL_REQUESTS, frozenset()),
}

#: Ways to read that are not taken there.
NOT_CALLED = {*((way, "serialised") for way in NO_SHORTCUTS), ("pread_into", "inline"), ("file_range", "workers")}


def cells(calls: Iterable[str]) -> list[tuple[str, str, str]]:
    """The layers that have each of `calls`, and the engines that make a difference to it."""
    return [
        (layer, call, engine)
        for layer in ("plugin", "filter")
        for call in calls
        for engine in (ENGINES if call in IN_TRANSMISSION else ["workers"])
        if (layer, call) != ("plugin", "wrap") and (call, engine) not in NOT_CALLED
    ]


class Sabotaged:
    """A server of a stack in which any call may go wrong, and a client for whom none does."""

    def __init__(self, start_server: StartServer, layer: str, engine: str) -> None:
        model, inline = ENGINES[engine]
        self.saboteur = Saboteur()
        harmless = Saboteur()
        in_plugin = layer == "plugin"
        self.plugin = SabotagedPlugin(self.saboteur if in_plugin else harmless, model, inline)
        self._server: Running = start_server(
            self.plugin, SabotagedFilter(harmless if in_plugin else self.saboteur, inline)
        )
        self._bystander = self._server.connect()
        self.saboteur.spared.add(1)

    def suffer(self, call: str, fault: Fault) -> set[str] | None:
        """Have `call` go wrong for one client, and return what failed for that; None if it was not called."""
        self.saboteur.done.clear()
        self.saboteur.faults = {**NO_SHORTCUTS, call: fault} if call == "pread" else {call: fault}
        failed = use_all(self._server.dial())
        self._server.wait_for_sessions(1)
        assert self._bystander.read(0, 512) == CONTENT[:512]
        return failed if self.saboteur.done[call] else None

    def end(self, *, closes: bool = True) -> None:
        """See that all is as if nothing had happened."""
        self.saboteur.faults = {}
        assert use_all(self._server.dial()) == set()
        self._bystander.disconnect()
        assert self._server.stop()
        assert not closes or sorted(self.plugin.opened) == sorted(self.plugin.closed)


@pytest.mark.parametrize(("layer", "call", "engine"), cells(NEEDS))
def test_G1_whatever_a_call_raises_hurts_nobody_else(
    start_server: StartServer, layer: str, call: str, engine: str
) -> None:
    sabotaged = Sabotaged(start_server, layer, engine)

    failed = {name: sabotaged.suffer(call, raising(make)) for name, make in RAISED.items()}

    assert failed == dict.fromkeys(RAISED, NEEDS[call])
    sabotaged.end(closes=call != "close")


#: What is returned in place of True and False is taken for the latter, and another way is taken.
FORGIVEN = {"pread_into"}


@pytest.mark.parametrize(("layer", "call", "engine"), cells(NONSENSE))
def test_G2_G4_whatever_a_call_returns_hurts_nobody_else(
    start_server: StartServer, layer: str, call: str, engine: str
) -> None:
    sabotaged = Sabotaged(start_server, layer, engine)

    failed = [sabotaged.suffer(call, returning(value)) for value in NONSENSE[call]]

    assert failed == [set() if call in FORGIVEN else NEEDS[call] for _ in NONSENSE[call]]
    sabotaged.end()

"""Every call of a plugin or filter goes wrong in every way, and nobody is hurt but the client it was made for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest

from nbdkitpy import ThreadModel
from nbdkitpy.backend import VERBS
from nbdkitpy.server import service
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE
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
        outer = SabotagedFilter(harmless if in_plugin else self.saboteur, inline)
        self.server: Running = start_server(self.plugin, outer, drain=0.1)
        self._bystander = self.server.connect()
        self.saboteur.spared.add(1)

    def suffer(self, call: str, fault: Fault) -> set[str] | None:
        """Have `call` go wrong for one client, and return what failed for that; None if it was not called."""
        self.saboteur.done.clear()
        failed = self.use(call, fault)
        self.server.wait_for_sessions(1)
        self.check_others()
        return failed if self.saboteur.done[call] else None

    def use(self, call: str, fault: Fault) -> set[str]:
        """Have a client use everything while `call` goes wrong, and return what failed."""
        self.saboteur.faults = {**NO_SHORTCUTS, call: fault} if call == "pread" else {call: fault}
        return use_all(self.server.dial())

    def check_others(self) -> None:
        """See that the client for whom nothing goes wrong is served."""
        assert self._bystander.read(0, 512) == CONTENT[:512]

    def end(self, *, closes: bool = True) -> None:
        """See that all is as if nothing had happened."""
        self.saboteur.faults = {}
        assert use_all(self.server.dial()) == set()
        self.check_others()
        assert self.server.stop()
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


@pytest.mark.parametrize("layer", ["plugin", "filter"])
def test_G3_calls_that_do_not_return_hold_up_nobody_else_nor_the_end(
    start_server: StartServer, layer: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sabotaged = Sabotaged(start_server, layer, "workers")
    inside, gate = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        inside.release()
        gate.wait()
        raise OSError

    calls = [call for in_layer, call, engine in cells(NEEDS) if (in_layer, engine) == (layer, "workers")]
    clients = [threading.Thread(target=sabotaged.use, args=(call, wait)) for call in calls]
    for client in clients:
        client.start()
        assert inside.acquire(timeout=PATIENCE)
    sabotaged.saboteur.faults = {}
    assert use_all(sabotaged.server.dial()) == set()
    sabotaged.check_others()

    monkeypatch.setattr(service, "GRACE", 0.1)
    begin = time.monotonic()
    assert not sabotaged.server.stop()

    assert time.monotonic() - begin < 5
    assert caplog.messages[-1].count("sabotaged[") == len(calls)
    gate.set()
    for client in clients:
        client.join()
    sabotaged.server.wait_for_sessions(0)

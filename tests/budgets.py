"""A budget of connections that tests can watch."""

from __future__ import annotations

import threading

import pytest

from nbdkitpy.server import session
from nbdkitpy.server.budget import Budget


class Waiting(Budget):
    """Says when somebody has to wait."""

    waits: threading.Event
    most = 0

    def _fits(self, cost: int, has_payload: bool) -> bool:
        fits = super()._fits(cost, has_payload)
        if not fits:
            self.waits.set()
        return fits

    def take(self, cost: int, *, has_payload: bool = False) -> None:
        super().take(cost, has_payload=has_payload)
        Waiting.most = max(Waiting.most, self._used + self._payload)


def watched_budget(monkeypatch: pytest.MonkeyPatch) -> type[Waiting]:
    """Have connections use budgets that set an event when one is used up."""
    monkeypatch.setattr(session, "Budget", Waiting)
    monkeypatch.setattr(Waiting, "waits", threading.Event(), raising=False)
    monkeypatch.setattr(Waiting, "most", 0)
    return Waiting

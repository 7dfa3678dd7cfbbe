"""How much is tried: in the suite a fixed number of examples, always the same; for longer runs more, and new ones.

``NBDKITPY_FUZZ=50 pytest tests/protocol tests/server/test_conversation_fuzz.py`` tries fifty times as many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

__all__ = ["Tally", "fuzz", "register_profiles", "report"]

_FACTOR = "NBDKITPY_FUZZ"


def register_profiles() -> None:
    """Have Hypothesis try the same examples each time, unless a longer run is wanted."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=slow)
    settings.register_profile("long", deadline=None, suppress_health_check=slow, print_blob=True)
    settings.load_profile("long" if _FACTOR in os.environ else "suite")


def fuzz(examples: int, *, steps: int = 50) -> settings:
    """Return settings by which so many examples are tried in the suite.

    Args:
        examples: How many.
        steps: Of one run of a state machine.
    """
    factor = float(os.environ.get(_FACTOR, "1"))
    return settings(max_examples=max(1, int(examples * factor)), stateful_step_count=steps)


class Tally(Counter[str]):
    """What was tried how often, for the end of the run."""

    KEY = pytest.StashKey["Tally"]()


def report(tally: Tally) -> Iterator[str]:
    """Yield what is to be said at the end of the run."""
    if tally:
        yield f"fuzzed: {', '.join(f'{number} {what}' for what, number in sorted(tally.items()))}"

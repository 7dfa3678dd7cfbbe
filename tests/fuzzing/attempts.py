"""What parsers do with anything at all: there is a value, or one of the errors that are documented."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

__all__ = ["attempted"]


def attempted(attempt: Callable[[], T], *errors: type[Exception]) -> tuple[T | None, str]:
    """Return what `attempt` returns and "", or None and the text of one of `errors`, which can be shown as it is."""
    try:
        return attempt(), ""
    except errors as error:
        message = str(error)
    assert message, "an error that says nothing"
    assert message.isprintable(), f"an error that a terminal would act on: {message!r}"
    assert len(message) < 2000, message
    return None, message

"""Failures of a step of the server's life, and how they are told."""

from __future__ import annotations

import logging
import os

from nbdkitpy.exceptions import ConfigError

__all__ = ["GivenUp", "Reported", "report"]

_logger = logging.getLogger("nbdkitpy")


class Reported(Exception):  # noqa: N818  # no error of its own
    """A step has failed, and the user has been told."""


class GivenUp(BaseException):
    """A second signal came while a unit did not return. Not an Exception, as units catch those."""


def report(step: str, error: BaseException) -> None:
    """Write one line on the terminal about `error`, with the traceback below it (``-v``) if it is a defect.

    Args:
        step: What was being done, for errors that do not say it; "" if all do.
        error: ConfigError and OSError are expected; any other is a unit's defect.
    """
    expected = isinstance(error, (ConfigError, OSError, GivenUp))
    prefix = f"{step}: " if step and not isinstance(error, ConfigError) else ""
    _logger.error("%s%s", prefix, _described(error), exc_info=None if expected else error, extra={"terminal": True})


def _described(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, GivenUp):
        return "given up, as a second signal came"
    try:
        text = str(error)
    except Exception:  # a unit's exception may be anything
        text = ""
    if isinstance(error, (ConfigError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")

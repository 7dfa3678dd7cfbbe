"""Failures of a step of the server's life, and how they are told."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from nbdkitpy.exceptions import ConfigError, describe

__all__ = ["GivenUp", "Reported", "report", "reported"]

_logger = logging.getLogger("nbdkitpy")


class Reported(Exception):  # noqa: N818  # no error of its own
    """A step has failed, and the user has been told."""


class GivenUp(BaseException):
    """A second signal came while a unit did not return. Not an Exception, as units catch those."""


@contextlib.contextmanager
def reported(step: str) -> Iterator[None]:
    """Tell the user of whatever is raised meanwhile, and raise :class:`Reported` in its place.

    A unit does not decide whether the process ends, and how. A KeyboardInterrupt passes: it is the user's.
    """
    try:
        yield
    except (Reported, KeyboardInterrupt):
        raise
    except BaseException as error:
        report(step, error)
        raise Reported from error


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
    if isinstance(error, GivenUp):
        return "given up, as a second signal came"
    # A unit's exception may be anything: what it says of itself may be no text, or end in another exception.
    with contextlib.suppress(BaseException):
        if isinstance(error, OSError) and error.strerror:
            return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else str(error.strerror)
        if isinstance(error, (ConfigError, OSError)) and str(error):
            return str(error)
    return describe(error)

"""Where the log goes: lines in a file, and calls of a script. Neither ever makes a request fail."""

from __future__ import annotations

import datetime
import logging
import os
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

__all__ = ["Event", "LogFile", "LogScript", "Sink", "Value", "as_line"]

_log = logging.getLogger("nbdkitpy.log")

#: Of a field. Numbers in a tuple, and those of :data:`_IN_HEX`, are written in hexadecimal.
Value: TypeAlias = "int | str | tuple[int | str, ...]"

_IN_HEX = frozenset({"offset", "count", "size", "minsize", "prefsize", "maxsize"})

#: What a shell would act on between double quotes.
_SPECIAL = frozenset('"\\$`')


class Event(NamedTuple):
    """Something that happened.

    `type` is ENTER when a call begins, LEAVE when it ends, PRINT for what is no call.
    """

    type: str
    action: str
    connection: int | None = None
    id: int | None = None  #: the same for the two ends of a call
    fields: Sequence[tuple[str, Value]] = ()
    error: str = ""  #: name of the error by which a call ended

    def outcome(self) -> Iterator[tuple[str, str]]:
        """Yield what there is to say of the end of a call."""
        if self.type == "LEAVE":
            yield "return", "-1" if self.error else "0"
            if self.error:
                yield "error", self.error


class Sink(Protocol):
    """Takes events, from any thread."""

    def write(self, event: Event) -> None:
        """Take one. Raises nothing."""

    def close(self) -> None:
        """Take no more."""


class LogFile:
    """Appends a line for each event to a file.

    Args:
        path: Of the file; it is made if need be.
        append: Keep what is in it.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str, *, append: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (0 if append else os.O_TRUNC)
        self._fd = os.open(path, flags, 0o666)
        self._path = path
        self._has_failed = False

    def write(self, event: Event) -> None:
        """Append the line of `event`, in one go, so that lines of several threads do not mix."""
        line = f"{_timestamp()} {as_line(event)}\n".encode("utf-8", "backslashreplace")
        try:
            os.write(self._fd, line)
        except OSError as error:
            if not self._has_failed:
                _log.error("log: cannot write to %s: %s; it lacks lines from now on", self._path, error.strerror)
            self._has_failed = True

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _timestamp() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")


def as_line(event: Event) -> str:
    """Return `event` as nbdkit writes it, without the time."""
    words = [] if event.connection is None else [f"connection={event.connection}"]
    words.append(f"...{event.action}" if event.type == "LEAVE" else event.action)
    if event.id is not None:
        words.append(f"id={event.id}")
    words += [f"{key}={_in_line(value, in_hex=key in _IN_HEX)}" for key, value in event.fields]
    words += [f"{key}={value}" for key, value in event.outcome()]
    if event.type == "ENTER":
        words.append("...")
    return " ".join(words)


def _in_line(value: Value, *, in_hex: bool) -> str:
    if isinstance(value, tuple):
        return "(" + " ".join(_in_line(each, in_hex=True) for each in value) + ")"
    if isinstance(value, str):
        return '"' + "".join(map(_escaped, value)) + '"'
    return hex(value) if in_hex else str(int(value))


def _escaped(character: str) -> str:
    if character in _SPECIAL:
        return "\\" + character
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class LogScript:
    """Runs a script of the shell for each event, and waits for it. What becomes of it does not matter."""

    def __init__(self, script: str) -> None:
        self._script = script

    def write(self, event: Event) -> None:
        """Run the script, with what `event` has as variables."""
        text = "".join(f"{key}={value}\n" for key, value in _variables(event))
        command = ["/bin/sh", "-c", text + self._script]
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, check=False)  # noqa: S603  # the script is the user's
        except OSError as error:  # a list is too long, or there are too many processes
            _log.error("log: cannot run the logscript: %s", error.strerror)

    def close(self) -> None:
        """Do nothing."""


def _variables(event: Event) -> Iterator[tuple[str, str]]:
    """Yield names and values of shell variables, the values quoted."""
    yield "type", event.type
    yield "act", event.action
    for key, number in (("connection", event.connection), ("id", event.id)):
        if number is not None:
            yield key, str(number)
    for key, value in event.fields:
        yield key, _in_script(value, in_hex=key in _IN_HEX)
    yield from event.outcome()


def _in_script(value: Value, *, in_hex: bool) -> str:
    if isinstance(value, tuple):  # words in a string, as not every shell has lists
        return shlex.quote(shlex.join(hex(each) if isinstance(each, int) else each for each in value))
    if isinstance(value, str):
        return shlex.quote(value)
    return hex(value) if in_hex else str(int(value))

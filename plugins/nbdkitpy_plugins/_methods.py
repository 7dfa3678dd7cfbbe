"""Calls methods of nbdkit's sh and eval plugins: each is a process, whose exit status says what came of it."""

from __future__ import annotations

import enum
import errno
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

from nbdkitpy import Client

__all__ = ["MAX_KNOWN_STATUS", "SHELL", "Reply", "Status", "call_method"]

SHELL = "/bin/sh"


class Status(enum.IntEnum):
    """What the exit status of a method means. All others are errors."""

    OK = 0
    ERROR = 1
    MISSING = 2
    FALSE = 3
    SHUTDOWN_OK = 4
    SHUTDOWN_ERROR = 5
    DISCONNECT = 6
    SOFT_DISCONNECT_OK = 7
    SOFT_DISCONNECT_ERROR = 8


#: What --dump-plugin tells, so that scripts know which of these there are.
MAX_KNOWN_STATUS = max(Status)

#: Those that stand for another one, when what they ask for has been done.
_PLAIN = {
    Status.SHUTDOWN_OK: Status.OK,
    Status.SHUTDOWN_ERROR: Status.ERROR,
    Status.SOFT_DISCONNECT_OK: Status.OK,
    Status.SOFT_DISCONNECT_ERROR: Status.ERROR,
}
_SHUTDOWNS = frozenset({Status.SHUTDOWN_OK, Status.SHUTDOWN_ERROR})
_DISCONNECTS = {
    Status.DISCONNECT: True,
    Status.SOFT_DISCONNECT_OK: False,
    Status.SOFT_DISCONNECT_ERROR: False,
}

_NUMBERS = {name: getattr(errno, name) for name in dir(errno) if name.startswith("E")}


class Reply(NamedTuple):
    """What a method answered. An error is raised, so its status is OK, MISSING or FALSE."""

    status: Status
    output: bytes = b""

    @property
    def text(self) -> str:
        """What it printed, without the line feed at its end."""
        return os.fsdecode(self.output).removesuffix("\n")


def call_method(
    command: Sequence[str],
    data: memoryview | None,
    env: Mapping[str, str],
    shutdown: Callable[[], None],
    client: Client | None,
) -> Reply:
    """Run a method and return what it answers.

    Args:
        command: Whose first word is a program; no shell looks at the others.
        data: Its standard input.
        env: All of its environment.
        shutdown: Called if it wants the server to end.
        client: On whose behalf it is called, if there is one; it may want its connection to end.

    Raises:
        OSError: it failed, with the errno that it printed; or it cannot be run.
    """
    process = _started(command, subprocess.DEVNULL if data is None else subprocess.PIPE, env)
    with process:
        # Any buffer will do for it, and that the method does not read to the end is no error.
        output, messages = process.communicate(cast("bytes | None", data))
    code = process.returncode
    status = Status(code) if 0 <= code <= MAX_KNOWN_STATUS else Status.ERROR
    if status in _SHUTDOWNS:
        shutdown()
    if status in _DISCONNECTS and client is not None:
        client.disconnect(_DISCONNECTS[status])
    if code < 0:
        raise OSError(errno.EIO, f"killed by signal {-code}: {_decoded(messages)}".removesuffix(": "))
    if status is Status.DISCONNECT:
        raise OSError(errno.ESHUTDOWN, "disconnects the client")
    if _PLAIN.get(status, status) is Status.ERROR:
        raise _error(_decoded(messages), errno.EIO if status is Status.ERROR else errno.ESHUTDOWN)
    return Reply(_PLAIN.get(status, status), output)


def _started(command: Sequence[str], stdin: int, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        # No descriptor but these is passed on: subprocess closes all others. The command is the user's own.
        return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)  # noqa: S603
    except OSError as error:
        if error.errno == errno.ENOEXEC and command[0] != SHELL:  # it does not say who reads it
            return _started([SHELL, *command], stdin, env)
        raise OSError(errno.EIO, f"{command[0]} cannot be run: {error.strerror}") from error


def _decoded(messages: bytes) -> str:
    return messages.decode("utf-8", "replace").strip()


def _error(messages: str, default: int) -> OSError:
    """What a method says of its failure: perhaps the name of an errno, perhaps a text."""
    name, text = (*messages.split(maxsplit=1), "", "")[:2]
    number = _NUMBERS.get(name.upper())
    if number is None:
        return OSError(default, messages or "failed without a message")
    return OSError(number, text or os.strerror(number))

"""Socket activation: a service manager listens for us, and hands its sockets over when it starts us.

Variables of the environment say for which process they are (LISTEN_PID), how many (LISTEN_FDS), and what each is
called (LISTEN_FDNAMES); the descriptors themselves are those from 3 on. When the sockets are for us, whatever is wrong
with them ends us: a server that was meant for one Unix socket must not come up on a TCP port instead.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Iterable, MutableMapping
from typing import NamedTuple

from nbdkitpy.exceptions import ConfigError

__all__ = ["CONFLICTS", "FIRST_DESCRIPTOR", "MAX_DESCRIPTORS", "Activation", "conflicts", "receive"]

_logger = logging.getLogger("nbdkitpy")

FIRST_DESCRIPTOR = 3
MAX_DESCRIPTORS = 16

#: Options, each by one of its names, that cannot be had: the service manager has settled where clients come from.
CONFLICTS = ("-i", "-p", "--run", "-s", "-U")

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")

#: Compared as text: int() would also take "1_0", " 1", digits of other scripts, and thousands of them.
_COUNTS = tuple(str(count) for count in range(1, MAX_DESCRIPTORS + 1))

#: AF_VSOCK is not there on every system.
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, getattr(socket, "AF_VSOCK", None))

_FILE_TYPES = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class Activation(NamedTuple):
    """Sockets that listen already, one at least. They are not ours to unlink."""

    fds: tuple[int, ...]
    names: tuple[str, ...]  #: what the service manager calls each of them, "" where it does not


def receive(environ: MutableMapping[str, str], pid: int | None = None) -> Activation | None:
    """Take the sockets that are there for this process; None if there are none.

    From then on they are closed when another program is executed. The variables are removed, whatever is wrong with
    them or the sockets, so that no child takes them for its own; those for another process are left as they are.

    Args:
        environ: The environment, as the service manager has set it.
        pid: Of this process, if not what the system says.

    Raises:
        ConfigError: what is there for us is not 1 to 16 stream sockets that listen on TCP, Unix or vsock.
    """
    whose = environ.get("LISTEN_PID")
    if whose is None:
        return None
    ours = str(os.getpid() if pid is None else pid)
    if whose != ours:
        _logger.warning("socket activation: LISTEN_PID is %r, not that of this process, %s: ignored", whose, ours)
        return None
    _, count, names = (environ.pop(variable, None) for variable in _VARIABLES)
    activation = _announced(count, names)
    for fd, name in zip(activation.fds, activation.names):
        _take(fd, name)
    return activation


def conflicts(given: Iterable[str]) -> list[str]:
    """Return a line about each of the options `given`, by any of their names, that cannot be had with activation."""
    names = set(given)
    return [f"cannot use socket activation with the {option} option" for option in CONFLICTS if option in names]


def _announced(count: str | None, names: str | None) -> Activation:
    if count not in _COUNTS:
        what = "but it is not set" if count is None else f"not {count!r}"
        raise ConfigError(f"socket activation: LISTEN_FDS must be a number from 1 to {MAX_DESCRIPTORS}, {what}")
    fds = tuple(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)))
    # "unknown" is what systemd puts where there is no name. There may be too few names, or too many.
    found = ["" if name == "unknown" else name for name in (names or "").split(":")]
    return Activation(fds, tuple((found + [""] * len(fds))[: len(fds)]))


def _take(fd: int, name: str) -> None:
    flaw = _flaw(fd)
    if flaw is not None:
        called = f" (called {name!r})" if name else ""
        raise ConfigError(
            f"socket activation: descriptor {fd}{called} must be a stream socket that listens on TCP, Unix or vsock;"
            f" it is {flaw}"
        )
    os.set_inheritable(fd, False)


def _flaw(fd: int) -> str | None:
    """What the descriptor is instead of a socket of the kind that we serve."""
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISSOCK(mode):
            return _FILE_TYPES.get(stat.S_IFMT(mode), "no socket")
        sock = socket.socket(fileno=fd)
    except OSError as error:
        return f"unusable: {error.strerror}"
    try:
        if sock.family not in _FAMILIES:
            return f"a socket of family {getattr(sock.family, 'name', sock.family)}"
        if sock.type != socket.SOCK_STREAM:
            return f"a socket of type {getattr(sock.type, 'name', sock.type)}"
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return "a stream socket that does not listen (a socket unit needs Accept=no)"
        return None
    finally:
        sock.detach()

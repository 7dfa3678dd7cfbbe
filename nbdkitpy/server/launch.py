"""From a stack that has its parameters to the end of the process: the order of a server's life.

config_complete, get_ready, bind, pidfile, after_fork, announcement, service, cleanup, unload. What was begun is undone
in reverse, whichever step fails. A user sees a failure of any step on the terminal and in the exit status.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Protocol, TypeVar

from nbdkitpy.backend import ServerControl
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.stack import Stack

if TYPE_CHECKING:
    from nbdkitpy.server.captive import Captive

__all__ = ["Pidfile", "Servable", "exit_with_parent", "launch", "report"]

_logger = logging.getLogger("nbdkitpy")

#: Each of them ends the server in an orderly way.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

T = TypeVar("T")


class Servable(ServerControl, Protocol):
    """What a server is to the one who launches it."""

    @property
    def uri(self) -> str:
        """Where clients find it; known once it is bound, as are the next three."""

    @property
    def listening(self) -> Sequence[str]:
        """What it listens on, for people."""

    @property
    def port(self) -> int | None:
        """TCP or vsock port."""

    @property
    def unix_path(self) -> str | None:
        """Path of the Unix socket."""

    def bind(self) -> None:
        """Open the listeners."""

    def abort(self) -> None:
        """End at once."""

    def serve(self, stack: Stack) -> bool:
        """Serve clients until the shutdown; return whether every connection has ended, or a backend holds one up."""

    def close(self) -> None:
        """Close the listeners and remove their files; nothing happens if that is done."""


class _Reported(Exception):  # noqa: N818  # no error of its own
    """A step has failed, and the user has been told."""


def launch(
    server: Servable,
    stack: Stack,
    *,
    command: str | None = None,
    pidfile: str | None = None,
    export_name: str = "",
    announce: bool = False,
    print_uri: bool = False,
) -> int:
    """Serve `stack`, loaded and configured, until the server is told to end, and return the exit status.

    Args:
        server: Not yet bound.
        stack: Unloaded at the end in any case.
        command: For the shell; the server ends when it does, and its exit status becomes ours.
        pidfile: Absolute path of a file that holds our process number while clients can connect.
        export_name: What the command is told to ask for.
        announce: Say on standard error what we listen on.
        print_uri: Print the URI on standard output.
    """
    captive = None if command is None else _captive(command)
    try:
        with contextlib.ExitStack() as undo:
            life = _Life(server, stack, captive, undo)
            life.make_ready()
            life.open_for_clients(pidfile)
            _call("", _tell, server, announce, print_uri)
            return life.serve(export_name)
    except _Reported:
        return 1


class _Life:
    """The steps of a server's life, each of which leaves in `undo` what undoes it."""

    def __init__(self, server: Servable, stack: Stack, captive: Captive | None, undo: contextlib.ExitStack) -> None:
        self._server = server
        self._stack = stack
        self._captive = captive
        self._undo = undo
        self._held_up = False  # a backend has not returned: what it has can be neither closed nor cleaned up

    def make_ready(self) -> None:
        self._undo.callback(self._end, "unload", self._stack.unload)
        _call("config_complete", self._stack.config_complete)
        _logger.debug("thread model of the whole stack: %s", self._stack.model.name.lower())
        _call("get_ready", self._stack.get_ready)
        # From here on there are files to remove, so a signal must no longer end us where we stand.
        self._undo.enter_context(_signals(self._server, self._captive))

    def open_for_clients(self, pidfile: str | None) -> None:
        self._undo.callback(_call, "", self._server.close)
        _call("", self._server.bind)
        if pidfile is not None:
            file = Pidfile(pidfile)
            self._undo.callback(file.remove)
            _call("", file.write)
        self._undo.callback(self._end, "cleanup", self._stack.cleanup)
        _call("after_fork", self._stack.after_fork)

    def serve(self, export_name: str) -> int:
        if self._captive is not None:
            self._undo.callback(self._captive.reap)
            variables = _variables(self._server, export_name)
            _call("--run", self._captive.start, variables, self._server.shutdown)
        self._held_up = not _call("", self._server.serve, self._stack)
        status = 0 if self._captive is None else self._captive.wait()
        return status or int(self._held_up)

    def _end(self, step: str, function: Callable[[], None]) -> None:
        if not self._held_up:
            _call(step, function)


def _captive(command: str) -> Captive:
    from nbdkitpy.server.captive import Captive  # it needs subprocess, which takes a while to import

    return Captive(command)


def _variables(server: Servable, export_name: str) -> dict[str, str]:
    return {
        "uri": server.uri,
        "nbd": server.uri,
        "exportname": export_name,
        "port": "" if server.port is None else str(server.port),
        "unixsocket": server.unix_path or "",
    }


def _tell(server: Servable, announce: bool, print_uri: bool) -> None:
    if announce:
        where = ", ".join(server.listening)
        _logger.info("listening on %s (%s)", where, server.uri, extra={"terminal": True})
    if print_uri:
        quoted = shlex.quote(server.uri)
        # The URI alone on the first line is what scripts read.
        print(f"{server.uri}\nQuoted for a shell: {quoted}\nTo look at it: nbdinfo {quoted}", flush=True)


@contextlib.contextmanager
def _signals(server: Servable, captive: Captive | None) -> Iterator[None]:
    """Have the first signal end the server in order, the next at once; then put back what they did before."""
    ways = iter((server.shutdown,))

    def stop(number: int, frame: FrameType | None) -> None:
        next(ways, server.abort)()
        if captive is not None:
            captive.end()

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- failures ---


def _call(step: str, function: Callable[..., T], *args: object) -> T:
    try:
        return function(*args)
    except Exception as error:
        report(step, error)
        raise _Reported from error


def report(step: str, error: BaseException) -> None:
    """Write one line on the terminal about `error`, with the traceback below it (``-v``) if it is a defect.

    Args:
        step: What was being done, for errors that do not say it; "" if all do.
        error: ConfigError and OSError are expected; any other is a unit's defect.
    """
    expected = isinstance(error, (ConfigError, OSError))
    prefix = f"{step}: " if step and not isinstance(error, ConfigError) else ""
    _logger.error("%s%s", prefix, _described(error), exc_info=None if expected else error, extra={"terminal": True})


def _described(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    try:
        text = str(error)
    except Exception:  # a unit's exception may be anything
        text = ""
    if isinstance(error, (ConfigError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


# --- the process ---


class Pidfile:
    """A file with the number of this process, there while clients can connect."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ours: tuple[int, int, int] | None = None

    def write(self) -> None:
        """Write the file whole or not at all; a regular file of that name is replaced.

        Raises:
            ConfigError: it cannot be written, or there is something that is no regular file. A symbolic link is not
                followed: in a directory that others may write to, it would have us overwrite any file.
        """
        try:
            self._check_place()
            self._write()
        except OSError as error:
            raise ConfigError(f"--pidfile: cannot write {self._path}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the file if it is the one that we wrote, and if we still may."""
        with contextlib.suppress(OSError):
            if self._ours is not None and self._ours == _identity(os.lstat(self._path)):
                os.unlink(self._path)

    def _check_place(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(self._path).st_mode
            if not stat.S_ISREG(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
                raise ConfigError(f"--pidfile: {self._path} must be a regular file or not exist; it is {what}")

    def _write(self) -> None:
        temporary = os.path.join(os.path.dirname(self._path), f".nbdkitpy-{os.urandom(8).hex()}.pid")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, b"%d\n" % os.getpid())
            self._ours = _identity(os.fstat(descriptor))
            os.rename(temporary, self._path)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns  # the time as well, since inode numbers are used again


def exit_with_parent(parent: int) -> None:
    """Have the system end this process by SIGTERM when its parent ends.

    Args:
        parent: What ``os.getppid()`` was as early as possible, so that a parent that ended meanwhile is noticed.

    Raises:
        ConfigError: the system cannot do it, or the parent has ended.
    """
    if sys.platform != "linux":
        raise ConfigError(f"--exit-with-parent is for Linux only; this system is {sys.platform}")
    import ctypes  # some milliseconds that only this option is worth

    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), zero, zero, zero):
        raise ConfigError(f"--exit-with-parent: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise ConfigError("--exit-with-parent: the parent process has ended already")

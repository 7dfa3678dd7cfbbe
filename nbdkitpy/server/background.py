"""Going into the background, so that whoever starts the server learns what comes of it.

Who types the command gets its prompt back, and the exit status, when clients can connect: the first process, the
launcher, waits until the second, the server, says over a pipe that it is ready. Until then the server's messages go
through the pipe too, as nobody sees its own standard error any more.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import FrameType

from nbdkitpy.server.forking import SIGNALS, check_threads, fork, unblock_signals

__all__ = ["Background", "redirect_to_nothing"]

_logger = logging.getLogger("nbdkitpy")

#: What the server says last of its start. Its other lines are messages.
_READY = "ready\n"
_FAILED = "failed\n"


class Background:
    """Where the server goes. Make it early: what is open on other descriptors then is taken to be the caller's.

    Raises:
        OSError: the system does not say what is open.
    """

    def __init__(self) -> None:
        self._foreign = _inherited_descriptors()
        self._handlers: list[logging.Handler] = []
        self._launcher: int | None = None  # pipe to it, until it has been told how the start went

    def enter(self, tell: Callable[[], None], clean_up: Callable[[], None]) -> None:
        """Go on in a new process; the present one, the launcher, waits for that one's start, and exits.

        The new process leads a session of its own, is in the directory ``/``, and has neither standard streams nor
        descriptors of the caller, but for standard error if debugging messages are asked for. Until :meth:`ready` or
        :meth:`failed` its messages go to the launcher.

        Args:
            tell: Called in the launcher when the server is ready.
            clean_up: Called in the launcher when the server has ended instead, perhaps unable to do so itself.

        Raises:
            ConfigError: there are threads, which would be missing in the new process.
            OSError: the system refuses. This may be in either process.
        """
        check_threads("go into the background", "use -f")
        receiving, sending = os.pipe()
        pid = fork()
        if pid:
            os.close(sending)
            # Not by an exception: nothing that both processes have may be undone here, or at the interpreter's exit.
            os._exit(_launch(receiving, pid, tell, clean_up))
        os.close(receiving)
        self._begin(sending)
        unblock_signals()

    def _begin(self, pipe: int) -> None:
        verbose = _logger.isEnabledFor(logging.DEBUG)
        self._launcher = pipe
        self._handlers = _logger.handlers
        if not verbose:  # else they stay on the terminal
            # In place of all of them: the launcher has the same ones, and a message is to be in the log once.
            _logger.handlers = [_Relay(pipe)]
        os.setsid()
        os.chdir("/")
        for fd in filter(_is_inheritable, self._foreign):
            os.close(fd)
        redirect_to_nothing((0, 1) if verbose else (0, 1, 2))

    def ready(self) -> None:
        """Tell the launcher that clients can connect. It exits.

        Raises:
            OSError: there is no launcher any more.
        """
        self._end(_READY)

    def leave(self) -> None:
        """Have nothing more to do with the launcher, as a process that was forked from the server."""
        self._end("")

    def failed(self) -> None:
        """Tell the launcher, if it still waits, that the server ends and that the reason has been logged."""
        with contextlib.suppress(OSError):
            self._end(_FAILED)

    def _end(self, line: str) -> None:
        launcher, self._launcher = self._launcher, None
        if launcher is None:
            return
        _logger.handlers = self._handlers
        try:
            _say(launcher, line)
        finally:
            os.close(launcher)


class _Relay(logging.Handler):
    """Has the launcher log what is logged here."""

    def __init__(self, launcher: int) -> None:
        super().__init__()
        self._launcher = launcher

    def emit(self, record: logging.LogRecord) -> None:
        terminal = bool(getattr(record, "terminal", False))
        try:
            text = record.getMessage()
        except Exception as error:  # a unit's arguments may be anything
            text = f"{record.msg} (the rest of this message cannot be shown: {type(error).__name__})"
        with contextlib.suppress(OSError):  # then nobody waits for it
            _say(self._launcher, json.dumps([record.levelno, record.name, text, terminal]) + "\n")


def _say(launcher: int, line: str) -> None:
    data = line.encode("ascii")
    while data:  # a signal may cut it short
        data = data[os.write(launcher, data) :]


def _inherited_descriptors() -> list[int]:
    """Return the descriptors that whoever started us left open, but for the standard streams.

    Our own are closed when a program is executed; what has come through such an execution is not. Back ends that go on
    to use such a descriptor set it to be closed as well.
    """
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and _is_inheritable(fd)]


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # it was that of listing them
        return False


def redirect_to_nothing(descriptors: Iterable[int]) -> None:
    """Have nothing come from these descriptors, and go nowhere what is written to them."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in descriptors:
        os.dup2(null, fd)
    os.close(null)


# --- the launcher ---


def _launch(pipe: int, pid: int, tell: Callable[[], None], clean_up: Callable[[], None]) -> int:
    """Wait for what comes of the server, and return the exit status."""

    def forward(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    signal.set_wakeup_fd(-1)  # which is the server's
    for number in SIGNALS:  # for the server, but the launcher may get them in its place while it waits
        signal.signal(number, forward)
    unblock_signals()
    if not _becomes_ready(pipe, pid):
        clean_up()
        return 1
    try:
        tell()
        sys.stdout.flush()
    except Exception as error:
        # Who wants to be told where the server is gets none that he does not know of.
        _logger.error("cannot say that the server is ready: %s", error, extra={"terminal": True})
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        return 1
    return 0


def _becomes_ready(pipe: int, pid: int) -> bool:
    """Log what the server says until it is ready; False when it has ended instead, and it has been logged why."""
    failed = False
    with open(pipe, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line == _READY:
                return True
            failed |= line == _FAILED
            if line.startswith("["):
                _log(line)
    _, status = os.waitpid(pid, 0)
    if not failed:
        text = _described(os.waitstatus_to_exitcode(status))
        _logger.error("the server ended before it was ready: %s", text, extra={"terminal": True})
    return False


def _log(line: str) -> None:
    with contextlib.suppress(ValueError):  # the server was killed in the middle of a line
        level, name, text, terminal = json.loads(line)
        logging.getLogger(name).log(level, "%s", text, extra={"terminal": terminal})


def _described(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"killed by signal {-code} ({signal.strsignal(-code)})"

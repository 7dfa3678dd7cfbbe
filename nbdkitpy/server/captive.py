"""The command of ``--run``: runs beside the server, which ends when the command does."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping
from types import FrameType

__all__ = ["Captive"]

_logger = logging.getLogger("nbdkitpy")


class Captive:
    """A shell command that is told by variables where the server is.

    It shares our standard streams and process group, so that it may be used at a terminal.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._on_exit: Callable[[], None] | None = None  # until it has been called
        self._before: Callable[[int, FrameType | None], object] | int | None = signal.SIG_DFL
        self._ends = 0  # how often we were told to end it

    def start(self, variables: Mapping[str, str], on_exit: Callable[[], None]) -> None:
        """Start the command, unless it was told to end already; call `on_exit` in a signal handler when it has ended.

        The variables are set for the script, not exported. No thread is made, so that the process may go on to fork.

        Raises:
            OSError: there is no shell, or no process to be had.
        """
        if self._ends:
            return
        settings = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        script = "\n".join([*settings, self._command])
        self._on_exit = on_exit
        self._before = signal.signal(signal.SIGCHLD, self._child_has_ended)
        signal.siginterrupt(signal.SIGCHLD, False)  # else calls of C libraries in other threads might fail by it
        # The user's own command line, which the shell is meant to interpret.
        self._process = subprocess.Popen(["/bin/sh", "-c", script])  # noqa: S603
        self._notice_end()  # the signal may have come too early to be of any use
        if self._ends:  # a signal came meanwhile
            self._process.terminate()

    def end(self) -> None:
        """Ask the command to end, as a signal handler may; the second time it is killed."""
        self._ends += 1
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM if self._ends == 1 else signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the command, and return its exit status: 128 and the signal's number if one ended it."""
        if self._process is None:
            return 0
        status = self._process.wait()
        self._notice_end()
        if status >= 0:
            return status
        if not self._ends:
            _logger.error("the command of --run was killed by signal %d", -status, extra={"terminal": True})
        return 128 - status

    def reap(self) -> None:
        """Leave no process behind: end the command if it still runs, and wait for it."""
        if self._process is not None and self._process.poll() is None:
            self.end()
            self.wait()
        elif self._on_exit is not None:  # it could not be started
            signal.signal(signal.SIGCHLD, self._before)

    def _child_has_ended(self, number: int, frame: FrameType | None) -> None:
        self._notice_end()

    def _notice_end(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            # In one step, as a handler may come between any two.
            on_exit, self._on_exit = self._on_exit, None
            if on_exit is not None:
                signal.signal(signal.SIGCHLD, self._before)
                on_exit()

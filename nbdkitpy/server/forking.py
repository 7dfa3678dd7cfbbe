"""What every fork of the server needs to mind: signals, and threads that would be missing."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server.failures import report

__all__ = [
    "SIGNALS",
    "check_threads",
    "described_exit",
    "exit_status",
    "flush_streams",
    "fork",
    "live_and_exit",
    "unblock_signals",
]

#: Those that tell a server to end or to reload.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP)


def check_threads(purpose: str, remedy: str) -> None:
    """Check that there is no other thread, as it would be missing in the new process.

    Args:
        purpose: What the fork is for, as in "go into the background".
        remedy: How to do without, as in "use -f".

    Raises:
        ConfigError: there is one.
    """
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        names = ", ".join(others)
        raise ConfigError(f"cannot {purpose}: a back end has started threads ({names}) before after_fork; {remedy}")


def flush_streams() -> None:
    """Write what is in the buffers of the standard streams. A unit may have put anything in their place."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def fork() -> int:
    """Fork. In both processes signals wait for :func:`unblock_signals`, until it is settled who takes them.

    Raises:
        OSError: the system refuses. Nothing has changed.
    """
    flush_streams()  # else what is in the buffers would be written twice
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return os.fork()
    except OSError:
        unblock_signals()
        raise


def unblock_signals() -> None:
    """Let signals come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def live_and_exit(live: Callable[[], int], what: str) -> NoReturn:
    """End this process, which has been forked, with the exit status that `live` returns.

    Not by an exception: nothing of the process that it was forked from is undone here, or at the interpreter's exit.

    Args:
        live: All that it does.
        what: What it is, for the message about an exception.
    """
    status = 1
    try:
        status = live()
        flush_streams()
    except BaseException as error:
        report(what, error)
    finally:
        os._exit(status)


def exit_status(pid: int) -> int:
    """Return the exit status of a process that has to have ended, or minus the signal that ended it."""
    try:
        os.kill(pid, signal.SIGKILL)  # which is nothing to one that has; of another we could wait for ever
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except (ProcessLookupError, ChildProcessError):  # a unit has waited for any child there is
        return 0


def described_exit(status: int) -> str:
    """Return what became of a process, as in "the worker has ended with exit status 1"."""
    if status >= 0:
        return f"has ended with exit status {status}"
    names = {each.value: each.name for each in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}"

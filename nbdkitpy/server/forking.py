"""What every fork of the server needs to mind: signals, and threads that would be missing."""

from __future__ import annotations

import os
import signal
import threading

from nbdkitpy.exceptions import ConfigError

__all__ = ["SIGNALS", "check_threads", "fork", "unblock_signals"]

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


def fork() -> int:
    """Fork. In both processes signals wait for :func:`unblock_signals`, until it is settled who takes them.

    Raises:
        OSError: the system refuses. Nothing has changed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return os.fork()
    except OSError:
        unblock_signals()
        raise


def unblock_signals() -> None:
    """Let signals come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

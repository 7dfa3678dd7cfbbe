"""Calls of the Linux kernel that Python has no functions for. All of them concern the whole process."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from nbdkitpy.exceptions import ConfigError

if TYPE_CHECKING:
    import ctypes

__all__ = ["death_signal", "exit_with_parent", "forbid_new_privileges", "lock_memory", "require"]

# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_GET_PDEATHSIG = 2
_PR_SET_NO_NEW_PRIVS = 38

# <sys/mman.h>
_MCL_CURRENT = 1
_MCL_FUTURE = 2


def require(option: str) -> None:
    """Check that this is Linux.

    Raises:
        ConfigError: it is not, so that there cannot be `option`.
    """
    if sys.platform != "linux":
        raise ConfigError(f"{option} is for Linux only; this system is {sys.platform}")


def exit_with_parent(parent: int) -> None:
    """Have the system end this process by SIGTERM when its parent ends; it forgets that when our user changes.

    Args:
        parent: What ``os.getppid()`` was as early as possible, so that a parent that ended meanwhile is noticed.

    Raises:
        ConfigError: the system cannot do it, or the parent has ended.
    """
    require("--exit-with-parent")
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    except OSError as error:
        raise ConfigError(f"--exit-with-parent: {error.strerror}") from error
    if os.getppid() != parent:
        raise ConfigError("--exit-with-parent: the parent process has ended already")


def death_signal() -> int:
    """Return the signal that we get when our parent ends, 0 if none.

    Raises:
        OSError: the system refuses.
    """
    import ctypes

    number = ctypes.c_int()
    _prctl(_PR_GET_PDEATHSIG, ctypes.addressof(number))
    return number.value


def forbid_new_privileges() -> None:
    """See that no program that this process or a child of it executes has more privileges than this process.

    Raises:
        OSError: the system refuses.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def lock_memory() -> None:
    """Keep all memory of this process from being swapped out, that of later on too. Children do not inherit it.

    Raises:
        OSError: the system refuses.
    """
    _check(_libc().mlockall(_MCL_CURRENT | _MCL_FUTURE))


def _prctl(option: int, argument: int) -> None:
    import ctypes

    zero = ctypes.c_ulong(0)
    _check(_libc().prctl(option, ctypes.c_ulong(argument), zero, zero, zero))


def _libc() -> ctypes.CDLL:
    import ctypes  # some milliseconds that only these calls are worth

    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    import ctypes

    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

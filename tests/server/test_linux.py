"""Calls of the Linux kernel: each does what it is for, and says why when it does not."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.server import linux
from nbdkitpy.server.linux import exit_with_parent

# --- the parent ---


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


def test_parents_end_will_end_us() -> None:
    code = """
import ctypes, os
from nbdkitpy.server.linux import exit_with_parent
exit_with_parent(os.getppid())
number = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(number))
print(number.value)
"""

    assert in_a_process(code).stdout == f"{int(signal.SIGTERM)}\n"


def test_parent_that_has_ended_already_is_noticed() -> None:
    code = "import os; from nbdkitpy.server.linux import exit_with_parent; exit_with_parent(os.getppid() + 1)"

    assert "--exit-with-parent: the parent process has ended already" in in_a_process(code).stderr


class FakeLibrary:
    def __init__(self, error: int) -> None:
        self.error = error
        self.flags: list[int] = []

    def prctl(self, *args: object) -> int:
        ctypes.set_errno(self.error)
        return -1 if self.error else 0

    def mlockall(self, flags: int) -> int:
        self.flags.append(flags)
        return self.prctl()


def test_parent_is_compared_only_after_the_system_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: FakeLibrary(0))

    exit_with_parent(os.getppid())
    with pytest.raises(ConfigError, match="has ended already"):
        exit_with_parent(os.getppid() + 1)


def test_system_that_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: FakeLibrary(errno.EINVAL))

    with pytest.raises(ConfigError, match="--exit-with-parent: Invalid argument"):
        exit_with_parent(os.getppid())


def test_system_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")

    with pytest.raises(ConfigError, match="--exit-with-parent is for Linux only; this system is plan9"):
        exit_with_parent(os.getppid())


# --- the rest ---


def test_death_signal_is_what_was_set() -> None:
    code = """
import os
from nbdkitpy.server import linux
before = linux.death_signal()
linux.exit_with_parent(os.getppid())
print(before, linux.death_signal())
"""

    assert in_a_process(code).stdout == f"0 {int(signal.SIGTERM)}\n"


def test_no_new_privileges_is_set() -> None:
    code = "from nbdkitpy.server import linux; linux.forbid_new_privileges(); print(open('/proc/self/status').read())"

    assert "\nNoNewPrivs:\t1\n" in in_a_process(code).stdout


def test_memory_of_now_and_later_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary(0)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: library)

    linux.lock_memory()

    assert library.flags == [1 | 2]  # MCL_CURRENT | MCL_FUTURE


def test_error_of_the_system_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: FakeLibrary(errno.ENOMEM))

    with pytest.raises(OSError, match="Cannot allocate memory") as caught:
        linux.lock_memory()

    assert caught.value.errno == errno.ENOMEM

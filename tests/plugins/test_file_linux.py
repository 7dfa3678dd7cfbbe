"""The file plugin's calls of the C library."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbdkitpy_plugins.file import linux


def library(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., int]) -> None:
    fake = SimpleNamespace(**functions)
    monkeypatch.setattr(linux, "_libc", lambda: fake)


def test_F8_fallocate_is_called_again_when_a_signal_interrupts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def fallocate(*arguments: object) -> int:
        calls.append(arguments)
        ctypes.set_errno(errno.EINTR)
        return -1 if len(calls) < 3 else 0

    library(monkeypatch, fallocate64=fallocate)

    linux.punch_hole(5, 1 << 40, 1 << 33)

    assert len(calls) == 3
    fd, mode, offset, count = calls[0]
    assert (fd, mode) == (5, 3)
    assert isinstance(offset, ctypes.c_int64)
    assert isinstance(count, ctypes.c_int64)
    assert (offset.value, count.value) == (1 << 40, 1 << 33)


@pytest.mark.parametrize(
    ("function", "mode"), [(linux.punch_hole, 0x03), (linux.zero_range, 0x11), (linux.allocate, 0x01)]
)
def test_F10_no_mode_of_fallocate_changes_the_size(
    function: Callable[[int, int, int], None], mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[object] = []

    def fallocate(fd: int, mode: int, offset: object, count: object) -> int:
        modes.append(mode)
        return 0

    library(monkeypatch, fallocate=fallocate)

    function(3, 0, 512)

    assert modes == [mode]


def test_errors_have_the_number_of_the_system() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        linux.punch_hole(-1, 0, 1)

    assert caught.value.errno == errno.EBADF


def test_a_library_without_the_function_counts_as_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch)

    with pytest.raises(OSError, match="this system has no fallocate") as caught:
        linux.zero_range(3, 0, 1)

    assert caught.value.errno in linux.UNSUPPORTED


def test_block_device_calls_on_a_file_count_as_unsupported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDWR)

    for function in (linux.discard, linux.zero_out):
        with pytest.raises(OSError, match=r"\w") as caught:
            function(fd, 0, 512)
        assert caught.value.errno in linux.UNSUPPORTED
    os.close(fd)


def test_openat2_is_linuxs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(OSError, match="openat2") as caught:
        linux.open_beneath(3, b"x", os.O_RDONLY)

    assert caught.value.errno == errno.ENOSYS

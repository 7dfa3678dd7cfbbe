"""The file plugin with cache=none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import Client, Flags
from nbdkitpy_plugins.file import FilePlugin, dropbehind
from nbdkitpy_plugins.file.dropbehind import DropBehindHandle

MIB = 1 << 20


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[DropBehindHandle]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * (16 * MIB // 256))
    plugin = FilePlugin()
    plugin.config("file", str(path))
    plugin.config("cache", "none")
    plugin.config_complete()
    plugin.get_ready()
    handle = plugin.open("", False, Client(1))
    assert isinstance(handle, DropBehindHandle)
    yield handle
    handle.close()


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Offset and length of what the kernel was told to drop."""
    ranges: list[tuple[int, int]] = []

    def spy(fd: int, offset: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        ranges.append((offset, count))

    monkeypatch.setattr(os, "posix_fadvise", spy)
    return ranges


def test_everything_can_be_done_that_can_be_done_with_a_cache(handle: DropBehindHandle) -> None:
    handle.pwrite(memoryview(b"new"), 1, Flags.FUA)
    handle.zero(4, 4, Flags.MAY_TRIM)
    handle.flush()

    assert bytes(handle.pread(10, 0)) == b"\0new\0\0\0\0\x08\x09"
    assert handle.get_size() == 16 * MIB
    assert handle.can_multi_conn()


def test_no_short_cut_leads_past_the_dropping(handle: DropBehindHandle) -> None:
    assert handle.pread_into is None
    assert handle.file_range is None
    assert handle.inline == {"extents"}  # which touches no data


def test_what_was_read_is_dropped(handle: DropBehindHandle, dropped: list[tuple[int, int]]) -> None:
    handle.pread(8192, 4096)

    assert dropped == [(4096, 8192)]


def test_what_was_written_is_dropped_again_when_more_has_been_written(
    handle: DropBehindHandle, dropped: list[tuple[int, int]]
) -> None:
    data = memoryview(bytes(4 * MIB))
    assert dropbehind._DROP_BEHIND == 8 * MIB

    for number in range(4):
        handle.pwrite(data, number * 4 * MIB, 0)

    assert dropped == [
        (0, 4 * MIB),
        (4 * MIB, 4 * MIB),
        (8 * MIB, 4 * MIB),
        (0, 4 * MIB),
        (12 * MIB, 4 * MIB),
        (4 * MIB, 4 * MIB),
    ]


def test_flush_drops_what_it_wrote_once(
    handle: DropBehindHandle, dropped: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle.pwrite(memoryview(bytes(4096)), 0, 0)
    handle.pwrite(memoryview(bytes(4096)), 8192, 0)
    del dropped[:]
    monkeypatch.setattr(os, "fdatasync", lambda fd: dropped.append((-1, -1)))

    handle.flush()
    handle.flush()

    assert dropped == [(-1, -1), (0, 4096), (8192, 4096), (-1, -1)]
    handle.pwrite(memoryview(bytes(8 * MIB)), 0, 0)
    assert dropped[4:] == [(0, 8 * MIB)]  # the count began anew

"""The way of a file to stable storage: failures are kept, and flushes that wait share one."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdkitpy import Client, Flags
from nbdkitpy_plugins.file import FilePlugin
from nbdkitpy_plugins.file.sync import FileSync, FileSyncs

CLIENT = Client(1)


def plugin_on(key: str, value: Path) -> FilePlugin:
    plugin = FilePlugin()
    plugin.config(key, str(value))
    plugin.config_complete()
    plugin.get_ready()
    return plugin


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    return path


def test_F9_a_flush_that_failed_never_succeeds_later(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_on("file", disk)
    other, failing = (plugin.open("", False, CLIENT) for _ in range(2))
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: os.pread(-1, 1, 0))
    with pytest.raises(OSError, match="Bad file descriptor"):
        failing.flush()
    monkeypatch.setattr(os, "fdatasync", real)  # as the kernel does: reported once, then all is well

    later = plugin.open("", False, CLIENT)

    for handle in (failing, other, later):
        with pytest.raises(
            OSError, match=r"an earlier flush failed .*Bad file descriptor.*, so writes may be lost"
        ) as caught:
            handle.flush()
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="an earlier flush failed"):
            handle.pwrite(memoryview(b"x"), 0, Flags.FUA)
        handle.pwrite(memoryview(b"x"), 0, 0)  # what promises nothing still works
        handle.close()


def test_F9_a_failure_outlives_all_handles_on_the_file(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = plugin_on("file", disk)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", lambda fd: os.pread(-1, 1, 0))
        handle = plugin.open("", False, CLIENT)
        with pytest.raises(OSError, match="Bad file descriptor"):
            handle.flush()
        handle.close()
    del handle
    gc.collect()

    again = plugin.open("", False, CLIENT)

    with pytest.raises(OSError, match="an earlier flush failed"):
        again.flush()
    again.close()


def test_a_failure_is_of_one_file_under_all_its_names(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").hardlink_to(disk)
    (tmp_path / "sound").write_bytes(bytes(4096))
    plugin = plugin_on("dir", tmp_path)
    failing, same, sound = (plugin.open(name, False, CLIENT) for name in ("disk", "link", "sound"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", lambda fd: os.pread(-1, 1, 0))
        with pytest.raises(OSError, match="Bad file descriptor"):
            failing.flush()

    sound.flush()
    with pytest.raises(OSError, match="an earlier flush failed"):
        same.flush()

    for handle in (failing, same, sound):
        handle.close()
    plugin.unload()


def test_F9_a_failure_in_one_process_is_one_in_all(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sound").write_bytes(bytes(4096))
    plugin = plugin_on("dir", tmp_path)
    handle, sound = (plugin.open(name, False, CLIENT) for name in ("disk", "sound"))
    pid = os.fork()
    if not pid:
        monkeypatch.setattr(os, "fdatasync", lambda fd: os.pread(-1, 1, 0))
        with contextlib.suppress(OSError):
            plugin.open("disk", False, CLIENT).flush()
        os._exit(0)
    os.waitpid(pid, 0)

    sound.flush()
    with pytest.raises(OSError, match="an earlier flush failed, so writes may be lost") as caught:
        handle.flush()

    assert caught.value.errno == errno.EIO
    for each in (handle, sound):
        each.close()
    plugin.unload()


def test_a_failure_that_another_process_is_told_of_meanwhile_counts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = bytearray(1)
    monkeypatch.setattr(os, "fdatasync", lambda fd: failures.__setitem__(0, 1))

    with pytest.raises(OSError, match="an earlier flush failed"):
        FileSync(failures, 0).flush(0)


def test_files_that_are_not_open_any_more_are_forgotten(disk: Path) -> None:
    syncs = FileSyncs()
    first = syncs.of(os.stat(disk))

    assert syncs.of(os.stat(disk)) is first
    assert len(syncs._of_file) == 1

    del first
    gc.collect()

    assert len(syncs._of_file) == 0


class _CountingLock:
    """A lock that tells how many have come to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._come = threading.Semaphore(0)

    def __enter__(self) -> None:
        self._come.release()
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self._come.acquire(timeout=30)


def at_once(sync: FileSync, count: int, finished: Callable[[BaseException | None], None]) -> list[threading.Thread]:
    def flush() -> None:
        try:
            sync.flush(0)
        except OSError as error:
            finished(error)
        else:
            finished(None)

    threads = [threading.Thread(target=flush) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("failing", [False, True])
def test_D4_flushes_that_wait_share_the_next_one_and_its_failure(
    failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, lock = FileSync(bytearray(1), 0), _CountingLock()
    monkeypatch.setattr(sync, "_lock", lock)
    running, proceed = threading.Event(), threading.Event()
    flushes: list[int] = []
    results: list[BaseException | None] = []

    def fdatasync(fd: int) -> None:
        flushes.append(fd)
        if len(flushes) == 1:
            running.set()
            assert proceed.wait(30)
        elif failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", fdatasync)

    first = at_once(sync, 1, results.append)
    assert running.wait(30)
    waiting = at_once(sync, 8, results.append)
    lock.wait_for(9)
    assert results == []  # the one that is running began before the eight came, and cannot do for them
    proceed.set()
    for thread in first + waiting:
        thread.join()

    assert len(flushes) == 2
    assert results[0] is None
    assert [result is not None for result in results[1:]] == [failing] * 8


def test_flushes_one_after_the_other_are_all_done(monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushes.append)
    sync = FileSync(bytearray(1), 0)

    for fd in range(3):
        sync.flush(fd)

    assert flushes == [0, 1, 2]


def test_fsync_serves_where_there_is_no_fdatasync(monkeypatch: pytest.MonkeyPatch) -> None:
    flushes: list[int] = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "fsync", flushes.append)

    FileSync(bytearray(1), 0).flush(7)

    assert flushes == [7]

"""The disk that watches how it is used: each mistake is noted, and nothing that is right."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbdkitpy import BlockSize, Client, Flags, Handle, ThreadModel
from nbdkitpy.testing.disk import CAPABILITIES, Disk

CONTENT = bytes(range(256)) * 64
Does = Callable[[Handle], object]
DATA = memoryview(b"x" * 512)


@pytest.fixture
def make() -> Iterator[Callable[..., Disk]]:
    disks: list[Disk] = []

    def make(**kind: Any) -> Disk:
        disk = Disk(CONTENT, **kind)
        disk.load()
        disks.append(disk)
        return disk

    yield make
    for disk in disks:
        disk.unload()


Make = Callable[..., Disk]


def opened(disk: Disk, *, readonly: bool = False) -> Handle:
    return disk.open("", readonly, Client(1))


@pytest.mark.parametrize("shortcuts", [False, True])
def test_what_is_right_is_no_mistake(make: Make, shortcuts: bool) -> None:
    disk = make(shortcuts=shortcuts)
    handle = opened(disk)

    assert handle.pread(512, 256) == CONTENT[256:768]
    handle.pwrite(DATA, 0, Flags.FUA)
    handle.zero(512, 512, Flags.FUA | Flags.MAY_TRIM | Flags.FAST_ZERO)
    handle.trim(512, 1024, Flags.FUA)
    handle.cache(512, 0)
    assert list(handle.extents(8192, 100, Flags.REQ_ONE)) == [(0, 4096, 0), (4096, 4096, 0), (8192, 4096, 0)]
    handle.flush()
    assert disk.content[:1536] == bytes(DATA) + bytes(1024)
    assert disk.durable == disk.content[:]
    handle.close()

    assert (disk.mistakes, disk.opened, disk.closed) == ([], 1, 1)


@pytest.mark.parametrize(
    ("does", "mistake"),
    [
        (lambda handle: handle.pread(0, 0), "the range is empty"),
        (lambda handle: handle.pread(1, len(CONTENT)), "the export has 16384 bytes"),
        (lambda handle: handle.pread(1, -1), "the export has 16384 bytes"),
        (lambda handle: handle.pwrite(DATA, 0, Flags.MAY_TRIM), "no flags for it"),
        (lambda handle: handle.trim(1, 0, Flags.FAST_ZERO), "no flags for it"),
        (lambda handle: handle.extents(1, 0, Flags.FUA), "no flags for it"),
        (lambda handle: (handle.close(), handle.flush()), "the handle is closed"),
        (lambda handle: (handle.close(), handle.close()), "close: it is closed already"),
    ],
)
def test_a_mistake_is_noted(make: Make, does: Does, mistake: str) -> None:
    disk = make()

    does(opened(disk))

    assert [text for text in disk.mistakes if mistake in text]


@pytest.mark.parametrize(
    ("lacks", "does", "mistake"),
    [
        ("write", lambda handle: handle.pwrite(DATA, 0, 0), "cannot do that"),
        ("zero", lambda handle: handle.zero(1, 0, 0), "cannot do that"),
        ("trim", lambda handle: handle.trim(1, 0, 0), "cannot do that"),
        ("flush", lambda handle: handle.flush(), "cannot do that"),
        ("cache", lambda handle: handle.cache(1, 0), "cannot do that"),
        ("extents", lambda handle: handle.extents(1, 0, 0), "cannot do that"),
        ("fua", lambda handle: handle.pwrite(DATA, 0, Flags.FUA), "does not offer FUA"),
        ("fast_zero", lambda handle: handle.zero(1, 0, Flags.FAST_ZERO), "does not offer FAST_ZERO"),
    ],
)
def test_what_it_does_not_offer_is_a_mistake(make: Make, lacks: str, does: Does, mistake: str) -> None:
    disk = make(can=CAPABILITIES - {lacks})

    does(opened(disk))

    assert [text for text in disk.mistakes if mistake in text]


@pytest.mark.parametrize("verb", ["pwrite", "zero", "trim"])
def test_to_write_what_was_opened_read_only_is_a_mistake(make: Make, verb: str) -> None:
    disk = make()

    getattr(opened(disk, readonly=True), verb)(DATA if verb == "pwrite" else 512, 0, 0)

    assert [text for text in disk.mistakes if "the handle was opened read-only" in text]


@pytest.mark.parametrize(
    ("does", "mistake"),
    [
        (lambda handle: handle.pread(512, 1024), "blocks have 1024 bytes"),
        (lambda handle: handle.pread(1024, 512), "blocks have 1024 bytes"),
        (lambda handle: handle.pread(8192, 0), "the maximum is 4096"),
    ],
)
def test_to_break_a_size_constraint_is_a_mistake(make: Make, does: Does, mistake: str) -> None:
    disk = make(block_size=BlockSize(1024, 4096, 4096))

    does(opened(disk))

    assert [text for text in disk.mistakes if mistake in text]


@pytest.mark.parametrize(
    ("model", "same_handle", "is_mistake"),
    [
        (ThreadModel.PARALLEL, True, False),
        (ThreadModel.SERIALIZE_REQUESTS, True, True),
        (ThreadModel.SERIALIZE_REQUESTS, False, False),
        (ThreadModel.SERIALIZE_ALL_REQUESTS, False, True),
        (ThreadModel.SERIALIZE_CONNECTIONS, False, True),
    ],
)
def test_calls_at_once_are_a_mistake_where_the_model_does_not_allow_them(
    make: Make, monkeypatch: pytest.MonkeyPatch, model: ThreadModel, same_handle: bool, is_mistake: bool
) -> None:
    monkeypatch.setattr("nbdkitpy.testing.disk._DWELL", 20)
    disk = make(model=model)
    one = opened(disk)
    other = one if same_handle else opened(disk)
    together = threading.Barrier(2)

    def read(handle: Handle) -> None:
        together.wait(20)
        handle.pread(512, 0)

    if not is_mistake:
        disk.dwelling = 1000  # nobody comes, so nobody is waited for
    threads = [threading.Thread(target=read, args=(handle,)) for handle in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert bool(disk.mistakes) == is_mistake
    assert all(f"in spite of {model.name}" in text for text in disk.mistakes)


def test_to_close_while_a_call_is_under_way_is_a_mistake(make: Make) -> None:
    disk = make()
    handle: Any = opened(disk)

    with handle._watched("pread"):
        handle.close()

    assert disk.mistakes == ["close: a call has not returned"]


def test_it_fails_as_it_is_told(make: Make) -> None:
    disk = make()
    handle = opened(disk)
    disk.fails = {"open": errno.EACCES, "pread": errno.EIO}

    with pytest.raises(PermissionError):
        opened(disk)
    with pytest.raises(OSError, match="Input/output error"):
        handle.pread(512, 0)

    assert (disk.failures, disk.opened) == (2, 1)


def test_what_is_not_flushed_is_not_durable(make: Make) -> None:
    disk = make()
    handle = opened(disk)

    handle.pwrite(DATA, 0, 0)
    handle.pwrite(DATA, 512, Flags.FUA)

    assert disk.durable[:1024] == CONTENT[:512] + bytes(DATA)

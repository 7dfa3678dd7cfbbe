"""The file plugin's handle on a regular file: every verb, and what can go wrong in it."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdkitpy import Extent, ExtentType, Flags, Support
from nbdkitpy.extents import normalise_extents
from nbdkitpy_plugins.file import linux
from nbdkitpy_plugins.file.handle import FileHandle
from nbdkitpy_plugins.file.sync import FileSyncs

BLOCK = 4096
SIZE = 64 * BLOCK
HOLE = int(ExtentType.HOLE | ExtentType.ZERO)
DATA = int(ExtentType.DATA)


def opened(path: Path, syncs: FileSyncs | None = None) -> FileHandle:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return FileHandle(fd, True, (syncs or FileSyncs()).of(os.fstat(fd)))


@pytest.fixture
def content() -> bytes:
    return bytes(range(1, 256)) * (SIZE // 255) + bytes(SIZE % 255)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(content)
    return path


@pytest.fixture
def handle(path: Path) -> Iterator[FileHandle]:
    handle = opened(path)
    yield handle
    handle.close()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that fdatasync was called with."""
    calls: list[int] = []
    real = os.fdatasync

    def spy(fd: int) -> None:
        real(fd)
        calls.append(fd)

    monkeypatch.setattr(os, "fdatasync", spy)
    return calls


def found(handle: FileHandle, count: int, offset: int, flags: int = 0) -> list[tuple[int, int, int]]:
    return [(start, length, int(kind)) for start, length, kind in handle.extents(count, offset, flags)]


def holes_or_skip(handle: FileHandle) -> None:
    """Skip unless the file system can punch holes and find them again."""
    linux_holes = handle._did(linux.punch_hole, BLOCK, 0) and found(handle, BLOCK, 0) == [(0, BLOCK, HOLE)]
    if not linux_holes:
        pytest.skip("the file system of the temporary directory has no holes")


def fail(code: int) -> Callable[..., None]:
    def failing(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    return failing


# --- capabilities ---


def test_capabilities(handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert handle.get_size() == SIZE
    assert (handle.can_write(), handle.can_trim(), handle.can_flush()) == (True, True, True)
    assert (handle.can_zero(), handle.can_fua(), handle.can_cache()) == (Support.NATIVE,) * 3
    assert (handle.can_fast_zero(), handle.can_multi_conn(), handle.is_rotational()) == (True, True, False)

    monkeypatch.delattr(os, "posix_fadvise")

    assert handle.can_cache() is Support.NONE


def test_an_empty_file_is_an_empty_disk(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    handle = opened(tmp_path / "empty")

    assert handle.get_size() == 0
    assert not handle.sparse
    handle.close()


def test_a_huge_sparse_file_has_its_size(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 43)
    handle = opened(path)

    handle.pwrite(memoryview(b"end"), (1 << 43) - 3, 0)

    assert handle.get_size() == 1 << 43
    assert handle.sparse
    assert bytes(handle.pread(4, (1 << 43) - 4)) == b"\0end"
    handle.close()


# --- pread ---


@pytest.mark.parametrize(("count", "offset"), [(1, 0), (SIZE, 0), (1, SIZE - 1), (1000, 12345)])
def test_pread_returns_the_range(count: int, offset: int, handle: FileHandle, content: bytes) -> None:
    assert handle.pread(count, offset) == content[offset : offset + count]


def test_F8_short_reads_are_read_on(handle: FileHandle, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: real(fd, min(count, 7), offset))

    assert handle.pread(100, 33) == content[33:133]


def test_F7_a_read_beyond_the_end_of_a_truncated_file_fails(handle: FileHandle, path: Path, content: bytes) -> None:
    os.truncate(path, 10000)

    for count, offset in ((1, 10000), (2, 9999), (SIZE, 0), (4096, SIZE - 4096)):
        with pytest.raises(OSError, match=f"the file ends at {max(10000, offset)}") as caught:
            handle.pread(count, offset)
        assert caught.value.errno == errno.EIO
    assert handle.pread(10000, 0) == content[:10000]


def test_read_errors_reach_the_client(handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pread", fail(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        handle.pread(1, 0)


# --- the short cuts of pread ---


def nowait_as(path: Path, monkeypatch: pytest.MonkeyPatch, preadv: Callable[[int], int]) -> FileHandle:
    """Open `path` where a preadv that must not wait does as `preadv` says of its offset; at open, it reads a byte."""
    calls = 0

    def fake(fd: int, buffers: Sequence[bytearray], offset: int, flags: int) -> int:
        nonlocal calls
        calls += 1
        assert flags == os.RWF_NOWAIT
        return 1 if calls == 1 else preadv(offset)

    monkeypatch.setattr(os, "preadv", fake)
    return opened(path)


def test_pread_into_reads_what_is_in_the_page_cache(handle: FileHandle, content: bytes) -> None:
    if handle.pread_into is None:
        pytest.skip("the file system of the temporary directory does not know RWF_NOWAIT")
    handle.pread(SIZE, 0)

    buffer = memoryview(bytearray(5000))
    assert handle.pread_into(buffer, 777)
    assert buffer == content[777:5777]


def test_pread_into_leaves_to_pread_what_would_wait_or_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.EAGAIN, errno.EIO, errno.EOPNOTSUPP):
        handle = nowait_as(path, monkeypatch, fail(code))  # type: ignore[arg-type]

        assert handle.pread_into is not None
        assert handle.pread_into(memoryview(bytearray(512)), 0) is False
        handle.close()


def test_F8_pread_into_leaves_short_reads_to_pread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for got in (0, 511):
        handle = nowait_as(path, monkeypatch, lambda offset, got=got: got)  # type: ignore[misc]

        assert handle.pread_into is not None
        assert handle.pread_into(memoryview(bytearray(512)), 0) is False
        handle.close()


@pytest.mark.parametrize(("code", "offered"), [(errno.EAGAIN, True), (errno.EOPNOTSUPP, False), (errno.ENOSYS, False)])
def test_short_cuts_are_offered_only_where_the_file_system_knows_them(
    code: int, offered: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", fail(code))

    handle = opened(path)

    assert (handle.pread_into is not None) is offered
    assert (handle.file_range is not None) is offered
    handle.close()


def test_there_are_no_short_cuts_where_python_has_no_nowait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT")

    handle = opened(path)

    assert handle.pread_into is None
    assert handle.file_range is None
    handle.close()


def test_file_range_names_the_bytes_that_pread_returns(handle: FileHandle) -> None:
    if handle.file_range is None:
        pytest.skip("the file system of the temporary directory does not know RWF_NOWAIT")
    expected = handle.pread(70000, 4321)
    place = handle.file_range(70000, 4321)
    assert place is not None
    ours, theirs = socket.socketpair()

    with ours, theirs:
        sent = os.sendfile(ours.fileno(), place.fd, place.position, 70000)
        received = theirs.recv(sent, socket.MSG_WAITALL)

    assert received == bytes(expected)[:sent]
    assert sent > 0


@pytest.mark.parametrize("absent", [0, BLOCK, 3 * BLOCK - 1])
def test_file_range_is_none_unless_the_end_is_in_the_page_cache(
    absent: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = nowait_as(path, monkeypatch, lambda offset: fail(errno.EAGAIN)() or 0 if offset == absent else 1)

    assert handle.file_range is not None
    place = handle.file_range(2 * BLOCK, BLOCK)

    assert (place is None) is (absent == 3 * BLOCK - 1)
    handle.close()


def test_F7_file_range_is_none_beyond_the_end_of_a_truncated_file(handle: FileHandle, path: Path) -> None:
    if handle.file_range is None:
        pytest.skip("the file system of the temporary directory does not know RWF_NOWAIT")
    os.truncate(path, BLOCK)

    assert handle.file_range(2 * BLOCK, 0) is None
    assert handle.file_range(BLOCK, BLOCK) is None


# --- pwrite ---


def test_pwrite_writes_the_range_and_nothing_else(
    handle: FileHandle, path: Path, content: bytes, synced: list[int]
) -> None:
    handle.pwrite(memoryview(b"new" * 1000), 5000, 0)

    assert path.read_bytes() == content[:5000] + b"new" * 1000 + content[8000:]
    assert synced == []


def test_F8_short_writes_are_written_on(
    handle: FileHandle, path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))

    handle.pwrite(memoryview(b"0123456789" * 10), 33, 0)

    assert path.read_bytes() == content[:33] + b"0123456789" * 10 + content[133:]


def test_F8_a_write_that_does_not_get_on_is_an_error(handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)

    with pytest.raises(OSError, match="nothing could be written at 5") as caught:
        handle.pwrite(memoryview(b"x"), 5, 0)

    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_F8_F9_an_error_after_a_short_write_is_reported(
    code: int, handle: FileHandle, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: Iterator[Callable[..., int | None]] = iter([lambda *arguments: 512, fail(code)])
    monkeypatch.setattr(os, "pwrite", lambda *arguments: next(answers)(*arguments))

    with pytest.raises(OSError, match=os.strerror(code)):
        handle.pwrite(memoryview(bytes(1024)), 0, Flags.FUA)

    assert synced == []


def test_F9_a_write_beyond_the_limit_of_file_sizes_is_an_error_and_no_signal(path: Path) -> None:
    program = f"""
import errno, os, resource, sys
from pathlib import Path
from nbdkitpy_plugins.file.handle import FileHandle
from nbdkitpy_plugins.file.sync import FileSyncs
fd = os.open({str(path)!r}, os.O_RDWR)
handle = FileHandle(fd, True, FileSyncs().of(os.fstat(fd)))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
handle.pwrite(memoryview(b"fits"), 0, 0)
for offset in (8192, 8190):
    try:
        handle.pwrite(memoryview(b"does not fit"), offset, 0)
    except OSError as error:
        print(errno.errorcode[error.errno])
handle.pwrite(memoryview(b"alive"), 0, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # what else is written
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.split() == ["EFBIG", "EFBIG"]
    assert path.read_bytes()[:5] == b"alive"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file of 4 MiB on a file system of 1 MiB, which knows no FALLOC_FL_ZERO_RANGE."""
    mount = shutil.which("mount")
    directory = tmp_path / "small"
    directory.mkdir()
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    (directory / "disk").touch()
    os.truncate(directory / "disk", 4 << 20)
    yield directory / "disk"
    subprocess.run(["umount", str(directory)], check=True)


def test_F9_a_full_file_system_is_reported(small_disk: Path) -> None:
    handle = opened(small_disk)

    with pytest.raises(OSError, match="No space left") as caught:
        handle.pwrite(memoryview(bytes(2 << 20)), 0, 0)

    assert caught.value.errno == errno.ENOSPC
    handle.trim(4 << 20, 0, 0)
    handle.pwrite(memoryview(b"there is room again"), 0, Flags.FUA)
    handle.close()


def test_zeroes_on_tmpfs_are_allocated_or_not_as_asked(small_disk: Path) -> None:
    handle = opened(small_disk)
    handle.pwrite(memoryview(b"x" * 65536), 0, 0)

    handle.zero(65536, 0, 0)
    allocated = small_disk.stat().st_blocks
    handle.zero(65536, 0, Flags.MAY_TRIM)
    freed = small_disk.stat().st_blocks

    assert (allocated, freed) == (128, 0)
    assert handle.pread(65536, 0) == bytes(65536)
    with pytest.raises(OSError, match="No space left"):
        handle.zero(2 << 20, 0, 0)
    handle.close()


# --- flush and FUA ---


def test_D1_flush_syncs_the_file(handle: FileHandle, synced: list[int]) -> None:
    handle.flush()

    assert synced == [handle.fd]


@pytest.mark.parametrize("flags", [Flags.NONE, Flags.FUA, Flags.FUA | Flags.MAY_TRIM])
def test_D2_fua_syncs_after_the_change(
    flags: Flags, path: Path, handle: FileHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[str] = []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        changes.append("write")
        return len(data)

    monkeypatch.setattr(os, "pwrite", pwrite)
    for name in ("punch_hole", "zero_range"):
        monkeypatch.setattr(linux, name, lambda fd, offset, count, name=name: changes.append(name))
    monkeypatch.setattr(os, "fdatasync", lambda fd: changes.append("sync"))
    sync = ["sync"] if flags & Flags.FUA else []

    handle.pwrite(memoryview(b"x"), 0, flags & Flags.FUA)
    handle.trim(1, 0, flags & Flags.FUA)
    handle.zero(1, 0, flags)

    zero = "punch_hole" if flags & Flags.MAY_TRIM else "zero_range"
    assert changes == ["write", *sync, "punch_hole", *sync, zero, *sync]


@pytest.mark.parametrize("verb", ["pwrite", "trim", "zero"])
def test_F9_fua_reports_that_it_failed(verb: str, handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fdatasync", fail(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        getattr(handle, verb)(memoryview(b"x") if verb == "pwrite" else 1, 0, Flags.FUA)


# --- trim ---


def test_trim_frees_blocks_and_keeps_the_size(handle: FileHandle, path: Path, content: bytes) -> None:
    holes_or_skip(handle)
    before = path.stat().st_blocks

    handle.trim(16 * BLOCK, 8 * BLOCK, 0)

    assert path.stat().st_blocks == before - 16 * BLOCK // 512
    assert path.stat().st_size == SIZE
    assert path.read_bytes()[24 * BLOCK :] == content[24 * BLOCK :]
    assert handle.sparse


def test_trim_that_is_not_supported_does_nothing_and_is_not_tried_again(
    handle: FileHandle, path: Path, content: bytes, synced: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def punch_hole(fd: int, offset: int, count: int) -> None:
        tries.append(offset)
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(linux, "punch_hole", punch_hole)

    for _ in range(3):
        handle.trim(SIZE, 0, Flags.FUA)

    assert len(tries) == 1
    assert len(synced) == 3
    assert path.read_bytes() == content
    assert not handle.sparse


def test_trim_reports_errors(handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "punch_hole", fail(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        handle.trim(1, 0, 0)


# --- zero ---


@pytest.mark.parametrize("flags", [Flags.NONE, Flags.FUA, Flags.MAY_TRIM, Flags.MAY_TRIM | Flags.FAST_ZERO])
@pytest.mark.parametrize(
    ("count", "offset"), [(1, 1), (BLOCK, BLOCK), (3 * BLOCK + 5, 999), (SIZE, 0), (10, SIZE - 10)]
)
def test_zero_zeroes_the_range_and_nothing_else(
    count: int, offset: int, flags: int, handle: FileHandle, path: Path, content: bytes
) -> None:
    try:
        handle.zero(count, offset, flags)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP  # noqa: PT017
        pytest.skip("the file system of the temporary directory has no better way than writing")

    assert path.read_bytes() == content[:offset] + bytes(count) + content[offset + count :]


def test_zero_keeps_blocks_allocated_unless_it_may_trim(handle: FileHandle, path: Path) -> None:
    holes_or_skip(handle)
    handle.pwrite(memoryview(bytes(BLOCK)), 0, Flags.FUA)
    before = path.stat().st_blocks

    handle.zero(SIZE, 0, 0)
    assert path.stat().st_blocks >= before

    handle.zero(SIZE, 0, Flags.MAY_TRIM)
    assert path.stat().st_blocks == 0


def test_F7_zero_does_not_make_a_truncated_file_longer(handle: FileHandle, path: Path) -> None:
    os.truncate(path, BLOCK)

    for flags in (Flags.NONE, Flags.MAY_TRIM):
        handle.zero(SIZE, 0, flags)
    handle.trim(SIZE, 0, 0)

    assert path.stat().st_size == BLOCK


ALL = frozenset({"punch_hole", "zero_range", "allocate"})


@pytest.mark.parametrize(
    ("flags", "supported", "tried", "works"),
    [
        (Flags.NONE, ALL, ["zero_range"], True),
        (Flags.FAST_ZERO, ALL, ["zero_range"], True),
        (Flags.MAY_TRIM, ALL, ["punch_hole"], True),
        (Flags.MAY_TRIM | Flags.FAST_ZERO, ALL, ["punch_hole"], True),
        (Flags.MAY_TRIM, ALL - {"punch_hole"}, ["punch_hole", "zero_range"], True),
        (Flags.NONE, ALL - {"zero_range"}, ["zero_range", "punch_hole", "allocate"], True),
        (Flags.FAST_ZERO, ALL - {"zero_range"}, ["zero_range"], False),
        (Flags.MAY_TRIM | Flags.FAST_ZERO, ALL - {"zero_range"}, ["punch_hole"], True),
        (Flags.NONE, {"punch_hole"}, ["zero_range", "punch_hole", "allocate"], False),
        (Flags.NONE, {"allocate"}, ["zero_range", "punch_hole"], False),
        (Flags.MAY_TRIM, {"allocate"}, ["punch_hole", "zero_range"], False),
        (Flags.MAY_TRIM | Flags.FAST_ZERO, frozenset(), ["punch_hole", "zero_range"], False),
    ],
)
def test_zero_tries_the_ways_that_there_are_in_order(
    flags: int,
    supported: frozenset[str],
    tried: list[str],
    works: bool,
    handle: FileHandle,
    synced: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def operation(name: str) -> Callable[[int, int, int], None]:
        def run(fd: int, offset: int, count: int) -> None:
            assert (fd, offset, count) == (handle.fd, 512, 1024)
            calls.append(name)
            if name not in supported:
                raise OSError(errno.EOPNOTSUPP, "not supported")

        return run

    for name in ALL:
        monkeypatch.setattr(linux, name, operation(name))

    if works:
        handle.zero(1024, 512, flags)
        handle.zero(1024, 512, flags)
    else:
        for _ in range(2):
            with pytest.raises(OSError, match="no better way") as caught:
                handle.zero(1024, 512, flags)
            assert caught.value.errno == errno.EOPNOTSUPP

    again = [name for name in tried if name in supported]
    assert calls == tried + again  # what is not supported is not tried again
    assert synced == []


def test_zero_reports_other_errors(handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "zero_range", fail(errno.ENOSPC))

    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            handle.zero(1024, 512, 0)


# --- extents ---


def test_extents_show_holes_and_data(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, SIZE)
    handle = opened(path)
    holes_or_skip(handle)
    handle.pwrite(memoryview(b"x" * 2 * BLOCK), 8 * BLOCK, Flags.FUA)

    assert handle.can_extents()
    assert handle.sparse
    assert found(handle, SIZE, 0) == [
        (0, 8 * BLOCK, HOLE),
        (8 * BLOCK, 2 * BLOCK, DATA),
        (10 * BLOCK, SIZE - 10 * BLOCK, HOLE),
    ]
    assert found(handle, BLOCK, 9 * BLOCK) == [(9 * BLOCK, BLOCK, DATA)]
    assert found(handle, 100, 50) == [(50, 100, HOLE)]
    assert found(handle, SIZE - 9 * BLOCK - 1, 9 * BLOCK + 1)[0] == (9 * BLOCK + 1, BLOCK - 1, DATA)
    handle.close()


def test_extents_stop_after_the_first_if_only_one_is_wanted(handle: FileHandle) -> None:
    holes_or_skip(handle)

    assert found(handle, SIZE, 0, Flags.REQ_ONE) == [(0, BLOCK, HOLE)]
    assert found(handle, SIZE - BLOCK, BLOCK, Flags.REQ_ONE) == [(BLOCK, SIZE - BLOCK, DATA)]


def test_holes_survive_reading_and_zeroing(handle: FileHandle, path: Path) -> None:
    holes_or_skip(handle)
    handle.trim(SIZE, 0, 0)

    handle.pread(SIZE, 0)
    handle.zero(SIZE, 0, Flags.MAY_TRIM)
    handle.cache(SIZE, 0)
    handle.flush()

    assert found(handle, SIZE, 0) == [(0, SIZE, HOLE)]
    assert path.stat().st_blocks == 0


def test_F7_what_a_truncated_file_has_lost_is_not_reported_as_zeroes(handle: FileHandle, path: Path) -> None:
    handle.trim(8 * BLOCK, 4 * BLOCK, 0)
    os.truncate(path, 8 * BLOCK)

    extents = found(handle, SIZE, 0)
    beyond = found(handle, BLOCK, 32 * BLOCK)

    assert beyond == [(32 * BLOCK, BLOCK, DATA)]
    assert all(kind == DATA or start + length <= 8 * BLOCK for start, length, kind in extents)
    assert extents[-1] == (8 * BLOCK, SIZE - 8 * BLOCK, DATA) or extents == [(0, SIZE, DATA)]


@pytest.mark.parametrize("race", [errno.ENXIO, None])
def test_a_file_that_changes_under_a_search_gives_data(
    race: int | None, handle: FileHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE and race is not None:
            raise OSError(race, "the data have gone")
        return offset  # data here, and a hole here

    monkeypatch.setattr(os, "lseek", lseek)

    assert found(handle, 2 * BLOCK, BLOCK) == [(BLOCK, 2 * BLOCK, DATA)]


@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE])
def test_extents_report_errors(whence: int, handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "lseek", lambda fd, offset, how: fail(errno.EIO)() if how == whence else offset)

    with pytest.raises(OSError, match="Input/output error"):
        found(handle, BLOCK, 0)


def test_without_seek_hole_there_are_no_extents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, SIZE)
    real = os.lseek
    refusing = fail(errno.EINVAL)
    monkeypatch.setattr(
        os, "lseek", lambda fd, offset, how: refusing() if how == os.SEEK_HOLE else real(fd, offset, how)
    )

    handle = opened(path)

    assert handle.get_size() == SIZE
    assert not handle.can_extents()
    assert not handle.sparse
    handle.close()


RANGES = st.tuples(st.integers(0, 63), st.integers(1, 16)).map(lambda pair: (pair[0], min(pair[1], 64 - pair[0])))


@settings(max_examples=100, deadline=None)
@given(
    changes=st.lists(st.tuples(st.sampled_from(["pwrite", "trim", "zero", "zero-trim"]), RANGES), max_size=12),
    start=st.integers(0, SIZE - 1),
    data=st.data(),
)
def test_extents_never_hide_data(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[str, tuple[int, int]]],
    start: int,
    data: st.DataObject,
) -> None:
    count = data.draw(st.integers(1, SIZE - start))
    path = tmp_path_factory.mktemp("model") / "disk"
    path.touch()
    os.truncate(path, SIZE)
    handle = opened(path)
    model = bytearray(SIZE)
    for verb, (block, blocks) in changes:
        offset, length = block * BLOCK, blocks * BLOCK
        model[offset : offset + length] = (b"x" if verb == "pwrite" else b"\0") * length
        if verb == "pwrite":
            handle.pwrite(memoryview(b"x" * length), offset, 0)
        elif verb == "trim":
            handle.trim(length, offset, 0)
        else:
            handle.zero(length, offset, Flags.MAY_TRIM if verb == "zero-trim" else 0)

    extents = normalise_extents(handle.extents(count, start, 0), count, start)
    first = normalise_extents(handle.extents(count, start, Flags.REQ_ONE), count, start)

    # All of the range is covered, what is called a hole is zero, and one extent alone is the first of all.
    assert sum(extent.length for extent in extents) == count
    assert all(not any(model[e.offset : e.offset + e.length]) for e in extents if e.type == HOLE)
    assert first == extents[:1]
    assert isinstance(first[0], Extent)
    assert handle.pread(SIZE, 0) == model
    handle.close()


# --- cache and close ---


def test_cache_has_the_kernel_read_ahead(handle: FileHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: told.append(arguments))

    handle.cache(BLOCK, 2 * BLOCK)

    assert told == [(handle.fd, 2 * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)]


def test_close_closes_the_descriptor(path: Path) -> None:
    handle = opened(path)

    handle.close()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle.fd)

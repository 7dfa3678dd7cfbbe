"""The file plugin on block devices: on a loop device where one can be had, and without one as far as that goes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import Client, Flags, Handle
from nbdkitpy_plugins.file import FilePlugin, linux
from nbdkitpy_plugins.file.handle import BlockDeviceHandle
from nbdkitpy_plugins.file.sync import FileSyncs

SIZE = 2 << 20
CLIENT = Client(1)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device on a file called "backing", filled with the letter x."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * SIZE)
    losetup = shutil.which("losetup")
    if losetup is None:
        pytest.skip("needs losetup")
    made = subprocess.run([losetup, "--find", "--show", str(backing)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"needs a loop device: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    yield path
    subprocess.run([losetup, "--detach", str(path)], check=True)


@pytest.fixture
def handle(device: Path) -> Iterator[Handle]:
    plugin = FilePlugin()
    plugin.config("file", str(device))
    plugin.config_complete()
    plugin.get_ready()
    handle = plugin.open("", False, CLIENT)
    yield handle
    handle.close()


def test_a_block_device_is_served(handle: Handle, device: Path) -> None:
    assert isinstance(handle, BlockDeviceHandle)
    assert handle.get_size() == SIZE
    assert handle.can_write()
    assert not handle.can_extents()
    assert not handle.sparse
    assert handle.is_rotational() in (False, True)

    handle.pwrite(memoryview(b"new"), 1001, Flags.FUA)

    assert handle.pread(5, 1000) == b"xnewx"
    assert device.with_name(device.name).read_bytes()[1000:1005] == b"xnewx"


def test_what_was_flushed_is_on_the_device(handle: Handle, tmp_path: Path) -> None:
    handle.pwrite(memoryview(b"flushed"), 0, 0)

    handle.flush()

    assert (tmp_path / "backing").read_bytes()[:7] == b"flushed"


@pytest.mark.parametrize("flags", [Flags.NONE, Flags.FUA, Flags.MAY_TRIM, Flags.MAY_TRIM | Flags.FAST_ZERO])
def test_zero_zeroes_sectors(flags: int, handle: Handle) -> None:
    handle.zero(8192, 4096, flags)

    assert handle.pread(SIZE, 0) == b"x" * 4096 + bytes(8192) + b"x" * (SIZE - 12288)


def test_zero_leaves_to_others_what_is_no_sector_or_not_fast(handle: Handle) -> None:
    for count, offset, flags in ((511, 0, 0), (512, 1, Flags.MAY_TRIM), (512, 0, Flags.FAST_ZERO)):
        with pytest.raises(OSError, match="no better way") as caught:
            handle.zero(count, offset, flags)
        assert caught.value.errno == errno.EOPNOTSUPP

    assert handle.pread(SIZE, 0) == b"x" * SIZE


def test_trim_discards_whole_sectors_only(handle: Handle, tmp_path: Path) -> None:
    handle.trim(SIZE // 2 + 1000, 100, Flags.FUA)
    handle.trim(1, 1000, 0)

    content = bytes(handle.pread(SIZE, 0))
    assert content[:512] == b"x" * 512
    assert content[SIZE // 2 + 1024 :] == b"x" * (SIZE // 2 - 1024)
    assert content.count(b"x") in (SIZE, SIZE // 2 - 1024 + 512)  # nothing discarded, or all that may be


def test_a_device_in_a_directory_is_served(device: Path, tmp_path: Path) -> None:
    directory = tmp_path / "served"
    directory.mkdir()
    try:
        os.mknod(directory / "sda", 0o60600, device.stat().st_rdev)
    except PermissionError:
        pytest.skip("needs the right to make device nodes")
    plugin = FilePlugin()
    plugin.config("dir", str(directory))
    plugin.config_complete()
    plugin.get_ready()

    assert [export.name for export in plugin.list_exports(CLIENT, False)] == ["sda"]
    try:
        handle = plugin.open("sda", False, CLIENT)
    except PermissionError:
        pytest.skip("the temporary directory is mounted nodev")
    assert handle.get_size() == SIZE
    handle.close()
    plugin.unload()


# --- without a device ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What is asked of the device: operation, offset and count."""
    made: list[tuple[str, int, int]] = []
    for name in ("discard", "zero_out", "punch_hole"):

        def operation(fd: int, offset: int, count: int, name: str = name) -> None:
            made.append((name, offset, count))

        monkeypatch.setattr(linux, name, operation)
    monkeypatch.setattr(linux, "sector_size", lambda fd: 4096)
    return made


@pytest.fixture
def pretended(calls: list[tuple[str, int, int]], tmp_path: Path) -> Iterator[BlockDeviceHandle]:
    """A file for a device of sectors of 4096 bytes."""
    (tmp_path / "device").write_bytes(bytes(SIZE))
    fd = os.open(tmp_path / "device", os.O_RDWR)
    handle = BlockDeviceHandle(fd, True, FileSyncs().of(os.fstat(fd)))
    yield handle
    handle.close()


@pytest.mark.parametrize(
    ("count", "offset", "discarded"),
    [
        (4096, 0, [(0, 4096)]),
        (SIZE, 0, [(0, SIZE)]),
        (8192, 1, [(4096, 4096)]),
        (8191, 4096, [(4096, 4096)]),
        (12288, 100, [(4096, 8192)]),
        (4096, 1, []),
        (4095, 0, []),
        (1, 4095, []),
        (8190, 1, []),
    ],
)
def test_trim_is_aligned_inward(
    count: int,
    offset: int,
    discarded: list[tuple[int, int]],
    pretended: BlockDeviceHandle,
    calls: list[tuple[str, int, int]],
) -> None:
    pretended.trim(count, offset, 0)

    assert calls == [("discard", *range_) for range_ in discarded]


@pytest.mark.parametrize(
    ("count", "offset", "flags", "operation"),
    [
        (4096, 8192, Flags.NONE, "zero_out"),
        (4096, 8192, Flags.MAY_TRIM, "punch_hole"),
        (4096, 8192, Flags.MAY_TRIM | Flags.FAST_ZERO, "punch_hole"),
        (4096, 8192, Flags.FAST_ZERO, None),
        (4096, 512, Flags.MAY_TRIM, None),
        (512, 4096, Flags.NONE, None),
    ],
)
def test_zero_of_a_device_is_by_its_own_means_or_not_at_all(
    count: int,
    offset: int,
    flags: int,
    operation: str | None,
    pretended: BlockDeviceHandle,
    calls: list[tuple[str, int, int]],
) -> None:
    if operation is None:
        with pytest.raises(OSError, match="no better way"):
            pretended.zero(count, offset, flags)
    else:
        pretended.zero(count, offset, flags)

    assert calls == ([(operation, offset, count)] if operation else [])


def test_a_device_that_cannot_punch_is_zeroed_slowly_unless_it_has_to_be_fast(
    pretended: BlockDeviceHandle, calls: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(fd: int, offset: int, count: int) -> None:
        calls.append(("tried", offset, count))
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(linux, "punch_hole", unsupported)

    pretended.zero(4096, 0, Flags.MAY_TRIM)
    with pytest.raises(OSError, match="no better way"):
        pretended.zero(4096, 0, Flags.MAY_TRIM | Flags.FAST_ZERO)

    assert calls == [("tried", 0, 4096), ("zero_out", 0, 4096)]


def test_a_device_has_one_way_to_stable_storage_under_all_its_names(tmp_path: Path) -> None:
    try:
        for name in ("one", "two"):
            os.mknod(tmp_path / name, 0o60600, os.makedev(8, 0))
        os.mknod(tmp_path / "other", 0o60600, os.makedev(8, 1))
    except PermissionError:
        pytest.skip("needs the right to make device nodes")
    syncs = FileSyncs()

    one, two, other = (syncs.of(os.stat(tmp_path / name)) for name in ("one", "two", "other"))

    assert one is two
    assert one is not other

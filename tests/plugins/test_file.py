"""The file plugin: its parameters, and how a file or descriptor is opened."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError, Export, Flags, Plugin, Support, ThreadModel
from nbdkitpy.stack import Stack
from nbdkitpy_plugins import file as file_module
from nbdkitpy_plugins.file import FilePlugin
from nbdkitpy_plugins.file.dropbehind import DropBehindHandle
from nbdkitpy_plugins.file.handle import FileHandle
from tests.serving import NoServer

CLIENT = Client(1)


def configured(*parameters: tuple[str, object]) -> FilePlugin:
    plugin = FilePlugin()
    for key, value in parameters:
        assert plugin.config(key, str(value))
    plugin.config_complete()
    plugin.get_ready()
    return plugin


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 64)
    return path


@pytest.fixture
def descriptor() -> Iterator[Callable[..., int]]:
    """Open files on descriptors that are closed in the end."""
    with contextlib.ExitStack() as stack:

        def open_(path: Path, flags: int = os.O_RDWR) -> int:
            fd = os.open(path, flags)
            stack.callback(os.close, fd)
            return fd

        yield open_


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


# --- parameters ---


def test_registers_the_plugin() -> None:
    registered: list[type[Plugin]] = []

    file_module.register_plugins(registered.append)

    assert registered == [FilePlugin]


def test_a_bare_word_is_the_file(disk: Path) -> None:
    assert [key for key, parameter in FilePlugin.parameters.items() if parameter.magic] == ["file"]


@pytest.mark.parametrize("keys", [(), ("file", "dir"), ("file", "fd"), ("fd", "dirfd"), ("file", "dir", "fd", "dirfd")])
def test_exactly_one_source_must_be_given(keys: tuple[str, ...], disk: Path, descriptor: Callable[..., int]) -> None:
    values: dict[str, object] = {
        "file": disk,
        "dir": disk.parent,
        "fd": descriptor(disk),
        "dirfd": descriptor(disk.parent, os.O_RDONLY),
    }

    with pytest.raises(ConfigError, match="exactly one of file=, dir=, fd= and dirfd= must be given, not ") as caught:
        configured(*((key, values[key]) for key in keys))

    assert all(f"{key}=" in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("file", "nowhere", "must be the path of something that exists"),
        ("file", "", "must be a path"),
        ("file", ".", r"must be a regular file or block device \(dir= serves"),
        ("file", "pipe", r"\(this is a pipe\)"),
        ("file", "/dev/null", r"\(this is a character device\)"),
        ("dir", "disk.img", r"must be a directory \(this is a regular file\)"),
        ("dir", "nowhere", "must be the path of something that exists"),
        ("fd", "0", "must be an integer from 3"),
        ("fd", "1", "must be an integer from 3"),
        ("fd", "2", "must be an integer from 3"),
        ("fd", "-1", "must be an integer from 3"),
        ("fd", "x", "must be an integer from 3"),
        ("fd", "1000000", r"must be something that can be opened \(Bad file descriptor\)"),
        ("dirfd", "2", "must be an integer from 3"),
        ("dirfd", "1000000", "Bad file descriptor"),
        ("fadvise", "often", "must be one of normal, random, sequential"),
        ("cache", "writeback", "must be one of default, none"),
        ("reduce-memory-pressure", "perhaps", "must be true or false"),
    ],
)
def test_F3_F11_a_wrong_value_is_refused_with_what_would_be_right(
    key: str, value: str, message: str, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk.parent)
    os.mkfifo("pipe")

    with pytest.raises(ConfigError, match=f"^file: {key} {message}" if message[0] == "m" else message):
        configured((key, value))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (os.O_WRONLY, "O_WRONLY"),
        (os.O_RDWR | os.O_APPEND, "O_APPEND"),
        (os.O_PATH, "O_PATH"),
        (os.O_WRONLY | os.O_APPEND, "O_APPEND and O_WRONLY"),
    ],
)
def test_F11_a_descriptor_that_cannot_be_served_is_refused(
    flags: int, named: str, disk: Path, descriptor: Callable[..., int]
) -> None:
    with pytest.raises(ConfigError, match=f"reading and writing \\(this has {named}\\)"):
        configured(("fd", descriptor(disk, flags)))


def test_F11_a_descriptor_of_something_else_is_refused(disk: Path, descriptor: Callable[..., int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ConfigError, match=r"\(this is a socket\)"):
        configured(("fd", ours.fileno()))
    with pytest.raises(ConfigError, match=r"\(this is a directory\)"):
        configured(("fd", descriptor(disk.parent, os.O_RDONLY)))
    with pytest.raises(ConfigError, match=r"descriptor of a directory \(this is a regular file\)"):
        configured(("dirfd", descriptor(disk)))


def test_hints_are_refused_where_there_is_no_posix_fadvise(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")

    configured(("file", disk))
    for key, value in (("fadvise", "random"), ("cache", "none"), ("reduce-memory-pressure", "true")):
        with pytest.raises(ConfigError, match="cannot work on this system"):
            configured(("file", disk), (key, value))


def test_any_number_of_requests_may_run_at_once() -> None:
    assert FilePlugin().thread_model() is ThreadModel.PARALLEL


def test_dump_tells_what_nbdkit_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FilePlugin().dump()["file_falloc_fl_punch_hole"] == "yes"

    monkeypatch.setattr(sys, "platform", "darwin")

    assert FilePlugin().dump() == {}


# --- opening ---


def test_the_export_name_does_not_matter_for_a_single_file(disk: Path) -> None:
    plugin = configured(("file", disk))

    for export_name in ("", "disk", "../x", "\0"):
        handle = plugin.open(export_name, False, CLIENT)
        assert bytes(handle.pread(4, 1)) == b"\1\2\3\4"
        handle.close()
    assert list(plugin.list_exports(CLIENT, False)) == [Export("")]
    plugin.unload()


def test_a_relative_path_means_the_directory_at_configuration(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plugin = configured(("file", "disk.img"))
    monkeypatch.chdir("/")

    handle = plugin.open("", False, CLIENT)

    assert handle.get_size() == 16384
    handle.close()


def test_each_handle_has_a_blocking_descriptor_of_its_own_that_is_closed_with_it(disk: Path) -> None:
    plugin = configured(("file", disk))
    before = open_descriptors()

    first, second = (plugin.open("", False, CLIENT) for _ in range(2))

    assert isinstance(first, FileHandle)
    assert isinstance(second, FileHandle)
    assert first.fd != second.fd
    assert os.get_blocking(first.fd)
    assert not os.get_inheritable(first.fd)
    first.close()
    second.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("readonly", [False, True])
def test_readonly_opens_the_file_for_reading_only(readonly: bool, disk: Path) -> None:
    handle = configured(("file", disk)).open("", readonly, CLIENT)

    assert isinstance(handle, FileHandle)
    assert handle.can_write() is not readonly
    access = fcntl.fcntl(handle.fd, fcntl.F_GETFL) & os.O_ACCMODE
    assert access == (os.O_RDONLY if readonly else os.O_RDWR)
    handle.close()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY])
def test_a_file_that_may_not_be_written_is_served_readonly(
    code: int, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = configured(("file", disk))
    real = os.open

    def refusing(path: str, flags: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(code, os.strerror(code))
        return real(path, flags)

    monkeypatch.setattr(os, "open", refusing)
    handle = plugin.open("", False, CLIENT)

    assert not handle.can_write()
    assert bytes(handle.pread(2, 0)) == b"\0\1"
    handle.flush()
    handle.close()


def test_other_errors_of_opening_are_not_hidden(disk: Path) -> None:
    plugin = configured(("file", disk))
    disk.unlink()

    with pytest.raises(FileNotFoundError):
        plugin.open("", False, CLIENT)


@pytest.mark.parametrize("readonly", [False, True])
def test_F3_F4_a_pipe_that_took_the_place_of_the_file_is_refused_without_waiting(readonly: bool, disk: Path) -> None:
    plugin = configured(("file", disk))
    disk.unlink()
    os.mkfifo(disk)
    before = open_descriptors()

    with pytest.raises(OSError, match="a pipe cannot be served") as caught:
        plugin.open("", readonly, CLIENT)

    assert caught.value.errno == errno.EINVAL
    assert open_descriptors() == before


def test_a_descriptor_is_served_and_stays_open(disk: Path, descriptor: Callable[..., int]) -> None:
    fd = descriptor(disk)
    disk.unlink()  # so that it cannot be opened by name
    plugin = configured(("fd", fd))

    first, second = (plugin.open("", False, CLIENT) for _ in range(2))
    first.pwrite(memoryview(b"written"), 100, 0)
    first.close()

    assert second.can_write()
    assert bytes(second.pread(7, 100)) == b"written"
    second.close()
    assert os.fstat(fd).st_size == 16384


def test_a_descriptor_for_reading_is_served_readonly(disk: Path, descriptor: Callable[..., int]) -> None:
    plugin = configured(("fd", descriptor(disk, os.O_RDONLY)))

    handle = plugin.open("", False, CLIENT)

    assert not handle.can_write()
    handle.close()


def test_readonly_of_a_descriptor_for_writing_does_not_write(disk: Path, descriptor: Callable[..., int]) -> None:
    handle = configured(("fd", descriptor(disk))).open("", True, CLIENT)

    assert not handle.can_write()
    handle.close()


def test_fadvise_is_told_to_the_kernel_at_open(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, count, advice: told.append((offset, count, advice)))

    for pattern in ("normal", "random", "sequential"):
        configured(("file", disk), ("fadvise", pattern)).open("", False, CLIENT).close()

    assert told == [(0, 0, os.POSIX_FADV_RANDOM), (0, 0, os.POSIX_FADV_SEQUENTIAL)]


@pytest.mark.parametrize(
    ("key", "value", "drops"),
    [
        ("cache", "none", True),
        ("cache", "default", False),
        ("reduce-memory-pressure", "true", True),
        ("reduce-memory-pressure", "false", False),
    ],
)
def test_cache_none_under_both_its_names_drops_behind(key: str, value: str, drops: bool, disk: Path) -> None:
    handle = configured(("file", disk), (key, value)).open("", False, CLIENT)

    assert isinstance(handle, DropBehindHandle) is drops
    handle.close()


# --- in a stack ---


def stack_on(*parameters: tuple[str, object]) -> Stack:
    stack = Stack(FilePlugin(), [], NoServer())
    for key, value in parameters:
        stack.config(key, str(value))
    stack.config_complete()
    stack.get_ready()
    return stack


def test_capabilities_of_a_writable_file(disk: Path) -> None:
    export = stack_on(("file", disk)).open("", False, CLIENT)

    snapshot = export.capabilities
    assert snapshot.size == 16384
    assert (snapshot.can_write, snapshot.can_trim, snapshot.can_flush) == (True, True, True)
    assert (snapshot.can_zero, snapshot.can_fua, snapshot.can_cache) == (Support.NATIVE,) * 3
    assert (snapshot.can_fast_zero, snapshot.can_multi_conn, snapshot.is_rotational) == (True, True, False)
    assert export.handle.inline == {"pwrite", "extents"}
    export.close()


def test_capabilities_of_a_readonly_file(disk: Path) -> None:
    export = stack_on(("file", disk)).open("", True, CLIENT)

    snapshot = export.capabilities
    assert (snapshot.can_write, snapshot.can_trim, snapshot.can_zero) == (False, False, Support.NONE)
    assert (snapshot.can_flush, snapshot.can_multi_conn) == (True, True)
    with pytest.raises(OSError, match="Bad file descriptor"):  # if anything let a write pass, the kernel would not
        export.handle.pwrite(memoryview(b"x"), 0, 0)
    export.close()
    assert disk.read_bytes() == bytes(range(256)) * 64


def test_the_core_writes_zeroes_where_the_file_system_has_no_way(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(fd: int, offset: int, count: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    for name in ("punch_hole", "zero_range", "allocate"):
        monkeypatch.setattr(f"nbdkitpy_plugins.file.linux.{name}", unsupported)
    export = stack_on(("file", disk)).open("", False, CLIENT)

    export.handle.zero(1000, 100, Flags.MAY_TRIM)
    with pytest.raises(OSError, match="no better way"):
        export.handle.zero(1000, 5000, Flags.FAST_ZERO)

    whole = bytes(range(256)) * 64
    assert disk.read_bytes() == whole[:100] + bytes(1000) + whole[1100:]
    export.close()


def test_a_write_on_one_connection_is_read_and_flushed_on_another(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append((os.fstat(fd).st_dev, os.fstat(fd).st_ino)))
    stack = stack_on(("file", disk))
    first, second = (stack.open("", False, CLIENT) for _ in range(2))

    first.handle.pwrite(memoryview(b"from the first"), 4096, 0)
    second.handle.flush()

    assert bytes(second.handle.pread(14, 4096)) == b"from the first"
    assert synced == [(disk.stat().st_dev, disk.stat().st_ino)]
    first.close()
    second.close()


def test_kinds_are_named() -> None:
    assert file_module._kind(stat.S_IFBLK) == "a block device"
    assert file_module._kind(0) == "something else"

"""The file plugin with dir= and dirfd=: names, symbolic links, special files, lists."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client
from nbdkitpy_plugins.file import FilePlugin, linux

CLIENT = Client(1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory to be served, and secrets around it."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "served-not").mkdir()
    (tmp_path / "served-not" / "secret").write_bytes(b"secret")
    directory = tmp_path / "served"
    (directory / "sub").mkdir(parents=True)
    (directory / "sub" / "inner").write_bytes(b"inner")
    (directory / "disk").write_bytes(b"disk")
    (directory / "ünïcode name").write_bytes(b"unicode")
    return directory


@pytest.fixture(params=["openat2", "O_NOFOLLOW"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, root: Path) -> str:
    """How the kernel keeps names within the directory."""
    if request.param == "O_NOFOLLOW":
        monkeypatch.setattr(linux, "has_openat2", lambda directory: False)
        return "O_NOFOLLOW"
    fd = os.open(root, os.O_RDONLY)
    has = linux.has_openat2(fd)
    os.close(fd)
    if not has:
        pytest.skip("this kernel or sandbox has no openat2")
    return "openat2"


@pytest.fixture(params=["dir", "dirfd"])
def plugin(request: pytest.FixtureRequest, root: Path, way: str) -> Iterator[FilePlugin]:
    fd = os.open(root, os.O_RDONLY)
    plugin = FilePlugin()
    plugin.config(request.param, str(root if request.param == "dir" else fd))
    plugin.config_complete()
    plugin.get_ready()
    os.close(fd)  # the plugin has one of its own
    yield plugin
    plugin.unload()


def names(plugin: FilePlugin) -> list[str]:
    return [export.name for export in plugin.list_exports(CLIENT, False)]


def content(plugin: FilePlugin, export_name: str, readonly: bool = False) -> bytes:
    handle = plugin.open(export_name, readonly, CLIENT)
    try:
        return bytes(handle.pread(handle.get_size(), 0))
    finally:
        handle.close()


def refused(plugin: FilePlugin, export_name: str, readonly: bool = False) -> int:
    """Return the error with which a name is refused, having looked that no descriptor is left open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"\w") as caught:
        plugin.open(export_name, readonly, CLIENT)
    assert os.listdir("/proc/self/fd") == before
    assert caught.value.errno is not None
    return caught.value.errno


def test_files_are_served_by_name(plugin: FilePlugin) -> None:
    assert content(plugin, "disk") == b"disk"
    assert content(plugin, "ünïcode name") == b"unicode"


def test_files_may_come_and_go(plugin: FilePlugin, root: Path) -> None:
    assert refused(plugin, "new") == errno.ENOENT

    (root / "new").write_bytes(b"new")
    assert content(plugin, "new") == b"new"

    (root / "new").unlink()
    assert refused(plugin, "new") == errno.ENOENT


def test_a_write_reaches_the_file_that_was_named(plugin: FilePlugin, root: Path) -> None:
    handle = plugin.open("disk", False, CLIENT)

    handle.pwrite(memoryview(b"D"), 0, 0)
    handle.close()

    assert (root / "disk").read_bytes() == b"Disk"


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "//",
        "./",
        "../",
        "./disk",
        "disk/",
        "/disk",
        "../secret",
        "../served/disk",
        "../served-not/secret",
        "sub/inner",
        "sub/../disk",
        "sub/../../secret",
        "/etc/passwd",
        "//etc/passwd",
        "disk\0",
        "\0",
        "disk\0/../secret",
        "\udcff",
        "disk\udc00",
    ],
)
def test_F1_a_name_that_is_no_file_name_does_not_exist(name: str, readonly: bool, plugin: FilePlugin) -> None:
    assert refused(plugin, name, readonly) == errno.ENOENT


@pytest.mark.parametrize("way", ["openat2"], indirect=True)
@pytest.mark.parametrize("name", ["../secret", "../served/disk", "/etc/passwd", "sub/../../secret"])
def test_F1_the_kernel_keeps_the_border_by_itself(
    name: str, plugin: FilePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdkitpy_plugins.file.directory._component", str.encode)

    assert refused(plugin, name) == errno.EXDEV


@pytest.mark.parametrize(
    "name",
    [
        "%2e%2e%2fsecret",
        "..\\secret",
        "...",
        "~",
        "$HOME",
        "-",
        "disk ",
        "DISK",
        "a" * 255,
        "disk\n",
        "..;",
        "．．／secret",
    ],
)
def test_F1_a_name_means_only_itself(name: str, plugin: FilePlugin, root: Path) -> None:
    assert refused(plugin, name) == errno.ENOENT

    (root / name).write_bytes(b"itself")
    assert content(plugin, name) == b"itself"
    assert name in names(plugin)


def test_a_name_that_is_too_long_is_an_error(plugin: FilePlugin) -> None:
    assert refused(plugin, "x" * 4096) == errno.ENAMETOOLONG


def test_the_default_export_is_refused(plugin: FilePlugin) -> None:
    assert plugin.default_export(CLIENT, False) == ""
    assert refused(plugin, "") == errno.ENOENT


# --- symbolic links ---


@pytest.mark.parametrize("target", ["disk", "./disk", "sub/inner", "sub/../disk", "chain"])
def test_F2_a_link_within_the_directory_is_followed_where_the_kernel_keeps_the_border(
    target: str, plugin: FilePlugin, root: Path, way: str
) -> None:
    (root / "chain").symlink_to("disk")
    (root / "link").symlink_to(target)

    if way == "openat2":
        assert content(plugin, "link") == (b"inner" if "inner" in target else b"disk")
        assert "link" in names(plugin)
    else:
        assert refused(plugin, "link") == errno.ELOOP
        assert "link" not in names(plugin)


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    "target",
    [
        "../secret",
        "../served-not/secret",
        "sub/../../secret",
        "../served/disk",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/exe",
        "/proc/self/cwd",
        "{root}/disk",
        "{root}/../secret",
        "link",
        "ring",
        "nowhere",
        "sub",
        ".",
        "up/secret",
        "",
    ],
)
def test_F2_a_link_that_leads_out_or_nowhere_is_refused_and_not_listed(
    target: str, readonly: bool, plugin: FilePlugin, root: Path
) -> None:
    (root / "up").symlink_to("..")
    (root / "ring").symlink_to("link")
    if target:
        (root / "link").symlink_to(target.format(root=root))

    refused(plugin, "link", readonly)

    assert names(plugin) == ["disk", "ünïcode name"]


def test_F4_a_name_that_is_swapped_all_the_time_never_gives_what_lies_outside(plugin: FilePlugin, root: Path) -> None:
    (root / "out").symlink_to("../secret")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for source in ("disk", "out"):
                os.link(root / source, root / "new", follow_symlinks=False)
                (root / "new").rename(root / "swapped")
                # Renaming one name of a file to another name of the same file does nothing.
                (root / "new").unlink(missing_ok=True)

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen: set[bytes | int | None] = set()
    try:
        for _ in range(20_000):
            try:
                seen.add(content(plugin, "swapped"))
            except OSError as error:
                seen.add(error.errno)
            if seen & {errno.EXDEV, errno.ELOOP} and b"disk" in seen:
                break
        for _ in range(200):
            with contextlib.suppress(OSError):
                seen.add(content(plugin, "swapped"))
    finally:
        stop.set()
        swapping.join()

    assert b"disk" in seen
    assert b"secret" not in seen
    assert seen <= {b"disk", errno.ENOENT, errno.EXDEV, errno.ELOOP, errno.EAGAIN}


def test_F4_what_a_name_leads_to_is_looked_up_once_and_all_else_is_asked_of_the_descriptor(
    plugin: FilePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            opened.append(args)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", noted(os.open))
        patched.setattr(linux, "open_beneath", noted(linux.open_beneath))
        for name in ("stat", "lstat", "access", "readlink", "scandir", "listdir"):
            patched.setattr(os, name, noted(getattr(os, name)))
        found = content(plugin, "disk")

    assert found == b"disk"
    assert len(opened) == 1, opened


# --- special files ---


@pytest.mark.parametrize("readonly", [False, True])
def test_F3_special_files_are_refused_at_once_and_not_listed(plugin: FilePlugin, root: Path, readonly: bool) -> None:
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket"))

        for name in ("pipe", "socket", "sub"):
            assert refused(plugin, name, readonly) in {errno.EINVAL, errno.ENXIO, errno.EISDIR}

    assert names(plugin) == ["disk", "ünïcode name"]


def test_F3_a_character_device_is_refused_and_not_listed(plugin: FilePlugin, root: Path) -> None:
    try:
        os.mknod(root / "zero", 0o20600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("needs the right to make device nodes")

    assert refused(plugin, "zero") in {errno.EINVAL, errno.EACCES}  # EACCES: mounted nodev
    assert "zero" not in names(plugin)


def test_a_block_device_is_listed(plugin: FilePlugin, root: Path) -> None:
    try:
        os.mknod(root / "sda", 0o60600, os.makedev(8, 0))
    except PermissionError:
        pytest.skip("needs the right to make device nodes")

    assert "sda" in names(plugin)


def test_F6_names_that_are_not_utf8_are_not_listed(plugin: FilePlugin, root: Path) -> None:
    try:
        (root / os.fsdecode(b"\xff\xfe")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")

    assert names(plugin) == ["disk", "ünïcode name"]


def test_lists_at_the_same_time_do_not_disturb_each_other(plugin: FilePlugin, root: Path) -> None:
    for number in range(300):
        (root / f"file{number:03}").touch()
    results: list[list[str]] = []
    threads = [threading.Thread(target=lambda: results.append(names(plugin))) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [len(result) for result in results] == [302] * 8
    assert all(result == sorted(result) for result in results)


def test_F4_the_directory_is_held_even_if_another_takes_its_name(plugin: FilePlugin, root: Path) -> None:
    root.rename(root.with_name("moved"))
    root.mkdir()
    (root / "disk").write_bytes(b"another")

    assert content(plugin, "disk") == b"disk"


def test_unload_closes_the_directory(root: Path) -> None:
    before = os.listdir("/proc/self/fd")
    plugin = FilePlugin()
    plugin.config("dir", str(root))
    plugin.config_complete()
    plugin.get_ready()

    plugin.unload()

    assert os.listdir("/proc/self/fd") == before


def test_without_the_system_call_there_is_no_openat2(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(directory: int, path: bytes, flags: int) -> int:
        raise OSError(errno.EPERM, "as a sandbox does")

    monkeypatch.setattr(linux, "open_beneath", refusing)

    assert not linux.has_openat2(3)

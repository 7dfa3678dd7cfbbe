"""The pidfile: written whole or not at all, never through a link, and removed only if it is ours."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.server.pidfile import Pidfile


def test_P3_pidfile_replaces_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    path.write_text("12345678901234567890")
    before = os.umask(0o022)
    try:
        Pidfile(str(path)).write()
    finally:
        os.umask(before)

    assert path.read_text() == f"{os.getpid()}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("target", ["victim", "dangling"])
def test_P3_pidfile_does_not_follow_a_symbolic_link(tmp_path: Path, target: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "pid"
    path.symlink_to(target)
    pidfile = Pidfile(str(path))

    with pytest.raises(ConfigError, match="must be a regular file or not exist; it is a symbolic link"):
        pidfile.write()
    pidfile.remove()

    assert victim.read_text() == "precious"
    assert path.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pid", "victim"]


def test_pidfile_does_not_replace_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is something else"):
        Pidfile(str(tmp_path)).write()


def test_pidfile_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--pidfile: cannot write .*/none/pid: No such file or directory"):
        Pidfile(str(tmp_path / "none" / "pid")).write()


def test_P3_pidfile_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "rename", refuse)

    with pytest.raises(ConfigError, match="Operation not permitted"):
        Pidfile(str(tmp_path / "pid")).write()

    assert list(tmp_path.iterdir()) == []


def test_P3_pidfile_of_another_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    pidfile = Pidfile(str(path))
    pidfile.write()
    other = tmp_path / "other"
    other.write_text("1\n")
    os.rename(other, path)

    pidfile.remove()

    assert path.read_text() == "1\n"


def test_pidfile_that_somebody_removed_is_no_error(tmp_path: Path) -> None:
    pidfile = Pidfile(str(tmp_path / "pid"))
    pidfile.write()
    os.unlink(tmp_path / "pid")

    pidfile.remove()

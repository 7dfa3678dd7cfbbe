"""Users, groups, locked memory and labels: what is given up is gone for good, and what cannot be is an error."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.server import linux, privileges
from nbdkitpy.server.privileges import Identity, become, find_identity, lock_memory, socket_label

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

NOBODY = pwd.getpwnam("nobody")

#: A number that no user and no group has.
FREE = next(number for number in range(54321, 65000) if number not in {entry.pw_uid for entry in pwd.getpwall()})


@pytest.fixture(autouse=True)
def _is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


# --- who is meant ---


def test_nothing_changes_unless_asked_for() -> None:
    assert find_identity(None, None) is None


def test_user_by_name_brings_his_group() -> None:
    assert find_identity("nobody", None) == Identity(NOBODY.pw_uid, NOBODY.pw_gid)


def test_user_by_number_brings_his_group() -> None:
    assert find_identity(str(NOBODY.pw_uid), None) == Identity(NOBODY.pw_uid, NOBODY.pw_gid)


def test_group_is_by_name_or_number() -> None:
    group = grp.getgrall()[-1]

    assert find_identity("nobody", group.gr_name) == Identity(NOBODY.pw_uid, group.gr_gid)
    assert find_identity("nobody", str(group.gr_gid)) == Identity(NOBODY.pw_uid, group.gr_gid)


def test_group_alone_leaves_the_user() -> None:
    assert find_identity(None, "0") == Identity(None, 0)


def test_name_that_is_a_number_is_a_name_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pwd, "getpwnam", lambda name: NOBODY)

    assert find_identity("12", None) == Identity(NOBODY.pw_uid, NOBODY.pw_gid)


def test_number_that_is_no_users_needs_a_group() -> None:
    assert find_identity(str(FREE), "7") == Identity(FREE, 7)
    with pytest.raises(ConfigError, match=rf"--user: {FREE} is not in the user database: say by --group"):
        find_identity(str(FREE), None)


@pytest.mark.parametrize(
    "text", ["", "no such", "-1", "-0", "+1", "1x", "0x0", "１", " 1", "a\0b", "4294967295", "4294967296", "9" * 5000]
)
def test_P1_what_nobody_is_called_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--user must be the name of a user, or a number from 0 to 4294967294, not"):
        find_identity(text, None)
    with pytest.raises(ConfigError, match="--group must be the name of a group, or a number from 0 to 4294967294, not"):
        find_identity("nobody", text)


@pytest.mark.parametrize(("user", "group", "option"), [("nobody", None, "user"), (None, "0", "group")])
def test_only_root_can_change(
    monkeypatch: pytest.MonkeyPatch, user: str | None, group: str | None, option: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(ConfigError, match=f"--{option}: only root can change it; this process has the user id 1000"):
        find_identity(user, group)


def test_other_systems_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "plan9")

    with pytest.raises(ConfigError, match="--user is for Linux only; this system is plan9"):
        find_identity("nobody", None)


# --- becoming another ---


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import os\nfrom nbdkitpy.server.privileges import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


@needs_root
def test_P1_user_is_another_in_every_respect_and_for_good() -> None:
    code = f"""
os.setgroups([0, 1, 2])
become(Identity({NOBODY.pw_uid}, {NOBODY.pw_gid}))
for name in ("uid", "gid"):
    for number in (0, 1):
        try:
            getattr(os, "setres" + name)(number, -1, -1)
        except PermissionError:
            continue
        print(name, "can be changed")
print(open("/proc/self/status").read())
"""

    done = in_a_process(code)

    lines = [line.split() for line in done.stdout.splitlines()]
    status = {line[0]: line[1:] for line in lines if line}
    uid, gid = str(NOBODY.pw_uid), str(NOBODY.pw_gid)
    assert status["Uid:"] == [uid] * 4, done
    assert status["Gid:"] == [gid] * 4
    assert status["Groups:"] == [gid]
    assert status["NoNewPrivs:"] == ["1"]
    assert {status[name][0] for name in ("CapPrm:", "CapEff:", "CapAmb:")} == {"0" * 16}
    assert "can be changed" not in done.stdout


@needs_root
def test_group_alone_keeps_root() -> None:
    done = in_a_process("become(Identity(None, 2)); print(os.getresuid(), os.getresgid(), os.getgroups())")

    assert done.stdout == "(0, 0, 0) (2, 2, 2) [2]\n"


@needs_root
def test_P1_capabilities_that_would_survive_are_an_error() -> None:
    keep_them = "import ctypes; ctypes.CDLL(None).prctl(8, 1, 0, 0, 0)"  # PR_SET_KEEPCAPS

    done = in_a_process(f"{keep_them}\nbecome(Identity({NOBODY.pw_uid}, {NOBODY.pw_gid}))")

    assert "ConfigError: cannot become user " in done.stderr
    assert "are left" in done.stderr


class FakeSystem:
    """Users and groups of this process as the kernel keeps them, or as it does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uids = (0, 0, 0)
        self.gids = (0, 0, 0)
        self.groups = [0, 1, 2]
        self.grants: set[str] = set()
        self.status = "Name:\tx\n\nCapPrm:\t0\nCapEff:\t0\nCapBnd:\tf\nCapAmb:\t0\n"
        for name in ("setgroups", "setresuid", "setresgid", "getgroups", "getresuid", "getresgid", "setuid", "setgid"):
            monkeypatch.setattr(os, name, getattr(self, name))
        monkeypatch.setattr(linux, "forbid_new_privileges", lambda: None)

    def setgroups(self, groups: list[int]) -> None:
        self.groups = groups

    def setresuid(self, *uids: int) -> None:
        self.uids = uids  # type: ignore[assignment]

    def setresgid(self, *gids: int) -> None:
        self.gids = gids  # type: ignore[assignment]

    def getgroups(self) -> list[int]:
        return self.groups

    def getresuid(self) -> tuple[int, int, int]:
        return self.uids

    def getresgid(self) -> tuple[int, int, int]:
        return self.gids

    def setuid(self, uid: int) -> None:
        self._change("setuid")

    def setgid(self, gid: int) -> None:
        self._change("setgid")

    def _change(self, name: str) -> None:
        if name not in self.grants:
            raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSystem:
    system = FakeSystem(monkeypatch)
    monkeypatch.setattr(privileges, "_STATUS", str(tmp_path / "status"))
    (tmp_path / "status").write_text(system.status)
    return system


def do_nothing(*_: object) -> None:
    """Stand in for a call of the system that has no effect."""


def test_change_that_works_is_no_error(system: FakeSystem) -> None:
    become(Identity(5, 6))

    assert (system.uids, system.gids, system.groups) == ((5, 5, 5), (6, 6, 6), [6])


@pytest.mark.parametrize(
    ("call", "flaw"),
    [
        ("setgroups", r"the groups are now \(6, 6, 6\) and \[0, 1, 2\]"),
        ("setresgid", r"the groups are now \(0, 0, 0\) and \[6\]"),
        ("setresuid", r"the users are now \(0, 0, 0\)"),
    ],
)
def test_P1_change_without_effect_is_an_error(
    system: FakeSystem, monkeypatch: pytest.MonkeyPatch, call: str, flaw: str
) -> None:
    monkeypatch.setattr(os, call, do_nothing)

    with pytest.raises(ConfigError, match=f"cannot become user 5, group 6: {flaw}"):
        become(Identity(5, 6))


@pytest.mark.parametrize("call", ["setuid", "setgid"])
def test_P1_change_that_can_be_undone_is_an_error(system: FakeSystem, call: str) -> None:
    system.grants = {call}

    with pytest.raises(ConfigError, match="cannot become user 5, group 6: it can be undone"):
        become(Identity(5, 6))


@pytest.mark.parametrize("kind", ["CapPrm", "CapEff", "CapAmb"])
def test_P1_capability_that_is_left_is_an_error(system: FakeSystem, tmp_path: Path, kind: str) -> None:
    (tmp_path / "status").write_text(system.status.replace(f"{kind}:\t0", f"{kind}:\t80"))

    with pytest.raises(ConfigError, match="cannot become user 5, group 6: the capabilities 0x80 are left"):
        become(Identity(5, 6))


def test_capabilities_that_cannot_be_seen_are_an_error(system: FakeSystem, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("CapEff:\t0\n")

    with pytest.raises(ConfigError, match="cannot tell which capabilities are left"):
        become(Identity(5, 6))


def test_change_to_root_has_nothing_to_lose(system: FakeSystem) -> None:
    system.grants = {"setuid", "setgid"}

    become(Identity(0, 0))

    assert (system.uids, system.groups) == ((0, 0, 0), [0])


def test_group_of_root_can_be_kept(system: FakeSystem) -> None:
    system.grants = {"setgid"}

    become(Identity(5, 0))

    assert (system.uids, system.gids) == ((5, 5, 5), (0, 0, 0))


def test_system_that_refuses_is_an_error(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)

    with pytest.raises(ConfigError, match="cannot become group 6: Operation not permitted"):
        become(Identity(None, 6))


@pytest.mark.parametrize(("readable", "warnings"), [(True, 0), (False, 1)])
def test_user_who_cannot_read_python_is_warned_of(
    system: FakeSystem,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    readable: bool,
    warnings: int,
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: readable)

    become(Identity(5, 6))

    assert [record.getMessage() for record in caplog.records] == [
        f"user 5, group 6 cannot read {os.__file__}: what is imported from now on may not be found"
    ] * warnings


# --- memory ---


def test_memory_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(linux, "lock_memory", lambda: calls.append("locked"))

    lock_memory()

    assert calls == ["locked"]


@pytest.mark.parametrize(
    ("limit", "text"),
    [(64 << 10, r": Cannot allocate memory; the limit \(ulimit -l\) is 64 KiB"), (-1, ": Cannot allocate memory$")],
)
def test_memory_that_cannot_be_locked_is_an_error(monkeypatch: pytest.MonkeyPatch, limit: int, text: str) -> None:
    def refuse() -> NoReturn:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(linux, "lock_memory", refuse)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))

    with pytest.raises(ConfigError, match=f"--swap: cannot lock the memory of this process{text}"):
        lock_memory()


@pytest.mark.parametrize(
    ("is_allowed", "limit"),
    [
        (lambda soft: True, resource.RLIM_INFINITY),
        (lambda soft: soft != resource.RLIM_INFINITY, 4096),
        (lambda soft: False, None),
    ],
)
def test_limit_is_raised_as_far_as_possible(
    monkeypatch: pytest.MonkeyPatch, is_allowed: Callable[[int], bool], limit: int | None
) -> None:
    limits: list[tuple[int, int]] = []

    def set_limit(which: int, values: tuple[int, int]) -> None:
        if not is_allowed(values[0]):
            raise ValueError("not allowed to raise maximum limit")
        limits.append(values)

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", set_limit)

    privileges.allow_locking()

    assert limits == ([] if limit is None else [(limit, limit)])


# --- labels ---


@pytest.fixture
def selinux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A system with SELinux; the label of new sockets is in the file that this returns."""
    attribute = tmp_path / "sockcreate"
    attribute.touch()
    (tmp_path / "enforce").touch()
    monkeypatch.setattr(privileges, "_SELINUX", str(tmp_path))
    monkeypatch.setattr(privileges, "_SOCKET_LABEL", str(attribute))
    return attribute


def test_label_is_set_meanwhile_only(selinux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda fd, data: labels.append(data))

    with socket_label("system_u:object_r:svirt_t:s0"):
        assert labels == [b"system_u:object_r:svirt_t:s0"]
    assert labels[1:] == [b""]


def test_label_is_taken_back_after_a_failure(selinux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda fd, data: labels.append(data))

    with pytest.raises(ConfigError, match="port taken"), socket_label("x_t"):
        raise ConfigError("port taken")

    assert labels == [b"x_t", b""]


def test_label_is_written_for_the_kernel(selinux: Path) -> None:
    with socket_label("x_t"):
        assert selinux.read_bytes() == b"x_t"


def test_label_that_selinux_does_not_know_is_an_error(selinux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: bytes) -> NoReturn:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "write", refuse)

    with pytest.raises(ConfigError, match="--selinux-label: SELinux does not accept 'x': Invalid argument"):
        socket_label("x").__enter__()


def test_system_without_selinux_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(privileges, "_SELINUX", str(tmp_path / "none"))

    with pytest.raises(ConfigError, match=r"--selinux-label: this system has no SELinux \(.*/none is not there\)"):
        socket_label("x_t").__enter__()


def test_label_must_not_be_empty() -> None:
    with pytest.raises(ConfigError, match="--selinux-label must be a label"):
        socket_label("").__enter__()


def test_without_a_label_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "_SELINUX", "/nonexistent")

    with socket_label(None):
        pass

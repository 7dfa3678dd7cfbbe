"""What this process may do: its user and groups, memory that is not swapped out, the label of its sockets."""

from __future__ import annotations

import contextlib
import grp
import logging
import os
import pwd
import resource
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server import linux

__all__ = ["Identity", "allow_locking", "become", "find_identity", "lock_memory", "socket_label"]

_logger = logging.getLogger("nbdkitpy")

_MAX_ID = (1 << 32) - 2  # one more means "leave it as it is" to the system

#: Sets of capabilities by which a process can do something, or get to it by itself or by executing a program.
_CAPABILITIES = ("CapPrm:", "CapEff:", "CapAmb:")

_STATUS = "/proc/self/status"
_SELINUX = "/sys/fs/selinux"
_SOCKET_LABEL = "/proc/thread-self/attr/sockcreate"


class Identity(NamedTuple):
    """Whom the server runs as."""

    uid: int | None  #: None is as it is
    gid: int


# --- users and groups ---


def find_identity(user: str | None, group: str | None) -> Identity | None:
    """Return what `user` and `group` stand for, names or numbers; None if neither is given.

    Without `group` it is the user's primary one.

    Raises:
        ConfigError: one of them is unknown, or this process may not change them.
    """
    if user is None and group is None:
        return None
    linux.require("--user" if group is None else "--group")
    found = None if user is None else _find_user(user)
    if group is not None:
        gid = _find_group(group)
    elif found is None or found[1] is None:
        raise ConfigError(f"--user: {user} is not in the user database: say by --group which group is meant")
    else:
        gid = found[1]
    if os.geteuid() != 0:
        option = "--group" if user is None else "--user"
        raise ConfigError(f"{option}: only root can change it; this process has the user id {os.geteuid()}")
    return Identity(None if found is None else found[0], gid)


def _find_user(text: str) -> tuple[int, int | None]:
    """Return the ids of a user and of his group."""
    with contextlib.suppress(KeyError, ValueError):
        entry = pwd.getpwnam(text)
        return entry.pw_uid, entry.pw_gid
    uid = _number("--user", "user", text)
    try:
        return uid, pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid, None


def _find_group(text: str) -> int:
    with contextlib.suppress(KeyError, ValueError):
        return grp.getgrnam(text).gr_gid
    return _number("--group", "group", text)


def _number(option: str, kind: str, text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 10 and int(text) <= _MAX_ID:
        return int(text)
    raise ConfigError(f"{option} must be the name of a {kind}, or a number from 0 to {_MAX_ID}, not {text!r}")


def become(identity: Identity) -> None:
    """Become another user, and be in no group but his, for good; see that it is so.

    Only the thread that calls this is sure to change in every respect: there should be no other.

    Raises:
        ConfigError: the system does not let us, or something of what we were is left. Then the process must end.
    """
    uid, gid = identity
    try:
        linux.forbid_new_privileges()
        os.setgroups([gid])
        os.setresgid(gid, gid, gid)
        if uid is not None:
            os.setresuid(uid, uid, uid)
        flaw = _flaw(identity)
    except OSError as error:
        raise ConfigError(f"cannot become {_described(identity)}: {error.strerror}") from error
    if flaw is not None:
        raise ConfigError(f"cannot become {_described(identity)}: {flaw}")
    _warn_of_unreadable_modules(identity)


def _warn_of_unreadable_modules(identity: Identity) -> None:
    # Installed in root's home, say. What is imported only when it is needed would be an error that nobody understands.
    for path in (os.__file__, __file__):
        if not os.access(path, os.R_OK):
            _logger.warning(
                "%s cannot read %s: what is imported from now on may not be found", _described(identity), path
            )
            return


def _described(identity: Identity) -> str:
    user = "" if identity.uid is None else f"user {identity.uid}, "
    return f"{user}group {identity.gid}"


def _flaw(identity: Identity) -> str | None:
    """What of the former privileges is left."""
    uid, gid = identity
    if os.getresgid() != (gid, gid, gid) or os.getgroups() != [gid]:
        return f"the groups are now {os.getresgid()} and {os.getgroups()}"
    if uid is None:
        return None
    if os.getresuid() != (uid, uid, uid):
        return f"the users are now {os.getresuid()}"
    return _way_back(gid) if uid else None


def _way_back(gid: int) -> str | None:
    if capabilities := _capabilities():
        return f"the capabilities {capabilities:#x} are left"
    if _is_granted(os.setuid) or (gid and _is_granted(os.setgid)):
        return "it can be undone"
    return None


def _capabilities() -> int:
    with open(_STATUS, encoding="utf-8", errors="replace") as lines:
        fields = [line.split() for line in lines]
    found = [int(field[1], 16) for field in fields if field and field[0] in _CAPABILITIES]
    if len(found) != len(_CAPABILITIES):
        raise ConfigError(f"cannot tell which capabilities are left: {_STATUS} does not say it")
    return found[0] | found[1] | found[2]


def _is_granted(become_root: Callable[[int], None]) -> bool:
    try:
        become_root(0)
    except PermissionError:
        return False
    return True


# --- memory ---


def allow_locking() -> None:
    """Raise the limit on locked memory as far as possible: what root may do, the user that we become may not."""
    for limit in (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
            return


def lock_memory() -> None:
    """Keep the memory of this process, now and later, from being swapped out; a child of it has to do so again.

    Raises:
        ConfigError: the system cannot do it, or does not let us.
    """
    linux.require("--swap")
    try:
        linux.lock_memory()
    except OSError as error:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        known = "" if limit == resource.RLIM_INFINITY else f"; the limit (ulimit -l) is {limit >> 10} KiB"
        raise ConfigError(f"--swap: cannot lock the memory of this process: {error.strerror}{known}") from error


# --- SELinux ---


@contextlib.contextmanager
def socket_label(label: str | None) -> Iterator[None]:
    """Have sockets that this thread makes meanwhile get an SELinux label; nothing happens if it is None.

    Raises:
        ConfigError: this system has no SELinux, or does not accept the label.
    """
    if label is None:
        yield
        return
    if not label:
        raise ConfigError("--selinux-label must be a label, not an empty word")
    if not os.path.exists(f"{_SELINUX}/enforce"):
        raise ConfigError(f"--selinux-label: this system has no SELinux ({_SELINUX} is not there)")
    _set_label(label)
    try:
        yield
    finally:
        _set_label("")


def _set_label(label: str) -> None:
    """Set the label of sockets to be made; "" is that of the policy."""
    data = label.encode(sys.getfilesystemencoding(), "surrogateescape")
    try:
        descriptor = os.open(_SOCKET_LABEL, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"--selinux-label: SELinux does not accept {label!r}: {error.strerror}") from error

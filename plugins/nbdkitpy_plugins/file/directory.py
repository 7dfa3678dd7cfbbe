"""A directory whose regular files and block devices are exports, by name."""

from __future__ import annotations

import errno
import os
import stat

from . import linux

__all__ = ["Directory", "is_servable"]

#: To look at what has a name: to open a device or a pipe would have effects.
_LOOK = getattr(os, "O_PATH", os.O_NONBLOCK)


def is_servable(mode: int) -> bool:
    """Tell whether what has `mode` is a regular file or a block device, the only kinds that can be served."""
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


class Directory:
    """Opens and lists what lies in the directory `fd`, which it closes in the end.

    The kernel holds the border where it can (openat2): symbolic links are followed within the directory only. Where
    it cannot, no symbolic link is followed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._follows_links = linux.has_openat2(fd)

    def open(self, name: str, flags: int) -> int:
        """Open the file called `name`, whatever kind it is of, and return a descriptor.

        Raises:
            OSError: there is none, it leads out of the directory, or the system refuses.
        """
        path = _component(name)
        if self._follows_links:
            return linux.open_beneath(self._fd, path, flags)
        return os.open(path, flags | os.O_NOFOLLOW, dir_fd=self._fd)

    def names(self) -> list[str]:
        """Return the names of what can be served, in order; names that are not UTF-8 cannot be asked for."""
        # The directory is opened anew, since its position, which would be shared with other threads, moves.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            with os.scandir(fd) as entries:
                names = [name for entry in entries if (name := _utf8(entry.name)) and self._is_export(name, entry)]
        finally:
            os.close(fd)
        return sorted(names)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)

    def _is_export(self, name: str, entry: os.DirEntry[str]) -> bool:
        if entry.is_file(follow_symlinks=False):
            return True
        try:
            fd = self.open(name, _LOOK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return is_servable(os.fstat(fd).st_mode)
        finally:
            os.close(fd)


def _utf8(name: str) -> str:
    """Return the name of a file, as the os module spells it, as clients spell it, or "" if they cannot."""
    try:
        return os.fsencode(name).decode()
    except UnicodeDecodeError:
        return ""


def _component(name: str) -> bytes:
    """Return `name` in UTF-8, which is what names of exports are in, if it can be the name of a file."""
    try:
        path = name.encode()
    except UnicodeEncodeError:
        path = b""
    if path in (b"", b".", b"..") or b"/" in path or b"\0" in path:
        raise OSError(errno.ENOENT, "not the name of a file in the directory")
    return path

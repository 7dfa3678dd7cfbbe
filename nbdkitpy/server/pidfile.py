"""A file that says which process the server is."""

from __future__ import annotations

import contextlib
import os
import stat

from nbdkitpy.exceptions import ConfigError

__all__ = ["Pidfile"]


class Pidfile:
    """A file with the number of this process, there while clients can connect."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ours: tuple[int, int, int] | None = None

    def write(self) -> None:
        """Write the file whole or not at all; a regular file of that name is replaced.

        Raises:
            ConfigError: it cannot be written, or there is something that is no regular file. A symbolic link is not
                followed: in a directory that others may write to, it would have us overwrite any file.
        """
        try:
            self._check_place()
            self._write()
        except OSError as error:
            raise ConfigError(f"--pidfile: cannot write {self._path}: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the file if it is the one that we wrote, and if we still may."""
        with contextlib.suppress(OSError):
            if self._ours is not None and self._ours == _identity(os.lstat(self._path)):
                os.unlink(self._path)

    def _check_place(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(self._path).st_mode
            if not stat.S_ISREG(mode):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "something else"
                raise ConfigError(f"--pidfile: {self._path} must be a regular file or not exist; it is {what}")

    def _write(self) -> None:
        temporary = os.path.join(os.path.dirname(self._path), f".nbdkitpy-{os.urandom(8).hex()}.pid")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.write(descriptor, b"%d\n" % os.getpid())
            self._ours = _identity(os.fstat(descriptor))
            os.rename(temporary, self._path)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_mtime_ns  # the time as well, since inode numbers are used again

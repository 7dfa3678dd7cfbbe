"""The file plugin: serves a regular file, a block device, or those in a directory."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterable, Mapping

from nbdkitpy import (
    Client,
    ConfigError,
    Export,
    Handle,
    Parameter,
    Plugin,
    ThreadModel,
    choice,
    hookimpl,
    integer,
    parse_bool,
    parse_filename,
)

from .directory import Directory, is_servable
from .dropbehind import DropBehindHandle
from .handle import BlockDeviceHandle, FileHandle
from .sync import FileSyncs

#: A file that cannot be opened for writing for one of these reasons is served read-only.
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY})

#: With O_NONBLOCK, opening what turns out to be a pipe does not wait for its other end.
_OPEN_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | getattr(os, "O_LARGEFILE", 0)

#: With these, descriptors read and write nothing at all, only what is aligned, or write at the end of the file only.
_REFUSED_FLAGS = {
    getattr(os, "O_PATH", 0): "O_PATH",
    getattr(os, "O_DIRECT", 0): "O_DIRECT",
    os.O_APPEND: "O_APPEND",
}

#: What --dump-plugin says that there is, under the names that nbdkit has for it.
_DUMPED = (
    "blkdiscard",
    "blkrotational",
    "blksszget",
    "blkzeroout",
    "extents",
    "falloc_fl_punch_hole",
    "falloc_fl_zero_range",
)

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFREG: "a regular file",
    stat.S_IFBLK: "a block device",
}

_ADVICE = {"random": "POSIX_FADV_RANDOM", "sequential": "POSIX_FADV_SEQUENTIAL"}  # normal: nothing to say


def parse_file(text: str) -> str:
    """Return the real path of a regular file or block device.

    Raises:
        ValueError: it is something else, or is not there.
    """
    path = parse_filename(text)
    mode = _mode(path)
    if stat.S_ISDIR(mode):
        raise ValueError("a regular file or block device (dir= serves the files in a directory)")
    if not is_servable(mode):
        raise ValueError(f"a regular file or block device (this is {_kind(mode)})")
    return path


def parse_directory(text: str) -> str:
    """Return the real path of a directory.

    Raises:
        ValueError: it is something else, or is not there.
    """
    path = parse_filename(text)
    if not stat.S_ISDIR(mode := _mode(path)):
        raise ValueError(f"a directory (this is {_kind(mode)})")
    return path


def parse_fd(text: str) -> int:
    """Return the number of a descriptor on which a regular file or block device can be read.

    Raises:
        ValueError: it is 0 to 2, is not open, or is open in a mode or on something that cannot be served.
    """
    fd = _parse_fd(text)
    mode = _mode(fd)
    if not is_servable(mode):
        raise ValueError(f"a descriptor of a regular file or block device (this is {_kind(mode)})")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    refused = [name for flag, name in _REFUSED_FLAGS.items() if flags & flag]
    if flags & os.O_ACCMODE == os.O_WRONLY:
        refused.append("O_WRONLY")
    if refused:
        raise ValueError(f"a descriptor open for reading, or reading and writing (this has {' and '.join(refused)})")
    return _ours(fd)


def parse_dirfd(text: str) -> int:
    """Return the number of a descriptor on which a directory is open.

    Raises:
        ValueError: it is 0 to 2, is not open, or is open on something else.
    """
    fd = _parse_fd(text)
    if not stat.S_ISDIR(mode := _mode(fd)):
        raise ValueError(f"a descriptor of a directory (this is {_kind(mode)})")
    return _ours(fd)


_parse_fd = integer(3, (1 << 31) - 1)  # 0 to 2 are the standard streams


def _ours(fd: int) -> int:
    """Keep `fd` from children of the server, and from being closed as the caller's when it goes into the background."""
    os.set_inheritable(fd, False)
    return fd


def _mode(file: str | int) -> int:
    try:
        return os.stat(file).st_mode
    except OSError as error:
        raise ValueError(f"something that can be opened ({error.strerror})") from None


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


class FilePlugin(Plugin):
    """Serves one file or block device, or all that lie in a directory, each under its name."""

    name = "file"
    longname = "file plugin"
    description = "Serve a file or block device, or the files in a directory."
    multi_process = True

    file = Parameter(parse_file, magic=True, metavar="FILENAME", help="Serve this regular file or block device.")
    dir = Parameter(parse_directory, metavar="DIRECTORY", help="Serve the files in this directory by export name.")
    fd = Parameter(parse_fd, metavar="FD", help="Serve what is open on this inherited file descriptor.")
    dirfd = Parameter(parse_dirfd, metavar="FD", help="As dir, for the directory open on this file descriptor.")
    fadvise = Parameter(
        choice("normal", "random", "sequential"),
        default="normal",
        metavar="normal|random|sequential",
        help="How the file is going to be read.",
    )
    cache = Parameter(
        choice("default", "none"),
        default="default",
        metavar="default|none",
        help="With none, what was read or written is not kept in the page cache.",
    )
    reduce_memory_pressure = Parameter(parse_bool, default=False, metavar="BOOL", help="With true, as cache=none.")

    def __init__(self) -> None:
        super().__init__()
        self._syncs = FileSyncs()
        self._directory: Directory | None = None

    def config_complete(self) -> None:
        super().config_complete()
        given = [f"{key}=" for key in ("file", "dir", "fd", "dirfd") if self.parameters[key].is_set(self)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ConfigError(f"file: exactly one of file=, dir=, fd= and dirfd= must be given, not {found}")
        if (self.fadvise in _ADVICE or self._drops_behind) and not hasattr(os, "posix_fadvise"):
            raise ConfigError("file: fadvise=, cache= and reduce-memory-pressure= cannot work on this system")

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def dump(self) -> Mapping[str, str]:
        return {f"file_{name}": "yes" for name in _DUMPED} if sys.platform == "linux" else {}

    def get_ready(self) -> None:
        if self.dirfd is not None:
            self._directory = Directory(os.dup(self.dirfd))
        elif self.dir is not None:
            self._directory = Directory(os.open(self.dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def unload(self) -> None:
        if self._directory is not None:
            self._directory.close()

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        if self._directory is None:
            return super().list_exports(client, readonly)
        return [Export(name) for name in self._directory.names()]

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        fd = os.dup(self.fd) if self.fd is not None else self._open(export_name, readonly)
        try:
            return self._handle(fd, readonly)
        except BaseException:
            os.close(fd)
            raise

    def _open(self, export_name: str, readonly: bool) -> int:
        """Open the file for reading and writing, or only for reading if that is all that is wanted or allowed."""
        if not readonly:
            try:
                return self._open_as(os.O_RDWR, export_name)
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    raise
        return self._open_as(os.O_RDONLY, export_name)

    def _open_as(self, access: int, export_name: str) -> int:
        if self._directory is not None:
            fd = self._directory.open(export_name, access | _OPEN_FLAGS)
        else:
            assert self.file is not None  # config_complete made sure of it
            fd = os.open(self.file, access | _OPEN_FLAGS)
        os.set_blocking(fd, True)
        return fd

    def _handle(self, fd: int, readonly: bool) -> Handle:
        status = os.fstat(fd)
        if not is_servable(status.st_mode):
            raise OSError(errno.EINVAL, f"{_kind(status.st_mode)} cannot be served")
        if self.fadvise in _ADVICE:
            os.posix_fadvise(fd, 0, 0, getattr(os, _ADVICE[self.fadvise]))
        writable = not readonly and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        handle_class = BlockDeviceHandle if stat.S_ISBLK(status.st_mode) else FileHandle
        handle = handle_class(fd, writable, self._syncs.of(status))
        return DropBehindHandle(handle) if self._drops_behind else handle

    @property
    def _drops_behind(self) -> bool:
        return self.cache == "none" or self.reduce_memory_pressure


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Hand over the plugin."""
    register(FilePlugin)

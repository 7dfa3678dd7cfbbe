"""What the file plugin asks of Linux that the os module does not offer.

Each function raises OSError with the system's error number; :data:`UNSUPPORTED` are those that say that the kernel,
the file system or the device does not know the operation, so that it need not be tried again.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import struct
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ctypes

__all__ = [
    "UNSUPPORTED",
    "allocate",
    "discard",
    "has_openat2",
    "is_rotational",
    "open_beneath",
    "punch_hole",
    "sector_size",
    "zero_out",
    "zero_range",
]

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})

# Modes of fallocate (linux/falloc.h).
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

# Block device ioctls (linux/fs.h): all are _IO(0x12, number), which has a bit more on some processors.
_IO = 0x2000_1200 if os.uname().machine.startswith(("ppc", "mips", "sparc")) else 0x1200
_BLKSSZGET = _IO | 104
_BLKDISCARD = _IO | 119
_BLKROTATIONAL = _IO | 126
_BLKZEROOUT = _IO | 127
_RANGE = struct.Struct("=QQ")  # uint64_t offset, length

# openat2 (linux/openat2.h); the number is the same on every architecture that Python runs on.
_SYS_OPENAT2 = 437
_OPEN_HOW = struct.Struct("=QQQ")  # flags, mode, resolve
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08


def punch_hole(fd: int, offset: int, count: int) -> None:
    """Free `count` bytes at `offset`, which then read as zeroes; on a block device, only if that is fast."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, count)


def zero_range(fd: int, offset: int, count: int) -> None:
    """Make `count` bytes at `offset` of a file read as zeroes, and keep them allocated."""
    _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, count)


def allocate(fd: int, offset: int, count: int) -> None:
    """Allocate `count` bytes at `offset` of a file, where they are not; what they read as stays."""
    _fallocate(fd, _KEEP_SIZE, offset, count)


def discard(fd: int, offset: int, count: int) -> None:
    """Tell a block device that sectors are not needed any more."""
    fcntl.ioctl(fd, _BLKDISCARD, _RANGE.pack(offset, count))


def zero_out(fd: int, offset: int, count: int) -> None:
    """Zero sectors of a block device, by writing if it knows no better way, which is slow."""
    fcntl.ioctl(fd, _BLKZEROOUT, _RANGE.pack(offset, count))


def sector_size(fd: int) -> int:
    """Return the logical sector size of a block device in bytes."""
    return int.from_bytes(fcntl.ioctl(fd, _BLKSSZGET, bytes(4)), sys.byteorder)


def is_rotational(fd: int) -> bool:
    """Tell whether a block device is a rotating disk."""
    return any(fcntl.ioctl(fd, _BLKROTATIONAL, bytes(2)))


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open `path` and return a descriptor. Refuse (EXDEV, ELOOP) whatever leads out of `directory`, by symlinks too."""
    import ctypes

    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "openat2 is Linux's own")
    how = _OPEN_HOW.pack(flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    long, size = ctypes.c_long, ctypes.c_size_t
    return _call("syscall", long(_SYS_OPENAT2), long(directory), ctypes.c_char_p(path), how, size(len(how)))


def has_openat2(directory: int) -> bool:
    """Tell whether :func:`open_beneath` works here: an old kernel or a sandbox may not have it."""
    try:
        os.close(open_beneath(directory, b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _fallocate(fd: int, mode: int, offset: int, count: int) -> None:
    import ctypes

    # Where off_t has 32 bits, the function that takes 64 has a name of its own.
    name = "fallocate64" if hasattr(_libc(), "fallocate64") else "fallocate"
    _call(name, fd, mode, ctypes.c_int64(offset), ctypes.c_int64(count))


def _call(name: str, *arguments: object) -> int:
    """Call a function of the C library; again if a signal interrupts it, as Python's own functions do."""
    import ctypes

    function: Callable[..., int] | None = getattr(_libc(), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, f"this system has no {name}")
    while (result := function(*arguments)) == -1:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return result


@functools.cache
def _libc() -> ctypes.CDLL:
    import ctypes  # here, since it takes some milliseconds and many servers never need it

    return ctypes.CDLL(None, use_errno=True)

"""What backends return and raise, looked at before anything is made of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nbdkitpy.backend import Buffer, FileRange
from nbdkitpy.extents import Extent, normalise_extents

if TYPE_CHECKING:
    import threading
    from typing import ParamSpec, TypeVar

    P = ParamSpec("P")
    R = TypeVar("R")

__all__ = ["checked_data", "checked_range", "error_number", "locked", "normalised", "reason"]

#: What the system can take.
_MAX_FD = (1 << 31) - 1
_MAX_POSITION = (1 << 63) - 1


def checked_data(data: object, length: int) -> Buffer:
    """Return `data`, which a backend read, as what can be sent.

    Raises:
        TypeError: it is no buffer, or its bytes do not lie one after the other.
        ValueError: it does not have `length` bytes.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"pread must return bytes, a bytearray or a memoryview, not {type(data).__name__}")
    # Not len(), which a class of the plugin's own may define as it likes.
    view = memoryview(data)
    if view.nbytes != length:
        raise ValueError(f"pread must return {length} bytes, not {view.nbytes}")
    return data if type(data) is bytes else view.cast("B")


def checked_range(found: object) -> FileRange:
    """Return `found`, where a backend says that data lies, so that nothing can be wrong with it but the file.

    Raises:
        TypeError: it is no pair of integers.
        ValueError: they cannot be a file descriptor and a position.
    """
    if type(found) is FileRange and type(found.fd) is type(found.position) is int:
        where = found  # what it nearly always is
    elif not isinstance(found, tuple) or len(found) != 2 or not all(isinstance(number, int) for number in found):
        raise TypeError(f"file_range must return a FileRange or None, not {found!r}")
    else:
        where = FileRange(*found)
    if not (0 <= where.fd <= _MAX_FD and 0 <= where.position <= _MAX_POSITION):
        raise ValueError(f"file_range must return a file descriptor and a position, not {found!r}")
    return where


def normalised(
    verb: Callable[[int, int, int], Iterable[tuple[int, int, int]]],
) -> Callable[[int, int, int], list[Extent]]:
    """Return `verb` so that it returns a list; as a generator it would do its work after it has been called."""
    return lambda count, offset, flags: normalise_extents(verb(count, offset, flags), count, offset)


def locked(verb: Callable[P, R], lock: threading.Lock | None) -> Callable[P, R]:
    """Return `verb`, so that it is called under `lock`."""
    if lock is None:
        return verb

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock:
            return verb(*args, **kwargs)

    return call


def error_number(error: BaseException) -> int | None:
    """Return the errno that an exception stands for, or None if a backend has put anything else in its place."""
    number = _attribute(error, "errno") if isinstance(error, OSError) else errno.EIO
    return number if isinstance(number, int) else None


def reason(error: OSError) -> str:
    """Return what the client is told of an error: the text beside its number, or "" if there is none."""
    text = _attribute(error, "strerror")
    return text if isinstance(text, str) else ""


def _attribute(error: BaseException, name: str) -> object:
    # A class of a backend's own may define it as it likes.
    try:
        return getattr(error, name)
    except BaseException:
        return None

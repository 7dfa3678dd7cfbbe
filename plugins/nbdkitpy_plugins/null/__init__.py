"""null: a disk that forgets what is written and reads as zeroes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from nbdkitpy import (
    Client,
    Extent,
    ExtentType,
    Handle,
    Parameter,
    Plugin,
    Support,
    ThreadModel,
    hookimpl,
    parse_size,
)

__all__ = ["Null", "NullHandle", "register_plugins"]

_SHARED_ZEROES = 1 << 20  # bytes; what is never written takes no memory, so that this costs address space only


class NullHandle(Handle):
    """Reads as zeroes; `zeroes` is read-only and shared by all, and serves reads up to its length."""

    inline: ClassVar[frozenset[str]] = frozenset({"pread", "pwrite", "flush", "trim", "zero", "cache", "extents"})

    def __init__(self, size: int, zeroes: memoryview) -> None:
        self._size = size
        self._zeroes = zeroes

    def get_size(self) -> int:
        return self._size

    def can_fast_zero(self) -> bool:
        return True

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_multi_conn(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes | memoryview:
        return self._zeroes[:count] if count <= _SHARED_ZEROES else bytes(count)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        """Forget `data`."""

    def flush(self) -> None:
        """Do nothing."""

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Do nothing."""

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Do nothing."""

    def cache(self, count: int, offset: int) -> None:
        """Do nothing."""

    def extents(self, count: int, offset: int, flags: int) -> Iterable[Extent]:
        return [Extent(offset, count, ExtentType.HOLE | ExtentType.ZERO)]


class Null(Plugin):
    """Has nothing to keep but the zeroes that its handles share."""

    name = "null"
    longname = "nbdkitpy bit bucket plugin"
    description = "Serves a disk that reads as zeroes and forgets what is written to it."
    multi_process = True

    size = Parameter(parse_size, default=0, magic=True, help="Size of the disk; 0 if it is not given.")

    def __init__(self) -> None:
        super().__init__()
        self._zeroes = memoryview(bytes(_SHARED_ZEROES))

    def thread_model(self) -> ThreadModel:
        """Return ``PARALLEL``."""
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> NullHandle:
        return NullHandle(self.size, self._zeroes)


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Register the plugin."""
    register(Null)

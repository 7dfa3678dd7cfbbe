"""The readonly filter: no writing, always or while some file exists."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from nbdkitpy import Client, Filter, FilterHandle, Handle, Parameter, hookimpl, parse_path

__all__ = ["ReadOnly"]


class ReadOnly(Filter):
    """Make the export read-only; with `readonly_file`, refuse what writes while that file exists."""

    name = "readonly"
    longname = "nbdkitpy readonly filter"
    description = "Make the disk read-only, always or while a file exists."
    multi_process = True

    readonly_file = Parameter(
        parse_path,
        metavar="PATHNAME",
        help="Clients can write while this file does not exist. Default: they never can.",
    )

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        # The inner layers are told, too: what is opened for reading only cannot be written by mistake.
        return super().open(export_name, readonly or self.readonly_file is None, client)

    def wrap(self, handle: Handle, client: Client) -> Handle:
        if self.readonly_file is None:
            return _ReadOnlyHandle(handle)
        return _SwitchedHandle(handle, self.readonly_file) if handle.can_write() else handle


class _ReadOnlyHandle(FilterHandle):
    """Cannot be written, even if an inner layer could."""

    def can_write(self) -> bool:
        return False


class _SwitchedHandle(FilterHandle):
    """Looks for the file before each request that writes. None of these is inline: to look may have to wait."""

    def __init__(self, next: Handle, path: str) -> None:
        super().__init__(next)
        self._path = path

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._check()
        self.next.pwrite(data, offset, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._check()
        self.next.trim(count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._check()
        self.next.zero(count, offset, flags)

    def _check(self) -> None:
        try:
            os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:  # nobody knows whether it is there
            raise OSError(errno.EPERM, f"readonly: {self._path} cannot be looked for: {error.strerror}") from error
        raise OSError(errno.EPERM, f"readonly: the disk is read-only while {self._path} exists")


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(ReadOnly)

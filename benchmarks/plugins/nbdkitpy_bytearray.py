"""bytearray: a disk in a bytearray, as simple as a plugin can be; nbdkit_bytearray.py is the same for nbdkit."""

from __future__ import annotations

from collections.abc import Callable

from nbdkitpy import Client, Handle, Parameter, Plugin, ThreadModel, hookimpl, parse_size


class BytearrayHandle(Handle):
    """A client's view of the disk."""

    def __init__(self, disk: bytearray) -> None:
        self._disk = disk

    def get_size(self) -> int:
        return len(self._disk)

    def pread(self, count: int, offset: int) -> bytearray:
        return self._disk[offset : offset + count]

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._disk[offset : offset + len(data)] = data


class Bytearray(Plugin):
    """Keeps the disk."""

    name = "bytearray"
    description = "Serves a disk that is kept in a bytearray."

    size = Parameter(parse_size, required=True, help="Size of the disk.")

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def get_ready(self) -> None:
        self._disk = bytearray(self.size)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        return BytearrayHandle(self._disk)


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Hand over the plugin."""
    register(Bytearray)

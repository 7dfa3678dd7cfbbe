"""A disk from a dictionary: the plugin that docs/tutorial.md is about."""

import struct
from collections.abc import Callable

from nbdkitpy import Client, Handle, Plugin, ThreadModel, hookimpl

SIZE = 100 << 20
BLOCK = 512

#: An entry of a partition table: for Linux (0x83), from block 2048 to the end.
PARTITION = struct.pack("<xxxxBxxxII", 0x83, 2048, SIZE // BLOCK - 2048)

#: The blocks that are not all zeroes, by their numbers: the first one has the table.
BLOCKS = {0: bytes(446) + PARTITION + bytes(48) + b"\x55\xaa"}


class DictHandle(Handle):
    """The disk, as one client has it open."""

    def get_size(self) -> int:
        return SIZE

    def can_multi_conn(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        blocks = range(offset // BLOCK, (offset + count - 1) // BLOCK + 1)
        data = b"".join(BLOCKS.get(block, bytes(BLOCK)) for block in blocks)
        start = offset % BLOCK
        return data[start : start + count]


class Example1(Plugin):
    """The disk, as long as the server runs."""

    name = "example1"
    longname = "nbdkitpy example plugin"
    description = "Serves a fixed disk of 100 MiB with one empty partition, as an example."
    multi_process = True

    def thread_model(self) -> ThreadModel:
        """Return ``PARALLEL``."""
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> DictHandle:
        return DictHandle()


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Register the plugin."""
    register(Example1)

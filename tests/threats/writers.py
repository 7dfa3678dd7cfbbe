"""Clients that write without pause, and know what has been acknowledged."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path

from nbdkitpy.protocol.constants import Command
from tests.nbdclient import PATIENCE, NbdClient

__all__ = ["BLOCK", "Writer", "Writers", "content"]

BLOCK = 4096


def content(block: int, version: int) -> bytes:
    """Return what is in a block that has been written so often."""
    return struct.pack(">QQ", block, version) * (BLOCK // 16)


class Writer:
    """Writes its own blocks again and again, several at once, until the connection ends or it is refused.

    Args:
        client: With the handshake behind it.
        first: Number of its first block.
        count: How many it has.
        acknowledged: Called for each reply of success.
    """

    AT_ONCE = 8

    def __init__(self, client: NbdClient, first: int, count: int, acknowledged: Callable[[], object]) -> None:
        self._client = client
        self._first = first
        self._count = count
        self._tell = acknowledged
        #: For each block the version that is safe, and the last one that has been sent.
        self.versions: dict[int, tuple[int, int]] = {}
        self.replies = 0

    def run(self) -> None:
        """Write until that is over."""
        version = 0
        try:
            while True:
                version += 1
                for start in range(0, self._count, self.AT_ONCE):
                    if not self._write(range(start, min(start + self.AT_ONCE, self._count)), version):
                        return
        except (OSError, EOFError):
            pass
        finally:
            self._client.socket.close()

    def _write(self, numbers: range, version: int) -> bool:
        """Write some blocks; False if one was refused."""
        sent: dict[int, int] = {}
        with self._client.batched():
            for number in numbers:
                block = self._first + number
                safe, _ = self.versions.get(block, (0, 0))
                self.versions[block] = (safe, version)
                sent[self._client.send(Command.WRITE, block * BLOCK, data=content(block, version))] = block
        for _ in numbers:
            reply = self._client.reply()
            if reply.error:
                return False
            self.versions[sent[reply.cookie]] = (version, version)
            self.replies += 1
            self._tell()
        return True

    def check(self, disk: Callable[[int, int], bytes]) -> int:
        """See that nothing that was acknowledged is lost, and return how many blocks that were; `disk` reads."""
        for block, (safe, last) in self.versions.items():
            found = disk(BLOCK, block * BLOCK)
            possible = [bytes(BLOCK)] if not safe else []
            possible += [content(block, version) for version in range(max(safe, 1), last + 1)]
            assert found in possible, f"block {block} is not one of the versions {safe} to {last}: {found[:16].hex()}"
        return sum(safe > 0 for safe, _ in self.versions.values())


class Writers:
    """Several of them at once, each in a thread of its own."""

    BLOCKS = 64  # of each

    def __init__(self, connect: Callable[[], NbdClient], count: int = 4) -> None:
        self._acknowledged = threading.Semaphore(0)
        self.all = [
            Writer(connect(), number * self.BLOCKS, self.BLOCKS, self._acknowledged.release) for number in range(count)
        ]
        self._threads = [threading.Thread(target=writer.run) for writer in self.all]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int) -> None:
        """Wait until so many more writes have been acknowledged."""
        for _ in range(count):
            assert self._acknowledged.acquire(timeout=PATIENCE), "nothing is acknowledged any more"

    def join(self) -> None:
        """Wait until all of them have ended."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a writer does not end"

    def check(self, path: Path) -> int:
        """See that the file has all that was acknowledged, and return how many blocks that were."""
        disk = path.read_bytes()
        return sum(writer.check(lambda count, offset: disk[offset : offset + count]) for writer in self.all)

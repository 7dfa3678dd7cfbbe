"""The one client of a soak that behaves, and forgets nothing that it has written."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from typing import TYPE_CHECKING

from nbdkitpy.protocol.constants import Command, CommandFlag
from tests.nbdclient import PATIENCE, NbdClient, Style
from tests.threats.writers import BLOCK, content

if TYPE_CHECKING:
    from tests.soak.hooligans import Target

__all__ = ["Checker"]


class Checker:
    """Writes blocks, and reads those that it has written before; comes and goes now and then."""

    NAME = "checked"
    BLOCKS = 2048
    SIZE = BLOCKS * BLOCK

    def __init__(self, target: Target, seed: int) -> None:
        self._target = target
        self._chance = random.Random(seed)
        self._versions = [0] * self.BLOCKS
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.found = 0  #: blocks that were right at the end

    def run(self, is_over: threading.Event) -> None:
        """Go on until it is over."""
        while not is_over.is_set():
            client = self._connected()
            try:
                for _ in range(self._chance.randrange(1, 200)):
                    self._write(client)
                    self._check(client)
                    if is_over.is_set():
                        break
                client.disconnect()
            finally:
                client.socket.close()

    def _connected(self) -> NbdClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(self._target.path)
        self.counts["connections of the checker"] += 1
        return NbdClient(sock).negotiate(self._chance.choice(list(Style)), name=self.NAME)

    def _write(self, client: NbdClient) -> None:
        blocks = self._chance.sample(range(self.BLOCKS), self._chance.randrange(1, 32))
        with client.batched():
            for block in blocks:
                self._versions[block] += 1
                flags = CommandFlag.FUA if self._chance.random() < 0.02 else CommandFlag(0)
                client.send(Command.WRITE, block * BLOCK, data=content(block, self._versions[block]), flags=flags)
            flushes = self._chance.random() < 0.05
            if flushes:
                client.send(Command.FLUSH)
        self._expect_success(client, len(blocks) + flushes)
        self.counts["blocks written by the checker"] += len(blocks)

    def _expect_success(self, client: NbdClient, count: int) -> None:
        errors = [reply for reply in client.replies(count).values() if reply.error]
        if errors:
            self.failures.append(f"the checker got {errors[0]}")

    def _check(self, client: NbdClient) -> None:
        wanted = {}
        with client.batched():
            for _ in range(16):
                first = self._chance.randrange(self.BLOCKS)
                count = min(self._chance.choice([1, 1, 4, 64]), self.BLOCKS - first)
                wanted[client.send(Command.READ, first * BLOCK, count * BLOCK)] = (first, count)
        for cookie, reply in client.replies(len(wanted)).items():
            first, count = wanted[cookie]
            self._compare(reply.data, first, count)
            self.counts["blocks read back and compared"] += count

    def _compare(self, data: bytes, first: int, count: int) -> int:
        """Return how many blocks are right."""
        right = 0
        for number in range(count):
            block = first + number
            version = self._versions[block]
            if data[number * BLOCK :][:BLOCK] == (content(block, version) if version else bytes(BLOCK)):
                right += 1
            elif len(self.failures) < 10:
                self.failures.append(f"block {block} is not what has been written as version {version}")
        return right

    def check_file(self) -> None:
        """See that all is in the file, too."""
        self.found = self._compare((self._target.disks / self.NAME).read_bytes(), 0, self.BLOCKS)

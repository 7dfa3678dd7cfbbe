"""Clients of a soak that do random things, of which few are right."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from nbdkitpy.protocol.constants import Command
from tests.nbdclient import PATIENCE, NbdClient, Style

__all__ = ["Hooligan", "Target"]


class Target(NamedTuple):
    """What they are let loose on."""

    path: str  #: of its Unix socket
    conversations: Mapping[Style, tuple[bytes, bytes]]  #: what a client sends and receives in a whole one
    certificates: Path  #: directory
    disks: Path  #: directory
    log: Path


class Hooligan:
    """Connects, does something, and leaves; again and again."""

    NAME = "scratch"
    SIZE = 16 << 20

    def __init__(self, target: Target, seed: int) -> None:
        self._target = target
        self._chance = random.Random(seed)
        self._is_over = threading.Event()
        self.counts: Counter[str] = Counter()
        self._ways: list[Callable[[], None]] = [
            self._leave_while_sending,
            self._leave_while_receiving,
            self._send_garbage,
            self._send_something_mutated,
            self._send_in_pieces,
            self._stay_silent,
            self._read_and_write,
            self._take_replies_slowly,
            self._leave_in_a_payload,
            self._use_tls,
            self._leave_in_tls,
        ]

    def run(self, is_over: threading.Event) -> None:
        """Go on until it is over."""
        self._is_over = is_over
        while not is_over.is_set():
            self._do(self._chance.choice(self._ways))

    def do_each_once(self) -> None:
        """Do all that can be done, but for waiting."""
        self._is_over.set()
        for way in self._ways:
            self._do(way)

    def _do(self, way: Callable[[], None]) -> None:
        # The server closes the connection of whoever breaks the protocol, at a time of its choice.
        try:
            with contextlib.suppress(EOFError, ConnectionError, ssl.SSLEOFError):
                way()
        except Exception as error:
            raise AssertionError(f"{way.__name__}: {error!r}") from error
        self.counts["connections of hooligans"] += 1

    def _dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE)
        sock.connect(self._target.path)
        return sock

    @contextlib.contextmanager
    def _client(self) -> Iterator[NbdClient]:
        with NbdClient(self._dial()).negotiate(self._chance.choice(list(Style)), name=self.NAME) as client:
            yield client

    def _conversation(self) -> tuple[bytes, bytes]:
        return self._target.conversations[self._chance.choice(list(Style))]

    # --- what is not right ---

    def _leave_while_sending(self) -> None:
        sent, _ = self._conversation()
        with self._dial() as sock:
            sock.sendall(sent[: self._chance.randrange(len(sent) + 1)])

    def _leave_while_receiving(self) -> None:
        sent, received = self._conversation()
        with self._dial() as sock:
            sock.sendall(sent)
            self._receive(sock, self._chance.randrange(len(received) + 1))

    def _send_garbage(self) -> None:
        sent, _ = self._conversation()
        with self._dial() as sock:
            sock.sendall(sent[: self._chance.randrange(len(sent))] + self._chance.randbytes(1000))
            sock.shutdown(socket.SHUT_WR)  # the rest may look like the beginning of something
            self._receive(sock, 100_000)

    def _send_something_mutated(self) -> None:
        sent = bytearray(self._conversation()[0])
        for _ in range(self._chance.randrange(1, 5)):
            sent[self._chance.randrange(len(sent))] = self._chance.getrandbits(8)
        with self._dial() as sock:
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            self._receive(sock, 100_000)

    def _send_in_pieces(self) -> None:
        left, _ = self._conversation()
        with self._dial() as sock:
            while left:
                count = self._chance.randrange(1, 50)
                sock.sendall(left[:count])
                left = left[count:]
                self._is_over.wait(self._chance.random() * 0.01)

    def _stay_silent(self) -> None:
        sent, _ = self._conversation()
        with self._dial() as sock:
            sock.sendall(sent[: self._chance.randrange(len(sent))])
            self._is_over.wait(self._chance.random() * 3)  # the server may close the connection meanwhile

    def _take_replies_slowly(self) -> None:
        with self._client() as client:
            with client.batched():
                for _ in range(8):
                    client.send(Command.READ, 0, 4 << 20)
            for _ in range(self._chance.randrange(8)):
                self._is_over.wait(self._chance.random() * 0.2)
                client.reply()

    def _leave_in_a_payload(self) -> None:
        with self._client() as client:
            client.send_bytes(bytes.fromhex("25609513 0000 0001") + bytes(16) + (1 << 20).to_bytes(4, "big"))
            client.send_bytes(self._chance.randbytes(self._chance.randrange(1 << 16)))

    def _receive(self, sock: socket.socket, count: int) -> None:
        while count > 0:
            piece = sock.recv(min(count, 1 << 16))
            if not piece:
                return
            count -= len(piece)

    # --- what is ---

    def _read_and_write(self) -> None:
        with self._client() as client:
            self._make_requests(client)

    def _make_requests(self, client: NbdClient) -> None:
        for _ in range(self._chance.randrange(1, 20)):
            cookies = []
            with client.batched():
                for _ in range(self._chance.randrange(1, 16)):
                    command = self._chance.choice([Command.READ, Command.WRITE, Command.TRIM, Command.FLUSH])
                    length = self._chance.choice([512, 4096, 100_000])
                    offset = self._chance.randrange(self.SIZE - length) if command is not Command.FLUSH else 0
                    data = self._chance.randbytes(length) if command is Command.WRITE else b""
                    cookies.append(
                        client.send(command, offset, length if command is not Command.FLUSH else 0, data=data)
                    )
            client.replies(len(cookies))
            self.counts["requests of hooligans"] += len(cookies)
        if self._chance.random() < 0.5:
            client.disconnect()

    # --- TLS ---

    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._target.certificates / "ca-cert.pem"))

    def _use_tls(self) -> None:
        with NbdClient(self._dial()) as client:
            client.greet()
            client.start_tls(self._context())
            client.go(self.NAME)
            self._make_requests(client)

    def _leave_in_tls(self) -> None:
        with NbdClient(self._dial()) as client:
            client.greet()
            client.send_option(5)
            client.receive_bytes(20)
            client.send_bytes(self._chance.choice([b"", b"\x16\x03\x01", self._chance.randbytes(300)]))

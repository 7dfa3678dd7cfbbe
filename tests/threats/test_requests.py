"""Requests that no sane client sends: each has the one reply that it should have, and harms nobody."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import struct
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError, TransmissionFlag
from nbdkitpy.server import engine
from nbdkitpy_filters.cow import Cow
from nbdkitpy_plugins.file import FilePlugin
from tests.conftest import StartServer
from tests.interop.harness import MIB, Server, Servers
from tests.nbdclient import NbdClient, Style
from tests.serving import CONTENT, SIZE, Disk, Disks

STYLES = pytest.mark.parametrize("style", list(Style), ids=lambda style: style.value)

EINVAL, ENOSPC = NbdError.EINVAL, NbdError.ENOSPC
BEYOND = {
    Command.READ: EINVAL,
    Command.WRITE: ENOSPC,
    Command.TRIM: EINVAL,
    Command.WRITE_ZEROES: ENOSPC,
    Command.CACHE: EINVAL,
    Command.BLOCK_STATUS: EINVAL,
}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    return path


def file_plugin(image: Path) -> FilePlugin:
    """Return a plugin that serves a file."""
    plugin = FilePlugin()
    assert plugin.config("file", str(image))
    return plugin


# --- R1, R4: ranges and lengths ---

#: Ranges that do not lie within the export, as far as 32 bits of length go.
OUTSIDE = [
    (0, 0),
    (0, SIZE + 1),
    (0, 0x7FFFFFFF),
    (0, 0xFFFFFFFF),
    (1, SIZE),
    (SIZE - 1, 2),
    (SIZE, 0),
    (SIZE, 1),
    *((edge + near, length) for edge in (1 << 31, 1 << 32, 1 << 63) for near in (-1, 0, 1) for length in (1, 512)),
    *(((1 << 64) - before, length) for before in (1, 512, SIZE) for length in (0, 1, 2, 512, SIZE, 0x7FFFFFFF)),
]
#: And with 64 bits of it.
FAR_OUTSIDE = [
    (0, 1 << 32),
    (0, (1 << 63) - 1),
    (0, 1 << 63),
    (0, (1 << 64) - 1),
    (SIZE - 1, (1 << 64) - SIZE + 1),
    (SIZE, (1 << 64) - SIZE),
    ((1 << 64) - 1, (1 << 64) - 1),
]


@STYLES
@pytest.mark.parametrize("command", BEYOND, ids=lambda command: command.name)
def test_R1_CVE_2005_3534_CVE_2011_0530_range_that_is_not_within_the_disk(
    command: Command, style: Style, image: Path, start_server: StartServer
) -> None:
    client = start_server(file_plugin(image)).connect(style, contexts=style is not Style.SIMPLE)
    ranges = OUTSIDE + (FAR_OUTSIDE if style is Style.EXTENDED else [])
    if command == Command.WRITE:  # all of whose data have to be sent
        ranges = [(offset, length) for offset, length in ranges if 0 < length <= 2 * SIZE]
    expected = EINVAL if command == Command.BLOCK_STATUS and style is Style.SIMPLE else BEYOND[command]

    for offset, length in ranges:
        data = bytes(length) if command == Command.WRITE else b""
        assert client.call(command, offset, length, data=data).error == expected, (offset, length)

    assert client.read(0, SIZE) == CONTENT
    assert image.read_bytes() == CONTENT


def peak_memory(server: Server) -> int:
    """The most memory that a process has had, in bytes."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{server.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def test_R4_lengths_that_are_only_announced_take_no_memory(serve: Servers) -> None:
    server = serve("null", "8G")
    NbdClient(server.connect()).negotiate().disconnect()
    before = peak_memory(server)

    for length in (33 * MIB, 64 * MIB, 128 * MIB):
        for _ in range(8):
            client = NbdClient(server.connect()).negotiate()
            client.send_bytes(struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 1, 0, length) + bytes(100_000))
            client.socket.shutdown(socket.SHUT_WR)
            assert client.at_end()  # when all of it has been read
            client.socket.close()
    with NbdClient(server.connect()).negotiate() as client:
        for length in (64 * MIB + 1, 0x7FFFFFFF, 0xFFFFFFFF):
            assert client.call(Command.READ, 0, length).error == EINVAL
        client.send_bytes(struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 1, 0, 0xFFFFFFFF))
        assert client.at_end()

    assert peak_memory(server) - before < 16 * MIB
    assert [line for line in server.end() if "too large to be skipped" in line]


@STYLES
def test_R4_64_mib_are_served_and_one_byte_more_is_refused_in_step(style: Style, start_server: StartServer) -> None:
    written: list[int] = []

    class Large(Disk):
        def get_size(self) -> int:
            return 256 * MIB

        def pread(self, count: int, offset: int) -> bytes:
            return bytes(count)

        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            written.append(len(data))

    client = start_server(Disks(Large)).connect(style)

    assert client.read(0, 64 * MIB) == bytes(64 * MIB)
    client.write(0, bytes(64 * MIB))
    assert client.call(Command.WRITE, 0, data=bytes(64 * MIB + 1)).error == EINVAL

    assert client.read(0, 512) == bytes(512)
    assert written == [64 * MIB]


# --- R2: what is read-only ---


def test_R2_no_request_changes_a_file_that_is_served_read_only(image: Path, start_server: StartServer) -> None:
    server = start_server(file_plugin(image), readonly=True)
    some = random.Random(2)
    valid = b"".join(
        struct.pack(">IHHQQI", 0x25609513, flags, command, 1, 4096, 512) + bytes(512) * (command == Command.WRITE)
        for command in (Command.READ, Command.WRITE, Command.FLUSH, Command.TRIM, Command.CACHE, Command.WRITE_ZEROES)
        for flags in (0, CommandFlag.FUA, CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO)
    )

    for _ in range(150):
        changed = bytearray(valid)
        for _ in range(some.randrange(4)):
            changed[some.randrange(len(changed))] = some.randrange(256)
        client = server.connect()
        assert client.flags & TransmissionFlag.READ_ONLY
        client.send_bytes(bytes(changed))
        client.socket.shutdown(socket.SHUT_WR)
        client.wait_for_end()
        client.socket.close()

    assert image.read_bytes() == CONTENT


def test_R2_file_that_is_served_read_only_is_opened_for_nothing_else(image: Path, start_server: StartServer) -> None:
    server = start_server(file_plugin(image), readonly=True)
    client = server.connect()
    assert client.read(0, 512) == CONTENT[:512]

    opened = [fd for fd in os.listdir("/proc/self/fd") if _target(fd) == str(image)]
    modes = {int(_flags(fd), 8) & os.O_ACCMODE for fd in opened}

    assert modes == {os.O_RDONLY}
    client.disconnect()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # that of the list itself
        return ""


def _flags(fd: str) -> str:
    found = re.search(r"^flags:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def test_R2_overlay_over_what_is_read_only_leaves_that_alone(image: Path, start_server: StartServer) -> None:
    client = start_server(file_plugin(image), Cow()).connect()
    assert not client.flags & TransmissionFlag.READ_ONLY

    client.write(0, b"x" * 4096)
    assert not client.call(Command.WRITE_ZEROES, 8192, 4096).error
    assert not client.call(Command.TRIM, 0, SIZE).error
    assert not client.call(Command.FLUSH).error

    assert image.read_bytes() == CONTENT


# --- R6: one reply for each request ---


class Moody(Disk):
    """Fails every third block, in its own way for each verb. Small reads do not wait, others go to a worker."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = lambda buffer, offset: self._read_now(buffer, offset)

    def _read_now(self, buffer: memoryview, offset: int) -> bool:
        if len(buffer) > 512:
            return False
        buffer[:] = self.pread(len(buffer), offset)
        return True

    def pread(self, count: int, offset: int) -> bytes:
        self._fail(offset, errno.EIO)
        return super().pread(count, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._fail(offset, errno.ENOSPC)
        assert data == CONTENT[offset : offset + len(data)]

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._fail(offset, errno.EPERM)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._fail(offset, errno.ENOMEM)

    def flush(self) -> None:
        pass

    def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
        self._fail(offset, errno.EINVAL)
        return [(offset, count, 0)]

    @staticmethod
    def _fail(offset: int, number: int) -> None:
        if offset // 4096 % 3 == 0:
            raise OSError(number, os.strerror(number))


FAILURES = {
    Command.READ: NbdError.EIO,
    Command.WRITE: NbdError.ENOSPC,
    Command.TRIM: NbdError.EPERM,
    Command.WRITE_ZEROES: NbdError.ENOMEM,
    Command.BLOCK_STATUS: NbdError.EINVAL,
}


@STYLES
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "slow"])
def test_R6_each_request_of_a_wild_pipeline_has_its_one_reply(
    quick: bool, style: Style, start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:  # workers have all that is not known to be
        monkeypatch.setattr(engine, "_QUICK_AT_FIRST", frozenset())
    some = random.Random(6)
    client = start_server(Disks(Moody)).connect(style, contexts=style is not Style.SIMPLE)
    commands = [*FAILURES, Command.FLUSH, 99]

    for _ in range(20):
        expected: dict[int, tuple[int, bytes]] = {}
        with client.batched():
            for _ in range(30):
                command, length = some.choice(commands), some.choice((1, 512, 4096, 20_000))
                offset = some.randrange(SIZE + 4096)
                error, data = outcome(command, offset, length, style)
                sent = CONTENT[offset : offset + length].ljust(length) if command == Command.WRITE else b""
                place = (0, 0) if command == Command.FLUSH else (offset, length)
                cookie = client.send(command, *place, data=sent, cookie=some.getrandbits(64))
                expected[cookie] = (error, data)
        found = client.replies(len(expected))

        assert {cookie: (reply.error, reply.data) for cookie, reply in found.items()} == expected
    client.disconnect()  # and there is nothing more


class Mixed(Disk):
    """Of its first half all is at hand, of the second one nothing is."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.pread_into = self._pread_into

    def _pread_into(self, buffer: memoryview, offset: int) -> bool:
        if offset < SIZE // 2:
            buffer[:] = CONTENT[offset : offset + len(buffer)]
        return offset < SIZE // 2


@STYLES
def test_R6_replies_of_many_threads_stay_whole_though_the_client_is_slow(
    style: Style, start_server: StartServer
) -> None:
    client = start_server(Disks(Mixed)).connect(style)
    offsets = [number % 2 * (SIZE // 2) + number * 1000 for number in range(80)]

    with client.batched():  # for ten times as much as the sockets hold
        sent = {client.send(Command.READ, offset, 200_000): offset for offset in offsets}
    found = client.replies(len(sent))

    assert all(reply.data == CONTENT[sent[cookie] :][:200_000] for cookie, reply in found.items())


def outcome(command: int, offset: int, length: int, style: Style) -> tuple[int, bytes]:
    """Return the error that a request has to get, 0 if none, and the data."""
    if command == Command.FLUSH:
        return 0, b""
    if command == 99 or (command == Command.BLOCK_STATUS and style is Style.SIMPLE):
        return EINVAL, b""
    command = Command(command)
    if offset + length > SIZE:
        return BEYOND[command], b""
    if offset // 4096 % 3 == 0:
        return FAILURES[command], b""
    return 0, CONTENT[offset : offset + length] if command == Command.READ else b""


# --- R9: errors of the protocol only ---

#: Every number that a system has, and some that none has; 0 is what a plugin may mean by mistake.
NUMBERS = [*errno.errorcode, *range(134, 300), 0, 512, 524, 9999, 1 << 31, 1 << 40]


class Raising(Disk):
    """Fails in a different way at each block."""

    def _raise(self, offset: int) -> None:
        raise OSError(NUMBERS[offset // 512], "no")

    def pread(self, count: int, offset: int) -> bytes:
        self._raise(offset)
        return b""

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._raise(offset)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._raise(offset)


@STYLES
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.WRITE_ZEROES], ids=lambda each: each.name)
def test_R9_error_of_any_number_is_one_of_the_protocol(
    command: Command, style: Style, start_server: StartServer
) -> None:
    client = start_server(Disks(Raising)).connect(style)
    sent: dict[int, int] = {}

    with client.batched():
        for index, number in enumerate(NUMBERS):
            data = bytes(512) if command == Command.WRITE else b""
            sent[client.send(command, index * 512, 512, data=data)] = number
    found = {sent[cookie]: reply.error for cookie, reply in client.replies(len(sent)).items()}

    known = {1: 1, 5: 5, 12: 12, 22: 22, 28: 28, 108: 108, errno.EROFS: 1, errno.EACCES: 1}
    known |= {errno.EDQUOT: 28, errno.EFBIG: 28}
    assert found == {number: known.get(number, 22) for number in NUMBERS}

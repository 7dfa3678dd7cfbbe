"""An overlay in a file: it is there again after the server, the process or the machine has ended."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy import BlockSize, ConfigError, Flags, Handle
from nbdkitpy.protocol.constants import Command
from nbdkitpy_filters.cow import Cow, kept
from tests.filters.disk import CLIENT, SETTINGS, DiskMachine, configured, extents, memory, patchy, write
from tests.filters.test_cow import Below, Disks
from tests.fuzzing.attempts import attempted
from tests.fuzzing.effort import fuzz
from tests.interop.harness import Server
from tests.nbdclient import NbdClient
from tests.serving import NoServer, make_stack

PATIENCE = 20  # seconds; reached only if the filter is wrong
SECTOR = 512
BLOCK = 4096
SIZE = 20 * BLOCK + 1024
CONTENT = patchy(SIZE)
HEADER = 8192

BOOT = kept.boot_id()
OTHER_BOOT = bytes(range(16))


class Life:
    """The life of a server: one stack, and a handle on it."""

    def __init__(self, path: Path, *, size: int = SIZE, name: str = "", **parameters: str) -> None:
        plugin = memory(size)
        plugin.config_complete()
        self.below = plugin.open("", False, CLIENT)
        write(self.below, CONTENT[:size], 0) if size else None
        unit = configured(Cow(), **{"cow_file": str(path), "cow_block_size": "4k", **parameters})
        self._stack = make_stack(plugin, [unit], NoServer())
        try:
            self.handle = self._stack.open(name, False, CLIENT).handle
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End without a flush."""
        self._stack.unload()

    def end(self) -> None:
        """End in order."""
        self.handle.close()
        self._stack.cleanup()
        self.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.cow"


def change(handle: Handle) -> bytes:
    """Write here and there, and return what the disk holds then."""
    content = bytearray(CONTENT)
    for position, length in [(BLOCK + 10, 20), (3 * BLOCK, BLOCK), (5 * BLOCK - 7, 2 * BLOCK), (SIZE - 3, 3)]:
        data = random.Random(position).randbytes(length)
        write(handle, data, position)
        content[position : position + length] = data
    handle.trim(2 * BLOCK, 10 * BLOCK, 0)
    content[10 * BLOCK : 12 * BLOCK] = bytes(2 * BLOCK)
    return bytes(content)


# --- from life to life ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [Life.end, Life.kill])
def test_S7_what_was_written_is_there_again(end: Callable[[Life], None], path: Path) -> None:
    life = Life(path)
    content = change(life.handle)
    known = extents(life.handle, SIZE)
    assert life.below.pread(SIZE, 0) == CONTENT
    end(life)

    life = Life(path)

    assert life.handle.pread(SIZE, 0) == content
    assert extents(life.handle, SIZE) == known
    life.end()


def test_after_a_boot_what_was_flushed_counts_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(path)
    content = change(life.handle)
    life.handle.flush()
    write(life.handle, b"x" * 100, 15 * BLOCK)
    life.handle.trim(BLOCK, 3 * BLOCK, 0)
    life.kill()
    monkeypatch.setattr(kept, "boot_id", lambda: OTHER_BOOT)

    life = Life(path)

    assert life.handle.pread(SIZE, 0) == content
    write(life.handle, b"y", 15 * BLOCK)
    life.kill()
    life = Life(path)
    assert life.handle.pread(SIZE, 0) == content[: 15 * BLOCK] + b"y" + content[15 * BLOCK + 1 :]
    life.end()


def test_where_boots_cannot_be_told_apart_what_was_flushed_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_BOOT_ID", "/nowhere")
    life = Life(path)
    write(life.handle, b"x", 0, Flags.FUA)
    write(life.handle, b"y", BLOCK)
    life.kill()

    life = Life(path)

    assert life.handle.pread(SIZE, 0) == b"x" + CONTENT[1:]
    write(life.handle, b"y", BLOCK)
    life.end()
    life = Life(path)
    assert life.handle.pread(1, BLOCK) == b"y"
    life.end()


def test_the_boot_of_this_machine_has_a_number() -> None:
    assert len(BOOT) == 16
    assert any(BOOT)


def test_the_file_takes_space_for_what_was_written_only(path: Path) -> None:
    life = Life(path, size=1 << 30, cow_block_size="64k")
    write(life.handle, b"x", 1 << 29)
    life.end()

    assert path.stat().st_blocks * 512 <= 256 << 10
    assert path.stat().st_mode & 0o777 == 0o600
    life = Life(path, size=1 << 30, cow_block_size="64k")
    assert life.handle.pread(1, 1 << 29) == b"x"
    life.end()


def test_a_file_without_holes_is_read_too(path: Path) -> None:
    life = Life(path)
    content = change(life.handle)
    life.end()
    path.write_bytes(path.read_bytes())

    life = Life(path)

    assert life.handle.pread(SIZE, 0) == content
    life.end()


def test_an_empty_disk_can_be_kept(path: Path) -> None:
    for _ in range(2):
        Life(path, size=0).end()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: b"#!/bin/sh\n", "it is not an overlay"),
        (lambda data: data[:100], "it is not an overlay"),
        (lambda data: data[:8] + struct.pack(">I", 2) + data[12:], "it is an overlay of version 2"),
        (lambda data: data[:12] + struct.pack(">I", 8192) + data[16:], "its header is damaged"),
        (lambda data: data[:12] + struct.pack(">I", 3) + data[16:], "its header is damaged"),
        (lambda data: data[:16] + struct.pack(">Q", 1 << 63) + data[24:], "its header is damaged"),
        (lambda data: data[:40] + struct.pack(">H", 65535) + data[42:], "its header is damaged"),
        (lambda data: data[:100] + b"x" + data[101:], "its header is damaged"),
    ],
)
def test_a_file_that_is_something_else_is_left_alone(change: Callable[[bytes], bytes], text: str, path: Path) -> None:
    Life(path).end()
    wrong = change(path.read_bytes())
    path.write_bytes(wrong)

    with pytest.raises(ConfigError, match=f"^cow: cow-file {path}: {text}"):
        configured(Cow(), cow_file=str(path)).get_ready()

    assert path.read_bytes() == wrong


def test_damaged_entries_refuse_the_export(path: Path) -> None:
    life = Life(path)
    change(life.handle)
    life.end()
    data = bytearray(path.read_bytes())
    data[HEADER] = 3
    path.write_bytes(data)

    with pytest.raises(OSError, match="the cow-file is damaged"):
        Life(path)


EDGES = st.sampled_from([0, 1, 4096, 8192, SIZE, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
HEADERS = st.builds(
    kept.Header,
    block=st.sampled_from([BLOCK, 1, 4097, 1 << 13, 1 << 20, 1 << 31]),
    size=st.sampled_from([SIZE, SIZE, 1 << 40]) | EDGES,
    boot=st.sampled_from([BOOT, OTHER_BOOT, bytes(16)]),
    name=st.sampled_from(["", "", "other", "x" * 4096, "ä"]),
)
CHANGES = st.lists(st.tuples(st.integers(0, HEADER + 40), st.integers(0, 255)), max_size=4)


@fuzz(100)
@given(HEADERS.map(kept.Header.packed) | st.binary(max_size=100), CHANGES, st.booleans())
def test_whatever_is_in_the_file_is_used_or_refused(
    beginning: bytes, changes: list[tuple[int, int]], is_cut: bool
) -> None:
    content = bytearray(beginning if is_cut else beginning.ljust(HEADER + BLOCK, b"\0"))
    for place, value in changes:
        if place < len(content):
            content[place] = value
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        life, _ = attempted(lambda: Life(Path(file.name)), ConfigError, OSError)
        if life is None:
            return
        assert len(life.handle.pread(SIZE, 0)) == SIZE
        change(life.handle)
        life.end()


def test_a_file_in_use_is_refused(path: Path) -> None:
    life = Life(path)

    with pytest.raises(ConfigError, match="another process has it open"):
        Life(path)

    life.end()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ConfigError, match="it is not a regular file"):
        configured(Cow(), cow_file=str(tmp_path / "pipe")).get_ready()
    with pytest.raises(ConfigError, match="Is a directory"):
        configured(Cow(), cow_file=str(tmp_path)).get_ready()
    with pytest.raises(ConfigError, match="No such file"):
        configured(Cow(), cow_file=str(tmp_path / "none" / "disk.cow")).get_ready()


def test_a_disk_of_another_size_is_refused(path: Path) -> None:
    Life(path).end()

    with pytest.raises(OSError, match=f"the cow-file is of a disk of {SIZE} bytes, not {SIZE + 1}") as refused:
        Life(path, size=SIZE + 1)

    assert refused.value.errno == errno.EINVAL


def test_another_export_is_refused(path: Path) -> None:
    Life(path, name="Ä").end()

    with pytest.raises(OSError, match="the cow-file is of the export 'Ä' and of no other") as refused:
        Life(path, name="other")

    assert refused.value.errno == errno.ENOENT
    Life(path, name="Ä").end()


def test_another_block_size_is_refused_and_none_is_that_of_the_file(path: Path) -> None:
    Life(path).end()

    with pytest.raises(ConfigError) as refused:
        Life(path, cow_block_size="8k")

    assert str(refused.value) == "cow: cow-block-size must be 4096, as in the cow-file, not 8192"
    unit = configured(Cow(), cow_file=str(path))
    handle = make_stack(memory(SIZE), [unit], NoServer()).open("", False, CLIENT).handle
    assert vars(handle)["_overlay"].block == 4096
    unit.unload()


def test_blocks_smaller_than_the_plugin_takes_are_refused(path: Path) -> None:
    class Coarse(Below):
        size = SIZE
        sizes = BlockSize(8192, 8192, 0xFFFFFFFF)

    Life(path).end()
    unit = configured(Cow(), cow_file=str(path))
    stack = make_stack(Disks(Coarse), [unit], NoServer())

    with pytest.raises(OSError, match="blocks must have 8192 bytes, not 4096"):
        stack.open("", False, CLIENT)

    unit.unload()


def test_a_disk_too_large_for_a_file_is_refused(path: Path) -> None:
    unit = configured(Cow(), cow_file=str(path))
    stack = make_stack(memory((1 << 63) - 1), [unit], NoServer())

    with pytest.raises(OSError, match="does not fit in a file") as refused:
        stack.open("", False, CLIENT)

    assert refused.value.errno == errno.EFBIG
    assert path.stat().st_size == 0
    unit.unload()


# --- stable storage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_",
    [
        lambda handle: handle.flush(),
        lambda handle: write(handle, b"x", 0, Flags.FUA),
        lambda handle: handle.zero(BLOCK, 0, Flags.FUA | Flags.MAY_TRIM),
        lambda handle: handle.zero(BLOCK, 0, Flags.FUA),
        lambda handle: handle.trim(BLOCK, 0, Flags.FUA),
    ],
    ids=["flush", "pwrite", "trimming zero", "zero", "trim"],
)
def test_a_flush_reaches_the_disk(request_: Callable[[Handle], None], path: Path, disk: Disk) -> None:
    life = Life(path)
    write(life.handle, b"y" * 10, BLOCK)

    request_(life.handle)

    assert disk.unsynced == []
    life.end()


def test_a_flush_of_what_is_flushed_is_one_sync(path: Path, disk: Disk) -> None:
    life = Life(path)
    write(life.handle, b"y" * 10, BLOCK)
    life.handle.flush()
    write(life.handle, b"z" * 10, BLOCK)
    disk.syncs = 0

    life.handle.flush()

    assert disk.syncs == 1
    life.end()


def test_once_a_flush_has_failed_none_succeeds(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(path)
    write(life.handle, b"y", BLOCK)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "disk is on fire")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        with pytest.raises(OSError, match="disk is on fire"):
            life.handle.flush()

    with pytest.raises(OSError, match="an earlier flush failed") as failed:
        life.handle.flush()
    assert failed.value.errno == errno.EIO
    life.end()
    assert "cow: what was written last may be lost: " in caplog.text


@pytest.mark.parametrize("written", [0, 1000])
def test_entries_that_cannot_be_written_fail_the_request(
    written: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(path)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: written and pwrite(fd, data[:written], offset))

    if written:
        life.handle.zero(SIZE, 0, Flags.MAY_TRIM)
        assert life.handle.pread(SIZE, 0) == bytes(SIZE)
    else:
        with pytest.raises(OSError, match="nothing could be written"):
            write(life.handle, b"x", 0)
        assert life.handle.pread(SIZE, 0) == CONTENT
    monkeypatch.undo()
    life.end()


# --- sudden ends ----------------------------------------------------------------------------------------------------


class Dead(BaseException):
    """The process is killed here."""


class Disk:
    """Stands between the filter and the file, and knows what has reached stable storage.

    It may also end the process before any one of the calls that write.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsynced: list[tuple[int, bytes]] = []
        self.stable = bytearray()
        self.syncs = 0
        self.calls_left = -1
        self._pwrite, self._fdatasync, self._fsync = os.pwrite, os.fdatasync, os.fsync
        monkeypatch.setattr(os, "pwrite", self._write)
        monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: self._write(fd, b"".join(parts), offset))
        monkeypatch.setattr(os, "fdatasync", self._sync)
        monkeypatch.setattr(os, "fsync", self._sync)

    def _count(self) -> None:
        if self.calls_left == 0:
            raise Dead
        self.calls_left -= 1

    def _write(self, fd: int, data: Any, offset: int) -> int:
        self._count()
        self.unsynced.append((offset, bytes(data)))
        return self._pwrite(fd, data, offset)

    def _sync(self, fd: int) -> None:
        self._count()
        self.syncs += 1
        for offset, data in self.unsynced:
            put(self.stable, data, offset)
        self.unsynced.clear()

    def after_power_loss(self, chance: random.Random) -> bytes:
        """What a file may hold then: of each sector the stable version or any later one."""
        versions: dict[int, list[bytes]] = {}
        latest = bytearray(self.stable)
        for offset, data in self.unsynced:
            put(latest, data, offset)
            for sector in range(offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1):
                versions.setdefault(sector, []).append(bytes(latest[sector * SECTOR : (sector + 1) * SECTOR]))
        found = bytearray(self.stable)
        for sector, later in versions.items():
            if (version := chance.randint(0, len(later))) > 0:
                put(found, later[version - 1], sector * SECTOR)
        return bytes(found)


def put(image: bytearray, data: bytes, offset: int) -> None:
    image.extend(bytes(max(offset - len(image), 0)))
    image[offset : offset + len(data)] = data


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def change_at_random(handle: Handle, model: bytearray, chance: random.Random) -> bool:
    """Change something, in whole sectors, in the model first; return whether it is to be stable afterwards."""
    start, stop = sorted(chance.sample(range(SIZE // SECTOR + 1), 2))
    if chance.random() < 0.5:
        stop = min(start + 3, stop)
    offset, count = start * SECTOR, (stop - start) * SECTOR
    verb = chance.choice(("pwrite", "pwrite", "zero", "trim", "flush"))
    flags = chance.choice((0, 0, Flags.FUA))
    data = chance.randbytes(count) if verb == "pwrite" else bytes(count)
    if verb == "flush":
        handle.flush()
        return True
    model[offset : offset + count] = data
    if verb == "pwrite":
        write(handle, data, offset, flags)
    else:
        getattr(handle, verb)(count, offset, flags | (Flags.MAY_TRIM if chance.random() < 0.5 else 0))
    return bool(flags)


def sectors(content: bytes | bytearray) -> Iterator[bytes]:
    for start in range(0, SIZE, SECTOR):
        yield bytes(content[start : start + SECTOR])


def check_sectors(found: bytes, possible: Sequence[bytes]) -> None:
    """See that each sector is as it is in one of the `possible` contents."""
    for number, (sector, *others) in enumerate(zip(sectors(found), *map(sectors, possible))):
        assert sector in others, f"sector {number}"


@pytest.mark.parametrize("seed", range(40))
def test_D9_a_process_that_is_killed_loses_nothing_that_it_has_answered(seed: int, path: Path, disk: Disk) -> None:
    chance = random.Random(seed)
    model = bytearray(CONTENT)
    life = Life(path)
    disk.calls_left = chance.randint(1, 40)
    before = bytes(model)
    try:
        while True:
            before = bytes(model)
            change_at_random(life.handle, model, chance)
    except Dead:
        life.kill()
    disk.calls_left = -1

    life = Life(path)

    check_sectors(bytes(life.handle.pread(SIZE, 0)), [before, bytes(model)])
    life.end()


@pytest.mark.parametrize("seed", range(60))
def test_D10_a_machine_that_loses_power_loses_nothing_that_was_flushed(
    seed: int, path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    model = bytearray(CONTENT)
    life = Life(path)
    possible = [bytes(model)]
    disk.calls_left = chance.randint(1, 60)
    try:
        while True:
            is_stable = change_at_random(life.handle, model, chance)
            possible = [bytes(model)] if is_stable else [*possible, bytes(model)]
    except Dead:
        possible.append(bytes(model))
        life.kill()
    disk.calls_left = -1
    path.write_bytes(disk.after_power_loss(chance))
    monkeypatch.setattr(kept, "boot_id", lambda: OTHER_BOOT)

    life = Life(path)

    check_sectors(bytes(life.handle.pread(SIZE, 0)), possible)
    life.end()


@pytest.fixture
def connect(path: Path, tmp_path: Path) -> Iterator[Callable[[], tuple[Server, NbdClient]]]:
    """Start servers of the same file, one after the other, and clients of them."""
    words = ("-U", "-", "--filter=cow", "memory", "1M", f"cow-file={path}", "cow-block-size=4k")
    with contextlib.ExitStack() as ends:

        def start() -> tuple[Server, NbdClient]:
            server = Server(*words, directory=tmp_path)
            ends.callback(server.kill)
            sock = ends.enter_context(server.connect())
            return server, NbdClient(sock).negotiate()

        yield start


@pytest.mark.parametrize("seed", range(3))
def test_D3_D9_a_server_that_is_killed_keeps_every_write_that_it_has_answered(
    seed: int, connect: Callable[[], tuple[Server, NbdClient]]
) -> None:
    chance = random.Random(seed)
    server, client = connect()
    sent = {sector: [bytes(SECTOR)] for sector in range((1 << 20) // SECTOR)}
    oldest = dict.fromkeys(sent, 0)  # which of them may still be there

    for left in range(chance.randint(3, 15), -1, -1):
        cookies = {}
        for sector in chance.sample(list(sent), 16):
            sent[sector].append(chance.randbytes(SECTOR))
            cookies[client.send(Command.WRITE, sector * SECTOR, data=sent[sector][-1])] = sector
        for cookie in client.replies(16 if left else chance.randint(0, 8)):
            oldest[cookies[cookie]] = len(sent[cookies[cookie]]) - 1
    server.kill()

    server, client = connect()
    for sector, versions in sent.items():
        assert client.read(sector * SECTOR, SECTOR) in versions[oldest[sector] :]
    client.disconnect()
    assert server.end() == []


# --- any requests ---------------------------------------------------------------------------------------------------


class KeptMachine(DiskMachine):
    size = SIZE
    largest = 30000

    def filters(self) -> Sequence[Cow]:
        self._directory = tempfile.TemporaryDirectory()
        unit = configured(Cow(), cow_block_size="4k", cow_file=f"{self._directory.name}/disk.cow")
        assert isinstance(unit, Cow)
        return [unit]

    def teardown(self) -> None:
        super().teardown()
        self._directory.cleanup()


TestKept = KeptMachine.TestCase
TestKept.settings = SETTINGS


def test_writers_on_several_connections_and_flushes_lose_nothing(path: Path) -> None:
    life = Life(path)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for round_number in range(1, 60):
                for position in range(number, SIZE, 4096 + 8):
                    write(life.handle, bytes([round_number]), position, Flags.FUA if position % 3 == 0 else 0)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert not failures
    expected = bytearray(CONTENT)
    for number in range(4):
        for position in range(number, SIZE, 4096 + 8):
            expected[position] = 59
    life.kill()
    life = Life(path)
    assert life.handle.pread(SIZE, 0) == expected
    life.end()

"""The cow filter: clients write what they like, and nothing of it reaches the plugin."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import (
    BlockSize,
    Client,
    ConfigError,
    Extent,
    ExtentType,
    FileRange,
    Filter,
    Flags,
    Handle,
    Plugin,
    Support,
    ThreadModel,
)
from nbdkitpy.stack import Stack
from nbdkitpy_filters.blocksize import Blocksize
from nbdkitpy_filters.cow import Cow, register_filters
from tests.filters.disk import CLIENT, SETTINGS, DiskMachine, configured, extents, memory, opened, read_now, write
from tests.serving import NoServer, make_stack, open_descriptors

PATIENCE = 20  # seconds; reached only if the filter is wrong
BLOCK = 4096
SIZE = 20 * BLOCK + 1000
CONTENT = random.Random(9).randbytes(SIZE)
HOLE = int(ExtentType.HOLE | ExtentType.ZERO)
UNBOUNDED = 0xFFFFFFFF


class Below(Handle):
    """A disk that keeps a record of how it is read, and that cannot be written."""

    size = SIZE
    sizes: BlockSize | None = None

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls

    def get_size(self) -> int:
        return self.size

    def block_size(self) -> BlockSize | None:
        return self.sizes

    def pread(self, count: int, offset: int) -> bytes:
        self.calls.append(("pread", count, offset))
        return CONTENT[offset : offset + count]


class Rich(Below):
    """Knows more than to read."""

    def cache(self, count: int, offset: int) -> None:
        self.calls.append(("cache", count, offset))

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self.calls.append(("extents", count, offset, flags))
        return [(0, 10 * BLOCK, ExtentType.ZERO), (10 * BLOCK, SIZE - 10 * BLOCK, 0)]


class Disks(Plugin):
    """Serves any name, and keeps a record of who opens what."""

    name = "disks"

    def __init__(self, kind: type[Below] = Below) -> None:
        super().__init__()
        self.kind = kind
        self.calls: list[tuple[Any, ...]] = []
        self.opened: list[tuple[str, bool]] = []

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.opened.append((export_name, readonly))
        return self.kind(self.calls)


@pytest.fixture(autouse=True)
def temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def serve() -> Iterator[Callable[..., Stack]]:
    """Make stacks of a plugin and the filter; at the end they are gone, and no file is open any more."""
    before = open_descriptors()
    stacks: list[Stack] = []

    def make(plugin: Plugin, **parameters: str) -> Stack:
        stack = make_stack(plugin, [configured(Cow(), **{"cow_block_size": "4k", **parameters})], NoServer())
        stacks.append(stack)
        return stack

    yield make
    for stack in stacks:
        stack.cleanup()
        stack.unload()
    assert open_descriptors() == before


Serve = Callable[..., Stack]


def connect(stack: Stack, name: str = "", *, readonly: bool = False) -> Handle:
    return stack.open(name, readonly, CLIENT).handle


def written(handle: Handle) -> bytes:
    """Write here and there, and return what the disk holds then."""
    content = bytearray(CONTENT)
    for position, length in [(BLOCK + 10, 20), (3 * BLOCK, BLOCK), (5 * BLOCK - 7, 2 * BLOCK), (SIZE - 3, 3)]:
        data = random.Random(position).randbytes(length)
        write(handle, data, position)
        content[position : position + length] = data
    return bytes(content)


# --- parameters -----------------------------------------------------------------------------------------------------


def test_registers_itself() -> None:
    found: list[type[Filter]] = []

    register_filters(found.append)

    assert found == [Cow]


@pytest.mark.parametrize(
    ("key", "text", "right"),
    [
        ("cow-block-size", "2k", "a power of two from 4k to 2G"),
        ("cow-block-size", "5000", "a power of two from 4k to 2G"),
        ("cow-block-size", "4G", "a power of two from 4k to 2G"),
        ("cow-block-size", "x", "a size such as 512, 10M or 1G"),
        ("cow-on-cache", "/x", "true or false (1, yes, on; 0, no, off)"),
        ("cow-on-read", "x", "true or false (1, yes, on; 0, no, off), or an absolute path"),
    ],
)
def test_what_cannot_be_is_refused(key: str, text: str, right: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Cow().config(key, text)

    assert str(refused.value) == f'cow: {key} must be {right}, not "{text}"'


def test_blocks_have_64_kib_if_nothing_is_said(serve: Serve) -> None:
    stack = make_stack(Disks(), [Cow()], NoServer())

    sizes = connect(stack).block_size()

    assert sizes == BlockSize(1, 65536, UNBOUNDED)


def test_a_directory_for_temporary_files_that_is_not_there_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))

    with pytest.raises(ConfigError, match=f"^cow: directory of temporary files {tmp_path}/none: No such file"):
        Cow().get_ready()


# --- what clients are told ------------------------------------------------------------------------------------------


def test_offers_all_whatever_the_plugin_can(serve: Serve) -> None:
    capabilities = serve(Disks()).open("", False, CLIENT).capabilities

    assert capabilities.size == SIZE
    assert capabilities.can_write
    assert capabilities.can_trim
    assert capabilities.can_flush
    assert capabilities.can_multi_conn
    assert capabilities.can_extents
    assert capabilities.can_fast_zero
    assert capabilities.can_zero is capabilities.can_fua is capabilities.can_cache is Support.NATIVE


@pytest.mark.parametrize(
    ("inner", "block", "told"),
    [
        (None, "4k", BlockSize(1, 4096, UNBOUNDED)),
        (None, "1M", BlockSize(1, 1 << 20, UNBOUNDED)),
        (None, "2G", BlockSize(1, 32 << 20, UNBOUNDED)),
        (BlockSize(512, 32768, 65536), "4k", BlockSize(512, 32768, 65536)),
        (BlockSize(512, 4096, 65536), "64k", BlockSize(512, 65536, 65536)),
        (BlockSize(512, 4096, 65536), "1M", BlockSize(512, 4096, 65536)),
        (BlockSize(65536, 65536, UNBOUNDED), "4k", BlockSize(65536, 65536, UNBOUNDED)),
    ],
)
def test_clients_are_told_what_the_plugin_demands_and_what_is_best(
    inner: BlockSize | None, block: str, told: BlockSize, serve: Serve
) -> None:
    class Some(Below):
        sizes = inner

    assert connect(serve(Disks(Some), cow_block_size=block)).block_size() == told


def test_the_plugin_is_opened_read_only(serve: Serve) -> None:
    plugin = Disks()

    connect(serve(plugin), "x")

    assert plugin.opened == [("x", True)]


# --- reading and writing --------------------------------------------------------------------------------------------


def test_what_is_written_is_read_by_all_connections_and_the_plugin_keeps_what_it_has(serve: Serve) -> None:
    stack = serve(Disks())
    one, other = connect(stack), connect(stack)

    content = written(one)

    assert other.pread(SIZE, 0) == content
    for offset in range(0, SIZE, 1000):
        assert other.pread(min(3333, SIZE - offset), offset) == content[offset : offset + 3333]
    one.close()
    assert connect(stack, readonly=True).pread(SIZE, 0) == content


def test_a_long_range_that_nobody_wrote_is_read_in_one_call(serve: Serve) -> None:
    plugin = Disks()
    handle = connect(serve(plugin))

    data = handle.pread(SIZE - 100, 50)

    assert data == CONTENT[50:-50]
    assert plugin.calls == [("pread", SIZE - 100, 50)]


def test_a_long_range_that_was_written_is_read_in_one_call(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Disks()
    handle = connect(serve(plugin))
    write(handle, CONTENT[::-1], 0)
    reads: list[int] = []
    pread = os.pread

    def counted(fd: int, count: int, offset: int) -> bytes:
        reads.append(count)
        return pread(fd, count, offset)

    monkeypatch.setattr(os, "pread", counted)

    data = handle.pread(SIZE - 100, 50)

    assert data == CONTENT[::-1][50:-50]
    assert reads == [SIZE - 100]
    assert plugin.calls == []


@pytest.mark.parametrize(
    ("count", "offset", "reads"),
    [
        (BLOCK, BLOCK, []),
        (3 * BLOCK, 0, []),
        (10, BLOCK + 10, [(BLOCK, BLOCK)]),
        (10, BLOCK, [(BLOCK - 10, BLOCK + 10)]),
        (10, 2 * BLOCK - 10, [(BLOCK - 10, BLOCK)]),
        (2 * BLOCK, 100, [(100, 0), (BLOCK - 100, 2 * BLOCK + 100)]),
        (1000, 20 * BLOCK, []),
        (10, 20 * BLOCK, [(990, 20 * BLOCK + 10)]),
        (SIZE, 0, []),
    ],
)
def test_only_what_a_write_leaves_of_its_blocks_is_read_before(
    count: int, offset: int, reads: list[tuple[int, int]], serve: Serve
) -> None:
    plugin = Disks()
    handle = connect(serve(plugin))

    write(handle, b"x" * count, offset)
    before = [call[1:] for call in plugin.calls]
    write(handle, b"y" * count, offset)

    assert before == reads
    assert len(plugin.calls) == len(reads)
    assert handle.pread(SIZE, 0) == CONTENT[:offset] + b"y" * count + CONTENT[offset + count :]


def test_reads_below_keep_to_the_maximum_of_the_plugin(serve: Serve) -> None:
    class Small(Below):
        sizes = BlockSize(512, 4096, 8192)

    plugin = Disks(Small)
    handle = connect(serve(plugin, cow_block_size="16k"))

    write(handle, b"x" * 512, 1024)

    assert [call[1:] for call in plugin.calls] == [(8192, 0), (8192, 8192)]
    assert handle.pread(4096, 0) == CONTENT[:1024] + b"x" * 512 + CONTENT[1536:4096]


def test_CVE_2022_0485_an_error_below_is_the_error_of_that_request_and_changes_nothing(serve: Serve) -> None:
    class Broken(Below):
        broken = True

        def pread(self, count: int, offset: int) -> bytes:
            if self.broken and offset < BLOCK:
                raise OSError(errno.EIO, "bad sector")
            return super().pread(count, offset)

    handle = connect(serve(Disks(Broken)))

    with pytest.raises(OSError, match="bad sector"):
        write(handle, b"x", 10)
    with pytest.raises(OSError, match="bad sector"):
        write(handle, b"x" * BLOCK, 10)
    write(handle, b"x" * BLOCK, BLOCK)
    with pytest.raises(OSError, match="bad sector"):
        handle.pread(2 * BLOCK, 0)

    Broken.broken = False
    assert handle.pread(SIZE, 0) == CONTENT[:BLOCK] + b"x" * BLOCK + CONTENT[2 * BLOCK :]


@pytest.mark.parametrize("wrong", [b"", bytes(BLOCK + 1), None, "text"])
def test_a_read_below_of_the_wrong_length_fails_and_nothing_is_written(wrong: Any, serve: Serve) -> None:
    class Wrong(Below):
        def pread(self, count: int, offset: int) -> Any:
            return wrong

    handle = connect(serve(Disks(Wrong)))

    with pytest.raises((ValueError, TypeError)):
        write(handle, b"x", 10)
    write(handle, b"x" * BLOCK, BLOCK)
    with pytest.raises((ValueError, TypeError)):
        handle.pread(2 * BLOCK, 0)

    assert extents(handle, 2 * BLOCK) == [Extent(0, 2 * BLOCK, 0)]


# --- the overlay ----------------------------------------------------------------------------------------------------


def test_the_overlay_has_no_name_and_takes_space_for_what_was_written(serve: Serve, tmp_path: Path) -> None:
    handle = connect(serve(memory(1 << 40), cow_block_size="64k"))
    before = open_descriptors()

    write(handle, b"x", 1 << 39)

    (number,) = open_descriptors() - before
    overlay = os.readlink(f"/proc/self/fd/{number}")
    assert os.listdir(tmp_path) == []
    assert Path(overlay).parent == tmp_path
    assert os.stat(f"/proc/self/fd/{number}").st_blocks * 512 <= 128 << 10


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_overlay_that_is_full_fails_that_request_only(
    number: int, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = connect(serve(Disks()))
    write(handle, b"x" * 10, 0)

    def full(fd: int, parts: Sequence[bytes], offset: int) -> int:
        raise OSError(number, "full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        with pytest.raises(OSError, match="full") as failed:
            write(handle, b"y", BLOCK)
        with pytest.raises(OSError, match="full"):
            handle.zero(BLOCK, 2 * BLOCK, 0)

    assert failed.value.errno == number
    assert handle.pread(SIZE, 0) == b"x" * 10 + CONTENT[10:]
    write(handle, b"y", BLOCK)
    assert handle.pread(1, BLOCK) == b"y"


def test_a_file_system_that_writes_and_reads_less_than_it_was_asked_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: pwrite(fd, bytes(parts[0])[:100], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: pread(fd, min(count, 1000), offset))
    handle = connect(serve(Disks()))

    content = written(handle)

    assert handle.pread(SIZE, 0) == content


def test_a_file_system_that_takes_and_gives_nothing_more_is_no_endless_loop(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = connect(serve(Disks()))
    write(handle, b"x", 0)

    monkeypatch.setattr(os, "pwritev", lambda fd, parts, offset: 0)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: b"")

    with pytest.raises(OSError, match="nothing could be written"):
        write(handle, b"x", 0)
    with pytest.raises(OSError, match="has become shorter"):
        handle.pread(1, 0)


def test_each_export_has_its_own_overlay(serve: Serve) -> None:
    stack = serve(Disks())
    one, other = connect(stack, "one"), connect(stack, "other")

    write(one, b"1", 0)
    write(other, b"2", 0)

    assert connect(stack, "one").pread(1, 0) == b"1"
    assert connect(stack, "other").pread(1, 0) == b"2"
    assert connect(stack, "third").pread(1, 0) == CONTENT[:1]


def test_names_that_are_only_opened_leave_nothing_behind(serve: Serve) -> None:
    stack = serve(Disks())
    before = open_descriptors()

    for number in range(100):
        handle = connect(stack, str(number))
        handle.pread(10, 0)
        handle.close()
    busy = connect(stack, "busy")
    written(busy)
    busy.close()

    (unit,) = stack.filters
    assert list(vars(unit)["_overlays"]) == ["busy"]
    assert len(open_descriptors() - before) == 1


def test_a_handle_that_is_closed_twice_gives_the_overlay_back_once(serve: Serve) -> None:
    stack = serve(Disks())
    one, other = connect(stack), connect(stack)

    one.close()
    one.close()
    write(other, b"x", 0)

    assert connect(stack).pread(1, 0) == b"x"


def test_a_disk_that_has_changed_its_size_is_refused(serve: Serve) -> None:
    class Growing(Below):
        size = SIZE

    plugin = Disks(Growing)
    stack = serve(plugin)
    written(connect(stack))
    Growing.size = SIZE + 1

    with pytest.raises(OSError, match=f"the disk below has {SIZE + 1} bytes, where it had {SIZE}"):
        connect(stack)


def test_flush_and_fua_of_what_is_thrown_away_need_not_reach_the_disk(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: list[int] = []
    monkeypatch.setattr(os, "fdatasync", syncs.append)
    handle = connect(serve(Disks()))

    write(handle, b"x", 0, Flags.FUA)
    handle.zero(1, 1, Flags.FUA)
    handle.trim(1, 2, Flags.FUA)
    handle.flush()

    assert syncs == []


# --- zeroes and holes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["trim", "zero"])
@pytest.mark.parametrize(
    ("count", "offset"), [(BLOCK, BLOCK), (5 * BLOCK, 100), (10, 10), (SIZE, 0), (2000, SIZE - 2000)]
)
def test_what_is_zeroed_or_trimmed_reads_as_zeroes(verb: str, count: int, offset: int, serve: Serve) -> None:
    handle = connect(serve(Disks()))
    content = written(handle)

    getattr(handle, verb)(count, offset, Flags.MAY_TRIM if verb == "zero" else 0)

    assert handle.pread(SIZE, 0) == content[:offset] + bytes(count) + content[offset + count :]


def test_whole_blocks_that_are_zeroed_take_no_space(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Disks()
    handle = connect(serve(plugin))
    monkeypatch.setattr(os, "pwritev", None)

    handle.zero(3 * BLOCK, BLOCK, Flags.MAY_TRIM | Flags.FAST_ZERO)
    handle.trim(BLOCK + 1000, 19 * BLOCK, 0)

    assert plugin.calls == []
    assert extents(handle, SIZE) == [
        Extent(0, BLOCK, 0),
        Extent(BLOCK, 3 * BLOCK, HOLE),
        Extent(4 * BLOCK, 15 * BLOCK, 0),
        Extent(19 * BLOCK, BLOCK + 1000, HOLE),
    ]


def test_a_part_of_a_block_of_zeroes_can_be_written(serve: Serve) -> None:
    plugin = Disks()
    handle = connect(serve(plugin))
    handle.trim(3 * BLOCK, 0, 0)

    write(handle, b"x", BLOCK + 5)

    assert handle.pread(3 * BLOCK, 0) == bytes(BLOCK + 5) + b"x" + bytes(2 * BLOCK - 6)
    assert plugin.calls == []
    assert extents(handle, 3 * BLOCK) == [
        Extent(0, BLOCK, HOLE),
        Extent(BLOCK, BLOCK, 0),
        Extent(2 * BLOCK, BLOCK, HOLE),
    ]


def test_zeroes_that_may_be_no_hole_are_written(serve: Serve) -> None:
    handle = connect(serve(Disks()))

    handle.zero(2 * BLOCK, BLOCK, 0)

    assert handle.pread(2 * BLOCK, BLOCK) == bytes(2 * BLOCK)
    assert extents(handle, SIZE) == [Extent(0, SIZE, 0)]


@pytest.mark.parametrize(
    ("count", "offset", "flags"), [(BLOCK, 0, 0), (10, 0, Flags.MAY_TRIM), (3 * BLOCK, 1, Flags.MAY_TRIM)]
)
def test_a_fast_zero_that_would_write_fails_at_once(count: int, offset: int, flags: int, serve: Serve) -> None:
    handle = connect(serve(Disks()))

    with pytest.raises(OSError, match="would have to be written") as failed:
        handle.zero(count, offset, flags | Flags.FAST_ZERO)

    assert failed.value.errno == errno.ENOTSUP
    assert handle.pread(SIZE, 0) == CONTENT


def test_what_is_too_much_to_remember_is_refused_or_if_a_hint_ignored(serve: Serve) -> None:
    handle = connect(serve(memory((1 << 63) - 1)))

    handle.trim(1 << 62, 0, 0)
    with pytest.raises(OSError, match="more than can be zeroed at once") as failed:
        handle.zero(1 << 62, 0, Flags.MAY_TRIM)

    assert failed.value.errno == errno.ENOMEM
    handle.zero(1 << 40, 1 << 62, Flags.MAY_TRIM)
    assert extents(handle, 1 << 62, 1 << 62) == [Extent(1 << 62, (1 << 62), HOLE)]


def test_extents_are_those_of_the_plugin_where_nothing_was_written(serve: Serve) -> None:
    plugin = Disks(Rich)
    handle = connect(serve(plugin))
    write(handle, b"x", 5 * BLOCK)

    found = extents(handle, SIZE - 100, 100)
    (one,) = extents(handle, SIZE - 100, 100, Flags.REQ_ONE)

    assert found == [
        Extent(100, 5 * BLOCK - 100, ExtentType.ZERO),
        Extent(5 * BLOCK, BLOCK, 0),
        Extent(6 * BLOCK, 4 * BLOCK, ExtentType.ZERO),
        Extent(10 * BLOCK, SIZE - 10 * BLOCK, 0),
    ]
    assert one == found[0]
    assert [call for call in plugin.calls if call[0] == "extents"] == [
        ("extents", 5 * BLOCK - 100, 100, 0),
        ("extents", SIZE - 6 * BLOCK, 6 * BLOCK, 0),
        ("extents", 5 * BLOCK - 100, 100, Flags.REQ_ONE),
    ]


def test_extents_end_where_those_of_the_plugin_do(serve: Serve) -> None:
    class Short(Rich):
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            return [(0, BLOCK, 0)]

    handle = connect(serve(Disks(Short)))
    write(handle, b"x", 5 * BLOCK)

    assert extents(handle, SIZE) == [Extent(0, BLOCK, 0)]


# --- copying what is read -------------------------------------------------------------------------------------------


def test_what_is_read_is_copied_if_asked_for(serve: Serve) -> None:
    plugin = Disks()
    handle = connect(serve(plugin, cow_on_read="true"))

    first, second = handle.pread(2 * BLOCK, 100), handle.pread(3 * BLOCK, 0)

    assert first == CONTENT[100 : 2 * BLOCK + 100]
    assert second == CONTENT[: 3 * BLOCK]
    assert [call[1:] for call in plugin.calls] == [(3 * BLOCK, 0)]


def test_what_is_read_is_copied_while_the_file_exists(serve: Serve, tmp_path: Path) -> None:
    switch = tmp_path / "switch"
    plugin = Disks()
    handle = connect(serve(plugin, cow_on_read=str(switch)))

    handle.pread(10, 0)
    switch.touch()
    handle.pread(10, 0)
    handle.pread(10, 0)
    switch.unlink()
    handle.pread(10, BLOCK)

    assert [call[1:] for call in plugin.calls] == [(10, 0), (BLOCK, 0), (10, BLOCK)]


@pytest.mark.parametrize("what", ["the overlay", "the rest of the block"])
def test_a_read_does_not_fail_because_it_cannot_be_copied(
    what: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Below):
        def pread(self, count: int, offset: int) -> bytes:
            if what == "the rest of the block" and count > 10:
                raise OSError(errno.EIO, "bad sector")
            return super().pread(count, offset)

    def full(fd: int, parts: Sequence[bytes], offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwritev", full)

    assert connect(serve(Disks(Broken), cow_on_read="true")).pread(10, 0) == CONTENT[:10]


def test_what_is_prefetched_is_copied_if_asked_for(serve: Serve) -> None:
    plugin = Disks(Rich)
    handle = connect(serve(plugin, cow_on_cache="true"))

    handle.cache(2 * BLOCK, 100)
    handle.cache(2 * BLOCK, 100)

    assert plugin.calls == [("pread", 3 * BLOCK, 0)]
    assert handle.pread(3 * BLOCK, 0) == CONTENT[: 3 * BLOCK]
    assert len(plugin.calls) == 1


def test_prefetches_are_passed_on_where_nothing_was_written(serve: Serve) -> None:
    plugin = Disks(Rich)
    handle = connect(serve(plugin))
    write(handle, bytes(BLOCK), BLOCK)
    handle.trim(BLOCK, 3 * BLOCK, 0)

    handle.cache(5 * BLOCK, 100)

    assert plugin.calls == [
        ("cache", BLOCK - 100, 100),
        ("cache", BLOCK, 2 * BLOCK),
        ("cache", BLOCK + 100, 4 * BLOCK),
    ]


def test_prefetches_do_nothing_where_the_plugin_has_none(serve: Serve) -> None:
    plugin = Disks()

    connect(serve(plugin)).cache(5 * BLOCK, 100)

    assert plugin.calls == []


def test_long_ranges_are_copied_in_pieces(serve: Serve) -> None:
    class Long(Below):
        size = 3 << 20

        def pread(self, count: int, offset: int) -> bytes:
            self.calls.append(("pread", count, offset))
            return bytes(count)

    plugin = Disks(Long)
    handle = connect(serve(plugin, cow_on_cache="true"))

    handle.cache(5 << 19, 0)

    assert [call[1:] for call in plugin.calls] == [(1 << 20, 0), (1 << 20, 1 << 20), (1 << 19, 2 << 20)]


# --- ways round pread -----------------------------------------------------------------------------------------------


class Nearby(Below):
    """Can be read without waiting, but for its second half."""

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        if offset < SIZE // 2:
            buffer[:] = self.pread(len(buffer), offset)
        return offset < SIZE // 2

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return FileRange(99, offset)


def test_reads_without_waiting_know_where_each_block_is(serve: Serve) -> None:
    handle = connect(serve(Disks(Nearby)))
    write(handle, b"x" * 100, BLOCK)
    handle.trim(BLOCK, 2 * BLOCK, 0)

    assert read_now(handle, 10, 10) == CONTENT[10:20]
    assert read_now(handle, 10, SIZE - 10) is None
    assert read_now(handle, 10, BLOCK + 95) in (None, b"xxxxx" + CONTENT[BLOCK + 100 : BLOCK + 105])
    assert read_now(handle, 10, 2 * BLOCK) == bytes(10)
    assert read_now(handle, BLOCK, 10) is None  # of two kinds


def test_reads_of_a_disk_in_memory_do_not_wait_where_nothing_was_written(serve: Serve) -> None:
    handle = connect(serve(memory(SIZE)))

    assert read_now(handle, 10, 0) == bytes(10)


def test_data_are_sent_from_the_file_that_they_are_in(serve: Serve) -> None:
    handle = connect(serve(Disks(Nearby)))
    write(handle, b"x" * BLOCK, BLOCK)
    handle.trim(BLOCK, 2 * BLOCK, 0)
    assert handle.file_range is not None

    assert handle.file_range(10, 10) == FileRange(99, 10)
    assert handle.file_range(10, 2 * BLOCK) is None
    assert handle.file_range(BLOCK, 10) is None
    overlay = handle.file_range(BLOCK, BLOCK)
    assert overlay is None or os.pread(overlay.fd, BLOCK, overlay.position) == b"x" * BLOCK


@pytest.mark.parametrize("missing", [BlockingIOError(), OSError(errno.EOPNOTSUPP, ""), AttributeError()])
def test_what_is_not_at_hand_is_left_to_a_read_that_may_wait(
    missing: Exception, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = connect(serve(Disks(Nearby)))
    write(handle, b"x" * BLOCK, BLOCK)
    assert handle.file_range is not None

    def preadv(*_: object) -> int:
        raise missing

    monkeypatch.setattr(os, "preadv", preadv)

    assert read_now(handle, 10, BLOCK) is None
    assert handle.file_range(10, BLOCK) is None


def test_there_is_no_way_round_pread_that_the_plugin_has_not_or_that_would_not_copy(serve: Serve) -> None:
    for handle in (connect(serve(Disks())), connect(serve(Disks(Nearby), cow_on_read="true"))):
        assert (handle.pread_into, handle.file_range, handle.sparse) == (None, None, False)


# --- connections ----------------------------------------------------------------------------------------------------


class Racing(Below):
    """A disk whose reads can be held up."""

    reading = threading.Event()
    may_go_on = threading.Event()

    def pread(self, count: int, offset: int) -> bytes:
        data = super().pread(count, offset)
        self.reading.set()
        assert self.may_go_on.wait(PATIENCE)
        return data


@pytest.mark.parametrize("first", ["part of a block", "copy"])
@pytest.mark.parametrize(
    "second",
    [
        lambda handle: write(handle, b"B" * BLOCK, 0),
        lambda handle: write(handle, b"B" * 5, 600),
        lambda handle: handle.trim(BLOCK, 0, 0),
    ],
    ids=["whole block", "another part", "trim"],
)
def test_D8_nbdkit_539246ea_what_is_written_while_the_block_is_being_fetched_is_not_lost(
    first: str, second: Callable[[Handle], None], serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Racing, "reading", threading.Event())
    monkeypatch.setattr(Racing, "may_go_on", threading.Event())
    stack = serve(Disks(Racing), cow_on_cache="true")
    one, other = connect(stack), connect(stack)
    (unit,) = stack.filters
    (overlay,) = vars(unit)["_overlays"].values()
    waits = _watch(overlay.blocks)
    fetch = (lambda: write(one, b"A" * 10, 100)) if first == "part of a block" else (lambda: one.cache(10, 0))
    threads = [threading.Thread(target=fetch), threading.Thread(target=lambda: second(other))]
    expected = bytearray(CONTENT[:BLOCK])
    if first == "part of a block":
        expected[100:110] = b"A" * 10

    threads[0].start()
    assert Racing.reading.wait(PATIENCE)
    threads[1].start()
    assert waits.acquire(timeout=PATIENCE)
    Racing.may_go_on.set()
    for thread in threads:
        thread.join(PATIENCE)

    second(_Model(expected))
    assert other.pread(BLOCK, 0) == expected


class _Model(Handle):
    """Does to bytes what a handle does to a disk."""

    def __init__(self, content: bytearray) -> None:
        self._content = content

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._content[offset : offset + len(data)] = data

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._content[offset : offset + count] = bytes(count)


def _watch(lock: Any) -> threading.Semaphore:
    """Return what is released whenever somebody begins to wait for a range."""
    waits = threading.Semaphore(0)
    condition = lock._changed
    wait = condition.wait

    def watched(timeout: float | None = None) -> bool:
        waits.release()
        return bool(wait(timeout))

    condition.wait = watched
    return waits


def test_D8_nbdkit_539246ea_writers_of_parts_of_the_same_blocks_lose_nothing(serve: Serve) -> None:
    stack = serve(memory(16 * BLOCK), cow_on_read="true")
    handles = [connect(stack) for _ in range(2)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        mine = bytearray(16 * BLOCK // 8)  # every eighth byte
        try:
            for _ in range(150):
                index = chance.randrange(len(mine))
                position, byte = index * 8 + number, chance.randrange(256)
                write(handles[number % 2], bytes([byte]), position)
                mine[index] = byte
                assert handles[1 - number % 2].pread(1, position) == bytes([byte])
            for block in range(16):
                data = bytes(handles[0].pread(BLOCK, block * BLOCK))
                assert data[number::8] == mine[block * BLOCK // 8 : (block + 1) * BLOCK // 8]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert not failures


# --- any requests ---------------------------------------------------------------------------------------------------


class CowMachine(DiskMachine):
    size = 300 * 512 + 100
    largest = 60000

    def filters(self) -> Sequence[Filter]:
        return [configured(Cow(), cow_block_size="4k")]


class CopyingMachine(CowMachine):
    def filters(self) -> Sequence[Filter]:
        return [configured(Cow(), cow_block_size="8k", cow_on_read="true", cow_on_cache="true")]


class StackedMachine(CowMachine):
    """Blocks above are smaller, those below larger than what the overlay has."""

    size = 5 << 16

    def filters(self) -> Sequence[Filter]:
        above = configured(Blocksize(), minblock="512")
        below = configured(Blocksize(), minblock="16k", maxdata="16k", maxlen="32k")
        return [above, configured(Cow(), cow_block_size="4k"), below]


TestCow = CowMachine.TestCase
TestCow.settings = SETTINGS
TestCopying = CopyingMachine.TestCase
TestCopying.settings = SETTINGS
TestStacked = StackedMachine.TestCase
TestStacked.settings = SETTINGS


def test_two_overlays_on_top_of_each_other(serve: Serve) -> None:
    inner, outer = configured(Cow(), cow_block_size="8k"), configured(Cow(), cow_block_size="4k")

    handle = opened(Disks(), outer, inner)

    assert handle.pread(SIZE, 0) == CONTENT
    content = written(handle)
    assert handle.pread(SIZE, 0) == content
    for unit in (outer, inner):
        unit.unload()

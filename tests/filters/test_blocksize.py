"""The blocksize filter: whatever clients ask for, the plugin gets whole blocks, and the right bytes."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from nbdkitpy import BlockSize, ConfigError, Extent, ExtentType, FileRange, Filter, Flags, Handle, Support
from nbdkitpy_filters.blocksize import Blocksize, register_filters
from tests.filters.disk import SETTINGS, DiskMachine, configured, extents, memory, opened, read_now, write
from tests.serving import Disks

PATIENCE = 20  # seconds; reached only if the filter is wrong
SIZE = 1 << 20
CONTENT = random.Random(7).randbytes(SIZE)
HOLE = int(ExtentType.HOLE | ExtentType.ZERO)
UNBOUNDED = 0xFFFFFFFF


class Sectors(Handle):
    """A disk that keeps a record of what it was asked for."""

    size = SIZE
    sizes: BlockSize | None = None
    fua = Support.NATIVE

    def __init__(self, plugin: Disks | None = None) -> None:
        self.content = bytearray(CONTENT)
        self.calls: list[tuple[Any, ...]] = []
        self.known = [Extent(0, SIZE)]

    def get_size(self) -> int:
        return self.size

    def block_size(self) -> BlockSize | None:
        return self.sizes

    def can_fua(self) -> Support:
        return self.fua

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        self.calls.append(("pread", count, offset))
        return bytes(self.content[offset : offset + count])

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.calls.append(("pwrite", len(data), offset, flags))
        self.content[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.calls.append(("flush",))

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("trim", count, offset, flags))

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset, flags))
        self.content[offset : offset + count] = bytes(count)

    def cache(self, count: int, offset: int) -> None:
        self.calls.append(("cache", count, offset))

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self.calls.append(("extents", count, offset, flags))
        found = [extent for extent in self.known if extent.offset + extent.length > offset]
        return found[:1] if flags & Flags.REQ_ONE else found


class Huge(Sectors):
    size = (1 << 63) - (1 << 16)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset, flags))


def filtered(kind: type[Sectors] = Sectors, **parameters: str) -> tuple[Handle, Sectors]:
    """A disk through the filter, and the disk itself."""
    disk = kind()
    given = {key: text for key, text in parameters.items() if text}
    return opened(Disks(lambda _: disk), configured(Blocksize(), **given)), disk


# --- parameters -----------------------------------------------------------------------------------------------------


def test_registers_itself() -> None:
    found: list[type[Filter]] = []

    register_filters(found.append)

    assert found == [Blocksize]


@pytest.mark.parametrize(
    ("key", "text", "right"),
    [
        ("minblock", "3", "a power of two from 1 to 64k"),
        ("minblock", "0", "a power of two from 1 to 64k"),
        ("minblock", "128k", "a power of two from 1 to 64k"),
        ("minblock", "x", "a size such as 512, 10M or 1G"),
        ("maxdata", "0", "a size from 1 to 4294967295 bytes"),
        ("maxdata", "4G", "a size from 1 to 4294967295 bytes"),
        ("maxlen", "8G", "a size from 1 to 4294967295 bytes"),
    ],
)
def test_what_cannot_be_is_refused(key: str, text: str, right: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Blocksize().config(key, text)

    assert str(refused.value) == f'blocksize: {key} must be {right}, not "{text}"'


@pytest.mark.parametrize("key", ["maxdata", "maxlen"])
def test_limits_have_to_be_multiples_of_the_block(key: str) -> None:
    unit = configured(Blocksize(), minblock="1k", **{key: "512"})

    with pytest.raises(ConfigError, match=f"^blocksize: {key} must be a multiple of minblock, 1024, not 512$"):
        unit.config_complete()


def test_limits_without_minblock_may_be_anything() -> None:
    configured(Blocksize(), maxdata="1001", maxlen="77").config_complete()


# --- what clients are told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inner", "minblock", "told"),
    [
        (None, "1", BlockSize(1, 4096, UNBOUNDED)),
        (None, "64k", BlockSize(1, 65536, UNBOUNDED)),
        (BlockSize(512, 32768, 65536), "4k", BlockSize(1, 32768, UNBOUNDED)),
    ],
)
def test_clients_may_ask_for_anything(inner: BlockSize | None, minblock: str, told: BlockSize) -> None:
    class Some(Sectors):
        sizes = inner

    handle, _ = filtered(Some, minblock=minblock)

    assert handle.block_size() == told


@pytest.mark.parametrize(("minblock", "inner", "size"), [("1", 1, 1000001), ("512", 1, 999936), ("1", 4096, 999424)])
def test_size_is_rounded_down_to_blocks(minblock: str, inner: int, size: int) -> None:
    class Odd(Sectors):
        size = 1000001
        sizes = BlockSize(inner, 4096, UNBOUNDED)

    handle, _ = filtered(Odd, minblock=minblock)

    assert handle.get_size() == size


@pytest.mark.parametrize(("minblock", "maxdata"), [("", ""), ("1", "1M")])
def test_limits_of_the_plugin_hold_where_none_or_larger_ones_are_given(minblock: str, maxdata: str) -> None:
    class Small(Sectors):
        sizes = BlockSize(512, 4096, 65536)

    handle, disk = filtered(Small, minblock=minblock, maxdata=maxdata)

    handle.pread(100, 65500)
    handle.pread(65536, 1024)
    write(handle, bytes(100000), 0)

    assert disk.calls[:2] == [("pread", 1024, 65024), ("pread", 65536, 1024)]
    assert all(call[1] <= 65536 and call[1] % 512 == call[2] % 512 == 0 for call in disk.calls)


def test_a_limit_is_rounded_down_to_blocks_of_the_plugin() -> None:
    class Small(Sectors):
        sizes = BlockSize(512, 4096, 65536)

    handle, disk = filtered(Small, maxdata="1000", maxlen="100")

    handle.pread(1024, 0)
    handle.trim(1024, 0, 0)

    assert disk.calls == [
        ("pread", 512, 0),
        ("pread", 512, 512),
        ("trim", 512, 0, 0),
        ("trim", 512, 512, 0),
    ]


def test_a_block_that_the_plugin_cannot_take_refuses_the_export() -> None:
    class Small(Sectors):
        sizes = BlockSize(512, 4096, 4096)

    with pytest.raises(OSError, match="minblock=8192 is more than the 4096 bytes") as refused:
        filtered(Small, minblock="8k")

    assert refused.value.errno == errno.EINVAL


# --- what the plugin gets -------------------------------------------------------------------------------------------


def test_what_keeps_to_the_limits_is_passed_on_as_it_is() -> None:
    handle, disk = filtered(minblock="512", maxdata="4k")

    data = handle.pread(4096, 512)
    write(handle, b"x" * 1024, 1024, Flags.FUA)
    handle.zero(512, 0, Flags.FUA | Flags.FAST_ZERO)
    handle.trim(512, 512, Flags.FUA)
    handle.cache(512, 512)

    assert data == CONTENT[512:4608]
    assert disk.calls == [
        ("pread", 4096, 512),
        ("pwrite", 1024, 1024, Flags.FUA),
        ("zero", 512, 0, Flags.FUA | Flags.FAST_ZERO),
        ("trim", 512, 512, Flags.FUA),
        ("cache", 512, 512),
    ]


def test_a_read_is_widened_to_blocks_and_cut_into_pieces() -> None:
    handle, disk = filtered(minblock="512", maxdata="1k")

    data = handle.pread(2000, 700)

    assert data == CONTENT[700:2700]
    assert disk.calls == [("pread", 1024, 512), ("pread", 1024, 1536), ("pread", 512, 2560)]


def test_a_write_within_a_block_reads_and_writes_the_block() -> None:
    handle, disk = filtered(minblock="512")

    write(handle, b"abc", 1000)

    assert disk.calls == [("pread", 512, 512), ("pwrite", 512, 512, 0)]
    assert disk.content[500:1100] == CONTENT[500:1000] + b"abc" + CONTENT[1003:1100]


def test_a_write_across_blocks_reads_only_those_that_it_covers_in_part() -> None:
    handle, disk = filtered(minblock="512", maxdata="1k")

    write(handle, b"x" * 3000, 500)

    assert disk.calls == [
        ("pread", 512, 0),
        ("pwrite", 512, 0, 0),
        ("pread", 512, 3072),
        ("pwrite", 512, 3072, 0),
        ("pwrite", 1024, 512, 0),
        ("pwrite", 1024, 1536, 0),
        ("pwrite", 512, 2560, 0),
    ]
    assert disk.content[:4000] == CONTENT[:500] + b"x" * 3000 + CONTENT[3500:4000]


def test_edges_of_a_zero_are_written_and_the_rest_is_zeroed_in_pieces() -> None:
    handle, disk = filtered(minblock="512", maxlen="1k")

    handle.zero(2560, 500, Flags.MAY_TRIM)

    assert [call for call in disk.calls if call[0] != "pread"] == [
        ("pwrite", 512, 0, 0),
        ("pwrite", 512, 2560, 0),
        ("zero", 1024, 512, Flags.MAY_TRIM),
        ("zero", 1024, 1536, Flags.MAY_TRIM),
    ]
    assert disk.content[:4000] == CONTENT[:500] + bytes(2560) + CONTENT[3060:4000]


@pytest.mark.parametrize(("count", "offset"), [(1, 0), (513, 512), (512, 1), (100, 100)])
def test_a_fast_zero_that_would_write_a_part_of_a_block_fails_at_once(count: int, offset: int) -> None:
    handle, disk = filtered(minblock="512")

    with pytest.raises(OSError, match="would have to be written") as failed:
        handle.zero(count, offset, Flags.FAST_ZERO | Flags.MAY_TRIM)

    assert failed.value.errno == errno.ENOTSUP
    assert disk.calls == []


def test_edges_of_a_trim_are_left_alone() -> None:
    handle, disk = filtered(minblock="512", maxlen="1k")

    handle.trim(2560, 500, 0)
    handle.trim(500, 100, Flags.FUA)

    assert disk.calls == [("trim", 1024, 512, 0), ("trim", 1024, 1536, 0)]


def test_a_prefetch_is_widened_and_cut_into_pieces() -> None:
    handle, disk = filtered(minblock="512", maxlen="1k")

    handle.cache(1500, 511)

    assert disk.calls == [("cache", 1024, 0), ("cache", 1024, 1024)]


def test_CVE_2025_47712_a_request_of_4_gib_less_one_is_cut_where_32_bits_end() -> None:
    handle, disk = filtered(Huge, minblock="512")

    handle.trim(UNBOUNDED, 512, 0)
    handle.zero(1 << 33, 512, Flags.MAY_TRIM)
    handle.cache(UNBOUNDED, 1)

    most = UNBOUNDED - 511
    assert disk.calls == [
        ("trim", most, 512, 0),
        ("zero", most, 512, Flags.MAY_TRIM),
        ("zero", most, 512 + most, Flags.MAY_TRIM),
        ("zero", 1024, 512 + 2 * most, Flags.MAY_TRIM),
        ("cache", most, 0),
        ("cache", 512, most),
    ]


class Poor(Sectors):
    """Neither zeroes nor prefetches by itself."""

    def can_zero(self) -> Support:
        return Support.EMULATE

    def can_cache(self) -> Support:
        return Support.EMULATE


def test_what_stands_in_for_zero_and_cache_keeps_to_the_limit_of_data_too() -> None:
    handle, disk = filtered(Poor, minblock="512", maxdata="1k")

    handle.zero(2048, 0, 0)
    handle.cache(2048, 0)

    assert disk.calls == [
        ("pwrite", 1024, 0, 0),
        ("pwrite", 1024, 1024, 0),
        ("pread", 1024, 0),
        ("pread", 1024, 1024),
    ]


# --- FUA ------------------------------------------------------------------------------------------------------------


class NoFua(Sectors):
    """Has to be flushed after each request that is to be durable."""

    fua = Support.EMULATE


REQUESTS: dict[str, Callable[[Handle, int], None]] = {
    "pwrite": lambda handle, flags: write(handle, b"x" * 3000, 500, flags),
    "zero": lambda handle, flags: handle.zero(3000, 500, flags),
    "trim": lambda handle, flags: handle.trim(3000, 500, flags),
}


@pytest.mark.parametrize("verb", REQUESTS)
def test_each_part_is_durable_if_the_plugin_can_do_that(verb: str) -> None:
    handle, disk = filtered(minblock="512", maxdata="1k", maxlen="1k")

    REQUESTS[verb](handle, Flags.FUA)

    changes = [call for call in disk.calls if call[0] != "pread"]
    assert len(changes) >= 3
    assert all(call[3] & Flags.FUA for call in changes)


@pytest.mark.parametrize("verb", REQUESTS)
def test_D2_all_parts_are_made_durable_by_one_flush_after_the_last(verb: str) -> None:
    handle, disk = filtered(NoFua, minblock="512", maxdata="1k", maxlen="1k")

    REQUESTS[verb](handle, Flags.FUA)

    changes = [call for call in disk.calls if call[0] != "pread"]
    assert changes.count(("flush",)) == 1
    assert changes[-1] == ("flush",)


def test_a_request_that_fails_half_way_is_not_flushed() -> None:
    class Broken(NoFua):
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            if offset:
                raise OSError(errno.ENOSPC, "full")

    handle, disk = filtered(Broken, minblock="512")

    with pytest.raises(OSError, match="full"):
        write(handle, bytes(1024), 100, Flags.FUA)

    assert ("flush",) not in disk.calls


# --- extents --------------------------------------------------------------------------------------------------------


def mapped(known: Sequence[tuple[int, int]], **parameters: str) -> tuple[Handle, Sectors]:
    """A disk of which pieces of these lengths and types are known."""
    handle, disk = filtered(Sectors, **parameters)
    disk.known, position = [], 0
    for length, kind in known:
        disk.known.append(Extent(position, length, kind))
        position += length
    return handle, disk


def test_extents_are_rounded_to_blocks_and_claim_nothing_that_is_not_so() -> None:
    handle, _ = mapped([(700, HOLE), (324, ExtentType.ZERO), (1500, HOLE), (548, 0)], minblock="512")

    found = extents(handle, 3072)

    assert found == [
        Extent(0, 512, HOLE),
        Extent(512, 512, ExtentType.ZERO),
        Extent(1024, 1024, HOLE),
        Extent(2048, 1024, 0),
    ]


def test_a_block_of_many_small_extents_is_what_they_have_in_common() -> None:
    handle, _ = mapped([(100, HOLE), (100, ExtentType.ZERO), (100, HOLE), (724, HOLE)], minblock="512")

    assert extents(handle, 1024) == [Extent(0, 512, ExtentType.ZERO), Extent(512, 512, HOLE)]


def test_the_plugin_is_asked_about_whole_blocks() -> None:
    handle, disk = filtered(minblock="512")

    assert extents(handle, 600, 1000) == [Extent(1000, 600)]

    assert disk.calls == [("extents", 1536, 512, 0)]


@pytest.mark.parametrize("flags", [0, Flags.REQ_ONE])
def test_a_plugin_that_knows_less_than_a_block_is_asked_again(flags: int) -> None:
    handle, disk = mapped([(100, HOLE), (300, ExtentType.ZERO), (100000, HOLE)], minblock="512")

    (first, *_) = extents(handle, 100, 0, flags | Flags.REQ_ONE)

    assert first == Extent(0, 100, ExtentType.ZERO)
    assert [call[1:3] for call in disk.calls] == [(512, 0), (412, 100)]


def test_a_beginning_of_a_block_behind_others_is_left_for_the_next_time() -> None:
    handle, disk = mapped([(1000, HOLE)], minblock="512")

    assert extents(handle, 4096) == [Extent(0, 512, HOLE)]
    assert len(disk.calls) == 1


@pytest.mark.parametrize("minblock", ["1", "512", "64k"])
@pytest.mark.parametrize("offset", [0, 512, Huge.size - UNBOUNDED])
def test_CVE_2025_47712_block_status_of_4_gib_less_one_is_asked_in_pieces_that_fit_in_32_bits(
    minblock: str, offset: int
) -> None:
    handle, disk = filtered(Huge, minblock=minblock)
    disk.known = [Extent(0, Huge.size, HOLE)]

    found = extents(handle, UNBOUNDED, offset)

    assert found == [Extent(offset, UNBOUNDED, HOLE)]
    block = Blocksize.parameters["minblock"].parse(minblock)
    assert all(call[1] <= UNBOUNDED and call[1] % block == call[2] % block == 0 for call in disk.calls)


def test_extents_are_asked_in_pieces_until_one_is_not_answered_wholly() -> None:
    handle, disk = mapped([(2048, HOLE), (1024, 0), (512, HOLE)], minblock="512", maxlen="1k")

    assert extents(handle, 8192) == [Extent(0, 2048, HOLE), Extent(2048, 1024, 0), Extent(3072, 512, HOLE)]
    assert [call[1:3] for call in disk.calls] == [(1024, 0), (1024, 1024), (1024, 2048), (1024, 3072)]


def test_extents_of_the_largest_disk_are_answered_by_a_beginning() -> None:
    handle, disk = filtered(Huge, minblock="64k")
    disk.known = [Extent(0, Huge.size, HOLE)]

    (extent,) = extents(handle, Huge.size)

    assert extent.length == 1024 * (UNBOUNDED - 65535)


def test_errors_of_the_plugin_about_its_extents_are_seen() -> None:
    handle, _ = mapped([(0, HOLE)], minblock="512")

    with pytest.raises(ValueError, match="no extent covers"):
        extents(handle, 512)


# --- plugins that do wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [b"", b"short", bytes(513), None, "text"])
def test_a_read_of_the_wrong_length_fails_and_nothing_is_written(wrong: Any) -> None:
    class Wrong(Sectors):
        def pread(self, count: int, offset: int) -> Any:
            return wrong

    handle, disk = filtered(Wrong, minblock="512")

    with pytest.raises((ValueError, TypeError)):
        handle.pread(3, 1)
    with pytest.raises((ValueError, TypeError)):
        write(handle, b"abc", 1)

    assert disk.calls == []


def test_an_error_of_the_read_before_a_write_is_the_error_of_the_write() -> None:
    class Broken(Sectors):
        def pread(self, count: int, offset: int) -> bytes:
            raise OSError(errno.EIO, "bad sector")

    handle, disk = filtered(Broken, minblock="512")

    with pytest.raises(OSError, match="bad sector"):
        write(handle, b"abc", 1)
    write(handle, bytes(512), 0)

    assert disk.calls == [("pwrite", 512, 0, 0)]


# --- ways round pread -----------------------------------------------------------------------------------------------


class Nearby(Sectors):
    """Half of it can be read without waiting."""

    sparse = True

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        if offset < SIZE // 2:
            buffer[:] = self.pread(len(buffer), offset)
        return offset < SIZE // 2

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return FileRange(99, offset)


def test_reads_without_waiting_are_widened_too() -> None:
    handle, disk = filtered(Nearby, minblock="512", maxdata="1k")

    assert read_now(handle, 512, 512) == CONTENT[512:1024]
    assert read_now(handle, 100, 1000) == CONTENT[1000:1100]
    assert read_now(handle, 100, SIZE - 200) is None
    assert read_now(handle, 1024, 1) is None  # more than one request to the plugin
    assert disk.calls == [("pread", 512, 512), ("pread", 1024, 512)]


def test_only_what_the_plugin_would_get_as_it_is_is_sent_from_its_file() -> None:
    handle, _ = filtered(Nearby, minblock="512", maxdata="1k")
    assert handle.file_range is not None

    assert handle.file_range(1024, 512) == FileRange(99, 512)
    assert handle.file_range(1024, 1) is None
    assert handle.file_range(1536, 0) is None


def test_plugins_without_other_ways_have_none_behind_the_filter() -> None:
    assert (filtered()[0].pread_into, filtered()[0].file_range, filtered()[0].sparse) == (None, None, False)
    assert filtered(Nearby)[0].sparse


def test_what_takes_no_lock_stays_with_the_thread_that_reads_requests() -> None:
    assert opened(memory(SIZE), Blocksize()).inline == {"pread", "trim", "cache", "extents", "flush"}


# --- connections ----------------------------------------------------------------------------------------------------


class Racing(Sectors):
    """A disk whose reads can be held up; all handles have the same content."""

    def __init__(self, plugin: Disks | None = None) -> None:
        super().__init__(plugin)
        self.reading = threading.Event()
        self.may_go_on = threading.Event()

    def pread(self, count: int, offset: int) -> bytes:
        data = super().pread(count, offset)
        self.reading.set()
        assert self.may_go_on.wait(PATIENCE)
        return data


@pytest.mark.parametrize(
    "late",
    [
        lambda handle: write(handle, b"B" * 512, 512),
        lambda handle: write(handle, b"B" * 5, 600),
        lambda handle: handle.zero(512, 512, 0),
        lambda handle: handle.trim(512, 512, 0),
    ],
    ids=["whole block", "another part of the block", "zero", "trim"],
)
def test_D8_nbdkit_539246ea_nobody_writes_a_block_that_another_connection_is_changing(
    late: Callable[[Handle], None],
) -> None:
    disk = Racing()
    plugin, unit = Disks(lambda _: disk), configured(Blocksize(), minblock="512")
    one, other = opened(plugin, unit), opened(plugin, unit)
    first = threading.Thread(target=lambda: write(one, b"A" * 10, 700))
    second = threading.Thread(target=lambda: late(other))
    waits = _watch(unit)

    first.start()
    assert disk.reading.wait(PATIENCE)
    second.start()
    assert waits.acquire(timeout=PATIENCE)
    before = [call for call in disk.calls if call[0] != "pread"]
    disk.may_go_on.set()
    for thread in (first, second):
        thread.join(PATIENCE)

    assert before == []
    assert [call[0] for call in disk.calls[:2]] == ["pread", "pwrite"]
    assert len(disk.calls) > 2


def _watch(unit: Any) -> threading.Semaphore:
    """Return what is released whenever somebody begins to wait for a range."""
    waits = threading.Semaphore(0)
    condition = unit._lock._changed
    wait = condition.wait

    def watched(timeout: float | None = None) -> bool:
        waits.release()
        return bool(wait(timeout))

    condition.wait = watched
    return waits


def test_D8_nbdkit_539246ea_writers_of_parts_of_the_same_blocks_lose_nothing() -> None:
    plugin, unit = memory(8192), configured(Blocksize(), minblock="4k")
    handles = [opened(plugin, unit) for _ in range(2)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for round_number in range(1, 40):
                for position in range(number, 8192, 8 * 101):
                    write(handles[number % 2], bytes([round_number]), position)
                    assert handles[1 - number % 2].pread(1, position) == bytes([round_number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert not failures


# --- any requests ---------------------------------------------------------------------------------------------------


class BlocksizeMachine(DiskMachine):
    size = 300 * 512 + 100
    largest = 40000

    def filters(self) -> Sequence[Filter]:
        return [configured(Blocksize(), minblock="512", maxdata="2k", maxlen="8k")]


class LargeBlocksMachine(DiskMachine):
    size = 5 << 16
    largest = 5 << 16

    def filters(self) -> Sequence[Filter]:
        return [configured(Blocksize(), minblock="64k")]


TestBlocksize = BlocksizeMachine.TestCase
TestBlocksize.settings = SETTINGS
TestLargeBlocks = LargeBlocksMachine.TestCase
TestLargeBlocks.settings = SETTINGS

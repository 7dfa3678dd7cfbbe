"""The RAM disk: what it holds, what it says of it, what it costs, and what it stands."""

from __future__ import annotations

import errno
import mmap
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdkitpy import Client, ConfigError, ExtentType, Flags, Plugin, Support, ThreadModel
from nbdkitpy.extents import normalise_extents
from nbdkitpy.stack import Capabilities, OpenExport, Stack
from nbdkitpy_plugins import memory
from tests.serving import NoServer

PAGE = mmap.PAGESIZE
REGION = 1 << 20
LARGEST = (1 << 63) - 1
CLIENT = Client(number=1)
HOLE = ExtentType.HOLE | ExtentType.ZERO


def configured(**parameters: str) -> memory.Memory:
    plugin = memory.Memory()
    for key, value in parameters.items():
        assert plugin.config(key, value)
    plugin.config_complete()
    return plugin


def disk(size: int) -> memory.MemoryHandle:
    return configured(size=str(size)).open("", False, CLIENT)


def write(handle: memory.MemoryHandle, data: bytes, offset: int, flags: int = 0) -> None:
    handle.pwrite(memoryview(data), offset, flags)


def extents(handle: memory.MemoryHandle, count: int, offset: int = 0, flags: int = 0) -> list[tuple[int, int, int]]:
    return [(start, length, kind) for start, length, kind in handle.extents(count, offset, flags)]


def resident() -> int:
    """Bytes of memory that this process really has."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * PAGE


# --- configuration ---


def test_registers_itself_as_memory() -> None:
    found: list[type[Plugin]] = []

    memory.register_plugins(found.append)

    assert found == [memory.Memory]
    assert memory.Memory.name == "memory"


def test_size_is_required() -> None:
    with pytest.raises(ConfigError, match="memory: size=SIZE is missing"):
        configured()


@pytest.mark.parametrize(
    ("text", "right"),
    [("1X", "such as 512"), ("-1", "such as 512"), ("", "such as 512"), (str(1 << 63), "of at most 2")],
)
def test_a_wrong_size_is_refused(text: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f'^memory: size must be a size {right}.*, not "{text}"$'):
        configured(size=text)


def test_size_is_what_a_bare_word_means() -> None:
    assert [key for key, parameter in memory.Memory.parameters.items() if parameter.magic] == ["size"]


def test_the_sparse_allocator_may_be_named() -> None:
    assert configured(size="1M", allocator="sparse").allocator == "sparse"
    assert configured(size="1M").allocator == "sparse"


@pytest.mark.parametrize("allocator", ["malloc", "malloc,mlock=true", "zstd", ""])
def test_other_allocators_are_refused_with_what_there_is(allocator: str) -> None:
    with pytest.raises(ConfigError, match=f'^memory: allocator must be one of sparse, not "{allocator}"$'):
        configured(size="1M", allocator=allocator)


def test_says_in_nbdkits_words_which_allocators_lack() -> None:
    assert memory.Memory().dump() == {"mlock": "no", "zstd": "no"}


# --- capabilities ---


def opened(size: int, *, readonly: bool = False) -> OpenExport:
    stack = Stack(configured(size=str(size)), [], NoServer())
    stack.config_complete()
    assert stack.model is ThreadModel.PARALLEL
    return stack.open("", readonly, CLIENT)


def test_offers_all_that_nbdkit_offers() -> None:
    assert opened(12345).capabilities == Capabilities(
        size=12345,
        can_write=True,
        can_zero=Support.NATIVE,
        can_fast_zero=True,
        can_trim=True,
        can_fua=Support.NATIVE,
        can_flush=True,
        is_rotational=False,
        can_multi_conn=True,
        can_cache=Support.NATIVE,
        can_extents=True,
        block_size=None,
    )


def test_read_only_can_still_be_flushed_cached_and_shared() -> None:
    capabilities = opened(12345, readonly=True).capabilities

    assert (capabilities.can_write, capabilities.can_trim) == (False, False)
    assert (capabilities.can_zero, capabilities.can_fua) == (Support.NONE, Support.NONE)
    assert capabilities.can_flush
    assert capabilities.can_multi_conn
    assert capabilities.can_cache is Support.NATIVE


def test_no_verb_has_to_be_taken_to_another_thread() -> None:
    handle = opened(1).handle

    assert handle.inline == {"pread", "pwrite", "flush", "trim", "zero", "cache", "extents"}
    assert handle.sparse


def test_flush_cache_and_fua_need_nothing_more() -> None:
    handle = opened(REGION).handle

    handle.flush()
    handle.cache(REGION, 0)
    handle.pwrite(memoryview(b"abcd"), 0, Flags.FUA)
    handle.zero(1, 1, Flags.FUA | Flags.FAST_ZERO)
    handle.trim(1, 2, Flags.FUA)

    assert handle.pread(5, 0) == b"a\0\0d\0"


# --- content ---


def test_all_handles_see_one_disk_until_the_plugin_ends() -> None:
    plugin = configured(size="2M")
    one, other = plugin.open("", False, CLIENT), plugin.open("x", True, CLIENT)

    write(one, b"shared", REGION - 3)
    one.close()

    assert other.pread(6, REGION - 3) == b"shared"
    assert plugin.open("", False, CLIENT).pread(6, REGION - 3) == b"shared"
    plugin.unload()
    assert plugin.open("", False, CLIENT).pread(6, REGION - 3) == bytes(6)


def test_two_disks_have_nothing_in_common() -> None:
    one, other = disk(REGION), disk(REGION)

    write(one, b"x", 0)

    assert other.pread(1, 0) == b"\0"


def test_what_was_read_does_not_change_when_the_disk_does() -> None:
    handle = disk(3 * REGION)
    write(handle, b"a" * 3 * REGION, 0)
    within, across = handle.pread(PAGE, 0), handle.pread(2 * PAGE, REGION - PAGE)

    write(handle, b"b" * 3 * REGION, 0)
    handle.trim(3 * REGION, 0, 0)

    assert (within, across) == (b"a" * PAGE, b"a" * 2 * PAGE)


def test_what_was_written_does_not_change_with_the_buffer_it_came_in() -> None:
    handle = disk(3 * REGION)
    buffer = bytearray(b"a" * 3 * REGION)

    handle.pwrite(memoryview(buffer), 0, 0)
    buffer[:] = b"b" * 3 * REGION

    assert handle.pread(3 * REGION, 0) == b"a" * 3 * REGION


def test_the_last_byte_of_the_largest_disk_is_there() -> None:
    handle = disk(LARGEST)

    write(handle, b"end", LARGEST - 3)

    assert handle.get_size() == LARGEST
    assert handle.pread(4, LARGEST - 4) == b"\0end"
    handle.trim(2, LARGEST - 2, 0)
    assert handle.pread(4, LARGEST - 4) == b"\0e\0\0"


def test_an_empty_disk_is_a_disk() -> None:
    assert opened(0).capabilities.size == 0


# --- extents ---


def test_a_new_disk_is_one_hole() -> None:
    assert extents(disk(LARGEST), LARGEST) == [(0, LARGEST, HOLE)]
    assert extents(disk(LARGEST), 5, 7) == [(7, 5, HOLE)]


def test_data_is_reported_by_whole_pages_within_the_range() -> None:
    handle = disk(4 * REGION)
    write(handle, b"xx", REGION + 2 * PAGE - 1)

    assert extents(handle, 4 * REGION) == [
        (0, REGION + PAGE, HOLE),
        (REGION + PAGE, 2 * PAGE, ExtentType.DATA),
        (REGION + 3 * PAGE, 3 * REGION - 3 * PAGE, HOLE),
    ]
    assert extents(handle, 1, REGION + PAGE + 5) == [(REGION + PAGE + 5, 1, ExtentType.DATA)]


def test_equal_extents_are_one_across_regions() -> None:
    handle = disk(8 * REGION)
    write(handle, b"x" * 3 * REGION, REGION // 2)

    assert extents(handle, 8 * REGION) == [
        (0, REGION // 2, HOLE),
        (REGION // 2, 3 * REGION, ExtentType.DATA),
        (7 * REGION // 2, 9 * REGION // 2, HOLE),
    ]


def test_one_extent_is_whole_if_only_one_is_wanted() -> None:
    handle = disk(8 * REGION)
    write(handle, b"x" * 3 * REGION, 0)

    assert extents(handle, 8 * REGION, 0, Flags.REQ_ONE) == [(0, 3 * REGION, ExtentType.DATA)]
    assert extents(handle, 5 * REGION, 3 * REGION, Flags.REQ_ONE) == [(3 * REGION, 5 * REGION, HOLE)]


def test_a_nearly_empty_disk_of_the_largest_size_is_looked_through_in_one_go() -> None:
    handle = disk(LARGEST)
    for offset in (1 << 62, 1 << 40, 0):
        write(handle, b"x", offset)

    found = extents(handle, LARGEST)

    data = [(offset, length) for offset, length, kind in found if kind == ExtentType.DATA]
    assert data == [(0, PAGE), (1 << 40, PAGE), (1 << 62, PAGE)]
    assert normalise_extents(found, LARGEST, 0) == found
    handle.trim(LARGEST, 0, 0)
    assert extents(handle, LARGEST) == [(0, LARGEST, HOLE)]


# --- zero and trim ---


def test_zero_keeps_the_range_allocated_without_leave_to_trim() -> None:
    handle = disk(4 * REGION)
    write(handle, b"x" * REGION, REGION)

    handle.zero(3 * REGION, 0, 0)

    assert extents(handle, 4 * REGION) == [(0, 3 * REGION, ExtentType.ZERO), (3 * REGION, REGION, HOLE)]
    assert handle.pread(4 * REGION, 0) == bytes(4 * REGION)


def test_zero_makes_a_hole_with_leave_to_trim() -> None:
    handle = disk(4 * REGION)
    write(handle, b"x" * 4 * REGION, 0)

    handle.zero(2 * REGION, PAGE, Flags.MAY_TRIM)

    assert extents(handle, 3 * REGION) == [
        (0, PAGE, ExtentType.DATA),
        (PAGE, 2 * REGION, HOLE),
        (2 * REGION + PAGE, REGION - PAGE, ExtentType.DATA),
    ]
    assert handle.pread(2 * REGION + 2, PAGE - 1) == b"x" + bytes(2 * REGION) + b"x"


def test_zero_of_part_of_a_hole_is_allocated_too() -> None:
    handle = disk(REGION)

    handle.zero(10, PAGE - 5, 0)

    assert extents(handle, REGION)[0] == (0, 2 * PAGE, ExtentType.DATA)


def test_a_write_to_zeroes_makes_data_of_the_page() -> None:
    handle = disk(REGION)
    handle.zero(REGION, 0, 0)

    write(handle, b"x", PAGE)

    assert [kind for _, _, kind in extents(handle, REGION)] == [ExtentType.ZERO, ExtentType.DATA, ExtentType.ZERO]


def test_trim_of_less_than_a_page_zeroes_it_and_takes_no_memory() -> None:
    handle = disk(REGION)
    write(handle, b"x" * PAGE, 0)

    handle.trim(100, 50, 0)
    handle.trim(100, PAGE + 50, 0)

    assert handle.pread(200, 0) == b"x" * 50 + bytes(100) + b"x" * 50
    assert extents(handle, REGION) == [(0, PAGE, ExtentType.DATA), (PAGE, REGION - PAGE, HOLE)]


def test_trim_of_nothing_but_holes_makes_nothing() -> None:
    plugin = configured(size=str(LARGEST))
    handle = plugin.open("", False, CLIENT)

    handle.trim(LARGEST, 0, 0)
    handle.zero(LARGEST, 0, Flags.MAY_TRIM | Flags.FAST_ZERO)

    assert plugin._regions == {}


@pytest.mark.parametrize("size", [2 * REGION, 2 * REGION + PAGE + 1, REGION - 1])
def test_trim_to_the_end_leaves_not_even_a_part_of_a_page(size: int) -> None:
    plugin = configured(size=str(size))
    handle = plugin.open("", False, CLIENT)
    write(handle, b"x" * size, 0)

    handle.trim(size - PAGE, PAGE, 0)
    assert extents(handle, size) == [(0, PAGE, ExtentType.DATA), (PAGE, size - PAGE, HOLE)]

    handle.trim(size, 0, 0)
    assert plugin._regions == {}


def test_trim_works_where_memory_cannot_be_given_back() -> None:
    class Locked(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            raise OSError(errno.EINVAL, "locked")

    plugin = configured(size="1M")
    handle = plugin.open("", False, CLIENT)
    write(handle, b"x", 0)
    plugin._regions[0].data = Locked(-1, REGION)
    write(handle, b"x" * REGION, 0)

    handle.trim(2 * PAGE, PAGE, 0)

    assert handle.pread(REGION, 0) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * (REGION - 3 * PAGE)


def test_trim_works_on_systems_whose_advice_does_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = disk(REGION)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "darwin")
        write(handle, b"x" * REGION, 0)
        handle.trim(2 * PAGE, PAGE, 0)

    assert handle.pread(REGION, 0) == b"x" * PAGE + bytes(2 * PAGE) + b"x" * (REGION - 3 * PAGE)


# --- memory ---


def test_a_huge_disk_costs_nothing_until_it_is_written() -> None:
    tracemalloc.start()
    try:
        plugin = configured(size="1T")
        handle = plugin.open("", False, CLIENT)
        for offset in range(0, 1 << 40, 1 << 34):
            assert handle.pread(PAGE, offset) == bytes(PAGE)
            extents(handle, 1 << 30, offset)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert plugin._regions == {}
    assert held < 64 << 10


def test_reading_holes_beside_data_takes_no_memory() -> None:
    handle = disk(64 * REGION)
    for index in range(64):
        write(handle, b"x", index * REGION)
    before = resident()

    for index in range(64):
        handle.pread(REGION, index * REGION)

    assert resident() - before < 8 * REGION


def test_a_page_written_here_and_there_costs_a_page() -> None:
    handle = disk(1 << 40)
    before = resident()

    for index in range(512):
        write(handle, b"x", index << 30)

    assert resident() - before < 512 * (PAGE + 4096) + 4 * REGION  # a page each, and bookkeeping


def test_trim_of_parts_of_pages_takes_no_memory() -> None:
    handle = disk(16 * REGION)
    for index in range(16):
        write(handle, b"x", index * REGION)
    before = resident()

    for offset in range(0, 16 * REGION, PAGE):
        handle.trim(PAGE // 2, offset, 0)

    assert resident() - before < 4 * REGION


def test_keeps_huge_pages_away_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    advice: list[int] = []

    class WithoutHugePages(mmap.mmap):
        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            advice.append(option)
            raise OSError(errno.EINVAL, "no such advice")

    monkeypatch.setattr(mmap, "mmap", WithoutHugePages)
    handle = disk(REGION)

    write(handle, b"x", 0)

    assert advice == [mmap.MADV_NOHUGEPAGE]
    assert handle.pread(1, 0) == b"x"


def test_trim_gives_memory_back_to_the_system() -> None:
    size = 64 * REGION
    handle = disk(size)
    empty = resident()
    write(handle, b"x" * size, 0)
    full = resident()
    assert full - empty > 60 * REGION

    for offset in range(0, size, 2 * PAGE):
        handle.trim(PAGE, offset, 0)
    half = resident()
    handle.zero(size, 0, Flags.MAY_TRIM)
    none = resident()

    assert full - half > 30 * REGION
    assert none - empty < 4 * REGION


def test_zero_in_place_does_not_give_memory_back() -> None:
    handle = disk(64 * REGION)
    before = resident()

    handle.zero(64 * REGION, 0, 0)

    assert resident() - before > 60 * REGION


@pytest.mark.parametrize("failure", [OSError(errno.EAGAIN, "locked memory limit"), MemoryError()])
def test_no_memory_is_the_clients_enomem(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = disk(4 * REGION)
    write(handle, b"old", 0)

    def no_mmap(*args: object, **kwargs: object) -> None:
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", no_mmap)
        with pytest.raises(OSError, match="memory: no memory") as raised:
            write(handle, b"new", REGION)
        with pytest.raises(OSError, match="memory: no memory"):
            handle.zero(REGION, REGION, 0)

    assert raised.value.errno == errno.ENOMEM
    assert handle.pread(3, 0) == b"old"
    write(handle, b"new", REGION)
    assert handle.pread(3, REGION) == b"new"


@pytest.mark.parametrize("count", [LARGEST, 1 << 50])
def test_zeroes_that_memory_cannot_hold_are_refused_before_anything_is_done(count: int) -> None:
    plugin = configured(size=str(LARGEST))
    handle = plugin.open("", False, CLIENT)

    with pytest.raises(OSError, match="exceed the machine's memory") as raised:
        handle.zero(count, 0, 0)

    assert raised.value.errno == errno.ENOMEM
    assert plugin._regions == {}


# --- against a model ---

SIZE = 2 * REGION + PAGE + 100
PLACES = [0, PAGE, 3 * PAGE, REGION - PAGE, REGION, REGION + PAGE, 2 * REGION, 2 * REGION + PAGE, SIZE]
OFFSETS = st.builds(lambda place, by: place + by, st.sampled_from(PLACES), st.sampled_from([0]) | st.integers(-99, 99))
COUNTS = st.sampled_from([1, 100, PAGE, 2 * PAGE, 3 * PAGE + 7, REGION, REGION + 5, SIZE])
KINDS = st.sampled_from(["write", "zero", "hole", "trim"])
REQUESTS = st.lists(st.tuples(KINDS, OFFSETS, COUNTS, st.integers(1, 255)), min_size=1, max_size=12)


def clipped(offset: int, count: int) -> tuple[int, int]:
    offset = min(max(offset, 0), SIZE - 1)
    return offset, min(count, SIZE - offset)


def check_extents(handle: memory.MemoryHandle, model: bytearray, offset: int, count: int) -> None:
    found = extents(handle, count, offset)
    assert normalise_extents(found, count, offset) == found  # contiguous, exact, no two neighbours alike
    assert sum(length for _, length, _ in found) == count
    for start, length, kind in found:
        assert kind in (ExtentType.DATA, ExtentType.ZERO, HOLE)
        if kind:
            assert not any(model[start : start + length])
    assert extents(handle, count, offset, Flags.REQ_ONE) == found[:1]


def check_kinds(handle: memory.MemoryHandle, name: str, offset: int, count: int) -> None:
    kinds = {kind for _, _, kind in extents(handle, count, offset)}
    if name == "zero":
        assert HOLE not in kinds
    if name == "write":
        assert kinds == {ExtentType.DATA}
    first, end = -(-offset // PAGE) * PAGE, (offset + count) // PAGE * PAGE
    if name in ("hole", "trim") and first < end:
        assert extents(handle, end - first, first) == [(first, end - first, HOLE)]
    if name == "zero" and first < end:
        assert extents(handle, end - first, first) == [(first, end - first, ExtentType.ZERO)]


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, look=st.tuples(OFFSETS, COUNTS))
def test_behaves_like_an_array_of_bytes(requests: list[tuple[str, int, int, int]], look: tuple[int, int]) -> None:
    handle, model = disk(SIZE), bytearray(SIZE)

    for name, place, length, byte in requests:
        offset, count = clipped(place, length)
        content = bytes([byte]) * count if name == "write" else bytes(count)
        {
            "write": lambda c=content, o=offset, n=count: write(handle, c, o),
            "zero": lambda c=content, o=offset, n=count: handle.zero(n, o, 0),
            "hole": lambda c=content, o=offset, n=count: handle.zero(n, o, Flags.MAY_TRIM),
            "trim": lambda c=content, o=offset, n=count: handle.trim(n, o, 0),
        }[name]()
        model[offset : offset + count] = content

        assert handle.pread(count, offset) == model[offset : offset + count]
        check_kinds(handle, name, offset, count)

    offset, count = clipped(*look)
    assert handle.pread(count, offset) == model[offset : offset + count]
    check_extents(handle, model, offset, count)
    assert handle.pread(SIZE, 0) == model
    check_extents(handle, model, 0, SIZE)


# --- threads ---


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Stripes:
    """One client of several: changes every n-th piece of the disk, and knows what is in those."""

    PIECE = PAGE * 3 // 2 + 1  # so that neighbours share pages
    PIECES = 3 * REGION // PIECE

    def __init__(self, handle: memory.MemoryHandle, number: int, of: int) -> None:
        self.handle = handle
        self.random = random.Random(number)
        self.mine = [index * self.PIECE for index in range(number, self.PIECES, of)]
        self.model = dict.fromkeys(self.mine, bytes(self.PIECE))
        self.failures: list[BaseException] = []

    def run(self) -> None:
        try:
            for _ in range(150):
                self.step()
        except BaseException as error:
            self.failures.append(error)

    def step(self) -> None:
        offset = self.random.choice(self.mine)
        choice = self.random.randrange(6)
        content = bytes(self.PIECE)
        if choice <= 2:
            content = bytes([self.random.randrange(1, 256)]) * self.PIECE
            write(self.handle, content, offset)
        elif choice == 3:
            self.handle.trim(self.PIECE, offset, 0)
        else:
            self.handle.zero(self.PIECE, offset, Flags.MAY_TRIM if choice == 4 else 0)
        self.model[offset] = content
        self.check(offset)
        list(self.handle.extents(3 * REGION, 0, 0))

    def check(self, offset: int) -> None:
        content = self.model[offset]
        assert self.handle.pread(self.PIECE, offset) == content
        if any(content):
            assert extents(self.handle, self.PIECE, offset) == [(offset, self.PIECE, ExtentType.DATA)]


@pytest.mark.usefixtures("_eager_switching")
def test_threads_that_share_pages_do_not_disturb_each_other() -> None:
    plugin = configured(size="3M")
    clients = [Stripes(plugin.open("", False, CLIENT), number, 4) for number in range(4)]
    threads = [threading.Thread(target=client.run) for client in clients]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [failure for client in clients for failure in client.failures] == []
    for client in clients:
        for offset in client.mine:
            client.check(offset)


@pytest.mark.usefixtures("_eager_switching")
def test_threads_that_write_to_one_new_region_at_once_all_find_their_data() -> None:
    for _ in range(50):
        plugin = configured(size="1M")
        start = threading.Barrier(4)

        def first_write(number: int, plugin: memory.Memory = plugin, start: threading.Barrier = start) -> None:
            handle = plugin.open("", False, CLIENT)
            start.wait()
            write(handle, bytes([number]) * PAGE, number * PAGE)

        threads = [threading.Thread(target=first_write, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        handle = plugin.open("", False, CLIENT)
        assert handle.pread(4 * PAGE, PAGE) == b"".join(bytes([number]) * PAGE for number in range(1, 5))


REQUESTS_BY_NAME: dict[str, Callable[[memory.MemoryHandle], None]] = {
    "write": lambda handle: write(handle, b"x" * 2 * PAGE, PAGE),
    "short write": lambda handle: write(handle, b"x", PAGE),
    "zero": lambda handle: handle.zero(2 * PAGE, PAGE, 0),
    "trim": lambda handle: handle.trim(2 * PAGE, PAGE, 0),
}


class Interrupted(mmap.mmap):
    """Lets another request run to its end just before, or just after, the bytes of one change."""

    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None

    def __setitem__(self, key: Any, value: Any) -> None:
        self.run("before")
        super().__setitem__(key, value)
        self.run("after")

    def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
        self.run("before")
        super().madvise(option, start, length)
        self.run("after")

    def run(self, moment: str) -> None:
        interruption = getattr(self, moment)
        setattr(self, moment, None)
        if interruption is not None:
            interruption()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("interrupting", REQUESTS_BY_NAME)
@pytest.mark.parametrize("interrupted", REQUESTS_BY_NAME)
def test_what_is_said_to_be_zero_is_zero_however_requests_overlap(
    interrupted: str, interrupting: str, moment: str
) -> None:
    plugin = configured(size="1M")
    handle = plugin.open("", False, CLIENT)
    write(handle, b"x" * 4 * PAGE, 0)
    data = Interrupted(-1, REGION, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data[: 4 * PAGE] = b"x" * 4 * PAGE
    plugin._regions[0].data = data
    setattr(data, moment, lambda: REQUESTS_BY_NAME[interrupting](handle))

    REQUESTS_BY_NAME[interrupted](handle)

    assert getattr(data, moment) is None
    assert handle.pread(PAGE, 0) + handle.pread(PAGE, 3 * PAGE) == b"x" * 2 * PAGE
    for start, length, kind in extents(handle, 4 * PAGE):
        assert not kind or not any(handle.pread(length, start))


@pytest.mark.usefixtures("_eager_switching")
def test_extents_can_be_asked_for_while_the_disk_grows() -> None:
    handle = disk(LARGEST)
    done = threading.Event()

    def grow() -> None:
        for index in range(2000):
            write(handle, b"x", index << 40)
        done.set()

    thread = threading.Thread(target=grow)
    thread.start()
    while not done.is_set():
        found = extents(handle, LARGEST)
        assert normalise_extents(found, LARGEST, 0) == found
    thread.join()

    assert sum(kind == ExtentType.DATA for _, _, kind in extents(handle, LARGEST)) == 2000


def test_a_region_dropped_while_others_look_at_it_is_not_missed() -> None:
    plugin = configured(size="8M")
    handle = plugin.open("", False, CLIENT)
    write(handle, b"x" * 8 * REGION, 0)

    found = iter(handle.extents(8 * REGION, 0, 0))
    plugin.open("", False, CLIENT).trim(4 * REGION, 4 * REGION, 0)

    assert [tuple(extent) for extent in found] == [
        (0, 4 * REGION, ExtentType.DATA),
        (4 * REGION, 4 * REGION, HOLE),
    ]

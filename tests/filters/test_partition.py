"""The partition filter: MBR and GPT, and tables that somebody has made to do harm."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy import BlockSize, ConfigError, Filter, Handle
from nbdkitpy.stack import OpenExport
from nbdkitpy_filters.partition import Partitions, register_filters
from tests.fuzzing.attempts import attempted
from tests.fuzzing.effort import fuzz
from tests.partitions import EXTENDED, LINUX, PROTECTIVE, Entry, boot_record, gpt_disk, gpt_header, mbr_disk, put
from tests.recording import configured, opened

SECTORS = 4096


class Disk(Handle):
    """Reads as `content`; what is asked for has to be whole blocks, and not too many."""

    def __init__(self, content: bytes, block: BlockSize | None = None) -> None:
        self.content = content
        self.block = block
        self.is_open = True

    def get_size(self) -> int:
        return len(self.content)

    def block_size(self) -> BlockSize | None:
        return self.block

    def pread(self, count: int, offset: int) -> bytes:
        assert 0 < count <= len(self.content) - offset
        if self.block is not None:
            assert offset % self.block.minimum == 0
            assert count <= self.block.maximum
            assert count % self.block.minimum == 0 or offset + count == len(self.content)
        return self.content[offset : offset + count]

    def close(self) -> None:
        self.is_open = False


def marked(disk: bytearray, sector_size: int = 512) -> bytes:
    """`disk` with the number of each empty sector at its beginning."""
    for position in range(0, len(disk), sector_size):
        if not any(disk[position : position + sector_size]):
            disk[position : position + 4] = struct.pack(">I", position // sector_size)
    return bytes(disk)


def serve(disk: bytes, number: int, *parameters: str, block: BlockSize | None = None) -> OpenExport:
    return opened(Partitions(), Disk(disk, block), f"partition={number}", *parameters)


def extent(disk: bytes, number: int, *parameters: str) -> tuple[int, int]:
    """First sector and number of sectors that are served."""
    export = serve(disk, number, *parameters)
    sector_size = 4096 if parameters else 512
    length, rest = divmod(export.capabilities.size, sector_size)
    assert rest == 0
    (first,) = struct.unpack(">I", bytes(export.handle.pread(4, 0)))
    (last,) = struct.unpack(">I", bytes(export.handle.pread(4, (length - 1) * sector_size)))
    assert last == first + length - 1
    return first, length


def refusal(disk: bytes | bytearray, number: int, *parameters: str) -> str:
    """Why a partition is not served; the handle on the disk has to be closed then."""
    handle = Disk(bytes(disk))
    with pytest.raises(OSError) as caught:
        opened(Partitions(), handle, f"partition={number}", *parameters)
    assert not handle.is_open
    assert caught.value.errno == errno.EINVAL
    text = str(caught.value.strerror)
    assert text.startswith("partition: ")
    return text.removeprefix("partition: ")


# --- MBR ------------------------------------------------------------------------------------------------------------

#: Three primary partitions, one of them beyond the end, and an extended one with three logical ones and an empty link.
MBR = marked(
    mbr_disk(
        SECTORS,
        {
            0: [Entry(LINUX, 8, 8), Entry(), Entry(EXTENDED, 64, 1000), Entry(LINUX, 4000, 97)],
            64: [Entry(LINUX, 2, 6), Entry(EXTENDED, 100, 20)],
            164: [Entry(0x07, 1, 9), Entry(0x0F, 200, 20)],
            264: [Entry(), Entry(0x85, 300, 9)],
            364: [Entry(LINUX, 3, 697)],
            1064: [Entry(LINUX, 3, 3)],
        },
    )
)


@pytest.mark.parametrize(("number", "where"), [(1, (8, 8)), (5, (66, 6)), (6, (165, 9)), (8, (367, 697))])
def test_partitions_of_an_mbr(number: int, where: tuple[int, int]) -> None:
    assert extent(MBR, number) == where


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (2, "there is no partition 2 in the MBR"),
        (3, "partition 3 is an extended one; those in it have numbers from 5 on"),
        (4, "partition 4 ends at sector 4097, outside of the disk"),
        (7, "there is no partition 7 in the MBR"),
        (9, "there is no partition 9 in the MBR"),
        (8192, "there is no partition 8192 in the MBR"),
    ],
)
def test_what_an_mbr_does_not_have_is_refused(number: int, reason: str) -> None:
    assert refusal(MBR, number) == reason


def test_a_partition_without_length_is_none() -> None:
    assert "no partition 1" in refusal(mbr_disk(SECTORS, {0: [Entry(LINUX, 8, 0)]}), 1)


def test_a_logical_partition_without_an_extended_one() -> None:
    disk = mbr_disk(SECTORS, {0: [Entry(LINUX, 8, 8), Entry(EXTENDED, 0, 0)]})

    assert refusal(disk, 5) == "partition 5 would be a logical one, but there is no extended partition"


def test_a_partition_may_end_where_the_disk_does() -> None:
    assert extent(marked(mbr_disk(SECTORS, {0: [Entry(LINUX, 4000, 96)]})), 1) == (4000, 96)


@pytest.mark.parametrize(
    ("records", "number", "reason"),
    [
        # A link to itself, to one before it, and to where it would come again and again.
        ({64: [Entry(LINUX, 2, 6), Entry(EXTENDED, 0, 20)]}, 6, "leads from sector 64 back to 64"),
        (
            {64: [Entry(LINUX, 2, 6), Entry(EXTENDED, 9, 9)], 73: [Entry(LINUX, 1, 1), Entry(EXTENDED, 0, 9)]},
            8192,
            "leads from sector 73 back to 64",
        ),
        ({64: [Entry(), Entry(EXTENDED, 9000, 20)]}, 6, "goes on at sector 9064, which is outside of the disk"),
        ({64: [Entry(), Entry(EXTENDED, 0xFFFFFFFF, 20)]}, 6, "outside of the disk"),
        ({64: [Entry(), Entry(EXTENDED, 100, 20)]}, 6, "leads to sector 164, where there is no boot record"),
        ({}, 5, "leads to sector 64, where there is no boot record"),
        ({64: [Entry(LINUX, 2, 99)]}, 5, "partition 5 goes beyond the end of the extended partition"),
        ({64: [Entry(LINUX, 0xFFFFFFFF, 0xFFFFFFFF)]}, 5, "partition 5 goes beyond the end of the extended partition"),
        ({64: [Entry(LINUX, 2, 6), Entry(LINUX, 10, 20)]}, 6, "there is no partition 6"),
    ],
)
def test_a_chain_that_is_wrong_is_refused(records: dict[int, list[Entry]], number: int, reason: str) -> None:
    disk = mbr_disk(SECTORS, {0: [Entry(EXTENDED, 64, 100)], **records})

    assert reason in refusal(disk, number)


def test_an_extended_partition_outside_of_the_disk() -> None:
    disk = mbr_disk(SECTORS, {0: [Entry(EXTENDED, 0xFFFFFFFF, 0xFFFFFFFF)]})

    assert "sector 4294967295, which is outside of the disk" in refusal(disk, 5)


def test_the_first_extended_partition_counts() -> None:
    records = {0: [Entry(0x85, 300, 50), Entry(EXTENDED, 64, 50)], 300: [Entry(LINUX, 2, 6)], 64: [Entry(LINUX, 1, 1)]}

    assert extent(marked(mbr_disk(SECTORS, records)), 5) == (302, 6)


def test_the_sectors_of_an_mbr_may_have_4096_bytes() -> None:
    disk = marked(mbr_disk(512, {0: [Entry(LINUX, 8, 8)]}, 4096), 4096)

    assert extent(disk, 1, "partition-sectorsize=4k") == (8, 8)


# --- GPT ------------------------------------------------------------------------------------------------------------

PARTITIONS = [(100, 199), None, (300, 300), (50, 40), (100, 4096), (4000, 4095), (100, (1 << 64) - 1), (200, 100)]


def guarded(disk: bytearray, sector_size: int = 512) -> bytes:
    """As marked(), but for what belongs to the table."""
    body = marked(disk[40 * sector_size : -40 * sector_size], sector_size)
    numbered = bytearray(body)
    for position in range(0, len(body), sector_size):
        numbered[position : position + 4] = struct.pack(">I", position // sector_size + 40)
    return bytes(disk[: 40 * sector_size] + numbered + disk[-40 * sector_size :])


@pytest.mark.parametrize("entry_size", [128, 256, 512])
def test_partitions_of_a_gpt(entry_size: int) -> None:
    disk = guarded(gpt_disk(PARTITIONS, entry_size=entry_size, entry_count=32))

    assert extent(disk, 1) == (100, 100)
    assert extent(disk, 3) == (300, 1)


def test_the_last_sector_may_belong_to_a_partition() -> None:
    assert serve(bytes(gpt_disk(PARTITIONS)), 6).capabilities.size == 96 * 512


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (2, "there is no partition 2 in the GPT"),
        (4, "partition 4 ends at sector 40, before it begins, at 50"),
        (5, "partition 5 ends at sector 4097, outside of the disk"),
        (7, f"partition 7 ends at sector {1 << 64}, outside of the disk"),
        (8, "partition 8 ends at sector 100, before it begins, at 200"),
        (128, "there is no partition 128 in the GPT"),
        (129, "there is no partition 129 in the GPT, which has room for 128"),
    ],
)
def test_what_a_gpt_does_not_have_is_refused(number: int, reason: str) -> None:
    assert refusal(gpt_disk(PARTITIONS), number) == reason


def test_the_sectors_of_a_gpt_may_have_4096_bytes() -> None:
    disk = guarded(gpt_disk([(100, 199)], sectors=512, sector_size=4096), 4096)

    assert extent(disk, 1, "partition-sectorsize=4096") == (100, 100)
    assert "(sectors of 512 bytes; see partition-sectorsize)" in refusal(disk, 1)


def test_an_mbr_is_not_needed() -> None:
    disk = gpt_disk([(100, 199)])
    put(disk, 0, bytes(512))

    assert extent(guarded(disk), 1) == (100, 100)


def without_header(disk: bytearray) -> None:
    put(disk, 1, bytes(512))


def with_damaged_header(disk: bytearray) -> None:
    disk[512 + 60] ^= 1


def with_damaged_entries(disk: bytearray) -> None:
    disk[1024 + 5 * 128] ^= 1


@pytest.mark.parametrize("damage", [without_header, with_damaged_header, with_damaged_entries])
def test_the_copy_at_the_end_is_used_if_the_first_one_is_damaged(damage: Callable[[bytearray], None]) -> None:
    disk = gpt_disk([(100, 199)])
    damage(disk)

    assert extent(guarded(disk), 1) == (100, 100)


def test_both_copies_damaged() -> None:
    disk = gpt_disk([(100, 199)])
    with_damaged_header(disk)
    disk[-512:] = bytes(512)

    assert refusal(disk, 1) == (
        "no copy of the GPT is good: the first one has a damaged header, the one at the end has no header"
        " (sectors of 512 bytes; see partition-sectorsize)"
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"header_size": 91}, "a header that says it has 91 bytes"),
        ({"header_size": 513}, "a header that says it has 513 bytes"),
        ({"header_size": 0xFFFFFFFF}, "a header that says it has 4294967295 bytes"),
        ({"header_crc": 1}, "a damaged header"),
        ({"here": 2}, "a damaged header"),
        ({"entries_crc": 1}, "damaged entries"),
        ({"entry_size": 127}, "128 entries of 127 bytes"),
        ({"entry_size": 0}, "128 entries of 0 bytes"),
        ({"entry_size": 0xFFFFFFFF, "entry_count": 0xFFFFFFFF}, "4294967295 entries of 4294967295 bytes"),
        ({"table": 1 << 63}, "its entries at sector 9223372036854775808, outside of the disk"),
        ({"table": 4065}, "its entries at sector 4065, outside of the disk"),
        ({"table": 4064}, "damaged entries"),
    ],
)
def test_a_header_that_is_wrong_is_not_used(fields: dict[str, int], reason: str) -> None:
    header, entries = gpt_header([(100, 199)], sectors=SECTORS, wrong=fields)
    disk = bytearray(SECTORS * 512)
    put(disk, 1, header)
    put(disk, 2, entries)

    assert f"the first one has {reason}, the one at the end has no header" in refusal(disk, 1)


def test_a_table_without_entries_has_no_partition() -> None:
    header, _ = gpt_header([], sectors=SECTORS, entry_count=0)
    disk = bytearray(SECTORS * 512)
    put(disk, 1, header)

    assert refusal(disk, 1) == "there is no partition 1 in the GPT, which has room for 0"


def test_the_protective_partition_is_not_served() -> None:
    assert "no copy of the GPT is good" in refusal(mbr_disk(SECTORS, {0: [Entry(PROTECTIVE, 1, SECTORS - 1)]}), 1)


# --- which table, and how it is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1023])
def test_a_disk_of_less_than_two_sectors_is_too_small(size: int) -> None:
    assert "is too small for partitions" in refusal(bytes(size), 1)


def test_a_disk_without_a_table() -> None:
    assert refusal(bytes(SECTORS * 512), 1) == "there is neither an MBR nor a GPT on the disk"


@pytest.mark.parametrize(
    ("block", "sector_size"),
    [
        (None, 512),
        (BlockSize(1, 4096, 65536), 512),
        (BlockSize(512, 4096, 65536), 512),
        (BlockSize(1024, 4096, 65536), 512),
        (BlockSize(4096, 4096, 65536), 4096),
    ],
)
def test_sectors_are_as_large_as_blocks_if_these_have_a_usual_size(block: BlockSize | None, sector_size: int) -> None:
    disk = bytes(gpt_disk([(48, 63)], sectors=1024, sector_size=sector_size))

    assert serve(disk, 1, block=block).capabilities.size == 16 * sector_size


def test_the_table_is_read_in_whole_blocks_that_are_not_too_large() -> None:
    disk = bytes(gpt_disk([(128, 255)], sectors=8192, entry_count=8192))
    block = BlockSize(32768, 32768, 65536)

    export = serve(disk, 1, "partition-sectorsize=512", block=block)

    assert export.capabilities.size == 65536


def test_a_partition_begins_with_a_block() -> None:
    disk = bytes(mbr_disk(SECTORS, {0: [Entry(LINUX, 9, 8)]}))

    with pytest.raises(
        OSError, match="partition: the range begins at 4608, which must be a multiple of the block size"
    ):
        serve(disk, 1, "partition-sectorsize=512", block=BlockSize(4096, 4096, 4096))


def test_requests_keep_to_the_partition() -> None:
    export = serve(MBR, 5)

    assert bytes(export.handle.pread(1024, 512)) == MBR[67 * 512 : 69 * 512]


@given(st.randoms(use_true_random=False), st.integers(1, 12), st.booleans())
def test_no_table_leads_out_of_the_disk(chance: random.Random, number: int, is_gpt: bool) -> None:
    """Whatever bytes are changed: either a partition within the disk is served, or the client is refused."""
    disk = bytearray(gpt_disk(PARTITIONS, sectors=200)) if is_gpt else bytearray(MBR[: 400 * 512])
    places = (0, 1, 2, 64, 164, 264, 364, len(disk) // 512 - 1)
    for _ in range(chance.randint(1, 8)):
        position = chance.choice(places) * 512 + chance.choice((chance.randrange(512), chance.randrange(446, 480)))
        if position < len(disk):
            disk[position] = chance.choice((0, 1, 5, 0x83, 0xFF, chance.randrange(256)))

    handle = Disk(bytes(disk))
    try:
        export = opened(Partitions(), handle, f"partition={number}")
    except OSError:
        assert not handle.is_open
        return

    size = export.capabilities.size
    assert 0 < size <= len(disk)
    export.handle.pread(size, 0)


#: Sectors, and lengths, at the edges of what numbers on a disk can say.
EDGES = st.integers(0, 130) | st.sampled_from([199, 200, 512, 4096, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
LARGE_EDGES = EDGES | st.sampled_from([1 << 55, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("header_size", "entry_count", "entry_size"), EDGES),
        **dict.fromkeys(("here", "other", "first", "last", "table"), LARGE_EDGES),
    },
)
BLOCKS = st.sampled_from([None, BlockSize(1, 512, 512), BlockSize(512, 4096, 8192), BlockSize(4096, 4096, 1 << 20)])
PARTITIONS_OF_A_GPT = st.lists(st.none() | st.tuples(LARGE_EDGES, LARGE_EDGES), max_size=4)
ENTRIES = st.lists(st.builds(Entry, st.sampled_from([0, LINUX, EXTENDED, 0x0F, PROTECTIVE]), EDGES, EDGES), max_size=4)


def assert_within_the_disk(disk: bytes, number: int, block: BlockSize | None, *parameters: str) -> None:
    """See that either a partition within the disk is served, or the client is refused, and nothing left open."""
    handle = Disk(disk, block)
    export, _ = attempted(lambda: opened(Partitions(), handle, f"partition={number}", *parameters), OSError)
    if export is None:
        assert not handle.is_open
        return
    size = export.capabilities.size
    assert 0 < size <= len(disk)
    handle.block = None
    export.handle.pread(size, 0)


@fuzz(100)
@given(FIELDS, FIELDS, PARTITIONS_OF_A_GPT, st.integers(1, 130), BLOCKS)
def test_no_gpt_with_right_checksums_leads_out_of_the_disk(
    first: dict[str, int],
    second: dict[str, int],
    partitions: list[tuple[int, int] | None],
    number: int,
    block: BlockSize | None,
) -> None:
    disk = bytearray(200 * 512)
    put(disk, 0, boot_record([Entry(PROTECTIVE, 1, 199)]))
    for backup, wrong in ((False, first), (True, second)):
        header, entries = gpt_header(partitions, sectors=200, backup=backup, entry_count=8, wrong=wrong)
        put(disk, 199 if backup else 1, header)
        put(disk, 197 if backup else 2, entries)

    assert_within_the_disk(bytes(disk), number, block)


@fuzz(100)
@given(st.dictionaries(st.integers(0, 129), ENTRIES, max_size=6), ENTRIES, st.integers(1, 12), BLOCKS)
def test_no_chain_of_boot_records_leads_out_of_the_disk(
    records: dict[int, list[Entry]], first: list[Entry], number: int, block: BlockSize | None
) -> None:
    disk = mbr_disk(200, {**records, 0: first})

    assert_within_the_disk(bytes(disk), number, block)


@fuzz(100)
@given(st.binary(max_size=1500), st.integers(1, 6), BLOCKS, st.sampled_from(["512", "4096"]))
def test_no_content_of_a_disk_is_more_than_an_error(
    content: bytes, number: int, block: BlockSize | None, sector_size: str
) -> None:
    assert_within_the_disk(content, number, block, f"partition-sectorsize={sector_size}")


# --- odds and ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ([], "partition: partition=PART is missing"),
        (["partition=0"], "partition: partition must be an integer from 1 to 8192"),
        (["partition=8193"], "partition: partition must be an integer from 1 to 8192"),
        (["partition=1", "partition-sectorsize=1024"], "partition: partition-sectorsize must be 512 or 4096"),
        (["partition=1", "partition-sectorsize=x"], "partition: partition-sectorsize must be 512 or 4096"),
    ],
)
def test_parameters_that_are_wrong(parameters: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured([Partitions()], Disk(MBR), *parameters)

    assert str(caught.value).startswith(text)


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Partitions]

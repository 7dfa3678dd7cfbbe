"""A range of a handle: every verb is shifted, and nothing that makes reads fast is lost."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from nbdkitpy import BlockSize, ExtentType, FileRange, Filter, Handle, range_of
from nbdkitpy.backend import VERBS, Client
from nbdkitpy.extents import normalise_extents
from tests.conftest import StartServer
from tests.nbdclient import Style
from tests.recording import Recorder
from tests.serving import CONTENT, SIZE, Disk, Disks

NAME = "part"


# --- which ranges there are -----------------------------------------------------------------------------------------


def test_the_whole_is_the_handle_itself() -> None:
    handle = Recorder()

    assert range_of(handle, 0, 1000, NAME) is handle


@pytest.mark.parametrize("size", [0, 1, 999])
def test_a_beginning_differs_in_nothing_but_its_size(size: int) -> None:
    handle = Recorder()

    part = range_of(handle, 0, size, NAME)

    assert part.get_size() == size
    for verb in VERBS:
        assert getattr(part, verb) == getattr(handle, verb)
    assert (part.inline, part.sparse) == (handle.inline, True)
    assert (part.pread_into, part.file_range) == (handle.into, handle.position)


@pytest.mark.parametrize(("offset", "size"), [(1000, 0), (999, 1), (1, 999), (500, 0)])
def test_a_range_may_reach_to_the_end(offset: int, size: int) -> None:
    assert range_of(Recorder(), offset, size, NAME).get_size() == size


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1001), (1001, 0), (1000, 1), (1, 1000), (-1, 10), (5, -1), (1 << 63, 1 << 63)]
)
def test_a_range_outside_of_the_handle_is_refused(offset: int, size: int) -> None:
    with pytest.raises(OSError) as caught:
        range_of(Recorder(), offset, size, NAME)

    assert caught.value.args == (
        errno.EINVAL,
        f"part: the range of {size} bytes at {offset} is not within the 1000 bytes of the disk",
    )


def test_a_range_begins_with_a_block() -> None:
    handle = Recorder(block_size=BlockSize(8, 512, 4096))

    assert range_of(handle, 16, 20, NAME).block_size() == BlockSize(8, 512, 4096)
    with pytest.raises(OSError, match="part: the range begins at 12, which must be a multiple of the block size, 8"):
        range_of(handle, 12, 20, NAME)


# --- what a range does ----------------------------------------------------------------------------------------------


def test_every_verb_is_shifted() -> None:
    handle = Recorder()
    part = range_of(handle, 100, 300, NAME)

    part.pread(3, 0)
    part.pwrite(memoryview(b"abc"), 10, 2)
    part.flush()
    part.trim(4, 20, 2)
    part.zero(5, 30, 3)
    part.cache(6, 40)
    list(part.extents(7, 50, 4))
    part.close()

    assert handle.calls == [
        ("pread", 3, 100),
        ("pwrite", b"abc", 110, 2),
        ("flush",),
        ("trim", 4, 120, 2),
        ("zero", 5, 130, 3),
        ("cache", 6, 140),
        ("extents", 7, 150, 4),
        ("close",),
    ]


def test_extents_are_those_of_the_range() -> None:
    part = range_of(Recorder(), 100, 300, NAME)

    assert normalise_extents(part.extents(300, 0, 0), 300, 0) == [(0, 50, ExtentType.DATA), (50, 250, ExtentType.HOLE)]


def test_the_shortcuts_are_shifted_too() -> None:
    handle = Recorder()
    part = range_of(handle, 100, 300, NAME)
    assert part.pread_into is not None
    assert part.file_range is not None

    assert not part.pread_into(memoryview(bytearray(3)), 4)
    assert part.file_range(5, 6) == FileRange(7, 10_106)

    assert handle.calls == [("pread_into", 3, 104), ("file_range", 5, 106)]
    assert part.sparse


def test_a_range_of_a_handle_without_shortcuts_has_none() -> None:
    class Plain(Handle):
        def get_size(self) -> int:
            return 1000

    part = range_of(Plain(), 100, 300, NAME)

    assert (part.pread_into, part.file_range, part.sparse, part.inline) == (None, None, False, frozenset())


def test_what_is_inline_stays_so() -> None:
    handle = Recorder()
    handle.inline = frozenset({"pread", "flush"})  # type: ignore[misc]

    assert range_of(handle, 100, 300, NAME).inline == handle.inline


def test_ranges_of_ranges_add_up() -> None:
    handle = Recorder()

    range_of(range_of(handle, 100, 300, NAME), 20, 30, NAME).pread(1, 3)

    assert handle.calls == [("pread", 1, 123)]


class Part(Filter):
    """The second half of the disk."""

    name = "part"

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return range_of(handle, SIZE // 2, SIZE // 2, self.name)


def test_reads_through_a_range_are_sent_from_the_file(start_server: StartServer, tmp_path: Path) -> None:
    """Not by pread: the disk has none that works."""
    path = tmp_path / "disk"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:

        class FromFile(Disk):
            def __init__(self, plugin: Disks) -> None:
                super().__init__(plugin)
                self.file_range = lambda count, offset: FileRange(file.fileno(), offset)

            def pread(self, count: int, offset: int) -> bytes:
                raise AssertionError("the file has it")

        client = start_server(Disks(FromFile), Part()).connect(Style.STRUCTURED)

        data = client.read(4096, 200_000)

    assert data == CONTENT[SIZE // 2 + 4096 :][:200_000]

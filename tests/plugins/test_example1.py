"""The plugin of the tutorial: a fixed disk with one partition."""

from __future__ import annotations

import pytest

from nbdkitpy import Client, Plugin, Support, ThreadModel
from nbdkitpy.stack import OpenExport, Stack
from nbdkitpy_filters.partition import Partitions
from nbdkitpy_plugins import example1
from tests.serving import NoServer

SIZE = 100 << 20


def opened(*filters: Partitions, **parameters: str) -> OpenExport:
    stack = Stack(example1.Example1(), filters, NoServer())
    for key, value in parameters.items():
        stack.config(key, value)
    stack.config_complete()
    assert stack.model is ThreadModel.PARALLEL
    return stack.open("", False, Client(1))


def test_registers_itself_as_example1() -> None:
    found: list[type[Plugin]] = []

    example1.register_plugins(found.append)

    assert found == [example1.Example1]
    assert example1.Example1.name == "example1"


def test_has_a_hundred_megabytes_that_any_number_of_connections_may_read_and_none_may_write() -> None:
    capabilities = opened().capabilities

    assert capabilities.size == SIZE
    assert capabilities.can_multi_conn
    assert (capabilities.can_write, capabilities.can_trim, capabilities.can_zero) == (False, False, Support.NONE)


def test_ends_its_first_block_with_the_signature_and_has_zeroes_after_it() -> None:
    handle = opened().handle

    assert handle.pread(512, 0)[-2:] == b"\x55\xaa"
    assert handle.pread(1 << 20, 512) == bytes(1 << 20)
    assert handle.pread(512, SIZE - 512) == bytes(512)


@pytest.mark.parametrize("offset", [0, 1, 445, 446, 509, 510, 511, 512, 1000])
@pytest.mark.parametrize("count", [1, 2, 511, 512, 513, 1024, 5000])
def test_reads_any_range(count: int, offset: int) -> None:
    handle = opened().handle
    whole = b"".join(handle.pread(512, start) for start in range(0, 8192, 512))

    assert handle.pread(count, offset) == whole[offset : offset + count]


def test_the_last_byte_can_be_read_alone() -> None:
    assert opened().handle.pread(1, SIZE - 1) == b"\0"


def test_has_one_partition_to_the_end() -> None:
    export = opened(Partitions(), partition="1")

    assert export.capabilities.size == SIZE - (1 << 20)
    with pytest.raises(OSError, match="partition"):
        opened(Partitions(), partition="2")

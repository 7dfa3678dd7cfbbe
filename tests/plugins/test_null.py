"""The bit bucket: it takes everything and keeps nothing."""

from __future__ import annotations

import tracemalloc

import pytest

from nbdkitpy import Client, ConfigError, ExtentType, Flags, Plugin, Support, ThreadModel
from nbdkitpy.stack import Capabilities, OpenExport, Stack
from nbdkitpy_plugins import null
from tests.serving import NoServer

LARGEST = (1 << 63) - 1
SHARED = 1 << 20
CLIENT = Client(number=1)
HOLE = ExtentType.HOLE | ExtentType.ZERO


def opened(*sizes: str, readonly: bool = False) -> OpenExport:
    stack = Stack(null.Null(), [], NoServer())
    for size in sizes:
        stack.config("size", size)
    stack.config_complete()
    assert stack.model is ThreadModel.PARALLEL
    return stack.open("", readonly, CLIENT)


def test_registers_itself_as_null() -> None:
    found: list[type[Plugin]] = []

    null.register_plugins(found.append)

    assert found == [null.Null]
    assert null.Null.name == "null"


def test_size_is_zero_unless_it_is_given() -> None:
    assert opened().capabilities.size == 0
    assert opened("1G").capabilities.size == 1 << 30
    assert opened(str(LARGEST)).capabilities.size == LARGEST


def test_size_is_what_a_bare_word_means() -> None:
    assert [key for key, parameter in null.Null.parameters.items() if parameter.magic] == ["size"]


@pytest.mark.parametrize("text", ["-1", "1X", "", str(1 << 63)])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f'^null: size must be a size .*, not "{text}"$'):
        opened(text)


def test_offers_all_that_nbdkit_offers() -> None:
    assert opened("5").capabilities == Capabilities(
        size=5,
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
    capabilities = opened("5", readonly=True).capabilities

    assert (capabilities.can_write, capabilities.can_trim) == (False, False)
    assert (capabilities.can_zero, capabilities.can_fua) == (Support.NONE, Support.NONE)
    assert capabilities.can_flush
    assert capabilities.can_multi_conn
    assert capabilities.can_cache is Support.NATIVE


def test_no_verb_has_to_be_taken_to_another_thread() -> None:
    assert opened("5").handle.inline == {"pread", "pwrite", "flush", "trim", "zero", "cache", "extents"}


def test_sends_its_zeroes_rather_than_a_hole() -> None:
    # It is there to measure with, and who reads wants to see the bytes move.
    assert not opened("5").handle.sparse


@pytest.mark.parametrize("count", [1, 4096, SHARED - 1, SHARED, SHARED + 1, 64 << 20])
@pytest.mark.parametrize("offset", [0, 1, LARGEST - (64 << 20)])
def test_reads_as_zeroes_of_the_length_asked_for(count: int, offset: int) -> None:
    assert opened(str(LARGEST)).handle.pread(count, offset) == bytes(count)


def test_small_reads_take_no_memory_of_their_own() -> None:
    plugin = null.Null()
    plugin.config("size", "1G")
    handles = [plugin.open("", False, CLIENT) for _ in range(2)]
    tracemalloc.start()
    try:
        answers = [handle.pread(SHARED, 0) for handle in handles for _ in range(50)]
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(answers) == 100
    assert held < SHARED


def test_the_shared_zeroes_cannot_be_changed() -> None:
    answer = memoryview(opened("1M").handle.pread(4096, 0))

    assert answer.readonly


def test_forgets_what_is_written() -> None:
    handle = opened("1M").handle

    handle.pwrite(memoryview(b"x" * 4096), 100, Flags.FUA)

    assert handle.pread(4096, 100) == bytes(4096)


def test_everything_else_succeeds() -> None:
    handle = opened(str(LARGEST)).handle

    handle.flush()
    handle.trim(LARGEST, 0, Flags.FUA)
    handle.zero(LARGEST, 0, Flags.NONE)
    handle.zero(LARGEST, 0, Flags.MAY_TRIM | Flags.FAST_ZERO)
    handle.cache(LARGEST, 0)
    handle.close()

    assert handle.pread(1, LARGEST - 1) == b"\0"


@pytest.mark.parametrize(("count", "offset"), [(LARGEST, 0), (1, 7), (1, LARGEST - 1)])
def test_all_is_one_hole(count: int, offset: int) -> None:
    assert list(opened(str(LARGEST)).handle.extents(count, offset, 0)) == [(offset, count, HOLE)]

from __future__ import annotations

import ctypes
import mmap

import pytest

from nbdkitpy.protocol.buffers import page_aligned


@pytest.mark.parametrize("length", [1, 8192, 8193, 300_000])
def test_memory_begins_with_a_page_and_is_zeroed(length: int) -> None:
    memory = page_aligned(length)

    assert ctypes.addressof(ctypes.c_char.from_buffer(memory)) % mmap.PAGESIZE == 0
    assert memory == bytes(length)


def test_memory_is_of_this_process_alone() -> None:
    assert page_aligned(1).obj is not page_aligned(1).obj

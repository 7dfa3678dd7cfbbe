"""What is remembered of each block of an overlay."""

from __future__ import annotations

import errno
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy_filters.cow.states import BELOW, CHUNK, DATA, ZERO, BlockStates, is_entries

STATES = (BELOW, DATA, ZERO)
BLOCKS = 3 * CHUNK

#: Near the edges of chunks.
numbers = st.sampled_from([0, CHUNK, 2 * CHUNK, BLOCKS]).flatmap(
    lambda edge: st.integers(max(edge - 3, 0), min(edge + 3, BLOCKS))
)
ranges = st.tuples(numbers, numbers).map(sorted).filter(lambda pair: pair[0] < pair[1])


def by_block(states: BlockStates, first: int, end: int) -> list[int]:
    """What each block of a range is, by :meth:`BlockStates.runs`, which have to be as long as they can."""
    found: list[int] = []
    last = None
    for start, stop, state in states.runs(first, end):
        assert first + len(found) == start < stop
        assert state != last
        found += [state] * (stop - start)
        last = state
    return found


@given(steps=st.lists(st.tuples(ranges, st.sampled_from([DATA, ZERO])), max_size=8), asked=ranges)
def test_each_block_is_what_it_was_set_to_last(steps: list[tuple[list[int], int]], asked: list[int]) -> None:
    states = BlockStates()
    model = [BELOW] * BLOCKS

    for (first, end), state in steps:
        states.set(first, end, state)
        model[first:end] = [state] * (end - first)

    first, end = asked
    expected = model[first:end]
    assert by_block(states, first, end) == expected
    assert states.of(first) == expected[0]
    assert states.common(first, end) == (expected[0] if len(set(expected)) == 1 else None)
    assert states.untouched == (not steps)


def test_chunks_of_blocks_all_alike_take_no_memory_of_their_own() -> None:
    states = BlockStates()

    states.set(0, 1000 * CHUNK, ZERO)

    assert len(set(map(id, states._chunks.values()))) == 1
    states.set(5 * CHUNK + 1, 5 * CHUNK + 2, DATA)
    assert by_block(states, 5 * CHUNK, 5 * CHUNK + 3) == [ZERO, DATA, ZERO]
    assert states.common(6 * CHUNK, 1000 * CHUNK) == ZERO


def test_a_range_of_many_chunks_of_which_few_are_there_is_asked_about_quickly() -> None:
    states = BlockStates()
    states.set(1 << 40, (1 << 40) + 1, DATA)

    assert list(states.runs(0, 1 << 47)) == [
        (0, 1 << 40, BELOW),
        (1 << 40, (1 << 40) + 1, DATA),
        ((1 << 40) + 1, 1 << 47, BELOW),
    ]


def test_a_block_that_cannot_be_saved_is_not_set() -> None:
    def save(entries: bytes, block: int) -> None:
        if block >= CHUNK:
            raise OSError(errno.ENOSPC, "full")

    states = BlockStates(save)

    with pytest.raises(OSError, match="full"):
        states.set(CHUNK - 1, CHUNK + 1, DATA)

    assert by_block(states, CHUNK - 2, CHUNK + 2) == [BELOW, DATA, BELOW, BELOW]


class Saved:
    """What has been saved, as it would be read again."""

    def __init__(self) -> None:
        self.entries = bytearray(BLOCKS)
        self.states = BlockStates(self.save)

    def save(self, entries: bytes, block: int) -> None:
        self.entries[block : block + len(entries)] = entries

    def flush(self) -> bool:
        return self.states.end_flush(self.states.begin_flush())

    def loaded(self, *, undo: bool) -> BlockStates:
        states = BlockStates(self.save)
        for index in range(3):
            states.load(index, bytes(self.entries[index * CHUNK : (index + 1) * CHUNK]), undo=undo)
        return states


def test_all_that_was_set_is_there_when_it_is_loaded_and_what_was_flushed_when_that_is_undone() -> None:
    saved = Saved()
    saved.states.set(0, 4, DATA)
    saved.states.set(2, 6, ZERO)
    assert saved.flush()
    assert not saved.flush()
    saved.states.set(5, CHUNK + 3, DATA)
    saved.states.set(0, 1, ZERO)

    now = [ZERO, DATA, ZERO, ZERO, ZERO, DATA, DATA]
    assert by_block(saved.loaded(undo=False), 0, 7) == now
    back = saved.loaded(undo=True)
    assert by_block(back, 0, 7) == [DATA, DATA, ZERO, ZERO, ZERO, ZERO, BELOW]
    assert by_block(back, CHUNK, CHUNK + 3) == [BELOW] * 3
    assert bytes(saved.entries[:7]) == bytes(state | state << 2 for state in (1, 1, 2, 2, 2, 2, 0))


@pytest.mark.parametrize("later", STATES[1:])
def test_what_is_set_while_a_flush_goes_on_is_not_taken_for_flushed(later: int) -> None:
    saved = Saved()
    saved.states.set(0, 2, DATA)

    begun = saved.states.begin_flush()
    saved.states.set(1, 3, later)
    saved.states.end_flush(begun)

    assert by_block(saved.loaded(undo=False), 0, 3) == [DATA, later, later]
    assert saved.flush() or later == BELOW
    assert by_block(saved.loaded(undo=True), 0, 3) == [DATA, later, later]


def test_what_is_set_while_a_flush_goes_on_goes_back_to_what_the_flush_found() -> None:
    saved = Saved()
    saved.states.set(0, 2, DATA)

    begun = saved.states.begin_flush()
    saved.states.set(1, 3, ZERO)
    saved.states.end_flush(begun)

    assert by_block(saved.loaded(undo=True), 0, 3) == [DATA, DATA, BELOW]


def test_threads_that_set_neighbours_lose_nothing() -> None:
    saved = Saved()
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            saved.flush()

    def work(number: int) -> None:
        for block in range(number, 4000, 4):
            saved.states.set(block, block + 1, DATA if number % 2 else ZERO)

    flusher = threading.Thread(target=flush)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in (flusher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    flusher.join()
    saved.flush()

    expected = [ZERO, DATA] * 2000
    assert by_block(saved.states, 0, 4000) == expected
    assert by_block(saved.loaded(undo=True), 0, 4000) == expected


@pytest.mark.parametrize("byte", range(256))
def test_only_some_bytes_are_entries(byte: int) -> None:
    assert is_entries(bytes([byte])) == (byte & 3 in STATES and byte >> 2 in STATES)

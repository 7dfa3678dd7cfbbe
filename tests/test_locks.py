"""The lock on ranges: who waits for whom."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator

import pytest

from nbdkitpy import RangeLock

PATIENCE = 20  # seconds; reached only if the lock is wrong


class Watched(threading.Condition):
    """Tells of each time that somebody begins to wait."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())
        self.waits = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.release()
        return super().wait(timeout)


class Visitor(threading.Thread):
    """Takes a range, and keeps it until it is told to leave."""

    def __init__(self, held: contextlib.AbstractContextManager[None]) -> None:
        super().__init__()
        self._held = held
        self._inside = threading.Event()
        self._told = threading.Event()
        self.start()

    def run(self) -> None:
        with self._held:
            self._inside.set()
            self._told.wait(PATIENCE)

    def gets_in(self) -> bool:
        return self._inside.wait(PATIENCE)

    def is_inside(self) -> bool:
        return self._inside.is_set()

    def leave(self) -> None:
        self._told.set()
        self.join(PATIENCE)
        assert not self.is_alive()


class Place:
    """A lock, and those who want in."""

    def __init__(self) -> None:
        self.lock = RangeLock()
        self._watched = Watched()
        self.lock._changed = self._watched
        self._visitors: list[Visitor] = []

    def _visit(self, start: int, end: int, alone: bool) -> Visitor:
        visitor = Visitor((self.lock.exclusive if alone else self.lock.shared)(start, end))
        self._visitors.append(visitor)
        return visitor

    def enters(self, start: int, end: int, *, alone: bool) -> Visitor:
        """Return one who gets in."""
        visitor = self._visit(start, end, alone)
        assert visitor.gets_in()
        return visitor

    def waits(self, start: int, end: int, *, alone: bool) -> Visitor:
        """Return one who waits."""
        visitor = self._visit(start, end, alone)
        assert self._watched.waits.acquire(timeout=PATIENCE)
        assert not visitor.is_inside()
        return visitor

    def finish(self) -> None:
        for visitor in self._visitors:
            visitor._told.set()
        for visitor in self._visitors:
            visitor.leave()
        assert not self.lock._ranges


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    made.finish()


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("start", "end"), [(10, 20), (0, 11), (19, 30), (12, 13), (0, 100)])
def test_ranges_that_overlap_wait_if_one_wants_to_be_alone(
    first: bool, second: bool, start: int, end: int, place: Place
) -> None:
    one = place.enters(10, 20, alone=first)
    other = place.waits(start, end, alone=second)

    one.leave()

    assert other.gets_in()


@pytest.mark.parametrize(("start", "end"), [(0, 10), (20, 30)])
def test_ranges_that_only_touch_do_not_wait(start: int, end: int, place: Place) -> None:
    place.enters(10, 20, alone=True)

    place.enters(start, end, alone=True)


def test_those_who_share_a_range_are_in_it_together(place: Place) -> None:
    place.enters(10, 20, alone=False)
    place.enters(10, 20, alone=False)


def test_who_came_later_does_not_overtake(place: Place) -> None:
    one = place.enters(0, 10, alone=False)
    alone = place.waits(0, 10, alone=True)
    later = place.waits(0, 10, alone=False)

    one.leave()

    assert alone.gets_in()
    assert not later.is_inside()
    alone.leave()
    assert later.gets_in()


def test_an_error_inside_gives_the_range_back() -> None:
    lock = RangeLock()

    with contextlib.suppress(KeyError), lock.exclusive(0, 10):
        raise KeyError

    assert not lock._ranges


def test_who_is_interrupted_while_waiting_is_forgotten() -> None:
    class Interrupted(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            raise KeyboardInterrupt

    lock = RangeLock()
    lock._changed = Interrupted(threading.Lock())

    with lock.exclusive(0, 10):
        with pytest.raises(KeyboardInterrupt), lock.shared(5, 6):
            raise AssertionError("nobody else should be let in")
        assert len(lock._ranges) == 1

    assert not lock._ranges


def test_counts_that_are_read_changed_and_written_back_stay_right() -> None:
    lock = RangeLock()
    counts = [0] * 8
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for start, end in ranges(seed):
                with lock.exclusive(start, end):
                    read = counts[start:end]
                    os.sched_yield()
                    counts[start:end] = [count + 1 for count in read]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert not failures
    everything = [pair for seed in range(8) for pair in ranges(seed)]
    assert counts == [sum(start <= index < end for start, end in everything) for index in range(8)]
    assert not lock._ranges


def ranges(seed: int) -> list[tuple[int, int]]:
    chance = random.Random(seed)
    return [(start := chance.randrange(8), chance.randint(start + 1, 8)) for _ in range(200)]

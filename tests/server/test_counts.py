"""Counts that units keep: of one process, and shared by several of which any may be killed."""

from __future__ import annotations

import functools
import gc
import os
import signal
import threading
from collections.abc import Callable

import pytest

from nbdkitpy import SharedCount
from nbdkitpy.server.counts import LocalCount
from nbdkitpy.server.process_count import ProcessCount
from tests.serving import open_descriptors

KINDS = pytest.mark.parametrize("make", [LocalCount, functools.partial(ProcessCount, 3)], ids=["local", "process"])
Make = Callable[..., SharedCount]


# --- what both kinds do ---


@KINDS
def test_what_is_taken_and_not_given_back_is_counted(make: Make) -> None:
    count = make()

    assert all(count.take() for _ in range(3))
    count.give_back()

    assert count.value == 2


@KINDS
def test_no_more_are_taken_than_the_limit(make: Make) -> None:
    count = make()

    assert [count.take(2) for _ in range(4)] == [True, True, False, False]
    assert count.value == 2
    assert count.take(3)
    assert count.take(0)


@KINDS
def test_zero_is_told_each_time_that_it_is_reached(make: Make) -> None:
    told: list[int] = []
    count: SharedCount = make(lambda: told.append(count.value))

    for _ in range(2):
        count.take()
    count.give_back()
    assert told == []
    count.give_back()
    assert told == [0]
    count.take()
    count.give_back()

    assert told == [0, 0]


@KINDS
def test_zero_is_told_without_a_lock_held(make: Make) -> None:
    count: SharedCount = make(lambda: threads.append(start(count.take)))
    threads: list[threading.Thread] = []

    count.take()
    count.give_back()

    assert not threads[0].is_alive()
    assert count.value == 1


def start(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(20)
    return thread


@KINDS
def test_threads_that_count_at_once_lose_nothing(make: Make) -> None:
    count = make()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait(20)
        for _ in range(500):
            if count.take(3):
                count.give_back()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert count.value == 0


# --- several processes ---


class Child:
    """A forked process that does something, and then waits to be ended."""

    def __init__(self, count: ProcessCount, place: int, work: Callable[[], object]) -> None:
        done, ends = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            count.place = place
            work()
            os.write(ends, b"x")
            signal.pause()
            os._exit(0)
        os.close(ends)
        assert os.read(done, 1) == b"x", "the child failed"
        os.close(done)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_processes_share_the_count_and_the_limit() -> None:
    count = ProcessCount(3)
    children = [Child(count, place, lambda: count.take(3)) for place in (1, 2)]

    assert count.value == 2
    assert [count.take(3), count.take(3)] == [True, False]

    for child in children:
        child.kill()


def test_what_a_killed_process_held_is_taken_back_and_nothing_else() -> None:
    count = ProcessCount(3)
    first = Child(count, 1, lambda: [count.take() for _ in range(5)])
    second = Child(count, 2, count.take)
    first.kill()

    count.release(1)

    assert count.value == 1
    second.kill()


def test_zero_is_told_when_the_last_that_were_held_are_taken_back() -> None:
    told: list[str] = []
    count = ProcessCount(3, lambda: told.append("zero"))
    count.take()
    child = Child(count, 1, count.take)
    child.kill()
    count.release(1)
    assert told == []

    count.give_back()
    assert told == ["zero"]

    count.release(2)  # which has never held any
    assert told == ["zero"]


def test_zero_is_told_if_the_process_that_reached_it_was_killed_before_it_could_tell() -> None:
    told: list[str] = []

    def tell() -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        told.append("zero")

    parent = os.getpid()
    count = ProcessCount(2, tell)
    pid = os.fork()
    if not pid:
        count.place = 1
        count.take()
        count.give_back()
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL

    count.release(1)
    count.release(1)

    assert told == ["zero"]


def test_a_killed_process_does_not_keep_the_lock() -> None:
    count = ProcessCount(2)
    holding = count._lock.held()
    child = Child(count, 1, holding.__enter__)
    blocked = threading.Thread(target=count.take, daemon=True)
    blocked.start()
    assert blocked.is_alive()

    child.kill()
    blocked.join(20)

    assert not blocked.is_alive()


def test_nothing_is_left_open() -> None:
    before = open_descriptors()
    count = ProcessCount(2)
    assert open_descriptors() != before

    del count
    gc.collect()

    assert open_descriptors() == before

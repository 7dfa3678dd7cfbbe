"""Workers: begun when needed, ended when not, and who calls a backend himself."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from nbdkitpy.server.workers import Pace, Workers
from tests.nbdclient import PATIENCE

FAST, SLOW = 0.0001, 0.01  # seconds


class Job:
    """Something to do, that can be waited for."""

    def __init__(self, action: Callable[[], object] = int) -> None:
        self.action = action
        self.done = threading.Event()
        self.thread: threading.Thread | None = None


def work(job: Job) -> None:
    job.thread = threading.current_thread()
    job.action()
    job.done.set()


@pytest.fixture
def workers() -> Iterator[Workers[Job]]:
    workers = Workers(work, 3, "test")
    yield workers
    workers.stop()


def test_pace_begins_as_it_is_told() -> None:
    assert Pace(quick=True).quick
    assert not Pace(quick=False).quick


def test_one_slow_call_moves_a_verb_to_the_workers() -> None:
    pace = Pace(quick=True)

    pace.took(FAST)
    assert pace.quick
    pace.took(SLOW)

    assert not pace.quick


def test_64_quick_calls_in_a_row_move_it_back() -> None:
    pace = Pace(quick=False)

    for _ in range(63):
        pace.took(FAST)
    assert not pace.quick
    pace.took(FAST)

    assert pace.quick


def test_a_slow_call_among_them_begins_the_count_anew() -> None:
    pace = Pace(quick=False)

    for _ in range(63):
        pace.took(FAST)
    pace.took(SLOW)
    for _ in range(63):
        pace.took(FAST)

    assert not pace.quick


def test_threads_begin_when_there_is_something_to_do_and_are_used_again(workers: Workers[Job]) -> None:
    assert not workers._threads
    jobs = [Job() for _ in range(5)]

    for job in jobs:
        workers.put(job)
        assert job.done.wait(PATIENCE)
    workers.stop()

    threads = [job.thread for job in jobs]
    assert threading.current_thread() not in threads
    assert len(set(threads)) <= 3
    assert workers._busy == 0


def test_as_many_jobs_are_done_at_once_as_there_may_be_threads_and_no_more(workers: Workers[Job]) -> None:
    together = threading.Barrier(4)  # three workers and this thread
    jobs = [Job(lambda: together.wait(PATIENCE)) for _ in range(6)]

    for job in jobs:
        workers.put(job)
    together.wait(PATIENCE)

    assert len(workers._threads) == 3
    together.wait(PATIENCE)  # the other three
    assert all(job.done.wait(PATIENCE) for job in jobs)


def test_stopping_waits_for_what_was_put_in_and_new_threads_begin_afterwards(workers: Workers[Job]) -> None:
    gate = threading.Event()
    jobs = [Job(lambda: gate.wait(PATIENCE)) for _ in range(10)]
    for job in jobs:
        workers.put(job)
    first = list(workers._threads)

    gate.set()
    workers.stop()

    assert all(job.done.is_set() for job in jobs)
    assert not any(thread.is_alive() for thread in first)
    later = Job()
    workers.put(later)
    assert later.done.wait(PATIENCE)
    assert later.thread not in first


def test_without_a_single_thread_to_be_had_the_job_is_done_by_who_brings_it(
    workers: Workers[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    job = Job()

    workers.put(job)

    assert job.done.is_set()
    assert job.thread is threading.current_thread()
    assert workers._busy == 0


def test_with_too_few_threads_those_that_there_are_do_it_all(
    workers: Workers[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    first, second = Job(lambda: gate.wait(PATIENCE)), Job()
    workers.put(first)
    monkeypatch.setattr(threading.Thread, "start", no_more_threads)

    workers.put(second)
    assert not second.done.is_set()
    gate.set()

    assert second.done.wait(PATIENCE)
    assert second.thread is first.thread


def no_more_threads(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_worker_with_nothing_to_do_keeps_no_job(workers: Workers[Job]) -> None:
    freed = threading.Event()
    job = Job()
    done, gone = job.done, weakref.finalize(job, freed.set)

    workers.put(job)
    del job

    assert done.wait(PATIENCE)
    assert freed.wait(PATIENCE)
    assert not gone.alive

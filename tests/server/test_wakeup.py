"""Waking up a thread that polls."""

from __future__ import annotations

import contextlib
import os
import select

from nbdkitpy.server.wakeup import Wakeup
from tests.serving import open_descriptors


def is_ready(wakeup: Wakeup) -> bool:
    poll = select.poll()
    poll.register(*wakeup.watch)
    return bool(poll.poll(0))


def test_poll_sees_that_it_is_set_until_it_is_cleared() -> None:
    wakeup = Wakeup()
    before = is_ready(wakeup)

    wakeup.set()
    wakeup.set()

    assert (before, is_ready(wakeup), wakeup.is_set) == (False, True, True)
    wakeup.clear()
    assert (is_ready(wakeup), wakeup.is_set) == (False, False)


def test_set_too_often_to_be_written_down_it_is_still_set() -> None:
    wakeup = Wakeup()
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(wakeup.write_fd, bytes(4096))
    wakeup.set()

    assert wakeup.is_set


def test_its_descriptors_are_freed_with_it_or_when_it_is_closed() -> None:
    before = open_descriptors()

    wakeup = Wakeup()
    wakeup.close()
    wakeup.close()
    other = Wakeup()
    del other

    assert open_descriptors() == before


def test_set_after_the_end_writes_into_nothing_that_has_its_number_now() -> None:
    wakeup = Wakeup()
    number = wakeup.write_fd
    wakeup.close()
    read, write = os.pipe2(os.O_NONBLOCK)
    taken = os.dup2(write, number) if write != number else write

    wakeup.set()

    poll = select.poll()
    poll.register(read, select.POLLIN)
    assert poll.poll(0) == []
    for fd in {read, write, taken}:
        os.close(fd)

"""What connections may hold: nobody gets more, nobody waits who need not, and who waits gets on in the end."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from nbdkitpy.server import budget as module
from nbdkitpy.server.budget import OWN, Budget, CancelledError, Memory
from tests.nbdclient import PATIENCE

MIB = 1 << 20


class Clock:
    """In place of the time: it goes by when a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class Waiting:
    """A thread that does something which has to wait.

    Args:
        memory: In which it is going to wait; None if it waits for its own connection.
    """

    def __init__(self, work: Callable[[], object], memory: Memory | None = None) -> None:
        self.error: BaseException | None = None
        self.is_over = threading.Event()
        before = memory.wanted if memory else 0
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        while memory is not None and memory.wanted == before and not self.is_over.is_set():
            self.is_over.wait(0.001)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self.error = error
        self.is_over.set()

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "it still waits"


def spent(budget: Budget, *costs: int) -> Budget:
    for cost in costs:
        budget.take(cost)
    return budget


# --- of one connection ---


def test_a_cost_that_does_not_fit_waits_until_enough_is_given_back() -> None:
    budget = spent(Budget(100), 40, 40)
    order: list[str] = []

    def take() -> None:
        budget.take(50)
        order.append("taken")

    budget.before_waiting = lambda: order.append("waits")

    waiting = Waiting(take)
    while not order:
        waiting.is_over.wait(0.001)
    budget.give(20)
    order.append("enough")
    budget.give(20)
    waiting.join()

    assert order == ["waits", "enough", "taken"]
    assert not budget.unused


def test_a_cost_above_the_limit_fits_when_there_is_nothing_else() -> None:
    budget = spent(Budget(100), 1000)
    budget.give(1000)

    assert budget.unused


def test_without_a_limit_everything_fits() -> None:
    budget = spent(Budget(), 1 << 40, 1 << 40)

    assert not budget.unused


def test_finishing_waits_for_what_is_in_hand_and_gives_back_the_rest() -> None:
    memory = Memory()
    budget = spent(Budget(1 << 30, memory), 10 * MIB, 10 * MIB)
    budget.claim(20 * MIB)
    budget.others_wait = budget.before_waiting = lambda: None
    order: list[str] = []

    def finish() -> None:
        budget.finish()
        order.append("finished")

    waiting = Waiting(finish)
    budget.give(10 * MIB)
    order.append("last")
    budget.give(10 * MIB)
    waiting.join()

    assert order == ["last", "finished"]
    assert memory.held == 0
    assert budget.others_wait is budget.before_waiting is module._nothing


def test_what_is_held_for_a_while_is_given_back_whatever_happens() -> None:
    budget = Budget(100)
    held: list[bool] = []

    def fail() -> None:
        with budget.holding(50):
            held.append(not budget.unused)
            raise KeyError

    with pytest.raises(KeyError):
        fail()

    assert held == [True]
    assert budget.unused


def test_a_payload_waits_until_it_fits_beside_what_is_in_hand() -> None:
    budget = spent(Budget(100), 60)
    waiting = Waiting(lambda: budget.claim(50))
    while not budget.is_waiting:
        waiting.is_over.wait(0.001)

    assert not waiting.is_over.is_set()
    budget.give(60)
    waiting.join()

    assert not budget.is_waiting


def test_a_payload_counts_beside_what_is_in_hand_until_it_is_part_of_that() -> None:
    memory = Memory()
    budget = Budget(10 * MIB, memory)
    budget.claim(6 * MIB)
    budget.claim(6 * MIB)  # which it has already
    assert memory.held == 6 * MIB - OWN

    budget.take(6 * MIB + 1, has_payload=True)  # which has been had for it, but for a trifle
    assert memory.held == 6 * MIB - OWN
    budget.claim(3 * MIB)
    assert memory.held == 9 * MIB + 1 - OWN
    budget.drop()
    budget.give(6 * MIB + 1)

    assert memory.held == 0


# --- buffers that are kept ---


def test_a_buffer_is_kept_for_payloads_that_fit_and_counts_meanwhile() -> None:
    memory = Memory()
    budget = Budget(0, memory)
    buffer = memoryview(bytearray(4 * MIB))
    budget.claim(4 * MIB)

    for size in (4 * MIB, 1):
        budget.keep(buffer)
        assert memory.held == 4 * MIB - OWN
        assert budget.kept(size) is buffer
        budget.claim(4 * MIB)
    assert memory.held == 4 * MIB - OWN
    assert not budget.kept(1)
    assert memory.held == 0, "there is none, so that none counts"


def test_no_buffer_is_kept_that_is_too_small() -> None:
    memory = Memory()
    budget = Budget(0, memory)
    budget.claim(4 * MIB)
    budget.keep(memoryview(bytearray(4 * MIB)))

    assert not budget.kept(4 * MIB + 1)
    assert memory.held == 0
    assert not budget.kept(1)


def test_a_buffer_is_not_kept_if_others_wait_for_memory() -> None:
    memory = Memory(20 * MIB)
    keeping, waiting = (spent(Budget(0, memory), OWN) for _ in range(2))
    keeping.claim(15 * MIB)
    thread = Waiting(lambda: waiting.take(10 * MIB), memory)
    assert not thread.is_over.is_set(), "the buffer is in use"

    keeping.keep(memoryview(bytearray(15 * MIB)))
    thread.join()

    assert not keeping.kept(1)
    assert memory.held == 10 * MIB


def test_a_buffer_that_is_kept_gives_way_at_once() -> None:
    memory = Memory(20 * MIB)
    keeping, waiting = (spent(Budget(0, memory), OWN) for _ in range(2))
    keeping.claim(15 * MIB)
    keeping.keep(memoryview(bytearray(15 * MIB)))

    waiting.take(10 * MIB)

    assert not keeping.kept(1)
    assert memory.held == 10 * MIB


def test_who_waits_keeps_no_buffer_itself() -> None:
    memory = Memory(20 * MIB)
    first, second = (spent(Budget(0, memory), OWN) for _ in range(2))
    first.claim(12 * MIB)
    second.take(5 * MIB)
    first.keep(memoryview(bytearray(12 * MIB)))

    first.take(15 * MIB)

    assert memory.held == 20 * MIB


# --- of all ---


def test_what_every_connection_has_for_itself_is_not_asked_for() -> None:
    memory = Memory(1)
    budget = spent(Budget(0, memory), OWN // 2, OWN // 2)

    assert memory.held == budget.drawn == 0


def test_a_connection_that_goes_on_does_not_ask_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(100 * MIB)
    budget = spent(Budget(0, memory), OWN, 2 * MIB, MIB)
    asked: list[int] = []
    monkeypatch.setattr(memory, "take_now", lambda budget, size: asked.append(size))

    for _ in range(10):
        budget.give(MIB)
        budget.take(MIB)

    assert not asked
    assert memory.held == 3 * MIB


def test_memory_comes_back_when_little_is_held() -> None:
    memory = Memory(100 * MIB)
    budget = spent(Budget(0, memory), *[MIB] * 10)
    assert memory.held == 8 * MIB

    for _ in range(8):
        budget.give(MIB)

    assert memory.held == budget.drawn == 0


def test_who_wants_more_than_there_is_waits_and_the_first_one_gets_it_first() -> None:
    memory = Memory(20 * MIB)
    first = spent(Budget(0, memory), OWN, 15 * MIB)
    others = [spent(Budget(0, memory), OWN) for _ in range(2)]
    order: list[int] = []

    def take(number: int, size: int) -> None:
        others[number].take(size)
        order.append(number)

    large = Waiting(lambda: take(0, 10 * MIB), memory)
    small = Waiting(lambda: take(1, MIB), memory)  # which would fit, but then the large one would wait for ever
    assert (memory.wanted, memory.is_short, order) == (11 * MIB, True, [])
    first.give(15 * MIB)
    large.join()
    small.join()

    assert sorted(order) == [0, 1]
    assert (memory.held, memory.wanted, memory.is_short, memory.deadline) == (11 * MIB, 0, False, math.inf)


def test_who_wants_more_than_there_ever_is_gets_it_alone() -> None:
    memory = Memory(10 * MIB)
    first, second = spent(Budget(0, memory), OWN, MIB), spent(Budget(0, memory), OWN)

    waiting = Waiting(lambda: second.take(50 * MIB), memory)
    assert not waiting.is_over.is_set()
    first.give(MIB)
    waiting.join()

    assert memory.held == 50 * MIB


def test_what_is_given_back_while_others_wait_is_theirs_at_once() -> None:
    memory = Memory(20 * MIB)
    first, second = spent(Budget(0, memory), OWN, 10 * MIB, 10 * MIB), spent(Budget(0, memory), OWN)

    waiting = Waiting(lambda: second.take(10 * MIB), memory)
    first.give(10 * MIB)  # though it still holds much
    waiting.join()

    assert (first.drawn, second.drawn) == (10 * MIB, 10 * MIB)


def test_what_a_waiting_connection_gives_back_itself_counts_too() -> None:
    memory = Memory(20 * MIB)
    budget = spent(Budget(0, memory), OWN, *[MIB] * 20)

    waiting = Waiting(lambda: budget.take(5 * MIB), memory)
    for _ in range(5):
        assert not waiting.is_over.is_set()
        budget.give(MIB)
    waiting.join()

    assert memory.held == budget.drawn == 20 * MIB


def test_who_waits_for_memory_holds_no_part_of_it() -> None:
    memory = Memory(20 * MIB)
    first, second = (spent(Budget(0, memory), OWN, MIB, 9 * MIB) for _ in range(2))
    for budget in (first, second):
        budget.give(9 * MIB)  # but keeps the memory, as nobody else wants it
    assert memory.held == 20 * MIB

    waiting = Waiting(lambda: first.take(10 * MIB), memory)
    other = Waiting(lambda: second.take(19 * MIB))  # which each has a part of
    for budget in (first, second):
        budget.give(MIB)
    waiting.join()
    assert not other.is_over.wait(0.01)
    first.give(10 * MIB)
    other.join()

    assert memory.held == second.drawn == 19 * MIB


def test_replies_that_are_ready_are_sent_before_memory_is_waited_for() -> None:
    memory = Memory(10 * MIB)
    first, second = spent(Budget(0, memory), OWN, 10 * MIB), Budget(0, memory)
    ready: list[str] = []

    second.before_waiting = lambda: ready.append("sent")
    waiting = Waiting(lambda: second.take(10 * MIB), memory)

    assert ready == ["sent"]
    first.give(10 * MIB)
    waiting.join()


@pytest.mark.parametrize("as_payload", [False, True])
def test_who_waits_for_memory_ends_at_once_when_the_connection_does(as_payload: bool) -> None:
    memory = Memory(10 * MIB)
    first, second, third = (spent(Budget(0, memory), OWN) for _ in range(3))
    first.take(8 * MIB)
    waiting = Waiting(lambda: second.claim(9 * MIB) if as_payload else second.take(9 * MIB), memory)
    behind = Waiting(lambda: third.take(2 * MIB), memory)

    second.cancel()
    waiting.join()
    behind.join()

    assert isinstance(waiting.error, CancelledError)
    assert memory.held == first.drawn + third.drawn == 10 * MIB
    second.give(OWN)
    assert second.unused
    with pytest.raises(CancelledError):
        second.take(9 * MIB)


def test_who_ends_waits_no_more_but_takes_what_is_there() -> None:
    memory = Memory(10 * MIB)
    budget = Budget(0, memory)

    budget.cancel()
    budget.take(5 * MIB)

    assert memory.held == 5 * MIB - OWN


# --- what gives way ---


def test_those_who_hold_memory_are_told_when_others_wait_and_each_time_again(clock: Clock) -> None:
    woken: list[bool] = []
    memory = Memory(10 * MIB, patience=30.0, wake=lambda: woken.append(True))
    first, second, idle = (spent(Budget(0, memory), OWN) for _ in range(3))
    first.take(10 * MIB)
    told: list[str] = []
    first.others_wait = lambda: told.append("first")
    idle.others_wait = lambda: told.append("idle")

    waiting = Waiting(lambda: second.take(5 * MIB), memory)

    assert (told, woken, memory.deadline) == (["first"], [True], 1030.0)
    clock.now = 1030.0
    memory.overdue(clock.now)
    assert (told, memory.deadline) == (["first", "first"], 1060.0)
    first.give(10 * MIB)
    waiting.join()


def test_who_has_kept_what_others_wait_for_is_overdue_the_largest_first(clock: Clock) -> None:
    memory = Memory(40 * MIB, patience=30.0)
    small, large, working, late, waiting = (spent(Budget(0, memory), OWN) for _ in range(5))
    small.take(5 * MIB)
    large.claim(15 * MIB - OWN)
    working.take(20 * MIB - OWN)
    late_thread = Waiting(lambda: late.take(10 * MIB - OWN), memory)
    thread = Waiting(lambda: waiting.take(15 * MIB), memory)

    assert memory.overdue(1029.9) == []
    working.give(20 * MIB - OWN)
    late_thread.join()
    clock.now = 1030.0
    assert memory.overdue(1030.0) == [large, small]
    assert memory.overdue(1030.0) == [], "a new period has begun"

    small.give(5 * MIB)
    large.drop()
    thread.join()


def test_to_give_back_a_part_is_not_enough(clock: Clock) -> None:
    memory = Memory(20 * MIB, patience=30.0)
    first, second = spent(Budget(0, memory), OWN, *[MIB] * 20), spent(Budget(0, memory), OWN)
    waiting = Waiting(lambda: second.take(10 * MIB), memory)

    first.give(MIB)
    assert memory.overdue(1030.0) == [first]
    clock.now = 1030.0
    for _ in range(19):
        first.give(MIB)
    waiting.join()

    assert memory.overdue(1060.0) == []


def test_without_patience_nobody_is_ever_overdue() -> None:
    memory = Memory(MIB)
    first, second = spent(Budget(0, memory), OWN, MIB), spent(Budget(0, memory), OWN)
    waiting = Waiting(lambda: second.take(MIB), memory)

    assert memory.deadline == math.inf
    assert memory.overdue(1e9) == []
    first.give(MIB)
    waiting.join()


def test_many_threads_leave_nothing_behind() -> None:
    memory = Memory(30 * MIB, patience=1.0)

    def work() -> None:
        budget = Budget(20 * MIB, memory)
        for i in range(100):
            budget.take(9 * MIB)
            given = threading.Thread(target=budget.give, args=(9 * MIB,))
            given.start()
            if i % 3:
                buffer = budget.kept(8 * MIB)
                budget.claim(8 * MIB)
                budget.keep(buffer or memoryview(bytearray(8 * MIB)))
            if i % 4:
                budget.drop()
            given.join()
            assert memory.held <= 30 * MIB
        budget.finish()

    workers = [Waiting(work) for _ in range(6)]
    for worker in workers:
        worker.join()

    assert not [worker.error for worker in workers if worker.error]
    assert (memory.held, memory.wanted, memory.is_short, memory._budgets) == (0, 0, False, set())

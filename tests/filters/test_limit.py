"""The limit filter: a client too many is refused, and every slot comes back."""

from __future__ import annotations

import errno
import random
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle, Plugin, ThreadModel
from nbdkitpy.stack import OpenExport, Stack
from nbdkitpy_filters.limit import Limit, register_filters
from tests.serving import NoServer

REFUSAL = "limit: too many clients connected, connection rejected"
CLIENT = Client(1)
DEADLINE = 20  # seconds; reached only if the filter is wrong


class Disk(Handle):
    def __init__(self, closed: Callable[[], None]) -> None:
        self._closed = closed

    def get_size(self) -> int:
        return 512

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(count)

    def close(self) -> None:
        self._closed()


class Disks(Plugin):
    """Knows how many of its handles are open, and the most that ever were, those being opened included."""

    name = "disks"

    def __init__(self) -> None:
        super().__init__()
        self.failure: BaseException | None = None
        self.close_failure: Exception | None = None
        self.while_opening: Callable[[], object] = int
        self.open_now = 0
        self.most = 0
        self._lock = threading.Lock()

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if self.failure:
            raise self.failure
        with self._lock:
            self.open_now += 1
            self.most = max(self.most, self.open_now)
        self.while_opening()
        return Disk(self._closed)

    def _closed(self) -> None:
        with self._lock:
            self.open_now -= 1
        if self.close_failure:
            raise self.close_failure


class Outer(Filter):
    """An outer layer that can fail when all has been opened."""

    name = "outer"
    failure: BaseException | None = None
    closes_itself = False

    def wrap(self, handle: Handle, client: Client) -> Handle:
        if self.failure is None:
            return handle
        if self.closes_itself:
            handle.close()  # wrong: what called wrap does it too
        raise self.failure


def make_stack(limit: str | None = None, outer: Filter | None = None) -> tuple[Stack, Disks]:
    plugin = Disks()
    stack = Stack(plugin, [*([outer] if outer else []), Limit()], NoServer())
    stack.load()
    if limit is not None:
        stack.config("limit", limit)
    stack.config_complete()
    return stack, plugin


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except PermissionError as error:
        if error.args != (errno.EACCES, REFUSAL):
            raise
        return True
    return False


def connect(stack: Stack) -> OpenExport:
    stack.preconnect(CLIENT, False)
    return stack.open("", False, CLIENT)


def free_slots(stack: Stack, at_most: int) -> int:
    """How many clients, up to `at_most`, get in; they leave again."""
    exports: list[OpenExport] = []
    while len(exports) < at_most and not is_refused(lambda: exports.append(connect(stack))):
        pass
    for export in exports:
        export.close()
    return len(exports)


# --- counting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "clients"), [(None, 1), ("1", 1), ("3", 3), ("0x10", 16)])
def test_as_many_clients_as_the_limit_get_in(limit: str | None, clients: int) -> None:
    stack, _ = make_stack(limit)

    for _ in range(2):
        assert free_slots(stack, 100) == clients


def test_zero_is_no_limit() -> None:
    stack, _ = make_stack("0")

    assert free_slots(stack, 1000) == 1000


def test_the_largest_limit_is_taken() -> None:
    stack, _ = make_stack("4294967295")

    assert free_slots(stack, 10) == 10


def test_a_client_too_many_is_refused_in_preconnect() -> None:
    stack, _ = make_stack()
    connect(stack)

    assert is_refused(lambda: stack.preconnect(CLIENT, False))


def test_a_client_that_passed_preconnect_is_checked_again_before_the_plugin_opens() -> None:
    stack, plugin = make_stack()
    stack.preconnect(CLIENT, False)
    stack.preconnect(CLIENT, False)
    stack.open("", False, CLIENT)

    assert is_refused(lambda: stack.open("", False, CLIENT))
    assert plugin.most == 1


def test_clients_that_only_connected_are_not_counted() -> None:
    stack, _ = make_stack()

    for _ in range(10):
        stack.preconnect(CLIENT, False)

    assert free_slots(stack, 10) == 1


def test_a_refused_client_frees_no_slot() -> None:
    stack, _ = make_stack("2")
    exports = [connect(stack), connect(stack)]

    for _ in range(5):
        assert is_refused(lambda: stack.preconnect(CLIENT, False))
        assert is_refused(lambda: stack.open("", False, CLIENT))

    exports[0].close()
    assert free_slots(stack, 10) == 1


def test_a_probe_counts_while_it_lasts() -> None:
    stack, _ = make_stack()
    probe = Client(1, is_probe=True)

    export = stack.open("", False, probe)

    assert is_refused(lambda: stack.open("", False, CLIENT))
    export.close()
    assert free_slots(stack, 10) == 1


def test_the_inner_layers_are_asked_before_the_limit() -> None:
    class Inner(Filter):
        name = "inner"

        def preconnect(self, client: Client, readonly: bool) -> None:
            raise OSError(errno.EPERM, "inner says no")

    stack = Stack(Disks(), [Limit(), Inner()], NoServer())
    stack.load()
    stack.config_complete()
    stack.open("", False, CLIENT)

    with pytest.raises(OSError, match="inner says no"):
        stack.preconnect(CLIENT, False)


# --- every way out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [FileNotFoundError(errno.ENOENT, "no such export"), KeyError(), SystemExit(1)])
def test_a_slot_comes_back_if_the_plugin_does_not_open(failure: BaseException) -> None:
    stack, plugin = make_stack()
    plugin.failure = failure

    for _ in range(3):
        with pytest.raises(type(failure)):
            connect(stack)

    plugin.failure = None
    assert free_slots(stack, 10) == 1


@pytest.mark.parametrize("closes_itself", [False, True])
@pytest.mark.parametrize("failure", [OSError(errno.EIO, "outer failed"), SystemExit(1)])
def test_one_slot_comes_back_if_an_outer_layer_fails(failure: BaseException, closes_itself: bool) -> None:
    outer = Outer()
    stack, _ = make_stack("3", outer)
    export = connect(stack)
    outer.failure, outer.closes_itself = failure, closes_itself

    for _ in range(3):
        with pytest.raises(type(failure)):
            connect(stack)

    outer.failure = None
    assert free_slots(stack, 10) == 2
    export.close()
    assert free_slots(stack, 10) == 3


def test_a_slot_comes_back_if_wrapping_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Limit, handle: Handle, client: Client) -> Handle:
        raise MemoryError

    stack, plugin = make_stack()
    with monkeypatch.context() as patched:
        patched.setattr(Limit, "wrap", fail)
        with pytest.raises(MemoryError):
            connect(stack)

    assert plugin.open_now == 0
    assert free_slots(stack, 10) == 1


def test_a_slot_comes_back_if_closing_fails() -> None:
    stack, plugin = make_stack()
    export = connect(stack)
    plugin.close_failure = OSError(errno.EIO, "disk is on fire")

    with pytest.raises(OSError, match="disk is on fire"):
        export.close()

    plugin.close_failure = None
    assert free_slots(stack, 10) == 1


def test_a_handle_closed_twice_frees_one_slot() -> None:
    stack, _ = make_stack("2")
    connect(stack)
    second = connect(stack)

    second.handle.close()
    second.handle.close()

    assert free_slots(stack, 10) == 1


# --- races ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Threads that take turns every microsecond, so that what is not locked shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_together(count: int, work: Callable[[threading.Barrier], None]) -> None:
    """Run `work` in so many threads, which meet at a barrier; raise what one of them raises."""
    barrier = threading.Barrier(count)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work(barrier)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


@pytest.mark.usefixtures("frequent_switches")
def test_of_many_clients_that_passed_preconnect_together_only_the_limit_get_in() -> None:
    stack, plugin = make_stack("5")

    for _ in range(10):
        exports: list[OpenExport] = []
        refused: list[bool] = []

        def client(
            barrier: threading.Barrier, exports: list[OpenExport] = exports, refused: list[bool] = refused
        ) -> None:
            stack.preconnect(CLIENT, False)
            barrier.wait(DEADLINE)
            if is_refused(lambda: exports.append(stack.open("", False, CLIENT))):
                refused.append(True)
            barrier.wait(DEADLINE)

        run_together(40, client)

        assert (len(exports), len(refused)) == (5, 35)
        for export in exports:
            export.close()
    assert plugin.most == 5
    assert free_slots(stack, 10) == 5


def test_clients_that_are_just_opening_are_counted_while_the_plugin_takes_its_time() -> None:
    stack, plugin = make_stack("5")
    all_others_refused = threading.Event()
    refusals = threading.Semaphore(0)
    plugin.while_opening = lambda: all_others_refused.wait(DEADLINE)
    exports: list[OpenExport] = []

    def client(barrier: threading.Barrier) -> None:
        if barrier.wait(DEADLINE) == 0:
            for _ in range(35):
                assert refusals.acquire(timeout=DEADLINE / 2)
            all_others_refused.set()
        elif is_refused(lambda: exports.append(stack.open("", False, CLIENT))):
            refusals.release()

    run_together(41, client)

    assert len(exports) == 5
    assert plugin.most == 5


@pytest.mark.usefixtures("frequent_switches")
def test_a_storm_of_clients_never_exceeds_the_limit_and_leaves_all_slots_free() -> None:
    stack, plugin = make_stack("3")

    def client(barrier: threading.Barrier) -> None:
        chance = random.Random(barrier.wait(DEADLINE))
        for _ in range(100):
            exports: list[OpenExport] = []
            is_refused(lambda exports=exports: exports.append(connect(stack)))  # type: ignore[misc]
            for export in exports:
                if chance.random() < 0.5:
                    export.handle.pread(1, 0)
                export.close()

    run_together(16, client)

    assert plugin.open_now == 0
    assert 1 <= plugin.most <= 3
    assert free_slots(stack, 10) == 3


# --- while it runs --------------------------------------------------------------------------------------------------


def reload(stack: Stack, *limit: str) -> list[str]:
    return stack.reload({stack.filters[0]: {"limit": limit}})


def test_a_higher_limit_lets_more_clients_in_at_once() -> None:
    stack, _ = make_stack("1")
    connect(stack)
    assert is_refused(lambda: connect(stack))

    assert reload(stack, "3") == ["limit: limit has been set: 3"]

    assert free_slots(stack, 10) == 2


def test_a_lower_limit_ends_nobody_and_refuses_until_enough_have_left() -> None:
    stack, plugin = make_stack("3")
    exports = [connect(stack) for _ in range(3)]

    reload(stack, "1")

    assert plugin.open_now == 3
    exports[0].close()
    exports[1].close()
    assert is_refused(lambda: connect(stack))
    exports[2].close()
    assert free_slots(stack, 10) == 1


def test_a_limit_that_is_removed_is_the_default() -> None:
    stack, _ = make_stack("3")

    reload(stack)

    assert free_slots(stack, 10) == 1


def test_no_limit_and_back_again() -> None:
    stack, _ = make_stack("1")

    reload(stack, "0")
    exports = [connect(stack) for _ in range(10)]
    reload(stack, "11")

    assert free_slots(stack, 20) == 1
    for export in exports:
        export.close()


def test_a_wrong_limit_leaves_the_old_one() -> None:
    stack, _ = make_stack("2")

    with pytest.raises(ConfigError, match="limit must be an integer"):
        reload(stack, "x")

    assert free_slots(stack, 10) == 2


# --- odds and ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["-1", "4294967296", "x", "", "1.5", "１"])
def test_what_is_no_limit_is_a_configuration_error(value: str) -> None:
    with pytest.raises(ConfigError, match=rf'^limit: limit must be an integer from 0 to 4294967295, not "{value}"'):
        make_stack(value)


def test_requests_go_past_the_filter() -> None:
    limit, disk = Limit(), Disk(lambda: None)
    Stack(Disks(), [limit], NoServer()).load()

    limited = limit.wrap(disk, CLIENT)

    assert limited is not disk
    assert limited.pread == disk.pread


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Limit]
    assert set(Limit.parameters) == {"limit"}

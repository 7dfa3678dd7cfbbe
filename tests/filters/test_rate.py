"""The rate filter: bits pass at the rates that are given, and no waiting outlives its client."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from nbdkitpy import Buffer, Client, ConfigError, Filter, Handle
from nbdkitpy.protocol.constants import Command
from nbdkitpy.stack import Stack
from nbdkitpy_filters.rate import Rate, register_filters
from nbdkitpy_filters.rate.bucket import Bucket, spend
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE
from tests.recorder import Recorder, RecorderHandle, configured, request

#: 1 KiB is 8192 bits.
KIB = 1024


class Clock:
    """Time passes only while somebody sleeps, or when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.is_over = False

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        if self.is_over:
            raise OSError(errno.ESHUTDOWN, "gone")
        self.now += seconds


class Served:
    """A stack on a clock of its own, and one client."""

    def __init__(self, *words: str) -> None:
        self.clock = Clock()
        self.stack: Stack = configured(Rate(self.clock), *words)
        self.handle = self.open()

    def open(self) -> Handle:
        return self.stack.open("", False, Client(1, sleep=self.clock.sleep)).handle

    @property
    def plugin(self) -> Recorder:
        assert isinstance(self.stack.plugin, Recorder)
        return self.stack.plugin

    def read(self, count: int, handle: Handle | None = None) -> float:
        """Read, and return how long that takes."""
        before = self.clock.now
        (handle or self.handle).pread(count, 0)
        return self.clock.now - before

    def write(self, count: int, handle: Handle | None = None) -> float:
        before = self.clock.now
        (handle or self.handle).pwrite(memoryview(bytes(count)), 0, 0)
        return self.clock.now - before

    def reload(self, **values: list[str]) -> None:
        self.stack.reload({self.stack.filters[0]: {key.replace("_", "-"): texts for key, texts in values.items()}})


class Plain(Handle):
    """Has no shortcuts."""

    def get_size(self) -> int:
        return 1 << 20

    def pread(self, count: int, offset: int) -> Buffer:
        return bytes(count)


# --- how long it takes ---


@pytest.mark.parametrize("parameter", ["rate", "connection-rate"])
def test_two_seconds_worth_pass_at_once_and_the_rest_at_the_rate(parameter: str) -> None:
    served = Served(f"{parameter}=8K")  # a KiB per second

    waits = [served.read(count * KIB) for count in (1, 1, 1, 3)]

    assert waits == pytest.approx([0, 0, 1, 3])


def test_reads_and_writes_have_a_limit_each() -> None:
    served = Served("rate=8K")

    waits = [served.read(2 * KIB), served.write(2 * KIB), served.read(KIB), served.write(2 * KIB)]

    assert waits == pytest.approx([0, 0, 1, 1])


def test_after_a_pause_there_is_no_more_than_the_burst() -> None:
    served = Served("rate=8K", "burstiness=4")
    served.read(4 * KIB)

    served.clock.now += 3600

    assert [served.read(4 * KIB), served.read(KIB)] == pytest.approx([0, 1])


def test_without_a_burst_each_request_takes_its_time() -> None:
    served = Served("rate=8K", "burstiness=0")

    assert [served.read(KIB), served.read(KIB)] == pytest.approx([1, 1])


def test_request_that_is_larger_than_the_burst_goes_too() -> None:
    served = Served("rate=8K")

    assert served.read(100 * KIB) == pytest.approx(98)


def test_connections_share_the_rate() -> None:
    served = Served("rate=8K")
    other = served.open()

    assert [served.read(2 * KIB), served.read(KIB, other), served.read(KIB)] == pytest.approx([0, 1, 1])


def test_connections_do_not_share_the_connection_rate() -> None:
    served = Served("connection-rate=8K")
    other = served.open()

    assert [served.read(2 * KIB), served.read(2 * KIB, other), served.read(KIB)] == pytest.approx([0, 0, 1])


def test_the_slower_of_both_rates_counts() -> None:
    served = Served("rate=16K", "connection-rate=8K")

    assert [served.read(2 * KIB), served.read(8 * KIB)] == pytest.approx([0, 8])


def test_other_requests_cost_nothing() -> None:
    served = Served("rate=8K")
    served.read(10 * KIB)
    before = served.clock.now

    for verb in ("flush", "trim", "zero", "cache", "extents"):
        request(served.handle, verb)
        assert getattr(served.handle, verb).__self__ is not served.handle

    assert served.clock.now == before


def test_without_a_limit_everything_goes_past_the_filter() -> None:
    rate, disk = Rate(Clock()), Plain()
    rate.config("burstiness", "5")
    rate.get_ready()

    assert rate.wrap(disk, Client(1)) is disk


# --- shortcuts of reads ---


def room(size: int) -> memoryview:
    return memoryview(bytearray(size))


def test_shortcuts_are_taken_while_there_are_enough_bits() -> None:
    served = Served("rate=8K", "connection-rate=8K")
    assert served.handle.file_range is not None
    assert served.handle.pread_into is not None

    assert served.handle.file_range(KIB, 0) is not None
    assert served.handle.pread_into(room(KIB), 0)
    assert served.handle.file_range(KIB, 0) is None
    assert not served.handle.pread_into(room(KIB), 0)

    assert served.read(KIB) == pytest.approx(1)  # what was not taken has not been paid for
    assert served.handle.sparse


def test_what_one_bucket_refuses_the_other_gets_back() -> None:
    served = Served("rate=8M", "connection-rate=8K")
    assert served.handle.file_range is not None

    for _ in range(5000):
        served.handle.file_range(4 * KIB, 0)

    assert served.read(2 * KIB) == 0
    assert served.stack.filters[0]._reads._level == pytest.approx(16 * KIB * KIB - 16 * KIB)  # type: ignore[attr-defined]


class Slow(RecorderHandle):
    """Never has anything at hand."""

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        return False

    def file_range(self, count: int, offset: int) -> None:
        return None


class Slows(Recorder):
    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        return Slow(self)


def test_shortcuts_that_lead_nowhere_cost_nothing() -> None:
    clock = Clock()
    handle = configured(Rate(clock), "rate=8K", plugin=Slows()).open("", False, Client(1, sleep=clock.sleep)).handle
    assert handle.file_range is not None
    assert handle.pread_into is not None

    assert handle.file_range(2 * KIB, 0) is None
    assert not handle.pread_into(room(2 * KIB), 0)

    handle.pread(2 * KIB, 0)
    assert clock.now == 1000


def test_there_are_no_shortcuts_where_the_inner_handle_has_none() -> None:
    rate = Rate(Clock())
    rate.config("rate", "8K")
    rate.get_ready()

    handle = rate.wrap(Plain(), Client(1))

    assert handle.file_range is not None
    assert handle.pread_into is not None
    assert (handle.file_range(1, 0), handle.pread_into(room(1), 0), handle.sparse) == (None, False, False)


# --- rates that change ---


def test_rate_is_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rate"
    path.write_text("16K\n")
    served = Served(f"rate-file={path}")

    assert [served.read(4 * KIB), served.read(2 * KIB)] == pytest.approx([0, 1])


def test_file_that_comes_changes_the_rate_and_one_that_goes_does_not(tmp_path: Path) -> None:
    path = tmp_path / "rate"
    served = Served("connection-rate=8K", f"connection-rate-file={path}")
    assert served.read(4 * KIB) == pytest.approx(2)

    path.write_text("80K")
    served.clock.now += 1
    assert served.read(20 * KIB) == pytest.approx(1, abs=1)
    assert served.read(20 * KIB) == pytest.approx(2)

    path.unlink()
    served.clock.now += 1
    served.read(100 * KIB)
    assert served.read(20 * KIB) == pytest.approx(2)


def test_without_a_rate_there_is_no_limit_until_the_file_comes(tmp_path: Path) -> None:
    path = tmp_path / "rate"
    served = Served(f"rate-file={path}")
    assert served.read(1 << 30) == 0
    assert served.handle.file_range is not None
    assert served.handle.file_range(1 << 30, 0) is not None

    path.write_text("8K")
    served.clock.now += 1

    assert served.read(2 * KIB) + served.read(10 * KIB) == pytest.approx(12, abs=2)


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "8K 8K", "\0", "9" * 100])
def test_file_that_holds_no_rate_is_told_of_once_and_changes_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rate"
    path.write_text("8K")
    served = Served(f"rate-file={path}")
    served.read(2 * KIB)
    path.write_text(text)

    for _ in range(3):
        served.clock.now += 1
        served.read(KIB)

    assert served.read(KIB) == pytest.approx(1)
    assert len(caplog.records) == bool(text)  # one that is empty is just being written
    assert all("must hold a number of bits per second" in record.getMessage() for record in caplog.records)


def test_reload_changes_the_rate_for_those_who_are_connected() -> None:
    served = Served("rate=8K")
    served.read(2 * KIB)

    served.reload(rate=["80K"], burstiness=["1"])

    assert served.read(10 * KIB) == pytest.approx(1)


def test_lower_rate_leaves_no_more_than_its_own_burst() -> None:
    served = Served("rate=80K")

    served.reload(rate=["8K"])

    assert served.read(3 * KIB) == pytest.approx(1)


class Reloading(Clock):
    """Lifts the limit in the first sleep."""

    served: Served

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.served.reload(rate=[])


def test_who_waits_does_not_wait_on_when_there_is_no_limit_any_more() -> None:
    served = Served("rate=8K")
    clock = Reloading()
    clock.served = served
    handle = served.stack.open("", False, Client(1, sleep=clock.sleep)).handle

    handle.pread(1 << 30, 0)

    assert clock.now == pytest.approx(1001)
    assert served.read(1 << 30) == 0


# --- who is gone ---


@pytest.mark.parametrize("verb", ["pread", "pwrite"])
def test_request_of_a_client_that_is_gone_is_not_carried_out_and_not_paid_for(verb: str) -> None:
    served = Served("rate=4K")
    served.read(KIB)
    served.write(KIB)
    before = list(served.plugin.calls)
    served.clock.is_over = True

    with pytest.raises(OSError, match="gone"):
        request(served.handle, verb)
    assert served.plugin.calls == before

    served.clock.is_over = False
    assert (served.read if verb == "pread" else served.write)(512) == pytest.approx(1)


def test_those_who_wait_gain_by_one_who_has_gone() -> None:
    clock = Clock()
    bucket = Bucket(lambda: 100, lambda: 0.0, clock)
    bucket.take(1000)
    mark = bucket.take(500)
    assert bucket.wait_for(mark) == pytest.approx(15)

    bucket.give_back(1000)

    assert bucket.wait_for(mark) == pytest.approx(5)


def test_requests_go_in_the_order_in_which_they_came() -> None:
    bucket = Bucket(lambda: 100, lambda: 0.0, Clock())

    marks = [bucket.take(100) for _ in range(3)]

    assert [bucket.wait_for(mark) for mark in marks] == pytest.approx([1, 2, 3])


def test_together_many_threads_get_no_more_than_the_rate() -> None:
    clock = Clock()
    lock = threading.Lock()
    bucket = Bucket(lambda: 1000, lambda: 1.0, clock)
    failures: list[BaseException] = []

    def sleep(seconds: float) -> None:
        with lock:
            clock.now += 0.01

    def work() -> None:
        try:
            for _ in range(20):
                spend([bucket], 50, sleep)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert not failures
    assert clock.now - 1000 >= 7 - 0.1  # 8000 bits, of which 1000 were there


def test_server_ends_although_requests_wait_for_years(start_server: StartServer) -> None:
    rate = Rate()
    rate.config("rate", "1")
    running = start_server(Recorder(), rate, drain=float(PATIENCE))
    client = running.connect()
    client.send(Command.WRITE, data=bytes(4096))
    client.send(Command.READ, 0, 4096)

    assert running.stop()

    assert {reply.error for reply in client.replies(2).values()} == {errno.ESHUTDOWN}


# --- odds and ends ---


@pytest.mark.parametrize("word", ["rate=x", "rate=0", "connection-rate=-1", "rate=1.5M", "burstiness=-1", "rate-file="])
def test_what_is_no_value_is_a_configuration_error(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^rate: {word.partition('=')[0]} must be"):
        configured(Rate(), word)


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Rate]

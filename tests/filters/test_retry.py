"""The retry filter: what fails is tried again with the plugin opened anew, as long as the client is there."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable

import pytest

from nbdkitpy import Client, ConfigError, Filter, FilterHandle, Flags, Handle, ThreadModel
from nbdkitpy.backend import VERBS
from nbdkitpy.protocol.constants import Command
from nbdkitpy.stack import OpenExport
from nbdkitpy_filters.retry import Retry, register_filters
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, Style
from tests.recorder import REQUESTS, SIZE, Recorder, RecorderHandle, configured, request
from tests.serving import make_stack

BAD = OSError(errno.EIO, "bad")
WORSE = OSError(errno.ENXIO, "worse")


class Sleeper:
    """Notes how long it was to wait; at the end of `patience` the client is gone."""

    def __init__(self, patience: int = 1000) -> None:
        self.waits: list[float] = []
        self.patience = patience

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        if len(self.waits) > self.patience:
            raise OSError(errno.ESHUTDOWN, "gone")


class Served:
    """A recorder behind the filter, and a client."""

    def __init__(self, *words: str, plugin: Recorder | None = None, patience: int = 1000) -> None:
        self.plugin = plugin or Recorder()
        self.stack = configured(Retry(), *words, plugin=self.plugin)
        self.sleeper = Sleeper(patience)

    def open(self, *, readonly: bool = False) -> OpenExport:
        return self.stack.open("disk", readonly, Client(1, sleep=self.sleeper.sleep))

    @property
    def handle(self) -> Handle:
        return self.open().handle

    @property
    def order(self) -> list[object]:
        """The names of the plugin's calls."""
        return [call[0] for call in self.plugin.calls]


# --- trying again ---


@pytest.mark.parametrize("verb", VERBS)
def test_request_that_fails_is_made_again_on_a_new_handle(verb: str) -> None:
    served = Served()
    served.plugin.fail(verb, BAD, WORSE)

    request(served.handle, verb)

    assert served.order == ["open", verb, "close", "open", verb, "close", "open", verb]
    assert served.plugin.calls[2] == ("close", 1)
    assert served.plugin.calls[0] == served.plugin.calls[3] == ("open", "disk", False)
    assert served.plugin.calls[1] == served.plugin.calls[4]
    assert served.sleeper.waits == [2, 4]


@pytest.mark.parametrize(
    ("words", "waits"),
    [
        ([], [2, 4, 8, 16, 32]),
        (["retry-exponential=no"], [2, 2, 2, 2, 2]),
        (["retries=3", "retry-delay=100ms"], [0.1, 0.2, 0.4]),
        (["retries=0"], []),
        (["retries=3", "retry-delay=2000000000"], [2e9, 2**31 - 1, 2**31 - 1]),
    ],
)
def test_gives_up_after_the_last_delay_with_the_last_error(words: list[str], waits: list[float]) -> None:
    served = Served(*words)
    handle = served.handle
    served.plugin.fail("pread", *[WORSE] * len(waits), BAD)

    with pytest.raises(OSError, match="bad") as raised:
        handle.pread(512, 0)

    assert raised.value is BAD
    assert served.sleeper.waits == waits
    assert served.order[-1] == "pread"


def test_next_request_has_all_its_tries_again_and_begins_with_the_handle_that_is_there() -> None:
    served = Served("retries=1")
    handle = served.handle
    served.plugin.fail("pread", BAD, BAD, BAD, None)
    with pytest.raises(OSError, match="bad"):
        handle.pread(512, 0)
    del served.plugin.calls[:]

    handle.pread(512, 0)

    assert served.order == ["pread", "close", "open", "pread"]


def test_defects_of_the_plugin_are_tried_again_too() -> None:
    served = Served()
    served.plugin.fail("flush", KeyError("whatever a library raises"))

    served.handle.flush()

    assert served.order[-1] == "flush"


def test_what_is_no_failure_is_not_tried_again() -> None:
    served = Served()
    handle = served.handle
    served.plugin.fail("pread", SystemExit(1))

    with pytest.raises(SystemExit):
        handle.pread(512, 0)

    assert served.sleeper.waits == []


def test_failures_are_told_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    served = Served()
    served.plugin.fail("pread", BAD, ValueError("odd"))
    served.plugin.fail("close", WORSE)

    served.handle.pread(512, 0)

    assert [record.getMessage() for record in caplog.records] == [
        "retry: pread failed, will be tried again in 2 s: [Errno 5] bad",
        "retry: what has failed cannot be closed either: [Errno 6] worse",
        "retry: pread failed, will be tried again in 4 s: ValueError: odd",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_extents_that_fail_while_they_are_read_are_asked_for_again() -> None:
    class Lazy(RecorderHandle):
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            yield offset, 1, 0
            yield from super().extents(count - 1, offset + 1, flags)

    class Lazies(Recorder):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            self.note("open", export_name, readonly)
            return Lazy(self)

    served = Served(plugin=Lazies())
    served.plugin.fail("extents", BAD)

    assert served.handle.extents(512, 0, 0) == [(0, 1, 0), (1, 511, 3)]


# --- opening ---


def test_opening_is_tried_again() -> None:
    served = Served()
    served.plugin.fail("open", BAD, WORSE)

    served.open()

    assert served.order == ["open", "open", "open"]
    assert served.sleeper.waits == [2, 4]


def test_opening_fails_in_the_end() -> None:
    served = Served("retries=2")
    served.plugin.fail("open", *[BAD] * 9)

    with pytest.raises(OSError, match="bad"):
        served.open()

    assert served.order == ["open"] * 3


def test_opening_anew_that_fails_is_one_of_the_tries() -> None:
    served = Served()
    handle = served.handle
    served.plugin.fail("pread", BAD)
    served.plugin.fail("open", WORSE, WORSE)

    handle.pread(512, 0)

    assert served.order == ["open", "pread", "close", "open", "open", "open", "pread"]
    assert served.sleeper.waits == [2, 4, 8]


def test_handle_that_could_not_be_opened_anew_is_opened_by_the_next_request_and_not_closed_twice() -> None:
    served = Served("retries=1")
    export = served.open()
    served.plugin.fail("pread", BAD)
    served.plugin.fail("open", WORSE)
    with pytest.raises(OSError, match="worse"):
        export.handle.pread(512, 0)
    assert export.handle.file_range is not None
    assert export.handle.file_range(512, 0) is None
    assert served.order == ["open", "pread", "close", "open"]

    export.handle.pread(512, 0)
    export.close()

    assert served.order[4:] == ["open", "pread", "close"]


def test_nothing_is_closed_that_is_not_open() -> None:
    served = Served("retries=1")
    export = served.open()
    served.plugin.fail("pread", BAD)
    served.plugin.fail("open", WORSE)
    with pytest.raises(OSError, match="worse"):
        export.handle.pread(512, 0)

    export.close()

    assert served.order.count("close") == 1


class Sick(Filter):
    """Its second handle cannot be asked anything."""

    name = "sick"
    opened = 0

    def wrap(self, handle: Handle, client: Client) -> Handle:
        self.opened += 1
        return SickHandle(handle) if self.opened == 2 else handle


class SickHandle(FilterHandle):
    def can_write(self) -> bool:
        raise WORSE


def test_new_handle_that_cannot_be_asked_is_closed_and_opened_again() -> None:
    plugin, sleeper = Recorder(), Sleeper()
    handle = make_stack(plugin, [Retry(), Sick()]).open("", False, Client(1, sleep=sleeper.sleep)).handle
    plugin.fail("pread", BAD)

    handle.pread(512, 0)
    handle.close()

    assert [call for call in plugin.calls if call[0] == "close"] == [("close", 1), ("close", 2), ("close", 3)]


# --- what the new handle cannot do ---


@pytest.mark.parametrize("verb", ["pread", "pwrite", "trim", "zero", "cache", "extents"])
def test_request_beyond_the_end_of_a_disk_that_shrank_fails_without_the_plugin(verb: str) -> None:
    served = Served("retries=1")
    handle = served.handle
    served.plugin.fail(verb, BAD)
    served.plugin.size = 4096 + 511

    with pytest.raises(OSError, match="has shrunk to 4607 bytes") as raised:
        request(handle, verb)

    assert raised.value.errno == errno.EIO
    assert served.order.count(verb) == 1


def test_disk_that_has_its_size_again_is_served_again() -> None:
    served = Served()
    served.plugin.fail("pread", BAD)
    sizes = iter([100, 100, SIZE])

    class Growing(Sleeper):
        def sleep(self, seconds: float) -> None:
            served.plugin.size = next(sizes)

    served.sleeper.sleep = Growing().sleep  # type: ignore[method-assign]
    handle = served.open().handle
    handle.pread(512, 4096)

    assert served.plugin.handles == 4


def test_disk_that_grew_keeps_its_size_for_the_client() -> None:
    served = Served()
    export = served.open()
    served.plugin.fail("pread", BAD)
    served.plugin.size = 2 * SIZE

    export.handle.pread(512, 0)

    assert export.capabilities.size == SIZE


@pytest.mark.parametrize(
    ("verb", "flags", "lacks", "error"),
    [
        ("pwrite", 0, "can_write", errno.EROFS),
        ("trim", 0, "can_write", errno.EROFS),
        ("zero", 0, "can_write", errno.EROFS),
        ("trim", 0, "can_trim", errno.EIO),
        ("zero", 0, "can_zero", errno.EIO),
        ("flush", 0, "can_flush", errno.EIO),
        ("cache", 0, "can_cache", errno.EIO),
        ("pwrite", Flags.FUA, "can_fua", errno.EIO),
    ],
)
def test_what_a_new_handle_cannot_do_is_tried_until_one_can(verb: str, flags: int, lacks: str, error: int) -> None:
    served = Served("retries=2")
    handle = served.handle
    served.plugin.fail(verb, BAD)
    served.plugin.lacks = frozenset({lacks})
    arguments = (*REQUESTS[verb][:-1], flags) if flags else REQUESTS[verb]

    with pytest.raises(OSError, match=r"^.Errno [0-9]+. retry: ") as raised:
        getattr(handle, verb)(*arguments)
    assert raised.value.errno == error
    assert served.order.count(verb) == 1
    assert served.order.count("open") == 3

    served.plugin.lacks = frozenset()
    getattr(handle, verb)(*arguments)
    assert served.order.count(verb) == 2


def test_where_extents_are_not_known_any_more_all_is_data() -> None:
    served = Served()
    handle = served.handle
    served.plugin.fail("extents", BAD)
    served.plugin.lacks = frozenset({"can_extents"})

    assert handle.extents(512, 4096, 0) == [(4096, 512, 0)]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EOPNOTSUPP])
def test_fast_zero_that_is_not_fast_is_no_failure(number: int) -> None:
    served = Served()
    handle = served.handle
    served.plugin.fail("zero", OSError(number, "slow"))

    with pytest.raises(OSError, match="slow"):
        handle.zero(512, 0, Flags.FAST_ZERO)

    assert served.sleeper.waits == []


def test_fast_zero_fails_at_once_where_a_new_handle_has_none() -> None:
    served = Served()
    handle = served.handle
    served.plugin.fail("pread", BAD)
    served.plugin.lacks = frozenset({"can_fast_zero"})
    handle.pread(512, 0)
    del served.sleeper.waits[:]

    with pytest.raises(OSError, match="fast any more") as raised:
        handle.zero(512, 0, Flags.FAST_ZERO)

    assert raised.value.errno == errno.ENOTSUP
    assert served.sleeper.waits == []


# --- reading only ---


def test_after_a_failure_the_plugin_is_opened_for_reading_only() -> None:
    served = Served("retry-readonly=yes")
    handle = served.handle
    served.plugin.fail("pwrite", BAD)

    for _ in range(2):
        with pytest.raises(OSError, match="has become read-only") as raised:
            request(handle, "pwrite")
        assert raised.value.errno == errno.EROFS

    handle.pread(512, 0)
    assert [call for call in served.plugin.calls if call[0] == "open"] == [
        ("open", "disk", False),
        ("open", "disk", True),
    ]
    assert served.order.count("pwrite") == 1
    assert served.sleeper.waits == [2]


def test_export_that_can_be_opened_only_the_second_time_is_read_only() -> None:
    served = Served("retry-readonly=yes")
    served.plugin.fail("open", BAD)

    assert not served.open().capabilities.can_write


def test_other_clients_are_served_as_before() -> None:
    served = Served("retry-readonly=yes")
    served.plugin.fail("pread", BAD)
    served.handle.pread(512, 0)

    assert served.open().capabilities.can_write


def test_what_is_opened_for_reading_only_is_opened_so_again() -> None:
    served = Served()
    served.plugin.fail("pread", BAD)

    served.open(readonly=True).handle.pread(512, 0)

    assert [call for call in served.plugin.calls if call[0] == "open"] == [("open", "disk", True)] * 2


# --- the client is gone ---


def test_nothing_is_tried_again_for_a_client_that_is_gone() -> None:
    served = Served(patience=1)
    handle = served.handle
    served.plugin.fail("pwrite", *[BAD] * 9)

    with pytest.raises(OSError, match="gone") as raised:
        request(handle, "pwrite")

    assert raised.value.errno == errno.ESHUTDOWN
    assert served.order == ["open", "pwrite", "close", "open", "pwrite"]


def test_opening_is_not_tried_again_for_a_client_that_is_gone() -> None:
    served = Served(patience=0)
    served.plugin.fail("open", BAD)

    with pytest.raises(OSError, match="gone"):
        served.open()

    assert served.order == ["open"]


class Failing(Recorder):
    """Writes of three bytes fail."""

    def __init__(self) -> None:
        super().__init__()
        self.has_failed = threading.Event()

    def note(self, *call: object) -> None:
        super().note(*call)
        if call[:2] == ("pwrite", 3):
            self.has_failed.set()
            raise BAD


def test_D7_write_of_a_dead_connection_is_not_tried_again_after_newer_data(start_server: StartServer) -> None:
    plugin, retry = Failing(), Retry()
    retry.config("retry-delay", "3600")
    running = start_server(plugin, retry)
    old = running.connect()
    old.send(Command.WRITE, 0, data=b"old")
    assert plugin.has_failed.wait(PATIENCE)

    old.socket.close()
    running.wait_for_sessions(0)
    with running.connect() as new:
        new.write(0, b"newer")

    assert [call[1] for call in plugin.requests] == [3, 5]


def test_server_ends_although_a_request_waits_to_be_tried_again(start_server: StartServer) -> None:
    plugin, retry = Failing(), Retry()
    retry.config("retry-delay", "3600")
    running = start_server(plugin, retry, drain=float(PATIENCE))
    client = running.connect()
    client.send(Command.WRITE, 0, data=b"old")
    assert plugin.has_failed.wait(PATIENCE)

    assert running.stop()

    assert client.reply().error == errno.ESHUTDOWN


# --- shortcuts of reads ---


def test_file_range_is_that_of_the_handle_that_is_open() -> None:
    served = Served()
    handle = served.handle
    assert handle.sparse
    assert handle.file_range is not None
    assert handle.file_range(512, 8) == (0, 8)

    served.plugin.fail("file_range", BAD)
    assert handle.file_range(512, 8) is None  # it is then read, and that is tried again

    served.plugin.fail("pread", BAD)
    served.plugin.size = 4096
    handle.pread(512, 0)
    assert handle.file_range(512, 8) == (0, 8)
    assert handle.file_range(512, 4096) is None


def test_handle_without_shortcuts_gets_none() -> None:
    class Plain(Recorder):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            return Disk()

    class Disk(Handle):
        def get_size(self) -> int:
            return 512

        def pread(self, count: int, offset: int) -> bytes:
            return bytes(count)

    handle = Served(plugin=Plain()).handle

    assert not handle.sparse
    assert handle.file_range is not None
    assert handle.file_range(1, 0) is None


@pytest.mark.parametrize("style", list(Style))
def test_reads_come_through_a_reopening(start_server: StartServer, style: Style) -> None:
    plugin, retry = Recorder(), Retry()
    retry.config("retry-delay", "1us")
    client = start_server(plugin, retry).connect(style)
    plugin.fail("file_range", *[BAD] * 2)
    plugin.fail("extents", BAD)
    plugin.fail("pread", BAD)

    assert client.read(0, 4096) == bytes(4096)
    assert client.read(4096, 65536) == bytes(65536)


# --- odds and ends ---


def test_one_request_at_a_time_is_made_of_a_handle() -> None:
    assert Served().stack.model is ThreadModel.SERIALIZE_REQUESTS


@pytest.mark.parametrize(
    "word", ["retries=-1", "retries=x", "retry-delay=0", "retry-delay=x", "retry-exponential=x", "retry-readonly=2"]
)
def test_what_is_no_value_is_a_configuration_error(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^retry: {word.partition('=')[0]} must be"):
        configured(Retry(), word)


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Retry]

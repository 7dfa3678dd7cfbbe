"""The exitlast filter: the last client's going, and nothing else, ends the server."""

from __future__ import annotations

import errno
import threading

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle, Plugin, ThreadModel
from nbdkitpy.stack import Stack
from nbdkitpy_filters.exitlast import ExitLast, register_filters
from tests.serving import NoServer

CLIENT = Client(1)
PROBE = Client(1, is_probe=True)
DEADLINE = 20  # seconds; reached only if the filter is wrong


class Disk(Handle):
    close_failure: Exception | None = None

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def get_size(self) -> int:
        return 512

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(count)

    def close(self) -> None:
        self.events.append("close")
        if self.close_failure:
            raise self.close_failure


class Disks(Plugin):
    name = "disks"

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.failure: Exception | None = None
        self.close_failure: Exception | None = None

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if self.failure:
            raise self.failure
        disk = Disk(self.events)
        disk.close_failure = self.close_failure
        return disk


class Server(NoServer):
    """Notes in the plugin's events that it was told to end; not in order, as who has just connected is to be served."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def finish(self) -> None:
        self.events.append("finish")


@pytest.fixture
def plugin() -> Disks:
    return Disks()


@pytest.fixture
def stack(plugin: Disks) -> Stack:
    made = Stack(plugin, [ExitLast()], Server(plugin.events))
    made.load()
    made.config_complete()
    return made


def test_the_last_close_ends_the_server_once_the_plugin_has_closed(stack: Stack, plugin: Disks) -> None:
    export = stack.open("", False, CLIENT)
    assert plugin.events == []

    export.close()

    assert plugin.events == ["close", "finish"]


def test_only_the_last_of_several_clients_ends_the_server(stack: Stack, plugin: Disks) -> None:
    exports = [stack.open("", False, Client(number)) for number in (1, 2, 3)]

    exports[1].close()
    exports[0].close()
    assert plugin.events == ["close", "close"]

    exports[2].close()
    assert plugin.events == ["close", "close", "close", "finish"]


def test_N12_clients_that_only_connect_or_list_do_not_count(stack: Stack, plugin: Disks) -> None:
    stack.preconnect(CLIENT, False)
    stack.list_exports(CLIENT, False)
    stack.default_export(CLIENT, False)

    assert plugin.events == []


def test_a_client_whose_open_fails_does_not_count(stack: Stack, plugin: Disks) -> None:
    plugin.failure = FileNotFoundError(errno.ENOENT, "no such export")
    for _ in range(3):
        with pytest.raises(FileNotFoundError):
            stack.open("", False, CLIENT)
    assert plugin.events == []

    plugin.failure = None
    stack.open("", False, CLIENT).close()

    assert plugin.events == ["close", "finish"]


def test_a_probe_does_not_end_the_server(stack: Stack, plugin: Disks) -> None:
    stack.open("", False, PROBE).close()

    assert plugin.events == ["close"]


def test_a_probe_does_not_keep_the_server_alive(stack: Stack, plugin: Disks) -> None:
    export = stack.open("", False, CLIENT)
    probe = stack.open("", False, PROBE)

    export.close()
    assert plugin.events == ["close", "finish"]

    probe.close()
    assert plugin.events == ["close", "finish", "close"]


def test_a_client_that_probes_and_then_opens_is_served(stack: Stack, plugin: Disks) -> None:
    stack.open("", False, PROBE).close()
    export = stack.open("", False, CLIENT)
    assert plugin.events == ["close"]

    export.close()
    assert plugin.events == ["close", "close", "finish"]


def test_N12_probes_beside_a_client_do_not_end_the_server_under_it(stack: Stack, plugin: Disks) -> None:
    stack.open("", False, CLIENT)

    for _ in range(100):
        stack.preconnect(CLIENT, False)
        stack.open("", False, PROBE).close()

    assert "finish" not in plugin.events


def test_no_layer_is_put_around_the_handle_of_a_probe() -> None:
    disk = Disk([])

    assert ExitLast().wrap(disk, PROBE) is disk


def test_the_server_ends_even_if_the_plugin_fails_to_close(stack: Stack, plugin: Disks) -> None:
    plugin.close_failure = OSError(errno.EIO, "disk is on fire")
    export = stack.open("", False, CLIENT)

    with pytest.raises(OSError, match="disk is on fire"):
        export.close()

    assert plugin.events == ["close", "finish"]


def test_a_handle_closed_twice_counts_once(stack: Stack, plugin: Disks) -> None:
    stack.open("", False, CLIENT)
    second = stack.open("", False, CLIENT)

    second.handle.close()
    second.handle.close()

    assert "finish" not in plugin.events


def test_many_clients_that_leave_together_end_the_server_once(stack: Stack, plugin: Disks) -> None:
    barrier = threading.Barrier(32)

    def client() -> None:
        export = stack.open("", False, CLIENT)
        barrier.wait(DEADLINE)  # all are open
        export.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)

    assert plugin.events.count("close") == 32
    assert plugin.events.count("finish") == 1
    assert plugin.events[-1] == "finish"


def test_the_server_is_told_without_a_lock_held(plugin: Disks) -> None:
    """Another client may open, which takes the lock, before `finish` returns."""

    class Closing(Server):
        def finish(self) -> None:
            super().finish()
            exitlast.wrap(Disk(self.events), CLIENT)

    exitlast = ExitLast()
    Stack(plugin, [exitlast], Closing(plugin.events)).load()
    thread = threading.Thread(target=lambda: exitlast.open("", False, CLIENT).close(), daemon=True)

    thread.start()
    thread.join(DEADLINE)

    assert not thread.is_alive()
    assert plugin.events == ["close", "finish"]


def test_requests_go_past_the_filter(plugin: Disks) -> None:
    exitlast, disk = ExitLast(), Disk([])
    Stack(plugin, [exitlast], Server(plugin.events)).load()

    counted = exitlast.wrap(disk, CLIENT)

    assert counted is not disk
    assert counted.pread == disk.pread


def test_there_are_no_parameters(stack: Stack) -> None:
    assert not ExitLast.parameters
    with pytest.raises(ConfigError, match="unknown parameter"):
        stack.config("grace", "1")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [ExitLast]

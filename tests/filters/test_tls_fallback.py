"""The tls-fallback filter: clients without TLS read a message, and reach nothing behind it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from nbdkitpy import Client, ConfigError, Export, Filter, Handle, Plugin, ThreadModel
from nbdkitpy.stack import Stack
from nbdkitpy_filters.tls_fallback import TlsFallback, register_filters
from tests.serving import NoServer

CLEAR = Client(1)
SECURE = Client(2, tls=True)
MESSAGE = b"This NBD server requires TLS authentication before it will serve useful data.\n"


class Disk(Handle):
    def get_size(self) -> int:
        return 4096

    def pread(self, count: int, offset: int) -> bytes:
        return b"x" * count

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None: ...


class Disks(Plugin):
    name = "disks"

    def __init__(self, model: ThreadModel = ThreadModel.PARALLEL) -> None:
        super().__init__()
        self.asked: list[str] = []
        self._model = model

    def thread_model(self) -> ThreadModel:
        return self._model

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        self.asked.append("list")
        return [Export("secret")]

    def default_export(self, client: Client, readonly: bool) -> str:
        self.asked.append("default")
        return "secret"

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.asked.append(f"open {export_name}")
        return Disk()


class OneAtATime(Filter):
    name = "one-at-a-time"

    def thread_model(self) -> ThreadModel:
        return ThreadModel.SERIALIZE_CONNECTIONS


def stack_of(plugin: Plugin, *filters: Filter, **parameters: str) -> Stack:
    stack = Stack(plugin, [TlsFallback(), *filters], NoServer())
    stack.load()
    for key, value in parameters.items():
        stack.config(key, value)
    stack.config_complete()
    return stack


def message_of(stack: Stack, name: str = "") -> bytes:
    export = stack.open(name, False, CLEAR)
    content = export.handle.pread(export.capabilities.size, 0)
    export.close()
    return bytes(content)


@pytest.mark.parametrize("name", ["", "secret", "other"])
def test_client_without_tls_reads_a_message_whatever_it_asks_for(name: str) -> None:
    plugin = Disks()

    assert message_of(stack_of(plugin), name) == MESSAGE.ljust(512, b"\0")

    assert plugin.asked == []


def test_message_cannot_be_written_and_may_be_read_by_many_connections() -> None:
    export = stack_of(Disks()).open("", False, CLEAR)

    assert not export.capabilities.can_write
    assert export.capabilities.can_multi_conn
    assert export.handle.pread(3, 5) == MESSAGE[5:8]


def test_client_without_tls_is_told_of_no_export() -> None:
    plugin = Disks()
    stack = stack_of(plugin)

    assert stack.list_exports(CLEAR, False) == [Export("")]
    assert stack.default_export(CLEAR, False) == ""
    assert plugin.asked == []


def test_client_with_tls_is_served_as_if_there_was_no_filter() -> None:
    plugin = Disks()
    stack = stack_of(plugin)

    export = stack.open("disk", False, SECURE)

    assert (export.capabilities.size, export.capabilities.can_write) == (4096, True)
    assert stack.list_exports(SECURE, False) == [Export("secret")]
    assert stack.default_export(SECURE, False) == "secret"
    assert plugin.asked == ["open disk", "list", "default"]


@pytest.mark.parametrize(
    ("text", "size"), [("", 512), ("hello", 512), ("x" * 512, 512), ("x" * 513, 1024), ("é" * 256, 512)]
)
def test_message_can_be_chosen_and_is_filled_up_to_whole_sectors(text: str, size: int) -> None:
    assert message_of(stack_of(Disks(), tlsreadme=text)) == text.encode().ljust(size, b"\0")


def test_one_connection_at_a_time_behind_it_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tls-fallback: disks serves one connection at a time"):
        stack_of(Disks(ThreadModel.SERIALIZE_CONNECTIONS))
    with pytest.raises(ConfigError, match="tls-fallback: one-at-a-time serves one connection at a time"):
        stack_of(Disks(), OneAtATime())


def test_it_is_registered() -> None:
    found: list[type[Filter]] = []

    register_filters(found.append)

    assert found == [TlsFallback]

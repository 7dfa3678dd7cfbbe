"""A plugin and a filter that note what becomes of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from nbdkitpy import Client, Filter, Handle, Parameter, Plugin, Repeated, integer, parse_path, parse_size, parse_string
from tests.nbdclient import PATIENCE


def descriptors() -> set[str]:
    """Numbers of open files, those included that wait for the garbage collector: nothing may be left to that."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


class DiskHandle(Handle):
    """Bytes in memory."""

    def __init__(self, plugin: Disk) -> None:
        self.plugin = plugin

    def get_size(self) -> int:
        return len(self.plugin.content)

    def pread(self, count: int, offset: int) -> bytes:
        self.plugin.note("pread")
        return bytes(self.plugin.content[offset : offset + count])

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.plugin.content[offset : offset + len(data)] = data

    def close(self) -> None:
        self.plugin.note("close")


class Disk(Plugin):
    """Notes the steps of its life in `steps`, and does at each what `does` says of it."""

    name = "disk"
    size = Parameter(parse_size, default=1 << 16)
    depth = Parameter(integer(1, 64))
    label = Parameter(parse_string, default="")
    secret = Parameter(parse_size, default=0, secret=True)
    path = Parameter(parse_path)
    tag = Repeated(parse_string)

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []
        self.does: dict[str, Callable[[], object]] = {}
        self.content = bytearray()
        self.threads: set[threading.Thread] = set()

    def note(self, step: str) -> None:
        self.steps.append(step)
        self.threads.add(threading.current_thread())
        self.does.get(step, lambda: None)()

    def load(self) -> None:
        self.note("load")

    def config_complete(self) -> None:
        super().config_complete()
        self.note("config_complete")

    def get_ready(self) -> None:
        self.content = bytearray(self.size)
        self.note("get_ready")

    def after_fork(self) -> None:
        self.note("after_fork")

    def cleanup(self) -> None:
        self.note("cleanup")

    def unload(self) -> None:
        self.note("unload")

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.note("open")
        return DiskHandle(self)


class Sticker(Filter):
    """Has parameters, and does nothing with them."""

    name = "sticker"
    note = Parameter(parse_string, default="")
    label = Parameter(parse_string, default="")


def holding_up(reached: threading.Event, go_on: threading.Event) -> Callable[[], None]:
    """What does not return before it may go on."""

    def hold_up() -> None:
        reached.set()
        go_on.wait(PATIENCE)

    return hold_up

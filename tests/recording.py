"""A plugin whose handle writes down each call, for tests of what filters pass on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nbdkitpy import Client, ExtentType, FileRange, Filter, FilterHandle, Handle, Plugin, ThreadModel
from nbdkitpy.backend import VERBS
from nbdkitpy.stack import OpenExport, Stack
from tests.serving import NoServer

SIZE = 1000

#: What a handle can be asked for by a client, and what makes reads fast.
EVERYTHING = (*VERBS, "inline", "sparse", "pread_into", "file_range")


class Recorder(Handle):
    """Writes down each call, and has everything that a handle may have.

    Args:
        answers: What the method of this name returns, such as ``can_fua=Support.NONE``.
    """

    inline = frozenset(VERBS)
    sparse = True

    def __init__(self, **answers: object) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failure: Exception | None = None
        self.pread_into = self.into
        self.file_range = self.position
        for name, answer in answers.items():
            setattr(self, name, lambda answer=answer: answer)

    def _record(self, *call: object) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure

    def get_size(self) -> int:
        return SIZE

    def into(self, buffer: memoryview, offset: int) -> bool:
        self._record("pread_into", len(buffer), offset)
        return False

    def position(self, count: int, offset: int) -> FileRange | None:
        self._record("file_range", count, offset)
        return FileRange(7, 10_000 + offset)

    def pread(self, count: int, offset: int) -> bytes:
        self._record("pread", count, offset)
        return bytes(count)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._record("pwrite", bytes(data), offset, flags)

    def flush(self) -> None:
        self._record("flush")

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._record("trim", count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._record("zero", count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self._record("cache", count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self._record("extents", count, offset, flags)
        return [(0, 150, ExtentType.DATA), (150, SIZE - 150, ExtentType.HOLE)]

    def close(self) -> None:
        self.calls.append(("close",))


class Recording(Plugin):
    """Gives every client the same handle."""

    name = "recording"

    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self.handle = handle
        self.opened_readonly: bool | None = None

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.opened_readonly = readonly
        return self.handle


def configured(filters: Iterable[Filter], handle: Handle, *parameters: str) -> Stack:
    """Return a stack of `filters`, outermost first, before `handle`; parameters are written ``key=value``."""
    stack = Stack(Recording(handle), list(filters), NoServer())
    stack.load()
    for parameter in parameters:
        stack.config(*parameter.split("=", 1))
    stack.config_complete()
    return stack


def opened(
    filter: Filter, handle: Handle, *parameters: str, readonly: bool = False, client: Client | None = None
) -> OpenExport:
    """Return what a client opens through `filter`."""
    return configured([filter], handle, *parameters).open("", readonly, client or Client(1))


def unfiltered(handle: Handle, *, readonly: bool = False) -> OpenExport:
    """Return what a client opens without a filter."""
    return configured([], handle).open("", readonly, Client(1))


def assert_bound_through(export: OpenExport, handle: Handle, *but: str) -> None:
    """See that requests cost no more on their way to `handle` than without filters, except for those in `but`."""
    core = export.handle
    while isinstance(core, FilterHandle) and core.next is not handle:
        core = core.next  # up to that of the core, which stands over the plugin's
    for name in EVERYTHING:
        assert name in but or getattr(export.handle, name) == getattr(core, name), name

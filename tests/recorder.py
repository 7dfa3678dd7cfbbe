"""A plugin that can do everything, notes what it is asked for, and fails when it is told to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from nbdkitpy import Client, Extent, ExtentType, FileRange, Filter, Handle, Plugin, Support, ThreadModel
from nbdkitpy.stack import Stack
from tests.serving import make_stack

SIZE = 1 << 20

#: What of :attr:`Recorder.calls` is no request.
LIFE = ("open", "close")


class Recorder(Plugin):
    """Reads as zeroes, and all of it is a hole."""

    name = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []  #: name and arguments of each call, without data
        self.handles = 0  #: that have been opened
        self.size = SIZE  #: of handles to come
        self.lacks: frozenset[str] = frozenset()  #: capabilities that handles to come do not have: ``"can_trim"``
        self._failures: dict[str, deque[BaseException | None]] = {}

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def fail(self, call: str, *errors: BaseException | None) -> None:
        """Have the next calls of that name raise these, one each; None is a call that works."""
        self._failures.setdefault(call, deque()).extend(errors)

    @property
    def requests(self) -> list[tuple[object, ...]]:
        """Calls that are neither to open nor to close."""
        return [call for call in self.calls if call[0] not in LIFE]

    def note(self, *call: object) -> None:
        """Take note of a call; raise what it is to raise."""
        self.calls.append(call)
        failures = self._failures.get(str(call[0]))
        error = failures.popleft() if failures else None
        if error is not None:
            raise error

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.note("open", export_name, readonly)
        self.handles += 1
        return RecorderHandle(self)


class RecorderHandle(Handle):
    """Knows its number, counted from 1, which it notes when it is closed."""

    inline = frozenset({"pread", "pwrite", "flush"})
    sparse = True

    def __init__(self, plugin: Recorder) -> None:
        self._note = plugin.note
        self._size = plugin.size
        self._lacks = plugin.lacks
        self._number = plugin.handles

    def get_size(self) -> int:
        return self._size

    def can_write(self) -> bool:
        return "can_write" not in self._lacks

    def can_zero(self) -> Support:
        return Support.NONE if "can_zero" in self._lacks else Support.NATIVE

    def can_fast_zero(self) -> bool:
        return "can_fast_zero" not in self._lacks

    def can_trim(self) -> bool:
        return "can_trim" not in self._lacks

    def can_fua(self) -> Support:
        return Support.NONE if "can_fua" in self._lacks else Support.NATIVE

    def can_flush(self) -> bool:
        return "can_flush" not in self._lacks

    def can_cache(self) -> Support:
        return Support.NONE if "can_cache" in self._lacks else Support.NATIVE

    def can_extents(self) -> bool:
        return "can_extents" not in self._lacks

    def pread(self, count: int, offset: int) -> bytes:
        self._note("pread", count, offset)
        return bytes(count)

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        self._note("pread_into", len(buffer), offset)
        return True

    def file_range(self, count: int, offset: int) -> FileRange | None:
        self._note("file_range", count, offset)
        return FileRange(0, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._note("pwrite", len(data), offset, flags)

    def flush(self) -> None:
        self._note("flush")

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._note("trim", count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._note("zero", count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self._note("cache", count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self._note("extents", count, offset, flags)
        return [Extent(offset, count, ExtentType.HOLE | ExtentType.ZERO)]

    def close(self) -> None:
        self._note("close", self._number)


#: A request of each kind, of 512 bytes at 4096: the verb and its arguments.
REQUESTS: dict[str, tuple[Any, ...]] = {
    "pread": (512, 4096),
    "pwrite": (memoryview(bytes(512)), 4096, 0),
    "flush": (),
    "trim": (512, 4096, 0),
    "zero": (512, 4096, 0),
    "cache": (512, 4096),
    "extents": (512, 4096, 0),
}


def request(handle: Handle, verb: str) -> object:
    """Make the request of :data:`REQUESTS`, and return its result."""
    return getattr(handle, verb)(*REQUESTS[verb])


def configured(filter: Filter, *words: str, plugin: Plugin | None = None) -> Stack:
    """Return a stack of a recorder behind `filter`, which has been given the parameters ``key=value``."""
    for word in words:
        key, _, value = word.partition("=")
        assert filter.config(key, value), f"{filter.name} does not know {key}"
    return make_stack(plugin or Recorder(), [filter])

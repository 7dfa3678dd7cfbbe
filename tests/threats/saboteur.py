"""A plugin and a filter of which any call can be made to go wrong, and a client that uses all of them."""

from __future__ import annotations

import array
import asyncio
import errno
import itertools
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, TypeAlias

from nbdkitpy import (
    BlockSize,
    Buffer,
    Client,
    Export,
    Extent,
    ExtentType,
    FileRange,
    Filter,
    FilterHandle,
    Handle,
    Plugin,
    Support,
    ThreadModel,
)
from nbdkitpy.protocol.constants import BASE_ALLOCATION, Command, CommandFlag, InfoType, Option
from tests.nbdclient import NbdClient, Refused, Style
from tests.serving import CONTENT, SIZE

__all__ = [
    "IN_TRANSMISSION",
    "NEEDS",
    "NONSENSE",
    "RAISED",
    "STEPS",
    "Fault",
    "SabotagedFilter",
    "SabotagedPlugin",
    "Saboteur",
    "raising",
    "returning",
    "use_all",
]

#: What a call does in place of what it should.
Fault = Callable[[], object]


# --- what may be raised ---


class Odd(BaseException):
    """Derived from nothing that anybody catches, and cannot be shown."""

    def __str__(self) -> str:
        raise Odd


class Unprintable(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)

    __repr__ = __str__


class UnprintableOs(OSError):
    def __str__(self) -> str:
        raise SystemExit(5)


class Hostile(OSError):
    """Even to ask for its number goes wrong."""

    @property
    def errno(self) -> int:  # type: ignore[override]
        raise SystemExit(4)

    @property
    def strerror(self) -> str:  # type: ignore[override]
        raise Odd


#: Makers of what may be raised, by what they are called in the names of tests.
RAISED: Mapping[str, Callable[[], BaseException]] = {
    "OSError": lambda: OSError(errno.ENOSPC, "full"),
    "no number": lambda: OSError("no number"),
    "no text": lambda: OSError(errno.EIO, None),
    "odd number": lambda: OSError("errno", 5),
    "odd text": lambda: OSError([], Unprintable()),
    "huge number": lambda: OSError(1 << 80, "x" * 100_000),
    "odd file": lambda: OSError(errno.EIO, "a file", object()),
    "UnprintableOs": lambda: UnprintableOs(errno.EIO, None),
    "Hostile": lambda: Hostile(errno.EIO, "x"),
    "ValueError": lambda: ValueError("wrong\n\x1b[2J" + "x" * 10_000),
    "KeyError": lambda: KeyError("missing"),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no text"),
    "MemoryError": MemoryError,
    "RecursionError": RecursionError,
    "StopIteration": StopIteration,
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "CancelledError": asyncio.CancelledError,
    "Odd": Odd,
    "Unprintable": Unprintable,
}


def raising(make: Callable[[], BaseException]) -> Fault:
    """A call that raises what `make` makes."""

    def fail() -> NoReturn:
        raise make()

    return fail


# --- what may be returned ---


class Length(bytes):
    """Bytes that lie about their number."""

    def __len__(self) -> int:
        return 4096


class Liar:
    """Is whatever one takes it for."""

    def __getattr__(self, name: str) -> Liar:
        return self

    def __call__(self, *args: object) -> Liar:
        return self

    def __bool__(self) -> bool:
        raise Odd

    def __repr__(self) -> str:
        raise Odd


def released() -> memoryview:
    """A view of nothing any more."""
    view = memoryview(bytes(4096))
    view.release()
    return view


class BreakingOff:
    """Begins well."""

    def __iter__(self) -> Iterator[Any]:
        yield Export("")
        raise Odd


_NO_BOOL = [None, 2, "yes", b"", Liar()]
_NO_SUPPORT = [None, 3, -1, True, "native", 1.0, Liar()]
_NO_NAME = [None, 5, b"x", "x" * 4097, "a\0b", "\udcff", Liar()]
_NO_HANDLE = [None, 5, object(), Handle, Liar()]

#: What calls may return that they must not, by call.
NONSENSE: Mapping[str, list[Any]] = {
    "list_exports": [
        *(None, 5, "text", [None], ["x"], [()], [("a", "b", "c")], [(5,)], [("x" * 4097,)], Liar(), BreakingOff()),
        itertools.repeat(Export("x")),
    ],
    "default_export": _NO_NAME,
    "open": _NO_HANDLE,
    "wrap": _NO_HANDLE,
    "get_size": [None, -1, 1 << 63, 1 << 64, 1.5, "1M", True, Liar()],
    "can_write": _NO_BOOL,
    "can_zero": _NO_SUPPORT,
    "can_fast_zero": _NO_BOOL,
    "can_trim": _NO_BOOL,
    "can_fua": _NO_SUPPORT,
    "can_flush": _NO_BOOL,
    "is_rotational": _NO_BOOL,
    "can_multi_conn": _NO_BOOL,
    "can_cache": _NO_SUPPORT,
    "can_extents": _NO_BOOL,
    "block_size": [5, (512,), (0, 4096, 1 << 20), (3, 512, 512), ("a", "b", "c"), (512, 4096, 1 << 40), Liar()],
    "export_description": _NO_NAME[1:],
    "pread": [
        *(None, b"", bytearray(), bytes(511), bytes(65537), memoryview(bytes(9)), "x" * 512, [0] * 512, 512, Liar()),
        *(array.array("B", bytes(512)), memoryview(array.array("I", [0] * 512)), memoryview(bytes(1024))[::2]),
        *(Length(b"short"), released()),
    ],
    "pread_into": [None, 0, 512, "yes", [1], object()],
    "extents": [
        *(None, [], "text", [(0,)], [(0, -1, 0)], [(0, 4096, 9)], [(1 << 70, 4096, 0)], [(0, 1.5, 0)], Liar()),
        *([(0, 512, 0), (100, 512, 0)], BreakingOff()),
    ],
    "file_range": ["x", (1,), (-1, 0), (1 << 31, 0), (0, -1), (1.5, 0), FileRange(0, 1 << 63), Liar()],
}


def returning(value: object) -> Fault:
    """A call that returns `value`."""
    return lambda: value


# --- the units ---


class Saboteur:
    """Says which calls go wrong, for all clients but those that it spares, and counts how often they did."""

    def __init__(self) -> None:
        self.faults: dict[str, Fault] = {}
        self.spared: set[int] = set()  #: numbers of clients
        self.done: Counter[str] = Counter()

    def strike(self, call: str, client: Client) -> Fault | None:
        """The fault of a call that is made for `client`, if there is one."""
        fault = self.faults.get(call)
        if fault is None or client.number in self.spared:
            return None
        self.done[call] += 1
        return fault


def sabotaged(cls: type[Any], calls: Iterable[str], client: Callable[..., Client]) -> type[Any]:
    """Return a class in which each of `calls` may go wrong; `client` finds out for whom a call is."""

    def troubled(name: str) -> Callable[..., object]:
        def call(self: Any, *args: Any) -> object:
            fault = self.saboteur.strike(name, client(self, *args))
            return getattr(super(made, self), name)(*args) if fault is None else fault()

        return call

    made = type(cls.__name__, (cls,), {name: troubled(name) for name in calls})
    return made


OF_HANDLES = (
    *("get_size", "can_write", "can_zero", "can_fast_zero", "can_trim", "can_fua", "can_flush", "is_rotational"),
    *("can_multi_conn", "can_cache", "can_extents", "block_size", "export_description"),
    *("pread", "pwrite", "flush", "trim", "zero", "cache", "extents", "pread_into", "file_range", "close"),
)
#: Those that are made for requests.
IN_TRANSMISSION = OF_HANDLES[13:-1]

OF_BACKENDS = ("preconnect", "list_exports", "default_export", "open")


class _Disk(Handle):
    """Can do everything. Its first quarter is a hole, which reads as :data:`CONTENT` all the same, as nobody looks."""

    sparse = True

    def __init__(self, plugin: _Disks, client: Client) -> None:
        self.saboteur = plugin.saboteur
        self.inline = plugin.inline  # type: ignore[misc]
        self.client = client
        self._plugin = plugin
        self._fd = plugin.fd

    def get_size(self) -> int:
        return SIZE

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def block_size(self) -> BlockSize | None:
        return BlockSize(1, 4096, 1 << 20)

    def export_description(self) -> str | None:
        return "of a saboteur"

    def pread(self, count: int, offset: int) -> Buffer:
        return os.pread(self._fd, count, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        return os.preadv(self._fd, [buffer], offset) == len(buffer)

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return FileRange(self._fd, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        """Writes nothing: all clients read the same."""

    def flush(self) -> None:
        pass

    def trim(self, count: int, offset: int, flags: int) -> None:
        pass

    def zero(self, count: int, offset: int, flags: int) -> None:
        pass

    def cache(self, count: int, offset: int) -> None:
        pass

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [Extent(offset, count, ExtentType.DATA)]

    def close(self) -> None:
        self._plugin.closed.append(self.client.number)


class _Disks(Plugin):
    name = "sabotaged"

    def __init__(self, saboteur: Saboteur, model: ThreadModel, inline: frozenset[str]) -> None:
        super().__init__()
        self.saboteur = saboteur
        self.inline = inline
        self.opened: list[int] = []  #: numbers of clients
        self.closed: list[int] = []
        self._model = model
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it is open as long as this is loaded
        self._file.write(CONTENT)
        self._file.flush()
        self.fd = self._file.fileno()

    def thread_model(self) -> ThreadModel:
        return self._model

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return [Export("", "the only one")]

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.opened.append(client.number)
        return _SabotagedDisk(self, client)  # type: ignore[no-any-return]

    def unload(self) -> None:
        self._file.close()


class _Layer(FilterHandle):
    """Stands before a handle, and overrides everything."""

    def __init__(self, next: Handle, saboteur: Saboteur, client: Client) -> None:
        self.saboteur = saboteur
        self.client = client
        super().__init__(next)
        self.sparse = next.sparse

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        return self.next.pread_into is not None and self.next.pread_into(buffer, offset)

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return self.next.file_range(count, offset) if self.next.file_range else None


class _Layers(Filter):
    name = "sabotaging"

    def __init__(self, saboteur: Saboteur, inline: frozenset[str]) -> None:
        super().__init__()
        self.saboteur = saboteur
        self._layer = type("Layer", (_SabotagedLayer,), {"inline": inline})

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return self._layer(handle, self.saboteur, client)  # type: ignore[no-any-return]


def _of_handle(handle: Any, *_: object) -> Client:
    return handle.client  # type: ignore[no-any-return]


def _among_arguments(unit: object, *args: Any) -> Client:
    return next(arg for arg in args if isinstance(arg, Client))


_SabotagedDisk = sabotaged(_Disk, OF_HANDLES, _of_handle)
_SabotagedLayer = sabotaged(_Layer, OF_HANDLES, _of_handle)
SabotagedPlugin = sabotaged(_Disks, OF_BACKENDS, _among_arguments)
SabotagedFilter = sabotaged(_Layers, (*OF_BACKENDS, "wrap"), _among_arguments)


# --- a client that uses everything ---


class Failed(Exception):
    """A request was answered with an error."""


def _list(client: NbdClient) -> None:
    client.exports()


def _describe(client: NbdClient) -> None:
    client.go("", InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE, option=Option.INFO)


def _go(client: NbdClient) -> None:
    query = BASE_ALLOCATION.encode()
    client.option(Option.SET_META_CONTEXT, struct.pack(">III", 0, 1, len(query)) + query)
    client.go()


def _call(command: Command, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b"") -> Step:
    def call(client: NbdClient) -> None:
        reply = client.call(command, offset, length, flags=flags, data=data)
        if reply.error:
            raise Failed(reply)
        assert command is not Command.READ or reply.data == CONTENT[offset : offset + length]

    return call


Step: TypeAlias = Callable[[NbdClient], None]

#: What the client does, in this order.
STEPS: Mapping[str, Step] = {
    "list": _list,
    "describe": _describe,
    "go": _go,
    "read": _call(Command.READ, 0, 512),
    "read much": _call(Command.READ, 4096, 192 << 10),  # so much that it comes from a file if it can
    "write": _call(Command.WRITE, 0, data=bytes(512)),
    "write through": _call(Command.WRITE, 0, data=bytes(512), flags=CommandFlag.FUA),
    "flush": _call(Command.FLUSH),
    "trim": _call(Command.TRIM, 4096, 4096),
    "zero": _call(Command.WRITE_ZEROES, 4096, 4096),
    "zero fast": _call(Command.WRITE_ZEROES, 4096, 4096, CommandFlag.FAST_ZERO | CommandFlag.FUA),
    "cache": _call(Command.CACHE, 0, 65536),
    "status": _call(Command.BLOCK_STATUS, 0, 65536),
    "read again": _call(Command.READ, 65536, 512),
}

_OPENING = set(STEPS) - {"list"}

#: The steps that fail if a call does; no others do.
NEEDS: Mapping[str, set[str]] = {
    "preconnect": set(STEPS),
    "list_exports": {"list"},
    **dict.fromkeys(("default_export", "open", "wrap", *OF_HANDLES), _OPENING),
    "export_description": {"describe"},
    "pread": {"read", "read much", "read again"},
    "pread_into": {"read", "read again"},
    "file_range": {"read much"},
    "pwrite": {"write", "write through"},
    "flush": {"flush"},
    "trim": {"trim"},
    "zero": {"zero", "zero fast"},
    "cache": {"cache"},
    "extents": {"read much", "status"},
    "close": set(),
}


def use_all(client: NbdClient) -> set[str]:
    """Take all steps that can be taken, see that the server keeps to the protocol, and return those that failed."""
    failed: set[str] = set()
    left = list(STEPS)
    with client:
        try:
            client.greet()
            client.option(Option.STRUCTURED_REPLY)
            client.style = Style.STRUCTURED
            while left:
                try:
                    STEPS[left[0]](client)
                except (Refused, Failed):
                    failed.add(left[0])
                    if left[0] == "go":
                        return failed | set(left)
                del left[0]
            client.disconnect()
        except (EOFError, ConnectionError):  # the server has closed the connection
            failed.update(left)
    return failed

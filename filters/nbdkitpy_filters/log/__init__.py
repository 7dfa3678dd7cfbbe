"""The log filter: a line, or a call of a script, for everything that clients do."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from nbdkitpy import (
    Buffer,
    Client,
    ConfigError,
    Export,
    Extent,
    ExtentType,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Parameter,
    Support,
    hookimpl,
    normalise_extents,
    parse_bool,
    parse_path,
    parse_string,
)
from nbdkitpy_filters.log.sinks import Event, LogFile, LogScript, Sink, Value

__all__ = ["Log", "register_filters"]

#: So many exports or extents of one answer are logged; there may be a million.
_MOST_LISTED = 1000

#: So many exports are taken from the inner layers; more are an error, which the core raises.
_MOST_EXPORTS = 10_001

#: Names of the types of extents, by their numbers.
_TYPES = {
    int(ExtentType.DATA): "",
    int(ExtentType.HOLE): "hole",
    int(ExtentType.ZERO): "zero",
    int(ExtentType.HOLE | ExtentType.ZERO): "hole,zero",
}

Fields: TypeAlias = "Sequence[tuple[str, Value]]"
T = TypeVar("T")


class Log(Filter):
    """Log what passes to a file, to a script, or to both."""

    name = "log"
    longname = "nbdkitpy log filter"
    description = "Log all transactions to a file or a script."

    logfile = Parameter(parse_path, metavar="FILE", help="The file to log to.")
    logappend = Parameter(parse_bool, default=False, metavar="BOOL", help="Keep what is in the file. Default: false.")
    logscript = Parameter(parse_string, metavar="SCRIPT", help="Script that the shell runs for each event.")

    def __init__(self) -> None:
        super().__init__()
        self._sinks: list[Sink] = []
        self._preconnects = itertools.count(1)
        self._lists = itertools.count(1)
        self._connections = itertools.count(1)

    # --- the life of the server ---

    def get_ready(self) -> None:
        if self.logfile is not None:
            try:
                self._sinks.append(LogFile(self.logfile, append=self.logappend))
            except OSError as error:
                raise ConfigError(f"log: logfile {self.logfile} cannot be opened: {error.strerror}") from error
        if self.logscript is not None:
            self._sinks.append(LogScript(self.logscript))
        self.write(Event("PRINT", "Ready"))

    def after_fork(self) -> None:
        self.write(Event("PRINT", "Fork"))

    def unload(self) -> None:
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()

    # --- clients ---

    def preconnect(self, client: Client, readonly: bool) -> None:
        begin = Event("ENTER", "Preconnect", None, next(self._preconnects), [("readonly", readonly)])
        self.call(begin, lambda: self.next.preconnect(client, readonly))

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        fields = [("readonly", readonly), ("tls", client.tls)]
        return self.call(
            Event("ENTER", "ListExports", None, next(self._lists), fields),
            lambda: list(itertools.islice(self.next.list_exports(client, readonly), _MOST_EXPORTS)),
            lambda exports: [("exports", tuple(Export(*export).name for export in exports[:_MOST_LISTED]))],
        )

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        handle = self.next.open(export_name, readonly, client)
        if not self._sinks:
            return handle
        try:
            connection = next(self._connections)
            name: tuple[str, Value] = ("export", export_name)
            fields = [name, ("tls", client.tls), *_facts(handle, readonly)]
            self.write(Event("PRINT", "Connect", connection, fields=fields))
            return _LogHandle(handle, self, connection)
        except BaseException:
            handle.close()
            raise

    # --- events ---

    def write(self, event: Event) -> None:
        """Log `event`."""
        for sink in self._sinks:
            sink.write(event)

    def call(self, begin: Event, work: Callable[[], T], told: Callable[[T], Fields] = lambda _: ()) -> T:
        """Do `work`, and log its beginning, and its end with what is `told` of what it returned."""
        self.write(begin)
        try:
            value = work()
            end = begin._replace(type="LEAVE", fields=told(value))
        except BaseException as error:
            self.write(begin._replace(type="LEAVE", fields=(), error=_name(error)))
            raise
        self.write(end)
        return value


def _name(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) else errno.EIO
    return errno.errorcode.get(number, "EIO") if isinstance(number, int) else "EIO"


def _facts(handle: Handle, readonly: bool) -> Iterator[tuple[str, Value]]:
    """What an export can do."""
    sizes = handle.block_size() or (0, 0, 0)
    write = handle.can_write() and not readonly
    zero = handle.can_zero() if write else Support.NONE
    yield "size", handle.get_size()
    yield from zip(("minsize", "prefsize", "maxsize"), sizes)
    yield "write", write
    yield "flush", handle.can_flush()
    yield "rotational", handle.is_rotational()
    yield "trim", write and handle.can_trim()
    yield "zero", zero
    yield "fua", handle.can_fua() if write else Support.NONE
    yield "extents", handle.can_extents()
    yield "cache", handle.can_cache()
    yield "fast_zero", zero is not Support.NONE and handle.can_fast_zero()


class _LogHandle(FilterHandle):
    """Logs each request of a client, when it begins and when it ends."""

    def __init__(self, next: Handle, log: Log, connection: int) -> None:
        super().__init__(next)
        self._log = log
        self._connection = connection
        self._ids = itertools.count(1)

    def _begin(self, action: str, *fields: tuple[str, Value]) -> Event:
        return Event("ENTER", action, self._connection, next(self._ids), fields)

    def pread(self, count: int, offset: int) -> Buffer:
        begin = self._begin("Read", ("offset", offset), ("count", count))
        return self._log.call(begin, lambda: self.next.pread(count, offset))

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        begin = self._begin("Write", ("offset", offset), ("count", len(data)), ("fua", bool(flags & Flags.FUA)))
        self._log.call(begin, lambda: self.next.pwrite(data, offset, flags))

    def flush(self) -> None:
        self._log.call(self._begin("Flush"), self.next.flush)

    def trim(self, count: int, offset: int, flags: int) -> None:
        begin = self._begin("Trim", ("offset", offset), ("count", count), ("fua", bool(flags & Flags.FUA)))
        self._log.call(begin, lambda: self.next.trim(count, offset, flags))

    def zero(self, count: int, offset: int, flags: int) -> None:
        named = (("trim", Flags.MAY_TRIM), ("fua", Flags.FUA), ("fast", Flags.FAST_ZERO))
        told = [(name, bool(flags & flag)) for name, flag in named]
        begin = self._begin("Zero", ("offset", offset), ("count", count), *told)
        self._log.call(begin, lambda: self.next.zero(count, offset, flags))

    def cache(self, count: int, offset: int) -> None:
        begin = self._begin("Cache", ("offset", offset), ("count", count))
        self._log.call(begin, lambda: self.next.cache(count, offset))

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        req_one = bool(flags & Flags.REQ_ONE)
        begin = self._begin("Extents", ("offset", offset), ("count", count), ("req_one", req_one))
        return self._log.call(
            begin, lambda: normalise_extents(self.next.extents(count, offset, flags), count, offset), _told_of
        )

    def close(self) -> None:
        transactions = next(self._ids) - 1
        self._log.write(Event("PRINT", "Disconnect", self._connection, fields=[("transactions", transactions)]))
        super().close()


def _told_of(extents: Sequence[Extent]) -> Fields:
    listed = [(start, length, _TYPES[int(kind)]) for start, length, kind in extents[:_MOST_LISTED]]
    return [("extents", tuple(itertools.chain.from_iterable(listed)))]


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Log)

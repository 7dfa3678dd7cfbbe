"""The stack: filters linked before a plugin, and the exports that clients open through it.

Knows the contract of :mod:`nbdkitpy.backend`; knows nothing of the wire, of sockets, or of how units are found.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from nbdkitpy.backend import (
    VERBS,
    AsyncPlugin,
    Backend,
    BlockSize,
    Client,
    Export,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Plugin,
    ServerControl,
    Support,
    ThreadModel,
)
from nbdkitpy.exceptions import ConfigError, UnitError

if TYPE_CHECKING:
    from nbdkitpy.coroutines import Coroutines, Loop  # which imports asyncio

__all__ = ["MAX_EXPORTS", "Capabilities", "OpenExport", "Stack"]

_logger = logging.getLogger("nbdkitpy")

#: A list of exports longer than this is an error of the plugin, as in nbdkit.
MAX_EXPORTS = 10_000

_MAX_NAME = 4096
_MAX_SIZE = (1 << 63) - 1
_EMULATED_PIECE = 1 << 20  # zeroes are written and prefetches read in pieces of this many bytes
_COROUTINE = 0x80  # CO_COROUTINE of the inspect module, which takes a while to import

T = TypeVar("T")


class Capabilities(NamedTuple):
    """What an open export can do: a snapshot, taken once when it is opened."""

    size: int
    can_write: bool
    can_zero: Support
    can_fast_zero: bool
    can_trim: bool
    can_fua: Support
    can_flush: bool
    is_rotational: bool
    can_multi_conn: bool
    can_cache: Support
    can_extents: bool
    block_size: BlockSize | None

    @classmethod
    def ask(cls, handle: Handle, *, readonly: bool = False, parallel_connections: bool = True) -> Capabilities:
        """Ask `handle` for everything, in a fixed order, and apply what follows from the answers.

        What is read-only has no trim, zero or FUA, and is not even asked for them.

        Raises:
            ValueError: an answer is not of the kind or in the range that it has to be; names the class of `handle`.
        """
        try:
            return cls._ask(handle, readonly, parallel_connections)
        except ValueError as error:
            raise ValueError(f"{type(handle).__name__}: {error}") from error

    @classmethod
    def _ask(cls, handle: Handle, readonly: bool, parallel_connections: bool) -> Capabilities:
        size = _checked("get_size", handle.get_size(), int)
        if not 0 <= size <= _MAX_SIZE:
            raise ValueError(f"get_size must be 0 to 2**63 - 1, not {size}")
        can_write = _checked("can_write", handle.can_write(), bool) and not readonly
        can_zero = _support("can_zero", handle.can_zero()) if can_write else Support.NONE
        return cls(
            size=size,
            can_write=can_write,
            can_zero=can_zero,
            can_fast_zero=_can_fast_zero(handle, can_zero),
            can_trim=can_write and _checked("can_trim", handle.can_trim(), bool),
            can_fua=_support("can_fua", handle.can_fua()) if can_write else Support.NONE,
            can_flush=_checked("can_flush", handle.can_flush(), bool),
            is_rotational=_checked("is_rotational", handle.is_rotational(), bool),
            can_multi_conn=_checked("can_multi_conn", handle.can_multi_conn(), bool) and parallel_connections,
            can_cache=_support("can_cache", handle.can_cache()),
            can_extents=_checked("can_extents", handle.can_extents(), bool),
            block_size=_checked_block_size(handle.block_size()),
        )


def _checked(name: str, answer: object, kind: type[T]) -> T:
    # bool is a kind of int, but True is no size.
    if not isinstance(answer, kind) or (kind is int and isinstance(answer, bool)):
        raise ValueError(f"{name} must return {kind.__name__}, not {answer!r}")
    return answer


def _can_fast_zero(handle: Handle, can_zero: Support) -> bool:
    if can_zero is Support.NONE:
        return False
    if can_zero is Support.EMULATE and not handle.overrides("can_fast_zero"):
        return True  # whether zero is overridden or not, it is not used: all fast zeroes fail, and fast
    return _checked("can_fast_zero", handle.can_fast_zero(), bool)


def _support(name: str, answer: object) -> Support:
    if not isinstance(answer, int) or isinstance(answer, bool) or answer not in (0, 1, 2):
        raise ValueError(f"{name} must return a Support, not {answer!r}")
    return Support(answer)


def _checked_block_size(answer: object) -> BlockSize | None:
    if answer is None:
        return None
    if not isinstance(answer, tuple) or len(answer) != 3 or not all(type(field) is int for field in answer):
        raise ValueError(f"block_size must return a BlockSize or None, not {answer!r}")
    sizes = BlockSize(*answer)
    minimum, preferred, maximum = sizes
    if not (_power_of_two(minimum) and minimum <= 65536):
        raise ValueError(f"block_size: minimum must be a power of 2 up to 65536, not {minimum}")
    if not (_power_of_two(preferred) and max(512, minimum) <= preferred <= 32 << 20):
        raise ValueError(
            f"block_size: preferred must be a power of 2 from 512, and from the minimum, to 32 MiB, not {preferred}"
        )
    if maximum != 0xFFFFFFFF and (maximum % minimum or not preferred <= maximum < 0xFFFFFFFF):
        raise ValueError(
            "block_size: maximum must be 0xffffffff, or a multiple of the minimum from the preferred size on,"
            f" not {maximum}"
        )
    return sizes


def _power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


class _EmulatingHandle(FilterHandle):
    """Stands over the plugin's handle: answers for its capabilities, and emulates what it lacks.

    What needs no emulation is bound through like in any filter, and costs nothing.
    """

    def __init__(self, next: Handle, capabilities: Capabilities) -> None:
        super().__init__(next)
        self.capabilities = capabilities
        maximum = capabilities.block_size.maximum if capabilities.block_size else _EMULATED_PIECE
        self._piece = min(_EMULATED_PIECE, maximum)
        if capabilities.can_fua is Support.EMULATE:
            for verb in ("pwrite", "trim"):
                setattr(self, verb, self._then_flush(getattr(next, verb)))
        if capabilities.can_cache is Support.NATIVE:
            # Without the verb the capability is claimed, and there is nothing to do.
            cache = next.cache if next.overrides("cache") else _do_nothing
            setattr(self, "cache", cache)  # noqa: B010  # mypy does not let a method be assigned
        setattr(self, "inline", self._inline(next.inline))  # noqa: B010

    def _inline(self, inline: frozenset[str]) -> frozenset[str]:
        """Those verbs of the plugin's `inline` whose emulation calls nothing that is not inline itself."""
        flush = {"flush"} if self.capabilities.can_fua is Support.EMULATE else set()
        read = {"pread"} if self.capabilities.can_cache is not Support.NATIVE else set()
        calls = {"pwrite": flush, "trim": flush, "zero": {"pwrite"} | flush, "cache": read}
        return frozenset(verb for verb in inline if inline.issuperset(calls.get(verb, ())))

    def get_size(self) -> int:
        return self.capabilities.size

    def can_write(self) -> bool:
        return self.capabilities.can_write

    def can_zero(self) -> Support:
        return self.capabilities.can_zero

    def can_fast_zero(self) -> bool:
        return self.capabilities.can_fast_zero

    def can_trim(self) -> bool:
        return self.capabilities.can_trim

    def can_fua(self) -> Support:
        return self.capabilities.can_fua

    def can_flush(self) -> bool:
        return self.capabilities.can_flush

    def is_rotational(self) -> bool:
        return self.capabilities.is_rotational

    def can_multi_conn(self) -> bool:
        return self.capabilities.can_multi_conn

    def can_cache(self) -> Support:
        return self.capabilities.can_cache

    def can_extents(self) -> bool:
        return self.capabilities.can_extents

    def block_size(self) -> BlockSize | None:
        return self.capabilities.block_size

    def _then_flush(self, verb: Callable[..., None]) -> Callable[..., None]:
        """`verb` with FUA emulated by a flush after it."""
        flush = self.next.flush

        def flushing(subject: object, offset: int, flags: int) -> None:
            if flags and flags & Flags.FUA:
                verb(subject, offset, flags & ~Flags.FUA)
                flush()
            else:
                verb(subject, offset, flags)

        return flushing

    def zero(self, count: int, offset: int, flags: int) -> None:
        if self.capabilities.can_zero is Support.NATIVE:
            self._zero_natively(count, offset, flags)
        else:
            self._zero_by_writing(count, offset, flags)

    def _zero_natively(self, count: int, offset: int, flags: int) -> None:
        emulated_fua = flags & Flags.FUA and self.capabilities.can_fua is Support.EMULATE
        try:
            self.next.zero(count, offset, flags & ~Flags.FUA if emulated_fua else flags)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP) or flags & Flags.FAST_ZERO:
                raise
            self._zero_by_writing(count, offset, flags)
            return
        if emulated_fua:
            self.next.flush()

    def _zero_by_writing(self, count: int, offset: int, flags: int) -> None:
        if flags & Flags.FAST_ZERO:
            raise OSError(errno.ENOTSUP, "zeroes would have to be written")
        emulated_fua = flags & Flags.FUA and self.capabilities.can_fua is Support.EMULATE
        write_flags = flags & Flags.FUA if not emulated_fua else 0
        zeroes = memoryview(bytes(min(count, self._piece)))
        for start, length in _pieces(count, offset, self._piece):
            self.next.pwrite(zeroes[:length], start, write_flags)
        if emulated_fua:
            self.next.flush()

    def cache(self, count: int, offset: int) -> None:
        for start, length in _pieces(count, offset, self._piece):
            self.next.pread(length, start)


def _pieces(count: int, offset: int, piece: int) -> Iterator[tuple[int, int]]:
    for start in range(offset, offset + count, piece):
        yield start, min(piece, offset + count - start)


def _do_nothing(count: int, offset: int) -> None:
    pass


class _Joint(Filter):
    """Stands over each layer of a stack: lets only handles out of it, and none that needs emulation without it.

    A handle of a filter that passes on to the next one needs none, as it has been put over the plugin's.
    """

    def __init__(self, next: Backend) -> None:
        super().__init__()
        self.next = next

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        handle = self.next.open(export_name, readonly, client)
        if not isinstance(handle, Handle):
            raise TypeError(f"{self.next.name}: open must return a Handle, not {handle!r}")
        try:
            _check_verbs(handle)
            if isinstance(handle, FilterHandle) and isinstance(self.next, Filter):
                return handle
            return _EmulatingHandle(handle, Capabilities.ask(handle, readonly=readonly))
        except BaseException:
            handle.close()
            raise


def _check_verbs(handle: Handle) -> None:
    """See that no verb is a coroutine: as nobody would await it, it would do nothing, and seem to have succeeded.

    Raises:
        TypeError: one is.
    """
    for verb in VERBS:
        code = getattr(getattr(type(handle), verb), "__code__", None)
        if code is not None and code.co_flags & _COROUTINE:
            raise TypeError(f"{type(handle).__name__}: {verb} is a coroutine, which only an AsyncHandle may have")


class OpenExport(NamedTuple):
    """An export that a client has open: the outermost handle, and what it can do."""

    name: str
    handle: Handle
    capabilities: Capabilities
    description: Callable[[], str | None]  #: for people; raises ValueError if it cannot be sent
    close: Callable[[], None]  #: to be called once, after the last request has returned
    coroutines: Coroutines | None = None  #: verbs that can be awaited, any number of them at once


class Stack:
    """Filters, outermost first, and the plugin that they stand before: one unit for the server.

    The order in which layers are called is nbdkit's: parameters and clients come from outside, readiness from inside.

    Args:
        plugin: The innermost layer.
        filters: Those before it, outermost first.
        server: What layers may ask of the server.
        multi_process: Several processes are going to serve it.
    """

    def __init__(
        self, plugin: Plugin, filters: Sequence[Filter], server: ServerControl, *, multi_process: bool = False
    ) -> None:
        self.plugin = plugin
        self.filters = tuple(filters)
        self.layers: tuple[Backend, ...] = (*self.filters, plugin)  # outermost first
        self.model = ThreadModel.PARALLEL  # of the whole stack; known after config_complete
        #: Held during each call into the stack where only one at a time is allowed; never while a client is waited for.
        self.request_lock: threading.Lock | None = None
        self._export_lock: threading.Lock | None = None  # held while an export is open
        self._multi_process = multi_process
        #: What :meth:`reload` has set last, for other processes to do so too.
        self.last_reload: Mapping[Backend, Mapping[str, Sequence[str]]] = {}
        self._loop: Loop | None = None  # for coroutines, from after_fork on
        self._outermost = _Joint(plugin)
        for outer in reversed(self.filters):
            outer.next = self._outermost
            self._outermost = _Joint(outer)
        for layer in self.layers:
            layer.server = server

    # --- life of the server ---

    def load(self) -> None:
        """Begin the life of each layer, the plugin's first."""
        for layer in reversed(self.layers):
            layer.load()

    def config(self, key: str, value: str) -> Backend:
        """Give a parameter to the outermost layer that takes it, and return that layer.

        Raises:
            ConfigError: the value is wrong, or no layer takes a parameter of that name.
        """
        for layer in self.layers:
            if layer.config(key, value):
                return layer
        raise ConfigError(self._unknown_parameter(key))

    def _unknown_parameter(self, key: str) -> str:
        known = sorted({name for layer in self.layers for name in layer.parameters})
        if not known:
            return f'{self.plugin.name}: unknown parameter "{key}": it takes no parameters'
        import difflib  # only for those who mistype

        near = difflib.get_close_matches(key, known, n=1)
        hint = f'did you mean "{near[0]}"?' if near else "there are " + ", ".join(known)
        layers = ", ".join(layer.name for layer in self.layers)
        return f'unknown parameter "{key}" (asked: {layers}): {hint}'

    def config_complete(self) -> None:
        """Have each layer check its parameters, and settle the thread model.

        Raises:
            ConfigError: a layer's parameters are not complete, its thread model is none, or it cannot do with several
                processes.
        """
        for layer in self.layers:
            layer.config_complete()
        models = {layer: _thread_model(layer) for layer in self.layers}
        self.model = min(models.values())
        _logger.debug("thread model of the whole stack: %s", self.model.name.lower())
        if self._multi_process:
            for layer, model in models.items():
                _check_processes(layer, model)
        if self.model <= ThreadModel.SERIALIZE_ALL_REQUESTS:
            self.request_lock = threading.Lock()
        if self.model is ThreadModel.SERIALIZE_CONNECTIONS:
            self._export_lock = threading.Lock()

    def get_ready(self) -> None:
        """Have each layer open what all clients share, the plugin first."""
        for layer in reversed(self.layers):
            layer.get_ready()

    def after_fork(self) -> None:
        """Have each layer start its threads, the plugin first."""
        if isinstance(self.plugin, AsyncPlugin):
            from nbdkitpy.coroutines import Loop

            self._loop = self.plugin._runner = Loop()
        for layer in reversed(self.layers):
            layer.after_fork()

    def reload(self, changes: Mapping[Backend, Mapping[str, Sequence[str]]]) -> list[str]:
        """Set new values of live parameters, all of them or none, and return what was set, for people.

        Args:
            changes: For layers of this stack the keys of live parameters, and all texts of each; none sets the default.

        Raises:
            ConfigError: a value is wrong.
        """
        parsed = {
            layer: {key: layer.parameters[key].read(layer, texts) for key, texts in keys.items()}
            for layer, keys in changes.items()
        }
        with contextlib.ExitStack() as undo:
            for layer, values in parsed.items():
                before = {key: getattr(layer, layer.parameters[key].attribute) for key in values}
                undo.callback(layer.reload, before)
                layer.reload(values)
            undo.pop_all()
        self.last_reload = changes
        return [_set_to(layer, key, texts) for layer, keys in changes.items() for key, texts in keys.items()]

    def cleanup(self) -> None:
        """Have each layer stop its threads, the outermost first; one that fails does not keep the others from it."""
        with contextlib.ExitStack() as calls:  # calls the last one first
            if self._loop is not None:
                calls.callback(self._loop.stop)
            for layer in reversed(self.layers):
                calls.callback(layer.cleanup)

    def unload(self) -> None:
        """End the life of each layer, the plugin's first, likewise."""
        with contextlib.ExitStack() as calls:
            for layer in self.layers:
                calls.callback(layer.unload)

    def give_up(self) -> None:
        """Cancel the coroutines that serve requests: whoever waits for one gets an error. From any thread."""
        if self._loop is not None:
            self._loop.give_up()

    # --- clients ---

    def preconnect(self, client: Client, readonly: bool) -> None:
        """Let the layers refuse a client, outermost first, by raising OSError. Never waits for another client."""
        self._outermost.preconnect(client, readonly)

    def list_exports(self, client: Client, readonly: bool) -> list[Export]:
        """Return the exports that `client` may be told of.

        Raises:
            OSError: a layer refuses.
            ValueError: there are more than :data:`MAX_EXPORTS`, or a name cannot be one.
        """
        with self._serialised():
            found = self._outermost.list_exports(client, readonly)
            exports = [_checked_export(entry) for entry in itertools.islice(found, MAX_EXPORTS + 1)]
        if len(exports) > MAX_EXPORTS:
            raise ValueError(f"there are more than the {MAX_EXPORTS} exports that can be listed")
        return exports

    def default_export(self, client: Client, readonly: bool) -> str:
        """Return the name that a client gets who asks for ``""``; raises as :meth:`list_exports` does."""
        with self._serialised():
            name = self._outermost.default_export(client, readonly)
        _check_name("default export", name)
        return name

    def open(self, export_name: str, readonly: bool, client: Client) -> OpenExport:
        """Open an export for `client`. Under ``SERIALIZE_CONNECTIONS`` this waits until no other is open.

        Raises:
            OSError: there is no such export, or not for this client.
            ValueError: a layer's answers about the export are not of the kind or in the range that they have to be.
        """
        if self._export_lock is not None:
            self._export_lock.acquire()
        try:
            with self._serialised():
                handle = self._outermost.open(export_name, readonly, client)
                try:
                    capabilities = self._ask(handle, readonly)
                except BaseException:
                    handle.close()
                    raise
        except BaseException:
            self._release_export()
            raise
        return OpenExport(
            export_name,
            handle,
            capabilities,
            lambda: self._description(handle),
            lambda: self._close(handle),
            None if self._loop is None or self.model < ThreadModel.PARALLEL else self._loop.coroutines_of(handle),
        )

    def _ask(self, handle: Handle, readonly: bool) -> Capabilities:
        parallel = self.model > ThreadModel.SERIALIZE_CONNECTIONS
        return Capabilities.ask(handle, readonly=readonly, parallel_connections=parallel)

    def _description(self, handle: Handle) -> str | None:
        with self._serialised():
            description = handle.export_description()
        if description is not None:
            _check_name("export_description", description)
        return description

    def _close(self, handle: Handle) -> None:
        try:
            with self._serialised():
                handle.close()
        finally:
            self._release_export()

    def _release_export(self) -> None:
        if self._export_lock is not None:
            self._export_lock.release()

    def _serialised(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.request_lock is None else self.request_lock


def _set_to(layer: Backend, key: str, texts: Sequence[str]) -> str:
    shown = "" if layer.parameters[key].secret else ": " + (" and ".join(texts) or "the default")
    return f"{layer.name}: {key} has been set{shown}"


def _thread_model(layer: Backend) -> ThreadModel:
    answer = layer.thread_model()
    try:
        return ThreadModel(answer)
    except ValueError:
        raise UnitError(f"{layer.name}: thread_model must return a ThreadModel, not {answer!r}") from None


def _check_processes(layer: Backend, model: ThreadModel) -> None:
    if not layer.multi_process:
        raise ConfigError(
            f"--workers: {layer.name} has to be in one process with all clients (it does not declare multi_process);"
            " leave --workers out, or 0"
        )
    if model < ThreadModel.SERIALIZE_REQUESTS:
        raise ConfigError(
            f"--workers: {layer.name} must have the thread model serialize_requests or parallel, not"
            f" {model.name.lower()}; leave --workers out, or 0"
        )


def _checked_export(entry: object) -> Export:
    # Also a plain pair will do, but not a string, though that can be taken apart as well.
    if not isinstance(entry, tuple) or not 1 <= len(entry) <= 2:
        raise ValueError(f"list_exports must return Exports, not {entry!r:.80}")
    export = Export(*entry)
    _check_name("name of an export", export.name)
    _check_name("description of an export", export.description)
    return export


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str):
        raise ValueError(f"{what} must be a string, not {name!r}")
    if "\0" in name or len(name.encode("utf-8")) > _MAX_NAME:  # UnicodeEncodeError is a ValueError
        raise ValueError(f"{what} must be at most {_MAX_NAME} bytes of UTF-8 without NUL, not {name[:40]!r}")

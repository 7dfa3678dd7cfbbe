"""The contract between the server and what it serves: plugins, filters and their handles.

A :class:`Plugin` or :class:`Filter` lives as long as the server; a :class:`Handle` lives as long as one client has
one export open. A plugin is where the bytes live. A filter stands before a plugin or another filter, its ``next``,
and changes what passes. *Outer* is nearer to the client, *inner* nearer to the plugin.

Names, defaults and meanings are nbdkit's. This module knows nothing of the wire.

Errors: raise ``OSError(errno.EXXX, "text")`` and that errno reaches the client as well as the protocol can say it.
Any other exception is a defect of the unit: it is logged with its traceback and the client gets EIO.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import Parameter

__all__ = [
    "AsyncHandle",
    "AsyncPlugin",
    "Backend",
    "BlockSize",
    "Buffer",
    "Client",
    "CoroutineRunner",
    "Export",
    "Family",
    "FileRange",
    "Filter",
    "FilterHandle",
    "Flags",
    "Handle",
    "Plugin",
    "ServerControl",
    "SharedCount",
    "Support",
    "ThreadModel",
]

#: What a read may return: anything whose bytes can be sent as they lie in memory.
Buffer: TypeAlias = bytes | bytearray | memoryview

T = TypeVar("T")


class ThreadModel(enum.IntEnum):
    """How much of a backend may run at once. The strictest model in the stack is the one that counts."""

    SERIALIZE_CONNECTIONS = 0  #: one open export at a time; further clients wait until it is closed
    SERIALIZE_ALL_REQUESTS = 1  #: many clients, one call at a time in all
    SERIALIZE_REQUESTS = 2  #: one call at a time on each handle
    PARALLEL = 3  #: any number of calls at once, on one handle too


class Support(enum.IntEnum):
    """How a request is served: not at all, by other requests, or by the backend itself."""

    NONE = 0
    EMULATE = 1
    NATIVE = 2


class Flags(enum.IntFlag):
    """Flags of a request to a handle. Test them only ``if flags``: most requests have none."""

    NONE = 0
    MAY_TRIM = 1  #: zero: the range may become a hole
    FUA = 2  #: pwrite, trim, zero: return only when this request is on stable storage
    REQ_ONE = 4  #: extents: the client wants only the first extent
    FAST_ZERO = 8  #: zero: raise OSError(ENOTSUP) at once if it is not faster than writing


class BlockSize(NamedTuple):
    """Size constraints in bytes. ``maximum`` bounds the data of one read or write; 0xffffffff is no bound."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 64 << 20


class FileRange(NamedTuple):
    """Bytes of a read as they lie in an open file: they begin at `position` of file descriptor `fd`."""

    fd: int
    position: int


class Export(NamedTuple):
    """One line of the list of exports."""

    name: str
    description: str = ""


class Family(enum.Enum):
    """The kind of socket a client came by."""

    INET = "tcp"
    INET6 = "tcp6"
    UNIX = "unix"
    VSOCK = "vsock"
    UNKNOWN = "unknown"


def _cannot_disconnect(force: bool) -> None:
    """Do nothing: there is no connection."""


class Client(NamedTuple):
    """Who is connected. What cannot be known is None; who must decide on it, refuses."""

    number: int  #: counts connections from 1
    family: Family = Family.UNKNOWN
    address: str | None = None  #: IP address as text; an IPv4 peer of an IPv6 socket is one of IPv4
    port: int | None = None  #: TCP or vsock port of the peer
    cid: int | None = None  #: vsock context of the peer
    pid: int | None = None  #: peer of a Unix socket, when it connected
    uid: int | None = None
    gid: int | None = None
    security_label: str | None = None  #: SO_PEERSEC
    tls: bool = False
    tls_dn: str | None = None  #: subject of a verified client certificate
    tls_issuer_dn: str | None = None
    is_probe: bool = False  #: open: NBD_OPT_INFO asks about an export, which is closed again at once
    #: ``disconnect(force)`` ends the connection at once; without force further requests are refused, until it leaves.
    disconnect: Callable[[bool], None] = _cannot_disconnect

    #: ``sleep(seconds)``: wait so long on behalf of this client. Raises OSError(ESHUTDOWN) as soon as the client is
    #: gone or the server ends, also if that is so already: what was to be done after the wait must then be left.
    sleep: Callable[[float], None] = time.sleep

    def __str__(self) -> str:
        where = {
            Family.INET: f"{self.address}:{self.port}",
            Family.INET6: f"[{self.address}]:{self.port}",
            Family.VSOCK: f"vsock {self.cid}:{self.port}",
            Family.UNIX: f"unix pid={self.pid} uid={self.uid}",
        }
        return f"connection {self.number} ({where.get(self.family, 'unknown address')})"


class SharedCount(Protocol):
    """How many there are of something, open handles for example, in all processes that serve (``--workers``).

    What a process held that is killed is given back.
    """

    @property
    def value(self) -> int:
        """How many there are now."""

    def take(self, limit: int = 0) -> bool:
        """Count one more, unless there are `limit` already (0 is no limit); tell whether that was done."""

    def give_back(self) -> None:
        """Count one less: to be called once for each :meth:`take`, in the process that made it."""


class ServerControl(Protocol):
    """What a backend may ask of the server that it runs in."""

    def finish(self) -> None:
        """Accept no more clients, and end when the last of those that are connected has left. Returns at once."""

    def shutdown(self) -> None:
        """Begin an orderly shutdown, which also ends clients that are connected. Returns at once."""

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        """Return a count that is right also with ``--workers``. Call it in ``load`` or ``get_ready``.

        Args:
            on_zero: Called, with no lock held, each time that the count has come down to zero: in the process that
                gave the last one back, or in the main process if that was killed.
        """


class _Questions:
    """What an open export is asked about itself, whether its verbs are plain or coroutines.

    Each question is asked once, when the export is opened, in the order in which they stand here.
    """

    if TYPE_CHECKING:  # each of the two has its own

        def overrides(self, verb: str) -> bool: ...

    def get_size(self) -> int:
        """Return the size of the export in bytes, 0 to 2**63 - 1. It does not change while the handle is open."""
        raise NotImplementedError(f"{type(self).__name__} does not say its size")

    def can_write(self) -> bool:
        """Tell whether the export may be written at all. Default: whether :meth:`pwrite` is overridden."""
        return self.overrides("pwrite")

    def can_zero(self) -> Support:
        """Tell how zeroes are written: by :meth:`zero`, by :meth:`pwrite` (``EMULATE``), or refused (``NONE``)."""
        return Support.NATIVE if self.overrides("zero") else Support.EMULATE

    def can_fast_zero(self) -> bool:
        """Tell whether a zero with ``FAST_ZERO`` fails fast if it would be slow.

        Default: as nbdkit's, true if :meth:`zero` is not overridden, since then each of them fails at once.
        """
        return not self.overrides("zero")

    def can_trim(self) -> bool:
        """Tell whether :meth:`trim` works. Default: whether it is overridden."""
        return self.overrides("trim")

    def can_fua(self) -> Support:
        """Tell how ``FUA`` is served: by the verbs themselves, by :meth:`flush` after them, or refused."""
        return Support.EMULATE if self.overrides("flush") else Support.NONE

    def can_flush(self) -> bool:
        """Tell whether :meth:`flush` works. Default: whether it is overridden."""
        return self.overrides("flush")

    def is_rotational(self) -> bool:
        """Tell whether the storage behaves like a rotating disk."""
        return False

    def can_multi_conn(self) -> bool:
        """Tell whether a flush on any connection covers what was answered on all connections to the export."""
        return False

    def can_cache(self) -> Support:
        """Tell how a prefetch is served: by :meth:`cache`, by :meth:`pread`, or refused."""
        return Support.NATIVE if self.overrides("cache") else Support.NONE

    def can_extents(self) -> bool:
        """Tell whether :meth:`extents` works. Default: whether it is overridden; else all is reported as data."""
        return self.overrides("extents")

    def block_size(self) -> BlockSize | None:
        """Return the size constraints that clients must keep, or None if there are none."""
        return None

    def export_description(self) -> str | None:
        """Return a description of the export for people, or None."""
        return None


class Handle(_Questions):
    """One open export of one client: override what the storage can do natively, and leave out the rest.

    Only :meth:`get_size` and :meth:`pread` are required. What a handle can do is inferred from what it overrides;
    override ``can_*`` where that is not the truth. Each is asked once, when the export is opened, in a fixed order.

    Ranges and flags that reach a verb have been checked: the range lies within the export and is not empty, and only
    flags of :class:`Flags` arrive that the capabilities allow.
    """

    #: Verbs that never wait for anything but the processor, by name. The thread that reads requests calls these
    #: itself without a second thought; of others it finds out how long they take.
    inline: ClassVar[frozenset[str]] = frozenset()

    #: Reads ask :meth:`extents` for holes, which are then told to the client in place of their zeroes.
    sparse: bool = False

    #: ``pread_into(buffer, offset)``: fill `buffer` from `offset` on and return True, or return False where that would
    #: wait for a device, or something is wrong with it: then :meth:`pread` is called. Optional.
    pread_into: Callable[[memoryview, int], bool] | None = None

    #: ``file_range(count, offset)``: where the range lies in a file, so that it can be sent without being copied, or
    #: None if it is not at hand without waiting. Optional.
    file_range: Callable[[int, int], FileRange | None] | None = None

    def pread(self, count: int, offset: int) -> Buffer:
        """Return exactly `count` bytes from `offset` on. The buffer is sent as it is, so do not reuse it."""
        raise NotImplementedError(f"{type(self).__name__} does not read")

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        """Write all of `data` at `offset`. `data` is valid during the call only. Flags: ``FUA``."""
        raise NotImplementedError(f"{type(self).__name__} does not write")

    def flush(self) -> None:
        """Return when all writes, trims and zeroes that have returned are on stable storage."""
        raise NotImplementedError(f"{type(self).__name__} does not flush")

    def trim(self, count: int, offset: int, flags: int) -> None:
        """Forget `count` bytes at `offset`, wholly, partly or not at all. Flags: ``FUA``."""
        raise NotImplementedError(f"{type(self).__name__} does not trim")

    def zero(self, count: int, offset: int, flags: int) -> None:
        """Make `count` bytes at `offset` read as zeroes. Flags: ``FUA``, ``MAY_TRIM``, ``FAST_ZERO``.

        Raise ``OSError(ENOTSUP)`` to have zeroes written in place of this, or refused if ``FAST_ZERO`` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} does not zero")

    def cache(self, count: int, offset: int) -> None:
        """Fetch `count` bytes at `offset` near, as they will be read soon."""
        raise NotImplementedError(f"{type(self).__name__} does not cache")

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """Return :class:`~nbdkitpy.Extent` tuples that cover the range or a beginning of it. Flags: ``REQ_ONE``.

        See :func:`~nbdkitpy.normalise_extents` for the rules.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know its extents")

    def close(self) -> None:
        """Release what the handle holds. Called once, after the last request has returned."""

    def overrides(self, verb: str) -> bool:
        """Tell whether this handle's class defines `verb` itself."""
        return getattr(type(self), verb) is not getattr(Handle, verb)


class AsyncHandle(_Questions):
    """An open export whose verbs are coroutines: very many requests may be under way, in one thread.

    What each verb is for, and what it is called with, is as in :class:`Handle`; so are the questions, which are plain
    methods, and what follows from their answers. All coroutines of a process run on one loop, and a verb that blocks
    holds up all of them: what cannot be awaited belongs into ``asyncio.to_thread``, or into a :class:`Handle`.

    A verb is cancelled only at the end of the server, if it takes longer than clients are given then.
    """

    async def pread(self, count: int, offset: int) -> Buffer:
        """Return exactly `count` bytes from `offset` on. The buffer is sent as it is, so do not reuse it."""
        raise NotImplementedError(f"{type(self).__name__} does not read")

    async def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        """Write all of `data` at `offset`. `data` is valid until this returns. Flags: ``FUA``."""
        raise NotImplementedError(f"{type(self).__name__} does not write")

    async def flush(self) -> None:
        """Return when all writes, trims and zeroes that have returned are on stable storage."""
        raise NotImplementedError(f"{type(self).__name__} does not flush")

    async def trim(self, count: int, offset: int, flags: int) -> None:
        """Forget `count` bytes at `offset`, wholly, partly or not at all. Flags: ``FUA``."""
        raise NotImplementedError(f"{type(self).__name__} does not trim")

    async def zero(self, count: int, offset: int, flags: int) -> None:
        """Make `count` bytes at `offset` read as zeroes. Flags: ``FUA``, ``MAY_TRIM``, ``FAST_ZERO``.

        Raise ``OSError(ENOTSUP)`` to have zeroes written in place of this, or refused if ``FAST_ZERO`` is set.
        """
        raise NotImplementedError(f"{type(self).__name__} does not zero")

    async def cache(self, count: int, offset: int) -> None:
        """Fetch `count` bytes at `offset` near, as they will be read soon."""
        raise NotImplementedError(f"{type(self).__name__} does not cache")

    async def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        """Return :class:`~nbdkitpy.Extent` tuples that cover the range or a beginning of it. Flags: ``REQ_ONE``.

        A list, most often: what is no coroutine, a generator for example, is gone through without waiting.
        """
        raise NotImplementedError(f"{type(self).__name__} does not know its extents")

    async def close(self) -> None:
        """Release what the handle holds. Called once, after the last request has returned."""

    def overrides(self, verb: str) -> bool:
        """Tell whether this handle's class defines `verb` itself."""
        return getattr(type(self), verb) is not getattr(AsyncHandle, verb)


#: What a handle is asked about itself.
QUESTIONS = frozenset(name for name in vars(_Questions) if not name.startswith("_"))

#: What a client can ask for, as verbs of a handle.
VERBS = ("pread", "pwrite", "flush", "trim", "zero", "cache", "extents")

#: Other ways to the same bytes as pread's, and the verbs that they go round: who overrides one of those has to override
#: these too, or they are lost.
_READ_SHORTCUTS: Mapping[str, frozenset[str]] = {
    "pread_into": frozenset({"pread"}),
    "file_range": frozenset({"pread"}),
    "sparse": frozenset({"pread", "extents"}),
}


class FilterHandle(Handle):
    """A handle around the `next` one, which it passes everything to that a subclass does not override.

    Each verb that is not overridden is bound, when the handle is made, straight to the first inner layer that does
    override it: a filter costs nothing on requests that it leaves alone. So a subclass that overrides a verb only to
    call ``super()`` makes every request slower, and one that replaces ``self.next`` later has to set
    :attr:`dynamic_next`.
    """

    #: True for a handle that may replace ``self.next`` while it is open: nothing is bound through it.
    dynamic_next: ClassVar[bool] = False

    def __init__(self, next: Handle, untouched: Collection[str] = ()) -> None:
        self.next = next
        if self.dynamic_next:
            return
        cls = type(self)

        def is_left_alone(name: str) -> bool:
            return name in untouched or getattr(cls, name) is getattr(FilterHandle, name)

        passed = set(filter(is_left_alone, VERBS))
        for name, verbs in _READ_SHORTCUTS.items():
            if passed.issuperset(verbs) and is_left_alone(name):
                passed.add(name)
        for name in passed:
            setattr(self, name, getattr(next, name))
        # A verb stays inline if the inner one is, and if what this layer puts before it says that it is too.
        inline = frozenset(verb for verb in next.inline if verb in passed or verb in cls.inline)
        setattr(self, "inline", inline)  # noqa: B010  # a class attribute of handles, one of this object here

    def get_size(self) -> int:
        return self.next.get_size()

    def can_write(self) -> bool:
        return self.next.can_write()

    def can_zero(self) -> Support:
        return self.next.can_zero()

    def can_fast_zero(self) -> bool:
        return self.next.can_fast_zero()

    def can_trim(self) -> bool:
        return self.next.can_trim()

    def can_fua(self) -> Support:
        return self.next.can_fua()

    def can_flush(self) -> bool:
        return self.next.can_flush()

    def is_rotational(self) -> bool:
        return self.next.is_rotational()

    def can_multi_conn(self) -> bool:
        return self.next.can_multi_conn()

    def can_cache(self) -> Support:
        return self.next.can_cache()

    def can_extents(self) -> bool:
        return self.next.can_extents()

    def block_size(self) -> BlockSize | None:
        return self.next.block_size()

    def export_description(self) -> str | None:
        return self.next.export_description()

    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset, flags)

    def flush(self) -> None:
        self.next.flush()

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self.next.cache(count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return self.next.extents(count, offset, flags)

    def close(self) -> None:
        self.next.close()


class Backend:
    """What a plugin and a filter have in common: a name, parameters, and a life as long as the server's.

    The order of a life: :meth:`load`, :meth:`config` for each parameter, :meth:`config_complete`,
    :meth:`thread_model`, :meth:`get_ready`, :meth:`after_fork`, then :meth:`preconnect` and :meth:`open` for each
    client, :meth:`cleanup`, :meth:`unload`. With ``--workers`` each of the processes that serve has a copy from
    :meth:`after_fork` to :meth:`cleanup`; the main process does the rest, :meth:`preconnect` too.
    """

    #: As in the entry point: ASCII letters, digits, ``-`` and ``_``. Without an entry point it may be left out, and is
    #: that of the class in small letters.
    name: ClassVar[str] = ""
    longname: ClassVar[str] = ""  #: a few words, for people
    description: ClassVar[str] = ""  #: a sentence or two for ``--help``
    version: ClassVar[str] = ""
    debug_flags: ClassVar[frozenset[str]] = frozenset()  #: what ``-D NAME.FLAG=N`` may set

    #: Whether several processes may each have an instance, after :meth:`get_ready`, and serve clients of the same
    #: exports (``--workers``): what one has answered the others know of, and a flush covers the writes of all.
    multi_process: ClassVar[bool] = False

    parameters: ClassVar[Mapping[str, Parameter[Any]]] = {}  #: collected from the class attributes, by key
    server: ServerControl  #: set before load
    server_name: str = ""  #: of ``--name``; set before load

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = {attribute: value for base in reversed(cls.__mro__) for attribute, value in vars(base).items()}
        cls.parameters = {value.key: value for value in declared.values() if isinstance(value, Parameter)}

    def __init__(self) -> None:
        self.debug: dict[str, int] = {}

    def load(self) -> None:
        """Begin: called once, first of all."""

    def config(self, key: str, value: str) -> bool:
        """Take one parameter; return False if there is none of that name here.

        Override it to take parameters that cannot be declared.

        Raises:
            ConfigError: the value is not right.
        """
        parameter = self.parameters.get(self.canonical_key(key))
        if parameter is None:
            return False
        parameter.accept(self, value)
        return True

    def canonical_key(self, key: str) -> str:
        """Return the key of the parameter that has `key` as an alias, or else `key` itself."""
        return next((own for own, parameter in self.parameters.items() if key in parameter.aliases), key)

    def config_complete(self) -> None:
        """Check the parameters together, when all have been given.

        Raises:
            ConfigError: one that is required is missing. An override calls this one first.
        """
        for parameter in self.parameters.values():
            if parameter.required and not parameter.is_set(self):
                raise ConfigError(parameter.missing(self))

    def thread_model(self) -> ThreadModel:
        """Return how much of this may run at once. Asked once, after :meth:`config_complete`."""
        return ThreadModel.PARALLEL

    def dump(self) -> Mapping[str, str]:
        """Return further lines for ``--dump-plugin``."""
        return {}

    def get_ready(self) -> None:
        """Open what all clients share. Errors still reach the user's terminal. Do not start threads here."""

    def after_fork(self) -> None:
        """Start threads, if any: the process is now one that will serve."""

    def reload(self, values: Mapping[str, Any]) -> None:
        """Set new values of live parameters, by key, while clients are served. They have been parsed.

        Override it to check them together, before calling this one, or to renew what has been made of them, after it.
        Called in one thread, while others serve clients: those shall find either the old state or the new one. If an
        inner layer refuses its values, this is called once more, with the old ones.

        Raises:
            ConfigError: the values do not fit together.
        """
        for key, value in values.items():
            setattr(self, self.parameters[key].attribute, value)

    def cleanup(self) -> None:
        """Stop what :meth:`after_fork` started. All handles are closed."""

    def unload(self) -> None:
        """End: called once, last of all."""

    def preconnect(self, client: Client, readonly: bool) -> None:
        """Refuse a client by raising OSError, before a byte is sent to it."""

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        """Return the exports that a client may be told of."""
        raise NotImplementedError

    def default_export(self, client: Client, readonly: bool) -> str:
        """Return the name of the export that a client gets who asks for ``""``."""
        raise NotImplementedError

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        """Return a new handle on the export, for one client. Raise OSError if there is no such export for it."""
        raise NotImplementedError


class Plugin(Backend):
    """Where the bytes live. Override :meth:`Backend.open`, and what else is not as the defaults say."""

    def magic_config_key(self) -> str | None:
        """Return the key that a bare word on the command line has, or None.

        Asked for each of them, when those before it have been given. Default: that of the parameter declared so.
        """
        return next((key for key, parameter in self.parameters.items() if parameter.magic), None)

    def config_help(self, given: Mapping[str, str]) -> str:
        """Return more for ``--help``, as plain text.

        Args:
            given: Parameters that stand beside ``--help``. Nothing else of a life has been called.
        """
        return ""

    def thread_model(self) -> ThreadModel:
        """One call at a time, unless a plugin says that it is safe for more."""
        return ThreadModel.SERIALIZE_ALL_REQUESTS

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        """Return one export, the default one."""
        return [Export(self.default_export(client, readonly))]

    def default_export(self, client: Client, readonly: bool) -> str:
        """Return ``""``."""
        return ""


class CoroutineRunner(Protocol):
    """What a server runs the coroutines of an :class:`AsyncPlugin` with."""

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` and return its result."""

    def open(self, coroutine: Coroutine[Any, Any, AsyncHandle]) -> Handle:
        """Run `coroutine` and return a plain handle over its result, which waits for coroutines."""


class AsyncPlugin(Plugin):
    """A plugin whose handles have coroutines for verbs, which all run on one loop in each process.

    Override :meth:`open_async` in place of :meth:`open`. All other methods are plain ones.
    """

    _runner: CoroutineRunner | None = None  # set before after_fork

    def thread_model(self) -> ThreadModel:
        """Any number of requests at once: with a stricter model only one coroutine would run at a time."""
        return ThreadModel.PARALLEL

    async def open_async(self, export_name: str, readonly: bool, client: Client) -> AsyncHandle:
        """Return a new handle on the export, for one client. Raise OSError if there is no such export for it."""
        raise NotImplementedError

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        """Wait for :meth:`open_async`, and return a handle that waits for the coroutines of the one that it returns."""
        return self._running().open(self.open_async(export_name, readonly, client))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop, wait for it, and return its result: for methods that are no coroutines.

        From ``after_fork`` to ``cleanup``, but not on the loop itself, which would wait for itself.

        Raises:
            RuntimeError: this is not the time or the place for it.
        """
        if self._runner is None:
            coroutine.close()  # which is not to complain that nobody has awaited it
        return self._running().run(coroutine)

    def _running(self) -> CoroutineRunner:
        if self._runner is None:
            raise RuntimeError(f"{self.name}: coroutines are run from after_fork to cleanup only")
        return self._runner


class Filter(Backend):
    """Stands before `next` and changes what passes.

    Most filters override only :meth:`preconnect`, to refuse clients, or :meth:`wrap`, to put a
    :class:`FilterHandle` around each handle.
    """

    next: Backend  #: the next inner layer; set before load

    def preconnect(self, client: Client, readonly: bool) -> None:
        """Ask the inner layers. An override calls this one, before or after its own check."""
        self.next.preconnect(client, readonly)

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return self.next.list_exports(client, readonly)

    def default_export(self, client: Client, readonly: bool) -> str:
        return self.next.default_export(client, readonly)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        """Open inward, then :meth:`wrap`. What was opened is closed again if that fails.

        Override this, rather than :meth:`wrap`, to ask the inner layers for another name or mode, or not at all.
        """
        return self.wrapped(self.next.open(export_name, readonly, client), client)

    def wrapped(self, handle: Handle, client: Client) -> Handle:
        """Return :meth:`wrap` of `handle`, which is closed if that fails.

        Raises:
            TypeError: what :meth:`wrap` returned is no handle.
        """
        try:
            outer = self.wrap(handle, client)
            if not isinstance(outer, Handle):  # a forgotten return, most often
                raise TypeError(f"{self.name}: wrap must return a Handle, not {outer!r}")
            return outer
        except BaseException:
            handle.close()
            raise

    def wrap(self, handle: Handle, client: Client) -> Handle:
        """Return a handle around `handle`, or `handle` itself. It is open: its size can be asked, its bytes read."""
        return handle

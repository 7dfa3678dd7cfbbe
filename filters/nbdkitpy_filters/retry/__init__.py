"""The retry filter: opens the plugin anew when something fails, and tries again."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from nbdkitpy import (
    Buffer,
    Client,
    Extent,
    FileRange,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Parameter,
    Support,
    ThreadModel,
    hookimpl,
    integer,
    normalise_extents,
    parse_bool,
    parse_delay,
)

__all__ = ["Retry", "register_filters"]

_log = logging.getLogger("nbdkitpy.retry")

_MAX_RETRIES = (1 << 32) - 1
_LONGEST_DELAY = float((1 << 31) - 1)

_FUA = int(Flags.FUA)
_FAST_ZERO = int(Flags.FAST_ZERO)
_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP})

T = TypeVar("T")


def _parse_retry_delay(text: str) -> float:
    delay = parse_delay(text)
    if not delay:
        raise ValueError("a time of more than 0")
    return delay


class Retry(Filter):
    """Try what fails again, with the inner layers opened anew."""

    name = "retry"
    longname = "nbdkitpy retry filter"
    description = "Reopen the plugin and try again when a request fails."
    multi_process = True

    retries = Parameter(
        integer(0, _MAX_RETRIES), default=5, metavar="N", help="How many times one request is tried again. Default: 5."
    )
    retry_delay = Parameter(
        _parse_retry_delay, default=2.0, metavar="DELAY", help="Time before it is tried again. Default: 2 seconds."
    )
    retry_exponential = Parameter(
        parse_bool, default=True, metavar="BOOL", help="Wait twice as long each time. Default: true."
    )
    retry_readonly = Parameter(
        parse_bool, default=False, metavar="BOOL", help="Reopen for reading only. Default: false."
    )

    def thread_model(self) -> ThreadModel:
        """One call at a time on each handle, as no other may be under way when it is replaced."""
        return ThreadModel.SERIALIZE_REQUESTS

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        opening = _Opening(self, export_name, readonly, client)
        return _RetryHandle(opening.persist("open", opening.next_try), opening)

    def delays(self) -> Iterator[float]:
        """Yield the time to wait before each further try."""
        delay = self.retry_delay
        for _ in range(self.retries):
            yield delay
            if self.retry_exponential:
                delay = min(2 * delay, _LONGEST_DELAY)


class _Opening:
    """How one client opens one export, again and again."""

    def __init__(self, retry: Retry, export_name: str, readonly: bool, client: Client) -> None:
        self._retry = retry
        self._export_name = export_name
        self._client = client
        self.readonly = readonly  #: for the next try
        self.gave_up_writing = False  #: because something had failed

    def next_try(self) -> Handle:
        """Open the inner layers."""
        return self._retry.next.open(self._export_name, self.readonly, self._client)

    def persist(self, what: str, attempt: Callable[[], T], is_final: Callable[[Exception], bool] | None = None) -> T:
        """Call `attempt` until it succeeds, with a wait before each further try.

        Args:
            what: For the log.
            attempt: Raises an exception if it fails.
            is_final: Tells errors that it would fail with again.

        Raises:
            Exception: that of the last try.
            OSError: ESHUTDOWN, the client is gone, or the server ends.
        """
        delays = self._retry.delays()
        while True:
            try:
                return attempt()
            except Exception as error:
                delay = next(delays, None)
                if delay is None or (is_final is not None and is_final(error)):
                    raise
                _log.warning("retry: %s failed, will be tried again in %g s: %s", what, delay, _described(error))
            if self._retry.retry_readonly and not self.readonly:
                self.readonly = self.gave_up_writing = True
            self._client.sleep(delay)


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


class _Abilities(NamedTuple):
    """What a handle that has replaced another can do; what the client was told is what the first one could."""

    size: int
    verbs: frozenset[str]
    can_write: bool
    can_fua: bool
    can_fast_zero: bool
    can_extents: bool

    @classmethod
    def ask(cls, handle: Handle) -> _Abilities:
        """Ask `handle`."""
        can_write = handle.can_write()
        can_zero = can_write and handle.can_zero() is not Support.NONE
        able = {
            "pread": True,
            "pwrite": can_write,
            "flush": handle.can_flush(),
            "trim": can_write and handle.can_trim(),
            "zero": can_zero,
            "cache": handle.can_cache() is not Support.NONE,
            "extents": True,
        }
        return cls(
            handle.get_size(),
            frozenset(verb for verb, is_able in able.items() if is_able),
            can_write,
            can_write and handle.can_fua() is not Support.NONE,
            can_zero and handle.can_fast_zero(),
            handle.can_extents(),
        )

    def check(self, verb: str, end: int, flags: int) -> None:
        """Raise OSError if a request cannot be made: one of `verb`, up to `end`, with `flags`."""
        if verb in ("pwrite", "trim", "zero") and not self.can_write:
            raise OSError(errno.EROFS, f"retry: {verb}: the export has become read-only")
        if verb not in self.verbs or (flags & _FUA and not self.can_fua):
            raise OSError(errno.EIO, f"retry: {verb}: the export cannot do that any more")
        if end > self.size:
            raise OSError(errno.EIO, f"retry: {verb}: the export has shrunk to {self.size} bytes")
        if flags & _FAST_ZERO and not self.can_fast_zero:
            raise OSError(errno.ENOTSUP, "retry: zero: the export cannot do that fast any more")


class _RetryHandle(FilterHandle):
    """Replaces the inner handle when a request has failed. One request at a time is made of it."""

    dynamic_next = True

    def __init__(self, next: Handle, opening: _Opening) -> None:
        super().__init__(next)
        self.sparse = next.sparse
        self._opening = opening
        self._is_open = True
        self._abilities: _Abilities | None = None  # of the first handle the client has been told

    # --- trying ---

    def _persist(self, verb: str, work: Callable[[Handle], T], end: int = 0, flags: int = 0) -> T:
        """Do `work` on the inner handle, on a new one each time it fails."""
        is_first = True

        def attempt() -> T:
            nonlocal is_first
            if not (is_first and self._is_open):
                self._reopen()
            is_first = False
            self._check(verb, end, flags)
            return work(self.next)

        def is_final(error: Exception) -> bool:
            number = getattr(error, "errno", None)
            if flags & _FAST_ZERO and number in _UNSUPPORTED:
                return True
            return number == errno.EROFS and self._opening.gave_up_writing

        return self._opening.persist(verb, attempt, is_final)

    def _reopen(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                self.next.close()
            except Exception as error:
                _log.warning("retry: what has failed cannot be closed either: %s", _described(error))
        handle = self._opening.next_try()
        try:
            self._abilities = _Abilities.ask(handle)
        except BaseException:
            handle.close()
            raise
        self.next = handle
        self._is_open = True

    def _check(self, verb: str, end: int, flags: int) -> None:
        if self._abilities is not None:
            self._abilities.check(verb, end, flags)

    # --- verbs ---

    def pread(self, count: int, offset: int) -> Buffer:
        return self._persist("pread", lambda handle: handle.pread(count, offset), offset + count)

    def file_range(self, count: int, offset: int) -> FileRange | None:
        """Tell where the bytes lie. They are sent before any other request is made, so before the file is closed."""
        find = self.next.file_range
        if find is None or not self._is_open:
            return None
        try:
            self._check("pread", offset + count, 0)
            return find(count, offset)
        except Exception:  # it will be tried by reading
            return None

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._persist("pwrite", lambda handle: handle.pwrite(data, offset, flags), offset + len(data), flags)

    def flush(self) -> None:
        self._persist("flush", lambda handle: handle.flush())

    def trim(self, count: int, offset: int, flags: int) -> None:
        self._persist("trim", lambda handle: handle.trim(count, offset, flags), offset + count, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self._persist("zero", lambda handle: handle.zero(count, offset, flags), offset + count, flags)

    def cache(self, count: int, offset: int) -> None:
        self._persist("cache", lambda handle: handle.cache(count, offset), offset + count)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        def ask(handle: Handle) -> list[Extent]:
            if self._abilities is not None and not self._abilities.can_extents:
                return [Extent(offset, count)]  # it is always right to call it data
            # As a list, as a generator would fail when nobody tries again.
            return normalise_extents(handle.extents(count, offset, flags), count, offset)

        return self._persist("extents", ask, offset + count, flags)

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            super().close()


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Retry)

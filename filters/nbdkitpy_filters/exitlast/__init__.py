"""The exitlast filter: the server ends when its last client has gone."""

from __future__ import annotations

import threading
from collections.abc import Callable

from nbdkitpy import Client, Filter, FilterHandle, Handle, hookimpl

__all__ = ["ExitLast"]


class ExitLast(Filter):
    """Have the server finish when the last open export is closed; never before the first was opened."""

    name = "exitlast"
    longname = "nbdkitpy exitlast filter"
    description = "Exit when the last client has disconnected."

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._open = 0

    def wrap(self, handle: Handle, client: Client) -> Handle:
        # NBD_OPT_INFO only asks: if it counted, nbdinfo would end the server, or a client between its INFO and its GO.
        if client.is_probe:
            return handle
        counted = _CountedHandle(handle, self._closed)
        with self._lock:
            self._open += 1
        return counted

    def _closed(self) -> None:
        with self._lock:
            self._open -= 1
            last = self._open == 0
        if last:
            # Not shutdown(): who has connected meanwhile, and is still in the handshake, is to be served.
            self.server.finish()


class _CountedHandle(FilterHandle):
    """Tells the filter when it is closed."""

    def __init__(self, next: Handle, closed: Callable[[], None]) -> None:
        super().__init__(next)
        self._closed: Callable[[], None] | None = closed

    def close(self) -> None:
        # Told once only, even if an outer layer closes twice: the server would end under the other clients.
        closed, self._closed = self._closed, None
        try:
            super().close()
        finally:
            if closed is not None:
                closed()


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(ExitLast)

"""The exitlast filter: the server ends when its last client has gone."""

from __future__ import annotations

from collections.abc import Callable

from nbdkitpy import Client, Filter, FilterHandle, Handle, hookimpl

__all__ = ["ExitLast"]


class ExitLast(Filter):
    """Have the server finish when the last open export is closed; never before the first was opened."""

    name = "exitlast"
    longname = "nbdkitpy exitlast filter"
    description = "Exit when the last client has disconnected."
    multi_process = True

    def load(self) -> None:
        # Not shutdown(): who has connected meanwhile, and is still in the handshake, is to be served.
        self._open = self.server.shared_count(self.server.finish)

    def wrap(self, handle: Handle, client: Client) -> Handle:
        # NBD_OPT_INFO only asks: if it counted, nbdinfo would end the server, or a client between its INFO and its GO.
        if client.is_probe:
            return handle
        counted = _CountedHandle(handle, self._open.give_back)
        self._open.take()
        return counted


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

"""The limit filter: how many clients may have an export open at once."""

from __future__ import annotations

import errno
from collections.abc import Callable

from nbdkitpy import Client, Filter, FilterHandle, Handle, Parameter, hookimpl, integer

__all__ = ["Limit"]

_MAX_LIMIT = (1 << 32) - 1


class Limit(Filter):
    """Refuse clients while `limit` others have an export open.

    A slot is taken before the inner layers open, so that they never see more clients than the limit, and is given
    back when the handle is closed or when opening fails.
    """

    name = "limit"
    longname = "nbdkitpy limit filter"
    description = "Limit the number of clients that can be connected at once."
    multi_process = True

    limit = Parameter(
        integer(0, _MAX_LIMIT),
        default=1,
        live=True,
        metavar="N",
        help="Number of clients at once; 0 means no limit. Default: 1.",
    )

    def load(self) -> None:
        self._slots = self.server.shared_count()

    def preconnect(self, client: Client, readonly: bool) -> None:
        # The inner layers first: whom they refuse is refused for their reason.
        super().preconnect(client, readonly)
        limit = self.limit  # a reload may change it meanwhile
        if limit and self._slots.value >= limit:
            raise _refusal()

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        # Checked again: many may have passed preconnect while no slot was taken yet.
        if not self._slots.take(self.limit):
            raise _refusal()
        try:
            return super().open(export_name, readonly, client)
        except BaseException:
            self._slots.give_back()
            raise

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return _LimitHandle(handle, self._slots.give_back)


def _refusal() -> OSError:
    return PermissionError(errno.EACCES, "limit: too many clients connected, connection rejected")


class _LimitHandle(FilterHandle):
    """Gives its slot back when it is closed."""

    def __init__(self, next: Handle, give_back: Callable[[], None]) -> None:
        super().__init__(next)
        self._give_back: Callable[[], None] | None = give_back

    def close(self) -> None:
        # Once only, even if an outer layer closes twice: a slot too many would undo the limit for good.
        give_back, self._give_back = self._give_back, None
        try:
            super().close()
        finally:
            if give_back is not None:
                give_back()


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Limit)

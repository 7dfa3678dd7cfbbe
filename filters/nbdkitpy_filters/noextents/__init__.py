"""The noextents filter: clients are not told of holes."""

from __future__ import annotations

from collections.abc import Callable

from nbdkitpy import Client, Filter, FilterHandle, Handle, hookimpl

__all__ = ["NoExtents"]


class NoExtents(Filter):
    """Make the disk appear as fully allocated."""

    name = "noextents"
    longname = "nbdkitpy noextents filter"
    description = "Hide from clients which parts of the disk are holes."
    multi_process = True

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return _Opaque(handle)


class _Opaque(FilterHandle):
    """Does not know its extents, so that the core reports data, and reads do not ask for holes."""

    def can_extents(self) -> bool:
        return False


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(NoExtents)

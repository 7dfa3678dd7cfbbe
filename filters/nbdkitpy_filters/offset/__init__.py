"""The offset filter: a range of bytes of the disk."""

from __future__ import annotations

from collections.abc import Callable

from nbdkitpy import Client, Filter, Handle, Parameter, hookimpl, parse_size, range_of

__all__ = ["Offset"]


class Offset(Filter):
    """Serve the bytes from `offset` on, `range` of them or all that there are."""

    name = "offset"
    longname = "nbdkitpy offset filter"
    description = "Serve a range of bytes of the disk."
    multi_process = True

    offset = Parameter(parse_size, default=0, metavar="OFFSET", help="Where the range begins.")
    range = Parameter(parse_size, metavar="LENGTH", help="Its length. Default: up to the end of the disk.")

    def wrap(self, handle: Handle, client: Client) -> Handle:
        size = self.range
        if size is None:
            size = max(handle.get_size() - self.offset, 0)
        return range_of(handle, self.offset, size, self.name)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Offset)

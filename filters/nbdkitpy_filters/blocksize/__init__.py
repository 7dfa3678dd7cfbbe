"""The blocksize filter: clients ask for any range, the inner layers see aligned ones that are not too long."""

from __future__ import annotations

import errno
from collections.abc import Callable

from nbdkitpy import BlockSize, Client, ConfigError, Filter, Handle, Parameter, RangeLock, hookimpl, parse_size

from .handle import NO_LIMIT, BlocksizeHandle, Limits

__all__ = ["Blocksize", "register_filters"]

_MAX_BLOCK = 64 << 10
_MAX_DATA = 64 << 20  # more than the server takes of a client does not come


def parse_block(text: str) -> int:
    """Return a minimum block size.

    Raises:
        ValueError: it is not a power of two, or too large.
    """
    size = parse_size(text)
    if not 0 < size <= _MAX_BLOCK or size & (size - 1):
        raise ValueError("a power of two from 1 to 64k")
    return size


def parse_limit(text: str) -> int:
    """Return the most bytes of a request.

    Raises:
        ValueError: that is nothing, or does not fit in 32 bits.
    """
    size = parse_size(text)
    if not 0 < size <= NO_LIMIT:
        raise ValueError(f"a size from 1 to {NO_LIMIT} bytes")
    return size


class Blocksize(Filter):
    """Rounds requests to blocks, and cuts those that are too long."""

    name = "blocksize"
    longname = "nbdkitpy blocksize filter"
    description = "Split and align requests, for plugins that take whole blocks or bounded lengths only."

    minblock = Parameter(parse_block, metavar="SIZE", help="Block size and alignment. Default: the plugin's, or 1.")
    maxdata = Parameter(parse_limit, metavar="SIZE", help="Most data of a request. Default: the plugin's, up to 64M.")
    maxlen = Parameter(parse_limit, metavar="SIZE", help="Most bytes of a request without data. Default: 4G - 1.")

    def __init__(self) -> None:
        super().__init__()
        # One for all exports: two names may well mean the same bytes.
        self._lock = RangeLock()

    def config_complete(self) -> None:
        super().config_complete()
        block = self.minblock or 1
        for key, limit in (("maxdata", self.maxdata), ("maxlen", self.maxlen)):
            if limit is not None and limit % block:
                raise ConfigError(f"{self.name}: {key} must be a multiple of minblock, {block}, not {limit}")

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return BlocksizeHandle(handle, self._limits(handle.block_size()), self._lock)

    def _limits(self, inner: BlockSize | None) -> Limits:
        """Join what was given with what the inner layers say of themselves."""
        inner = inner or BlockSize(maximum=NO_LIMIT)
        block = max(self.minblock or 1, inner.minimum)
        if inner.maximum < block:
            text = f"{self.name}: minblock={block} is more than the {inner.maximum} bytes that the plugin takes at once"
            raise OSError(errno.EINVAL, text)
        maxdata = min(self.maxdata or _MAX_DATA, inner.maximum)
        return Limits(block, _rounded(maxdata, block), _rounded(self.maxlen or NO_LIMIT, block))


def _rounded(limit: int, block: int) -> int:
    return max(limit // block, 1) * block


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Blocksize)

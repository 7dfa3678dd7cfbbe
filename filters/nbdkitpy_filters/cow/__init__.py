"""The cow filter: what clients write goes to an overlay, and the layers below are never changed."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from collections.abc import Callable

from nbdkitpy import (
    BlockSize,
    Client,
    ConfigError,
    Filter,
    Handle,
    Parameter,
    hookimpl,
    parse_bool,
    parse_path,
    parse_size,
)

from .handle import MAX_BLOCK, CowHandle, Policy
from .kept import KeptFile
from .overlay import Overlay, TemporaryOverlay

__all__ = ["Cow", "register_filters"]

_MIN_BLOCK = 4096
_TEMPORARY = "/var/tmp"  # noqa: S108  # as nbdkit: it is for what is large


def parse_block(text: str) -> int:
    """Return a block size.

    Raises:
        ValueError: it is not a power of two, or too small or large.
    """
    size = parse_size(text)
    if not _MIN_BLOCK <= size <= MAX_BLOCK or size & (size - 1):
        raise ValueError("a power of two from 4k to 2G")
    return size


def parse_on_read(text: str) -> bool | str:
    """Return a truth value, or an absolute path.

    Raises:
        ValueError: it is neither.
    """
    if text.startswith("/"):
        return parse_path(text)
    try:
        return parse_bool(text)
    except ValueError as error:
        raise ValueError(f"{error}, or an absolute path") from None


class Cow(Filter):
    """Keeps an overlay for each export, which all connections to it share.

    An overlay that nothing was written to is dropped when nobody has it open; the others stay until the server ends.
    """

    name = "cow"
    longname = "nbdkitpy copy-on-write (COW) filter"
    description = "Keep what clients write in an overlay, and leave the plugin as it is."

    cow_block_size = Parameter(parse_block, default=64 << 10, metavar="SIZE", help="Block size.")
    cow_on_cache = Parameter(parse_bool, default=False, help="Copy what clients prefetch.")
    cow_on_read = Parameter[bool | str](
        parse_on_read,
        default=False,
        metavar="BOOL|/PATH",
        help="Copy what is read, or while PATH exists.",
    )
    cow_file = Parameter(parse_path, help="File to keep the overlay in. Default: it is temporary.")

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._overlays: dict[str, Overlay] = {}  # by the name of the export
        self._file: KeptFile | None = None
        self._directory = ""

    def get_ready(self) -> None:
        """Open the file of the overlay, or see that there can be temporary ones."""
        self._directory = os.path.abspath(os.environ.get("TMPDIR") or _TEMPORARY)
        try:
            if self.cow_file is not None:
                self._file = self._kept(KeptFile(self.cow_file))
            else:
                tempfile.TemporaryFile(dir=self._directory).close()
        except (OSError, ValueError) as error:
            where = f"cow-file {self.cow_file}" if self.cow_file else f"directory of temporary files {self._directory}"
            raise ConfigError(f"{self.name}: {where}: {getattr(error, 'strerror', None) or error}") from error

    def _kept(self, file: KeptFile) -> KeptFile:
        """Return `file`, if it fits the block size that was given."""
        block = file.header.block if file.header else self.cow_block_size
        if block != self.cow_block_size and type(self).cow_block_size.is_set(self):
            file.close()
            raise ConfigError(
                f"{self.name}: cow-block-size must be {block}, as in the cow-file, not {self.cow_block_size}"
            )
        return file

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        """Open the inner layers read-only, whatever the client may do."""
        handle = self.next.open(export_name, True, client)
        try:
            overlay = self._take(export_name, handle)
            policy = Policy(self.cow_on_read, self.cow_on_cache)
            return CowHandle(handle, overlay, policy, lambda: self._give_back(export_name, overlay))
        except BaseException:
            handle.close()
            raise

    def _take(self, export_name: str, handle: Handle) -> Overlay:
        size = handle.get_size()
        inner = handle.block_size() or BlockSize()
        block = max(self.cow_block_size, inner.minimum)
        with self._lock:
            overlay = self._overlays.get(export_name)
            if overlay is None:
                overlay = self._overlays[export_name] = self._made(export_name, size, block)
            if overlay.size != size:
                text = f"{self.name}: the disk below has {size} bytes, where it had {overlay.size}"
                raise OSError(errno.EINVAL, text)
            if overlay.block < inner.minimum:
                raise OSError(errno.EINVAL, f"{self.name}: blocks must have {inner.minimum} bytes, not {overlay.block}")
            overlay.users += 1
        return overlay

    def _made(self, export_name: str, size: int, block: int) -> Overlay:
        if self._file is None:
            return TemporaryOverlay(size, block, self._directory)
        return self._file.overlay(export_name, size, block)

    def _give_back(self, export_name: str, overlay: Overlay) -> None:
        with self._lock:
            overlay.users -= 1
            if not overlay.users and overlay.states.untouched:
                del self._overlays[export_name]
                overlay.close()

    def cleanup(self) -> None:
        """Flush what is kept."""
        for overlay in self._overlays.values():
            _flush(overlay)

    def unload(self) -> None:
        """Close what is open; what is temporary is gone then."""
        for overlay in self._overlays.values():
            overlay.close()
        self._overlays.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


def _flush(overlay: Overlay) -> None:
    try:
        overlay.flush()
    except OSError as error:
        logging.getLogger("nbdkitpy.cow").error("cow: what was written last may be lost: %s", error)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Cow)

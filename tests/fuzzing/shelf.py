"""A plugin with the exports of a model, whose handles do what the model's disks do, in several manners."""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from nbdkitpy import (
    BlockSize,
    Client,
    Export,
    Extent,
    ExtentType,
    FileRange,
    Handle,
    Plugin,
    Support,
    ThreadModel,
)
from nbdkitpy.backend import VERBS
from nbdkitpy.protocol.constants import TransmissionFlag
from tests.fuzzing import model

__all__ = ["Manner", "Shelf"]

_BLOCK = 4096
_ORDINARY = (1, 4096, model.MAX_PAYLOAD)


class Manner(enum.Enum):
    """How handles of the plugin want to be called."""

    INLINE = "inline"  # by the thread that receives, and they know holes
    FILE = "file"  # the same, but reads are by pread_into and file_range
    WORKERS = "workers"  # by any thread, several at once


class _Volume:
    """What is behind one export: a file without a name."""

    def __init__(self, content: bytes, broken: range) -> None:
        self.fd = os.memfd_create("volume", os.MFD_CLOEXEC)
        os.pwrite(self.fd, content, 0)
        self.size = len(content)
        self.broken = broken

    def check(self, count: int, offset: int) -> None:
        """Fail as the model does."""
        if offset < self.broken.stop and self.broken.start < offset + count:
            raise OSError(errno.EIO, "it is broken")


class Shelf(Plugin):
    """Serves these exports.

    Args:
        exports: By the names that open them; the default export is opened by the name that it has.
        disks: Content by name, which is copied.
        manner: Of the handles.
    """

    name = "shelf"

    def __init__(
        self, exports: Mapping[str, model.Export], disks: Mapping[str, model.Disk], manner: Manner = Manner.INLINE
    ) -> None:
        super().__init__()
        self._exports = exports
        self._volumes = {name: _Volume(bytes(disk.content), disk.broken) for name, disk in disks.items() if name}
        self._handle = _HANDLES[manner]
        self._lock = threading.Lock()
        self.open_handles = 0

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return [Export(name, export.description or "") for name, export in self._exports.items()]

    def default_export(self, client: Client, readonly: bool) -> str:
        return self._exports[""].name or ""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if export_name not in self._volumes:
            raise OSError(errno.ENOENT, f"there is no export {export_name}")
        self.count(1)
        return self._handle(self, self._exports[export_name], self._volumes[export_name])

    def count(self, change: int) -> None:
        """Count handles."""
        with self._lock:
            self.open_handles += change

    def restore(self, disks: Mapping[str, model.Disk]) -> None:
        """Put this content behind the exports."""
        for name, disk in disks.items():
            if name:
                os.pwrite(self._volumes[name].fd, disk.content, 0)

    def content(self, name: str) -> bytes:
        """Return what is behind an export."""
        volume = self._volumes[name or (self._exports[""].name or "")]
        return os.pread(volume.fd, volume.size, 0)

    def unload(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything."""
        assert not self.open_handles, "each handle is closed once"
        for volume in self._volumes.values():
            os.close(volume.fd)


class _ShelfHandle(Handle):
    def __init__(self, plugin: Shelf, export: model.Export, volume: _Volume) -> None:
        self._plugin = plugin
        self._export = export
        self._volume = volume

    def _has(self, flag: TransmissionFlag) -> bool:
        return flag in self._export.flags

    def get_size(self) -> int:
        return self._export.size

    def can_write(self) -> bool:
        return not self._has(TransmissionFlag.READ_ONLY)

    def can_zero(self) -> Support:
        return Support.NATIVE if self._has(TransmissionFlag.SEND_WRITE_ZEROES) else Support.NONE

    def can_fast_zero(self) -> bool:
        return self._has(TransmissionFlag.SEND_FAST_ZERO)

    def can_trim(self) -> bool:
        return self._has(TransmissionFlag.SEND_TRIM)

    def can_fua(self) -> Support:
        return Support.NATIVE if self._has(TransmissionFlag.SEND_FUA) else Support.NONE

    def can_flush(self) -> bool:
        return self._has(TransmissionFlag.SEND_FLUSH)

    def can_multi_conn(self) -> bool:
        return self._has(TransmissionFlag.CAN_MULTI_CONN)

    def can_cache(self) -> Support:
        return Support.NATIVE if self._has(TransmissionFlag.SEND_CACHE) else Support.NONE

    def block_size(self) -> BlockSize | None:
        sizes = (self._export.minimum, self._export.preferred, self._export.maximum)
        return None if sizes == _ORDINARY else BlockSize(*sizes)

    def export_description(self) -> str | None:
        return self._export.description

    def pread(self, count: int, offset: int) -> bytes:
        self._volume.check(count, offset)
        return os.pread(self._volume.fd, count, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self._volume.check(len(data), offset)
        os.pwrite(self._volume.fd, data, offset)

    def flush(self) -> None:
        """Do nothing: there is nothing more stable."""

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.zero(count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.pwrite(memoryview(bytes(count)), offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self._volume.check(count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterator[Extent]:
        self._volume.check(count, offset)
        end = offset + count
        while offset < end:
            length = min(end, (offset // _BLOCK + 1) * _BLOCK) - offset
            is_zero = not any(os.pread(self._volume.fd, length, offset))
            yield Extent(offset, length, ExtentType.ZERO if is_zero else ExtentType.DATA)
            offset += length

    def close(self) -> None:
        self._plugin.count(-1)


class _InlineHandle(_ShelfHandle):
    inline: ClassVar[frozenset[str]] = frozenset(VERBS)
    sparse = True


class _FileHandle(_ShelfHandle):
    inline: ClassVar[frozenset[str]] = frozenset(VERBS) - {"pread"}
    sparse = True

    def __init__(self, plugin: Shelf, export: model.Export, volume: _Volume) -> None:
        super().__init__(plugin, export, volume)
        self.pread_into = self._read_into
        self.file_range = self._where

    def _read_into(self, buffer: memoryview, offset: int) -> bool:
        self._volume.check(len(buffer), offset)
        return os.preadv(self._volume.fd, [buffer], offset) == len(buffer)

    def _where(self, count: int, offset: int) -> FileRange | None:
        self._volume.check(count, offset)
        return FileRange(self._volume.fd, offset)


_HANDLES: Mapping[Manner, type[_ShelfHandle]] = {
    Manner.INLINE: _InlineHandle,
    Manner.FILE: _FileHandle,
    Manner.WORKERS: _ShelfHandle,
}

"""The overlay that outlives the server: one file with a header, the states of all blocks, and the blocks.

The README of the filter describes the format. What it is made for:

* The process is killed: all that was written is there. A block is written before its entry says so, and both are in
  the hands of the kernel.
* The machine loses power: all that was there at the last flush is there. The kernel may have put an entry on the disk
  before the block that it tells of. Therefore an entry has a second half, which is changed only when the block is on
  stable storage, and the header says during which boot of the machine the first half was written: after another boot
  only the second half counts.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from .overlay import Overlay
from .states import CHUNK, is_entries

__all__ = ["KeptFile", "KeptOverlay"]

_MAGIC = b"NBDPYCOW"
_VERSION = 1
_FIELDS = struct.Struct(">8sIIQ16sHI")  # magic, version, block size, disk size, boot, bytes of the name, checksum
_HEADER = 8192
_MAX_NAME = 4096
_MAX_BLOCK = 1 << 31
_MAX_POSITION = (1 << 63) - 1
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Header(NamedTuple):
    """What a file says of itself."""

    block: int
    size: int  #: of the disk
    boot: bytes  #: 16 bytes; zeroes if it cannot be known
    name: str  #: of the export

    def packed(self) -> bytes:
        """Return it as it stands in the file. All that ever changes lies in the first sector."""
        name = self.name.encode()
        fields = [_MAGIC, _VERSION, self.block, self.size, self.boot, len(name)]
        checksum = zlib.crc32(_FIELDS.pack(*fields, 0) + name)
        return (_FIELDS.pack(*fields, checksum) + name).ljust(_HEADER, b"\0")

    @classmethod
    def unpacked(cls, data: bytes) -> Header:
        """Return what `data`, the beginning of a file, says.

        Raises:
            ValueError: it is not the beginning of such a file.
        """
        if len(data) < _HEADER or not data.startswith(_MAGIC):
            raise ValueError("it is not an overlay")
        _, version, block, size, boot, length, _ = _FIELDS.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"it is an overlay of version {version}, and only version {_VERSION} is known")
        header = cls(block, size, boot, data[_FIELDS.size : _FIELDS.size + length].decode("utf-8", "replace"))
        is_possible = length <= _MAX_NAME and 4096 <= block <= _MAX_BLOCK and not block & (block - 1) and size < 1 << 63
        if not is_possible or header.packed() != data[:_HEADER]:
            raise ValueError("its header is damaged")
        return header

    @property
    def chunks(self) -> int:
        """How many chunks of entries there are."""
        blocks = -(-self.size // self.block)
        return -(-blocks // CHUNK)

    @property
    def position(self) -> int:
        """Where the blocks begin."""
        end = _HEADER + self.chunks * CHUNK
        return -(-end // self.block) * self.block


class KeptFile:
    """The file, which is ours alone until it is closed.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else, or another process has it.
    """

    def __init__(self, path: str) -> None:
        # With O_NONBLOCK, opening what turns out to be a pipe does not wait for its other end.
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o600)
        try:
            self.header = self._examined()
        except BaseException:
            os.close(self.fd)
            raise
        self._path = path

    def _examined(self) -> Header | None:
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("another process has it open") from None
        return Header.unpacked(os.pread(self.fd, _HEADER, 0)) if status.st_size else None

    def overlay(self, name: str, size: int, block: int) -> KeptOverlay:
        """Return what the file keeps of an export, from now on if it is new.

        Args:
            name: Of the export.
            size: Of the disk.
            block: Size of blocks, for a new file.

        Raises:
            OSError: it is of another export, or of a disk of another size; or it cannot be read or written.
        """
        header = self.header or Header(block, size, boot_id(), name)
        if header.position + size > _MAX_POSITION:
            raise OSError(errno.EFBIG, f"cow: a disk of {size} bytes with blocks of {block} does not fit in a file")
        if self.header is None:
            self._begin(header)
        if header.name != name:
            raise OSError(errno.ENOENT, f"cow: the cow-file is of the export {header.name!r} and of no other")
        if header.size != size:
            raise OSError(errno.EINVAL, f"cow: the cow-file is of a disk of {header.size} bytes, not {size}")
        overlay = KeptOverlay(self.fd, header)
        self.header = overlay.load()
        return overlay

    def _begin(self, header: Header) -> None:
        os.pwrite(self.fd, header.packed(), 0)
        os.fsync(self.fd)
        directory = os.open(os.path.dirname(self._path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


class KeptOverlay(Overlay):
    """An overlay in a file that :class:`KeptFile` has opened, and closes."""

    def __init__(self, fd: int, header: Header) -> None:
        super().__init__(header.size, header.block, header.position, self._save)
        self.fd = fd
        self._header = header
        self._lock = threading.Lock()  # held while the file is being flushed
        self._failure = ""

    def _save(self, entries: bytes, block: int) -> None:
        position, view = _HEADER + block, memoryview(entries)
        while view:
            written = os.pwrite(self.fd, view, position)
            if not written:
                raise OSError(errno.EIO, "cow: nothing could be written to the overlay")
            position, view = position + written, view[written:]

    def load(self) -> Header:
        """Read the entries, and return the header as it then is.

        If the machine has been booted since they were written, only what was flushed counts.

        Raises:
            OSError: they are damaged (EIO), or cannot be read or written.
        """
        boot = boot_id()
        undo = boot != self._header.boot or not any(boot)
        for index in self._saved_chunks():
            entries = os.pread(self.fd, CHUNK, _HEADER + index * CHUNK).ljust(CHUNK, b"\0")
            if not is_entries(entries):
                raise OSError(errno.EIO, "cow: the cow-file is damaged")
            self.states.load(index, entries, undo=undo)
        if undo:
            os.fdatasync(self.fd)
            self._header = self._header._replace(boot=boot)
            os.pwrite(self.fd, self._header.packed(), 0)
            os.fdatasync(self.fd)
        return self._header

    def _saved_chunks(self) -> Iterator[int]:
        """Yield those that are not holes of the file."""
        index = 0
        while index < self._header.chunks:
            try:
                data = os.lseek(self.fd, _HEADER + index * CHUNK, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            index = max(index, (data - _HEADER) // CHUNK)
            if index < self._header.chunks:
                yield index
            index += 1

    def flush(self) -> None:
        with self._lock:
            if self._failure:  # the kernel tells of it once, and then takes what is lost for written
                raise OSError(errno.EIO, f"cow: an earlier flush failed ({self._failure}), so writes may be lost")
            begun = self.states.begin_flush()
            try:
                os.fdatasync(self.fd)
                if self.states.end_flush(begun):
                    os.fdatasync(self.fd)
            except OSError as error:
                self._failure = str(error)
                raise

    def close(self) -> None:
        """Leave the file open: it is the one of :class:`KeptFile`."""


def boot_id() -> bytes:
    """Return the number of this boot of the machine, zeroes if there is none."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)

"""Every filter that there is, with parameters by which it does something and loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nbdkitpy import Filter
from nbdkitpy.registry import Kind, Registry
from tests.partitions import LINUX, Entry, mbr_disk

__all__ = ["PARAMETERS", "image", "loaded", "names", "words"]

#: Parameters by the name of the filter, as on the command line; DIR is a directory.
PARAMETERS: Mapping[str, Sequence[str]] = {
    "blocksize": ("minblock=4k", "maxdata=64k", "maxlen=128k"),
    "cow": ("cow-file=DIR/overlay", "cow-block-size=4k"),
    "delay": ("rdelay=1ms", "wdelay=1ms"),
    "error": ("error-rate=1:1000000000",),
    "exitlast": (),
    "fua": ("fua-mode=emulate",),
    "ip": ("allow=any",),
    "limit": ("limit=100",),
    "log": ("logfile=DIR/log",),
    "noextents": (),
    "noparallel": (),
    "nozero": ("zero-mode=emulate",),
    "offset": ("offset=512",),
    "partition": ("partition=1",),
    "rate": ("rate=100G",),
    "readonly": ("readonly-file=DIR/readonly",),
    "retry": ("retries=1", "retry-delay=1ms"),
    "tls-fallback": (),
}


def names() -> list[str]:
    """Return what is installed, and see that none has been forgotten here."""
    found = [offer.name for offer in Registry().names(Kind.FILTER) if offer.distribution == "nbdkitpy"]
    assert found == list(PARAMETERS), "a filter is missing in PARAMETERS, or should not be there"
    return found


def words(name: str, directory: Path) -> list[str]:
    """Return the parameters of a filter; its files are in `directory`."""
    return [word.replace("DIR", str(directory)) for word in PARAMETERS[name]]


def loaded(name: str, directory: Path) -> Filter:
    """Return a filter that has its parameters."""
    made = Registry().filter(name).cls()
    for word in words(name, directory):
        key, _, value = word.partition("=")
        assert made.config(key, value), word
    return made


def image(path: Path, size: int) -> Path:
    """Make a disk, full of bytes that are not zero, with one partition of all that it has but for 1 MiB."""
    start = 2048
    disk = mbr_disk(start, {0: [Entry(LINUX, start, size // 512 - start)]})
    path.write_bytes(bytes(disk) + b"\xa5" * (size - len(disk)))
    return path

"""Every filter that comes with the server, as the command line makes it, before a plugin that can do everything."""

from __future__ import annotations

from pathlib import Path

from nbdkitpy import Client, FileRange, Filter, Handle
from nbdkitpy.registry import Kind, Registry
from tests.partitions import LINUX, Entry, boot_record
from tests.recorder import Recorder, RecorderHandle

#: Parameters with which each filter is tried, in turn; DIRECTORY stands for one of the test's own.
PARAMETERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "blocksize": ((), ("minblock=4k",), ("minblock=64k", "maxdata=64k", "maxlen=1M")),
    "cow": ((), ("cow-block-size=4k", "cow-on-cache=true")),
    "delay": ((), ("delay-fast-zero=false",)),
    "error": (("error-rate=0",),),
    "exitlast": ((),),
    "fua": tuple((f"fuamode={mode}",) for mode in ("none", "emulate", "native", "force", "pass", "discard")),
    "ip": (("allow=all",),),
    "limit": (("limit=3",),),
    "log": (("logfile=DIRECTORY/log",),),
    "noextents": ((),),
    "noparallel": (("serialize=all-requests",),),
    "nozero": (
        (),
        ("zeromode=plugin",),
        ("zeromode=notrim", "fastzeromode=slow"),
        ("zeromode=emulate", "fastzeromode=ignore"),
    ),
    "offset": (("offset=1M",),),
    "partition": (("partition=1",),),
    "rate": (("rate=100G",),),
    "readonly": ((), ("readonly-file=DIRECTORY/none",)),
    "retry": ((),),
    "tls-fallback": ((),),
}

#: Name and parameters of each case, the plugin alone as the first.
CASES = [("", ()), *((name, words) for name, each in PARAMETERS.items() for words in each)]


def case_id(case: tuple[str, tuple[str, ...]]) -> str:
    """Return what a case is called."""
    name, words = case
    return " ".join([name or "plugin", *words])


def make_filters(name: str, words: tuple[str, ...], directory: Path) -> list[Filter]:
    """Return the filter of a case, if there is one, with its parameters."""
    if not name:
        return []
    made = Registry().filter(name).cls()
    for word in words:
        key, _, value = word.replace("DIRECTORY", str(directory)).partition("=")
        assert made.config(key, value), f"{name} does not know {key}"
    return [made]


def installed() -> set[str]:
    """Return the names of the filters that come with the server."""
    return {offer.name for offer in Registry().names(Kind.FILTER) if offer.distribution == "nbdkitpy"}


class Everything(Recorder):
    """Has one partition, from 1 MiB on up to the end, or up to 2 TiB."""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        super().open(export_name, readonly, client)
        return EverythingHandle(self)


class EverythingHandle(RecorderHandle):
    def __init__(self, plugin: Recorder) -> None:
        super().__init__(plugin)
        sectors = min((self._size >> 9) - 2048, (1 << 32) - 1)
        self._table = boot_record([Entry(LINUX, 2048, sectors)])

    def pread(self, count: int, offset: int) -> bytes:
        super().pread(count, offset)
        return self._table[offset : offset + count].ljust(count, b"\0")

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        buffer[:] = self.pread(len(buffer), offset)
        return True

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return None

"""The commands that the documentation shows, and a place to run them in: files as the pages speak of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nbdkitpy_plugins import example1
from tests.documents import MARKDOWN, ROOT, blocks, named

#: Before a block that cannot be run, in its page.
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")

#: What only a shell can do, or a process of its own: clients, redirections, code of strangers.
_MORE = re.compile(r"--run|[<|]|\$\(|\./|\b(eval|python|ones) |:[A-Z]")

#: Directories of the system, which the place has its own of.
_SYSTEM = re.compile(r"(?<![\w.:/])/(?=(?:dev/sdb|etc|fast|home|mnt|run|slow|srv|tmp|var)\b)")

SIZE = 256 << 20

#: What pages call the image of a disk.
_IMAGES = ("disk.img", "fedora.img", "scratch.img", "var/lib/disk.img", "var/lib/images/debian.img", "slow/disk.img")
_MORE_IMAGES = ("mnt/nfs/disk.img", "dev/sdb", "tmp/disk.img", "var/lib/nbdkitpy/disk/disk.img")

_DISK = """
from nbdkitpy import Handle, Parameter, Plugin, parse_size

class DiskHandle(Handle):
    def __init__(self, size): self.size = size
    def get_size(self): return self.size
    def pread(self, count, offset): return bytes(count)

class Disk(Plugin):
    size = Parameter(parse_size, magic=True, required=True)
    def open(self, export_name, readonly, client): return DiskHandle(self.size)
"""

#: Files that pages speak of without showing them.
_SKETCHES = {
    "docs/options.md": {
        "disk.py": _DISK,
        "package/disks.py": _DISK,
        "delays.py": "from nbdkitpy import Filter\nclass Fast(Filter): pass\nclass Slow(Filter): pass\n",
        "script.py": "def open(readonly): pass\ndef get_size(h): return 1\ndef pread(h, count, offset): return b'x'\n",
    },
    "plugins/nbdkitpy_plugins/sh/README.md": {
        "disk.sh": "#!/bin/sh\ncase $1 in get_size) echo 1M;; pread) head -c $3 /dev/zero;; config);; *) exit 2;; esac",
    },
}


class Commands(NamedTuple):
    """A block of commands on a page."""

    page: Path
    line: int  #: the first one, counted from 1
    text: str
    why_not: str  #: it is not run, "" if it is

    def __str__(self) -> str:
        return f"{named(self.page)}:{self.line}"

    @property
    def only_serves(self) -> bool:
        """Whether it is nothing but servers that are started, of what comes with nbdkitpy."""
        return all(line.startswith("nbdkitpy ") for line in self.lines) and not _MORE.search(self.text)

    @property
    def only_makes(self) -> bool:
        """Whether it is about targets of the Makefile, which take minutes."""
        return all(line.startswith("make ") for line in self.lines)

    @property
    def programs(self) -> set[str]:
        """The first words of its lines, but for those of a script within it."""
        return set(re.findall(r"^(?:\w+=\S+ )?([^\s=]+)", "\n".join(self.lines), re.MULTILINE)) - {"EOF"}

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line]


def commands_of(page: Path) -> Iterator[Commands]:
    """Yield the blocks of commands of a page: those that are indented."""
    lines = page.read_text().splitlines()
    is_fenced, heading, why_not = False, "", ""
    block: list[str] = []
    for number, line in enumerate([*lines, "end"], start=1):
        is_fenced ^= line.startswith("```")
        if line.startswith("    ") and not is_fenced:
            block.append(line[4:])
        elif line and block:
            text = "\n".join(block).rstrip()
            yield Commands(page, number - len(block), text, "a form" if heading == "Synopsis" else why_not)
            block, why_not = [], ""
        elif block:
            block.append("")
        heading = line[3:] if line.startswith("## ") else heading
        if line and not block:
            marked = _NOT_RUN.fullmatch(line)
            why_not = marked[1] if marked else ""


COMMANDS = [each for page in MARKDOWN for each in commands_of(page)]


def commands_that_are_run(*, only_serve: bool) -> list[Commands]:
    found = [each for each in COMMANDS if not each.why_not and not each.only_makes]
    return [each for each in found if each.only_serves == only_serve]


def make_place(root: Path, page: Path) -> None:
    """Make the files in `root` that the commands of `page` are about."""
    for name in (*_IMAGES, *_MORE_IMAGES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as image:
            image.write(_image())
            image.truncate(SIZE)
    for name in ("run/user/1000", "fast", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    files = {**shown_files(page), **_SKETCHES.get(named(page), {})}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(in_place(text, root))
        path.chmod(0o755)


def _image() -> bytes:
    """Return the first block of a disk with two partitions."""
    table = bytearray(example1.BLOCKS[0])
    first, second = slice(446, 462), slice(462, 478)
    table[second] = table[first]
    table[first.stop - 4 : first.stop] = (2048).to_bytes(4, "little")  # blocks
    table[second.stop - 8 : second.stop] = (4096).to_bytes(4, "little") + (2048).to_bytes(4, "little")
    return bytes(table)


def tables_of(page: Path) -> list[str]:
    """Return the configuration files that a page shows, but for those with NAME in place of a name."""
    return [text for text in blocks(page, "toml") if "[plugin]" in text and '"NAME"' not in text]


def shown_files(page: Path) -> dict[str, str]:
    """Return the files that pages show, by name; if two do, that of `page`."""
    found = {name: text for text in tables_of(page)[:1] for name in ("disk.toml", "etc/nbdkitpy/disk.toml")}
    for each in (*MARKDOWN, page):
        text = each.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            names = re.findall(r"`([\w-]+\.py)`", text[: block.start()].rpartition("\n#")[2])
            found.update(dict.fromkeys(names[-1:], block[1]))
    (found["ones.py"],) = blocks(ROOT / "README.md", "python")
    return found


def in_place(text: str, root: Path) -> str:
    """Return commands with the directories of the system in `root`."""
    return _SYSTEM.sub(f"{root}/", text)

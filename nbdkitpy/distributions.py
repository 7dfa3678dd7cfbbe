"""Reads what installed distributions say of themselves, as importlib.metadata does, but fast.

That module imports parsers of mail, CSV and zip files before it looks at anything: a fifth of the time in which we
start, while a client may be waiting. All that it would do for us nearly always is to look into the directories of
``sys.path`` for directories of a certain name, and to read two short files there; so we do that ourselves. As soon as
there is anything else where distributions may be found, all is left to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import TypeAlias

__all__ = ["ReadText", "distributions", "entry_points", "name_and_version"]

#: Returns the text of one of a distribution's files of metadata; None, or "", if it has no such file.
ReadText: TypeAlias = "Callable[[str], str | None]"

_FIELD = re.compile(r"^(name|version):[ \t]*(.*?)[ \t]*$", re.ASCII | re.IGNORECASE | re.MULTILINE)


def distributions() -> Iterator[ReadText]:
    """Yield each distribution that is installed, in the order of ``sys.path``, as the function that reads its files."""
    if _only_directories():
        for directory in sys.path:
            yield from _in_directory(directory or ".")
    else:
        from importlib import metadata

        yield from (distribution.read_text for distribution in metadata.distributions())


def entry_points(text: str, group: str) -> Iterator[tuple[str, str]]:
    """Yield name and value of each entry point of `group` in `text`, which is that of an ``entry_points.txt``.

    Raises:
        ValueError: a line of the group is not one of an entry point.
    """
    section = ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line.strip("[]")
        elif line and not line.startswith("#") and section == group:
            name, equals, value = line.partition("=")
            if not equals:
                raise ValueError(f"{line!r} is no entry point")
            yield name.strip(), value.strip()


def name_and_version(read_text: ReadText) -> tuple[str, str]:
    """Return name and version of a distribution.

    Raises:
        ValueError: it does not say.
    """
    text = read_text("METADATA") or read_text("PKG-INFO") or ""
    fields = {field.lower(): value for field, value in reversed(_FIELD.findall(text.partition("\n\n")[0]))}
    try:
        return fields["name"], fields["version"]
    except KeyError as error:
        raise ValueError(f"there is no {error} in the metadata") from None


def _only_directories() -> bool:
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_distributions")]
    # A file is an archive, most likely; and in a directory.egg the metadata has another place.
    places = map(os.fspath, sys.path)
    return finders == [PathFinder] and not any(os.path.isfile(it) or it.lower().endswith(".egg") for it in places)


def _in_directory(directory: str) -> Iterator[ReadText]:
    names: list[str] = []
    with contextlib.suppress(OSError):  # it need not be there
        names = os.listdir(directory)
    for name in names:
        if name.lower().endswith((".dist-info", ".egg-info")):
            yield _reader(os.path.join(directory, name))


def _reader(directory: str) -> ReadText:
    def read_text(name: str) -> str | None:
        try:
            with open(os.path.join(directory, name), encoding="utf-8") as stream:
                return stream.read()
        except OSError:
            return None

    return read_text

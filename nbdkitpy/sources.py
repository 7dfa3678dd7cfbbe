"""Tells which files the code of units is read from, as it is read: what ``--reload`` has to keep an eye on."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from nbdkitpy.modules import Location

__all__ = ["Sources"]


class Sources:
    """The files of some units: those that are named, and those of modules that are imported from beside them.

    Args:
        tell: Called with the path of each file before it is read; also with that of one which is not there, and would
            be read if it were.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._directories: set[str] = set()
        self._packages: set[str] = set()  # names of modules on the top level
        self.is_empty = True

    def add(self, location: Location) -> None:
        """Add a unit, before it is loaded."""
        if location.path:
            self.add_file(location.path)
        else:
            self._packages.add(location.module.partition(".")[0])

    def add_file(self, path: str) -> None:
        """Add a file that is read by other means than importing, before that is done."""
        self._directories.add(os.path.dirname(os.path.realpath(path)))
        self._found(path)

    def watch_imports(self) -> None:
        """From now on tell of what is imported, in this process and those that it forks."""
        importlib.invalidate_caches()  # they are told from the state of the disk by its clock only
        sys.dont_write_bytecode = True  # and compiled code by the second
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Have the other finders look for a module, as the import system asks for it."""
        finders = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in finders)
        spec = next((spec for spec in found if spec is not None), None)
        for file in self._files(name, path, spec):
            self._found(file)
        return spec

    def _files(self, name: str, path: Sequence[str] | None, spec: ModuleSpec | None) -> Iterator[str]:
        """The files of a module, if it is one of the units' own; if there is none, those that it might have."""
        top, _, rest = name.partition(".")
        if not rest and spec is not None and self._lies_beside(spec):
            self._packages.add(top)
        if spec is not None:
            if top in self._packages and spec.has_location and spec.origin:
                yield spec.origin
        elif not rest or top in self._packages:
            last = name.rpartition(".")[2]
            for directory in path or self._directories:
                yield os.path.join(directory, f"{last}.py")
                yield os.path.join(directory, last, "__init__.py")

    def _lies_beside(self, spec: ModuleSpec) -> bool:
        place = next(iter(spec.submodule_search_locations or [spec.origin or ""]))
        return os.path.dirname(os.path.realpath(place)) in self._directories

    def _found(self, path: str) -> None:
        self.is_empty = False
        self._tell(path)

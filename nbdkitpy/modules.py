"""Units that are named by where their code is, not by a name of their own: a file by its path, a class by its module.

``./disk.py`` and ``./disk.py:Disk`` are read from that file. ``package.module:Disk`` is imported as any module is, from
what is installed; the current directory is no part of that, so that nobody chooses our code by leaving a file there.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import re
import stat
import sys
import traceback
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import NamedTuple

from nbdkitpy.exceptions import UnitError

__all__ = ["Location", "flaw", "load", "parse", "what_went_wrong"]

_IDENTIFIER = r"[^\W\d]\w*"
_FILE = re.compile(rf"(.*\.py):({_IDENTIFIER})", re.DOTALL)
_OBJECT = re.compile(rf"({_IDENTIFIER}(?:\.{_IDENTIFIER})*):({_IDENTIFIER})")

_SUFFIX = ".py"


class Location(NamedTuple):
    """Where the code of a unit is: in a file, or in a module."""

    path: str  #: absolute, of the file; "" if it is a module
    module: str  #: its full name; "" if it is a file
    cls: str  #: name of the class; "" for a file that has one only

    def __str__(self) -> str:
        """The same, wherever it is said."""
        return (self.path or self.module) + (f":{self.cls}" if self.cls else "")

    @property
    def directory(self) -> str:
        """The directory of the file, from which it may import too."""
        return os.path.dirname(os.path.realpath(self.path))


def parse(word: str) -> Location | None:
    """Return what `word` refers to; None if it is neither a path nor a module and a class.

    It is a path if there is a slash in it, or if it ends with ``.py``.
    """
    match = _FILE.fullmatch(word)
    if match or "/" in word or word.endswith(_SUFFIX):
        path, cls = match.groups() if match else (word, "")
        return Location(os.path.join(os.getcwd(), re.sub(r"^(\./+)+", "", path)), "", cls)
    match = _OBJECT.fullmatch(word)
    return Location("", *match.groups()) if match else None


def load(location: Location) -> ModuleType:
    """Import the module of a location.

    Raises:
        UnitError: there is no such module.
        Exception: whatever its code raises; :func:`what_went_wrong` describes it.
    """
    return _import_module(location.module) if location.module else _load_file(location)


def flaw(location: Location) -> str:
    """Return why the file of a location cannot be one of Python; "" if it can, or there is none."""
    if not location.path:
        return ""
    try:
        mode = os.stat(location.path).st_mode
    except (OSError, ValueError) as error:  # ValueError: there is NUL in it
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISREG(mode) and location.path.endswith(_SUFFIX):
        return ""
    return "it is a directory" if stat.S_ISDIR(mode) else "it is no Python file, whose name would end with .py"


def what_went_wrong(error: BaseException, location: Location) -> str:
    """Return a line about what importing the module raised: where in its own code, and what."""
    text = " ".join(traceback.format_exception_only(type(error), error)[-1].split())
    place = _place(error, location)
    return f"{place}: {text}" if place else text


# --- modules ---


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, but something that it imports is not
        raise UnitError(
            f"there is no module {error.name!r} where Python looks for what is installed, to which the current"
            f" directory does not belong; a file is given by its path: ./{name.replace('.', '/')}.py"
        ) from None


# --- files ---


def _load_file(location: Location) -> ModuleType:
    path = location.path
    name = next(name for name in _names(path) if _is_free(name, path))
    if name in sys.modules:  # the same file has been named twice, or imported by another one
        return sys.modules[name]
    # At the end: what lies beside the file shall not take the place of a module that is imported later on.
    if location.directory not in sys.path:
        sys.path.append(location.directory)
    loader = SourceFileLoader(name, path)
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None, "it is there whenever the loader is"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        # Always from the source: compiled code is told from older one by the second only.
        exec(loader.source_to_code(loader.get_data(path), path), vars(module))  # noqa: S102  # as import does
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _names(path: str) -> Iterator[str]:
    """What the module of a file may be called: as the file, or if that is another module's name, as the whole path."""
    stem = os.path.basename(path).removesuffix(_SUFFIX)
    if stem.isidentifier():
        yield stem
    whole = re.sub(r"\W", "_", os.path.realpath(path))
    yield from (whole + "_" * count for count in itertools.count())


def _is_free(name: str, path: str) -> bool:
    """Tell whether no other file has, or would have, the module of this name."""
    if name in sys.modules:
        return _is_same(getattr(sys.modules[name], "__file__", None), path)
    spec = importlib.util.find_spec(name)
    return spec is None or _is_same(spec.origin, path)


def _is_same(file: str | None, path: str) -> bool:
    return file is not None and os.path.realpath(file) == os.path.realpath(path)


# --- errors ---


def _place(error: BaseException, location: Location) -> str:
    """The last line of the unit's own code that `error` has passed, or the one that is no Python."""
    if isinstance(error, SyntaxError) and error.filename and os.path.isfile(error.filename):
        return f"{error.filename}:{error.lineno}"
    own = _own_code(location)
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        file = frame.f_code.co_filename
        if f"{os.path.realpath(file)}/".startswith(f"{own}/"):
            return f"{file}:{line}"
    return ""


def _own_code(location: Location) -> str:
    """The directory or file in which the unit's own code is."""
    if location.path:
        return location.directory
    spec = importlib.util.find_spec(location.module.partition(".")[0])
    assert spec is not None, "what could not be found at all is reported otherwise"
    return os.path.realpath(next(iter(spec.submodule_search_locations or [spec.origin or ""])))

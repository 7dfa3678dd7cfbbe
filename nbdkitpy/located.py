"""Finds the class of a plugin or filter that is asked for by where its code is, not by a name of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Generic, NoReturn, TypeGuard, TypeVar

from nbdkitpy import modules
from nbdkitpy.backend import Backend, Filter, Plugin
from nbdkitpy.exceptions import UnitError

__all__ = ["find"]

_logger = logging.getLogger("nbdkitpy")

_NAME = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

#: What a script for the plugin python has to define.
_SCRIPT_FUNCTIONS = ("open", "get_size", "pread")

B = TypeVar("B", bound=Backend)


def find(base: type[B], word: str, registered: Callable[[ModuleType], Sequence[object]]) -> tuple[type[B], ModuleType]:
    """Return the class of the unit that `word` refers to, and its module.

    Args:
        base: Plugin or Filter.
        word: A path, perhaps with a class, or a module with one.
        registered: Returns what the hook of a module hands over; nothing if it has none.

    Raises:
        UnitError: there is no such unit, or more than one; the text says what might be meant.
    """
    kind = _kind(base)
    location = modules.parse(word)
    if location is None:
        raise UnitError(
            f"what is neither a path, with a slash in it or .py at its end, nor package.module:Class has to be a name;"
            f" the name of a {kind} has letters, digits, - and _ only, not {word!r}"
        )
    search = _Search(base, word, location)
    module = search.load()
    return search.named(search.choose(module, registered)), module


class _Search(Generic[B]):
    def __init__(self, base: type[B], word: str, location: modules.Location) -> None:
        self._base = base
        self._word = word
        self._location = location
        self._what = f"{_kind(base)} {word}"

    def load(self) -> ModuleType:
        flaw = modules.flaw(self._location)
        if flaw:
            hint = _meant(self._word) if issubclass(self._base, Plugin) else ""
            raise UnitError(f"{self._what}: {flaw}{hint}")
        try:
            return modules.load(self._location)
        except UnitError as error:
            raise UnitError(f"{self._what}: {error}") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a unit's may be anything
            self._has_failed(error)

    def choose(self, module: ModuleType, registered: Callable[[ModuleType], Sequence[object]]) -> type[B]:
        """Return the class that was named, else the only one that the module registers, or else defines."""
        if self._location.cls:
            return self._of_name(module, self._location.cls)
        try:
            handed_over = [*dict.fromkeys(registered(module))]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a unit's may be anything
            self._has_failed(error)
        return self._only(module, handed_over or _defined(self._base, module))

    def named(self, cls: type[B]) -> type[B]:
        """Return `cls` with a name: its own, or else that by which Python knows it."""
        cls.name = cls.name or cls.__name__.lower()
        if _NAME.fullmatch(cls.name) is None:
            raise UnitError(f"{self._what}: its name must have letters, digits, - and _ only, not {cls.name!r}")
        return cls

    def _of_name(self, module: ModuleType, name: str) -> type[B]:
        found = getattr(module, name, None)
        if _is_unit(found, self._base) and found is not self._base:
            return found
        if found is None:
            raise UnitError(f"{self._what}: there is no {name} in it{self._instead(module)}")
        raise UnitError(f"{self._what} is not a subclass of nbdkitpy.{self._base.__name__}{self._instead(module)}")

    def _only(self, module: ModuleType, candidates: Sequence[object]) -> type[B]:
        classes: list[type[B]] = []
        for candidate in candidates:
            if not _is_unit(candidate, self._base):
                raise UnitError(
                    f"{self._what} registers {candidate!r}, which is not a subclass of nbdkitpy.{self._base.__name__}"
                )
            classes.append(candidate)
        if len(classes) > 1:
            words = " or ".join(f"{self._word}:{cls.__name__}" for cls in classes)
            raise UnitError(f"{self._what}: there are several in it: say {words}")
        if not classes:
            hint = self._script_hint() if _is_script(module) else self._instead(module)
            raise UnitError(f"{self._what} defines no subclass of nbdkitpy.{self._base.__name__}{hint}")
        return classes[0]

    def _has_failed(self, error: BaseException) -> NoReturn:
        _logger.debug("%s cannot be loaded", self._what, exc_info=error)
        cause = modules.what_went_wrong(error, self._location)
        is_script = isinstance(error, ModuleNotFoundError) and error.name == "nbdkit"
        hint = self._script_hint() if is_script else ""
        raise UnitError(f"{self._what} cannot be loaded: {cause}{hint}") from error

    def _script_hint(self) -> str:
        return f"; a script for nbdkit's plugin python is served by: nbdkitpy python {shlex.quote(self._word)}"

    def _instead(self, module: ModuleType) -> str:
        """What there is in a module in which something was looked for in vain."""
        own = [cls.__name__ for cls in _defined(self._base, module)]
        if own:
            return f"; there is {' and '.join(own)}"
        if issubclass(self._base, Plugin):
            return f", but a filter: --filter={self._word}" if _defined(Filter, module) else ""
        return ", but a plugin, which is given without --filter" if _defined(Plugin, module) else ""


def _kind(base: type[Backend]) -> str:
    return "plugin" if issubclass(base, Plugin) else "filter"


def _is_unit(candidate: object, base: type[B]) -> TypeGuard[type[B]]:
    return isinstance(candidate, type) and issubclass(candidate, base)


def _defined(base: type[B], module: ModuleType) -> list[type[B]]:
    """The classes of that kind that a module defines, and does not keep to itself."""
    public = [value for name, value in vars(module).items() if not name.startswith("_")]
    # Each of them once, though it may have a second name.
    units = dict.fromkeys(value for value in public if _is_unit(value, base))
    return [cls for cls in units if cls.__module__ == module.__name__]


def _meant(path: str) -> str:
    """What may have been meant by the path of what is no Python file."""
    if not os.path.exists(path):
        return ""
    quoted = shlex.quote(path)
    if os.path.isdir(path):
        return f"; to serve the files in it: nbdkitpy file dir={quoted}"
    if path.endswith(".so"):
        return "; of nbdkit's own plugins only those in Python and for the shell can be used"
    if os.path.isfile(path) and os.access(path, os.X_OK):
        return f"; to serve what it says as a script: nbdkitpy {'python' if _names_python(path) else 'sh'} {quoted}"
    return f"; to serve what is in it: nbdkitpy file {quoted}"


def _names_python(path: str) -> bool:
    """Tell whether the first line of a script has it run by Python, or by us."""
    with contextlib.suppress(OSError), open(path, "rb") as stream:
        return re.match(rb"#!.*(python|nbdkitpy)", stream.readline(256)) is not None
    return False


def _is_script(module: ModuleType) -> bool:
    return all(callable(vars(module).get(name)) for name in _SCRIPT_FUNCTIONS)

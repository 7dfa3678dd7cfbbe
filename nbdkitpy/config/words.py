"""The grammar of words: parameters for units on the command line, and debug flags. Pure, but for ``@PATH`` files."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from nbdkitpy.backend import Plugin
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import Parameter, integer

__all__ = [
    "Assignment",
    "DebugFlag",
    "as_text",
    "is_parameter",
    "parse_debug_flag",
    "read_words",
    "split_word",
    "with_keys",
]

#: A parameter: its key, None for a bare word, and its value.
Assignment: TypeAlias = tuple[str | None, str]

_KEY_VALUE = re.compile(r"([A-Za-z][A-Za-z0-9._-]*)=(.*)", re.ASCII | re.DOTALL)

#: Numbers of 64 bits. Python has larger ones, some too large to be written.
_LARGEST = 1 << 64

_C_INT = integer(-(1 << 31), (1 << 31) - 1)

#: What a bare word sets if it comes first and the plugin has no magic parameter.
_SCRIPT = "script"


class DebugFlag(NamedTuple):
    """One ``-D UNIT.FLAG=VALUE``."""

    unit: str
    flag: str
    value: int

    def __str__(self) -> str:
        return f"{self.unit}.{self.flag}={self.value}"


def parse_debug_flag(text: str) -> DebugFlag:
    """Parse ``NAME.FLAG=N``.

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_.-]+)=(.*)", text, re.ASCII | re.DOTALL)
    if match is None:
        raise ValueError("NAME.FLAG=N, where N is an integer")
    return DebugFlag(match[1], match[2], _C_INT(match[3]))


def split_word(word: str) -> Assignment:
    """Split a word at its first ``=`` if what is before it can be a key; else it is bare."""
    match = _KEY_VALUE.fullmatch(word)
    return (match[1], match[2]) if match else (None, word)


def is_parameter(word: str) -> bool:
    """Tell whether `word` can only be a parameter or a file of them, not the name of a plugin."""
    return split_word(word)[0] is not None or _is_file(word)


def as_text(value: str | int | float) -> str:
    """Return a value as it would stand on the command line.

    Raises:
        ValueError: it is a number of more than 64 bits.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise ValueError("a number of at most 64 bits")
    return str(value)


def read_words(words: Iterable[str]) -> tuple[Assignment, ...]:
    """Split each word, in order; ``@PATH`` stands for the lines of a file, which may do the same.

    As in nbdkit, PATH has a slash in it: ``@name`` is a word like any other.

    Raises:
        ConfigError: a file cannot be read, or includes itself.
    """
    return tuple(_expanded(words, directory="", including=()))


def _expanded(words: Iterable[str], directory: str, including: tuple[str, ...]) -> Iterator[Assignment]:
    for word in words:
        if _is_file(word):
            path = os.path.realpath(os.path.join(directory, word[1:]))
            if path in including:
                raise ConfigError(f"parameter file {path!r} includes itself (by {including[-1]!r})")
            yield from _expanded(_lines(path), os.path.dirname(path), (*including, path))
        else:
            yield split_word(word)


def _is_file(word: str) -> bool:
    return word.startswith("@") and "/" in word


def _lines(path: str) -> list[str]:
    """The lines of a parameter file but for blank ones and comments."""
    try:
        # As the command line is decoded, so that any file name can be said here too.
        with open(path, encoding=sys.getfilesystemencoding(), errors="surrogateescape") as stream:
            lines = [line.lstrip().removesuffix("\n") for line in stream]
    except OSError as error:
        raise ConfigError(f"parameter file {path!r} cannot be read: {error.strerror}") from error
    if any("\0" in line for line in lines):
        raise ConfigError(f"parameter file {path!r} is not a text: it has NUL in it")
    return [line for line in lines if line and not line.startswith("#")]


def with_keys(assignments: Iterable[Assignment], plugin: Plugin) -> Iterator[tuple[str, str]]:
    """Yield each assignment, a bare word with the key that it has for `plugin`.

    The plugin is asked for it when it has been given those before, as one of them may be what decides.

    Raises:
        ConfigError: it has none: the plugin has no magic parameter, and it is not the first, for ``script``.
    """
    for position, (key, value) in enumerate(assignments):
        meant = key or plugin.magic_config_key()
        if meant is None and not position and _SCRIPT in plugin.parameters:
            meant = _SCRIPT
        if meant is None:
            raise ConfigError(_no_key(plugin.name, value, plugin.parameters))
        yield meant, value


def _no_key(plugin: str, word: str, parameters: Mapping[str, Parameter[Any]]) -> str:
    known = ", ".join(f"{key}={parameter.metavar}" for key, parameter in parameters.items())
    return f"{plugin}: {word!r} must be KEY=VALUE; parameters: {known or 'none'}"

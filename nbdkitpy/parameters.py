"""Parameters: declared once by a unit, parsed as nbdkit parses them.

A unit declares a parameter as a class attribute and reads the parsed value as an instance attribute::

    class Memory(Plugin):
        size = Parameter(parse_size, required=True, magic=True, help="Size of the disk.")

    Memory.size      # the declaration
    memory.size      # an int, the number of bytes

The same declaration feeds the command line, ``--help``, shell completion and the documentation.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, Generic, Literal, NoReturn, TypeVar, overload

from nbdkitpy.exceptions import ConfigError

__all__ = [
    "Parameter",
    "Repeated",
    "choice",
    "integer",
    "parse_bool",
    "parse_delay",
    "parse_filename",
    "parse_path",
    "parse_probability",
    "parse_size",
    "parse_string",
    "read_password",
]

T = TypeVar("T")

#: Sizes are signed 64-bit numbers on every system that we run on.
MAX_SIZE = (1 << 63) - 1

#: Times in seconds are at most this, as in nbdkit; much longer ones are more than a thread can wait.
MAX_DELAY = (1 << 31) - 1


class Parameter(Generic[T]):
    """One ``key=value`` of a plugin or filter.

    Args:
        parse: Turns the text into the value; raises ``ValueError("a size such as 512M")``, saying what is right and
            not what was given.
        default: The value if the parameter is not given. Without one, and not `required`, it is None.
        required: The configuration is refused without it.
        magic: Words without ``key=`` on the command line are values of this parameter (plugins only, one at most).
        secret: The value is never shown: not in messages, not in dumps.
        live: A new value may be set while clients are served; see :meth:`Backend.reload`.
        key: The name on the command line, if it is not the attribute's with ``-`` for ``_``.
        aliases: Other names of it, which are taken too.
        metavar: How ``--help`` calls the value; by default after the parser: ``parse_size`` gives ``SIZE``.
        help: One sentence for ``--help`` and the documentation.
    """

    repeated = False

    # The three forms differ in the type of the value only: required, with a default, or None unless given.
    @overload
    def __init__(
        self: Parameter[T],
        parse: Callable[[str], T],
        *,
        required: Literal[True],
        magic: bool = False,
        secret: bool = False,
        live: bool = False,
        key: str = "",
        aliases: Iterable[str] = (),
        metavar: str = "",
        help: str = "",
    ) -> None: ...
    @overload
    def __init__(
        self: Parameter[T],
        parse: Callable[[str], T],
        *,
        default: T,
        required: bool = False,
        magic: bool = False,
        secret: bool = False,
        live: bool = False,
        key: str = "",
        aliases: Iterable[str] = (),
        metavar: str = "",
        help: str = "",
    ) -> None: ...
    @overload
    def __init__(
        self: Parameter[T | None],
        parse: Callable[[str], T],
        *,
        magic: bool = False,
        secret: bool = False,
        live: bool = False,
        key: str = "",
        aliases: Iterable[str] = (),
        metavar: str = "",
        help: str = "",
    ) -> None: ...
    def __init__(
        self,
        parse: Callable[[str], Any],
        *,
        default: Any = None,
        required: bool = False,
        magic: bool = False,
        secret: bool = False,
        live: bool = False,
        key: str = "",
        aliases: Iterable[str] = (),
        metavar: str = "",
        help: str = "",
    ) -> None:
        self.parse = parse
        self.default = default
        self.required = required
        self.magic = magic
        self.secret = secret
        self.live = live
        self.key = key
        self.aliases = tuple(aliases)
        self.metavar = metavar or _metavar(parse)
        self.help = help
        self.attribute = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.attribute = name
        self.key = self.key or name.strip("_").replace("_", "-")

    @overload
    def __get__(self, instance: None, owner: type) -> Parameter[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        # Reached only until a value is set: the instance's own attribute then hides this (non-data) descriptor.
        return self if instance is None else self.default

    def accept(self, unit: Any, text: str) -> None:
        """Parse `text` and make it the value that `unit` has; a later one replaces an earlier one.

        Raises:
            ConfigError: the text is not a value of this parameter.
        """
        unit.__dict__[self.attribute] = self._parsed(unit, text)

    def is_set(self, unit: Any) -> bool:
        """Tell whether `unit` was given a value (a default does not count)."""
        return self.attribute in unit.__dict__

    def read(self, unit: Any, texts: Iterable[str]) -> Any:
        """Return the value that `unit` would have if it were given `texts`, and nothing before; set nothing.

        Raises:
            ConfigError: one of them is not a value of this parameter, or there is none and it is required.
        """
        value = self.default
        given = False
        for text in texts:
            value, given = self._joined(value, self._parsed(unit, text)), True
        if self.required and not given:
            raise ConfigError(self.missing(unit))
        return value

    def missing(self, unit: Any) -> str:
        """Return the error that this required parameter was not given."""
        return f"{unit.name}: {self.key}={self.metavar} is missing: {self.help}".rstrip(": ")

    def _joined(self, before: Any, value: Any) -> Any:
        return value

    def _parsed(self, unit: Any, text: str) -> Any:
        try:
            return self.parse(text)
        except ConfigError:
            raise
        except ValueError as error:
            shown = "what was given" if self.secret else _quoted(text)
            raise ConfigError(f"{unit.name}: {self.key} must be {error}, not {shown}") from None


class Repeated(Parameter[tuple[T, ...]]):
    """A parameter that may be given several times; its value is the tuple of all, empty if there is none."""

    repeated = True

    def __init__(
        self,
        parse: Callable[[str], T],
        *,
        required: bool = False,
        magic: bool = False,
        live: bool = False,
        key: str = "",
        aliases: Iterable[str] = (),
        metavar: str = "",
        help: str = "",
    ) -> None:
        super().__init__(
            lambda text: (parse(text),),
            default=(),
            required=required,
            magic=magic,
            live=live,
            key=key,
            aliases=aliases,
            metavar=metavar or _metavar(parse),
            help=help,
        )

    def accept(self, unit: Any, text: str) -> None:
        """Parse `text` and add it to the values that `unit` has."""
        unit.__dict__[self.attribute] = self._joined(unit.__dict__.get(self.attribute, ()), self._parsed(unit, text))

    def _joined(self, before: Any, value: Any) -> Any:
        return before + value


def _metavar(parse: Callable[[str], object]) -> str:
    name = getattr(parse, "__name__", "value").removeprefix("parse_").removeprefix("read_")
    return "VALUE" if name == "<lambda>" else name.upper()


def _quoted(text: str) -> str:
    """`text` between double quotes, cut to a line's worth and with nothing in it that a terminal would act on."""
    shown = text if len(text) <= 80 else text[:80] + "…"
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) + '"'


# --- the syntaxes of nbdkit's own parsing functions -----------------------------------------------------------------

# Compiled when they are first used, as all of it together takes a millisecond and a start needs one of them or none.
_SIZE = r"([0-9]{1,19})([bskmgtpe]?)"
_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "s": 512,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "p": 1 << 50,
    "e": 1 << 60,
}
_INTEGER = r"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9a-fA-F]{1,40})|0([0-7]{0,40})|([1-9][0-9]{0,40}))"
_NUMBER = r"[+]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})(?:[eE][+-]?[0-9]{1,3})?"
_DELAY_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "μs": 1e-6, "µs": 1e-6, "ns": 1e-9}
_TRUE = frozenset({"1", "true", "t", "yes", "y", "on"})
_FALSE = frozenset({"0", "false", "f", "no", "n", "off"})


def parse_string(text: str) -> str:
    """Take any text as it is."""
    return text


def parse_size(text: str) -> int:
    """Return a size in bytes: a decimal number and one suffix of ``b s k m g t p e`` (``s`` is 512), in either case.

    Raises:
        ValueError: anything else, a fraction, a sign, or more than 2**63 - 1 bytes.
    """
    match = re.fullmatch(_SIZE, text, re.ASCII | re.IGNORECASE)
    if match is None:
        raise ValueError("a size such as 512, 10M or 1G")
    size = int(match[1]) * _SIZE_UNITS[match[2].lower()]
    if size > MAX_SIZE:
        raise ValueError("a size of at most 2**63 - 1 bytes")
    return size


def parse_bool(text: str) -> bool:
    """Return a truth value: ``1 true t yes y on`` or ``0 false f no n off``, in either case."""
    word = text.lower()
    if word not in _TRUE and word not in _FALSE:
        raise ValueError("true or false (1, yes, on; 0, no, off)")
    return word in _TRUE


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a parser of integers from `minimum` to `maximum`, both included: decimal, ``0x`` or leading-zero octal."""

    def parse_integer(text: str) -> int:
        match = re.fullmatch(_INTEGER, text, re.ASCII)
        if match is None or (match[1] == "-" and minimum >= 0):
            raise ValueError(f"an integer from {minimum} to {maximum}")
        value = int(match[2], 16) if match[2] else int(match[4]) if match[4] else int(match[3] or "0", 8)
        value = -value if match[1] == "-" else value
        if not minimum <= value <= maximum:
            raise ValueError(f"an integer from {minimum} to {maximum}")
        return value

    return parse_integer


def choice(*words: str) -> Callable[[str], str]:
    """Return a parser that takes one of `words`, exactly."""

    def parse_choice(text: str) -> str:
        if text not in words:
            raise ValueError("one of " + ", ".join(words))
        return text

    parse_choice.words = words  # type: ignore[attr-defined]  # shell completion offers them
    return parse_choice


def parse_probability(text: str) -> float:
    """Return a probability: ``0.1``, ``1e-1``, ``10%``, ``1:10`` or ``1/10``; it may exceed 1 (``200%`` is 2.0).

    Raises:
        ValueError: a negative number, something that is no number, or a division by zero other than 0/0, which is 0.
    """
    wanted = "a probability such as 0.1, 10%, 1:10 or 1/10"
    numerator, divisor, denominator = text, 1.0, ""
    if text.endswith("%"):
        numerator, divisor = text[:-1], 100.0
    else:
        for separator in ":/":
            if separator in text:
                numerator, _, denominator = text.partition(separator)
                divisor = _number(denominator, wanted)
                break
    value = _number(numerator, wanted)
    if divisor == 0:
        if value == 0:
            return 0.0
        raise ValueError(wanted)
    value /= divisor
    if not math.isfinite(value):
        raise ValueError(wanted)
    return value


def parse_delay(text: str) -> float:
    """Return a time in seconds: a number, or one with ``s``, ``ms``, ``us`` (or ``μs``) or ``ns``.

    Raises:
        ValueError: anything else, a negative number, or more than 2**31 - 1 seconds.
    """
    wanted = "a time such as 2, 1.5s, 100ms, 20us or 5ns"
    number = text.rstrip("smunμµ")
    unit = text[len(number) :]
    if unit not in _DELAY_UNITS:
        raise ValueError(wanted)
    delay = _number(number, wanted) * _DELAY_UNITS[unit]
    if delay > MAX_DELAY:
        raise ValueError("a time of at most 2**31 - 1 seconds")
    return delay


def _number(text: str, wanted: str) -> float:
    if re.fullmatch(_NUMBER, text, re.ASCII) is None:
        raise ValueError(wanted)
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(wanted)
    return value


def parse_path(text: str) -> str:
    """Return the absolute path, the current directory put before a relative one; it need not exist.

    Nothing else is done to it: ``link/../disk`` is not ``disk`` if ``link`` is a symbolic link.
    """
    _check_path(text)
    return os.path.join(os.getcwd(), text)


def parse_filename(text: str) -> str:
    """Return the real path, symbolic links resolved, of a file or directory that must exist."""
    _check_path(text)
    try:
        return os.path.realpath(text, strict=True)
    except OSError as error:
        raise ValueError(f"the path of something that exists ({error.strerror})") from None


def _check_path(text: str) -> None:
    if not text or "\0" in text:
        raise ValueError("a path")


def read_password(text: str) -> str:
    """Return a password: the text itself, ``+FILE`` (its first line), ``-FD`` (one line of it), ``-`` (asked for).

    A descriptor is closed after reading; 0, 1 and 2 are not taken. ``-`` needs a terminal. A password that begins
    with ``-`` or ``+`` must come from a file.

    Raises:
        ValueError: the file or descriptor cannot be read, or there is no terminal to ask on. The text never says
            what was given.
    """
    if text == "-":
        if not sys.stdin.isatty():
            _no_password("- needs a terminal on standard input")
        return _asked_for()
    if text.startswith("-"):
        if re.fullmatch(r"-[0-9]{1,9}", text, re.ASCII) is None or int(text[1:]) <= 2:
            _no_password("-FD needs a descriptor above 2")
        return _first_line(int(text[1:]))
    if text.startswith("+"):
        return _first_line(text[1:])
    return text


def _asked_for() -> str:
    import getpass  # only for those who type one

    try:
        return getpass.getpass("password: ")
    except EOFError:
        _no_password("nothing was typed")


def _first_line(source: str | int) -> str:
    try:
        with open(source, encoding="utf-8", newline="\n") as stream:
            return stream.readline().removesuffix("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        _no_password(getattr(error, "strerror", None) or "it is not text in UTF-8")


def _no_password(why: str) -> NoReturn:
    raise ValueError(f"a password, +FILE, -FD or - ({why})") from None

"""Parameters of units: what a file gives to each layer, and how that goes together with the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from nbdkitpy.backend import Backend
from nbdkitpy.config.words import Assignment, with_keys
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import read_password
from nbdkitpy.protocol.errors import printable
from nbdkitpy.stack import Stack

__all__ = [
    "Configured",
    "Given",
    "Reference",
    "UnitTable",
    "configure",
    "nearest",
    "read_texts",
    "tables_of",
    "unknown",
]

#: Where the service manager puts what LoadCredential= names.
_CREDENTIALS = "CREDENTIALS_DIRECTORY"


class Reference(NamedTuple):
    """A value that stands in a file of its own: on its first line."""

    kind: str  #: "file", or "credential" for one of the service manager's
    name: str  #: an absolute path, or the credential's name

    @property
    def path(self) -> str:
        """The path of the file.

        Raises:
            ConfigError: it is a credential, and the service manager has said nothing of any.
        """
        if self.kind == "file":
            return self.name
        directory = os.environ.get(_CREDENTIALS)
        if not directory:
            raise ConfigError(f"credential {self.name!r}: there is no ${_CREDENTIALS}, which LoadCredential= would set")
        return os.path.join(directory, self.name)


class Given(NamedTuple):
    """All values that a unit is given for one parameter, in order."""

    values: tuple[str | Reference, ...]
    is_array: bool = False


class UnitTable(NamedTuple):
    """What a file says of one layer."""

    name: str
    where: str  #: for messages: the file and the table
    parameters: Mapping[str, Given] = MappingProxyType({})


#: A parameter of one layer. Of two layers of one kind each has its own.
Place: TypeAlias = "tuple[Backend, str]"


class Configured(NamedTuple):
    """What the layers of a stack have been given."""

    given: Mapping[Place, Given]
    by_command_line: frozenset[Place]


def configure(stack: Stack, assignments: Iterable[Assignment], tables: Sequence[UnitTable] = ()) -> Configured:
    """Give parameters to the layers of `stack`, and return what each of them got.

    Args:
        stack: Loaded; nothing has been given to it.
        assignments: Of the command line: each goes to the outermost layer that takes it.
        tables: Of a file: of the innermost layers, the plugin's last. Each goes to its layer only, and not where the
            command line has given that layer the same parameter.

    Raises:
        ConfigError: a value is wrong, or nobody takes the parameter.
    """
    given: dict[Place, Given] = {}
    for key, value in with_keys(assignments, stack.plugin):
        layer = stack.config(key, value)
        place = layer, layer.canonical_key(key)
        before = given.get(place, Given(()))
        given[place] = Given((*before.values, value), is_array=bool(before.values))
    by_command_line = frozenset(given)
    for layer, table in tables_of(stack, tables):
        for key, values in table.parameters.items():
            if (layer, key) not in by_command_line:
                _give(layer, key, table)
                given[layer, key] = values
    return Configured(given, by_command_line)


def tables_of(stack: Stack, tables: Sequence[UnitTable]) -> Iterator[tuple[Backend, UnitTable]]:
    """Yield each layer that has a table with it, outermost first. Aliases in it are replaced by the keys.

    Raises:
        ConfigError: a table gives one parameter by two names.
    """
    for layer, table in zip(stack.layers[len(stack.layers) - len(tables) :], tables):
        yield layer, _without_aliases(layer, table)


def _without_aliases(layer: Backend, table: UnitTable) -> UnitTable:
    parameters: dict[str, Given] = {}
    for name, given in table.parameters.items():
        key = layer.canonical_key(name)
        if key in parameters:
            raise ConfigError(f"{table.where}: {key} is given twice, by different names")
        parameters[key] = given
    return table._replace(parameters=parameters)


def _give(layer: Backend, key: str, table: UnitTable) -> None:
    texts = read_texts(layer, key, table)
    if not texts and key not in layer.parameters:  # an empty array: nothing would be asked
        raise unknown(layer, key, table)
    for text in texts:
        try:
            taken = layer.config(key, text)
        except ConfigError as error:
            raise ConfigError(f"{table.where}: {error}") from error
        if not taken:
            raise unknown(layer, key, table)


def read_texts(layer: Backend, key: str, table: UnitTable) -> tuple[str, ...]:
    """Return what `table` gives to `layer` for a parameter: nothing, if it says nothing of it.

    Raises:
        ConfigError: there are several values for what takes one, or one cannot be read.
    """
    values, is_array = table.parameters.get(key, Given(()))
    parameter = layer.parameters.get(key)
    if is_array and parameter is not None and not parameter.repeated:
        raise ConfigError(f"{table.where}: {key} must be one value, not an array: it cannot be given several times")
    reads_files = parameter is not None and parameter.parse is read_password
    try:
        return tuple(_text(value, reads_files) for value in values)
    except ConfigError as error:
        raise ConfigError(f"{table.where}: {key}: {error}") from error


def _text(value: str | Reference, reads_files: bool) -> str:
    if isinstance(value, str):
        return value
    if reads_files:  # what it reads itself it takes as it is, be its first letter what it may
        return f"+{value.path}"
    try:
        with open(value.path, encoding="utf-8", newline="\n") as stream:
            return stream.readline().removesuffix("\n")
    except OSError as error:
        raise ConfigError(f"{value.path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{value.path} is no text in UTF-8") from None


def unknown(layer: Backend, key: str, table: UnitTable) -> ConfigError:
    """Return the error that `layer` has no parameter of that name."""
    hint = nearest(key, layer.parameters) or "it takes none"
    return ConfigError(f'{table.where}: {layer.name} has no parameter "{printable(key)}": {hint}')


def nearest(word: str, known: Iterable[str]) -> str:
    """Return what may have been meant by `word`, or all there is; "" if there is nothing."""
    import difflib  # only for those who mistype

    words = list(known)
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f'did you mean "{near[0]}"?'
    return "there are " + ", ".join(words) if words else ""

"""The configuration file: TOML, read strictly. Nothing that is not understood is passed over."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from nbdkitpy.config.settings import LISTENING, SETTINGS, Setting
from nbdkitpy.config.units import Given, Reference, UnitTable, nearest
from nbdkitpy.config.words import as_text
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import parse_path
from nbdkitpy.protocol.errors import printable
from nbdkitpy.server.options import AddressFamily, Endpoint, Transport

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Document", "read_file"]

_KINDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "an array",
    dict: "a table",
}

#: What may be a value as it is.
_SCALARS = (str, int, float, bool)

#: Where a value may stand in a file of its own, and how the place is written. Names of credentials are those that the
#: service manager takes.
_REFERENCES = {
    "file": re.compile(r"/[^\0]*", re.DOTALL),
    "credential": re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._@:-]{1,255}", re.ASCII),
}

_LONGEST_ERROR = 1000  # characters

_MAX_PORT = (1 << 16) - 1
_MAX_VSOCK_PORT = (1 << 32) - 1


class Document(NamedTuple):
    """What a configuration file says."""

    path: str
    values: Mapping[str, Any]  #: settings by name, parsed
    listen: tuple[Endpoint, ...]
    filters: tuple[UnitTable, ...]  #: outermost first
    plugin: UnitTable | None
    server: Mapping[str, object]  #: the table [server] as it was written


def read_file(path: str) -> Document:
    """Read a configuration file.

    Args:
        path: Absolute.

    Raises:
        ConfigError: it cannot be read, is no TOML, or says something that is not understood; the text names the file,
            the table and the key.
    """
    top = _Table(path, _parsed(path))
    top.check_keys(("server", "listen", "plugin", "filter"))
    server = top.table("server") or _Table(path, {})
    plugin = top.table("plugin")
    return Document(
        path,
        values=_settings(server),
        listen=tuple(_endpoint(table) for table in top.tables("listen")),
        filters=tuple(_unit(table) for table in top.tables("filter")),
        plugin=None if plugin is None else _unit(plugin),
        server=server.content,
    )


def _parsed(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not TOML: it is no text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


class _Table:
    """A table, and where it is, for messages."""

    def __init__(self, where: str, content: Mapping[str, object]) -> None:
        self.where = where
        self.content = content

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {printable(text, _LONGEST_ERROR)}")  # keys may be any text

    def check_keys(self, known: Iterable[str], hint: Callable[[str], str] = lambda key: "") -> None:
        """Raise ConfigError for a key that is not `known`; `hint` may say more about one."""
        known = tuple(known)
        for key in self.content:
            if key not in known:
                raise self.error(f'there is no key "{key}": {hint(key) or nearest(key, known)}')

    def typed(self, key: str, kinds: Iterable[type]) -> Any:
        """Return the value of `key`, which is there, if it is of one of `kinds`."""
        value = self.content[key]
        if type(value) not in kinds:  # not isinstance, as True is no number here
            raise self.error(f"{key} must be {' or '.join(_KINDS[kind] for kind in kinds)}, not {_kind(value)}")
        return value

    def parsed(self, key: str, kinds: Iterable[type], parse: Callable[[str], Any]) -> Any:
        """Return the value of `key`, which is there, by a parser of texts."""
        return self.parse(key, self.typed(key, kinds), parse)

    def parse(self, key: str, value: object, parse: Callable[[str], Any]) -> Any:
        """Return `value`, of `key`, by a parser of texts."""
        try:
            return parse(self.text(key, value))
        except ValueError as error:
            raise self.error(f"{key} must be {error}, not {value!r}") from None

    def text(self, key: str, value: Any) -> str:
        """Return a scalar as the command line has it."""
        try:
            return as_text(value)
        except ValueError as error:
            raise self.error(f"{key} must be {error}") from None

    def table(self, key: str) -> _Table | None:
        """Return the table [key], if there is one."""
        content = self.content.get(key)
        if content is None:
            return None
        if not isinstance(content, dict):
            raise self.error(f"{key} must be a table, [{key}], not {_kind(content)}")
        return _Table(f"{self.where}: [{key}]", content)

    def tables(self, key: str) -> list[_Table]:
        """Return the tables [[key]]."""
        found = self.content.get(key, [])
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise self.error(f"{key} must be tables [[{key}]], with two brackets, not {_kind(found)}")
        return [_Table(f"{self.where}: [[{key}]] {number}", each) for number, each in enumerate(found, start=1)]


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a date or time")


# --- [server] ---


def _settings(table: _Table) -> dict[str, Any]:
    by_key = {setting.key: setting for setting in SETTINGS if setting.key}
    table.check_keys(by_key, _hint)
    values: dict[str, Any] = {}
    said: dict[str, str] = {}  # by name of the setting, which key has said it
    for key, setting in by_key.items():
        value = _setting(table, setting) if key in table.content else None
        if value is None:
            continue
        if setting.name in values:
            raise table.error(f"{said[setting.name]} and {key} exclude each other")
        values[setting.name], said[setting.name] = value, key
    return values


def _setting(table: _Table, setting: Setting) -> object:
    """The value that the table gives to a setting; None for a switch that is off."""
    key = setting.key
    if setting.is_switch:
        return setting.value if table.typed(key, (bool,)) else None
    if not setting.many:
        return table.parsed(key, setting.kinds, setting.parse)
    elements = table.typed(key, (list,))
    if not all(isinstance(element, str) for element in elements):
        raise table.error(f"{key} must be an array of strings")
    return tuple(table.parse(key, element, setting.parse) for element in elements)


def _hint(key: str) -> str:
    """What is to be done about a key that is an option of the command line, but has another name here, or none."""
    for setting in SETTINGS:
        if f"--{key}" in setting.options:
            if setting.key:
                return f'did you mean "{setting.key}"?'
            return "tables [[listen]] say that" if setting.name in LISTENING else "only the command line has that"
    return ""


# --- [[listen]] ---


def _port(table: _Table, largest: int, kinds: tuple[type, ...]) -> str:
    port = table.typed("port", kinds)
    text = table.text("port", port)  # before it is shown: Python does not make a text of a very large number
    if isinstance(port, int) and not 0 <= port <= largest:
        raise table.error(f"port must be from 0 to {largest}, not {text}")
    return text


def _family(text: str) -> AddressFamily:
    try:
        return AddressFamily(text)
    except ValueError:
        raise ValueError(f"one of {', '.join(family.value for family in AddressFamily)}") from None


#: For each transport its keys, and for each key the field of Endpoint that it sets, and how it is read.
_ENDPOINTS: Mapping[Transport, Mapping[str, tuple[str, Callable[[_Table], Any]]]] = {
    Transport.TCP: {
        "address": ("address", lambda table: table.typed("address", (str,))),
        "port": ("port", lambda table: _port(table, _MAX_PORT, (int, str))),
        "address-family": ("address_family", lambda table: table.parsed("address-family", (str,), _family)),
    },
    Transport.UNIX: {"path": ("unix_path", lambda table: table.parsed("path", (str,), parse_path))},
    Transport.VSOCK: {"port": ("port", lambda table: _port(table, _MAX_VSOCK_PORT, (int,)))},
}


def _endpoint(table: _Table) -> Endpoint:
    if "transport" not in table.content:
        raise table.error("the transport is missing: tcp, unix or vsock")
    transport = table.parsed("transport", (str,), _transport)
    keys = _ENDPOINTS[transport]
    others = {key for each in _ENDPOINTS.values() for key in each}
    own = f"{transport.value} has " + ", ".join(keys)
    table.check_keys(("transport", *keys), lambda key: own if key in others else "")
    fields: dict[str, Any] = {field: read(table) for key, (field, read) in keys.items() if key in table.content}
    return Endpoint(transport, **fields)


def _transport(text: str) -> Transport:
    try:
        return Transport(text)
    except ValueError:
        raise ValueError("tcp, unix or vsock") from None


# --- [plugin] and [[filter]] ---


def _unit(table: _Table) -> UnitTable:
    if "name" not in table.content:
        raise table.error("the name is missing")
    name = table.typed("name", (str,))
    table = _Table(f"{table.where} ({name})", table.content)
    return UnitTable(name, table.where, {key: _given(table, key) for key in table.content if key != "name"})


def _given(table: _Table, key: str) -> Given:
    value = table.content[key]
    if isinstance(value, list):
        return Given(tuple(_value(table, key, each) for each in value), is_array=True)
    return Given((_value(table, key, value),))


def _value(table: _Table, key: str, value: object) -> str | Reference:
    if isinstance(value, dict):
        return _reference(table, key, value)
    if type(value) not in _SCALARS:
        raise table.error(f"{key} must be a string, a number, true or false, not {_kind(value)}")
    return table.text(key, value)


def _reference(table: _Table, key: str, value: Mapping[str, object]) -> Reference:
    wanted = f'{key} must be {{ file = "/PATH" }} or {{ credential = "NAME" }}, if it is a table'
    if len(value) != 1:
        raise table.error(wanted)
    ((kind, name),) = value.items()
    right = _REFERENCES.get(kind)
    if right is None or not isinstance(name, str) or right.fullmatch(name) is None:
        raise table.error(wanted)
    return Reference(kind, name)

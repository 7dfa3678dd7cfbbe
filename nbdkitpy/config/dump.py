"""Writes a configuration as a file that says the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from nbdkitpy import modules
from nbdkitpy.config.settings import SETTINGS, ServerConfig, Setting, value_in
from nbdkitpy.config.units import Configured, Given, Reference
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import Parameter
from nbdkitpy.server.options import AddressFamily, Endpoint, Transport
from nbdkitpy.stack import Stack

__all__ = ["to_toml"]

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)

#: What stands in place of a secret. Its line is a comment, so that nobody takes it for one.
_HIDDEN = '"***"'


def to_toml(config: ServerConfig, stack: Stack, configured: Configured) -> str:
    """Return the text of a file that configures the same; secrets are left out, but not where they are.

    Raises:
        ConfigError: there is something that TOML cannot say.
    """
    lines = ["[server]", *_server(config)]
    for endpoint in config.server.endpoints:
        if endpoint.fd is None:  # else a service manager settles it, and no file can
            lines += ["", "[[listen]]", *_endpoint(endpoint)]
    for layer, word in zip(stack.layers, (*config.filters, config.plugin)):
        table = "[plugin]" if layer is stack.plugin else "[[filter]]"
        lines += ["", table, f"name = {_string(_name(word))}"]
        for (owner, key), given in configured.given.items():
            if owner is layer:
                lines.append(_parameter(key, layer.parameters.get(key), given))
    return "\n".join([*lines, ""])


def _server(config: ServerConfig) -> Iterator[str]:
    for setting in SETTINGS:
        value = value_in(config, setting) if setting.key else None
        if value is not None:
            yield f"{setting.key} = {_setting(setting, value)}"


def _setting(setting: Setting, value: object) -> str:
    if setting.is_switch:
        return _scalar(value == setting.value)
    if isinstance(value, tuple):
        return _array(_string(str(each)) for each in value)
    return _scalar(value)


# --- [[listen]] ---


def _endpoint(endpoint: Endpoint) -> Iterator[str]:
    yield f"transport = {_string(endpoint.transport.value)}"
    if endpoint.transport is Transport.UNIX:
        if endpoint.unix_path is not None:
            yield f"path = {_string(endpoint.unix_path)}"
        return
    # Names of services are for TCP only.
    yield f"port = {endpoint.port if endpoint.port.isdecimal() else _string(endpoint.port)}"
    if endpoint.transport is Transport.TCP:
        if endpoint.address is not None:
            yield f"address = {_string(endpoint.address)}"
        if endpoint.address_family is not AddressFamily.ANY:
            yield f"address-family = {_string(endpoint.address_family.value)}"


# --- [plugin] and [[filter]] ---


def _name(word: str) -> str:
    """What names a unit wherever the file is read."""
    return str(modules.parse(word) or word)


def _parameter(key: str, parameter: Parameter[object] | None, given: Given) -> str:
    name = key if _BARE_KEY.fullmatch(key) else _string(key)
    secret = parameter is not None and parameter.secret
    # Of what cannot be repeated the last one counts.
    values = given.values if parameter is None or parameter.repeated else given.values[-1:]
    if secret and not all(_is_reference(value) for value in values):
        return f"# {name} = {_HIDDEN}"
    written = [_value(value) for value in values]
    is_array = len(written) != 1 or (given.is_array and (parameter is None or parameter.repeated))
    return f"{name} = {_array(written) if is_array else written[0]}"


def _is_reference(value: str | Reference) -> bool:
    """Tell whether a secret's value only says where the secret is."""
    return isinstance(value, Reference) or value.startswith("+")


def _value(value: str | Reference) -> str:
    return _string(value) if isinstance(value, str) else f"{{ {value.kind} = {_string(value.name)} }}"


# --- TOML ---


def _array(elements: Iterable[str]) -> str:
    return f"[{', '.join(elements)}]"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(int(value))  # it may be an enumeration, which has names
    return str(value) if isinstance(value, float) else _string(str(value))


def _string(text: str) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"--dump-config: TOML cannot say {text!r}, which is no text in UTF-8")
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    # More than TOML demands, so that it can be shown on a terminal.
    return character if character.isprintable() else f"\\U{ord(character):08X}"

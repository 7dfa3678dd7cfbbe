"""The life of a server within another program, from the request to its end, in the server's own thread.

The order is that of ``server/launch.py``, without what is a whole process's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from nbdkitpy.backend import Backend, Filter, Plugin
from nbdkitpy.config.settings import SETTINGS
from nbdkitpy.config.units import Configured, Given, UnitTable, configure
from nbdkitpy.config.words import Assignment, as_text
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.library import Parameters, Request
from nbdkitpy.parameters import parse_path
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.registry import Registry
from nbdkitpy.server.embedded import Embedded
from nbdkitpy.server.options import Endpoint, ServerOptions, Transport
from nbdkitpy.server.starttls import load_tls
from nbdkitpy.stack import Stack

__all__ = ["live"]

B = TypeVar("B", bound=Backend)

#: How values of options are read for which the command line has a word more.
_OWN_PARSERS: Mapping[str, Callable[[str], object]] = {"unix": parse_path}


def live(request: Request, started: Callable[[Embedded, Stack], None]) -> None:
    """Serve what `request` asks for until the server is told to end.

    Args:
        request: What is to be served, and how.
        started: Called when clients can connect.

    Raises:
        TimeoutError: a layer has not returned in time. It is abandoned, with all that it has.
        ConfigError: there is something wrong with the request.
    """
    with contextlib.ExitStack() as undo:
        server = Embedded(_options(request))
        undo.callback(server.free)
        server.tls = load_tls(server.options)
        stack, tables = _stack(request, server)
        layers = undo.enter_context(contextlib.ExitStack())
        stack.load()
        layers.callback(stack.unload)
        _check_single_values(configure(stack, _assignments(request.parameters), tables))
        stack.config_complete()
        stack.get_ready()
        undo.callback(server.close)
        server.bind()
        layers.callback(stack.cleanup)
        stack.after_fork()
        started(server, stack)
        if not server.serve(stack):
            layers.pop_all()  # what is in use can be neither cleaned up nor unloaded
            raise TimeoutError("a plugin or filter has not returned, and is abandoned; the log names the connection")


# --- options ---


def _options(request: Request) -> ServerOptions:
    options = {name: _option(name, value) for name, value in request.options.items()}
    if "tls" not in options and not any(name.startswith("tls_") for name in options):
        options["tls"] = TlsMode.OFF
    return ServerOptions(endpoints=tuple(_endpoints(request)), **options)


def _option(name: str, value: object) -> Any:
    """The value of an option, read as on the command line, so that the same ones are refused."""
    parsers = {**{setting.name: setting.parse for setting in SETTINGS if not setting.is_switch}, **_OWN_PARSERS}
    if name not in parsers:
        return value
    try:
        return parsers[name](_text(value))
    except ValueError as error:
        raise ConfigError(f"{name} must be {error}, not {value!r}") from None


def _endpoints(request: Request) -> Iterator[Endpoint]:
    if not request.listen:
        if request.unix is not None or request.tcp is not None:
            raise ConfigError("listen=False excludes unix and tcp, which say where to listen")
        return
    if request.unix is not None or request.tcp is None:
        yield Endpoint(Transport.UNIX, unix_path=None if request.unix is None else _option("unix", request.unix))
    if request.tcp is not None:
        address, port = request.tcp
        if not address:
            raise ConfigError('tcp: the address must be a name or an address, or "any" for every interface, not ""')
        yield Endpoint(Transport.TCP, address, port=str(port))


# --- layers ---


def _stack(request: Request, server: Embedded) -> tuple[Stack, list[UnitTable]]:
    """The stack, with nothing loaded, and what each of its layers is given for itself alone."""
    registry = Registry()
    plugin = _instance(request.plugin, Plugin, lambda name: registry.plugin(name).cls)
    tables: list[UnitTable] = []
    filters: list[Filter] = []
    for number, layer in enumerate(request.filters):
        what, parameters = layer if isinstance(layer, tuple) else (layer, {})
        filters.append(_instance(what, Filter, lambda name: registry.filter(name).cls))
        given = {key: _given(key, value) for key, value in parameters.items()}
        tables.append(UnitTable(filters[-1].name, f"filters[{number}]", given))
    return Stack(plugin, filters, server), [*tables, UnitTable(plugin.name, "plugin")]


def _instance(what: object, base: type[B], find: Callable[[str], type[B]]) -> B:
    if isinstance(what, base):
        return what
    cls = find(what) if isinstance(what, str) else what
    if not (isinstance(cls, type) and issubclass(cls, base)):
        kind = base.__name__
        raise TypeError(f"a {kind.lower()} must be a name, a subclass of {kind}, or an instance of one, not {what!r}")
    return cls()


def _assignments(parameters: Parameters) -> Iterator[Assignment]:
    for key, value in parameters.items():
        for text in _given(key, value).values:
            yield key, str(text)


def _given(key: str, value: object) -> Given:
    try:
        if isinstance(value, (list, tuple)):
            return Given(tuple(map(_text, value)), is_array=True)
        return Given((_text(value),))
    except ValueError as error:
        raise ConfigError(f"{key} must be {error}") from None


def _text(value: object) -> str:
    """A value as it would stand on the command line. What cannot be is not shown: it may be a secret."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"text, a number, a truth value or a path, not of the type {type(value).__name__}")
    return as_text(value)


def _check_single_values(configured: Configured) -> None:
    """See that nothing has got several values that can have one; on the command line, the last one counts."""
    for (layer, key), given in configured.given.items():
        parameter = layer.parameters.get(key)
        if parameter is not None and not parameter.repeated and len(given.values) > 1:
            raise ConfigError(f"{layer.name}: {key} must be one value, not an array: it cannot be given several times")

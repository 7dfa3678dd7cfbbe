"""Reads the configuration file again while clients are served, and applies what can be applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nbdkitpy import log
from nbdkitpy.backend import Backend
from nbdkitpy.config.file import Document, read_file
from nbdkitpy.config.settings import SETTINGS, Setting
from nbdkitpy.config.units import Configured, UnitTable, read_texts, tables_of, unknown
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.stack import Stack

__all__ = ["Reloader"]

_NOT_USED = "is not used, as the command line gives it"
_NEEDS_RESTART = "differs: that needs a restart"


class Reloader:
    """Brings a running stack up to date with its configuration file.

    Live parameters get their new values, all of them or none. Everything else that differs from what the server was
    started with is told of each time.

    Args:
        document: The file as the server was started with it.
        stack: It was configured by it.
        configured: By what.
        plugin: The word by which the plugin was asked for.
        change_options: Called with those settings of the server that have changed and may do so.
        by_command_line: Names of settings that the command line has given.
    """

    def __init__(
        self,
        document: Document,
        stack: Stack,
        configured: Configured,
        plugin: str,
        change_options: Callable[..., object],
        by_command_line: frozenset[str] = frozenset(),
    ) -> None:
        self._document = document
        self._change_options = change_options
        self._live_settings = [each for each in SETTINGS if each.live and each.name not in by_command_line]
        self._shadowed = frozenset(each.key for each in SETTINGS if each.live and each.name in by_command_line)
        self._options = _values(self._live_settings, document)
        self._stack = stack
        self._configured = configured
        # What was not given by the file is not to be changed by it: a plugin may have been named on the command line.
        self._uses_plugin = document.plugin is not None and document.plugin.name == plugin
        self._running = {
            layer: {key: read_texts(layer, key, table) for key in _live(layer)}
            for layer, table in self._tables(document)
        }

    def __call__(self) -> list[str]:
        """Read the file, open the log file anew, and return what was done and what was not, for people.

        Raises:
            ConfigError: there is an error in the file. Then all stays as it was.
        """
        new = read_file(self._document.path)
        changes, lines = self._compare(new)
        lines = [*self._stack.reload(changes), *self._reload_options(new), *lines]
        for layer, texts in changes.items():
            self._running[layer].update(texts)
        return [*lines, *_reopened()] or ["nothing has changed"]

    def _compare(self, new: Document) -> tuple[dict[Backend, dict[str, tuple[str, ...]]], list[str]]:
        """The changes of live parameters, and lines about all others."""
        changes: dict[Backend, dict[str, tuple[str, ...]]] = {}
        lines = [*self._differences(new)]
        if self._names(new) != self._names(self._document):
            return changes, lines
        pairs = zip(self._tables(self._document), self._tables(new))
        for (layer, before), (_, after) in pairs:
            for key in sorted({*before.parameters, *after.parameters} | _live(layer)):
                if (layer, key) in self._configured.by_command_line:
                    if before.parameters.get(key) != after.parameters.get(key):
                        lines.append(f"{after.where}: {key} {_NOT_USED}")
                elif key in _live(layer):
                    texts = read_texts(layer, key, after)
                    if texts != self._running[layer][key]:
                        changes.setdefault(layer, {})[key] = texts
                elif before.parameters.get(key) != after.parameters.get(key):
                    _check(layer, key, after)
                    lines.append(f"{after.where}: {key} {_NEEDS_RESTART}")
        return changes, lines

    def _reload_options(self, new: Document) -> Iterator[str]:
        """Set those settings of the server that may change, and yield a line for each that has."""
        values = _values(self._live_settings, new)
        changed = {name: value for name, value in values.items() if value != self._options[name]}
        self._options = values
        self._change_options(**changed)
        for setting in self._live_settings:
            if setting.name in changed:
                shown = changed[setting.name] if setting.key in new.server else "the default"
                yield f"{new.path}: [server]: {setting.key} has been set: {shown}"

    def _differences(self, new: Document) -> Iterator[str]:
        """Lines about what differs but is not set, except parameters of units."""
        old, live = self._document, {setting.key for setting in self._live_settings}
        for key in sorted({*old.server, *new.server} - live):
            if old.server.get(key) != new.server.get(key):
                why = _NOT_USED if key in self._shadowed else _NEEDS_RESTART
                yield f"{new.path}: [server]: {key} {why}"
        if old.listen != new.listen:
            yield f"{new.path}: [[listen]] {_NEEDS_RESTART}"
        if self._names(new) != self._names(old):
            yield f"{new.path}: the choice of plugin and filters {_NEEDS_RESTART}"

    def _names(self, document: Document) -> list[str]:
        return [table.name for table in (*document.filters, *([document.plugin] if document.plugin else []))]

    def _tables(self, document: Document) -> Iterator[tuple[Backend, UnitTable]]:
        plugin = document.plugin if self._uses_plugin and document.plugin else UnitTable("", document.path)
        return tables_of(self._stack, (*document.filters, plugin))


def _values(settings: Sequence[Setting], document: Document) -> dict[str, object]:
    """The values of `settings`, fields of ServerOptions, as `document` gives them."""
    defaults = ServerOptions()
    return {each.name: document.values.get(each.name, getattr(defaults, each.name)) for each in settings}


def _live(layer: Backend) -> frozenset[str]:
    return frozenset(key for key, parameter in layer.parameters.items() if parameter.live)


def _check(layer: Backend, key: str, table: UnitTable) -> None:
    """Refuse what could not be started with, as far as that can be told without doing it."""
    takes_others = type(layer).config is not Backend.config
    if key in table.parameters and key not in layer.parameters and not takes_others:
        raise unknown(layer, key, table)


def _reopened() -> list[str]:
    try:
        return log.reopen()
    except ConfigError as error:  # the rest of the reload is done, and has to be told
        return [str(error)]

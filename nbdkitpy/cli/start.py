"""From a configuration to a stack that has its parameters, and on to a server or to an answer about it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

import nbdkitpy
from nbdkitpy import log
from nbdkitpy.backend import Backend, Filter, Plugin, ServerControl, SharedCount
from nbdkitpy.cli import information
from nbdkitpy.cli.grammar import PROGRAM, Units, load
from nbdkitpy.config import DebugFlag, ServerConfig
from nbdkitpy.config.units import Configured, configure
from nbdkitpy.registry import Registry
from nbdkitpy.server.starttls import load_tls
from nbdkitpy.stack import Stack

if TYPE_CHECKING:
    from nbdkitpy.server.launch import Servable
    from nbdkitpy.server.notify import Notifier

__all__ = [
    "Loaded",
    "Prepared",
    "ask",
    "check_config",
    "dump_config",
    "dump_plugin",
    "log_of",
    "prepare",
    "run",
    "serve",
]

#: What nbdkit's users set by -D on the server itself. Requests are never logged here, so there is nothing to set.
_SERVER_DEBUG_FLAGS = frozenset({"backend.controlpath", "backend.datapath"})
_SERVER_NAMES = ("nbdkit", PROGRAM)


class Loaded(NamedTuple):
    """A stack that has its parameters, and what they came from. Nothing has been checked together."""

    config: ServerConfig
    units: Units
    stack: Stack
    configured: Configured


def serve(config: ServerConfig, parent: int) -> int:
    """Serve what `config` says until the server is told to end; return the exit status.

    Args:
        config: What is to be served.
        parent: The process that started this one, for ``--exit-with-parent``.
    """
    from nbdkitpy.server.failures import Reported, reported
    from nbdkitpy.server.launch import exit_with_parent

    notifier = _notifier()  # takes variables away that no child of a unit may see
    with log_of(config):
        try:
            with reported("cannot start"):
                if config.exit_with_parent:
                    exit_with_parent(parent)
                prepared = _supervised(config) if config.reload else prepare(config)
        except Reported:
            return 1
        return run(config, prepared, notifier, announce=config.verbose or sys.stderr.isatty())


def _supervised(config: ServerConfig) -> Prepared:
    from nbdkitpy.cli.development import prepare  # for those who write units

    return prepare(config)


def log_of(config: ServerConfig) -> contextlib.AbstractContextManager[None]:
    """Set up the logging that `config` asks for."""
    return log.setup(
        config.log,
        name=config.name,
        verbose=config.verbose,
        format=config.log_format,
        background=config.background,
    )


def ask(config: ServerConfig, answer: Callable[[Loaded], int]) -> int:
    """Load and configure what `config` says, have `answer` tell something of it, and return the exit status."""
    from nbdkitpy.server.failures import Reported, reported

    # Whoever asks wants to see what is wrong, and nothing to be written elsewhere.
    with log.setup("stderr", name=config.name, verbose=config.verbose, format=config.log_format):
        try:
            with reported("cannot start"), contextlib.ExitStack() as undo:
                return answer(_load(config, _NoServer(), undo))
        except Reported:
            return 1


class _NoServer:
    """What units see of a server that is not there."""

    def finish(self) -> None:
        """Do nothing."""

    def shutdown(self) -> None:
        """Do nothing."""

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        """Return a count, though nobody will come."""
        from nbdkitpy.server.counts import LocalCount

        return LocalCount(on_zero)


# --- answers ---


def dump_plugin(loaded: Loaded) -> int:
    """Print facts about the plugin, and about the filters after it."""
    return information.dump(information.plugin_facts(loaded.units, loaded.stack))


def dump_config(loaded: Loaded) -> int:
    """Print the configuration as a file for ``--config``."""
    from nbdkitpy.config.dump import to_toml

    click.echo(to_toml(loaded.config, loaded.stack, loaded.configured), nl=False)
    return 0


def check_config(loaded: Loaded) -> int:
    """Have the units check their parameters together, and say so if nothing is wrong."""
    loaded.stack.config_complete()
    click.echo(f"{PROGRAM}: the configuration is right")
    return 0


# --- the stack ---


def _load(
    config: ServerConfig,
    server: ServerControl,
    undo: contextlib.ExitStack,
    look_at: Callable[[Stack], None] | None = None,
) -> Loaded:
    units = load(Registry(), config.plugin, config.filters)
    stack = _loaded_stack(units, server, config)
    undo.callback(stack.unload)
    if look_at is not None:
        look_at(stack)
    return Loaded(config, units, stack, configure(stack, config.parameters, config.tables))


def _loaded_stack(units: Units, server: ServerControl, config: ServerConfig) -> Stack:
    *outer, inner = [unit.cls() for unit in units]
    assert isinstance(inner, Plugin)
    filters = [layer for layer in outer if isinstance(layer, Filter)]
    stack = Stack(inner, filters, server, multi_process=config.server.workers > 0)
    for layer in stack.layers:
        layer.server_name = config.name
    _set_debug_flags(stack.layers, config.debug)
    logging.getLogger(PROGRAM).debug(
        "version %s, layers: %s", nbdkitpy.__version__, " -> ".join(layer.name for layer in stack.layers)
    )
    stack.load()
    return stack


def _set_debug_flags(layers: Sequence[Backend], flags: Iterable[DebugFlag]) -> None:
    """Set each flag where there is one; of others only warn, as scripts set them for versions that have them."""
    for flag in flags:
        found = [layer for layer in layers if layer.name == flag.unit]
        known = [layer for layer in found if flag.flag in layer.debug_flags]
        for layer in known:
            layer.debug[flag.flag] = flag.value
        is_servers = flag.unit in _SERVER_NAMES and flag.flag in _SERVER_DEBUG_FLAGS
        if not known and not is_servers:
            why = "has no such flag" if found or flag.unit in _SERVER_NAMES else "is not in use"
            logging.getLogger(PROGRAM).warning(
                "-D %s.%s is not used: %s %s", flag.unit, flag.flag, flag.unit, why, extra=log.TERMINAL
            )


# --- the server ---


class Prepared(NamedTuple):
    """A server, not yet bound, and what it serves."""

    server: Servable
    stack: Stack
    reload: Callable[[], list[str]] | None


def prepare(config: ServerConfig, look_at: Callable[[Stack], None] | None = None) -> Prepared:
    """Load what `config` says, give it its parameters, and make a server for it.

    Args:
        config: What is to be served.
        look_at: Called with the stack before that has any parameters.

    Raises:
        Exception: whatever a unit raises.
    """
    server = _server(config)
    server.tls = load_tls(config.server)
    with contextlib.ExitStack() as undo:
        loaded = _load(config, server, undo, look_at)
        reload = _reloader(loaded, server)
        undo.pop_all()  # launch sees to it
    return Prepared(server, loaded.stack, reload)


def _server(config: ServerConfig) -> Servable:
    if config.single:
        from nbdkitpy.server.single import Single

        return Single(config.server)
    if config.server.workers:
        from nbdkitpy.server.pool import Pool

        return Pool(config.server)
    from nbdkitpy.server.service import Server

    return Server(config.server)


def _reloader(loaded: Loaded, server: Servable) -> Callable[[], list[str]] | None:
    if loaded.config.file is None:
        return None
    from nbdkitpy.config.reload import Reloader

    by_command_line, plugin = loaded.config.by_command_line, loaded.config.plugin
    return Reloader(loaded.config.file, loaded.stack, loaded.configured, plugin, server.change_options, by_command_line)


def _notifier() -> Notifier | None:
    # Without a service manager not even the module is needed.
    if not os.environ.keys() & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}:
        return None
    from nbdkitpy.server.notify import Notifier

    return Notifier(os.environ)


def run(config: ServerConfig, prepared: Prepared, notifier: Notifier | None, *, announce: bool) -> int:
    """Serve until the server is told to end; return the exit status.

    Args:
        config: What `prepared` was made of.
        prepared: Ended in any case.
        notifier: Is told how the server is.
        announce: Say on standard error what is listened on.
    """
    from nbdkitpy.server.launch import launch

    gc.freeze()  # what is there by now stays: no collection has to go through it, the first one of all or later ones
    gc.enable()  # it has been off since main
    return launch(
        prepared.server,
        prepared.stack,
        command=config.run,
        pidfile=config.server.pidfile,
        export_name=config.server.export_name,
        announce=announce,
        print_uri=config.print_uri,
        background=config.background,
        user=config.user,
        group=config.group,
        swap=config.swap,
        selinux_label=config.selinux_label,
        notifier=notifier,
        reload=prepared.reload,
    )

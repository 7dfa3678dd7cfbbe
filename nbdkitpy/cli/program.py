"""The program: from the words that it is started with to what it does, and its exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

import nbdkitpy
from nbdkitpy import log
from nbdkitpy.cli import information, start
from nbdkitpy.cli.grammar import PROGRAM, load, make_command, settings_given
from nbdkitpy.config import SETTINGS, ServerConfig, is_parameter, read_words, server_config
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.registry import Kind, Registry

if TYPE_CHECKING:
    from nbdkitpy.config.file import Document
    from nbdkitpy.config.units import UnitTable
    from nbdkitpy.server.activation import Activation

__all__ = ["Invocation", "command", "main"]

#: Options that cannot be had together, by what click calls them.
_EXCLUSIVE = (
    ("port", "unix"),
    ("vsock", "unix"),
    *(("single", other) for other in ("port", "unix", "vsock", "run", "dump_plugin")),
)

#: Questions about a stack that has been loaded and has its parameters.
_ABOUT_STACK = {
    "dump_plugin": start.dump_plugin,
    "dump_config": start.dump_config,
    "check_config": start.check_config,
}


class Invocation(NamedTuple):
    """How the program was started, but for its words."""

    parent: int  #: process that started it
    activation: Activation | None = None  #: sockets of a service manager


def main() -> None:
    """Run the program, and exit with its status."""
    parent = os.getppid()  # before anything takes time: see exit_with_parent
    _check_standard_streams()
    os.umask(0o022)  # what sockets and files get must not depend on who starts us
    invocation = Invocation(parent, _activation())
    if not log.is_journal(sys.stderr):
        command().main(prog_name=PROGRAM, obj=invocation)
    try:
        status = command().main(prog_name=PROGRAM, obj=invocation, standalone_mode=False)
    except click.ClickException as error:  # one line with a priority, in place of the usage and a line without
        log.complain(error.format_message())
        status = error.exit_code
    raise SystemExit(status)


def command() -> click.Command:
    """Return the command with all its options; its object is an :class:`Invocation`."""
    return make_command(_run)


def _check_standard_streams() -> None:
    # With one of them closed, the next file or socket that we open would take its number, and its reader or writer.
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, f"__{name}__") is None]
    if not closed:
        return
    if "stderr" not in closed:
        print(f"{PROGRAM}: error: {' and '.join(closed)} must be open", file=sys.stderr)
    raise SystemExit(1)


def _activation() -> Activation | None:
    if "LISTEN_PID" not in os.environ:
        return None
    from nbdkitpy.server.activation import receive

    try:
        return receive(os.environ)
    except ConfigError as error:
        log.complain(str(error))
        raise SystemExit(1) from error


# --- what is to be done ---


def _run(ctx: click.Context, /, **given: Any) -> None:
    try:
        ctx.exit(_answer(ctx, given))
    except ConfigError as error:
        log.complain(str(error))
        ctx.exit(1)


def _answer(ctx: click.Context, given: Mapping[str, Any]) -> int:
    """Do what the options ask for, and return the exit status."""
    new = {kind: given[f"new_{kind.value}"] for kind in Kind if given[f"new_{kind.value}"] is not None}
    if new:
        from nbdkitpy.cli.new_package import write_package  # for those who write units

        for kind, name in new.items():
            write_package(kind, name)
        return 0
    for kind in Kind:
        if given[f"list_{kind.value}s"]:
            with _debugging(given):
                return information.list_units(kind, _located(kind, given))
    document = _document(given["config"])
    plugin, words = _plugin_and_words(given, document)
    if plugin is None:
        return _answer_without_plugin(ctx, given)
    filters = (*given["filters"], *(table.name for table in (document.filters if document else ())))
    if given["help"] or given["version"]:
        with _debugging(given):
            units = load(Registry(), plugin, filters)
            return information.show_help(units, words) if given["help"] else information.show_version(units)
    invocation: Invocation = ctx.obj
    config = _configuration(given, plugin, words, filters, document, invocation.activation)
    for question, about_stack in _ABOUT_STACK.items():
        if given[question]:
            return start.ask(config, about_stack)
    return start.serve(config, parent=invocation.parent)


def _debugging(given: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Where units may be loaded only to tell of them: why one cannot be is shown if that is asked for."""
    return log.setup("stderr", verbose=bool(given["verbose"]))


def _located(kind: Kind, given: Mapping[str, Any]) -> list[str]:
    """The words that ask for units of this kind by where their code is."""
    from nbdkitpy.modules import parse

    plugin = given["plugin"]
    words = given["filters"] if kind is Kind.FILTER else [] if plugin is None or is_parameter(plugin) else [plugin]
    return [word for word in words if parse(word) is not None]


def _answer_without_plugin(ctx: click.Context, given: Mapping[str, Any]) -> int:
    if given["help"]:
        click.echo(ctx.get_help())
    elif given["version"]:
        click.echo(f"{PROGRAM} {nbdkitpy.__version__}")
    elif given["dump_config"]:
        return information.dump(information.host_facts())
    elif given["config"]:
        raise ConfigError(f"{given['config']}: there is no table [plugin], and no plugin is given on the command line")
    else:
        raise click.UsageError(f"no plugin is given; {PROGRAM} --list-plugins shows what there is")
    return 0


# --- what the words mean ---


def _document(path: str | None) -> Document | None:
    if path is None:
        return None
    from nbdkitpy.config.file import read_file  # the parser takes some milliseconds

    return read_file(path)


def _plugin_and_words(given: Mapping[str, Any], document: Document | None) -> tuple[str | None, Sequence[str]]:
    """The plugin's name, and the words after it. With a file the name may be left out."""
    plugin, words = given["plugin"], given["words"]
    if document is None or document.plugin is None:
        return plugin, words
    if plugin is None or is_parameter(plugin):
        return document.plugin.name, [*([plugin] if plugin else []), *words]
    return plugin, words


def _configuration(
    given: Mapping[str, Any],
    plugin: str,
    words: Iterable[str],
    filters: Sequence[str],
    document: Document | None,
    activation: Activation | None,
) -> ServerConfig:
    """What the command line and the file mean.

    Raises:
        click.UsageError: options that exclude each other.
        ConfigError: a parameter file cannot be read.
    """
    values = settings_given(given)
    _check_together(given, values, activation)
    return server_config(
        _merged(document.values, values) if document else values,
        plugin,
        filters=filters,
        parameters=read_words(words),
        tables=_tables(document, plugin) if document else (),
        listen=document.listen if document else (),
        fds=activation.fds if activation else (),
        file=document,
        by_command_line=values,
    )


def _merged(of_file: Mapping[str, Any], of_command_line: Mapping[str, Any]) -> dict[str, Any]:
    both = {setting.name for setting in SETTINGS if setting.many} & of_file.keys() & of_command_line.keys()
    joined = {name: (*of_file[name], *of_command_line[name]) for name in both}  # of debug flags the last one counts
    return {**of_file, **of_command_line, **joined}


def _check_together(given: Mapping[str, Any], values: Mapping[str, Any], activation: Activation | None) -> None:
    for one, other in _EXCLUSIVE:
        if given[one] and given[other]:
            one, other = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise click.UsageError(f"{one} and {other} exclude each other")
    if activation is not None:
        from nbdkitpy.server.activation import conflicts

        options = [option for setting in SETTINGS if setting.name in values for option in setting.options]
        for conflict in conflicts(options):
            raise click.UsageError(conflict)


def _tables(document: Document, plugin: str) -> list[UnitTable]:
    """The file's tables of units; not the plugin's if the command line has another one."""
    from nbdkitpy.config.units import UnitTable

    own = document.plugin if document.plugin and document.plugin.name == plugin else UnitTable(plugin, document.path)
    return [*document.filters, own]

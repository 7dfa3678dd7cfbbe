"""Answers to questions: each prints to standard output and returns the exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

import nbdkitpy
from nbdkitpy.backend import Backend, Filter, Plugin, ThreadModel
from nbdkitpy.cli.grammar import PROGRAM, Units
from nbdkitpy.config import read_words, with_keys
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import Parameter
from nbdkitpy.registry import Kind, Registry, Unit
from nbdkitpy.stack import Stack

__all__ = ["dump", "host_facts", "list_units", "plugin_facts", "show_help", "show_version"]

#: Methods that --dump-plugin tells of, if the plugin has its own.
_DUMPED_METHODS = (
    "load",
    "unload",
    "dump",
    "config",
    "config_complete",
    "thread_model",
    "get_ready",
    "after_fork",
    "cleanup",
    "preconnect",
    "list_exports",
    "default_export",
    "open",
)


def list_units(kind: Kind, words: Iterable[str]) -> int:
    """Print what is installed of one kind, and then what else `words` ask for: they say where its code is."""
    registry = Registry()
    rows = [(offer.name, str(offer)) for offer in registry.names(kind)]
    rows += [(unit.cls.name, unit.path or unit.word) for unit in map(_loader(registry, kind), words)]
    width = max((len(name) for name, _ in rows), default=0)
    for name, origin in rows:
        click.echo(f"{name:{width}}  {origin}")
    return 0


def _loader(registry: Registry, kind: Kind) -> Callable[[str], Unit[Plugin] | Unit[Filter]]:
    return registry.plugin if kind is Kind.PLUGIN else registry.filter


def show_version(units: Units) -> int:
    """Print our version, and that of each of the units."""
    click.echo(f"{PROGRAM} {nbdkitpy.__version__}")
    for unit in units:
        click.echo(f"{unit.cls.name} {unit.version}".rstrip())
    return 0


def show_help(units: Units, words: Iterable[str]) -> int:
    """Print what the units are, which parameters they take, and what the plugin says of those in `words`."""
    formatter = click.HelpFormatter(width=100)
    formatter.write_usage(PROGRAM, f"[OPTIONS] {units[-1].word} [[KEY=]VALUE | @PATH]...")
    for unit in units:
        _write_unit_help(formatter, unit.cls)
    more = _plugin_help(units, words)
    if more:
        formatter.write_paragraph()
        formatter.write(more + "\n")
    formatter.write_paragraph()
    formatter.write_text(f"The options: {PROGRAM} --help")
    click.echo(formatter.getvalue().rstrip("\n"))
    return 0


def _plugin_help(units: Units, words: Iterable[str]) -> str:
    plugin = units[-1].cls()
    assert isinstance(plugin, Plugin)
    given: dict[str, str] = {}
    with contextlib.suppress(ConfigError):  # who asks for help may well not know how it is written
        given.update(with_keys(read_words(words), plugin))
    return plugin.config_help(given).strip()


def _write_unit_help(formatter: click.HelpFormatter, cls: type[Backend]) -> None:
    kind = "plugin" if issubclass(cls, Plugin) else "filter"
    title = f"{cls.name} {kind}" + (f" ({cls.longname})" if cls.longname else "")
    with formatter.section(title):
        if cls.description:
            formatter.write_text(" ".join(cls.description.split()))
            formatter.write_paragraph()
        rows = [(_parameter_syntax(parameter), _parameter_help(parameter)) for parameter in cls.parameters.values()]
        if rows:
            formatter.write_dl(rows)
        else:
            formatter.write_text("It has no parameters.")


def _parameter_syntax(parameter: Parameter[Any]) -> str:
    text = f"[{parameter.key}=]" if parameter.magic else f"{parameter.key}="
    return f"{text}{parameter.metavar}{'...' if parameter.repeated else ''}"


def _parameter_help(parameter: Parameter[Any]) -> str:
    notes = []
    if parameter.required:
        notes.append("required")
    elif parameter.default not in (None, ()):
        default = parameter.default
        notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    if parameter.repeated:
        notes.append("may be repeated")
    return "  ".join([parameter.help, *(f"[{'; '.join(notes)}]" for _ in notes[:1])])


def dump(facts: Mapping[str, object]) -> int:
    """Print lines for scripts."""
    for key, value in facts.items():
        click.echo(f"{key}={value}")
    return 0


def host_facts() -> dict[str, object]:
    """Return what scripts ask of nbdkit's --dump-config, as far as it is a question here, and what Python this is."""
    host = os.uname()
    major, minor, *_ = nbdkitpy.__version__.split(".")
    return {
        "name": PROGRAM,
        "version": nbdkitpy.__version__,
        "version_major": major,
        "version_minor": minor,
        "python": sys.executable,
        "python_version": ".".join(map(str, sys.version_info[:3])),
        "host_os": host.sysname.lower(),
        "host_cpu": host.machine,
        "exit_with_parent": "yes" if sys.platform == "linux" else "no",
        "run_default_socket": "Unix",
        "timeout_option": "yes",
        "tls": "yes",
        "vsock_option": "yes",
    }


def plugin_facts(units: Units, stack: Stack) -> dict[str, object]:
    """Return facts about the plugin, which has its parameters but has not checked them, then about the filters."""
    plugin, unit = stack.plugin, units[-1]
    magic = plugin.magic_config_key()
    facts: dict[str, object] = {
        "path": unit.path,
        "name": plugin.name,
        **({"version": unit.version} if unit.version else {}),
        **({"distribution": unit.distribution} if unit.distribution else {}),
        "thread_model": ThreadModel(plugin.thread_model()).name.lower(),
        **({"magic_config_key": magic} if magic else {}),
    }
    own = (name for name in _DUMPED_METHODS if getattr(type(plugin), name) is not getattr(Plugin, name))
    facts.update({f"has_{name}": 1 for name in own})
    facts.update(plugin.dump())
    for each, layer in zip(units, stack.filters):
        facts.update({f"{layer.name}_path": each.path, f"{layer.name}_name": layer.name, **layer.dump()})
    return facts

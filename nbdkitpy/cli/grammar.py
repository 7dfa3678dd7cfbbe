"""What may stand on the command line: nbdkit's grammar, by click."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from nbdkitpy import log
from nbdkitpy.backend import Filter, Plugin
from nbdkitpy.config import SETTINGS, Setting
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import Parameter, parse_path
from nbdkitpy.registry import Kind, Registry, Unit

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["PROGRAM", "Units", "load", "make_command", "settings_given"]

PROGRAM = "nbdkitpy"

#: Outermost first; the last is the plugin.
Units: TypeAlias = "tuple[Unit[Filter] | Unit[Plugin], ...]"

_EPILOG = """\b
Examples:
  nbdkitpy file disk.img
  nbdkitpy memory 1G --run 'nbdinfo "$uri"'
  nbdkitpy --filter=limit -U /run/disk.sock file disk.img limit=4

'nbdkitpy PLUGIN --help' shows the parameters of a plugin, and of filters given with --filter."""


def make_command(run: Callable[..., None]) -> click.Command:
    """Return the command with all its options; it calls `run` with the context and what was given."""
    settings = [_option(setting) for setting in SETTINGS]
    return _Command(
        PROGRAM,
        params=[*settings, *_other_options(), *_arguments()],
        callback=click.pass_context(run),
        help="Serve a Network Block Device: PLUGIN says where its bytes are, filters change what passes.",
        epilog=_EPILOG,
        options_metavar="[OPTIONS]",
        context_settings={"max_content_width": 100},
    )


def _arguments() -> list[click.Parameter]:
    return [
        click.Argument(["plugin"], required=False, shell_complete=_complete_plugin),
        click.Argument(["words"], nargs=-1, metavar="[[KEY=]VALUE | @PATH]...", shell_complete=_complete_parameter),
    ]


def _option(setting: Setting) -> click.Option:
    names = [*setting.options, setting.name]
    if setting.is_switch:
        # Its first name stands for it: of switches that exclude each other the last one given counts.
        return click.Option(names, flag_value=setting.options[0], default=None, type=str, help=setting.help)
    return click.Option(
        names,
        metavar=setting.metavar,
        multiple=setting.many,
        callback=_each_by(setting.parse) if setting.many else _by(setting.parse),
        shell_complete=_complete_setting(setting),
        help=setting.help,
    )


def _other_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--filter", "filters"],
            metavar="FILTER",
            multiple=True,
            shell_complete=_complete_filter,
            help="Put a filter before the plugin; the first given is nearest to the client.",
        ),
        click.Option(
            ["--config", "config"],
            metavar="FILE",
            callback=_by(parse_path),
            shell_complete=_complete_file,
            help="Read a configuration file first; the command line wins over it.",
        ),
        click.Option(["-V", "--version", "version"], is_flag=True, help="Show versions."),
        click.Option(["--dump-plugin"], is_flag=True, help="Show facts about PLUGIN, for scripts."),
        click.Option(
            ["--dump-config"],
            is_flag=True,
            help="Show the configuration as a file for --config; without PLUGIN facts about this installation.",
        ),
        click.Option(["--check-config"], is_flag=True, help="Only tell whether the configuration is right."),
        click.Option(["--list-plugins"], is_flag=True, help="Show the plugins that are installed."),
        click.Option(["--list-filters"], is_flag=True, help="Show the filters that are installed."),
        click.Option(["--new-plugin"], metavar="NAME", help="Write a package with a plugin, to begin with."),
        click.Option(["--new-filter"], metavar="NAME", help="Write a package with a filter, to begin with."),
    ]


def settings_given(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of settings, by name, that click found on the command line."""
    switches = {setting.options[0]: setting.value for setting in SETTINGS if setting.is_switch}
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        value = given[setting.name]
        if value not in (None, ()):
            values[setting.name] = switches[value] if setting.is_switch else value
    return values


def load(registry: Registry, plugin: str, filters: Iterable[str]) -> Units:
    """Load the units, outermost first; the plugin is last."""
    inner = registry.plugin(plugin)
    return (*[registry.filter(name) for name in filters], inner)


class _Command(click.Command):
    """A command whose long options may be cut short, and whose help depends on the plugin."""

    _own_help: click.Option | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option:
        # In place of click's own, which is answered before the plugin is known. Made once: options are compared.
        if self._own_help is None:
            self._own_help = click.Option(["--help"], is_flag=True, help="Show this, or what PLUGIN and filters take.")
        return self._own_help

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            args = _with_whole_options(ctx, self.get_params(ctx), args)
        return super().parse_args(ctx, args)


def _with_whole_options(ctx: click.Context, params: Iterable[click.Parameter], args: Sequence[str]) -> list[str]:
    """`args` with each long option that is cut short written out, as getopt_long takes them.

    Raises:
        click.UsageError: it could be one of several options.
    """
    options = {name: option for option in params if isinstance(option, click.Option) for name in option.opts}
    whole: list[str] = []
    waiting = iter(args)
    for arg in waiting:
        if arg == "--":
            return [*whole, arg, *waiting]
        takes_next = False
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            name = _whole_option(ctx, name, options)
            arg = name + equals + value
            takes_next = not equals and name in options and not options[name].is_flag
        elif arg.startswith("-"):
            takes_next = _cluster_takes_next(arg, options)
        whole.append(arg)
        if takes_next:
            whole.extend([value for value in [next(waiting, None)] if value is not None])
    return whole


def _whole_option(ctx: click.Context, name: str, options: Mapping[str, click.Option]) -> str:
    if name in options:
        return name
    found = [whole for whole in options if whole.startswith(name)]
    if len({id(options[whole]) for whole in found}) > 1:
        raise click.UsageError(f"option {name} is ambiguous: it could be {', '.join(sorted(found))}", ctx)
    return found[0] if found else name  # of one that is unknown, click says so


def _cluster_takes_next(cluster: str, options: Mapping[str, click.Option]) -> bool:
    """Tell whether the next word is the value of the last of these short options."""
    for position, letter in enumerate(cluster[1:], start=1):
        option = options.get(f"-{letter}")
        if option is None or not option.is_flag:
            return option is not None and position == len(cluster) - 1
    return False


def _by(parse: Callable[[str], object]) -> Callable[[click.Context, click.Parameter, str | None], object]:
    """Return a click callback that parses an option's value as a unit's parameters are parsed."""

    def parsed(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise click.BadParameter(f"must be {error}, not {value!r}", ctx, param) from None

    return parsed


def _each_by(parse: Callable[[str], object]) -> Callable[[click.Context, click.Parameter, Sequence[str]], object]:
    one = _by(parse)
    return lambda ctx, param, values: tuple(one(ctx, param, value) for value in values)


# --- shell completion ---


def _item(value: str, type: str = "plain", help: str | None = None) -> CompletionItem:
    from click.shell_completion import CompletionItem  # which a server does not need

    return CompletionItem(value, type, help)


def _complete_plugin(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete_unit(Kind.PLUGIN, incomplete)


def _complete_filter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete_unit(Kind.FILTER, incomplete)


def _complete_unit(kind: Kind, incomplete: str) -> list[CompletionItem]:
    if "/" in incomplete or incomplete.startswith("."):
        return [_item(incomplete, type="file")]
    offers = Registry().names(kind)
    return [_item(offer.name, help=str(offer)) for offer in offers if offer.name.startswith(incomplete)]


def _complete_setting(
    setting: Setting,
) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    words = log.SINKS if setting.parse is log.check_sink else _words(setting.parse)
    return lambda ctx, param, incomplete: [_item(word) for word in words if word.startswith(incomplete)]


def _complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [_item(incomplete, type="file")]


def _complete_parameter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        units = load(Registry(), ctx.params["plugin"], ctx.params.get("filters") or ())
    except ConfigError:
        return []  # the command itself will say what is wrong
    declared = {key: parameter for unit in units for key, parameter in unit.cls.parameters.items()}
    key, equals, start = incomplete.partition("=")
    if equals:  # zsh and fish
        return [_item(f"{key}={word}") for word in _choices(declared, key) if word.startswith(start)]
    # bash makes three words of key=value; while there is no value yet, click takes the = away.
    before = [word for word in ctx.params.get("words") or () if word != "="][-1:]
    words = [word for key in before for word in _choices(declared, key) if word.startswith(incomplete)]
    keys = [_item(f"{key}=", help=declared[key].help) for key in declared if key.startswith(incomplete)]
    return [*map(_item, words), *([] if words else keys)]


def _choices(declared: Mapping[str, Parameter[Any]], key: str) -> Sequence[str]:
    return _words(declared[key].parse) if key in declared else ()


def _words(parse: Callable[[str], object]) -> Sequence[str]:
    words: Sequence[str] = getattr(parse, "words", ())
    return words

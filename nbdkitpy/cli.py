"""The command line: nbdkit's grammar, by click."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem

import nbdkitpy
from nbdkitpy import log
from nbdkitpy.backend import Backend, Filter, Plugin, ServerControl, ThreadModel
from nbdkitpy.config import (
    DebugFlag,
    ServerConfig,
    magic_key,
    parse_debug_flag,
    read_words,
    with_keys,
)
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import Parameter, integer, parse_delay, parse_path
from nbdkitpy.protocol.constants import HandshakeFlag
from nbdkitpy.registry import Kind, Registry, Unit
from nbdkitpy.server.options import AddressFamily, ServerOptions, Transport
from nbdkitpy.stack import Stack

__all__ = ["command", "main"]

PROGRAM = "nbdkitpy"

_MAX_THREADS = 1 << 16

#: What nbdkit's users set by -D on the server itself. Requests are never logged here, so there is nothing to set.
_SERVER_DEBUG_FLAGS = frozenset({"backend.controlpath", "backend.datapath"})
_SERVER_NAMES = ("nbdkit", PROGRAM)

#: Outermost first; the last is the plugin.
Units: TypeAlias = "tuple[Unit[Filter] | Unit[Plugin], ...]"

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

_EPILOG = """\b
Examples:
  nbdkitpy file disk.img
  nbdkitpy memory 1G --run 'nbdinfo "$uri"'
  nbdkitpy --filter=limit -U /run/disk.sock file disk.img limit=4

'nbdkitpy PLUGIN --help' shows the parameters of a plugin, and of filters given with --filter."""


def main() -> None:
    """Run the program, and exit with its status."""
    parent = os.getppid()  # before anything takes time: see exit_with_parent
    _check_standard_streams()
    os.umask(0o022)  # what sockets and files get must not depend on who starts us
    command().main(prog_name=PROGRAM, obj=parent)


def _check_standard_streams() -> None:
    # With one of them closed, the next file or socket that we open would take its number, and its reader or writer.
    closed = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, f"__{name}__") is None]
    if not closed:
        return
    if "stderr" not in closed:
        print(f"{PROGRAM}: error: {' and '.join(closed)} must be open", file=sys.stderr)
    raise SystemExit(1)


# --- the grammar ---


def command() -> click.Command:
    """Return the command with all its options."""
    options = [*_listening_options(), *_protocol_options(), *_service_options(), *_question_options()]
    return _Command(
        PROGRAM,
        params=[*options, *_arguments()],
        callback=click.pass_context(_run),
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


def _listening_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["-i", "--ipaddr", "--ip-addr", "ipaddr"],
            metavar="ADDR",
            help="Listen on this address or name; 'any' is every interface.  [default: localhost]",
        ),
        click.Option(
            ["-p", "--port", "port"], metavar="PORT", help="TCP (or vsock) port, 0 for any free one.  [default: 10809]"
        ),
        click.Option(["-4", "--ipv4-only", "address_family"], flag_value="ipv4", default=None, help="IPv4 only."),
        click.Option(["-6", "--ipv6-only", "address_family"], flag_value="ipv6", default=None, help="IPv6 only."),
        click.Option(
            ["-U", "--unix", "unix"],
            metavar="SOCKET",
            callback=_unix_path,
            help="Listen on a Unix socket; - makes a private one.",
        ),
        click.Option(["--vsock"], is_flag=True, help="Listen on AF_VSOCK."),
        click.Option(
            ["--print-uri", "--print-url", "--show-uri", "--show-url", "print_uri"],
            is_flag=True,
            help="Print the URI on standard output.",
        ),
    ]


def _protocol_options() -> list[click.Parameter]:
    return [
        click.Option(["-r", "--read-only", "--readonly", "readonly"], is_flag=True, help="Refuse all writes."),
        click.Option(
            ["-e", "--export", "--export-name", "--exportname", "export_name"],
            metavar="NAME",
            help="Export name for the URI and for --run.",
        ),
        click.Option(
            ["-n", "--newstyle", "--new-style", "style"],
            flag_value="newstyle",
            default=None,
            help="Newstyle protocol (the default).",
        ),
        click.Option(
            ["-o", "--oldstyle", "--old-style", "style"], flag_value="oldstyle", default=None, help="Oldstyle protocol."
        ),
        click.Option(
            ["--mask-handshake"],
            metavar="MASK",
            callback=_by(integer(0, (1 << 32) - 1)),
            help="Handshake flags to offer at most.",
        ),
        click.Option(
            ["--no-sr", "--no-structured-replies", "no_structured_replies"],
            is_flag=True,
            help="Refuse structured replies.",
        ),
        click.Option(["--no-mc", "--no-meta-contexts", "no_meta_contexts"], is_flag=True, help="Refuse meta contexts."),
    ]


def _service_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--filter", "filters"],
            metavar="FILTER",
            multiple=True,
            shell_complete=_complete_filter,
            help="Put a filter before the plugin; the first given is nearest to the client.",
        ),
        click.Option(
            ["-f", "--foreground", "--no-fork", "foreground"],
            is_flag=True,
            help="Stay in the foreground, as is always done.",
        ),
        click.Option(
            ["-t", "--threads", "threads"],
            metavar="N",
            callback=_by(integer(0, _MAX_THREADS)),
            help="Requests of one connection that are served at once.  [default: 16]",
        ),
        click.Option(
            ["--timeout", "--time-out", "timeout"],
            metavar="TIME",
            callback=_by(parse_delay),
            help="Time for a client's handshake, 0 for no limit.  [default: 10s]",
        ),
        click.Option(
            ["--drain"],
            metavar="TIME",
            callback=_by(parse_delay),
            help="Time for clients to take their replies at the end.  [default: 5s]",
        ),
        click.Option(
            ["--run"],
            metavar="COMMAND",
            help="Serve only while this shell command runs; it finds $uri set."
            " Implies -U - unless an address is given.",
        ),
        click.Option(
            ["-P", "--pidfile", "--pid-file", "pidfile"],
            metavar="FILE",
            callback=_by(parse_path),
            help="File for the process number, once clients can connect.",
        ),
        click.Option(["--exit-with-parent"], is_flag=True, help="End when the parent process does."),
        click.Option(["--name"], metavar="NAME", help="Name of this server, for its messages."),
        click.Option(
            ["--log"],
            metavar="SINK",
            callback=_by(log.check_sink),
            shell_complete=_complete_log,
            help="Where errors go: stderr, syslog, null or an absolute path.",
        ),
        click.Option(["-v", "--verbose", "verbose"], is_flag=True, help="Debug messages on standard error."),
        click.Option(
            ["-D", "--debug", "debug"],
            metavar="NAME.FLAG=N",
            multiple=True,
            callback=_debug_flags,
            help="Set a debug flag of a plugin, a filter or the server (nbdkitpy).",
        ),
    ]


def _question_options() -> list[click.Parameter]:
    return [
        click.Option(["-V", "--version", "version"], is_flag=True, help="Show versions."),
        click.Option(["--dump-plugin"], is_flag=True, help="Show facts about PLUGIN, for scripts."),
        click.Option(["--dump-config"], is_flag=True, help="Show facts about this installation, for scripts."),
        click.Option(["--list-plugins"], is_flag=True, help="Show the plugins that are installed."),
        click.Option(["--list-filters"], is_flag=True, help="Show the filters that are installed."),
    ]


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


def _debug_flags(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> tuple[object, ...]:
    return tuple(_by(parse_debug_flag)(ctx, param, value) for value in values)


def _unix_path(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
    return value if value == "-" else _by(parse_path)(ctx, param, value)


# --- shell completion ---


def _complete_plugin(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete_unit(Kind.PLUGIN, incomplete)


def _complete_filter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _complete_unit(Kind.FILTER, incomplete)


def _complete_unit(kind: Kind, incomplete: str) -> list[CompletionItem]:
    offers = Registry().names(kind)
    return [CompletionItem(offer.name, help=str(offer)) for offer in offers if offer.name.startswith(incomplete)]


def _complete_log(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(sink) for sink in log.SINKS if sink.startswith(incomplete)]


def _complete_parameter(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        units = _load(Registry(), ctx.params["plugin"], ctx.params.get("filters") or ())
    except ConfigError:
        return []  # the command itself will say what is wrong
    declared = {key: parameter for unit in units for key, parameter in unit.cls.parameters.items()}
    key, equals, start = incomplete.partition("=")
    if equals:  # zsh and fish
        return [CompletionItem(f"{key}={word}") for word in _choices(declared, key) if word.startswith(start)]
    # bash makes three words of key=value; while there is no value yet, click takes the = away.
    before = [word for word in ctx.params.get("words") or () if word != "="][-1:]
    words = [word for key in before for word in _choices(declared, key) if word.startswith(incomplete)]
    keys = [CompletionItem(f"{key}=", help=declared[key].help) for key in declared if key.startswith(incomplete)]
    return [*map(CompletionItem, words), *([] if words else keys)]


def _choices(declared: Mapping[str, Parameter[Any]], key: str) -> Sequence[str]:
    words: Sequence[str] = getattr(declared[key].parse, "words", ()) if key in declared else ()
    return words


# --- from options to a configuration ---


def _configuration(given: Mapping[str, Any]) -> ServerConfig:
    """What the command line means.

    Raises:
        click.UsageError: options that exclude each other.
        ConfigError: a parameter file cannot be read.
    """
    return ServerConfig(
        plugin=given["plugin"],
        filters=tuple(given["filters"]),
        parameters=read_words(given["words"]),
        server=_server_options(given),
        run=given["run"],
        print_uri=given["print_uri"],
        log=given["log"] or "default",
        name=given["name"] or "",
        verbose=given["verbose"],
        debug=tuple(given["debug"]),
        exit_with_parent=given["exit_with_parent"],
    )


def _server_options(given: Mapping[str, Any]) -> ServerOptions:
    said = {
        "address": given["ipaddr"],
        "address_family": given["address_family"] and AddressFamily(given["address_family"]),
        "port": given["port"],
        "unix_path": None if given["unix"] == "-" else given["unix"],
        "export_name": given["export_name"],
        "threads": given["threads"] or None,  # 0 is the default
        "pidfile": given["pidfile"],
        "drain": given["drain"],
        "handshake_timeout": given["timeout"],
    }
    options = ServerOptions(
        transport=_transport(given),
        readonly=given["readonly"],
        oldstyle=given["style"] == "oldstyle",
        structured_replies=not given["no_structured_replies"],
        meta_contexts=not given["no_meta_contexts"],
    )
    mask = given["mask_handshake"]
    if mask is not None:
        said["handshake_flags"] = HandshakeFlag(options.handshake_flags & mask)
    return dataclasses.replace(options, **{name: value for name, value in said.items() if value is not None})


def _transport(given: Mapping[str, Any]) -> Transport:
    """What to listen on.

    Raises:
        click.UsageError: two of them.
    """
    for one, other in (("port", "unix"), ("vsock", "unix")):
        if given[one] and given[other]:
            raise click.UsageError(f"--{one} and --{other} exclude each other: a server listens on one of them")
    if given["vsock"]:
        return Transport.VSOCK
    private = given["run"] is not None and not (given["port"] or given["ipaddr"])
    return Transport.UNIX if given["unix"] or private else Transport.TCP


# --- what is to be done ---


def _run(ctx: click.Context, /, **given: Any) -> None:
    try:
        ctx.exit(_answer(ctx, given))
    except ConfigError as error:
        click.echo(f"{PROGRAM}: error: {error}", err=True)
        ctx.exit(1)


def _answer(ctx: click.Context, given: Mapping[str, Any]) -> int:
    """Do what the options ask for, and return the exit status."""
    for kind in Kind:
        if given[f"list_{kind.value}s"]:
            return _list_units(kind)
    if given["dump_config"]:
        return _dump(_host_facts())
    if given["plugin"] is None:
        return _answer_without_plugin(ctx, given)
    for question, answer in (("help", _show_help), ("version", _show_version)):
        if given[question]:
            return answer(_load(Registry(), given["plugin"], given["filters"]))
    config = _configuration(given)
    with log.setup(config.log, name=config.name, verbose=config.verbose):
        return _start(config, parent=ctx.obj, dump_only=given["dump_plugin"])


def _answer_without_plugin(ctx: click.Context, given: Mapping[str, Any]) -> int:
    if given["help"]:
        click.echo(ctx.get_help())
    elif given["version"]:
        click.echo(f"{PROGRAM} {nbdkitpy.__version__}")
    else:
        raise click.UsageError("no plugin is given; nbdkitpy --list-plugins shows what there is")
    return 0


def _load(registry: Registry, plugin: str, filters: Iterable[str]) -> Units:
    """Load the units, outermost first; the plugin is last."""
    inner = registry.plugin(plugin)
    return (*[registry.filter(name) for name in filters], inner)


def _start(config: ServerConfig, parent: int, dump_only: bool) -> int:
    """Load and configure the stack, then serve it, or only tell of it; return the exit status."""
    from nbdkitpy.server.launch import exit_with_parent, launch, report
    from nbdkitpy.server.service import Server

    try:
        if config.exit_with_parent:
            exit_with_parent(parent)
        units = _load(Registry(), config.plugin, config.filters)
        server = Server(config.server)
        stack = _loaded_stack(units, server, config.debug)
        with contextlib.ExitStack() as undo:
            undo.callback(stack.unload)
            for key, value in with_keys(config.parameters, config.plugin, stack.plugin.parameters):
                stack.config(key, value)
            if dump_only:
                return _dump(_plugin_facts(units, stack))
            undo.pop_all()  # launch sees to it
    except Exception as error:  # a unit's may be anything
        report("cannot start", error)
        return 1
    return launch(
        server,
        stack,
        command=config.run,
        pidfile=config.server.pidfile,
        export_name=config.server.export_name,
        announce=config.verbose or sys.stderr.isatty(),
        print_uri=config.print_uri,
    )


def _loaded_stack(units: Units, server: ServerControl, flags: Iterable[DebugFlag]) -> Stack:
    *outer, inner = [unit.cls() for unit in units]
    assert isinstance(inner, Plugin)
    stack = Stack(inner, [layer for layer in outer if isinstance(layer, Filter)], server)
    _set_debug_flags(stack.layers, flags)
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


# --- information ---


def _list_units(kind: Kind) -> int:
    offers = Registry().names(kind)
    width = max((len(offer.name) for offer in offers), default=0)
    for offer in offers:
        click.echo(f"{offer.name:{width}}  {offer}")
    return 0


def _show_version(units: Units) -> int:
    click.echo(f"{PROGRAM} {nbdkitpy.__version__}")
    for unit in units:
        click.echo(f"{unit.cls.name} {unit.version}")
    return 0


def _show_help(units: Units) -> int:
    formatter = click.HelpFormatter(width=100)
    formatter.write_usage(PROGRAM, f"[OPTIONS] {units[-1].cls.name} [[KEY=]VALUE | @PATH]...")
    for unit in units:
        _write_unit_help(formatter, unit.cls)
    formatter.write_paragraph()
    formatter.write_text(f"The options: {PROGRAM} --help")
    click.echo(formatter.getvalue().rstrip("\n"))
    return 0


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


def _dump(facts: Mapping[str, object]) -> int:
    for key, value in facts.items():
        click.echo(f"{key}={value}")
    return 0


def _host_facts() -> dict[str, object]:
    """What scripts ask of nbdkit's --dump-config, as far as it is a question here, and what Python this is."""
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
        "tls": "no",
        "vsock_option": "yes",
    }


def _plugin_facts(units: Units, stack: Stack) -> dict[str, object]:
    """Of the plugin, which has its parameters but has not checked them, and of the filters after it."""
    plugin, unit = stack.plugin, units[-1]
    magic = magic_key(plugin.parameters)
    facts: dict[str, object] = {
        "path": unit.path,
        "name": plugin.name,
        "version": unit.version,
        "distribution": unit.offer.distribution,
        "thread_model": ThreadModel(plugin.thread_model()).name.lower(),
        **({"magic_config_key": magic} if magic else {}),
    }
    own = (name for name in _DUMPED_METHODS if getattr(type(plugin), name) is not getattr(Plugin, name))
    facts.update({f"has_{name}": 1 for name in own})
    facts.update(plugin.dump())
    for each, layer in zip(units, stack.filters):
        facts.update({f"{layer.name}_path": each.path, f"{layer.name}_name": layer.name, **layer.dump()})
    return facts

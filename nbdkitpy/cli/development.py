"""``--reload``: one process listens, another one serves, and is begun anew when the code of its units changes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TypeVar

from nbdkitpy import log
from nbdkitpy.cli import start
from nbdkitpy.config import ServerConfig
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.modules import parse
from nbdkitpy.server.failures import Reported, reported
from nbdkitpy.server.front import Front
from nbdkitpy.server.starttls import load_tls
from nbdkitpy.server.supervisor import Elsewhere, Link, Supervisor
from nbdkitpy.sources import Sources
from nbdkitpy.stack import Stack

__all__ = ["prepare"]

#: Key of the parameter by which a plugin is told what code to run.
_SCRIPT = "script"

T = TypeVar("T")


def prepare(config: ServerConfig) -> start.Prepared:
    """Return a server that has what `config` says served by another process, as the code then is.

    Raises:
        ConfigError: this system or its settings do not allow it.
    """
    server = Supervisor(config.server, functools.partial(_serve, config))
    server.tls = load_tls(config.server)
    # To read a configuration file again is for the other process. But where there is one, SIGHUP does not end us.
    return start.Prepared(server, Elsewhere(server), None if config.file is None else log.reopen)


def _serve(whole: ServerConfig, link: Link) -> int:
    """Serve, as the process that does so, until the supervisor ends it; return the exit status."""
    # What the world sees of a server is left to the supervisor.
    server = whole.server._replace(endpoints=link.endpoints, pidfile=None)
    config = whole._replace(server=server, run=None, print_uri=False, selinux_label=None)
    with start.log_of(config):
        try:
            with reported("cannot start"):
                prepared = start.prepare(config, _watched(config, Sources(link.reads)))
        except Reported:
            return 1
        assert isinstance(prepared.server, Front), "with -s there is nothing to listen on"
        prepared.server.follow(link.fileno())
        return start.run(config, prepared, link, announce=False)


def _watched(config: ServerConfig, sources: Sources) -> Callable[[Stack], None]:
    """Have all code watched from now on; return what has to look at the stack before it has parameters."""
    sources.watch_imports()
    for location in map(parse, (*config.filters, config.plugin)):
        if location is not None:
            sources.add(location)
    return functools.partial(_watch_scripts, sources)


def _watch_scripts(sources: Sources, stack: Stack) -> None:
    scripts = [layer.parameters[_SCRIPT] for layer in stack.layers if _SCRIPT in layer.parameters]
    for script in scripts:
        script.parse = functools.partial(_told_of, sources, script.parse)
    if sources.is_empty and not scripts:
        names = ", ".join(layer.name for layer in stack.layers)
        raise ConfigError(
            f"--reload: there is no code to watch: {names} have been installed, and take no script; give a plugin or"
            " filter by its path, or as package.module:Class"
        )


def _told_of(sources: Sources, parse: Callable[[str], T], text: str) -> T:
    """Parse the path of a script; but first have the file watched, whether it is there now or not."""
    sources.add_file(os.path.abspath(text))
    return parse(text)

"""The hooks by which packages hand over their plugins and filters; called once, at start-up."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

from nbdkitpy.backend import Filter, Plugin

__all__ = ["PROJECT", "hookimpl", "register_filters", "register_plugins"]

PROJECT = "nbdkitpy"

hookspec = pluggy.HookspecMarker(PROJECT)

#: Marks a function of a package's module as the implementation of a hook.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec(historic=True)
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    """Call ``register`` with each plugin class of this module."""


@hookspec(historic=True)
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Call ``register`` with each filter class of this module."""

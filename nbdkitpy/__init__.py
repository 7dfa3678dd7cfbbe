"""nbdkitpy: a Network Block Device server toolkit in Python.

Everything that a plugin or a filter needs is here; nothing else of the package is for them. :func:`serve` is for
programs that serve them.
"""

from typing import TYPE_CHECKING

from nbdkitpy.backend import (
    AsyncHandle,
    AsyncPlugin,
    Backend,
    BlockSize,
    Buffer,
    Client,
    Export,
    Family,
    FileRange,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Plugin,
    ServerControl,
    SharedCount,
    Support,
    ThreadModel,
)
from nbdkitpy.exceptions import ConfigError, NbdkitpyError, UnitError
from nbdkitpy.extents import Extent, ExtentType, normalise_extents
from nbdkitpy.hookspecs import hookimpl
from nbdkitpy.locks import RangeLock
from nbdkitpy.parameters import (
    Parameter,
    Repeated,
    choice,
    integer,
    parse_bool,
    parse_delay,
    parse_filename,
    parse_path,
    parse_probability,
    parse_size,
    parse_string,
    read_password,
)
from nbdkitpy.ranges import range_of

if TYPE_CHECKING:
    from nbdkitpy.library import EmbeddedServer, serve
else:

    def __getattr__(name: str) -> object:
        # Plugins need none of this, and servers that run plugins have no time for it.
        if name not in ("EmbeddedServer", "serve"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from nbdkitpy import library

        return getattr(library, name)


__version__ = "0.1.0"

__all__ = [
    "AsyncHandle",
    "AsyncPlugin",
    "Backend",
    "BlockSize",
    "Buffer",
    "Client",
    "ConfigError",
    "EmbeddedServer",
    "Export",
    "Extent",
    "ExtentType",
    "Family",
    "FileRange",
    "Filter",
    "FilterHandle",
    "Flags",
    "Handle",
    "NbdkitpyError",
    "Parameter",
    "Plugin",
    "RangeLock",
    "Repeated",
    "ServerControl",
    "SharedCount",
    "Support",
    "ThreadModel",
    "UnitError",
    "__version__",
    "choice",
    "hookimpl",
    "integer",
    "normalise_extents",
    "parse_bool",
    "parse_delay",
    "parse_filename",
    "parse_path",
    "parse_probability",
    "parse_size",
    "parse_string",
    "range_of",
    "read_password",
    "serve",
]

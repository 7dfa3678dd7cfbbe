"""For those who write plugins, filters, and programs that use them: a client, and tests that every unit has to pass.

Nothing is imported before it is asked for, as pytest loads a part of this for everybody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdkitpy.protocol.constants import Command, CommandFlag, TransmissionFlag
    from nbdkitpy.testing.client import ExportInfo, NbdClient, export_info, list_exports
    from nbdkitpy.testing.conformance import FilterConformance, PluginConformance
    from nbdkitpy.testing.pytest_plugin import ConnectNbd, ServeNbd
    from nbdkitpy.testing.wire import ProtocolError, Refused, Reply, Style
else:
    _MODULES = {
        "nbdkitpy.protocol.constants": ("Command", "CommandFlag", "TransmissionFlag"),
        "nbdkitpy.testing.client": ("ExportInfo", "NbdClient", "export_info", "list_exports"),
        "nbdkitpy.testing.conformance": ("FilterConformance", "PluginConformance"),
        "nbdkitpy.testing.pytest_plugin": ("ConnectNbd", "ServeNbd"),
        "nbdkitpy.testing.wire": ("ProtocolError", "Refused", "Reply", "Style"),
    }

    def __getattr__(name: str) -> object:
        import importlib

        for module, names in _MODULES.items():
            if name in names:
                return getattr(importlib.import_module(module), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Command",
    "CommandFlag",
    "ConnectNbd",
    "ExportInfo",
    "FilterConformance",
    "NbdClient",
    "PluginConformance",
    "ProtocolError",
    "Refused",
    "Reply",
    "ServeNbd",
    "Style",
    "TransmissionFlag",
    "export_info",
    "list_exports",
]

"""What processes that tests start find in their environment."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import nbdkitpy

#: The program, as users start it: first words of a command.
NBDKITPY = (str(Path(sysconfig.get_path("scripts"), "nbdkitpy")),)

#: What ``python -m nbdkitpy`` runs. By path, as pytest's own importer, which imports all of what offers it a plugin,
#: cannot run modules.
MAIN = str(Path(nbdkitpy.__file__).with_name("__main__.py"))


def without_coverage() -> dict[str, str]:
    """Return our environment, but so that a child's modules are its own and not those of the measuring."""
    return {key: value for key, value in os.environ.items() if not key.startswith("COVERAGE_PROCESS")}

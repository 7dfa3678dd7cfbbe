"""The command line: nbdkit's grammar, by click.

``grammar`` is what may stand there, ``program`` what it means and what is to be done, ``information`` answers to
questions, ``start`` the way from a configuration to a server.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click

__all__ = ["command", "main"]


def main() -> None:
    """Run the program, and exit with its status."""
    # What is imported stays, so to look for garbage among it is in vain, and takes a sixteenth of the start. `start`
    # has it looked for once there is something to serve.
    gc.disable()
    try:
        from nbdkitpy.cli import program

        program.main()
    finally:
        gc.enable()


def command() -> click.Command:
    """Return the command with all its options."""
    from nbdkitpy.cli import program

    return program.command()

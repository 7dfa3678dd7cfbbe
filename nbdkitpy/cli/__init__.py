"""The command line: nbdkit's grammar, by click.

``grammar`` is what may stand there, ``program`` what it means and what is to be done, ``information`` answers to
questions, ``start`` the way from a configuration to a server.
"""

from nbdkitpy.cli.program import command, main

__all__ = ["command", "main"]

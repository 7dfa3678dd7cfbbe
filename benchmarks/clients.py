"""Clients that are commands: how they are run, and what they have to know of a server."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What a client may take beyond the time that it was told to run.
GRACE_SECONDS = 60.0


class BenchmarkError(Exception):
    """Something that is needed is missing, or a server or client failed."""


@dataclass(frozen=True)
class Target:
    """What a client needs to know of a server: its URI, the size of its disk in bytes, and the image it began as."""

    uri: str
    size: int
    image: Path


def run_client(command: Sequence[str], seconds: float) -> str:
    """Run a client that should take about so many seconds; return its output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{command[0]} did not end: {' '.join(command)}") from error
    except subprocess.CalledProcessError as error:
        raise BenchmarkError(f"{command[0]} failed: {' '.join(command)}\n{error.stderr}".rstrip()) from error
    return done.stdout


def version(command: Sequence[str]) -> str:
    """Return the first line that a command prints."""
    return run_client(command, 0).partition("\n")[0]

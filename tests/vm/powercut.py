"""Cuts the power of the virtual machine while clients write, and boots it again to see what is left.

What is lost is what the machine's kernel had not written to its disk: killing qemu loses nothing that has reached it,
as the host keeps that. So this is about whether servers have the kernel write what they acknowledge as stable, and
whether that can be read again, and not about disks that lie.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tests.vm.machine import Machine

POWER_CUT = "powercut"

#: Bytes of the disk that is cut off, and how many flushes of each writer are to be acknowledged before.
SIZE = 256 << 20
ENOUGH = 25

_COMMAND = ("python3", "-B", "tests/vm/guest/powercut.py")
_REACHED = re.compile(r"reached (\w+) (\d+)$")


def cut_power(machine: Machine, data: Path) -> bool:
    """Cut it, and return whether all that had been acknowledged as stable is there afterwards.

    Args:
        data: Where to make the image of a disk.
    """
    with data.open("wb") as image:
        image.truncate(SIZE)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", data], check=True)
    reached: dict[str, int] = {}
    with machine.booted([*_COMMAND, "write"], data=data) as running:
        if not _follow(running.lines, reached, ENOUGH):
            return False
        running.cut_power()
        _follow(running.lines, reached)  # what had been said when the power was cut, and not been heard
    print(f"The power has been cut. So many blocks had been acknowledged: {reached}", flush=True)
    return machine.run([*_COMMAND, "check", *(f"{name}={count}" for name, count in reached.items())], data=data)


def _follow(lines: Iterable[str], reached: dict[str, int], enough: int | None = None) -> bool:
    """Take note of how far the writers have come, until each has said so often enough; False if they end before."""
    said: Counter[str] = Counter()
    names: list[str] = []
    for line in lines:
        if match := _REACHED.match(line):
            reached[match[1]] = int(match[2])
            said[match[1]] += 1
            if enough and names and all(said[name] >= enough for name in names):
                return True
        elif line.startswith("writers "):
            names = line.split()[1:]
        else:
            print(line, flush=True)
    return False

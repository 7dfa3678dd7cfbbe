"""Tests the service in a virtual machine of its own: real vsock, the kernel's NBD client, real systemd, a power cut.

``run.py [WORD]`` makes the machine if need be, boots it, and shows what the tests in it have to say: those whose names
have WORD in them, or all of them. Then it does so twice more, the first time with the power cut while clients write;
that alone if WORD is ``powercut``. It ends with status 0 if all is well.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.vm.machine import CACHE, CONSOLE, PATIENCE, Machine  # noqa: E402
from tests.vm.powercut import POWER_CUT, cut_power  # noqa: E402

#: A test is a line; what did not pass is shown at the end.
PYTEST = (
    *("python3", "-B", "-m", "pytest", "-v", "--tb=short", "--color=no", "--no-header", "-p", "no:cacheprovider"),
    *("-c", "/dev/null", "--rootdir=/srv", "--import-mode=importlib", "--timeout=100", "--timeout-method=thread"),
    "tests/vm/guest",
)


def main(words: Sequence[str]) -> int:
    """Run the tests, and return the exit status."""
    if platform.machine() != "x86_64":
        print("run.py: the recipe of the machine is for x86-64 only", file=sys.stderr)
        return 1
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        machine = Machine(Path(directory))
        all_is_well = True
        if words != [POWER_CUT]:
            all_is_well = machine.run([*PYTEST, *(word for each in words for word in ("-k", each))])
        if not words or words == [POWER_CUT]:
            all_is_well &= cut_power(machine, Path(directory, "data"))
    if not all_is_well:
        print(f"run.py: something has failed, or did not end in {PATIENCE} s; the console is in {CONSOLE}")
    return 0 if all_is_well else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

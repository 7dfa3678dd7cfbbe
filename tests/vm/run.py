"""Tests the service in a virtual machine of its own: real vsock, the kernel's NBD client, real systemd.

``run.py [PYTEST-ARGUMENT]…`` makes the machine if need be, boots it, and shows what the tests in it have to say. It
ends with status 0 if all of them have passed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RECIPE = HERE / "image.sh"

#: The machine's disk, kernel and initial RAM disk are here, in a directory for each version of the recipe.
CACHE = REPOSITORY / "build" / "vm"

#: Seconds that the machine may take from power-on to power-off. Emulated it needs about a third of it.
PATIENCE = 600

#: What start.sh says at the very end if all tests have passed.
SUCCESS = "The tests have ended with status 0."


def main(arguments: Sequence[str]) -> int:
    """Run the tests that these arguments of pytest select, and return the exit status."""
    if platform.machine() != "x86_64":
        print("run.py: the recipe of the machine is for x86-64 only", file=sys.stderr)
        return 1
    machine = _machine()
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        payload = Path(directory, "payload.tar")
        _pack(payload, _wheels(Path(directory, "wheels")), arguments)
        return _boot(machine, payload)


def _machine() -> Path:
    """Return the directory of the machine, which is made unless it is there."""
    made = CACHE / hashlib.sha256(RECIPE.read_bytes()).hexdigest()[:16]
    if not made.exists():
        print("Making the virtual machine, which takes some minutes, once.", flush=True)
        CACHE.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=CACHE))
        try:
            making.chmod(0o755)  # mmdebstrap may use another user number
            subprocess.run(["sh", RECIPE, making], stdin=subprocess.DEVNULL, check=True)
            making.rename(made)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return made


def _wheels(directory: Path) -> Path:
    """Return the directory, with the wheels of nbdkitpy and what it depends on."""
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-qq", "-w", directory, REPOSITORY], check=True)
    return directory


def _pack(payload: Path, wheels: Path, arguments: Iterable[str]) -> None:
    """Make the second disk, which is an archive and nothing else."""
    given = wheels.with_name("arguments")
    given.write_bytes(b"".join(os.fsencode(argument) + b"\0" for argument in arguments))
    with tarfile.open(payload, "w") as archive:
        archive.add(wheels, "wheels")
        archive.add(given, "arguments")
        archive.add(
            HERE / "guest", "tests/vm/guest", filter=lambda entry: None if "__pycache__" in entry.name else entry
        )


def _boot(machine: Path, payload: Path) -> int:
    """Run the machine until it is off, show what it says on its second serial line, and return the exit status."""
    console = CACHE / "console.log"
    with subprocess.Popen(
        [
            *("qemu-system-x86_64", *_processor(), "-smp", "2", "-m", "1G"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", machine / "vmlinuz", "-initrd", machine / "initrd"),
            *("-append", "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off quiet"),
            *("-drive", f"file={machine}/root.img,format=raw,if=virtio,snapshot=on"),
            *("-drive", f"file={payload},format=raw,if=virtio,readonly=on"),
            *("-serial", f"file:{console}", "-serial", "stdio"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as qemu:
        limit = threading.Timer(PATIENCE, qemu.kill)
        limit.start()
        try:
            has_passed = _show(qemu.stdout or ())
        finally:
            limit.cancel()
            qemu.kill()
    if not has_passed:
        print(f"run.py: the tests have failed, or did not end in {PATIENCE} s; the console is in {console}")
    return 0 if has_passed else 1


def _processor() -> tuple[str, ...]:
    # Not every /dev/kvm can run a kernel as it is: the paravirtual ones, of virtual machines themselves, cannot.
    hardware = any(os.path.exists(f"/sys/module/{module}") for module in ("kvm_intel", "kvm_amd"))
    if hardware and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "-accel", "kvm", "-cpu", "host"
    return "-accel", "tcg,thread=multi", "-cpu", "qemu64"


def _show(lines: Iterable[str]) -> bool:
    """Print the lines as they come; return whether one of them says that all is well."""
    has_passed = False
    for line in lines:
        print(line.rstrip("\r\n"), flush=True)
        has_passed = has_passed or line.strip() == SUCCESS
    return has_passed


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

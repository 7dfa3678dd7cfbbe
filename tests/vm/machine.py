"""The virtual machine: made once, and then booted as often as need be, with what it is to do on a disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
RECIPE = HERE / "image.sh"

#: The machine's disk, kernel and initial RAM disk are here, in a directory for each version of the recipe.
CACHE = REPOSITORY / "build" / "vm"

#: Where the kernel's messages of the last boot are.
CONSOLE = CACHE / "console.log"

#: Seconds that the machine may take from power-on to power-off. Emulated it needs about a third of it.
PATIENCE = 600

#: What start.sh says at the very end if its command has ended well.
SUCCESS = "The tests have ended with status 0."


class Running(NamedTuple):
    """A machine that has been booted."""

    lines: Iterator[str]  #: that it says, until it is off
    cut_power: Callable[[], None]  #: what has not reached the third disk by then is lost


class Machine:
    """A machine that is ready to boot, and the wheels of what is tested in it.

    Args:
        directory: For what is only needed as long as this is.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = _made()
        self._wheels = directory / "wheels"
        subprocess.run([sys.executable, "-m", "pip", "wheel", "-qq", "-w", self._wheels, REPOSITORY], check=True)

    @contextlib.contextmanager
    def booted(self, command: Sequence[str], *, data: Path | None = None) -> Iterator[Running]:
        """Boot, have `command` run there, and yield the machine that does so; it does not run on after this.

        Args:
            command: Its words, in the directory above ``tests``.
            data: Image of a third disk.
        """
        with subprocess.Popen(
            [
                *("qemu-system-x86_64", *_processor(), "-smp", "2", "-m", "1G"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-kernel", self._files / "vmlinuz", "-initrd", self._files / "initrd"),
                *("-append", "root=/dev/vda rw console=ttyS0 panic=-1 mitigations=off quiet"),
                *("-drive", f"file={self._files}/root.img,format=raw,if=virtio,snapshot=on"),
                *("-drive", f"file={self._payload(command)},format=raw,if=virtio,readonly=on"),
                *(("-drive", f"file={data},format=raw,if=virtio,cache=writeback") if data else ()),
                *("-serial", f"file:{CONSOLE}", "-serial", "stdio"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        ) as qemu:
            limit = threading.Timer(PATIENCE, qemu.kill)
            limit.start()
            try:
                yield Running(_lines(qemu.stdout), qemu.kill)
            finally:
                limit.cancel()
                qemu.kill()

    def run(self, command: Sequence[str], *, data: Path | None = None) -> bool:
        """Boot, show what `command` says until the machine is off, and return whether it has ended well."""
        has_passed = False
        with self.booted(command, data=data) as running:
            for line in running.lines:
                print(line, flush=True)
                has_passed = has_passed or line.strip() == SUCCESS
        return has_passed

    def _payload(self, command: Iterable[str]) -> Path:
        """Make the second disk, which is an archive and nothing else."""
        words = self._directory / "command"
        words.write_bytes(b"".join(os.fsencode(word) + b"\0" for word in command))
        payload = self._directory / "payload.tar"
        with tarfile.open(payload, "w") as archive:
            archive.add(self._wheels, "wheels")
            archive.add(words, "command")
            archive.add(
                HERE / "guest", "tests/vm/guest", filter=lambda entry: None if "__pycache__" in entry.name else entry
            )
        return payload


def _lines(stream: IO[str] | None) -> Iterator[str]:
    for line in stream or ():
        yield line.rstrip("\r\n")


def _made() -> Path:
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


def _processor() -> tuple[str, ...]:
    # Not every /dev/kvm can run a kernel as it is: the paravirtual ones, of virtual machines themselves, cannot.
    hardware = any(os.path.exists(f"/sys/module/{module}") for module in ("kvm_intel", "kvm_amd"))
    if hardware and os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "-accel", "kvm", "-cpu", "host"
    return "-accel", "tcg,thread=multi", "-cpu", "qemu64"

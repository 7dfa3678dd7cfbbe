"""Commands of the documentation, as they stand: in a shell, with the real clients."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import ROOT, named, section_of
from tests.environment import NBDKITPY
from tests.examples import Commands, commands_that_are_run, in_place, make_place
from tests.interop.harness import DEBIANS_PYTHON, PATIENCE, Tool, environment

pytestmark = pytest.mark.interop

EXAMPLES = commands_that_are_run(only_serve=False)
PAGES = sorted({each.page for each in EXAMPLES})

#: Clients, and the packages that have them.
PACKAGES = {
    "certtool": "gnutls-bin",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "psktool": "gnutls-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
}

#: What else may be run, as all that it does is done in the place.
HARMLESS = {"echo", "eval", "mkdir", "printf", "touch", "truncate", "nbdkitpy", "./ramdisk.py"}

#: What a shell finds as ``nbdkitpy``: the program, which listens where nobody else does, and says what is to be ended.
PROGRAM = """\
#!/bin/sh
case " $* " in
  *" --run "* | *" --help "* | *"-config "* | *" --exit-with-parent "*) ;;
  *" --reload "*) set -- --run true "$@" ;;  # which stays in the foreground
  *" -U "*) set -- -P "$PIDS/$$" "$@" ;;
  *) set -- -P "$PIDS/$$" -p "$PORT" "$@" ;;
esac
exec {program} "$@"
"""

#: What is said of the output, in the page around the command.
OUTPUT = {
    "docs/index.md": "virtual size: 256 MiB",
    "docs/service.md": "1073741824",
    "docs/tutorial.md": "Hello, disk!",
    "docs/writing-a-filter.md": "HELLO, DISK!",
}


class Shell:
    """Runs commands in a directory, and ends the servers that they have left."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._pids = place / "pids"
        self._pids.mkdir()
        programs = place / "programs"
        programs.mkdir()
        (programs / "nbdkitpy").write_text(PROGRAM.format(program=shlex.join(NBDKITPY)))
        (programs / "nbdkitpy").chmod(0o755)
        (programs / "python3").symlink_to(DEBIANS_PYTHON)  # which nbdsh needs
        path = f"{programs}:{os.environ.get('PATH', os.defpath)}"
        self._environment = {"PATH": path, "PIDS": str(self._pids), "PYTHONPATH": str(place)}

    def run(self, example: Commands) -> str:
        assert not example.programs - HARMLESS - PACKAGES.keys(), "mark it as not run, or say that it is harmless"
        text = in_place(example.text, self._place)
        port = 0  # any: there may be several servers
        if "nbd://localhost" in text:
            port = free_port()
            text = text.replace("nbd://localhost", f"nbd://localhost:{port}")
        with self._ending_servers():
            done = subprocess.run(
                ["bash", "-e", "-c", text],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=self._place,
                env=environment({**self._environment, "PORT": str(port)}),
                timeout=PATIENCE,
                check=False,
            )
        assert done.returncode == 0, f"{example}:\n{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def _ending_servers(self) -> Iterator[None]:
        try:
            yield
        finally:
            for path in self._pids.iterdir():
                end(int(path.read_text()))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def end(pid: int) -> None:
    """End a process that is not a child of ours, and wait until it has."""
    with contextlib.suppress(ProcessLookupError):  # it has left by itself
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            ended, _, _ = select.select([descriptor], [], [], PATIENCE)
            assert ended
        finally:
            os.close(descriptor)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_of_a_page_do_what_it_says(page: Path, tmp_path: Path) -> None:
    examples = [each for each in EXAMPLES if each.page == page]
    for client in PACKAGES.keys() & set(re.findall(r"[\w-]+", " ".join(each.text for each in examples))):
        Tool(client, PACKAGES[client])  # or the test is skipped
    make_place(tmp_path, page)
    shell = Shell(tmp_path)

    output = "".join(shell.run(each) for each in examples)

    assert OUTPUT.get(named(page), "") in output


def test_every_option_of_nbdkit_stands_beside_ours() -> None:
    usage = Tool("nbdkit", "nbdkit")("--help")
    page = section_of(ROOT / "docs" / "coming-from-nbdkit.md", "The command line")

    options = set(re.findall(r"--[\w-]+", usage))

    assert options
    assert not [option for option in options if f"`{option}`" not in page]

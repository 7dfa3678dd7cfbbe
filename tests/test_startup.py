"""What a start of ``nbdkitpy null`` imports, up to the first reply: each module more is time that a client waits.

A module that is missing in these lists may be added, if every server needs it. What only some need is imported by the
function that needs it. Modules such as asyncio, dataclasses, importlib.metadata, json, ssl or subprocess are no
small matter: each takes milliseconds, or tens of them.
"""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdkitpy import cli
from tests.environment import NBDKITPY, without_coverage
from tests.nbdclient import NbdClient

#: Our own modules, plugins included.
OURS = {
    "nbdkitpy",
    "nbdkitpy.backend",
    "nbdkitpy.cli",
    "nbdkitpy.cli.grammar",
    "nbdkitpy.cli.information",
    "nbdkitpy.cli.program",
    "nbdkitpy.cli.start",
    "nbdkitpy.config",
    "nbdkitpy.config.settings",
    "nbdkitpy.config.units",
    "nbdkitpy.config.words",
    "nbdkitpy.distributions",
    "nbdkitpy.exceptions",
    "nbdkitpy.extents",
    "nbdkitpy.hookspecs",
    "nbdkitpy.locks",
    "nbdkitpy.log",
    "nbdkitpy.parameters",
    "nbdkitpy.protocol",
    "nbdkitpy.protocol.buffers",
    "nbdkitpy.protocol.constants",
    "nbdkitpy.protocol.errors",
    "nbdkitpy.protocol.handshake",
    "nbdkitpy.protocol.messages",
    "nbdkitpy.protocol.replies",
    "nbdkitpy.protocol.transmission",
    "nbdkitpy.ranges",
    "nbdkitpy.registry",
    "nbdkitpy.server",
    "nbdkitpy.server.batch",
    "nbdkitpy.server.budget",
    "nbdkitpy.server.checks",
    "nbdkitpy.server.commands",
    "nbdkitpy.server.connections",
    "nbdkitpy.server.engine",
    "nbdkitpy.server.failures",
    "nbdkitpy.server.front",
    "nbdkitpy.server.launch",
    "nbdkitpy.server.linux",
    "nbdkitpy.server.listener",
    "nbdkitpy.server.options",
    "nbdkitpy.server.pidfile",
    "nbdkitpy.server.privileges",
    "nbdkitpy.server.reads",
    "nbdkitpy.server.sender",
    "nbdkitpy.server.service",
    "nbdkitpy.server.session",
    "nbdkitpy.server.starttls",
    "nbdkitpy.server.transport",
    "nbdkitpy.server.uri",
    "nbdkitpy.server.wakeup",
    "nbdkitpy.server.ways",
    "nbdkitpy.server.workers",
    "nbdkitpy.stack",
    "nbdkitpy_plugins",
    "nbdkitpy_plugins.null",
}

#: Modules of others, with all that they import themselves.
OTHERS = (
    "click",
    "difflib",  # by newer versions of click, for each short option
    "encodings.unicode_escape",
    "errno",
    "gc",
    "grp",
    "locale",  # by gettext, for click
    "logging",
    "mmap",
    "pluggy",
    "pwd",
    "queue",
    "resource",
    "select",
    "shlex",
    "signal",
    "socket",
    "struct",
    "syslog",
    "threading",
    "time",
)

#: Runs a script, and names at its end all modules that there are then.
RUN = """
import atexit, sys
atexit.register(lambda: print(*sys.modules))
del sys.argv[0]
exec(open(sys.argv[0]).read())
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """All that is imported until a client has its first reply, and at the end."""
    path = tmp_path_factory.mktemp("start") / "socket"
    with subprocess.Popen(
        [sys.executable, "-c", RUN, *NBDKITPY, "-f", "-U", path, "--print-uri", "null", "1M"],
        stdout=subprocess.PIPE,
        text=True,
        env=without_coverage(),
    ) as server:
        assert server.stdout is not None
        assert str(path) in server.stdout.readline()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            assert NbdClient(sock).negotiate().read(0, 512) == bytes(512)
        server.terminate()
        output, _ = server.communicate(timeout=60)
    assert server.returncode == 0
    return set(output.splitlines()[-1].split())


def is_ours(module: str) -> bool:
    return module.startswith("nbdkitpy")


def test_only_the_modules_of_ours_that_are_needed_are_imported(modules: set[str]) -> None:
    assert set(filter(is_ours, modules)) == OURS


def test_no_other_modules_than_needed_are_imported(modules: set[str]) -> None:
    code = f"import sys, {', '.join(OTHERS)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, env=without_coverage()
    )

    assert {module for module in modules if not is_ours(module)} - set(done.stdout.split()) == set()


PROGRAM = """
import gc
from nbdkitpy.cli import main
from nbdkitpy.server import service

class Server(service.Server):
    def __init__(self, *args):
        print(gc.isenabled())
        super().__init__(*args)

    def serve(self, stack):
        print(gc.isenabled(), gc.get_freeze_count() > 10_000)
        return True

service.Server = Server
main()
"""


def test_garbage_is_looked_for_only_when_there_is_something_to_serve(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-f", "-U", tmp_path / "socket", "null"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=without_coverage(),
    )

    assert done.stdout == "False\nTrue True\n"


def test_garbage_is_looked_for_again_after_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdkitpy.cli.program.main", lambda: seen.append(gc.isenabled()))
    seen: list[bool] = []

    cli.main()

    assert seen == [False]
    assert gc.isenabled()

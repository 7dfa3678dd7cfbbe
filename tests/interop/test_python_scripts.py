"""Scripts of the python plugin under us and under the real nbdkit, with the same results; and in real runs."""

from __future__ import annotations

import http.server
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.environment import NBDKITPY
from tests.interop.harness import DEBIANS_PYTHON, MIB, PATIENCE, Servers, Tool, missing, run
from tests.interop.sidebyside import IMAGE, Request, SideBySide, random_requests

pytestmark = pytest.mark.interop

SCRIPTS = Path(__file__).parents[1] / "plugins" / "python" / "scripts"
BLOCK = 65536

SEEDS = pytest.mark.parametrize("seed", [1, 2])


@pytest.fixture(scope="module", autouse=True)
def nbdkit() -> Tool:
    """The real one, with its python plugin."""
    nbdkit = Tool("nbdkit", "nbdkit")
    try:
        nbdkit("python", "--version")
    except pytest.fail.Exception:
        missing("nbdkit has no python plugin (Debian's package nbdkit-plugin-python)")
    return nbdkit


@SEEDS
@pytest.mark.parametrize("words", [(), ("-r",)], ids=["writable", "readonly"])
@pytest.mark.parametrize("script", ["ramdisk.py", "ramdisk1.py"])
def test_ramdisk(side_by_side: SideBySide, script: str, words: tuple[str, ...], seed: int) -> None:
    requests = random_requests(seed, MIB)

    outcome = side_by_side.compare(*words, "python", IMAGE, "size=1M", requests=requests, image=SCRIPTS / script)

    assert outcome is not None
    assert outcome["facts"]["size"] == MIB


@SEEDS
def test_file(side_by_side: SideBySide, tmp_path: Path, seed: int) -> None:
    # The script serves itself, which it may as Python has read it by then; so a copy of it is all that is needed.
    image = tmp_path / "disk.py"
    letters = random.Random(seed).choices(b"abcdefghij", k=MIB)
    image.write_bytes(((SCRIPTS / "file.py").read_bytes() + b"# " + bytes(letters))[:MIB])

    side_by_side.compare("python", IMAGE, f"file={IMAGE}", requests=random_requests(seed, MIB), image=image)


def test_error(side_by_side: SideBySide) -> None:
    size = BLOCK * 12
    requests = [
        Request(verb, 512, offset)
        for offset in range(0, size, BLOCK)
        for verb in ("pread", "pwrite", "trim", "cache", "extents")
    ]

    outcome = side_by_side.compare("python", IMAGE, requests=requests, image=SCRIPTS / "error.py")

    assert outcome is not None
    answers = {answer for answer in outcome["answers"] if isinstance(answer, str)}
    assert {"EPERM", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN", "EIO"} <= answers


# --- a script that serves what lies on a web server ---

CONTENT = random.Random(3).randbytes(MIB)


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves :data:`CONTENT`, in ranges."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(200, len(CONTENT))

    def do_GET(self) -> None:
        first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
        piece = CONTENT[first : last + 1]
        self._answer(206, len(piece))
        self.wfile.write(piece)

    def _answer(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/disk.img"
        server.shutdown()
        thread.join()


def test_url(side_by_side: SideBySide, url: str) -> None:
    requests = random_requests(4, MIB, 50, verbs=("pread", "extents"))

    outcome = side_by_side.compare("python", IMAGE, f"url={url}", requests=requests, image=SCRIPTS / "url.py")

    assert outcome is not None
    assert outcome["facts"]["size"] == len(CONTENT)


# --- every callback ---

#: To be run by the Python that libnbd's binding is for.
ASK = """
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
h.pwrite(bytes(3), 5)
h.pread(4, 6)
h.zero(7, 8)
h.shutdown()
"""


def test_callbacks_are_called_in_the_same_order_with_the_same_arguments(nbdkit: Tool, libnbd: None) -> None:
    command = f'{DEBIANS_PYTHON} -I -c {shlex.quote(ASK)} "$uri"'
    words = ["-U", "-", "python", str(SCRIPTS / "wordy.py"), "a=b", "c=", "--run", command]

    ours, theirs = (told([*program, *words]) for program in (NBDKITPY, [nbdkit.path]))

    assert ours == theirs
    assert "open False ''" in ours


def told(command: list[str]) -> list[str]:
    """What a command that ends by itself and in order has written on standard error."""
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


# --- real runs ---


def test_executable_script_is_a_command(tmp_path: Path) -> None:
    script, disk = tmp_path / "served.py", tmp_path / "disk"
    script.write_bytes((SCRIPTS / "file.py").read_bytes())
    script.chmod(0o755)
    disk.write_bytes(b"on the disk" + bytes(501))
    env = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    output = run([str(script), f"file={disk}", "-U", "-", "--run", 'nbdinfo --size "$uri"'], env=env)

    assert output == "512\n"


def test_script_serves_in_the_background_after_all_directories_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbdinfo: Tool
) -> None:
    (tmp_path / "beside.py").write_text("SIZE = 4096\n")
    late = "\ndef get_size(h):\n    import beside\n    return beside.SIZE\n"
    (tmp_path / "script.py").write_text((SCRIPTS / "ramdisk.py").read_text() + late)
    monkeypatch.chdir(tmp_path)
    socket, pidfile = tmp_path / "socket", tmp_path / "pid"

    run([*NBDKITPY, "-U", "socket", "-P", "pid", "python", "script.py"])
    try:
        size = nbdinfo("--size", f"nbd+unix:///?socket={socket}")
    finally:
        os.kill(int(pidfile.read_text()), signal.SIGTERM)

    assert size == "4096\n"


def test_error_in_a_script_is_one_line_with_its_place(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import nbdkit\n\nnbdkit.no_such_thing()\n")

    done = subprocess.run([*NBDKITPY, "python", script], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert done.stderr.startswith(f"nbdkitpy: error: python: {script}:3: AttributeError: ")
    assert len(done.stderr.splitlines()) == 1


def test_help_shows_the_docstring_of_the_script() -> None:
    output = run([*NBDKITPY, "python", str(SCRIPTS / "error.py"), "--help"])

    assert "error.py:\n\nA disk on which every block of 64 KiB but the first fails in a way of its own." in output


def test_configuration_of_a_script_may_stand_in_a_file(tmp_path: Path, serve: Servers, nbdinfo: Tool) -> None:
    config = tmp_path / "disk.toml"
    config.write_text(f'[plugin]\nname = "python"\nscript = "{SCRIPTS / "ramdisk.py"}"\nsize = "3M"\n')

    server = serve("--config", config)

    assert nbdinfo("--size", server.uri) == f"{3 * MIB}\n"
    dumped = tmp_path / "dumped.toml"
    dumped.write_text(run([*NBDKITPY, "--config", str(config), "--dump-config"]))
    assert run([*NBDKITPY, "--config", str(dumped), "--check-config"]) == "nbdkitpy: the configuration is right\n"


def test_shutdown_by_a_script_ends_the_server(tmp_path: Path, serve: Servers, nbdinfo: Tool) -> None:
    script = tmp_path / "script.py"
    ending = "\ndef close(h):\n    nbdkit.shutdown()\n"
    script.write_text((SCRIPTS / "ramdisk.py").read_text() + ending)
    server = serve("python", script)

    nbdinfo("--size", server.uri)

    assert server.wait() == []

"""The process and what is around it: privileges, descriptors, secrets, where modules come from, signals, numbers.

Names begin with the number of the threat that a test is about: P1 to P10. Others of these lie beside the code that they
are about.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbdkitpy import ConfigError, Parameter, cli
from nbdkitpy.backend import Backend
from nbdkitpy.config import SETTINGS
from nbdkitpy.protocol.constants import Command, NbdError
from nbdkitpy.registry import Kind, Registry
from tests.environment import MAIN, NBDKITPY, without_coverage
from tests.interop.harness import PATIENCE, Servers, make_distribution
from tests.nbdclient import NbdClient
from tests.test_systemd_units import SERVICES, settings

ROOT = Path(__file__).parents[2]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user, or give files to one")

NOBODY = 65534


def run(*words: str | Path, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the program until it ends, which it has to do with this exit status."""
    done = subprocess.run(
        [*NBDKITPY, *map(str, words)], capture_output=True, text=True, timeout=PATIENCE, check=False, **options
    )
    assert done.returncode == status, done.stderr
    return done


# --- P1: privileges ---


def threads_of(pid: int) -> Iterator[dict[str, list[str]]]:
    """Yield what the system says of each thread of a process and of its children."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = [line.split() for line in (task / "status").read_text().splitlines()]
        yield {field[0]: field[1:] for field in fields if field}
        for child in (task / "children").read_text().split():
            yield from threads_of(int(child))


@needs_root
@pytest.mark.parametrize("words", [[], ["--workers=2"]], ids=["one process", "workers"])
def test_P1_no_thread_of_the_server_keeps_anything_of_root(serve: Servers, tmp_path: Path, words: list[str]) -> None:
    server = serve.at("-U", tmp_path / "socket", "-u", str(NOBODY), "-g", str(NOBODY), *words, "null", "1M")
    client = NbdClient(server.connect()).negotiate()

    threads = list(threads_of(server.pid))

    assert len(threads) >= (4 if words else 2)
    for status in threads:
        assert status["Uid:"] == status["Gid:"] == [str(NOBODY)] * 4
        assert status["Groups:"] == [str(NOBODY)]
        assert {status[name][0] for name in ("CapPrm:", "CapEff:", "CapInh:", "CapAmb:")} == {"0" * 16}
        assert status["NoNewPrivs:"] == ["1"]
    client.disconnect()
    # Where only root can read what is installed, there is a warning.
    assert all("cannot read" in line for line in server.end())


# --- P2: descriptors ---

#: A filter that has each read list what a child inherits that is not shut off from our descriptors.
LOOK = """
import subprocess
from nbdkitpy import Filter, FilterHandle, Parameter, hookimpl, parse_path

class Look(Filter):
    name = "look"
    multi_process = True
    out = Parameter(parse_path, required=True)

    def wrap(self, handle, client):
        return LookHandle(handle, self.out)

class LookHandle(FilterHandle):
    def __init__(self, handle, out):
        super().__init__(handle)
        self.out = out

    def pread(self, count, offset):
        with open(self.out, "w") as out:
            subprocess.run(["ls", "/proc/self/fd"], stdout=out, close_fds=False, check=True)
        return self.next.pread(count, offset)

@hookimpl
def register_filters(register):
    register(Look)
"""


@pytest.mark.parametrize("words", [[], ["--workers=2"]], ids=["one process", "workers"])
def test_P2_no_descriptor_of_the_server_is_inherited_by_any_child(
    serve: Servers, tmp_path: Path, words: list[str]
) -> None:
    make_distribution(tmp_path, "look", filters=LOOK)
    out, image = tmp_path / "out", tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    fd = os.open(image, os.O_RDWR)
    # The log, the pidfile, both listening sockets, and a descriptor that was inherited itself.
    places: list[str | Path] = ["-P", tmp_path / "pid", f"--log={tmp_path / 'log'}", "-p", "0", "-i", "127.0.0.1"]

    server = serve.at(
        *places, *words, "--filter=look", "file", f"fd={fd}", f"out={out}",
        env={"PYTHONPATH": str(tmp_path)}, pass_fds=[fd],
    )  # fmt: skip
    os.close(fd)
    client, other = NbdClient(server.connect()).negotiate(), NbdClient(server.connect()).negotiate()
    assert client.read(0, 512) == bytes(512)

    assert out.read_text().split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads
    for each in (client, other):
        each.disconnect()


def test_P2_command_of_run_inherits_no_descriptor(tmp_path: Path) -> None:
    image, out = tmp_path / "disk.img", tmp_path / "out"
    image.write_bytes(bytes(4096))
    with image.open("r+b") as disk:
        fd = disk.fileno()
        places = ["-U", "-", f"--log={tmp_path / 'log'}"]
        run(*places, "file", f"fd={fd}", "--run", f"ls /proc/self/fd > {shlex.quote(str(out))}", pass_fds=[fd])

    assert out.read_text().split() == ["0", "1", "2", "3"]


# --- P4: secrets ---

SECRET = "open-sesame-4711"

#: A plugin with a secret, of which each child shows its environment, and each read is a defect.
VAULT = """
import os, subprocess
from nbdkitpy import Handle, Parameter, Plugin, hookimpl, parse_path, read_password

class Vault(Plugin):
    name = "vault"
    password = Parameter(read_password, secret=True, required=True)
    out = Parameter(parse_path, required=True)

    def get_ready(self):
        assert self.password == "open-sesame-4711"
        with open(self.out, "wb") as out:
            subprocess.run(["env"], stdout=out, check=True)

    def open(self, export_name, readonly, client):
        return VaultHandle(self)

class VaultHandle(Handle):
    def __init__(self, plugin):
        self.plugin = plugin

    def get_size(self):
        return 4096

    def pread(self, count, offset):
        password = self.plugin.password
        raise LookupError(len(password))

@hookimpl
def register_plugins(register):
    register(Vault)
"""


@pytest.fixture
def vault(tmp_path: Path) -> dict[str, str]:
    """What the environment has to have for the plugin, whose secret is in the file "password"."""
    make_distribution(tmp_path, "vault", plugins=VAULT)
    (tmp_path / "password").write_text(f"{SECRET}\n")
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("form", ["text", "json"])
def test_P4_secret_from_a_file_is_seen_nowhere(tmp_path: Path, vault: dict[str, str], form: str) -> None:
    out = tmp_path / "out"
    words = ["-s", "-v", f"--log-format={form}", "vault", f"password=+{tmp_path}/password", f"out={out}"]
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [*NBDKITPY, *words],
            env={**os.environ, **vault},
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
        )
    with ours, server:
        client = NbdClient(ours).negotiate()
        assert client.call(Command.READ, 0, 512).error == NbdError.EIO
        process = Path(f"/proc/{server.pid}")
        shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes() + out.read_bytes()
        client.disconnect()
        _, log = server.communicate(timeout=PATIENCE)

    assert b"LookupError: 16" in log
    assert b"Traceback" in log
    assert SECRET.encode() not in log + shown


@pytest.mark.parametrize("given", [f"password={SECRET}", "password=+{tmp_path}/password"], ids=["word", "file"])
def test_P4_secret_is_in_no_dump(tmp_path: Path, vault: dict[str, str], given: str) -> None:
    words = ["vault", given.format(tmp_path=tmp_path), f"out={tmp_path / 'out'}"]

    for question in ("--dump-config", "--dump-plugin", "--check-config", "--help"):
        done = run("-v", question, *words, env={**os.environ, **vault})
        assert SECRET not in done.stdout + done.stderr


def test_P4_secret_is_in_no_error_about_it(tmp_path: Path, vault: dict[str, str]) -> None:
    wrong = [f"-{SECRET}", f"+/nowhere/{SECRET}"]

    for text in wrong:
        done = run("-v", "vault", f"password={text}", f"out={tmp_path / 'out'}", env={**os.environ, **vault}, status=1)
        assert "password must be a password" in done.stderr
        assert SECRET not in done.stdout + done.stderr


# --- P5: where modules come from ---


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory with modules that have names of Python's, of ours, and of those that we use."""
    directory = tmp_path / "hostile"
    directory.mkdir()
    names = {*sys.stdlib_module_names, "nbdkitpy", "nbdkitpy_plugins", "nbdkitpy_filters", "click", "pluggy", "tomli"}
    for name in names:
        (directory / f"{name}.py").write_text("import os\nos.write(2, b'taken over')\nos._exit(99)\n")
    return directory


def test_P5_program_imports_nothing_from_the_current_directory(hostile: Path) -> None:
    done = run("null", "1M", "--version", cwd=hostile, env=without_coverage())
    served = run("null", "1M", "--run", "true", cwd=hostile, env=without_coverage())

    assert "null" in done.stdout
    assert "taken over" not in done.stderr + served.stderr


SAFE = [["-I", "-m"], *([["-P", "-m"]] if sys.version_info >= (3, 11) else [])]


@pytest.mark.parametrize("way", SAFE, ids=" ".join)
def test_P5_module_that_is_run_in_the_documented_way_imports_nothing_from_there(hostile: Path, way: list[str]) -> None:
    hostile.chmod(0o1777)
    command = [sys.executable, *way, "nbdkitpy", "null", "1M", "--run", "true"]

    done = subprocess.run(command, cwd=hostile, env=without_coverage(), capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")


def test_P5_module_does_not_start_where_others_may_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)

    done = subprocess.run(
        [sys.executable, "-m", "nbdkitpy", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        "nbdkitpy: error: python -m takes modules from the current directory first, and others may write to "
        f"'{tmp_path}': use the command nbdkitpy, or python -"
    )


def of_somebody_else(path: Path) -> None:
    os.chown(path, 4711, 0)


def of_another_group(path: Path) -> None:
    os.chown(path, 0, 4711)
    path.chmod(0o775)


#: What is done to the current directory, and whether the module starts there.
PLACES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "ours": (lambda path: path.chmod(0o755), True),
    "ours and our group's": (lambda path: path.chmod(0o775), True),
    "everybody's": (lambda path: path.chmod(0o777), False),
    "everybody's, and sticky": (lambda path: path.chmod(0o1777), False),
    "gone": (lambda path: path.rmdir(), True),
    "somebody else's": (of_somebody_else, False),
    "another group's": (of_another_group, False),
}


@pytest.mark.parametrize("place", PLACES)
def test_P5_places_where_the_module_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str) -> None:
    if place in ("somebody else's", "another group's") and os.geteuid() != 0:
        pytest.skip("only root can give a directory to somebody")
    directory = tmp_path / "current"
    directory.mkdir()
    prepare, starts = PLACES[place]
    prepare(directory)
    started: list[bool] = []
    flags = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_"}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**{**flags, "isolated": 0, "safe_path": False}))
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.setattr(cli, "main", lambda: started.append(True))

    with contextlib.ExitStack() as refused:
        if not starts:
            refused.enter_context(pytest.raises(SystemExit, match=r"^nbdkitpy: error: python -m takes modules"))
        runpy.run_path(MAIN, run_name="__main__")

    assert bool(started) is starts


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_P5_python_of_a_service_is_as_isolated_as_by_option(path: Path, tmp_path: Path) -> None:
    """As with ``-I``, which a unit cannot give to the Python of a command."""
    lines = settings(path)
    kept = dict(word.split("=") for key, value in lines if key == "Environment" for word in value.split())
    unset = [word for key, value in lines if key == "UnsetEnvironment" for word in value.split()]
    environment = {
        "PYTHONPATH": str(tmp_path),
        "PYTHONPYCACHEPREFIX": str(tmp_path),
        "PYTHONWARNINGS": "error::hostile.Warning",
        "PYTHONPLATLIBDIR": str(tmp_path),
        "PYTHONHOME": str(tmp_path),
    }
    code = "import sys; print(sys.flags.no_user_site, getattr(sys.flags, 'safe_path', True), sys.path, sys.warnoptions)"

    effective = {key: value for key, value in {**environment, **kept}.items() if key not in unset}
    done = subprocess.run([sys.executable, "-c", code], env=effective, capture_output=True, text=True, timeout=60)

    assert done.stderr == ""
    assert done.stdout.startswith("1 True [")
    assert str(tmp_path) not in done.stdout
    assert "hostile" not in done.stdout


# --- P7: signals ---

#: Those that come by themselves, and those by which others tell something. Each is to leave the service as it is.
HARMLESS = (signal.SIGHUP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGWINCH, signal.SIGURG)


def test_P7_storm_of_signals_and_of_clients_that_leave_harms_nobody(serve: Servers) -> None:
    server = serve("memory", "1M")
    client = NbdClient(server.connect()).negotiate()
    over = threading.Event()
    sent: list[int] = []

    def storm() -> None:
        chance = random.Random(7)
        while not over.is_set():
            number = chance.choice(HARMLESS)
            os.kill(server.pid, number)
            sent.append(number)

    storming = threading.Thread(target=storm)
    storming.start()
    try:
        for number in range(300):
            block = number.to_bytes(2, "big") * 8192
            client.write(number % 8 << 14, block)
            assert client.read(number % 8 << 14, len(block)) == block
            if number % 10 == 0:
                leaving = [NbdClient(server.connect()) for _ in range(5)]
                for each in leaving:
                    each.negotiate().send(Command.READ, 0, 1 << 19)
                for each in leaving:
                    each.reset()
    finally:
        over.set()
        storming.join()
    for _ in range(2):  # accepted by turns with reloads: when the second one is, none is under way any more
        NbdClient(server.connect()).negotiate().disconnect()
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(server.pid, number)

    lines = server.wait()

    assert len(sent) > 300
    assert {line for line in lines if "connection lost" not in line} == {"nbdkitpy: reload: nothing to reload"}
    assert client.at_end()
    client.socket.close()


# --- P10: numbers ---

#: What int() or float() take, or what takes them long, and no number to us; among them no form that nbdkit takes.
NO_NUMBERS = ["9" * 5000, "１", "١", "²", "1_0", "0x", "0b1", "--1", "+-1", "1 2", "1\0", "nan", "inf", "∞", "", " "]

NUMERIC_SETTINGS = [setting for setting in SETTINGS if setting.metavar in ("N", "TIME", "MASK")]

_NUMERIC = ("SIZE", "DELAY", "N", "OFFSET", "LENGTH", "PART", "SECTOR_SIZE", "BITSPERSEC", "SECS", "FD", "RATE")


def numeric_parameters() -> Iterator[tuple[type[Backend], Parameter[Any]]]:
    """Yield the parameters of our units that are numbers, with what they belong to."""
    registry = Registry()
    for kind in Kind:
        for offer in registry.names(kind):
            cls = (registry.plugin if kind is Kind.PLUGIN else registry.filter)(offer.name).cls
            yield from ((cls, each) for each in cls.parameters.values() if each.metavar in _NUMERIC)


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: ascii(text[:8]))
def test_P10_what_is_no_number_is_an_error_of_ours_everywhere(text: str) -> None:
    for setting in NUMERIC_SETTINGS:
        with pytest.raises(ValueError) as refused:
            setting.parse(text)
        assert re.match("an? |one of ", str(refused.value)), (setting.name, refused.value)
    found = list(numeric_parameters())
    for cls, parameter in found:
        with pytest.raises(ConfigError, match=f"^{cls.name}: {parameter.key} must be "):
            parameter.read(cls(), [text])
    assert len(NUMERIC_SETTINGS) >= 6
    assert len(found) >= 30

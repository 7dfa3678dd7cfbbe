"""A stranger's package: installed by pip, found, listed, helped, served; and broken ones beside it disturb nobody."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.environment import NBDKITPY
from tests.interop.harness import MIB, PATIENCE, Servers, Tool, environment, run

pytestmark = pytest.mark.interop

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
dependencies = ["nbdkitpy"]

{entry_points}

[tool.hatch.build.targets.wheel]
include = ["*.py"]
"""

PLUGIN = '''
"""A disk of which every byte is the same."""

from collections.abc import Callable

from nbdkitpy import Client, Handle, Parameter, Plugin, hookimpl, integer, parse_size


class SameHandle(Handle):
    """The disk, as one client has it open."""

    def __init__(self, size: int, byte: int) -> None:
        self.size = size
        self.byte = bytes([byte])

    def get_size(self) -> int:
        return self.size

    def pread(self, count: int, offset: int) -> bytes:
        return self.byte * count


class Same(Plugin):
    """The disk, as long as the server runs."""

    name = "same"
    description = "A disk of which every byte is the same."
    size = Parameter(parse_size, required=True, magic=True, help="Size of the disk.")
    byte = Parameter(integer(0, 255), default=255, metavar="N", help="What every byte is.")

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        return SameHandle(self.size, self.byte)


@hookimpl
def register_plugins(register: Callable[[type[Plugin]], None]) -> None:
    register(Same)
'''

FILTER = '''
"""Turns all bits over."""

from collections.abc import Callable

from nbdkitpy import Buffer, Client, Filter, FilterHandle, Handle, Parameter, hookimpl, parse_bool

TURN = bytes(255 - byte for byte in range(256))


class TurningHandle(FilterHandle):
    """Turns what is read."""

    def pread(self, count: int, offset: int) -> Buffer:
        return bytes(self.next.pread(count, offset)).translate(TURN)


class TurnOver(Filter):
    """Turns all bits over."""

    name = "turn-over"
    description = "Turn all bits over."
    turn = Parameter(parse_bool, default=True, metavar="BOOL", help="Whether to do it.")

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return TurningHandle(handle) if self.turn else handle


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    register(TurnOver)
'''

BROKEN = "import a_module_that_nobody_has\n"


def write_package(
    directory: Path, name: str, version: str, modules: Mapping[str, str], plugins: str = "", filters: str = ""
) -> Path:
    """Write the sources of a distribution; `plugins` and `filters` are lines of its entry points."""
    package = directory / name
    package.mkdir()
    entry_points = [
        f'[project.entry-points."nbdkitpy.{kind}"]\n{lines}\n'
        for kind, lines in (("plugins", plugins), ("filters", filters))
        if lines
    ]
    text = PYPROJECT.format(name=name, version=version, entry_points="\n".join(entry_points))
    (package / "pyproject.toml").write_text(text)
    for module, source in modules.items():
        (package / f"{module}.py").write_text(source)
    return package


class Installed:
    """Where the packages have been installed."""

    def __init__(self, sources: Path, directory: Path) -> None:
        self.sources = sources
        self.env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))}

    def nbdkitpy(self, *words: str) -> str:
        """Run the command, and return its standard output."""
        return run([*NBDKITPY, *words], env=self.env)

    def complaint(self, *words: str) -> str:
        """Run the command, which has to fail; return the one line that it says why."""
        done = subprocess.run(
            [*NBDKITPY, *words],
            env=environment(self.env),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("nbdkitpy: error: ")
        return line


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, build_path: str) -> Installed:
    sources, directory = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("installed")
    packages = [
        write_package(
            sources,
            "strangers-units",
            "1.2.3",
            {"strangers_plugin": PLUGIN, "strangers_filter": FILTER},
            plugins='same = "strangers_plugin"',
            filters='turn-over = "strangers_filter"',
        ),
        write_package(
            sources,
            "broken-units",
            "6.6.6",
            {"broken_units": BROKEN, "broken_twice": BROKEN},
            plugins='broken = "broken_units"\ntwice = "broken_twice"',
            filters='broken = "broken_units"\nip-too = "broken_module_that_is_not_there"',
        ),
        write_package(sources, "rival-units", "7.7.7", {"rival": PLUGIN}, plugins='twice = "rival"'),
    ]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    run([*pip, "--target", str(directory), *map(str, packages)], env={"PYTHONPATH": build_path})
    return Installed(sources, directory)


def test_they_are_listed_with_their_distributions(installed: Installed) -> None:
    plugins = [line.split(maxsplit=1) for line in installed.nbdkitpy("--list-plugins").splitlines()]
    filters = [line.split(maxsplit=1) for line in installed.nbdkitpy("--list-filters").splitlines()]

    assert ["same", "strangers-units 1.2.3"] in plugins
    assert ["turn-over", "strangers-units 1.2.3"] in filters
    assert ["broken", "broken-units 6.6.6"] in plugins  # nothing is imported to list it
    assert [owner for name, owner in plugins if name == "twice"] == ["broken-units 6.6.6", "rival-units 7.7.7"]
    assert {"file", "memory", "null"} < {name for name, _ in plugins}
    assert {"ip", "limit", "exitlast"} < {name for name, _ in filters}


def test_help_shows_what_they_take(installed: Installed) -> None:
    output = installed.nbdkitpy("--filter=turn-over", "same", "--help")

    for text in ("A disk of which every byte is the same.", "[size=]SIZE", "required", "byte=N", "default: 255"):
        assert text in output
    for text in ("Turn all bits over.", "turn=BOOL", "Whether to do it."):
        assert text in output


def test_version_and_dump_plugin_tell_of_them(installed: Installed) -> None:
    assert "same 1.2.3" in installed.nbdkitpy("same", "--version").splitlines()
    facts = installed.nbdkitpy("same", "--dump-plugin").splitlines()
    assert {"name=same", "distribution=strangers-units", "magic_config_key=size"} <= set(facts)


def test_the_plugin_is_served_alone_and_with_the_filter(installed: Installed, serve: Servers, qemu_io: Tool) -> None:
    plain = serve("same", "1M", "byte=0x35", env=installed.env)
    turned = serve("--filter=turn-over", "--filter=limit", "same", "1M", "byte=0x35", env=installed.env)
    left = serve("--filter=turn-over", "same", "1M", "byte=0x35", "turn=no", env=installed.env)

    for server, byte in ((plain, 0x35), (turned, 0xCA), (left, 0x35)):
        output = qemu_io("-r", "-f", "raw", "-c", f"read -P {byte} 0 {MIB}", server.uri)
        assert f"read {MIB}/{MIB} bytes" in output
        assert "failed" not in output


def test_a_wrong_parameter_is_refused_in_the_strangers_name(installed: Installed) -> None:
    assert "same: byte must be" in installed.complaint("same", "1M", "byte=256")
    assert "same: size=SIZE is missing" in installed.complaint("same")


def test_a_broken_distribution_disturbs_nobody(installed: Installed) -> None:
    for words in (["same", "1M"], ["memory", "1M"], ["--filter=limit", "null"]):
        assert installed.nbdkitpy(*words, "--run", "echo served") == "served\n"


def test_a_broken_unit_that_is_named_is_explained_in_one_line(installed: Installed) -> None:
    for words in (["broken"], ["--filter=broken", "memory", "1M"]):
        line = installed.complaint(*words)
        for text in ('"broken"', "broken-units 6.6.6", "a_module_that_nobody_has"):
            assert text in line

    line = installed.complaint("--filter=ip-too", "memory", "1M")
    assert "broken_module_that_is_not_there" in line


def test_a_name_that_two_distributions_offer_is_explained_in_one_line(installed: Installed) -> None:
    line = installed.complaint("twice", "1M")

    for text in ('"twice"', "ambiguous", "broken-units 6.6.6", "rival-units 7.7.7"):
        assert text in line


def test_a_name_that_is_nearly_right_is_recognised(installed: Installed) -> None:
    assert '"same"' in installed.complaint("sane", "1M")
    assert '"turn-over"' in installed.complaint("--filter=turnover", "same", "1M")


def test_their_source_is_clean_under_mypy_strict(installed: Installed, tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    sources = sorted((installed.sources / "strangers-units").glob("*.py"))

    run([sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", *map(str, sources)])

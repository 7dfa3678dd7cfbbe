"""Units that are asked for by path or as module:Class: options and files take them wherever they take a name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from nbdkitpy import cli
from nbdkitpy.cli.program import Invocation
from tests.environment import without_coverage

UNITS = """
from nbdkitpy import Filter, Handle, Parameter, Plugin, integer, parse_size

class Zeroes(Handle):
    def __init__(self, size):
        self.size = size
    def get_size(self):
        return self.size
    def pread(self, count, offset):
        return bytes(count)

class Disk(Plugin):
    name = "bypath"
    description = "A disk in a file."
    debug_flags = frozenset({"trace"})
    size = Parameter(parse_size, required=True, magic=True, help="Size of the disk.")
    limit = Parameter(integer(0, 9), default=1, live=True)
    def open(self, export_name, readonly, client):
        return Zeroes(self.size)

class Pass(Filter):
    bound = Parameter(integer(0, 9))
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Be in a directory with units; forget at the end what has been imported."""
    (tmp_path / "units.py").write_text(UNITS)
    (tmp_path / "site" / "cli_test_package").mkdir(parents=True)
    (tmp_path / "site" / "cli_test_package" / "units.py").write_text(UNITS)
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


#: The words for the plugin, and for the filter.
BY_PATH = ("./units.py", "./units.py")
BY_OBJECT = ("cli_test_package.units:Disk", "cli_test_package.units:Pass")

BOTH = pytest.mark.parametrize(("plugin", "filter"), [BY_PATH, BY_OBJECT], ids=["path", "object"])


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.command(), list(args), obj=Invocation(os.getppid()), prog_name="nbdkitpy")


def output(*args: str) -> list[str]:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@BOTH
def test_help_shows_what_they_take(plugin: str, filter: str) -> None:
    text = "\n".join(output(f"--filter={filter}", plugin, "--help"))

    assert text.startswith(f"Usage: nbdkitpy [OPTIONS] {plugin} [[KEY=]VALUE | @PATH]...\n")
    for part in (
        "pass filter:",
        "bound=INTEGER",
        "bypath plugin:",
        "A disk in a file.",
        "[size=]SIZE",
        "Size of the disk.",
    ):
        assert part in text


@BOTH
def test_version_names_them(plugin: str, filter: str) -> None:
    assert output(f"--filter={filter}", plugin, "--version")[1:] == ["pass", "bypath"]


@BOTH
def test_dump_plugin_tells_of_them(place: Path, plugin: str, filter: str) -> None:
    facts = output(f"--filter={filter}", plugin, "1M", "--dump-plugin")

    path = place / ("units.py" if plugin == BY_PATH[0] else "site/cli_test_package/units.py")
    assert facts[:3] == [f"path={path}", "name=bypath", "thread_model=serialize_all_requests"]
    assert facts[-2:] == [f"pass_path={path}", "pass_name=pass"]


@BOTH
def test_lists_show_those_that_are_asked_for_after_those_that_are_installed(plugin: str, filter: str) -> None:
    words = (f"--filter={filter}", plugin)

    assert output(*words, "--list-plugins")[-1].split()[0] == "bypath"
    assert output(*words, "--list-filters")[-1].split()[0] == "pass"
    assert "units.py" not in "".join(output("--list-plugins", "size=./units.py"))
    assert output("--list-plugins", "memory") == output("--list-plugins")


@BOTH
def test_parameters_are_routed_as_ever_and_checked(plugin: str, filter: str) -> None:
    words = (f"--filter={filter}", plugin)

    assert output(*words, "1M", "bound=3", "--check-config") == ["nbdkitpy: the configuration is right"]
    assert "bypath: size=SIZE is missing" in run(*words, "--check-config").output
    assert "pass: bound must be" in run(*words, "1M", "bound=x", "--check-config").output
    assert "-D" not in run(*words, "1M", "-D", "bypath.trace=1", "--check-config").output


@BOTH
def test_dump_config_is_a_file_that_means_the_same_wherever_it_is_read(place: Path, plugin: str, filter: str) -> None:
    text = run(f"--filter={filter}", plugin, "1M", "bound=3", "--dump-config").output
    (place / "dumped.toml").write_text(text)
    os.chdir("/")

    assert run("--config", str(place / "dumped.toml"), "--dump-config").output == text
    assert plugin.removeprefix("./") in text


@BOTH
def test_file_may_name_them(place: Path, plugin: str, filter: str) -> None:
    (place / "x.toml").write_text(f'[plugin]\nname = "{plugin}"\nsize = "1M"\n[[filter]]\nname = "{filter}"\nbond = 1')

    failed = run("--config", "x.toml", "--check-config")

    assert failed.exit_code == 1
    assert failed.output == (
        f"nbdkitpy: error: {place}/x.toml: [[filter]] 1 ({filter}): pass has no parameter"
        ' "bond": did you mean "bound"?\n'
    )
    (place / "x.toml").write_text(f'[plugin]\nname = "{plugin}"\nsize = "2M"\nlimit = 2\n')
    assert '"2M"' in run("--config", "x.toml", "--dump-config").output
    assert '"2M"' in run("--config", "x.toml", plugin, "--dump-config").output
    assert '"2M"' not in run("--config", "x.toml", "null", "--dump-config").output


@BOTH
def test_it_is_served(place: Path, plugin: str, filter: str) -> None:
    words = [f"--filter={filter}", plugin, "1M", "bound=1", "--run", 'test -S "$unixsocket" && echo served']

    done = subprocess.run(
        [sys.executable, "-m", "nbdkitpy", *words],
        env={**without_coverage(), "PYTHONPATH": str(place / "site")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout, done.stderr, done.returncode) == ("served\n", "", 0)


def test_error_in_a_file_is_one_line_with_the_files_line_and_with_v_all_of_it(place: Path) -> None:
    (place / "units.py").write_text("\n1 / 0")
    line = (
        f"nbdkitpy: error: plugin ./units.py cannot be loaded: {place}/units.py:2: ZeroDivisionError: division by zero"
    )

    for question in (["--help"], ["--version"], ["--dump-plugin"], ["--list-plugins"], ["-f"]):
        short, long = run("./units.py", *question), run("./units.py", *question, "-v")

        assert (short.exit_code, short.output.splitlines()) == (1, [line])
        assert (long.exit_code, long.output.splitlines()[-1]) == (1, line)
        assert any("Traceback" in said for said in long.output.splitlines())


def test_modules_are_not_found_in_the_current_directory(place: Path) -> None:
    result = run("units:Disk", "1M")

    assert result.exit_code == 1
    assert "plugin units:Disk: there is no module 'units'" in result.output
    assert "./units.py" in result.output


def test_paths_are_completed_as_such() -> None:
    complete = ShellComplete(cli.command(), {}, "nbdkitpy", "_NBDKITPY_COMPLETE")

    for args in ([], ["--filter"]):
        for incomplete in ("./un", "/tmp/x", ".", "a/"):
            (item,) = complete.get_completions(args, incomplete)
            assert (item.type, item.value) == ("file", incomplete)
    assert "size=" in [item.value for item in complete.get_completions(["./units.py"], "")]

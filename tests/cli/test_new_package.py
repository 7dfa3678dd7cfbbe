"""``--new-plugin`` and ``--new-filter``: what is written, under which names, and that nothing is overwritten."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nbdkitpy import cli
from nbdkitpy.cli.program import Invocation
from nbdkitpy.registry import Registry

KINDS = pytest.mark.parametrize("kind", ["plugin", "filter"])


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Be in an empty directory; forget at the end what has been imported."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.command(), list(args), obj=Invocation(os.getppid()), prog_name="nbdkitpy")


def written(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@KINDS
def test_package_is_written_and_it_is_said_what_comes_next(place: Path, kind: str) -> None:
    result = run(f"--new-{kind}", "my-unit")

    assert result.exit_code == 0
    assert written(place) == [
        "nbdkitpy-my-unit/.gitignore",
        "nbdkitpy-my-unit/README.md",
        "nbdkitpy-my-unit/nbdkitpy_my_unit.py",
        "nbdkitpy-my-unit/pyproject.toml",
        "nbdkitpy-my-unit/tests/test_nbdkitpy_my_unit.py",
    ]
    said = result.output.splitlines()
    assert said[0].startswith("nbdkitpy-my-unit has been written.")
    assert said[2:5] == ["    cd nbdkitpy-my-unit", "    pip install -e '.[test]'", "    pytest"]
    assert said[5].startswith("    nbdkitpy my-unit 1G" if kind == "plugin" else "    nbdkitpy --filter=my-unit memory")


@KINDS
def test_nothing_is_left_to_be_filled_in(place: Path, kind: str) -> None:
    run(f"--new-{kind}", "my_unit-2")

    texts = [(place / path).read_text() for path in written(place)]

    assert not [text for text in texts if "{{" in text or "}}" in text]
    assert "class MyUnit2" + kind.capitalize() in "".join(texts)


@KINDS
def test_unit_can_be_had_by_its_path_at_once(place: Path, kind: str) -> None:
    run(f"--new-{kind}", "my-unit")

    unit = getattr(Registry(), kind)("nbdkitpy-my-unit/nbdkitpy_my_unit.py")

    assert unit.cls.name == "my-unit"


def test_both_may_be_written_at_once(place: Path) -> None:
    assert run("--new-plugin", "one", "--new-filter", "other").exit_code == 0
    assert sorted(path.name for path in place.iterdir()) == ["nbdkitpy-one", "nbdkitpy-other"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "A", "1a", "-a", "_a", "a-", "a.b", "a b", "a\n", "é", "a" * 33])
def test_name_that_cannot_be_one_is_refused(place: Path, name: str) -> None:
    result = run("--new-plugin", name)

    assert result.exit_code == 1
    assert result.output.startswith("nbdkitpy: error: --new-plugin: the name must have at most 32 small letters, ")
    assert not [*place.iterdir()]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("plugin", "memory", 'there is a plugin "memory" already, of nbdkitpy '),
        ("filter", "tls-fallback", 'there is a filter "tls-fallback" already, of nbdkitpy '),
        ("filter", "tls_fallback", 'there is a filter "tls-fallback" already, of nbdkitpy '),
        ("plugin", "plugins", 'a module "nbdkitpy_plugins" is installed already; take another name'),
    ],
)
def test_name_that_is_taken_is_refused(place: Path, kind: str, name: str, message: str) -> None:
    result = run(f"--new-{kind}", name)

    assert result.exit_code == 1
    assert result.output.startswith(f"nbdkitpy: error: --new-{kind}: {message}")
    assert not [*place.iterdir()]


def test_plugin_may_have_the_name_of_a_filter(place: Path) -> None:
    assert run("--new-plugin", "limit").exit_code == 0


def test_nothing_is_overwritten(place: Path) -> None:
    run("--new-plugin", "my-unit")
    (place / "nbdkitpy-my-unit" / "README.md").unlink()
    (place / "nbdkitpy-file-of-this-name").write_text("mine")
    before = written(place)

    for name in ("my-unit", "file-of-this-name"):
        result = run("--new-filter", name)

        assert result.exit_code == 1
        assert result.output == (
            f"nbdkitpy: error: --new-filter: there is something called nbdkitpy-{name} already; it stays as it is\n"
        )
    assert written(place) == before
    assert (place / "nbdkitpy-file-of-this-name").read_text() == "mine"


def test_directory_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)

    result = run("--new-plugin", "my-unit")

    assert result.output == "nbdkitpy: error: --new-plugin: nbdkitpy-my-unit: Permission denied\n"

"""What ``--reload`` keeps an eye on: files that are named, and those of modules beside them, before they are read."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy.modules import load, parse
from nbdkitpy.sources import Sources


class Watched:
    """Sources of units in a directory, and what they have told of so far: paths below it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._told: list[str] = []
        self.sources = Sources(self._told.append)
        self.sources.watch_imports()

    def load(self, word: str) -> None:
        location = parse(word)
        assert location is not None
        self.sources.add(location)
        load(location)

    def told(self) -> list[str]:
        """Return each path once, but for that which is looked for to see whether a file's own name is another's."""
        told = dict.fromkeys(os.path.relpath(path, self.directory) for path in self._told)
        self._told.clear()
        return [path for path in told if not path.endswith("disk/__init__.py")]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    before = set(sys.modules)
    for name in ("path", "meta_path"):
        monkeypatch.setattr(sys, name, [*getattr(sys, name)])
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.chdir(tmp_path)
    yield Watched(tmp_path)
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: str, text: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_named_file_and_modules_beside_it_are_told_of(watched: Watched) -> None:
    write("sources_a.py")
    write("sources_p/__init__.py", "from . import sub")
    write("sources_p/sub.py")
    write("disk.py", "import sources_a, sources_p, csv")

    watched.load("./disk.py")

    assert watched.told() == ["disk.py", "sources_a.py", "sources_p/__init__.py", "sources_p/sub.py"]
    assert not watched.sources.is_empty


def test_package_without_a_file_of_its_own_has_modules_that_are_told_of(watched: Watched) -> None:
    write("sources_p/sub.py")
    write("disk.py", "import sources_p.sub")

    watched.load("./disk.py")

    assert watched.told() == ["disk.py", "sources_p/sub.py"]


def test_modules_that_are_imported_later_are_told_of(watched: Watched) -> None:
    write("sources_a.py")
    write("disk.py")
    watched.load("./disk.py")
    watched.told()

    importlib.import_module("sources_a")

    assert watched.told() == ["sources_a.py"]


def test_file_is_told_of_before_it_fails(watched: Watched) -> None:
    write("sources_a.py", "1 / 0")
    write("disk.py", "import sources_a")

    with pytest.raises(ZeroDivisionError):
        watched.load("./disk.py")

    assert watched.told() == ["disk.py", "sources_a.py"]


def test_files_that_a_missing_module_might_have_are_told_of(watched: Watched) -> None:
    write("sources_p/__init__.py")
    write("disk.py", "import sources_p\ntry:\n    import sources_gone\nexcept ImportError:\n    import sources_p.gone")

    with pytest.raises(ImportError):
        watched.load("./disk.py")

    assert watched.told()[2:] == [
        *["sources_gone.py", "sources_gone/__init__.py"],
        *["sources_p/gone.py", "sources_p/gone/__init__.py"],
    ]


def test_modules_from_elsewhere_are_not_told_of(watched: Watched) -> None:
    write("site/sources_other/__init__.py", "import sources_other.sub")
    write("site/sources_other/sub.py", "try:\n    import sources_other.gone\nexcept ImportError: pass")
    sys.path.append(os.path.abspath("site"))
    write("place/disk.py", "import sources_other")

    watched.load("place/disk.py")

    assert watched.told() == ["place/disk.py"]


def test_module_and_all_of_its_package_are_told_of(watched: Watched) -> None:
    sys.path.append(os.path.abspath("site"))
    write("site/sources_p/__init__.py")
    write("site/sources_p/disk.py", "import sources_beside, sources_p.sub")
    write("site/sources_p/sub.py")
    write("site/sources_beside.py")

    watched.load("sources_p.disk:Disk")

    assert watched.told() == [f"site/sources_p/{name}.py" for name in ("__init__", "disk", "sub")]


def test_script_that_is_not_imported_is_told_of_and_modules_beside_it(watched: Watched) -> None:
    write("sources_a.py")

    watched.sources.add_file("script.py")
    sys.path.append(str(watched.directory))
    importlib.import_module("sources_a")

    assert watched.told() == ["script.py", "sources_a.py"]


def test_nothing_is_compiled_to_a_file_that_might_be_taken_for_newer_code(watched: Watched) -> None:
    write("sources_a.py")
    write("disk.py", "import sources_a")

    watched.load("./disk.py")

    assert not Path("__pycache__").exists()


def test_without_units_there_is_nothing_to_tell_of(watched: Watched) -> None:
    import xml.dom.pulldom

    assert xml.dom.pulldom
    assert watched.sources.is_empty
    assert watched.told() == []

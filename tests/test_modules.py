"""Where the code of a unit is, and how it is loaded from there: files take no other module's name or place."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import UnitError
from nbdkitpy.modules import Location, flaw, load, parse, what_went_wrong


@pytest.fixture(autouse=True)
def undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what a test has imported, and be in its directory, which is nowhere on the module search path."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def a_file(path: Path, text: str = "") -> Location:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return Location(str(path), "", "")


# --- what a word refers to ---


@pytest.mark.parametrize(
    ("word", "path", "cls"),
    [
        ("./disk.py", "disk.py", ""),
        ("disk.py", "disk.py", ""),
        ("././/disk.py", "disk.py", ""),
        ("../x", "../x", ""),
        ("a/b", "a/b", ""),
        ("link/../disk.py", "link/../disk.py", ""),  # which is not disk.py, if link is a symbolic link
        ("./disk.py:Disk", "disk.py", "Disk"),
        ("disk.py:Disk", "disk.py", "Disk"),
        ("./a:b.py", "a:b.py", ""),
        ("./a:b", "a:b", ""),
        ("a b.py:Größe", "a b.py", "Größe"),
        ("./disk.py:1", "disk.py:1", ""),
        ("pkg/disk.py:a.b", "pkg/disk.py:a.b", ""),
    ],
)
def test_word_with_a_slash_or_the_ending_of_python_is_a_path(tmp_path: Path, word: str, path: str, cls: str) -> None:
    assert parse(word) == (f"{tmp_path}/{path}", "", cls)


def test_absolute_path_stays_as_it_is() -> None:
    assert parse("/a/disk.py:Disk") == ("/a/disk.py", "", "Disk")


@pytest.mark.parametrize(("word", "module"), [("disk:Disk", "disk"), ("a.b_1.c:Disk", "a.b_1.c")])
def test_module_and_class_are_told_by_the_colon(word: str, module: str) -> None:
    assert parse(word) == ("", module, "Disk")


@pytest.mark.parametrize("word", ["disk", "a.b", "a:", ":A", "a:b:C", "a..b:C", "1a:C", "a:1", "a b:C", "a:C\n", ""])
def test_other_words_refer_to_nothing(word: str) -> None:
    assert parse(word) is None


@pytest.mark.parametrize("word", ["/a/disk.py", "/a/disk.py:Disk", "a.b:Disk"])
def test_location_is_written_so_that_it_is_the_same_wherever_it_is_read(word: str) -> None:
    assert str(parse(word)) == word


# --- files ---


def test_file_is_the_module_of_its_name(tmp_path: Path) -> None:
    module = load(a_file(tmp_path / "modules_test_disk.py", "x = 1\nname = __name__, __file__, __spec__.origin"))

    path = str(tmp_path / "modules_test_disk.py")
    assert (module.x, module.name) == (1, ("modules_test_disk", path, path))
    assert sys.modules["modules_test_disk"] is module


def test_file_finds_those_beside_it_while_it_is_loaded_and_later(tmp_path: Path) -> None:
    a_file(tmp_path / "modules_test_a.py", "x = 'a'")
    a_file(tmp_path / "modules_test_b.py", "import modules_test_disk; x = modules_test_disk")
    text = "import modules_test_a as a\ndef later():\n    import modules_test_b as b; return b"

    module = load(a_file(tmp_path / "modules_test_disk.py", text))

    assert module.a.x == "a"
    assert module.later().x is module


def test_file_that_is_a_symbolic_link_finds_those_beside_what_it_leads_to(tmp_path: Path) -> None:
    a_file(tmp_path / "there" / "modules_test_a.py", "x = 'a'")
    a_file(tmp_path / "there" / "modules_test_disk.py", "import modules_test_a as a")
    (tmp_path / "link.py").symlink_to(tmp_path / "there" / "modules_test_disk.py")

    assert load(Location(str(tmp_path / "link.py"), "", "")).a.x == "a"


def test_what_lies_beside_a_file_takes_no_other_modules_place(tmp_path: Path) -> None:
    for name in ("colorsys", "socket", "nbdkitpy"):
        a_file(tmp_path / f"{name}.py", "raise SystemExit('taken over')")
    sys.modules.pop("colorsys", None)  # so that it is looked for

    module = load(a_file(tmp_path / "modules_test_disk.py", "import colorsys, socket, nbdkitpy"))

    assert not module.colorsys.__file__.startswith(str(tmp_path))
    assert sys.path[-1] == str(tmp_path)


@pytest.mark.parametrize("name", ["socket", "this", "sys", "__main__", "encodings"])
def test_file_with_the_name_of_another_module_gets_another_one(tmp_path: Path, name: str) -> None:
    before = sys.modules.get(name)

    module = load(a_file(tmp_path / f"{name}.py", "x = 1"))

    assert module.x == 1
    assert sys.modules.get(name) is before
    assert module.__name__ == f"{tmp_path}/{name}_py".replace("/", "_").replace("-", "_")
    assert sys.modules[module.__name__] is module


@pytest.mark.parametrize("name", ["my-disk", "1", "a.b"])
def test_file_whose_name_is_no_identifier_is_loaded_all_the_same(tmp_path: Path, name: str) -> None:
    module = load(a_file(tmp_path / f"{name}.py", "x = 1"))

    assert module.x == 1
    assert module.__name__.isidentifier()


def test_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    one, other = (load(a_file(tmp_path / place / "modules_test_disk.py", f"x = {place!r}")) for place in "ab")

    assert (one.x, other.x) == ("a", "b")
    assert one.__name__ != other.__name__


def test_files_of_similar_paths_are_two_modules(tmp_path: Path) -> None:
    one, other = (load(a_file(tmp_path / f"this{c}x.py", f"x = {c!r}")) for c in "-+")

    assert (one.x, other.x) == ("-", "+")


def test_file_that_is_named_twice_is_loaded_once(tmp_path: Path) -> None:
    location = a_file(tmp_path / "modules_test_disk.py")

    assert load(location) is load(location._replace(cls="Other"))


def test_file_in_a_directory_of_the_search_path_has_the_name_that_it_has_there(tmp_path: Path) -> None:
    sys.path.append(str(tmp_path))

    assert load(a_file(tmp_path / "modules_test_disk.py")).__name__ == "modules_test_disk"
    assert sys.path.count(str(tmp_path)) == 1


def test_file_is_read_anew_however_short_the_time_since_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    location = a_file(tmp_path / "modules_test_disk.py", "x = 1")
    load(location)
    times = (tmp_path / "modules_test_disk.py").stat()
    del sys.modules["modules_test_disk"]
    a_file(tmp_path / "modules_test_disk.py", "x = 2")
    os.utime(tmp_path / "modules_test_disk.py", ns=(times.st_atime_ns, times.st_mtime_ns))

    assert load(location).x == 2
    assert not (tmp_path / "__pycache__").exists()


def test_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        load(a_file(tmp_path / "modules_test_disk.py", "1 / 0"))

    assert "modules_test_disk" not in sys.modules


# --- what cannot be a Python file ---


def test_python_file_has_no_flaw(tmp_path: Path) -> None:
    assert flaw(a_file(tmp_path / "disk.py")) == ""
    assert flaw(Location("", "a.b", "C")) == ""


def test_flaw_of_what_is_no_python_file_is_named(tmp_path: Path) -> None:
    a_file(tmp_path / "disk.img")
    (tmp_path / "package.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")

    flaws = [flaw(Location(f"{tmp_path}/{name}", "", "")) for name in ("gone.py", "disk.img", "package.py", "pipe.py")]

    no_python = "it is no Python file, whose name would end with .py"
    assert flaws == ["No such file or directory", no_python, "it is a directory", no_python]
    assert "null" in flaw(Location("/a\0.py", "", ""))


# --- modules ---


def test_module_is_imported_from_the_environment(tmp_path: Path) -> None:
    sys.path.append(str(tmp_path / "site"))
    a_file(tmp_path / "site" / "modules_test_disk.py", "x = 1")

    assert load(Location("", "modules_test_disk", "Disk")).x == 1


def test_module_is_not_imported_from_the_current_directory(tmp_path: Path) -> None:
    a_file(tmp_path / "modules_test_disk.py", "raise SystemExit('taken over')")

    with pytest.raises(UnitError) as caught:
        load(Location("", "modules_test_disk", "Disk"))

    assert "there is no module 'modules_test_disk'" in str(caught.value)
    assert str(caught.value).endswith("a file is given by its path: ./modules_test_disk.py")


def test_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnitError, match=r"no module 'modules_test_gone' .*: \./modules_test_gone/sub/disk\.py"):
        load(Location("", "modules_test_gone.sub.disk", "Disk"))


def test_module_that_does_not_find_another_one_is_there(tmp_path: Path) -> None:
    sys.path.append(str(tmp_path / "site"))
    a_file(tmp_path / "site" / "modules_test_disk.py", "import modules_test_gone")

    with pytest.raises(ModuleNotFoundError, match="modules_test_gone"):
        load(Location("", "modules_test_disk", "Disk"))


# --- errors ---


def wrong(location: Location) -> str:
    with pytest.raises(BaseException) as caught:
        load(location)
    return what_went_wrong(caught.value, location)


def test_error_is_shown_with_its_line(tmp_path: Path) -> None:
    text = "def f():\n    return 1 / 0\n\nf()\n"

    assert wrong(a_file(tmp_path / "disk.py", text)) == f"{tmp_path}/disk.py:2: ZeroDivisionError: division by zero"


def test_error_in_a_file_beside_it_is_shown_with_that_ones_line(tmp_path: Path) -> None:
    a_file(tmp_path / "modules_test_a.py", "\nraise KeyError('two\\nlines')")

    text = wrong(a_file(tmp_path / "disk.py", "import modules_test_a"))

    assert text == f"{tmp_path}/modules_test_a.py:2: KeyError: 'two\\nlines'"


def test_error_in_a_library_is_shown_with_the_line_that_called_it(tmp_path: Path) -> None:
    text = wrong(a_file(tmp_path / "disk.py", "import fractions\nfractions.Fraction('x')"))

    assert text.startswith(f"{tmp_path}/disk.py:2: ValueError: Invalid literal")


@pytest.mark.parametrize("how", ["", "import modules_test_a"])
def test_error_of_syntax_is_shown_where_it_is(tmp_path: Path, how: str) -> None:
    place = a_file(tmp_path / "modules_test_a.py", "x = 1\ny = = 2")
    location = a_file(tmp_path / "disk.py", how) if how else place

    assert wrong(location) == f"{place.path}:2: SyntaxError: invalid syntax"


def test_error_of_syntax_in_no_file_is_shown_with_the_line_that_compiled_it(tmp_path: Path) -> None:
    text = wrong(a_file(tmp_path / "disk.py", "x = 1\neval('= 1')"))

    assert text == f"{tmp_path}/disk.py:2: SyntaxError: invalid syntax"


@pytest.mark.parametrize("name", ["modules_test_disk", "modules_test_pkg.disk"])
def test_error_in_a_module_is_shown_with_its_line(tmp_path: Path, name: str) -> None:
    sys.path.append(str(tmp_path / "site"))
    a_file(tmp_path / "site" / "modules_test_disk.py", "\n1 / 0")
    (tmp_path / "site" / "modules_test_pkg").mkdir()
    a_file(tmp_path / "site" / "modules_test_pkg" / "disk.py", "\n1 / 0")

    text = wrong(Location("", name, "Disk"))

    assert text == f"{tmp_path}/site/{name.replace('.', '/')}.py:2: ZeroDivisionError: division by zero"


def test_error_outside_of_the_code_is_shown_without_a_line(tmp_path: Path) -> None:
    location = a_file(tmp_path / "disk.py")

    assert what_went_wrong(OSError("no place"), location) == "OSError: no place"
    assert what_went_wrong(OSError("no place"), Location("", "sys", "Disk")) == "OSError: no place"

"""Units that are asked for by where their code is: which class is meant, and what is said if there is none."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import Filter, Plugin, UnitError
from nbdkitpy.registry import Registry

DISK = """
from nbdkitpy import Filter, Plugin, hookimpl

class Disk(Plugin):
    name = "disk"
    version = "2.5"
"""

PASS = """
class Pass(Filter):
    pass
"""

OTHER = """
class Other(Plugin):
    name = "other"
"""

HOOK = """
@hookimpl
def register_plugins(register):
    {}
"""

SCRIPT = """
def open(readonly): pass
def get_size(h): return 1
def pread(h, count, offset): return b"x"
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Be in an empty directory, and forget what a test has imported."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(text: str) -> None:
    Path("units.py").write_text(text)


def plugin_failure(word: str) -> str:
    with pytest.raises(UnitError) as caught:
        Registry().plugin(word)
    return str(caught.value)


def filter_failure(word: str) -> str:
    with pytest.raises(UnitError) as caught:
        Registry().filter(word)
    return str(caught.value)


# --- which class is meant ---


def test_plugin_is_the_only_one_that_a_file_defines(place: Path) -> None:
    write(DISK + PASS)

    unit = Registry().plugin("./units.py")

    assert issubclass(unit.cls, Plugin)
    assert (unit.cls.__name__, unit.cls.name) == ("Disk", "disk")
    assert (unit.word, unit.path) == ("./units.py", str(place / "units.py"))
    assert (unit.offer, unit.distribution, unit.version) == (None, "", "2.5")


def test_filter_is_the_only_one_that_a_file_defines() -> None:
    write(DISK + PASS)

    unit = Registry().filter("units.py")

    assert issubclass(unit.cls, Filter)
    assert unit.cls.__name__ == "Pass"
    assert unit.version == ""


def test_plugin_and_filter_of_one_file_are_of_one_module() -> None:
    write(DISK + PASS)
    registry = Registry()

    assert registry.plugin("./units.py").cls.__module__ == registry.filter("units.py").cls.__module__ == "units"


def test_class_without_a_name_gets_that_of_the_class_in_small_letters() -> None:
    write(DISK + PASS)

    assert Registry().filter("./units.py").cls.name == "pass"


@pytest.mark.parametrize("name", ["a b", "größe", "../x"])
def test_name_that_cannot_be_one_is_refused(name: str) -> None:
    write(DISK.replace('"disk"', repr(name)))

    assert plugin_failure("./units.py") == (
        f"plugin ./units.py: its name must have letters, digits, - and _ only, not {name!r}"
    )


def test_what_a_file_imports_or_keeps_to_itself_is_not_meant() -> None:
    write(DISK + "from nbdkitpy_plugins.null import Null\nclass _Base(Plugin):\n    pass\nAlias = Disk\n")

    assert Registry().plugin("./units.py").cls.__name__ == "Disk"


def test_of_several_classes_that_is_meant_which_a_hook_hands_over() -> None:
    write(DISK + OTHER + HOOK.format("register(Other); register(Other)"))

    assert Registry().plugin("./units.py").cls.__name__ == "Other"


def test_hook_that_hands_over_nothing_is_as_good_as_none() -> None:
    write(DISK + HOOK.format("pass"))

    assert Registry().plugin("./units.py").cls.__name__ == "Disk"


@pytest.mark.parametrize("hook", ["", HOOK.format("register(Disk); register(Other)")])
def test_several_classes_are_named_with_the_words_by_which_they_can_be_had(hook: str) -> None:
    write(DISK + OTHER + hook)

    text = plugin_failure("./units.py")

    assert text == "plugin ./units.py: there are several in it: say ./units.py:Disk or ./units.py:Other"


@pytest.mark.parametrize("word", ["./units.py:Other", "units.py:Other"])
def test_class_may_be_named(word: str) -> None:
    write(DISK + OTHER + HOOK.format("1 / 0"))

    unit = Registry().plugin(word)

    assert (unit.cls.__name__, unit.word) == ("Other", word)


def test_class_may_be_named_by_its_module() -> None:
    sys.path.append(os.path.abspath("site"))
    Path("site/located_test").mkdir(parents=True)
    Path("site/located_test/units.py").write_text(DISK + OTHER)

    assert Registry().plugin("located_test.units:Other").cls.name == "other"


def test_class_that_is_named_may_come_from_elsewhere() -> None:
    write("from nbdkitpy_plugins.null import Null as Mine")

    assert Registry().plugin("./units.py:Mine").cls.name == "null"


# --- what is said if there is none ---


def test_class_that_is_not_there_is_an_error_that_names_what_is() -> None:
    write(DISK + OTHER)

    assert (
        plugin_failure("./units.py:Disc") == "plugin ./units.py:Disc: there is no Disc in it; there is Disk and Other"
    )


def test_filter_that_is_asked_for_as_a_plugin_is_recognised() -> None:
    write("from nbdkitpy import Filter, Plugin" + PASS)

    assert plugin_failure("./units.py") == (
        "plugin ./units.py defines no subclass of nbdkitpy.Plugin, but a filter: --filter=./units.py"
    )
    assert plugin_failure("./units.py:Pass") == (
        "plugin ./units.py:Pass is not a subclass of nbdkitpy.Plugin, but a filter: --filter=./units.py:Pass"
    )


def test_plugin_that_is_asked_for_as_a_filter_is_recognised() -> None:
    write(DISK)

    assert filter_failure("./units.py") == (
        "filter ./units.py defines no subclass of nbdkitpy.Filter, but a plugin, which is given without --filter"
    )


def test_file_that_has_neither_is_refused() -> None:
    write("x = 1")

    assert plugin_failure("./units.py") == "plugin ./units.py defines no subclass of nbdkitpy.Plugin"
    assert filter_failure("./units.py:x") == "filter ./units.py:x is not a subclass of nbdkitpy.Filter"


@pytest.mark.parametrize("word", ["nbdkitpy:Plugin", "nbdkitpy:Handle"])
def test_class_that_is_no_plugin_of_its_own_is_refused(word: str) -> None:
    assert plugin_failure(word) == f"plugin {word} is not a subclass of nbdkitpy.Plugin"


def test_hook_that_hands_over_something_else_is_an_error() -> None:
    write(DISK + PASS + HOOK.format("register(Pass)"))

    assert plugin_failure("./units.py") == (
        "plugin ./units.py registers <class 'units.Pass'>, which is not a subclass of nbdkitpy.Plugin"
    )


def test_misspelt_hook_is_an_error() -> None:
    write(DISK + HOOK.format("register(Disk)").replace("plugins", "plugin"))

    text = plugin_failure("./units.py")

    assert text.startswith("plugin ./units.py cannot be loaded: ")
    assert "unknown hook 'register_plugin'" in text


def test_hook_that_fails_is_shown_with_its_line(place: Path) -> None:
    write(DISK + HOOK.format("1 / 0"))

    assert plugin_failure("./units.py") == (
        f"plugin ./units.py cannot be loaded: {place}/units.py:10: ZeroDivisionError: division by zero"
    )


@pytest.mark.parametrize("error", ["1 / 0", "raise SystemExit(3)"])
def test_file_that_fails_is_shown_with_its_line_and_debugged_with_all(
    place: Path, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    write(f"\n{error}")

    with caplog.at_level(logging.DEBUG, "nbdkitpy"):
        text = plugin_failure("./units.py")

    assert text.startswith(f"plugin ./units.py cannot be loaded: {place}/units.py:2: ")
    (record,) = caplog.records
    assert record.exc_info


def test_module_that_is_not_there_is_an_error_of_its_unit() -> None:
    write("raise SystemExit('taken over')")

    assert plugin_failure("units:Disk").startswith("plugin units:Disk: there is no module 'units' where ")


@pytest.mark.parametrize("text", [f"import nbdkit\n{SCRIPT}", SCRIPT])
def test_script_of_nbdkits_python_plugin_is_recognised(text: str) -> None:
    write(text)

    hint = "; a script for nbdkit's plugin python is served by: nbdkitpy python ./units.py"
    assert plugin_failure("./units.py").endswith(hint)


def test_module_that_a_unit_does_not_find_is_no_sign_of_a_script() -> None:
    write("import nbdkit_of_old")

    assert plugin_failure("./units.py").endswith("ModuleNotFoundError: No module named 'nbdkit_of_old'")


@pytest.mark.parametrize(
    ("name", "text", "mode", "hint"),
    [
        ("disk.img", "", 0o644, "; to serve what is in it: nbdkitpy file ./disk.img"),
        ("a b", "", 0o644, "; to serve what is in it: nbdkitpy file './a b'"),
        ("script.sh", "#!/bin/sh\n", 0o755, "; to serve what it says as a script: nbdkitpy sh ./script.sh"),
        ("disk", "#!/usr/bin/python3\n", 0o755, "; to serve what it says as a script: nbdkitpy python ./disk"),
        ("disk", "#!/x/env nbdkitpy\n", 0o755, "; to serve what it says as a script: nbdkitpy python ./disk"),
        ("disk", "\n# of python\n", 0o755, "; to serve what it says as a script: nbdkitpy sh ./disk"),
        ("disk.so", "\x7fELF", 0o755, "; of nbdkit's own plugins only those in Python and for the shell can be used"),
    ],
)
def test_file_that_is_no_python_is_an_error_that_says_how_to_serve_it(
    name: str, text: str, mode: int, hint: str
) -> None:
    Path(name).write_text(text)
    Path(name).chmod(mode)

    said = "it is no Python file, whose name would end with .py"
    assert plugin_failure(f"./{name}") == f"plugin ./{name}: {said}{hint}"
    assert filter_failure(f"./{name}") == f"filter ./{name}: {said}"


def test_executable_that_cannot_be_read_is_taken_for_a_script_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> object:
        raise PermissionError

    Path("disk").touch(0o755)
    monkeypatch.setattr("builtins.open", refuse)

    assert plugin_failure("./disk").endswith("nbdkitpy sh ./disk")


def test_directory_is_an_error_that_says_how_to_serve_it() -> None:
    assert plugin_failure("./") == "plugin ./: it is a directory; to serve the files in it: nbdkitpy file dir=./"


@pytest.mark.parametrize("word", ["./gone.py", "../x", "a/b"])
def test_file_that_is_not_there_is_an_error(word: str) -> None:
    assert plugin_failure(word) == f"plugin {word}: No such file or directory"


@pytest.mark.parametrize("code", ["raise {}", DISK + HOOK.format("raise {}")], ids=["module", "hook"])
def test_interrupt_while_a_unit_is_loaded_is_the_users(code: str) -> None:
    write(code.format("KeyboardInterrupt"))

    with pytest.raises(KeyboardInterrupt):
        Registry().plugin("./units.py")


@pytest.mark.parametrize("code", ["raise {}", DISK + HOOK.format("raise {}")], ids=["module", "hook"])
def test_whatever_else_is_raised_then_is_an_error_of_the_unit(code: str) -> None:
    write(code.format("GeneratorExit"))

    with pytest.raises(UnitError, match=r"plugin \./units\.py cannot be loaded: .*GeneratorExit"):
        Registry().plugin("./units.py")

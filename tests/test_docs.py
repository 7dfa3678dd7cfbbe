"""The documentation says what there is: each option, parameter and part of the contract, and nothing else."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import nbdkitpy
from nbdkitpy import (
    AsyncHandle,
    AsyncPlugin,
    Backend,
    Client,
    Filter,
    FilterHandle,
    Handle,
    Plugin,
    hookspecs,
    testing,
)
from nbdkitpy.backend import VERBS
from nbdkitpy.stack import Stack
from nbdkitpy.testing.conformance import KINDS
from tests.documents import MADE, MARKDOWN, ROOT, blocks, headings, named, prose, repository_files, section_of
from tests.environment import without_coverage
from tests.serving import NoServer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

README = ROOT / "README.md"
CONTRACT = ROOT / "docs" / "contract.md"
OPTIONS = ROOT / "docs" / "options.md"
SECURITY = ROOT / "docs" / "security.md"
REFERENCE = ROOT / "docs" / "reference.md"
FROM_NBDKIT = ROOT / "docs" / "coming-from-nbdkit.md"
TESTING = ROOT / "docs" / "testing.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
WRITING_A_PLUGIN = ROOT / "docs" / "writing-a-plugin.md"
WRITING_A_FILTER = ROOT / "docs" / "writing-a-filter.md"

UNIT_HEADINGS = ["Synopsis", "Description", "Parameters", "Examples", "Notes", "See also"]


# --- the command line -----------------------------------------------------------------------------------------------


def options_of_the_program() -> dict[frozenset[str], click.Option]:
    from nbdkitpy import cli

    command = cli.command()
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    help_option = command.get_help_option(click.Context(command))
    if help_option is not None and not any("--help" in option.opts for option in options):
        options.append(help_option)
    return {frozenset(option.opts + option.secondary_opts): option for option in options}


def documented_options() -> dict[frozenset[str], str]:
    """The names in each heading of the page of options, with what follows the last: the metavar."""
    found = {}
    for heading in headings(OPTIONS, 3):
        names = re.findall(r"`(--?[\w-]+)[^`]*`", heading)
        found[frozenset(names)] = heading.rpartition(names[-1])[2].strip(" `")
    return found


def test_every_option_with_all_its_names_is_documented_and_no_other() -> None:
    assert set(documented_options()) == set(options_of_the_program())


def test_options_are_documented_with_the_values_that_they_take() -> None:
    assert documented_options() == {names: option.metavar or "" for names, option in options_of_the_program().items()}


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each command line in an indented block that begins with the program's name."""
    text = path.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (nbdkitpy .*)$", text, re.MULTILINE):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("path", MARKDOWN, ids=named)
def test_commands_in_the_documentation_use_options_that_there_are(path: Path) -> None:
    known = frozenset().union(*options_of_the_program())
    used = {word for words in commands(path) for word in words[1:] if re.match("--?[A-Za-z0-9]", word)}

    unknown = {word for word in used if (word.partition("=")[0] if word.startswith("--") else word[:2]) not in known}

    assert not unknown


# --- plugins and filters --------------------------------------------------------------------------------------------


def entry_points() -> list[tuple[str, str, str]]:
    """Kind, name and module of each plugin and filter that comes with the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups: dict[str, dict[str, str]] = project["entry-points"]
    return [
        (kind, name, module)
        for kind in ("plugin", "filter")
        for name, module in sorted(groups[f"nbdkitpy.{kind}s"].items())
    ]


UNITS = [pytest.param(*unit, id=f"{unit[1]}-{unit[0]}") for unit in entry_points()]


def unit_readme(kind: str, name: str) -> Path:
    return ROOT / f"{kind}s" / f"nbdkitpy_{kind}s" / name.replace("-", "_") / "README.md"


def registered(module: Any) -> list[type[Backend]]:
    """The classes that the hooks of `module` hand over."""
    classes: list[type[Backend]] = []
    for hook in hook_names():
        implementation: Callable[[Callable[[type[Backend]], None]], None] | None = getattr(module, hook, None)
        if implementation is not None:
            implementation(classes.append)
    return classes


def class_of(module: str, name: str) -> type[Backend]:
    (found,) = [cls for cls in registered(importlib.import_module(module)) if cls.name == name]
    return found


def test_every_directory_of_a_unit_is_an_entry_point() -> None:
    directories = {
        (kind, path.name.replace("_", "-"))
        for kind in ("plugin", "filter")
        for path in (ROOT / f"{kind}s" / f"nbdkitpy_{kind}s").iterdir()
        if path.is_dir() and not MADE.fullmatch(path.name)
    }

    assert directories == {(kind, name) for kind, name, _ in entry_points()}


@pytest.mark.parametrize(("kind", "name", "module"), UNITS)
def test_readme_of_a_unit_has_the_fixed_headings(kind: str, name: str, module: str) -> None:
    path = unit_readme(kind, name)

    assert headings(path, 1) == [f"nbdkitpy-{name}-{kind}"]
    assert headings(path, 2) == UNIT_HEADINGS


@pytest.mark.parametrize(("kind", "name", "module"), UNITS)
def test_readme_of_a_unit_documents_its_parameters_and_no_other(kind: str, name: str, module: str) -> None:
    section = prose(unit_readme(kind, name)).partition("\n## Parameters\n")[2].partition("\n## ")[0]
    declared = class_of(module, name).parameters

    documented = [heading.replace("`", "") for heading in re.findall(r"^### (.+)$", section, re.MULTILINE)]

    assert documented == [f"{key}={parameter.metavar}" for key, parameter in declared.items()]


@pytest.mark.parametrize(("kind", "name", "module"), UNITS)
def test_readme_links_to_every_unit(kind: str, name: str, module: str) -> None:
    assert f"({named(unit_readme(kind, name))})" in README.read_text()


# --- the contract ---------------------------------------------------------------------------------------------------


def hook_names() -> list[str]:
    return [name for name, value in vars(hookspecs).items() if hasattr(value, f"{hookspecs.PROJECT}_spec")]


def written(name: str, value: object, *, method: bool) -> str:
    """A member as the tables of the contract write it: ``pread(count, offset)``, ``name``."""
    if not inspect.isroutine(value):
        return name
    parameters = list(inspect.signature(value).parameters)[method:]
    return f"{name}({', '.join(parameters)})"


def members_of_the_contract() -> Iterator[str]:
    for cls in (Backend, Plugin, AsyncPlugin, Filter, Handle, FilterHandle):
        # What two classes share is in a private base of both.
        own = [*(base for base in cls.__bases__ if base.__name__.startswith("_")), cls]
        inherited = {name for base in set(cls.__mro__).difference(own) for name in members(base)}
        for name in dict.fromkeys(name for base in own for name in members(base)):
            if not name.startswith("_") and name not in inherited:
                yield f"{cls.__name__}.{written(name, getattr(cls, name, None), method=True)}"


def members(cls: type) -> list[str]:
    return [*inspect.get_annotations(cls), *vars(cls)]


def test_coroutines_are_called_like_the_plain_verbs() -> None:
    for name in [*VERBS, "close"]:
        plain, coroutine = getattr(Handle, name), getattr(AsyncHandle, name)

        assert inspect.iscoroutinefunction(coroutine)
        assert inspect.signature(coroutine) == inspect.signature(plain)


def rows(text: str) -> list[str]:
    """What stands as code in the first column of tables."""
    return re.findall(r"^\| `([^`|]+)` \|", text, re.MULTILINE)


def test_contract_documents_every_member_and_no_other() -> None:
    documented = [row for row in rows(CONTRACT.read_text()) if re.match(r"[A-Z]\w+\.", row)]

    assert sorted(documented) == sorted(members_of_the_contract())


def test_contract_documents_every_hook_and_no_other() -> None:
    section = section_of(CONTRACT, "Hooks")

    assert rows(section) == [written(name, getattr(hookspecs, name), method=False) for name in hook_names()]


def test_contract_lists_the_verbs_and_questions_in_the_order_of_the_code() -> None:
    documented = [row for row in rows(CONTRACT.read_text()) if row.startswith("Handle.") and row.endswith(")")]

    in_code = [member for member in members_of_the_contract() if member in documented]

    assert documented == in_code


def test_contract_mentions_everything_that_units_may_import() -> None:
    page = CONTRACT.read_text()

    assert not [name for name in nbdkitpy.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", page)]


def test_reference_has_everything_that_may_be_imported_and_no_more() -> None:
    directives = re.findall(r"^\.\. (?:auto|py:)\w+:: (\w+)$", REFERENCE.read_text(), re.MULTILINE)

    public = [name for name in nbdkitpy.__all__ if name != "__version__"]
    assert sorted(directives) == sorted([*public, *testing.__all__, *hook_names()])


def test_security_page_names_a_test_of_each_row_and_each_row_of_a_test() -> None:
    page = SECURITY.read_text()
    tests = [
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    rows = {row for name in tests for row in re.findall(r"(?<=_)([NRMTAFPDSG]\d+)(?=_)", name)}

    listed = re.findall(r"^\| ([A-Z]\d+) \| .* \| `(\w+)` \|$", page, re.MULTILINE)

    assert {row for row, _ in listed} == rows
    assert not [test for row, test in listed if f"_{row}_" not in test]
    assert not set(re.findall(r"`(test_\w+)`", page)) - set(tests)


def run(code: str) -> Any:
    """Run an example, and return the module that it makes."""
    module = type(sys)("example")
    exec(compile(code, "example", "exec"), vars(module))
    return module


def units_in(code: str) -> list[type[Backend]]:
    """Run an example, and return the classes that it registers."""
    return registered(run(code))


def only_unit_in(code: str, kind: type[Backend]) -> type[Backend]:
    """Run a file that needs neither hook nor name, and return its plugin or filter."""
    (unit,) = [
        each
        for each in vars(run(code)).values()
        if isinstance(each, type) and issubclass(each, kind) and each.__module__ == "example"
    ]
    return unit


def opened(plugin: type[Backend], filters: list[type[Backend]], **parameters: str) -> Handle:
    """The outermost handle of a stack of examples, with these parameters."""
    inner, outer = plugin(), [cls() for cls in filters]
    assert isinstance(inner, Plugin)
    stack = Stack(inner, [each for each in outer if isinstance(each, Filter)], NoServer())
    for key, value in parameters.items():
        stack.config(key, value)
    stack.config_complete()
    stack.preconnect(Client(1), False)
    return stack.open("", False, Client(1)).handle


def test_plugin_of_the_readme_works() -> None:
    (code,) = blocks(README, "python")

    (plugin,) = units_in(code)
    handle = opened(plugin, [])

    assert handle.get_size() == 1 << 30
    assert handle.pread(3, 4096) == b"\xff\xff\xff"
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_tutorial_begins_with_ten_lines_that_serve_a_dictionary() -> None:
    first, *_ = blocks(TUTORIAL, "python")

    handle = opened(only_unit_in(first, Plugin), [])

    assert len([line for line in first.splitlines() if line.strip()]) == 10
    assert handle.get_size() == 100 << 20
    assert handle.pread(12, 0) == b"Hello, disk!"
    assert handle.pread(6, (1 << 20) - 2) == b"\0\0Here"
    assert handle.pread(1, (100 << 20) - 1) == b"\0"


def test_disk_of_the_tutorial_can_be_written_to() -> None:
    _, second, _ = blocks(TUTORIAL, "python")
    plugin = only_unit_in(second, Plugin)()
    assert isinstance(plugin, Plugin)
    handle, other = (plugin.open("", False, Client(1)) for _ in range(2))

    handle.pwrite(memoryview(bytes(range(256)) * 4), 4096, 0)

    assert handle.can_write()
    assert other.pread(2048, 3584) == bytes(512) + bytes(range(256)) * 4 + bytes(512)


def test_tutorial_ends_with_the_plugin_that_ships() -> None:
    *_, last = blocks(TUTORIAL, "python")

    assert last == (ROOT / "plugins" / "nbdkitpy_plugins" / "example1" / "__init__.py").read_text()


def test_filter_of_ten_lines_changes_what_the_tutorial_serves() -> None:
    disk, *_ = blocks(TUTORIAL, "python")
    loud, _ = blocks(WRITING_A_FILTER, "python")

    handle = opened(only_unit_in(disk, Plugin), [only_unit_in(loud, Filter)])

    assert len([line for line in loud.splitlines() if line.strip()]) <= 10
    assert handle.pread(12, 0) == b"HELLO, DISK!"


def written_plugin() -> type[Backend]:
    (code,) = blocks(WRITING_A_PLUGIN, "python")
    (plugin,) = units_in(code)
    return plugin


def written_filter() -> type[Backend]:
    _, code = blocks(WRITING_A_FILTER, "python")
    (filter_,) = units_in(code)
    return filter_


def test_plugin_and_filter_that_are_written_work_together() -> None:
    handle = opened(written_plugin(), [written_filter()], size="1M", until="0")

    assert handle.get_size() == 1 << 20
    assert handle.pread(3, 4096) == b"\xff\xff\xff"
    assert vars(handle)["read"] == 3


def test_disk_of_coroutines_of_the_contract_works() -> None:
    *_, far = blocks(CONTRACT, "python")
    module = type(sys)("example")
    exec(compile(far, "example", "exec"), vars(module))

    with nbdkitpy.serve(vars(module)["Far"]) as server, testing.NbdClient(server) as client:
        client.pwrite(b"far away", 4096)
        data = client.pread(8, 4096)

    assert data == b"far away"


def test_filter_that_is_written_refuses_clients() -> None:
    with pytest.raises(OSError, match="not time yet"):
        opened(written_plugin(), [written_filter()], size="1M", until="24")


def test_package_names_what_is_written() -> None:
    (text,) = blocks(WRITING_A_PLUGIN, "toml")

    points = tomllib.loads(text)["project"]["entry-points"]

    assert list(points["nbdkitpy.plugins"]) == [written_plugin().name]
    assert list(points["nbdkitpy.filters"]) == [written_filter().name]


def test_parameters_of_the_contract_are_as_its_comments_say() -> None:
    sketch = next(code for code in blocks(CONTRACT, "python") if "class Sketch" in code)
    unit: Any = run(sketch).Sketch()

    for key, value in [("size", "1k"), ("deny", "1"), ("deny", "2"), ("keep-open", "no")]:
        assert unit.config(key, value)
    unit.config_complete()

    assert (unit.size, unit.mode, unit.depth, unit.strict) == (1024, "safe", 4, False)
    assert (unit.keep_open, unit.index, unit.deny) == (False, None, (1, 2))


# --- coming from nbdkit ---------------------------------------------------------------------------------------------


def test_options_of_nbdkit_are_ours_too() -> None:
    table = section_of(FROM_NBDKIT, "The command line").partition("| nbdkit | nbdkitpy |\n")[2]
    options = re.findall(r"`(--[\w-]+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))

    assert len(options) > 30
    assert not set(options) - frozenset().union(*options_of_the_program())


def test_methods_beside_callbacks_of_nbdkit_are_there_and_none_of_a_handle_is_left_out() -> None:
    page = section_of(FROM_NBDKIT, "Callbacks")
    members = set(members_of_the_contract())
    inherited = {
        f"{cls}.{member.partition('.')[2]}" for cls in ("Plugin", "Filter", "FilterHandle") for member in members
    }
    beside = set(re.findall(r"`((?:Plugin|Filter|Handle|FilterHandle)\.\w+(?:\([^)`]*\))?)`", page))

    assert not beside - members - inherited
    assert not {each for each in members if re.match(r"Handle\.\w+\(", each)} - {"Handle.overrides(verb)"} - beside


def test_functions_beside_those_of_nbdkit_can_be_imported() -> None:
    table = section_of(FROM_NBDKIT, "Callbacks").partition("Functions:")[2]
    ours = re.findall(r"`(parse_\w+|integer|read_password|ConfigError|Parameter)\b", table)
    fields = re.findall(r"`client\.(\w+)", table)

    assert len(ours) > 8
    assert not set(ours) - set(nbdkitpy.__all__)
    assert not [name for name in fields if not hasattr(Client, name)]


def test_script_and_plugin_side_by_side_serve_the_same(tmp_path: Path) -> None:
    script, plugin = (tmp_path / "ramdisk.py", tmp_path / "ramdisk_plugin.py")
    for path, code in zip((script, plugin), blocks(FROM_NBDKIT, "python")):
        path.write_text(code)

    for word, parameters in (("python", {"script": script}), (str(plugin), {})):
        server = nbdkitpy.serve(word, {**parameters, "size": "10M"}, listen=False)
        with server, testing.NbdClient(server) as client:
            client.pwrite(b"words", 5000)

            assert client.size == 10 << 20
            assert client.pread(10, 4998) == b"\0\0words\0\0\0"


# --- the site and the manual pages ----------------------------------------------------------------------------------


def test_every_unit_has_a_manual_page_made_of_its_readme() -> None:
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    pages = {name: (ROOT / f"{source}.md", summary) for source, name, summary, _, _ in conf["man_pages"]}

    for kind, name, _ in entry_points():
        path, summary = pages.pop(f"nbdkitpy-{name}-{kind}")
        assert path == unit_readme(kind, name)
        assert re.fullmatch(r"[a-z].*[^.]", summary)
    assert list(pages) == ["nbdkitpy", "nbdkitpy-service"]


# --- programs ---------------------------------------------------------------------------------------------------------

PROGRAMS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in (ROOT / "docs" / "library.md",)
    for number, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize("code", PROGRAMS)
def test_programs_of_the_documentation_run_and_say_something_sensible(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=without_coverage(), timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"nbd\+unix://\?socket=/tmp/nbdkitpy\w+/socket\n|b'NBDMAGIC'\n", done.stdout)


def test_library_page_names_every_argument_and_every_member() -> None:
    page = (ROOT / "docs" / "library.md").read_text()
    arguments = set(inspect.signature(nbdkitpy.serve).parameters) - {"plugin", "parameters", "filters"}
    members = {name for name in vars(nbdkitpy.EmbeddedServer) if not name.startswith("_")} | {
        "uri",
        "unix_path",
        "port",
    }

    assert not [name for name in arguments | members if not re.search(rf"`{name}[`=(]", page)]


def test_tests_of_the_testing_page_pass(tmp_path: Path) -> None:
    (tmp_path / "test_page.py").write_text("\n\n".join(blocks(TESTING, "python")))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_page.py"]

    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=without_coverage(), timeout=60, check=False
    )

    assert done.returncode == 0, done.stdout
    assert re.search(r"^[0-9]+ passed", done.stdout, re.MULTILINE)


def test_testing_page_names_all_that_there_is() -> None:
    page = TESTING.read_text()
    suites = {name for cls in (testing.PluginConformance, testing.FilterConformance) for name in attributes(cls)}

    assert not [name for name in suites if not re.search(rf"`{name}[` ,(=]", page)]
    assert not [kind for kind in KINDS if kind != "complete" and f"`{kind}`" not in page]


def attributes(cls: type[object]) -> set[str]:
    """What a suite may say of itself: its attributes and those of its bases that are no methods."""
    annotated = {name for base in cls.__mro__ for name in inspect.get_annotations(base)}
    return {name for name in annotated if not name.startswith("_")}


# --- all pages, all files -------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links, as the usual sites do it."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", MARKDOWN, ids=named)
def test_relative_links_lead_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if not re.match(r"\w+:", link)]

    for link in links:
        target, _, anchor = link.partition("#")
        page = path.parent / target if target else path
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), link


def test_no_file_names_a_path_of_the_place_where_it_was_written() -> None:
    # Written so that this file does not name one either.
    foreign = re.compile(rb"/wor[k]/(main|shared|venv)|/tmp/peer[s]|\.\./share[d]/|/roo[t]/\.pyenv")

    found = [named(path) for path in repository_files() if path.is_file() and foreign.search(path.read_bytes())]

    assert not found

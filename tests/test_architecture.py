"""The house's rules on imports, held by parsing every file: see the layers below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Our modules from the top down: each imports only what stands in a line below its own, or belongs to its own package.
LAYERS = (
    {"testing", "__main__"},
    {"cli", "library"},
    {"config"},
    {"server", "registry"},
    {"protocol", "stack", ""},  # "" is the package's own __init__.py, for its version
    {"coroutines"},
    {"hookspecs", "located", "ranges", "sources"},
    {"backend", "modules"},
    {"distributions", "extents", "locks", "log", "parameters"},
    {"exceptions"},
)
SANS_IO = {"asyncio", "logging", "os", "select", "socket", "threading", "time"}
#: Which of our modules may import these at all.
ONLY_IN = {
    "pluggy": {"hookspecs", "registry"},
    "click": {"cli"},
    "tomli": {"config"},
    "tomllib": {"config"},
    "socket": {"library", "server", "testing"},
    "pytest": {"testing"},
}
#: What our package offers without importing it, which plugins would pay for: only type checkers and functions do that.
OFFERED = "nbdkitpy.library"


def _imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Each module that the file at `path` below its root, parsed, imports; also those that are imported late."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(path.parts[: len(path.parts) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from nbdkitpy import stack` imports a module as well, if there is one of that name.
            names = {f"nbdkitpy.{alias.name}" for alias in node.names} if module == "nbdkitpy" else set()
            yield from {name for name in names if _layer(name.split(".")[1]) is not None} or {module}


def _without_what_is_late(tree: ast.Module) -> ast.Module:
    """The file without functions, and without what only type checkers read; not what is in place of that."""

    class Remove(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST:
            if ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
            return self.generic_visit(node)

    removed: ast.Module = Remove().visit(tree)
    return removed


def _layer(part: str) -> int | None:
    """The line of :data:`LAYERS` in which the part of our package that is called so stands."""
    return next((line for line, parts in enumerate(LAYERS) if part in parts), None)


def _part(dotted: str) -> str:
    """To which part of our package a module belongs."""
    return [*dotted.split("."), ""][1].removesuffix("__init__")


def violations(source: str, path: Path) -> list[str]:
    """Name the rules that `source` would break as the file at `path`."""
    broken = []
    own = path.parts[0]
    part = _part(".".join(path.parts)) if own == "nbdkitpy" else own
    imported = set(_imports(ast.parse(source), path))
    if not part and OFFERED not in _imports(_without_what_is_late(ast.parse(source)), path):
        imported.discard(OFFERED)
    for name in imported:
        top = name.split(".")[0]
        if own != "nbdkitpy":  # plugins and filters
            # Beside its own package a unit has the private modules that some of its distribution share.
            shares = name.startswith(f"{own}._")
            wrong = top.startswith("nbdkitpy") and name != "nbdkitpy" and ".".join(path.parts[:2]) not in name
            wrong &= not shares
        elif top == "nbdkitpy":
            mine, other = _layer(part), _layer(_part(name))
            wrong = mine is None or other is None or (_part(name) != part and other <= mine)
            wrong |= part == "protocol" and _part(name) != part
        else:
            wrong = part == "protocol" and top in SANS_IO
        if wrong or part not in ONLY_IN.get(top, {part}):
            broken.append(f"{path} must not import {name}")
    return broken


FILES = {
    path.relative_to(root): path
    for root, package in (
        (ROOT, "nbdkitpy"),
        (ROOT / "plugins", "nbdkitpy_plugins"),
        (ROOT / "filters", "nbdkitpy_filters"),
    )
    for path in sorted((root / package).rglob("*.py"))
}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_imports_only_what_it_may(path: Path) -> None:
    assert violations(FILES[path].read_text(encoding="utf-8"), path) == []


def test_all_three_packages_are_looked_at() -> None:
    assert {path.parts[0] for path in FILES} == {"nbdkitpy", "nbdkitpy_plugins", "nbdkitpy_filters"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nbdkitpy/backend.py", "import nbdkitpy.stack"),
        ("nbdkitpy/backend.py", "from nbdkitpy.server.session import Session"),
        ("nbdkitpy/backend.py", "from nbdkitpy import Handle"),
        ("nbdkitpy/backend.py", "from . import stack"),
        ("nbdkitpy/extents.py", "from nbdkitpy.parameters import Parameter"),
        ("nbdkitpy/stack.py", "from nbdkitpy.protocol import constants"),
        ("nbdkitpy/stack.py", "from nbdkitpy import config"),
        ("nbdkitpy/server/session.py", "def late():\n    from nbdkitpy.config import ServerConfig"),
        ("nbdkitpy/server/session.py", "from ..cli import main"),
        ("nbdkitpy/server/session.py", "import nbdkitpy.registry"),
        ("nbdkitpy/server/session.py", "import pluggy"),
        ("nbdkitpy/protocol/connection.py", "from nbdkitpy.exceptions import ConfigError"),
        ("nbdkitpy/protocol/connection.py", "from ..extents import Extent"),
        ("nbdkitpy/protocol/connection.py", "import os.path"),
        ("nbdkitpy/protocol/connection.py", "def late():\n    import socket"),
        ("nbdkitpy/protocol/connection.py", "from asyncio.streams import StreamReader"),
        ("nbdkitpy/config/file.py", "import click"),
        ("nbdkitpy/config/file.py", "import socket"),
        ("nbdkitpy/config/__init__.py", "from nbdkitpy.cli.start import serve"),
        ("nbdkitpy/cli/start.py", "import tomllib"),
        ("nbdkitpy/server/launch.py", "from nbdkitpy.config import ServerConfig"),
        ("nbdkitpy/stack.py", "from socket import socket"),
        ("nbdkitpy/server/session.py", "def late():\n    import pytest"),
        ("nbdkitpy/library/life.py", "from nbdkitpy.testing import NbdClient"),
        ("nbdkitpy/unheard_of.py", "import nbdkitpy.backend"),
        ("nbdkitpy/__init__.py", "from nbdkitpy.library import serve"),
        ("nbdkitpy/__init__.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from nbdkitpy import library"),
        ("nbdkitpy/__init__.py", "def late():\n    from nbdkitpy import cli"),
        ("nbdkitpy/library/__init__.py", "from nbdkitpy.cli import main"),
        ("nbdkitpy/config/file.py", "def late():\n    from nbdkitpy import library"),
        ("nbdkitpy_plugins/memory/__init__.py", "from nbdkitpy.backend import Handle"),
        ("nbdkitpy_plugins/memory/__init__.py", "from nbdkitpy import stack"),
        ("nbdkitpy_plugins/memory/__init__.py", "import nbdkitpy_plugins.file"),
        ("nbdkitpy_plugins/memory/__init__.py", "from ..file import FilePlugin"),
        ("nbdkitpy_filters/ip/rules.py", "import nbdkitpy_plugins.file"),
        ("nbdkitpy_filters/ip/rules.py", "import nbdkitpy_plugins._methods"),
        ("nbdkitpy_plugins/_methods.py", "import nbdkitpy_plugins.sh"),
        ("nbdkitpy_filters/ip/rules.py", "import pluggy"),
        ("nbdkitpy_filters/ip/rules.py", "import socket"),
    ],
)
def test_planted_violation_is_found(path: str, source: str) -> None:
    assert len(violations(source, Path(path))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nbdkitpy/__init__.py", "from nbdkitpy.backend import Handle"),
        ("nbdkitpy/__init__.py", "if TYPE_CHECKING:\n    from nbdkitpy.library import serve"),
        ("nbdkitpy/__init__.py", "def late():\n    from nbdkitpy import library"),
        ("nbdkitpy/library/life.py", "from nbdkitpy.config.units import configure\nfrom .. import registry"),
        (
            "nbdkitpy/cli/__init__.py",
            "import click\nfrom nbdkitpy import __version__\nfrom nbdkitpy.server import service",
        ),
        ("nbdkitpy/cli/start.py", "import click\nfrom nbdkitpy.cli.grammar import load\nfrom nbdkitpy.config import x"),
        ("nbdkitpy/config/file.py", "import tomllib\nfrom nbdkitpy.config.units import x\nfrom nbdkitpy import log"),
        ("nbdkitpy/server/session.py", "import socket\nfrom .listener import x\nfrom ..protocol import constants"),
        ("nbdkitpy/protocol/connection.py", "import struct\nfrom . import constants\nfrom .messages import x"),
        ("nbdkitpy_plugins/memory/__init__.py", "import os, mmap\nfrom nbdkitpy import Handle, Plugin"),
        ("nbdkitpy_filters/ip/__init__.py", "from nbdkitpy_filters.ip.rules import Rule\nfrom .rules import Rule"),
        ("nbdkitpy_plugins/sh/__init__.py", "from nbdkitpy_plugins._methods import Reply"),
    ],
)
def test_what_is_allowed_is_not_complained_of(path: str, source: str) -> None:
    assert violations(source, Path(path)) == []

"""``--new-plugin`` and ``--new-filter``: write a package to begin with, which works, and is to be changed."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple

import click

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.registry import Kind, Registry

__all__ = ["write_package"]

#: What may be the name of a unit, of a distribution, and with _ in place of - part of that of a module.
_NAME = re.compile(r"(?=.{1,32}$)[a-z]([a-z0-9_-]*[a-z0-9])?", re.ASCII | re.DOTALL)

_VARIABLE = re.compile(r"\{\{(\w+)\}\}")


class _File(NamedTuple):
    """A file of the package, and the template that it is made of. Both may have variables in them."""

    path: str
    template: str


_FILES = (
    _File("pyproject.toml", "package/pyproject.toml.in"),
    _File("README.md", "{{kind}}/README.md.in"),
    _File(".gitignore", "package/.gitignore.in"),
    _File("{{module}}.py", "{{kind}}/module.py.in"),
    _File("tests/test_{{module}}.py", "{{kind}}/test.py.in"),
)


def write_package(kind: Kind, name: str) -> None:
    """Write a package with a unit into a new directory of the current one, and say what can be done with it.

    Raises:
        ConfigError: it cannot have that name, or the directory cannot be made. Nothing is ever overwritten.
    """
    variables = _variables(kind, name)
    directory = f"nbdkitpy-{name}"
    try:
        os.mkdir(directory)
        os.mkdir(os.path.join(directory, "tests"))
        for file in _FILES:
            with open(os.path.join(directory, _filled(file.path, variables)), "x", encoding="utf-8") as stream:
                stream.write(_filled(_template(_filled(file.template, variables)), variables))
    except FileExistsError as error:
        raise ConfigError(
            f"--new-{kind.value}: there is something called {error.filename} already; it stays as it is"
        ) from error
    except OSError as error:
        raise ConfigError(f"--new-{kind.value}: {error.filename or directory}: {error.strerror}") from error
    click.echo(_filled(_NEXT[kind], variables), nl=False)


def _variables(kind: Kind, name: str) -> Mapping[str, str]:
    """What templates have to be filled with."""
    option = f"--new-{kind.value}"
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{option}: the name must have at most 32 small letters, digits, - and _, begin with a letter and end"
            f" with a letter or a digit; not {name!r}"
        )
    module = f"nbdkitpy_{name.replace('-', '_')}"
    for offer in Registry().names(kind):
        if offer.name.lower().replace("-", "_") == name.replace("-", "_"):
            raise ConfigError(f'{option}: there is a {kind.value} "{offer.name}" already, of {offer}')
    if importlib.util.find_spec(module) is not None:
        raise ConfigError(f'{option}: a module "{module}" is installed already; take another name')
    words = name.replace("-", "_").split("_")
    return {"kind": kind.value, "name": name, "module": module, "Class": "".join(map(str.capitalize, words))}


def _template(path: str) -> str:
    return files("nbdkitpy.cli").joinpath("templates", *path.split("/")).read_text(encoding="utf-8")


def _filled(text: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables[match[1]], text)


_BEGINNING = """\
nbdkitpy-{{name}} has been written. It works as it is, and is yours to change. Next:

    cd nbdkitpy-{{name}}
    pip install -e '.[test]'
    pytest
"""

_NEXT = {
    Kind.PLUGIN: _BEGINNING + "    nbdkitpy {{name}} 1G --run 'nbdinfo \"$uri\"'\n",
    Kind.FILTER: _BEGINNING + "    nbdkitpy --filter={{name}} memory 1G --run 'nbdinfo \"$uri\"'\n",
}

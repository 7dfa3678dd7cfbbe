"""The examples of the documentation are right: commands serve, and configurations are taken.

Examples in Python are run by ``tests/test_docs.py``, commands that need a client, a shell or a process of their own by
``tests/interop/test_examples.py``.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client
from nbdkitpy.cli import command, start
from nbdkitpy.cli.program import Invocation
from nbdkitpy.cli.start import Prepared
from nbdkitpy.config import ServerConfig
from tests.certificates import make_psk_file
from tests.documents import MARKDOWN, ROOT, blocks, named
from tests.examples import COMMANDS, Commands, commands_that_are_run, in_place, make_place, tables_of

#: Pages with examples in Python, of which each is run by a test of its own.
IN_PYTHON = {
    "README.md",
    "docs/coming-from-nbdkit.md",
    "docs/contract.md",
    "docs/library.md",
    "docs/testing.md",
    "docs/tutorial.md",
    "docs/writing-a-filter.md",
    "docs/writing-a-plugin.md",
    "plugins/nbdkitpy_plugins/python/README.md",
}

#: Pages with commands that are not run, and why: each says so before them.
NOT_RUN = {
    "README.md": {"needs root"},
    "benchmarks/README.md": {"takes minutes"},
    "fuzz/README.md": {"takes minutes"},
    "docs/index.md": {"needs the network"},
    "docs/writing-a-filter.md": {"needs a package that is installed"},
    "docs/writing-a-plugin.md": {"needs a package that is installed"},
    "docs/config.md": {"what is printed"},
    "docs/design.md": {"a list of files", "a picture"},
    "docs/service.md": {
        "a file of another program",
        "needs a virtual machine",
        "needs root and a user",
        "what is printed",
    },
    "docs/tls.md": {"needs another machine"},
    "filters/nbdkitpy_filters/log/README.md": {"what is printed"},
    "systemd/README.md": {"a file of another program", "needs root and a user", "needs root and systemd"},
}


@pytest.fixture
def place(tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to run examples in, with certificates and keys."""
    for name in ("etc/pki", "etc/nbdkitpy"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "etc/pki/nbdkit").symlink_to(certificates)
    make_psk_file(tmp_path / "etc/nbdkitpy/keys.psk", "alice")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def _opens_in_place_of_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the program open what it would serve, and end."""
    monkeypatch.setattr(start, "run", open_first_export)


def open_first_export(config: ServerConfig, prepared: Prepared, *_: Any, **__: Any) -> int:
    stack, client, readonly = prepared.stack, Client(1), config.server.readonly
    with contextlib.ExitStack() as undo:
        undo.callback(stack.unload)
        stack.config_complete()
        stack.get_ready()
        stack.after_fork()
        undo.callback(stack.cleanup)
        exports = stack.list_exports(client, readonly)
        opened = stack.open(exports[0].name, readonly, client)
        undo.callback(opened.close)
        assert opened.capabilities.size > 0
    return 0


def run_program(words: list[str]) -> None:
    status = command().main(words, prog_name="nbdkitpy", obj=Invocation(os.getppid()), standalone_mode=False)

    assert status == 0


@pytest.mark.parametrize("example", commands_that_are_run(only_serve=True), ids=str)
@pytest.mark.usefixtures("_opens_in_place_of_serving")
def test_commands_serve(example: Commands, place: Path) -> None:
    make_place(place, example.page)

    for line in example.lines:
        _, *words = shlex.split(in_place(line, place), comments=True)
        run_program(words)


@pytest.mark.parametrize("page", [page for page in MARKDOWN if list(tables_of(page))], ids=named)
def test_configurations_are_taken(page: Path, place: Path) -> None:
    make_place(place, page)

    for text in tables_of(page):
        (place / "shown.toml").write_text(in_place(text, place))
        run_program(["--config", "shown.toml", "--check-config"])


@pytest.mark.parametrize("page", [page for page in MARKDOWN if blocks(page, "ini")], ids=named)
def test_units_of_systemd_can_be_read(page: Path) -> None:
    for text in blocks(page, "ini"):
        parser = configparser.ConfigParser(strict=False)
        parser.read_string(text)

        assert set(parser.sections()) <= {"Unit", "Socket", "Service", "Install"}


def test_targets_of_make_are_there() -> None:
    lines = [line for each in COMMANDS for line in each.lines]
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    used = {word for line in lines if line.startswith("make ") for word in re.findall(r"^make ([a-z-]+)", line)}

    assert used
    assert used <= set(targets)


def test_every_example_in_python_is_run_by_a_test_of_its_own() -> None:
    assert {named(page) for page in MARKDOWN if blocks(page, "python")} == IN_PYTHON


def test_commands_that_are_not_run_are_these() -> None:
    found: dict[str, set[str]] = {}
    for each in COMMANDS:
        if each.why_not:
            found.setdefault(named(each.page), set()).add(each.why_not)

    assert {page: reasons - {"a form"} for page, reasons in found.items() if reasons != {"a form"}} == NOT_RUN

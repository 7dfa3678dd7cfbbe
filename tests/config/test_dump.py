"""A configuration written as a file: it says the same, and tells no secrets."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle, Parameter, Plugin, Repeated, parse_string, read_password
from nbdkitpy.config import Assignment, DebugFlag, ServerConfig, server_config
from nbdkitpy.config.dump import to_toml
from nbdkitpy.config.file import Document, read_file
from nbdkitpy.config.units import Given, Reference, UnitTable, configure
from nbdkitpy.server.options import AddressFamily
from nbdkitpy.stack import Stack
from tests.serving import NoServer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Disk(Plugin):
    name = "disk"
    label = Parameter(parse_string)
    tag = Repeated(parse_string)
    password = Parameter(read_password, secret=True)

    def config(self, key: str, value: str) -> bool:
        return key.startswith("x.") or super().config(key, value)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        raise NotImplementedError


class Pass(Filter):
    name = "pass"
    label = Parameter(parse_string)


def dumped(
    words: Sequence[Assignment] = (),
    parameters: dict[str, Given] | None = None,
    filters: Sequence[Filter] = (),
    **values: Any,
) -> str:
    stack = Stack(Disk(), filters, NoServer())
    configured = configure(stack, words, [UnitTable("disk", "FILE", parameters or {})])
    config = server_config(values, "disk", filters=[each.name for each in filters])
    return to_toml(config, stack, configured)


def read(text: str, tmp_path: Path) -> Document:
    path = tmp_path / "dumped.toml"
    path.write_text(text)
    return read_file(str(path))


def again(text: str, tmp_path: Path) -> ServerConfig:
    """The settings of the server that a dump comes to."""
    document = read(text, tmp_path)
    return server_config(document.values, "disk", listen=document.listen)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"threads": 3, "handshake_timeout": 0.25, "drain": 0.0, "idle_timeout": 1e-5},
        {"readonly": True, "oldstyle": True, "structured_replies": False, "meta_contexts": False},
        {"handshake_flags": 1, "export_name": 'a"b\\c\n\x7f\u200bé', "name": "n"},
        {"log": "/var/log/x", "log_format": "json", "verbose": True, "print_uri": True},
        {"debug": (DebugFlag("a", "b.c", -1), DebugFlag("d", "e", 2))},
        {"user": "nbd", "group": "7", "swap": True, "selinux_label": "a:b", "keepalive": True},
        {"foreground": True, "pidfile": "/run/pid"},
        {"exit_with_parent": True},
        {"address": "any", "port": "nbd"},
        {"address": "::1", "port": "0", "address_family": AddressFamily.INET6},
        {"unix": "/run/sock"},
        {"unix": "-"},
        {"vsock": True, "port": "7"},
    ],
)
def test_settings_are_the_same_when_they_are_read_again(tmp_path: Path, values: dict[str, Any]) -> None:
    # What has the server stay in the foreground is one thing, and that it does is another.
    assert again(dumped(**values), tmp_path) == server_config(values, "disk")


def test_parameters_go_to_the_layers_that_have_them(tmp_path: Path) -> None:
    text = dumped(
        [("label", "outer"), ("tag", "a")],
        {"label": Given(("inner",)), "x.y": Given(("1", "2"), is_array=True), "x.z": Given(("3",))},
        [Pass(), Pass()],
    )

    document = read(text, tmp_path)

    assert [(table.name, table.parameters) for table in document.filters] == [
        ("pass", {"label": Given(("outer",))}),
        ("pass", {}),
    ]
    assert document.plugin is not None
    assert document.plugin.name == "disk"
    assert document.plugin.parameters == {
        "tag": Given(("a",)),
        "label": Given(("inner",)),
        "x.y": Given(("1", "2"), is_array=True),
        "x.z": Given(("3",)),
    }


def test_of_what_is_given_twice_the_last_one_is_shown() -> None:
    assert 'label = "second"\n' in dumped([("label", "first"), ("label", "second")])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (Given(()), "tag = []"),
        (Given(("a",), is_array=True), 'tag = ["a"]'),
        (Given(("a", "b"), is_array=True), 'tag = ["a", "b"]'),
    ],
)
def test_what_may_be_repeated_is_an_array(given: Given, line: str) -> None:
    assert f"\n{line}\n" in dumped(parameters={"tag": given})


def test_a_secret_is_hidden_and_where_it_is_is_not(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    path = str(tmp_path / "password")

    plain = dumped([("password", "hunter2")])
    by_word = dumped([("password", f"+{path}")])
    by_reference = dumped(parameters={"password": Given((Reference("file", path),))})

    assert '\n# password = "***"\n' in plain
    assert f'\npassword = "+{path}"\n' in by_word
    assert f'\npassword = {{ file = "{path}" }}\n' in by_reference
    assert "hunter2" not in plain + by_word + by_reference


def test_a_password_from_a_descriptor_cannot_be_read_again_so_it_is_hidden(tmp_path: Path) -> None:
    with open(tmp_path / "password", "w+") as stream:
        stream.write("secret\n")
    descriptor = os.open(tmp_path / "password", os.O_RDONLY)

    assert '\n# password = "***"\n' in dumped([("password", f"-{descriptor}")])


@pytest.mark.parametrize("text", ['"', "\\", "\0", "\n\t\r", "\x1b[31m", "\x7f", "é€🖴", "\u2028", "'", "a#b = [c]"])
def test_any_text_is_written_so_that_it_is_read_again_and_harmless(text: str) -> None:
    written = dumped([("label", text)])

    assert tomllib.loads(written)["plugin"]["label"] == text
    assert all(c.isprintable() or c == "\n" for c in written)


def test_what_is_no_text_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"^--dump-config: TOML cannot say 'a\\udcff', which is no text in UTF-8$"):
        dumped([("label", "a\udcff")])

"""The settings: each declared once, and what they come to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.config import SETTINGS, ServerConfig, Setting, endpoints, server_config
from nbdkitpy.config.settings import LISTENING, value_in
from nbdkitpy.server.options import AddressFamily, Endpoint, ServerOptions, Transport

PAGE = Path(__file__).parents[2] / "docs" / "config.md"

TCP, UNIX = Endpoint(port="1"), Endpoint(Transport.UNIX, unix_path="/x")


def fields(cls: type[ServerConfig] | type[ServerOptions]) -> set[str]:
    return set(cls._fields)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.options[-1])
def test_each_setting_goes_somewhere(setting: Setting) -> None:
    assert setting.name in fields(ServerConfig) | fields(ServerOptions) | LISTENING | {"foreground"}


def test_no_two_settings_have_the_same_option_or_key() -> None:
    options = [option for setting in SETTINGS for option in setting.options]
    keys = [setting.key for setting in SETTINGS if setting.key]

    assert len(set(options)) == len(options)
    assert len(set(keys)) == len(keys)


def test_each_key_is_a_long_option() -> None:
    assert [setting.key for setting in SETTINGS if setting.key and f"--{setting.key}" not in setting.options] == []


def test_switches_are_booleans_in_the_file_and_nothing_else_is() -> None:
    for setting in SETTINGS:
        assert setting.is_switch is not bool(setting.metavar)
        assert bool not in setting.kinds


def test_page_has_every_key_of_server_and_no_other() -> None:
    section = PAGE.read_text().partition("\n## `[server]`\n")[2].partition("\n## ")[0]

    assert re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE) == sorted(filter(None, (s.key for s in SETTINGS)))


def test_without_settings_all_is_as_the_defaults_say() -> None:
    assert server_config({}, "null") == ServerConfig("null")


@pytest.mark.parametrize("name", ["foreground", "single", "exit_with_parent", "reload"])
def test_what_needs_the_terminal_stays_in_the_foreground(name: str) -> None:
    assert server_config({}, "null").background
    assert not server_config({name: True}, "null").background


@pytest.mark.parametrize("name", ["single", "user", "group"])
def test_what_is_not_for_development_excludes_reload(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--reload is for development, and cannot be had with --{name}; "):
        server_config({"reload": True, name: "0"}, "null")


def test_with_a_command_or_sockets_of_a_service_manager_it_stays_in_the_foreground() -> None:
    assert not server_config({"run": "true"}, "null").background
    assert not server_config({}, "null", fds=(3,)).background


@pytest.mark.parametrize(
    ("values", "listen", "fds", "expected"),
    [
        ({}, (), (), [Endpoint()]),
        ({}, (TCP, UNIX), (), [TCP, UNIX]),
        ({"port": "7"}, (TCP, UNIX), (), [Endpoint(port="7")]),
        ({"address": "any"}, (TCP, UNIX), (), [Endpoint(address="any")]),
        ({"unix": "/y"}, (TCP, UNIX), (), [Endpoint(Transport.UNIX, unix_path="/y")]),
        ({"unix": "-"}, (TCP, UNIX), (), [Endpoint(Transport.UNIX)]),
        ({"vsock": True}, (TCP, UNIX), (), [Endpoint(Transport.VSOCK)]),
        (
            {"address_family": AddressFamily.INET},
            (TCP, UNIX),
            (),
            [Endpoint(port="1", address_family=AddressFamily.INET), UNIX],
        ),
        ({"address_family": AddressFamily.INET}, (), (), [Endpoint(address_family=AddressFamily.INET)]),
        ({"run": "x"}, (), (), [Endpoint(Transport.UNIX)]),
        ({"run": "x"}, (TCP,), (), [TCP]),
        ({"run": "x", "port": "7"}, (), (), [Endpoint(port="7")]),
        ({}, (TCP, UNIX), (3, 4), [Endpoint(fd=3), Endpoint(fd=4)]),
        ({"vsock": True}, (), (3,), [Endpoint(fd=3)]),
        ({"single": True}, (TCP, UNIX), (), []),
    ],
)
def test_where_is_listened(
    values: dict[str, Any], listen: tuple[Endpoint, ...], fds: tuple[int, ...], expected: list[Endpoint]
) -> None:
    assert list(endpoints(values, listen, fds)) == expected


def test_values_are_found_again_in_the_configuration() -> None:
    config = server_config({"threads": 3, "name": "n", "oldstyle": True, "foreground": True}, "null")

    found = {setting.key: value_in(config, setting) for setting in SETTINGS if setting.key}

    assert (found["threads"], found["name"], found["oldstyle"], found["foreground"]) == (3, "n", True, True)
    assert (found["pidfile"], found["debug"], found["timeout"]) == (None, (), 10.0)

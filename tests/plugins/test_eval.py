"""The eval plugin: where the methods come from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from nbdkitpy import Client, ConfigError, Support
from nbdkitpy.stack import Capabilities
from nbdkitpy_plugins._method_plugin import METHODS
from nbdkitpy_plugins.eval import EvalPlugin
from tests.plugins.methods import loaded

CLIENT = Client(1)


class Load(Protocol):
    """Give the plugin parameters."""

    def __call__(self, **parameters: str) -> EvalPlugin:
        """Return the plugin."""


@pytest.fixture
def load() -> Iterator[Load]:
    plugins: list[EvalPlugin] = []

    def with_parameters(**parameters: str) -> EvalPlugin:
        plugins.append(EvalPlugin())
        loaded(plugins[-1], **parameters)
        return plugins[-1]

    yield with_parameters
    for plugin in plugins:
        plugin.unload()


def test_scripts_get_the_arguments_of_their_methods(load: Load) -> None:
    plugin = load(open="echo handle", get_size="echo 1M", pread='printf "$1 $2 $3 $4"')

    assert plugin.open("", False, CLIENT).pread(17, 7) == b"pread handle 17 7"


def test_what_is_not_given_is_missing(load: Load) -> None:
    capabilities = Capabilities.ask(load(get_size="echo 1M", pread=":").open("", False, CLIENT))

    assert not capabilities.can_write
    assert not capabilities.can_flush
    assert capabilities.can_cache is Support.NONE


def test_what_is_given_can_be_done(load: Load) -> None:
    verbs = dict.fromkeys(("pread", "pwrite", "flush", "trim", "zero", "extents", "cache"), ":")

    capabilities = Capabilities.ask(load(get_size="echo 1M", **verbs).open("", False, CLIENT))

    assert capabilities == Capabilities(
        size=1 << 20,
        can_write=True,
        can_zero=Support.NATIVE,
        can_fast_zero=False,
        can_trim=True,
        can_fua=Support.EMULATE,
        can_flush=True,
        is_rotational=False,
        can_multi_conn=False,
        can_cache=Support.NATIVE,
        can_extents=True,
        block_size=None,
    )


def test_who_can_also_says_whether(load: Load) -> None:
    plugin = load(get_size="echo 1M", pwrite=":", can_write="exit 3")

    assert not plugin.open("", False, CLIENT).can_write()


def test_missing_is_called_for_what_is_not_given(load: Load) -> None:
    plugin = load(get_size="echo 1M", pwrite=":", missing='echo "$@" >>$tmpdir/calls; exit 2')

    handle = plugin.open("name", False, CLIENT)
    handle.get_size()
    handle.can_write()
    handle.close()

    assert Path(plugin._directory, "calls").read_text() == "open false name false\nclose \n"


@pytest.mark.parametrize("key", [*METHODS, "missing"])
def test_every_method_can_be_given(load: Load, key: str) -> None:
    plugin = EvalPlugin()

    assert plugin.config(key, "exit 3")


def test_other_parameters_are_given_to_config(load: Load) -> None:
    plugin = load(config='echo "$2=$3" >>$tmpdir/given', size="1M", load="now")

    assert Path(plugin._directory, "given").read_text() == "size=1M\nload=now\n"


def test_other_parameters_need_config(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^eval: there is no method config to take the parameter size=$"):
        load(size="1M")


def test_size_is_required(load: Load) -> None:
    with pytest.raises(ConfigError, match="eval: get_size=SCRIPT is missing"):
        load(pread=":").config_complete()


def test_the_rest_is_not(load: Load) -> None:
    plugin = load(get_size="echo 1M", config_complete="touch $tmpdir/complete")

    plugin.config_complete()

    assert Path(plugin._directory, "complete").exists()


def test_no_bare_words_are_taken() -> None:
    assert EvalPlugin().magic_config_key() is None


def test_help_lists_the_methods() -> None:
    text = EvalPlugin().config_help({})

    assert all(method in text for method in METHODS)

"""The sh plugin, and what it has in common with eval: methods, what they are given, and what they print."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from nbdkitpy import BlockSize, Client, ConfigError, Export, Extent, Flags, Handle, Support, ThreadModel
from nbdkitpy.stack import Capabilities
from nbdkitpy_plugins._method_plugin import parse_exports, parse_extents
from nbdkitpy_plugins.sh import ShPlugin
from tests.plugins.methods import loaded
from tests.serving import AskedServer

CLIENT = Client(1, tls=True)

#: Takes note of all calls; answers those that a test has a line for, and knows no others.
FRAME = """#!/bin/sh
for each; do printf '<%s>' "$each" >>$tmpdir/calls; done
echo >>$tmpdir/calls
case "$1" in
{cases}
*) exit 2 ;;
esac
"""

Sh = ShPlugin


class Load(Protocol):
    """Load a script."""

    def __call__(self, **methods: str) -> ShPlugin:
        """Return the plugin with a script of these methods."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "script"


@pytest.fixture
def load(path: Path) -> Iterator[Load]:
    plugins: list[ShPlugin] = []

    def with_script(**methods: str) -> ShPlugin:
        cases = "\n".join(f"{name}) {script} ;;" for name, script in methods.items())
        path.write_text(FRAME.format(cases=cases))
        path.chmod(0o755)
        plugins.append(ShPlugin())
        loaded(plugins[-1], script=str(path))
        forget(plugins[-1])
        return plugins[-1]

    yield with_script
    for plugin in plugins:
        plugin.unload()


def calls(plugin: ShPlugin) -> list[str]:
    """What the script has been called with, since :func:`forget`."""
    file = Path(plugin._directory, "calls")
    return file.read_text().splitlines() if file.exists() else []


def forget(plugin: ShPlugin) -> None:
    Path(plugin._directory, "calls").unlink(missing_ok=True)


def opened(plugin: ShPlugin) -> Handle:
    handle = plugin.open("", False, CLIENT)
    forget(plugin)
    return handle


# --- the script ---


def test_script_is_told_that_it_has_been_loaded_and_asked_for_its_magic_key(path: Path) -> None:
    path.write_text(FRAME.format(cases="magic_config_key) echo file ;;"))
    path.chmod(0o755)
    plugin = ShPlugin()
    before = plugin.magic_config_key()

    loaded(plugin, script=str(path))
    found = calls(plugin)
    plugin.unload()

    assert found == ["<load>", "<magic_config_key>"]
    assert (before, plugin.magic_config_key()) == (None, "file")


def test_script_gets_all_other_parameters(load: Load) -> None:
    plugin = load(config="exit 0")

    plugin.config("a", "b c")
    plugin.config("script", "")

    assert calls(plugin) == ["<config><a><b c>", "<config><script><>"]


def test_script_that_takes_no_parameters(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^sh: there is no method config to take the parameter password=$"):
        load().config("password", "secret")


def test_failure_of_a_method_of_the_servers_life_is_a_wrong_configuration(load: Load) -> None:
    plugin = load(config="echo EINVAL there is no such key >&2; exit 1")

    with pytest.raises(ConfigError, match=r"^sh: config: there is no such key$"):
        plugin.config("a", "b")


@pytest.mark.parametrize("parameters", [{"a": "b"}, {"script_": "x"}])
def test_script_must_come_first(parameters: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="sh: the first parameter must be the script, not"):
        loaded(ShPlugin(), **parameters)


def test_script_is_required() -> None:
    with pytest.raises(ConfigError, match="script=SCRIPT is missing"):
        ShPlugin().config_complete()


@pytest.mark.parametrize("text", ["", "/no/such/script", "a\0b"])
def test_script_that_is_not_there(text: str) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        ShPlugin().config("script", text)


def test_script_must_be_executable(path: Path) -> None:
    path.write_text("")
    path.chmod(0o644)

    with pytest.raises(ConfigError, match=r"may be executed \(see chmod \+x\)"):
        ShPlugin().config("script", str(path))


@pytest.mark.parametrize("first_line", ["", "#!/bin/sh\n"])
def test_script_may_be_on_standard_input(first_line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = first_line + 'case "$1" in get_size) echo 3M ;; *) exit 2 ;; esac'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(script.encode())))
    plugin = ShPlugin()

    loaded(plugin, script="-")
    size = plugin.open("", False, CLIENT).get_size()
    plugin.unload()

    assert size == 3 << 20


def test_nothing_on_standard_input_is_no_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    plugin = ShPlugin()

    with pytest.raises(ConfigError, match="there is no script on standard input"):
        loaded(plugin, script="-")
    plugin.unload()


# --- life of the server ---


def test_directory_is_empty_private_and_removed_at_the_end() -> None:
    plugin = ShPlugin()
    loaded(plugin)
    directory = Path(plugin._directory)

    content, mode = [*directory.iterdir()], directory.stat().st_mode & 0o777
    (directory / "left").mkdir()
    plugin.unload()

    assert (content, mode) == ([], 0o700)
    assert not directory.exists()


def test_failure_of_unload_does_not_matter(load: Load) -> None:
    load(unload="exit 1").unload()


@pytest.mark.parametrize("name", ["config_complete", "get_ready", "after_fork"])
def test_methods_of_the_servers_life(load: Load, name: str) -> None:
    plugin = load()

    getattr(plugin, name)()

    assert calls(plugin) == [f"<{name}>"]


@pytest.mark.parametrize("name", ["config_complete", "get_ready", "after_fork", "thread_model", "dump"])
def test_their_failures_are_told(load: Load, name: str) -> None:
    method = {"dump": "dump_plugin"}.get(name, name)

    with pytest.raises(ConfigError, match=f"^sh: {method}: it is too late$"):
        getattr(load(**{method: "echo it is too late >&2; exit 1"}), name)()


@pytest.mark.parametrize("model", list(ThreadModel))
def test_thread_model_is_the_scripts(load: Load, model: ThreadModel) -> None:
    assert load(thread_model=f"echo {model.name.lower()}").thread_model() is model


@pytest.mark.parametrize("script", ["echo something", "exit 2", ":"])
def test_calls_are_serialised_unless_the_script_says_otherwise(load: Load, script: str) -> None:
    assert load(thread_model=script).thread_model() is ThreadModel.SERIALIZE_ALL_REQUESTS


def test_thread_model_that_there_is_not_is_for_debugging(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nbdkitpy.sh")

    load(thread_model="echo something").thread_model()

    assert "thread_model: 'something' is none, and ignored" in caplog.text


def test_dump_has_what_the_script_prints(load: Load) -> None:
    assert load(dump_plugin="echo a=b; echo c=d=e").dump() == {"max_known_status": "8", "a": "b", "c": "d=e"}
    assert load().dump() == {"max_known_status": "8"}


def test_dump_needs_no_script() -> None:
    assert ShPlugin().dump() == {"max_known_status": "8"}


# --- clients ---


def test_preconnect_may_refuse(load: Load) -> None:
    with pytest.raises(OSError, match="not you") as error:
        load(preconnect="echo EPERM not you >&2; exit 1").preconnect(CLIENT, True)

    assert error.value.errno == errno.EPERM


def test_methods_for_clients_are_told_what_is_known(load: Load) -> None:
    plugin = load()

    plugin.preconnect(CLIENT, True)
    exports = list(plugin.list_exports(CLIENT, False))
    plugin.open("na me", True, Client(1)).close()

    assert exports == [Export("")]
    assert calls(plugin) == [
        "<preconnect><true>",
        "<list_exports><false><true>",
        "<default_export><false><true>",
        "<open><true><na me><false>",
        "<close><>",
    ]


def test_handle_is_what_open_prints(load: Load) -> None:
    plugin = load(open="printf 'a b\\n\\n'")
    handle = opened(plugin)

    handle.close()

    assert calls(plugin) == ["<close><a b", ">"]


def test_methods_may_ask_for_the_end_of_the_server_and_the_connection(load: Load) -> None:
    plugin = load(flush="exit 4", trim="exit 7")
    forces: list[bool] = []
    handle = plugin.open("", False, Client(1, disconnect=forces.append))

    handle.flush()
    handle.trim(1, 2, 0)

    assert isinstance(plugin.server, AskedServer)
    assert plugin.server.asked == ["shutdown"]
    assert forces == [False]


LISTS = [
    ("", []),
    ("one", ["one"]),
    ("one\ntwo", ["one", "two"]),
    ("NAMES", []),
    ("NAMES\none\ntwo", ["one", "two"]),
    ("INTERLEAVED\none\nfirst\ntwo\nsecond", [("one", "first"), ("two", "second")]),
    ("INTERLEAVED\none\nfirst\ntwo", [("one", "first"), "two"]),
    ("NAMES+DESCRIPTIONS\none\ntwo\nfirst\nsecond", [("one", "first"), ("two", "second")]),
    ("NAMES+DESCRIPTIONS\none\ntwo\nfirst", [("one", "first"), "two"]),
    ("NAMES+DESCRIPTIONS", []),
]


@pytest.mark.parametrize(("text", "exports"), LISTS)
def test_lists_of_exports(text: str, exports: list[Any]) -> None:
    assert list(parse_exports(text)) == [Export(*each) if isinstance(each, tuple) else Export(each) for each in exports]


def test_exports_are_the_scripts(load: Load) -> None:
    plugin = load(list_exports="echo INTERLEAVED; echo one; echo first")

    assert list(plugin.list_exports(CLIENT, False)) == [Export("one", "first")]


@pytest.mark.parametrize(
    ("script", "name"), [("echo one; echo two", "one"), ("echo NAMES; echo one", "one"), (":", "")]
)
def test_default_export_is_the_first_that_is_printed(load: Load, script: str, name: str) -> None:
    assert load(default_export=script).default_export(CLIENT, False) == name


# --- capabilities ---


def test_what_is_not_said_cannot_be_done(load: Load) -> None:
    assert Capabilities.ask(load(get_size="echo 1M").open("", False, CLIENT)) == Capabilities(
        size=1 << 20,
        can_write=False,
        can_zero=Support.NONE,
        can_fast_zero=False,
        can_trim=False,
        can_fua=Support.NONE,
        can_flush=False,
        is_rotational=False,
        can_multi_conn=False,
        can_cache=Support.NONE,
        can_extents=False,
        block_size=None,
    )


YES_OR_NO = ("can_write", "can_trim", "can_flush", "can_extents", "can_multi_conn", "is_rotational", "can_fast_zero")


@pytest.mark.parametrize("name", YES_OR_NO)
@pytest.mark.parametrize(("code", "answer"), [(0, True), (3, False)])
def test_questions_are_answered_by_the_exit_status(load: Load, name: str, code: int, answer: bool) -> None:
    assert getattr(opened(load(**{name: f"exit {code}"})), name)() is answer


@pytest.mark.parametrize(("code", "support"), [(0, Support.NATIVE), (3, Support.EMULATE), (2, Support.EMULATE)])
def test_can_zero(load: Load, code: int, support: Support) -> None:
    assert opened(load(can_zero=f"exit {code}")).can_zero() is support


@pytest.mark.parametrize(("code", "fast"), [(0, False), (3, True), (2, True)])
def test_fast_zero_is_offered_where_there_is_no_zero(load: Load, code: int, fast: bool) -> None:
    assert opened(load(can_zero=f"exit {code}")).can_fast_zero() is fast


def test_a_question_is_asked_once(load: Load) -> None:
    plugin = load(can_zero="exit 0", can_flush="exit 0")
    handle = opened(plugin)

    for question in (handle.can_zero, handle.can_fast_zero, handle.can_fua, handle.can_flush):
        question()

    assert calls(plugin) == ["<can_zero><>", "<can_fast_zero><>", "<can_fua><>", "<can_flush><>"]


@pytest.mark.parametrize("name", ["can_fua", "can_cache"])
@pytest.mark.parametrize("support", list(Support))
def test_supports_are_printed(load: Load, name: str, support: Support) -> None:
    assert getattr(opened(load(**{name: f"echo {support.name.lower()}"})), name)() is support


@pytest.mark.parametrize(("code", "support"), [(0, Support.EMULATE), (3, Support.NONE)])
def test_fua_is_emulated_by_flush_if_nothing_is_said(load: Load, code: int, support: Support) -> None:
    assert opened(load(can_flush=f"exit {code}")).can_fua() is support


def test_what_is_no_support(load: Load) -> None:
    with pytest.raises(ValueError, match="sh: can_cache must print one of none, emulate, native, not 'yes'"):
        opened(load(can_cache="echo yes")).can_cache()


@pytest.mark.parametrize(
    ("printed", "sizes"),
    [("1 4K 1M", BlockSize(1, 4096, 1 << 20)), ("512\\n512\\n512", BlockSize(512, 512, 512)), ("0 0 0", None)],
)
def test_block_size(load: Load, printed: str, sizes: BlockSize | None) -> None:
    assert opened(load(block_size=f"printf '{printed}'")).block_size() == sizes


@pytest.mark.parametrize(
    ("printed", "wanted"), [("1 2", "three sizes"), ("1 x 3", "a size such as"), ("", "three sizes")]
)
def test_what_is_no_block_size(load: Load, printed: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=f"block_size must print {wanted}"):
        opened(load(block_size=f"printf '{printed}'")).block_size()


def test_export_description(load: Load) -> None:
    assert opened(load(export_description="echo a disk")).export_description() == "a disk"
    assert opened(load()).export_description() is None


@pytest.mark.parametrize(("printed", "size"), [("1048576", 1 << 20), ("1M", 1 << 20), (" 5 \\n\\n", 5)])
def test_size(load: Load, printed: str, size: int) -> None:
    assert opened(load(get_size=f"printf '{printed}'")).get_size() == size


@pytest.mark.parametrize("printed", ["", "x", "-1", "1.5M"])
def test_what_is_no_size(load: Load, printed: str) -> None:
    with pytest.raises(ValueError, match="sh: get_size must print a size such as 512, 10M or 1G, not"):
        opened(load(get_size=f"printf '%s' '{printed}'")).get_size()


def test_size_is_required(load: Load) -> None:
    with pytest.raises(OSError, match="there is no method get_size"):
        opened(load()).get_size()


# --- verbs ---


FUA, MAY_TRIM, FAST_ZERO, REQ_ONE = (int(flag) for flag in (Flags.FUA, Flags.MAY_TRIM, Flags.FAST_ZERO, Flags.REQ_ONE))


@pytest.mark.parametrize(
    ("verb", "args", "call"),
    [
        ("pwrite", (memoryview(b"data"), 512, 0), "<4><512><>"),
        ("pwrite", (memoryview(b"data"), 512, FUA), "<4><512><fua>"),
        ("flush", (), ""),
        ("trim", (1024, 512, 0), "<1024><512><>"),
        ("trim", (1024, 512, FUA), "<1024><512><fua>"),
        ("zero", (1024, 512, MAY_TRIM), "<1024><512><may_trim>"),
        ("zero", (1024, 512, FUA | MAY_TRIM | FAST_ZERO), "<1024><512><fua,may_trim,fast>"),
        ("cache", (1024, 512), "<1024><512>"),
        ("extents", (1024, 512, 0), "<1024><512><>"),
        ("extents", (1024, 512, REQ_ONE), "<1024><512><req_one>"),
    ],
)
def test_arguments_of_verbs(load: Load, verb: str, args: tuple[Any, ...], call: str) -> None:
    plugin = load(**{verb: "exit 0"})

    getattr(opened(plugin), verb)(*args)

    assert calls(plugin) == [f"<{verb}><>{call}"]


@pytest.mark.parametrize(
    ("verb", "args"),
    [
        ("pread", (1, 0)),
        ("pwrite", (memoryview(b"data"), 0, 0)),
        ("flush", ()),
        ("trim", (1, 0, 0)),
        ("zero", (1, 0, 0)),
        ("cache", (1, 0)),
        ("extents", (1, 0, 0)),
    ],
)
@pytest.mark.parametrize(
    ("script", "number", "text"),
    [
        ("exit 2", errno.EIO, "there is no method "),
        ("exit 3", errno.EIO, "must not exit with status 3"),
        ("echo ENOSPC full >&2; exit 1", errno.ENOSPC, "full"),
    ],
)
def test_failures_of_verbs(load: Load, verb: str, args: tuple[Any, ...], script: str, number: int, text: str) -> None:
    with pytest.raises(OSError, match=text) as error:
        getattr(opened(load(**{verb: script})), verb)(*args)

    assert error.value.errno == number


def test_data_goes_both_ways(load: Load) -> None:
    handle = opened(load(pwrite="cat >$tmpdir/disk", pread="cat $tmpdir/disk"))
    data = os.urandom(70000)

    handle.pwrite(memoryview(data), 0, 0)

    assert handle.pread(len(data), 0) == data


@pytest.mark.parametrize("printed", ["", "a", "abc"])
def test_pread_must_print_what_is_asked_for(load: Load, printed: str) -> None:
    with pytest.raises(OSError, match=f"pread must print 2 bytes, not {len(printed)}") as error:
        opened(load(pread=f"printf '{printed}'")).pread(2, 0)

    assert error.value.errno == errno.EIO


@pytest.mark.parametrize(
    ("text", "extents"),
    [
        ("0 1M\n1M 9M hole,zero", [Extent(0, 1 << 20), Extent(1 << 20, 9 << 20, 3)]),
        (
            "# comment\n\n  0 512 zero\n512 1 hole\n513 1 0\n514 1 3",
            [(0, 512, 2), (512, 1, 1), (513, 1, 0), (514, 1, 3)],
        ),
        ("", []),
    ],
)
def test_lists_of_extents(text: str, extents: list[tuple[int, int, int]]) -> None:
    assert parse_extents(text) == extents


@pytest.mark.parametrize("text", ["0", "0 1 hole zero", "0 x", "0 1 something", "-1 1"])
def test_what_are_no_extents(load: Load, text: str) -> None:
    with pytest.raises(ValueError, match="sh: extents must print lines of OFFSET LENGTH TYPE"):
        opened(load(extents=f"echo '{text}'")).extents(512, 0, 0)


def test_extents_are_what_is_printed(load: Load) -> None:
    assert opened(load(extents="echo $4 $3 zero")).extents(1024, 512, 0) == [Extent(512, 1024, 2)]

"""The python plugin: parameters, life, exports."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError, Export, ThreadModel
from nbdkitpy_plugins.python import PythonPlugin
from nbdkitpy_plugins.python.callbacks import CALLBACKS, Signature
from nbdkitpy_plugins.python.script import ScriptError
from tests.plugins.python.conftest import VERSION_2, Load

README = Path(__file__).parents[3] / "plugins" / "nbdkitpy_plugins" / "python" / "README.md"

CLIENT = Client(1, tls=True)

# --- parameters ---


def test_script_gets_all_other_parameters(load: Load) -> None:
    source = f"records = []\n{VERSION_2}\ndef config(key, value): records.append((key, value))\n"

    plugin = load(source, size="1M", other="")
    plugin.config("script", "no script any more")

    assert plugin.records == [("size", "1M"), ("other", ""), ("script", "no script any more")]


def test_script_must_come_first() -> None:
    with pytest.raises(ConfigError, match=r"^python: the first parameter must be the script, not size=$"):
        PythonPlugin().config("size", "1M")


def test_script_is_required() -> None:
    with pytest.raises(ConfigError, match="script=SCRIPT is missing"):
        PythonPlugin().config_complete()


def test_parameters_of_a_script_that_takes_none_are_refused_unseen(load: Load, path: Path) -> None:
    plugin = load(VERSION_2)

    with pytest.raises(ConfigError) as error:
        plugin.config("password", "secret")

    assert str(error.value) == f"python: {path} takes no parameters (it defines no config), but password= is given"


@pytest.mark.parametrize("name", ["config_complete", "get_ready", "after_fork", "cleanup", "unload"])
def test_callbacks_of_the_servers_life(load: Load, name: str) -> None:
    plugin = load(f"records = []\n{VERSION_2}\ndef {name}(): records.append('called')\n")
    records = plugin.records

    getattr(plugin, name)()
    plugin.unload()

    assert records[:1] == ["called"]


@pytest.mark.parametrize("name", ["config_complete", "get_ready", "after_fork", "cleanup", "unload", "thread_model"])
@pytest.mark.parametrize("statement", ["raise RuntimeError('no')", "raise SystemExit('no')", "raise OSError(5, 'no')"])
def test_their_failures_say_where(load: Load, path: Path, name: str, statement: str) -> None:
    plugin = load(f"{VERSION_2}\ndef {name}():\n    {statement}\n")
    plugin._surroundings.callback(plugin._script.callbacks.pop, "unload", None)

    with pytest.raises(ConfigError, match=rf"^python: {path}:13: {name}: \w+: .*no"):
        getattr(plugin, name)()

    plugin._script.callbacks.pop("unload", None)


@pytest.mark.parametrize("name", ["get_ready", "after_fork", "cleanup", "unload"])
def test_script_needs_none_of_them(load: Load, name: str) -> None:
    getattr(load(VERSION_2), name)()


def test_failure_of_config_names_the_line(load: Load, path: Path) -> None:
    source = f"{VERSION_2}\ndef config(key, value):\n    raise RuntimeError('unknown parameter ' + key)\n"

    with pytest.raises(ConfigError, match=rf"^python: {path}:13: config: RuntimeError: unknown parameter size$"):
        load(source, size="1M")


# --- threads ---


def test_calls_are_serialised_unless_the_script_says_otherwise(load: Load) -> None:
    assert load(VERSION_2).thread_model() is ThreadModel.SERIALIZE_ALL_REQUESTS
    assert PythonPlugin().thread_model() is ThreadModel.SERIALIZE_ALL_REQUESTS


@pytest.mark.parametrize("model", list(ThreadModel))
def test_thread_model_is_the_scripts(load: Load, model: ThreadModel) -> None:
    source = f"import nbdkit\n{VERSION_2}\ndef thread_model(): return nbdkit.THREAD_MODEL_{model.name}\n"

    assert load(source).thread_model() is model


@pytest.mark.parametrize("answer", ["None", "4", "'parallel'"])
def test_what_is_no_thread_model(load: Load, answer: str) -> None:
    plugin = load(f"{VERSION_2}\ndef thread_model(): return {answer}\n")

    with pytest.raises(ConfigError, match=rf"thread_model must return .*THREAD_MODEL_.*, not {answer}"):
        plugin.thread_model()


# --- what it says of itself ---


@pytest.mark.parametrize(
    ("source", "key"),
    [
        ("", None),
        ("magic_config_key = 'file'", "file"),
        ("def magic_config_key(): return 'file'", "file"),
        ("magic_config_key = None", None),
    ],
)
def test_script_may_say_which_key_bare_words_have(load: Load, source: str, key: str | None) -> None:
    assert load(f"{VERSION_2}\n{source}\n").magic_config_key() == key


def test_without_a_script_no_key_is_magic() -> None:
    assert PythonPlugin().magic_config_key() is None


def test_docstring_is_the_help(path: Path) -> None:
    path.write_text('"""Serves\n\n    a disk.\n    """\nraise SystemExit("must not be run")\n')

    assert PythonPlugin().config_help({"script": str(path)}) == "script.py:\n\nServes\n\na disk."


@pytest.mark.parametrize("source", ["", "x = 1", "not Python", "\0"])
def test_script_without_a_docstring_has_no_help(path: Path, source: str) -> None:
    path.write_text(source)

    assert PythonPlugin().config_help({"script": str(path)}) == ""


@pytest.mark.parametrize("given", [{}, {"script": "/no/such/file.py"}, {"script": "a\0b"}])
def test_no_script_has_no_help(given: dict[str, str]) -> None:
    assert PythonPlugin().config_help(given) == ""


def test_dump_has_the_versions_and_what_the_script_prints(load: Load) -> None:
    plugin = load(f"{VERSION_2}\ndef dump_plugin(): print('a=b=c\\nd=')\n")

    facts = plugin.dump()

    assert re.fullmatch(r"3\.\d+\.\S+", facts["python_version"])
    assert facts["python_pep_384_abi_version"] == "3"
    assert facts["nbdkit_python_maximum_api_version"] == "2"
    assert (facts["a"], facts["d"]) == ("b=c", "")


def test_dump_needs_no_script(load: Load) -> None:
    assert PythonPlugin().dump() == load(VERSION_2).dump()


# --- clients ---


def test_open_is_told_whether_the_export_is_read_only_and_its_name(load: Load) -> None:
    source = VERSION_2.replace('return "handle"', "records.append((readonly, nbdkit.export_name()))")
    plugin = load(f"import nbdkit\nrecords = []\n{source}")

    plugin.handle("one", readonly=True)
    plugin.handle("two")

    assert plugin.records == [(True, "one"), (False, "two")]


def test_open_may_refuse(load: Load) -> None:
    plugin = load(VERSION_2.replace('return "handle"', "raise OSError(2, 'there is no such export')"))

    with pytest.raises(OSError, match="there is no such export"):
        plugin.handle()


def test_client_is_let_in_without_preconnect(load: Load) -> None:
    load(VERSION_2).preconnect(CLIENT, False)


def test_preconnect_lets_clients_in(load: Load) -> None:
    plugin = load(f"records = []\n{VERSION_2}\ndef preconnect(readonly): records.append(readonly)\n")

    plugin.preconnect(CLIENT, True)

    assert plugin.records == [True]


@pytest.mark.parametrize(
    ("statement", "number", "text"),
    [("raise RuntimeError('not you')", errno.EACCES, "not you"), ("raise OSError(1, 'go away')", errno.EPERM, "go")],
)
def test_preconnect_refuses_clients_by_any_exception(load: Load, statement: str, number: int, text: str) -> None:
    plugin = load(f"{VERSION_2}\ndef preconnect(readonly): {statement}\n")

    with pytest.raises(OSError, match=text) as error:
        plugin.preconnect(CLIENT, False)

    assert error.value.errno == number


def test_there_is_one_export_without_a_name_by_default(load: Load) -> None:
    plugin = load(VERSION_2)

    assert plugin.default_export(CLIENT, False) == ""
    assert list(plugin.list_exports(CLIENT, False)) == [Export("")]


def test_exports_are_names_and_pairs(load: Load) -> None:
    plugin = load(
        f"records = []\n{VERSION_2}\ndef list_exports(readonly, is_tls):\n    records.append((readonly, is_tls))\n"
        "    return ['a', b'\\xc3\\xa9', ('b', 'about b'), ['c', None], (b'd', b'about d')]\n"
    )

    exports = list(plugin.list_exports(CLIENT, True))

    assert plugin.records == [(True, True)]
    assert exports == [Export("a"), Export("é"), Export("b", "about b"), Export("c"), Export("d", "about d")]


def test_exports_may_be_a_generator_without_an_end(load: Load) -> None:
    plugin = load(f"{VERSION_2}\ndef list_exports(readonly, is_tls):\n    while True: yield 'again'\n")

    assert next(iter(plugin.list_exports(CLIENT, True))) == Export("again")


@pytest.mark.parametrize(
    "answer", ["'name'", "b'name'", "[1]", "[('a', 'b', 'c')]", "[('a', 1)]", "[None]", "[b'\\xff']"]
)
def test_what_are_no_exports(load: Load, answer: str) -> None:
    plugin = load(f"{VERSION_2}\ndef list_exports(readonly, is_tls): return {answer}\n")

    with pytest.raises(TypeError, match="list_exports must return"):
        list(plugin.list_exports(CLIENT, False))


@pytest.mark.parametrize("answer", ["'name'", "b'name'"])
def test_default_export_is_the_scripts(load: Load, answer: str) -> None:
    plugin = load(f"{VERSION_2}\ndef default_export(readonly, is_tls): return {answer}\n")

    assert plugin.default_export(CLIENT, False) == "name"


@pytest.mark.parametrize("answer", ["None", "5"])
def test_what_is_no_default_export(load: Load, answer: str) -> None:
    plugin = load(f"{VERSION_2}\ndef default_export(readonly, is_tls): return {answer}\n")

    with pytest.raises(TypeError, match=f"default_export must return a str, not {answer}"):
        plugin.default_export(CLIENT, False)


def test_default_export_may_be_refused(load: Load) -> None:
    plugin = load(f"{VERSION_2}\ndef default_export(readonly, is_tls): raise RuntimeError('there is none')\n")

    with pytest.raises(ScriptError, match=r"script.py:12: RuntimeError: there is none"):
        plugin.default_export(CLIENT, False)


def test_refusal_of_preconnect_without_a_number_has_the_scripts_text(load: Load) -> None:
    plugin = load(f"import nbdkit\n{VERSION_2}\ndef preconnect(readonly): raise nbdkit.Error('closed today')\n")

    with pytest.raises(OSError, match="closed today"):
        plugin.preconnect(CLIENT, False)


def test_script_of_the_readme_works(load: Load) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    plugin = load(source, size="10M")
    handle = plugin.handle()

    handle.pwrite(memoryview(b"written"), 512, 0)

    assert handle.get_size() == 10 << 20
    assert bytes(handle.pread(8, 511)) == b"\0written"


def test_readme_has_the_parameters_of_every_callback() -> None:
    rows = re.findall(r"^\| (`.*`) \| `\((.*?)\)`(?:, \w+ \w+)? \| (.*) \|$", README.read_text(), re.MULTILINE)

    documented = {
        name: Signature(first, first if second == "the same" else re.findall(r"\((.*?)\)", second)[0])
        for names, first, second in rows
        for name in re.findall(r"`(\w+)`", names)
    }

    assert documented == CALLBACKS

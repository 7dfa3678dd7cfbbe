"""Scripts: how they are loaded, what they find around them, what is said of those that cannot be."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError
from nbdkitpy_plugins.python import PythonPlugin
from nbdkitpy_plugins.python.api import Api, Error
from nbdkitpy_plugins.python.script import ScriptError
from tests.plugins.python.conftest import REQUIRED, VERSION_1, VERSION_2, Load

# --- around a script ---


def test_script_runs_as_main_without_arguments(load: Load, path: Path) -> None:
    plugin = load(VERSION_2 + "import sys\nrecords = [__name__, __file__, sys.argv, vars(sys.modules[__name__])]\n")

    name, file, arguments, variables = plugin.records

    assert (name, file, arguments) == ("__main__", str(path), [""])
    assert variables is plugin._script.callbacks


def test_modules_beside_a_script_can_be_imported(load: Load, path: Path) -> None:
    (path.parent / "helper_of_a_script.py").write_text("answer = 42\n")

    plugin = load(VERSION_2 + "import helper_of_a_script\nrecords = [helper_of_a_script.answer]\n")

    assert plugin.records == [42]
    del sys.modules["helper_of_a_script"]


def test_P5_modules_beside_a_script_take_no_others_place(load: Load, path: Path) -> None:
    (path.parent / "colorsys.py").write_text("raise SystemExit('planted')\n")
    sys.modules.pop("colorsys", None)

    plugin = load(VERSION_2 + "import colorsys\nrecords = [colorsys.__file__]\n")

    assert str(plugin.records[0]).startswith(os.path.dirname(os.__file__))


def test_a_scripts_directory_is_that_of_what_a_link_leads_to(load: Load, path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "script.py").write_text(VERSION_2 + "import sys\nrecords = [sys.path[-1], __file__]\n")
    (tmp_path / "link.py").symlink_to(tmp_path / "real" / "script.py")
    plugin = PythonPlugin()

    plugin.config("script", str(tmp_path / "link.py"))
    records = plugin._script.callbacks["records"]
    plugin.unload()

    assert records == [str(tmp_path / "real"), str(tmp_path / "link.py")]


def test_all_is_as_it_was_when_the_plugin_is_unloaded(load: Load) -> None:
    before = sys.modules["__main__"], sys.modules.get("nbdkit"), sys.argv, [*sys.path]

    plugin = load(VERSION_2 + "import nbdkit\n")
    during = sys.modules["__main__"], sys.modules.get("nbdkit"), sys.argv, [*sys.path]
    plugin.unload()

    assert (sys.modules["__main__"], sys.modules.get("nbdkit"), sys.argv, sys.path) == before
    assert all(one != other for one, other in zip(before, during))


def test_another_module_of_that_name_is_back_in_its_place_afterwards(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nbdkit", sys)

    load(VERSION_2).unload()

    assert sys.modules["nbdkit"] is sys


def test_script_of_a_relative_path_is_found_after_the_directory_has_changed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(VERSION_2)
    monkeypatch.chdir(path.parent)
    plugin = PythonPlugin()

    plugin.config("script", path.name)
    plugin.unload()

    assert plugin.script == str(path)


def test_coding_of_a_script_is_that_which_it_says(path: Path, load: Load) -> None:
    path.write_bytes(b"# -*- coding: latin-1 -*-\nrecords = ['\xe9']\n" + VERSION_2.encode())
    plugin = PythonPlugin()

    plugin.config("script", str(path))
    records = plugin._script.callbacks["records"]
    plugin.unload()

    assert records == ["é"]


# --- scripts that cannot be ---


@pytest.mark.parametrize("text", ["", "/no/such/file.py", "a\0b"])
def test_script_that_is_not_there(text: str) -> None:
    with pytest.raises(ConfigError, match="python: script must be the path of a Python script"):
        PythonPlugin().config("script", text)


def test_script_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this is a directory"):
        PythonPlugin().config("script", str(tmp_path))


def test_script_that_cannot_be_read(load: Load, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    path.touch()
    plugin = PythonPlugin()

    with pytest.raises(ConfigError, match=rf"python: {path} cannot be read: Permission denied"):
        plugin.config("script", str(path))
    plugin.unload()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n\n1 / 0\n", ":3: ZeroDivisionError: division by zero"),
        ("def f():\n    raise SystemExit('no such disk')\nf()\n", ":2: SystemExit: no such disk"),
        ("x = 1\nif x\n", ":2: SyntaxError: "),
        ("import json\njson.loads('{')\n", ":2: json.decoder.JSONDecodeError: "),
        ("open('/no/such/file')\n", ":1: FileNotFoundError: "),
        ("x = '\0'\n", ": "),
    ],
)
def test_script_that_fails_is_an_error_that_says_where(load: Load, path: Path, source: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(source)

    assert str(error.value).startswith(f"python: {path}{message}")


def test_traceback_of_a_script_that_fails_is_for_debugging(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nbdkitpy.python")

    with pytest.raises(ConfigError):
        load("1 / 0\n")

    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert record.exc_info


@pytest.mark.parametrize("version", ["0", "3", "'2'", "2.0", "None"])
def test_versions_that_there_are_not(load: Load, path: Path, version: str) -> None:
    with pytest.raises(ConfigError, match=rf"{path}: API_VERSION must be 1 or 2, not {version}"):
        load(VERSION_2.replace("API_VERSION = 2", f"API_VERSION = {version}"))


def test_what_a_script_lacks_is_named(load: Load, path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"{path} must define open, get_size, pread; it has no get_size and no pread"
    ):
        load("def open(readonly): pass")


def test_what_is_not_callable_is_no_callback(load: Load) -> None:
    with pytest.raises(ConfigError, match="it has no pread"):
        load(f"{REQUIRED}\npread = 5\n")


def test_variables_may_be_called_like_callbacks(load: Load) -> None:
    plugin = load(f"{VERSION_2}\ncache = {{}}\nextents = []\nzero = bytes(512)\nflush = None\n")

    handle = plugin.handle()

    assert not any(handle.overrides(verb) for verb in ("cache", "extents", "zero", "flush"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            VERSION_1.replace("pread(h, count, offset)", "pread(h, count)"),
            r":8: pread must take \(h, count, offset\) as API_VERSION is 1, not \(h, count\)$",
        ),
        (
            VERSION_2.replace("API_VERSION = 2", ""),
            r":9: pread must take \(h, count, offset\) as API_VERSION is 1, not \(h, buf, offset, flags\);"
            r" with API_VERSION = 2 in the script it would be right",
        ),
        (
            f"API_VERSION = 2\n{VERSION_1}",
            r"pread must take \(h, buf, offset, flags\) as API_VERSION is 2, not \(h, count, offset\);"
            r" with API_VERSION = 1",
        ),
        (f"{VERSION_2}\ndef config_complete(key): pass\n", r"config_complete must take \(\) as"),
        (f"{VERSION_2}\ncan_write = lambda: True\n", r"can_write must take \(h\) as"),
        (f"{VERSION_2}\ndef flush(h, *, flags): pass\n", r"flush must take \(h, flags\) as"),
    ],
)
def test_wrong_parameters_are_an_error_that_says_where_and_what_is_right(
    load: Load, path: Path, source: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load(source)

    assert str(error.value).startswith(f"python: {path}:")


@pytest.mark.parametrize(
    "source",
    [
        f"{VERSION_2}\ndef flush(h, flags, more=1): pass\n",
        f"{VERSION_2}\ndef flush(*args): pass\n",
        f"{VERSION_2}\nclass Disk:\n    def flush(self, h, flags): pass\nflush = Disk().flush\n",
        f"{VERSION_2}\nimport functools\nflush = functools.partial(lambda n, h, flags: None, 1)\n",
        f"{VERSION_2}\nclass Flush:\n    def __call__(self, h, flags): pass\nflush = Flush()\n",
        f"{VERSION_2}\nclass flush:\n    def __init__(self, h, flags): pass\n",
        f"{VERSION_2}\nflush = slice\n",  # it does not say what it takes
    ],
)
def test_callbacks_may_be_anything_that_can_be_called(load: Load, source: str) -> None:
    plugin = load(source)

    plugin.handle().flush()

    assert plugin.handle().can_flush()


def test_what_was_imported_under_a_callbacks_name_is_none(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    plugin = load(f"from functools import cache\n{VERSION_2}")

    assert not plugin.handle().overrides("cache")
    assert "cache is taken to be something else than the callback" in caplog.text


def test_a_function_called_unload_may_be_something_else(load: Load) -> None:
    plugin = load(f"{VERSION_2}\ndef unload(h): raise AssertionError\n")

    plugin.unload()


# --- errors of callbacks ---


@pytest.mark.parametrize(
    ("statement", "number", "text"),
    [
        ("nbdkit.set_error(errno.EPERM); raise RuntimeError('no')", errno.EPERM, "RuntimeError: no"),
        ("raise OSError(errno.ENOSPC, 'full')", errno.ENOSPC, "full"),
        ("nbdkit.set_error(errno.EPERM); raise OSError(errno.ENOSPC, 'full')", errno.EPERM, "full"),
        ("raise OSError('no number')", errno.EIO, "OSError: no number"),
        ("raise nbdkit.Error(errno.EROFS, 'read only')", errno.EROFS, "read only"),
        ("raise nbdkit.Error('just so')", errno.EIO, "nbdkitpy_plugins.python.api.Error: just so"),
        ("raise OSError(99999, 'no errno')", errno.EIO, "no errno"),
        ("raise ssl.SSLError(1, 'handshake')", errno.EIO, "handshake"),
        ("raise socket.gaierror(-2, 'no such host')", errno.EIO, "no such host"),
        ("raise TimeoutError(errno.ETIMEDOUT, 'late')", errno.ETIMEDOUT, "late"),
    ],
)
def test_errno_of_a_failure(load: Load, statement: str, number: int, text: str) -> None:
    plugin = load(
        f"import errno, nbdkit, socket, ssl\n{VERSION_2.replace('pass', statement)}",
    )

    with pytest.raises(OSError, match=r".") as error:
        plugin.handle().pread(512, 0)

    assert (error.value.errno, error.value.strerror) == (number, text)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("1 / 0", "script.py:10: ZeroDivisionError: division by zero"),
        ("int('x')", "script.py:10: ValueError: invalid literal for int() with base 10: 'x'"),
        ("import json; json.loads('')", "script.py:10: json.decoder.JSONDecodeError: Expecting value"),
    ],
)
def test_other_failures_say_where(load: Load, statement: str, text: str) -> None:
    plugin = load(VERSION_2.replace("    pass", f"    {statement}"))

    with pytest.raises(ScriptError) as error:
        plugin.handle().pread(512, 0)

    assert str(error.value).startswith(text)


def test_set_error_counts_for_the_call_it_was_made_in_only(load: Load) -> None:
    plugin = load(
        "import nbdkit\n"
        + VERSION_2.replace("pass", "if offset:\n        raise RuntimeError()\n    nbdkit.set_error(28)")
    )
    handle = plugin.handle()

    handle.pread(512, 0)

    with pytest.raises(ScriptError):
        handle.pread(512, 512)


def test_error_is_an_os_error() -> None:
    assert Error(errno.EPERM, "no").errno == errno.EPERM


def test_exceptions_that_end_programs_are_let_through(load: Load) -> None:
    plugin = load(VERSION_2.replace("pass", "raise SystemExit(3)"))

    with pytest.raises(SystemExit):
        plugin.handle().pread(512, 0)


def test_exceptions_that_cannot_be_shown(load: Load) -> None:
    source = "class Odd(Exception):\n    def __str__(self): raise RuntimeError\n"
    plugin = load(source + VERSION_2.replace("pass", "raise Odd()"))

    with pytest.raises(ScriptError, match=r"script.py:12: Odd: <exception str\(\) failed>"):
        plugin.handle().pread(512, 0)


def test_calls_know_nothing_of_a_client_that_was_served_before(load: Load) -> None:
    plugin = load(
        "import nbdkit\nrecords = []\n"
        "def cleanup():\n    records.append(nbdkit.is_tls())\n    nbdkit.export_name()\n" + VERSION_2
    )
    plugin.handle("secret")

    with pytest.raises(ConfigError, match=r"cleanup: RuntimeError: nbdkit.export_name: not called on behalf"):
        plugin.cleanup()

    assert Api.calls.caller is None


def test_script_may_be_a_pipe() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        stream.write(VERSION_2)
    plugin = PythonPlugin()

    plugin.config("script", f"/dev/fd/{read}")
    os.close(read)
    size = plugin.open("", False, Client(1)).get_size()
    plugin.unload()

    assert size == 1 << 20


def test_a_script_may_change_what_is_around_it(load: Load) -> None:
    before = sys.modules.get("nbdkit"), [*sys.path]

    load(f"{VERSION_2}\nimport sys\ndel sys.modules['nbdkit'], sys.path[-1]\n").unload()

    assert (sys.modules.get("nbdkit"), sys.path) == before

"""The module that scripts import."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from nbdkitpy import Client
from nbdkitpy_plugins.python import PythonPlugin
from nbdkitpy_plugins.python.api import Api, Caller, constants, make_module
from tests.plugins.python.conftest import VERSION_2, Load
from tests.serving import AskedServer

#: As nbdkit 1.48 has them, and Error.
FUNCTIONS = (
    "debug",
    "debug_hexdiff",
    "debug_hexdump",
    "disconnect",
    "export_name",
    "is_tls",
    "name",
    "nanosleep",
    "parse_bool",
    "parse_delay",
    "parse_probability",
    "parse_size",
    "peer_gid",
    "peer_pid",
    "peer_security_context",
    "peer_tls_dn",
    "peer_tls_issuer_dn",
    "peer_uid",
    "read_password",
    "set_error",
    "shutdown",
    "stdio_safe",
    "timestamp",
    "Error",
)

CONSTANTS = {
    "THREAD_MODEL_SERIALIZE_CONNECTIONS": 0,
    "THREAD_MODEL_SERIALIZE_ALL_REQUESTS": 1,
    "THREAD_MODEL_SERIALIZE_REQUESTS": 2,
    "THREAD_MODEL_PARALLEL": 3,
    "FLAG_MAY_TRIM": 1,
    "FLAG_FUA": 2,
    "FLAG_REQ_ONE": 4,
    "FLAG_FAST_ZERO": 8,
    "FUA_NONE": 0,
    "FUA_EMULATE": 1,
    "FUA_NATIVE": 2,
    "CACHE_NONE": 0,
    "CACHE_EMULATE": 1,
    "CACHE_NATIVE": 2,
    "EXTENT_HOLE": 1,
    "EXTENT_ZERO": 2,
}

NOBODY = Client(1)


@pytest.fixture
def plugin() -> PythonPlugin:
    plugin = PythonPlugin()
    plugin.server = AskedServer()
    return plugin


@pytest.fixture
def nbdkit(plugin: PythonPlugin) -> Any:
    Api.calls.caller = None
    return make_module(Api(plugin))


@pytest.fixture
def call(plugin: PythonPlugin) -> Callable[[Client, str | None], None]:
    def be_called(client: Client, export_name: str | None) -> None:
        Api.calls.caller = Caller(plugin, client, export_name)

    return be_called


Call = Callable[[Client, "str | None"], None]


def test_module_has_the_functions_and_constants_of_nbdkit(nbdkit: ModuleType) -> None:
    names = {name for name in vars(nbdkit) if not name.startswith("_")}

    assert names == {*FUNCTIONS, *CONSTANTS}
    assert constants() == CONSTANTS
    assert all(type(vars(nbdkit)[name]) is int for name in CONSTANTS)


# --- messages ---


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.DEBUG, "nbdkitpy.python")
    return lambda: [record.getMessage() for record in caplog.records]


def test_debug_writes_text_as_it_is(nbdkit: Any, messages: Callable[[], list[str]]) -> None:
    nbdkit.debug("100 % s")

    assert messages() == ["100 % s"]


def test_debug_hexdump_writes_lines(nbdkit: Any, messages: Callable[[], list[str]]) -> None:
    nbdkit.debug_hexdump(b"A" * 17, None, 0)

    assert [line[:12] for line in messages()] == ["00000000: 41", "00000010: 41"]


def test_debug_hexdiff_writes_lines(nbdkit: Any, messages: Callable[[], list[str]]) -> None:
    nbdkit.debug_hexdiff(b"A", bytearray(b"B"), "x", 0)

    assert [line[:14] for line in messages()] == ["x-00000000: 41", "x+00000000: 42"]


def test_hexdumps_are_not_made_if_nobody_sees_them(nbdkit: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdkitpy.python")

    nbdkit.debug_hexdump(bytes(1 << 30), None, 0)  # would take minutes

    assert not caplog.records


def test_buffers_of_a_hexdiff_must_be_equally_long(nbdkit: Any) -> None:
    with pytest.raises(RuntimeError, match="equal length"):
        nbdkit.debug_hexdiff(b"A", b"", "x", 0)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        ("debug", (1,)),
        ("debug", (b"bytes",)),
        ("debug_hexdump", ("text", None, 0)),
        ("debug_hexdump", (b"", 1, 0)),
        ("debug_hexdump", (b"", None, 0.0)),
        ("parse_size", (1,)),
        ("parse_delay", ("what", None)),
        ("read_password", (b"secret",)),
        ("set_error", ("EIO",)),
        ("nanosleep", (1.5, 0)),
    ],
)
def test_arguments_of_wrong_types_are_refused(nbdkit: Any, function: str, args: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        getattr(nbdkit, function)(*args)


def test_timestamp_is_of_the_form_of_nbdkits(nbdkit: Any) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}", nbdkit.timestamp())


def test_name_is_that_of_the_server_if_it_has_one(nbdkit: Any, plugin: PythonPlugin) -> None:
    assert nbdkit.name() is None
    plugin.server_name = "one"
    assert nbdkit.name() == "one"


# --- parsing ---


@pytest.mark.parametrize(
    ("function", "args", "value"),
    [
        ("parse_size", ("1M",), 1 << 20),
        ("parse_bool", ("Yes",), True),
        ("parse_bool", ("off",), False),
        ("parse_probability", ("rate", "10%"), 0.1),
        ("parse_delay", ("wait", "10ms"), (0, 10_000_000)),
        ("parse_delay", ("wait", "3.5"), (3, 500_000_000)),
        ("read_password", ("secret",), b"secret"),
    ],
)
def test_texts_are_parsed(nbdkit: Any, function: str, args: tuple[str, ...], value: object) -> None:
    assert getattr(nbdkit, function)(*args) == value


@pytest.mark.parametrize(
    ("function", "args", "text"),
    [
        ("parse_size", ("x",), "nbdkit.parse_size: it must be a size such as 512, 10M or 1G, not 'x'"),
        ("parse_bool", ("x",), "nbdkit.parse_bool: it must be true or false"),
        ("parse_probability", ("rate", "x"), "nbdkit.parse_probability: rate must be a probability"),
        ("parse_delay", ("wait", "x"), "nbdkit.parse_delay: wait must be a time"),
        ("read_password", ("+/no/such/file",), "nbdkit.read_password: must be a password"),
    ],
)
def test_texts_that_cannot_be_parsed_are_value_errors(
    nbdkit: Any, function: str, args: tuple[str, ...], text: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}"):
        getattr(nbdkit, function)(*args)


# --- the server and the client ---


def test_shutdown_asks_the_server(nbdkit: Any, plugin: PythonPlugin) -> None:
    nbdkit.shutdown()

    assert vars(plugin.server)["asked"] == ["shutdown"]


def test_functions_act_for_who_is_called_also_if_the_module_is_another_scripts(
    plugin: PythonPlugin, call: Call
) -> None:
    other = PythonPlugin()
    other.server = AskedServer()
    module: Any = make_module(Api(other))
    call(NOBODY, None)

    module.shutdown()

    assert (vars(plugin.server)["asked"], vars(other.server)["asked"]) == (["shutdown"], [])


@pytest.mark.parametrize("force", [True, False, 1])
def test_disconnect_ends_the_connection_of_the_client(nbdkit: Any, call: Call, force: object) -> None:
    forces: list[bool] = []
    call(Client(1, disconnect=forces.append), None)

    nbdkit.disconnect(force)

    assert forces == [bool(force)]


def test_nanosleep_waits_as_long_as_the_client_is_there(nbdkit: Any, call: Call) -> None:
    waits: list[float] = []
    call(Client(1, sleep=waits.append), "")

    nbdkit.nanosleep(2, 500_000_000)

    assert waits == [2.5]


def test_nanosleep_works_without_a_client(nbdkit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    nbdkit.nanosleep(0, 1)

    assert waits == [1e-9]


@pytest.mark.parametrize(("sec", "nsec"), [(-1, 0), (0, -1), (1 << 31, 0), (2_147_483_647, 1_000_000_000)])
def test_nanosleep_refuses_times_that_cannot_be(nbdkit: Any, sec: int, nsec: int) -> None:
    with pytest.raises(ValueError, match="must be 0 to 2147483647 seconds"):
        nbdkit.nanosleep(sec, nsec)


def test_what_is_known_of_the_client_can_be_asked(nbdkit: Any, call: Call) -> None:
    client = Client(1, pid=5, uid=6, gid=7, security_label="label", tls=True, tls_dn="CN=a", tls_issuer_dn="CN=b")
    call(client, "export")

    answers = {name: getattr(nbdkit, name)() for name in FUNCTIONS if re.match("peer_|is_tls|export_name", name)}

    assert answers == {
        "export_name": "export",
        "is_tls": True,
        "peer_pid": 5,
        "peer_uid": 6,
        "peer_gid": 7,
        "peer_security_context": "label",
        "peer_tls_dn": "CN=a",
        "peer_tls_issuer_dn": "CN=b",
    }


@pytest.mark.parametrize("function", ["peer_pid", "peer_uid", "peer_gid", "peer_security_context"])
def test_what_is_not_known_of_the_client_is_a_value_error(nbdkit: Any, call: Call, function: str) -> None:
    call(NOBODY, "")

    with pytest.raises(ValueError, match=f"nbdkit.{function}: not known of this client"):
        getattr(nbdkit, function)()


def test_a_client_without_tls_has_an_empty_name(nbdkit: Any, call: Call) -> None:
    call(NOBODY, "")

    assert (nbdkit.is_tls(), nbdkit.peer_tls_dn(), nbdkit.peer_tls_issuer_dn()) == (False, "", "")


def test_there_is_no_export_name_before_one_is_open(nbdkit: Any, call: Call) -> None:
    call(NOBODY, None)

    with pytest.raises(RuntimeError, match="no export is open"):
        nbdkit.export_name()


@pytest.mark.parametrize(
    ("function", "args", "error"),
    [
        ("export_name", (), RuntimeError),
        ("peer_pid", (), ValueError),
        ("peer_tls_dn", (), ValueError),
        ("disconnect", (True,), ValueError),
    ],
)
def test_a_thread_of_the_scripts_own_has_no_client(
    nbdkit: Any, call: Call, function: str, args: tuple[object, ...], error: type[Exception]
) -> None:
    call(NOBODY, "export")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            getattr(nbdkit, function)(*args)
        except error as caught:
            errors.append(caught)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert "not called on behalf of a client in this thread" in str(errors)


def test_is_tls_is_false_without_a_client(nbdkit: Any) -> None:
    assert nbdkit.is_tls() is False


def test_stdio_is_safe_during_configuration(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdkitpy_plugins.python.api._is_nothing", lambda fd: False)
    plugin = load(
        "import nbdkit\nrecords = [nbdkit.stdio_safe()]\n"
        "def get_ready():\n    records.append(nbdkit.stdio_safe())\n"
        "def after_fork():\n    records.append(nbdkit.stdio_safe())\n" + VERSION_2
    )

    plugin.get_ready()
    plugin.after_fork()

    assert plugin.records == [True, True, False]


def test_stdio_is_not_safe_if_nobody_is_there(monkeypatch: pytest.MonkeyPatch, plugin: PythonPlugin) -> None:
    answers = []
    for name in ("null", "zero"):
        status = os.stat(f"/dev/{name}")
        monkeypatch.setattr("os.fstat", lambda fd, status=status: status)
        answers.append(Api(plugin).stdio_safe())

    assert answers == [False, True]


def test_stdio_is_not_safe_if_it_is_closed(monkeypatch: pytest.MonkeyPatch, plugin: PythonPlugin) -> None:
    monkeypatch.setattr("os.fstat", lambda fd, fstat=os.fstat: fstat(fd or -1))

    assert Api(plugin).stdio_safe() is False

"""The configuration file: what it may say, and how it is told that it may not say something."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy import ConfigError
from nbdkitpy.config import DebugFlag
from nbdkitpy.config.file import Document, read_file
from nbdkitpy.config.units import Given, Reference
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server.options import AddressFamily, Endpoint, Transport
from tests.fuzzing.attempts import attempted
from tests.fuzzing.effort import fuzz

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.toml"


def read(path: Path, text: str) -> Document:
    path.write_text(text)
    return read_file(str(path))


def complaint(path: Path, text: str) -> str:
    """What is said of a file, after its path."""
    with pytest.raises(ConfigError) as caught:
        read(path, text)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path)).removeprefix(": ")


def test_an_empty_file_says_nothing(path: Path) -> None:
    assert read(path, "") == Document(str(path), {}, (), (), None, {})


# --- [server] -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("read-only = true", {"readonly": True}),
        ("read-only = false", {}),
        ("newstyle = true", {"oldstyle": False}),
        ("oldstyle = true\nnewstyle = false", {"oldstyle": True}),
        ("no-structured-replies = true", {"structured_replies": False}),
        ("no-meta-contexts = true", {"meta_contexts": False}),
        ("mask-handshake = 0xfd", {"handshake_flags": 1}),
        ("threads = 3", {"threads": 3}),
        ("threads = 0", {"threads": 16}),
        ("timeout = 2", {"handshake_timeout": 2.0}),
        ("timeout = 0.5", {"handshake_timeout": 0.5}),
        ("timeout = 1e-3", {"handshake_timeout": 0.001}),
        ('drain = "100ms"', {"drain": 0.1}),
        ("idle-timeout = 60", {"idle_timeout": 60.0}),
        ('tls = "require"', {"tls": TlsMode.REQUIRE}),
        ('tls-certificates = "/tls"', {"tls_certificates": "/tls"}),
        ('tls-psk = "/dev/null"', {"tls_psk": "/dev/null"}),
        ("tls-verify-peer = true", {"tls_verify_peer": True}),
        ('tls-priority = "HIGH"', {"tls_priority": "HIGH"}),
        ("keepalive = true", {"keepalive": True}),
        ('export = "a b"', {"export_name": "a b"}),
        ('pidfile = "/run/pid"', {"pidfile": "/run/pid"}),
        ('user = "nbd"\ngroup = "7"', {"user": "nbd", "group": "7"}),
        ('swap = true\nselinux-label = "x"', {"swap": True, "selinux_label": "x"}),
        (
            'log = "/var/log/x"\nlog-format = "json"\nname = "n"',
            {"log": "/var/log/x", "log_format": "json", "name": "n"},
        ),
        ('debug = ["a.b=1", "c.d=2"]', {"debug": (DebugFlag("a", "b", 1), DebugFlag("c", "d", 2))}),
        ("debug = []", {"debug": ()}),
        ("foreground = true\nverbose = true", {"foreground": True, "verbose": True}),
        ("print-uri = true\nexit-with-parent = true", {"print_uri": True, "exit_with_parent": True}),
    ],
)
def test_settings_of_the_server(path: Path, line: str, values: dict[str, Any]) -> None:
    assert read(path, f"[server]\n{line}\n").values == values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("thread = 1", 'there is no key "thread": did you mean "threads"?'),
        ("readonly = true", 'there is no key "readonly": did you mean "read-only"?'),
        ('exportname = "x"', 'there is no key "exportname": did you mean "export"?'),
        ("port = 1", 'there is no key "port": tables [[listen]] say that'),
        ("ipv4-only = true", 'there is no key "ipv4-only": tables [[listen]] say that'),
        ("single = true", 'there is no key "single": only the command line has that'),
        ('run = "x"', 'there is no key "run": only the command line has that'),
        ("Verbose = true", 'there is no key "Verbose": did you mean "verbose"?'),
        ("zzz = 1", 'there is no key "zzz": there are print-uri, read-only, export, '),
        ('threads = "3"', "threads must be an integer, not a string"),
        ("threads = 3.0", "threads must be an integer, not a number"),
        ("threads = true", "threads must be an integer, not true or false"),
        ("threads = -1", "threads must be an integer from 0 to 65536, not -1"),
        ("mask-handshake = 0xfffffffffffffffff", "mask-handshake must be a number of at most 64 bits"),
        ('verbose = "yes"', "verbose must be true or false, not a string"),
        ("verbose = 1", "verbose must be true or false, not an integer"),
        ('timeout = "soon"', "timeout must be a time such as 2, 1.5s, 100ms, 20us or 5ns, not 'soon'"),
        ("timeout = -1", "timeout must be a time such as"),
        ("timeout = inf", "timeout must be a time such as"),
        ("timeout = nan", "timeout must be a time such as"),
        ("timeout = true", "timeout must be a string or an integer or a number, not true or false"),
        ("timeout = 2020-01-01", "timeout must be a string or an integer or a number, not a date or time"),
        ("user = 7", "user must be a string, not an integer"),
        ('log = "x"', "log must be one of stderr, syslog, null, default or an absolute path, not 'x'"),
        ('log-format = "xml"', "log-format must be one of text, json, not 'xml'"),
        ('pidfile = ""', "pidfile must be a path, not ''"),
        ('debug = "a.b=1"', "debug must be an array, not a string"),
        ("debug = [1]", "debug must be an array of strings"),
        ('debug = ["a=1"]', "debug must be NAME.FLAG=N, where N is an integer, not 'a=1'"),
        ("oldstyle = true\nnewstyle = true", "newstyle and oldstyle exclude each other"),
    ],
)
def test_what_is_wrong_in_server_names_the_table_the_key_and_what_is_right(path: Path, line: str, message: str) -> None:
    assert complaint(path, f"[server]\n{line}\n").startswith(f"[server]: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[servers]", 'there is no key "servers": did you mean "server"?'),
        ("[filters]", 'there is no key "filters": did you mean "filter"?'),
        ("threads = 1", 'there is no key "threads": there are server, listen, plugin, filter'),
        ("server = 1", "server must be a table, [server], not an integer"),
        ("[[server]]", "server must be a table, [server], not an array"),
        ("[[plugin]]\nname = 'x'", "plugin must be a table, [plugin], not an array"),
        ("[filter]\nname = 'x'", "filter must be tables [[filter]], with two brackets, not a table"),
        ("filter = ['x']", "filter must be tables [[filter]], with two brackets, not an array"),
        ("listen = 10809", "listen must be tables [[listen]], with two brackets, not an integer"),
    ],
)
def test_wrong_tables_are_named(path: Path, text: str, message: str) -> None:
    assert complaint(path, text) == message


# --- [[listen]] -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "endpoint"),
    [
        ('transport = "tcp"', Endpoint()),
        (
            'transport = "tcp"\naddress = "any"\nport = 0\naddress-family = "ipv6"',
            Endpoint(address="any", port="0", address_family=AddressFamily.INET6),
        ),
        ('transport = "tcp"\nport = "nbd"\naddress-family = "any"', Endpoint(port="nbd")),
        ('transport = "tcp"\nport = 65535', Endpoint(port="65535")),
        ('transport = "unix"', Endpoint(Transport.UNIX)),
        ('transport = "unix"\npath = "/run/x"', Endpoint(Transport.UNIX, unix_path="/run/x")),
        ('transport = "vsock"\nport = 4294967295', Endpoint(Transport.VSOCK, port="4294967295")),
    ],
)
def test_places_to_listen_on(path: Path, lines: str, endpoint: Endpoint) -> None:
    assert read(path, f"[[listen]]\n{lines}\n").listen == (endpoint,)


def test_several_places_keep_their_order(path: Path) -> None:
    document = read(path, '[[listen]]\ntransport = "unix"\n[[listen]]\ntransport = "vsock"\n')

    assert document.listen == (Endpoint(Transport.UNIX), Endpoint(Transport.VSOCK))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("port = 1", "the transport is missing: tcp, unix or vsock"),
        ("transport = 1", "transport must be a string, not an integer"),
        ('transport = "udp"', "transport must be tcp, unix or vsock, not 'udp'"),
        ('transport = "unix"\nport = 1', 'there is no key "port": unix has path'),
        ('transport = "tcp"\nadress = "x"', 'there is no key "adress": did you mean "address"?'),
        ('transport = "tcp"\naddress = 1', "address must be a string, not an integer"),
        ('transport = "tcp"\nport = 65536', "port must be from 0 to 65535, not 65536"),
        ('transport = "tcp"\nport = -1', "port must be from 0 to 65535, not -1"),
        ('transport = "tcp"\nport = true', "port must be an integer or a string, not true or false"),
        ('transport = "tcp"\naddress-family = "ipv5"', "address-family must be one of any, ipv4, ipv6, not 'ipv5'"),
        ('transport = "vsock"\nport = "nbd"', "port must be an integer, not a string"),
        ('transport = "vsock"\nport = 4294967296', "port must be from 0 to 4294967295, not 4294967296"),
        ('transport = "unix"\npath = ""', "path must be a path, not ''"),
    ],
)
def test_wrong_places_to_listen_on_are_counted_and_named(path: Path, lines: str, message: str) -> None:
    text = f'[[listen]]\ntransport = "tcp"\n[[listen]]\n{lines}\n'

    assert complaint(path, text) == f"[[listen]] 2: {message}"


@pytest.mark.parametrize(
    "lines",
    [
        "[server]\nthreads = {}",
        '[[listen]]\ntransport = "tcp"\nport = {}',
        '[[listen]]\ntransport = "vsock"\nport = {}',
        '[plugin]\nname = "memory"\nsize = {}',
        '[plugin]\nname = "memory"\nsize = [{}]',
    ],
)
@pytest.mark.parametrize("number", [hex(1 << 64), str(-(1 << 64)), hex(1 << 20_000)], ids=["64", "-64", "20000"])
def test_P10_number_of_more_than_64_bits_is_an_error(path: Path, lines: str, number: str) -> None:
    assert complaint(path, lines.format(number)).endswith(" must be a number of at most 64 bits")


# --- [plugin] and [[filter]] ----------------------------------------------------------------------------------------


def test_units_have_a_name_and_parameters_of_their_own(path: Path) -> None:
    document = read(
        path,
        """
        [[filter]]
        name = "limit"
        limit = 1
        [[filter]]
        name = "limit"
        [plugin]
        name = "memory"
        size = "1G"
        """,
    )

    assert document.plugin is not None
    assert (document.plugin.name, document.plugin.where) == ("memory", f"{path}: [plugin] (memory)")
    assert document.plugin.parameters == {"size": Given(("1G",))}
    assert [table.parameters for table in document.filters] == [{"limit": Given(("1",))}, {}]
    assert [table.where for table in document.filters] == [
        f"{path}: [[filter]] 1 (limit)",
        f"{path}: [[filter]] 2 (limit)",
    ]


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ('"10G"', Given(("10G",))),
        ("1048576", Given(("1048576",))),
        ("-7", Given(("-7",))),
        ("0x10", Given(("16",))),
        ("0.25", Given(("0.25",))),
        ("true", Given(("true",))),
        ("false", Given(("false",))),
        ("[]", Given((), is_array=True)),
        ('["a", 1, false]', Given(("a", "1", "false"), is_array=True)),
        ('{ file = "/etc/x\\ny" }', Given((Reference("file", "/etc/x\ny"),))),
        ('{ credential = "a-b.c" }', Given((Reference("credential", "a-b.c"),))),
        ('[{ file = "/x" }, "y"]', Given((Reference("file", "/x"), "y"), is_array=True)),
    ],
)
def test_values_of_parameters_are_texts_as_on_the_command_line(path: Path, value: str, given: Given) -> None:
    document = read(path, f'[plugin]\nname = "x"\n"a.key" = {value}\n')

    assert document.plugin is not None
    assert document.plugin.parameters == {"a.key": given}


WRONG_REFERENCE = 'key must be { file = "/PATH" } or { credential = "NAME" }, if it is a table'


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2020-01-01", "key must be a string, a number, true or false, not a date or time"),
        ("[[1]]", "key must be a string, a number, true or false, not an array"),
        ("0xffffffffffffffffffffffff", "key must be a number of at most 64 bits"),
        ("{}", WRONG_REFERENCE),
        ('{ file = "/x", credential = "y" }', WRONG_REFERENCE),
        ('{ path = "/x" }', WRONG_REFERENCE),
        ('{ file = "x" }', WRONG_REFERENCE),
        ('{ file = "/x\\u0000" }', WRONG_REFERENCE),
        ("{ file = 1 }", WRONG_REFERENCE),
        ('{ credential = "../x" }', WRONG_REFERENCE),
        ('{ credential = ".." }', WRONG_REFERENCE),
        ('{ credential = "" }', WRONG_REFERENCE),
        ('{ credential = "a\\n" }', WRONG_REFERENCE),
    ],
)
def test_wrong_values_of_parameters_are_named(path: Path, value: str, message: str) -> None:
    assert complaint(path, f'[plugin]\nname = "x"\nkey = {value}\n') == f"[plugin] (x): {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[plugin]\nsize = 1", "[plugin]: the name is missing"),
        ("[plugin]\nname = 1", "[plugin]: name must be a string, not an integer"),
        ("[[filter]]\nname = 'x'\n[[filter]]", "[[filter]] 2: the name is missing"),
    ],
)
def test_units_need_a_name(path: Path, text: str, message: str) -> None:
    assert complaint(path, text) == message


# --- the file itself ------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_there_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(path))} cannot be read: No such file or directory$"):
        read_file(str(path))


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_file(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[server\n", "is not TOML: .*line 1"),
        (b"[server]\na = 1\na = 2\n", "is not TOML: .*line 3"),
        (b"\xff", "is not TOML: it is no text in UTF-8"),
        (b"a = " + b"9" * 5000, "is not TOML: "),
        (b"a = " + b"[" * 100_000, "is not TOML: "),
    ],
)
def test_what_is_no_toml_is_told_with_its_place(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))} {message}"):
        read_file(str(path))


KEYS = st.sampled_from(
    ["server", "listen", "plugin", "filter", "name", "size", "port", "path", "address", "transport", "tls", "threads",
     "timeout", "debug", "log", "read-only", "parameters", "file", "credential", "x", '"a b"', '""', '"\\u0007"']
)  # fmt: skip
SCALARS = st.sampled_from(
    ["1", "-1", "0x7fffffff", "9" * 5000, "1.5", "inf", "nan", "true", '"tcp"', '"unix"', '"memory"', '"1G"', '"/x"',
     '"\\u0000"', '"\\n"', '"ä"', "1979-05-27", "07:32:00", "[]", "{}"]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(values)}]")
        | st.dictionaries(KEYS, inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{key} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=6,
)
LINES = (
    st.builds("{} = {}".format, KEYS, VALUES)
    | st.builds("[{}]".format, KEYS)
    | st.builds("[[{}]]".format, KEYS)
    | st.builds("[{}.{}]".format, KEYS, KEYS)
    | st.text(max_size=10)
)


@fuzz(300)
@given(
    st.lists(LINES, max_size=8).map("\n".join).map(lambda text: text.encode("utf-8", "replace"))
    | st.binary(max_size=50)
)
def test_any_file_says_something_or_is_a_configuration_error_of_one_line(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        document, message = attempted(lambda: read_file(file.name), ConfigError)
    assert document is not None or message.startswith(file.name)


def test_a_key_is_shown_so_that_a_terminal_does_not_act_on_it(path: Path) -> None:
    assert complaint(path, r'"\u001b[2J" = 1').startswith(r'there is no key "\x1b[2J": there are server')


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "{x = " * 10_000, "x" + ".x" * 2000 + " = 1"])
def test_nested_too_deeply_is_an_error(path: Path, text: str) -> None:
    assert complaint(path, text)


# --- the page about it ----------------------------------------------------------------------------------------------


def test_example_of_the_page_is_right(path: Path) -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

    document = read(path, example)

    assert document.plugin is not None
    assert (document.plugin.name, [table.name for table in document.filters]) == ("file", ["ip", "limit"])
    assert len(document.listen) == 2

"""The command line: its grammar, its answers to questions, its exit status, and real runs of the program."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

import nbdkitpy
from nbdkitpy import ConfigError, cli
from nbdkitpy.cli.program import Invocation
from nbdkitpy.config import DebugFlag, ServerConfig
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.server.activation import Activation
from nbdkitpy.server.launch import SIGNALS
from nbdkitpy.server.notify import Notifier
from nbdkitpy.server.options import AddressFamily, Endpoint, ServerOptions, Transport
from nbdkitpy.stack import Stack
from tests.environment import MAIN, without_coverage

ROOT = Path(__file__).parents[1]

UNITS = '''
import os
import sys

from nbdkitpy import *

class Disk(Plugin):
    name = "tdisk"
    longname = "A disk for tests"
    description = """Has every kind
    of parameter."""
    version = "7.1"
    debug_flags = frozenset({"trace"})
    size = Parameter(parse_size, required=True, magic=True, help="Size of the disk.")
    mode = Parameter(choice("fast", "faster", "safe"), default="safe", help="How it is written.")
    sync = Parameter(parse_bool, default=False, help="Whether it is flushed.")
    label = Parameter(parse_string)
    tag = Repeated(parse_string, help="Marks.")

    def dump(self):
        return {"marks": ",".join(self.tag), **({"server": self.server_name} if self.server_name else {})}

    def config_help(self, given):
        return f"Of size: {given['size']}\\n  as it stands\\n" if "size" in given else ""

    def load(self):
        print("load", self.debug, file=sys.stderr)

    def unload(self):
        print("unload", file=sys.stderr)

    def open(self, export_name, readonly, client):
        return Zeroes()

class Zeroes(Handle):
    def get_size(self):
        return 1 << 20

    def pread(self, count, offset):
        return bytes(count)

class Plain(Plugin):
    name = "tplain"

class Defect(Plugin):
    name = "tdefect"

    def load(self):
        raise LookupError("not to be found")

class Exit(Plugin):
    name = "texit"

    def load(self):
        raise SystemExit(0)

class Pass(Filter):
    name = "tpass"
    bound = Parameter(integer(0, 9), key="bound", live=True)

    def dump(self):
        return {"tpass_extra": "yes"}

@hookimpl
def register_plugins(register):
    for cls in (Disk, Plain, Defect, Exit):
        register(cls)

@hookimpl
def register_filters(register):
    register(Pass)
'''

ENTRY_POINTS = """
[nbdkitpy.plugins]
tdisk = cli_test_units
tplain = cli_test_units
tdefect = cli_test_units
texit = cli_test_units
tgone = cli_test_units_that_are_not_there

[nbdkitpy.filters]
tpass = cli_test_units
"""


@pytest.fixture(autouse=True)
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution with units that is found before any other."""
    place = tmp_path / "site"
    info = place / "cli_test-4.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cli-test\nVersion: 4.2\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (place / "cli_test_units.py").write_text(UNITS)
    monkeypatch.syspath_prepend(str(place))
    yield place
    sys.modules.pop("cli_test_units", None)


def run(*args: str, activation: Activation | None = None) -> Result:
    invocation = Invocation(os.getppid(), activation)
    return CliRunner().invoke(cli.command(), list(args), obj=invocation, prog_name="nbdkitpy")


def parsed(monkeypatch: pytest.MonkeyPatch, *args: str, activation: Activation | None = None) -> ServerConfig:
    """What the command line `args` means."""
    found: list[ServerConfig] = []

    def serve(config: ServerConfig, parent: int) -> int:
        found.append(config)
        return 0

    monkeypatch.setattr("nbdkitpy.cli.start.serve", serve)
    result = run(*args, activation=activation)
    assert result.exit_code == 0, result.output
    return found[0]


Parsed = Callable[..., ServerConfig]


@pytest.fixture(name="parsed")
def parsed_fixture(monkeypatch: pytest.MonkeyPatch) -> Parsed:
    return lambda *args, activation=None: parsed(monkeypatch, *args, activation=activation)


# --- the grammar ---


def test_defaults_are_those_of_the_options_of_the_server(parsed: Parsed) -> None:
    assert parsed("null") == ServerConfig("null")


def test_options_may_follow_the_plugin_and_its_parameters(parsed: Parsed) -> None:
    config = parsed("-r", "memory", "1M", "-e", "x", "a=b", "--filter", "ip", "-v")

    assert config.plugin == "memory"
    assert config.parameters == ((None, "1M"), ("a", "b"))
    assert config.filters == ("ip",)
    assert config.server.readonly
    assert config.verbose
    assert config.server.export_name == "x"


def test_two_dashes_end_the_options(parsed: Parsed) -> None:
    assert parsed("memory", "--", "-r", "--verb").parameters == ((None, "-r"), (None, "--verb"))


def test_short_options_may_be_put_together(parsed: Parsed) -> None:
    config = parsed("-rvp", "77", "-eexport", "null")

    assert (config.server.readonly, config.verbose) == (True, True)
    assert config.server.endpoints == (Endpoint(port="77"),)
    assert config.server.export_name == "export"


def test_lone_dash_is_a_value_and_a_word(parsed: Parsed) -> None:
    assert parsed("sh", "-").parameters == ((None, "-"),)
    assert parsed("-U", "-", "null").server.endpoints == (Endpoint(Transport.UNIX),)


@pytest.mark.parametrize(
    "args",
    [
        ["--read-only"],
        ["--readonly"],
        ["--read"],
        ["--reado"],
    ],
)
def test_long_option_may_be_cut_short(parsed: Parsed, args: list[str]) -> None:
    assert parsed(*args, "null").server.readonly


def test_option_that_is_cut_short_takes_its_value_either_way(parsed: Parsed) -> None:
    assert parsed("--thr=3", "null").server.threads == 3
    assert parsed("--thr", "4", "null").server.threads == 4


def test_value_of_an_option_is_not_taken_for_one(parsed: Parsed) -> None:
    assert parsed("--run", "--verb", "null").run == "--verb"
    assert parsed("-e", "--verb", "null").server.export_name == "--verb"
    assert parsed("-rve", "--verb", "null").server.export_name == "--verb"
    assert parsed("-e-x", "--verb", "null").verbose


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ver", "null"], "option --ver is ambiguous: it could be --verbose, --version"),
        (["--d"], "option --d is ambiguous: it could be --debug, --drain, --dump-config, --dump-plugin"),
        (["--tls", "maybe", "null"], "'--tls': must be off, on or require, not 'maybe'"),
        (["--tls-psk", "/does/not/exist", "null"], "'--tls-psk': must be the path of something that exists"),
        (["--tls-certificates", "", "null"], "'--tls-certificates': must be a path, not ''"),
        (["-x", "null"], "-x"),
        (["-rx", "null"], "-x"),
        (["null", "-p"], "-p"),
        (["null", "--por"], "--port"),
        (["null", "--readonly=1"], "--readonly"),
        (["-t", "-1", "null"], "'-t' / '--threads': must be an integer from 0 to 65536, not '-1'"),
        (["-t", "９", "null"], "must be an integer"),
        (["--timeout", "soon", "null"], "must be a time such as"),
        (["--drain=-1", "null"], "must be a time such as"),
        (["--mask-handshake", "x", "null"], "'--mask-handshake': must be an integer"),
        (["--log", "file", "null"], "'--log': must be one of stderr, syslog, null, default or an absolute path"),
        (["-D", "x=1", "null"], "'-D' / '--debug': must be NAME.FLAG=N, where N is an integer, not 'x=1'"),
        (["-U", "", "null"], "'-U' / '--unix': must be a path, not ''"),
        (["-p", "1", "-U", "/x", "null"], "--port and --unix exclude each other"),
        (["-p", "0", "-U", "-", "null"], "--port and --unix exclude each other"),
        (["--vsock", "-U", "/x", "null"], "--vsock and --unix exclude each other"),
        (["-s", "-p", "1", "null"], "--single and --port exclude each other"),
        (["-s", "-U", "-", "null"], "--single and --unix exclude each other"),
        (["--stdin", "--vsock", "null"], "--single and --vsock exclude each other"),
        (["--single", "--run", "x", "null"], "--single and --run exclude each other"),
        (["-s", "--dump-plugin", "null"], "--single and --dump-plugin exclude each other"),
        (["--log-format", "xml", "null"], "'--log-format': must be one of text, json, not 'xml'"),
        (["--idle-timeout", "x", "null"], "'--idle-timeout': must be a time such as"),
        (["--config", "", "null"], "'--config': must be a path, not ''"),
        (["--check-config"], "no plugin is given"),
        ([], "no plugin is given; nbdkitpy --list-plugins shows what there is"),
        (["--dump-plugin"], "no plugin is given"),
    ],
)
def test_usage_errors_have_status_2_and_say_what_is_wrong(args: list[str], message: str) -> None:
    result = run(*args)

    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_usage_error_says_how_to_get_help() -> None:
    assert "Try 'nbdkitpy --help' for help." in run("--ver").output


# --- what options mean ---


@pytest.mark.parametrize(
    ("args", "endpoint"),
    [
        ("", Endpoint()),
        ("-i any -p 0", Endpoint(address="any", port="0")),
        ("--ip-addr ::1 --port nbd", Endpoint(address="::1", port="nbd")),
        ("--ipaddr 127.0.0.1 -i ::1", Endpoint(address="::1")),
        ("-4", Endpoint(address_family=AddressFamily.INET)),
        ("-4 --ipv6-only", Endpoint(address_family=AddressFamily.INET6)),
        ("-6 --ipv4-only", Endpoint(address_family=AddressFamily.INET)),
        ("-U /run/x.sock", Endpoint(Transport.UNIX, unix_path="/run/x.sock")),
        ("--unix=- -i ::1 -4", Endpoint(Transport.UNIX)),
        ("--vsock -p 5 -i ::1 -4", Endpoint(Transport.VSOCK, port="5")),
        ("--run true", Endpoint(Transport.UNIX)),
        ("--run true -p 1", Endpoint(port="1")),
        ("--run true -i ::1", Endpoint(address="::1")),
        ("--run true --vsock", Endpoint(Transport.VSOCK)),
        ("--run true -U /x", Endpoint(Transport.UNIX, unix_path="/x")),
    ],
)
def test_options_that_say_where_to_listen(parsed: Parsed, args: str, endpoint: Endpoint) -> None:
    assert parsed(*args.split(), "null").server == ServerOptions(endpoints=(endpoint,))


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ("-e a --exportname b", ServerOptions(export_name="b")),
        ("--export a --export-name b", ServerOptions(export_name="b")),
        ("-o", ServerOptions(oldstyle=True)),
        ("-o --new-style", ServerOptions()),
        ("-n --old-style", ServerOptions(oldstyle=True)),
        ("--mask-handshake 0", ServerOptions(handshake_flags=0)),
        ("--mask-handshake=0xfffffffd", ServerOptions(handshake_flags=1)),
        ("--no-sr --no-mc", ServerOptions(structured_replies=False, meta_contexts=False)),
        (
            "--no-structured-replies --no-meta-contexts",
            ServerOptions(structured_replies=False, meta_contexts=False),
        ),
        ("-t 1", ServerOptions(threads=1)),
        ("-t 0", ServerOptions()),
        ("--timeout 100ms --drain 2s", ServerOptions(handshake_timeout=0.1, drain=2.0)),
        ("--time-out 0 --drain 0", ServerOptions(handshake_timeout=0.0, drain=0.0)),
        ("-P /run/pid", ServerOptions(pidfile="/run/pid")),
        ("--tls=off", ServerOptions(tls=TlsMode.OFF)),
        ("--tls NO", ServerOptions(tls=TlsMode.OFF)),
        ("--tls On", ServerOptions(tls=TlsMode.ON)),
        ("--tls=1", ServerOptions(tls=TlsMode.ON)),
        ("--tls=REQUIRE", ServerOptions(tls=TlsMode.REQUIRE)),
        ("--tls=required", ServerOptions(tls=TlsMode.REQUIRE)),
        ("--tls=force", ServerOptions(tls=TlsMode.REQUIRE)),
        (
            "--tls-certificates=/tls --tls-psk=/dev/null --tls-verify-peer --tls-priority=HIGH",
            ServerOptions(tls_certificates="/tls", tls_psk="/dev/null", tls_verify_peer=True, tls_priority="HIGH"),
        ),
        ("-f", ServerOptions()),
        ("--no-fork --foreground", ServerOptions()),
    ],
)
def test_options_of_the_server(parsed: Parsed, args: str, options: ServerOptions) -> None:
    assert parsed(*args.split(), "null").server == options


def test_paths_are_made_absolute(parsed: Parsed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    server = parsed("--pid-file", "pid", "-U", "sock", "null").server

    assert server.pidfile == str(tmp_path / "pid")
    assert server.endpoints == (Endpoint(Transport.UNIX, unix_path=str(tmp_path / "sock")),)


@pytest.mark.parametrize("option", ["--print-uri", "--print-url", "--show-uri", "--show-url"])
def test_print_uri_has_nbdkits_names(parsed: Parsed, option: str) -> None:
    assert parsed(option, "null").print_uri


def test_options_that_are_not_the_servers(parsed: Parsed) -> None:
    config = parsed(
        *["--filter=b", "--filter", "a", "--run", "x y", "--log=null", "--name", "n", "--exit-with-parent"],
        *["-D", "a.b=1", "--debug=c.d=0x2", "null"],
    )

    assert config == ServerConfig(
        "null",
        filters=("b", "a"),
        server=ServerOptions(endpoints=(Endpoint(Transport.UNIX),)),
        run="x y",
        background=False,
        log="null",
        name="n",
        debug=(DebugFlag("a", "b", 1), DebugFlag("c", "d", 2)),
        exit_with_parent=True,
        by_command_line=frozenset({"run", "log", "name", "debug", "exit_with_parent"}),
    )


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        ("-s", {"single": True, "background": False}),
        ("--stdin", {"single": True, "background": False}),
        ("-u nbd --group 7", {"user": "nbd", "group": "7"}),
        ("--user 0 -g disk", {"user": "0", "group": "disk"}),
        ("--swap --selinux-label a:b", {"swap": True, "selinux_label": "a:b"}),
        ("--keepalive", {"keepalive": True}),
        ("--keep-alive --idle-timeout 1.5s", {"keepalive": True, "idle_timeout": 1.5}),
        ("--log-format=json --log /x", {"log_format": "json", "log": "/x"}),
        ("-f", {"background": False}),
        ("--foreground --no-fork", {"background": False}),
    ],
)
def test_options_of_the_service(parsed: Parsed, args: str, settings: dict[str, Any]) -> None:
    config = parsed(*args.split(), "null")

    # Some are the server's own settings, some the process's.
    found = {name: getattr(config if hasattr(config, name) else config.server, name) for name in settings}
    assert found == settings


# --- sockets of a service manager ---

ACTIVATION = Activation((3, 4), ("", ""))


def test_activation_keeps_the_server_in_the_foreground(parsed: Parsed) -> None:
    config = parsed("--vsock", "-4", "-P", "/run/pid", "null", activation=ACTIVATION)

    assert not config.background
    assert config.server.endpoints == (Endpoint(fd=3), Endpoint(fd=4))


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["-i", "::1"], "-i"),
        (["--ip-addr=::1"], "-i"),
        (["--port", "0"], "-p"),
        (["--run", "true"], "--run"),
        (["--single"], "-s"),
        (["--unix", "-"], "-U"),
    ],
)
def test_options_that_activation_excludes_are_named(args: list[str], option: str) -> None:
    result = run(*args, "null", activation=ACTIVATION)

    assert result.exit_code == 2
    assert f"cannot use socket activation with the {option} option" in result.output


def test_sockets_of_a_service_manager_are_in_no_dump() -> None:
    result = run("--dump-config", "tdisk", activation=ACTIVATION)

    assert result.exit_code == 0
    assert "listen" not in result.stdout


def test_places_of_the_file_are_not_used_under_activation(parsed: Parsed, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text('[plugin]\nname = "null"\n[[listen]]\ntransport = "unix"\n')

    config = parsed("--config", str(tmp_path / "x.toml"), activation=ACTIVATION)

    assert config.server.endpoints == (Endpoint(fd=3), Endpoint(fd=4))


# --- the configuration file ---

FILE = """
[server]
threads = 3
read-only = true
name = "of the file"
debug = ["tdisk.trace=1"]

[[listen]]
transport = "unix"
path = "/run/x.sock"

[[listen]]
transport = "vsock"

[[filter]]
name = "tpass"
bound = 1

[plugin]
name = "tdisk"
size = 1048576
tag = ["a", "b"]
"""


@pytest.fixture(name="file")
def file_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "disk.toml"
    path.write_text(FILE)
    return path


def test_file_says_what_is_served_and_how(parsed: Parsed, file: Path) -> None:
    config = parsed("--config", str(file))

    assert (config.plugin, config.filters, config.parameters) == ("tdisk", ("tpass",), ())
    assert config.server == ServerOptions(
        endpoints=(Endpoint(Transport.UNIX, unix_path="/run/x.sock"), Endpoint(Transport.VSOCK)),
        threads=3,
        readonly=True,
    )
    assert (config.name, config.debug) == ("of the file", (DebugFlag("tdisk", "trace", 1),))
    assert [table.name for table in config.tables] == ["tpass", "tdisk"]
    assert config.file is not None
    assert config.file.path == str(file)


def test_command_line_wins_over_the_file(parsed: Parsed, file: Path) -> None:
    config = parsed("--config", str(file), "-t4", "--name=n", "-Dx.y=2", "-p7", "--filter=ip", "tdisk", "size=2M")

    assert config.filters == ("ip", "tpass")
    assert config.server == ServerOptions(endpoints=(Endpoint(port="7"),), threads=4, readonly=True)
    assert config.name == "n"
    assert config.debug == (DebugFlag("tdisk", "trace", 1), DebugFlag("x", "y", 2))
    assert config.parameters == (("size", "2M"),)


@pytest.mark.parametrize(
    ("args", "plugin", "parameters"),
    [
        ([], "tdisk", ()),
        (["size=2M"], "tdisk", (("size", "2M"),)),
        (["size=2M", "x"], "tdisk", (("size", "2M"), (None, "x"))),
        (["tdisk", "2M"], "tdisk", ((None, "2M"),)),
        (["tplain", "2M"], "tplain", ((None, "2M"),)),
    ],
)
def test_plugin_of_the_file_need_not_be_named(
    parsed: Parsed, file: Path, args: list[str], plugin: str, parameters: tuple[object, ...]
) -> None:
    config = parsed("--config", str(file), *args)

    assert (config.plugin, config.parameters) == (plugin, parameters)
    assert config.tables[-1].name == plugin


def test_parameters_of_the_files_plugin_are_not_given_to_another(parsed: Parsed, file: Path) -> None:
    tables = parsed("--config", str(file), "tplain").tables

    assert [table.parameters.keys() for table in tables] == [{"bound"}, set()]


def test_file_of_parameters_may_come_first(parsed: Parsed, file: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("size=3M\n")

    assert parsed("--config", str(file), f"@{tmp_path}/words").parameters == (("size", "3M"),)


def test_file_without_plugin_needs_one_on_the_command_line(parsed: Parsed, file: Path) -> None:
    file.write_text("")

    assert parsed("--config", str(file), "null").plugin == "null"
    result = run("--config", str(file))
    assert result.exit_code == 1
    assert result.output == (
        f"nbdkitpy: error: {file}: there is no table [plugin], and no plugin is given on the command line\n"
    )


def test_file_with_an_error_is_one_line_and_status_1(file: Path) -> None:
    file.write_text("[server]\nthread = 1\n")

    for question in ([], ["--check-config"], ["--dump-config"], ["--help"]):
        result = run("--config", str(file), *question)

        assert result.exit_code == 1
        assert result.output == (
            f'nbdkitpy: error: {file}: [server]: there is no key "thread": did you mean "threads"?\n'
        )


def test_parameter_of_the_file_that_is_wrong_is_told_with_its_place(file: Path) -> None:
    file.write_text('[plugin]\nname = "tdisk"\nsize = "x"\n')

    output = run("--config", str(file)).output.splitlines()

    assert [line for line in output if "load" not in line] == [
        f'nbdkitpy: error: {file}: [plugin] (tdisk): tdisk: size must be a size such as 512, 10M or 1G, not "x"'
    ]


def test_help_and_version_are_about_the_units_of_the_file(file: Path) -> None:
    assert run("--config", str(file), "-V").output.splitlines()[1:] == ["tpass 4.2", "tdisk 7.1"]
    assert "tdisk plugin (A disk for tests):" in run("--config", str(file), "--help").output


def test_check_config_checks_without_serving(file: Path, tmp_path: Path) -> None:
    result = run("--config", str(file), "--check-config", "--log", str(tmp_path / "log"), "-P", "/no/such/pid")

    assert result.exit_code == 0
    assert result.stdout == "nbdkitpy: the configuration is right\n"
    assert result.stderr == "load {'trace': 1}\nunload\n"
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tdisk"], "tdisk: size=SIZE is missing: Size of the disk."),
        (["tdisk", "1", "siz=1"], 'unknown parameter "siz"'),
        (["tgone"], 'plugin "tgone" of cli-test 4.2 cannot be loaded'),
        (["tdefect"], "cannot start: LookupError: not to be found"),
        (["texit"], "cannot start: SystemExit: 0"),
        (["texit", "--dump-plugin"], "cannot start: SystemExit: 0"),
    ],
)
def test_check_config_finds_what_is_wrong(args: list[str], message: str) -> None:
    result = run("--check-config", *args)

    assert result.exit_code == 1
    (error,) = [line for line in result.output.splitlines() if line.startswith("nbdkitpy: error: ")]
    assert message in error


def test_dump_config_is_a_file_that_says_the_same(parsed: Parsed, file: Path, tmp_path: Path) -> None:
    args = ["--config", str(file), "tag=c", "-t4", "--filter=tpass", "bound=2"]
    # What units print, they print on standard error.
    (tmp_path / "dumped.toml").write_text(run(*args, "--dump-config").stdout)

    before, after = parsed(*args), parsed("--config", str(tmp_path / "dumped.toml"))

    assert after.server == before.server
    assert (after.filters, after.plugin, after.name) == (("tpass", "tpass"), "tdisk", "of the file")
    values = [{key: given.values for key, given in table.parameters.items()} for table in after.tables]
    assert values == [{"bound": ("2",)}, {"bound": ("1",)}, {"tag": ("c",), "size": ("1048576",)}]


def test_parser_of_files_is_not_imported_without_one() -> None:
    code = "import sys; from nbdkitpy.cli import command; command(); print(sorted(sys.modules))"
    env = without_coverage()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    modules = done.stdout

    for name in ("tomllib", "tomli", "nbdkitpy.config.file", "nbdkitpy.config.dump", "asyncio", "socket"):
        assert f"'{name}'" not in modules


# --- questions ---


def test_help_shows_every_option(units: Path) -> None:
    result = run("--help")

    assert result.exit_code == 0
    assert all(option in result.output for param in cli.command().params for option in param.opts if option[0] == "-")
    assert "nbdkitpy file disk.img" in result.output


def test_help_of_a_plugin_shows_its_parameters_and_those_of_filters() -> None:
    result = run("tdisk", "--help", "--filter=tpass")

    assert result.exit_code == 0
    assert "Usage: nbdkitpy [OPTIONS] tdisk [[KEY=]VALUE | @PATH]..." in result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "tdisk plugin (A disk for tests):" in lines
    assert "Has every kind of parameter." in lines
    assert "[size=]SIZE Size of the disk. [required]" in lines
    assert "mode=CHOICE How it is written. [default: safe]" in lines
    assert "sync=BOOL Whether it is flushed. [default: false]" in lines
    assert "label=STRING" in lines
    assert "tag=STRING... Marks. [may be repeated]" in lines
    assert lines.index("tpass filter:") < lines.index("tdisk plugin (A disk for tests):")


def test_help_ends_with_what_the_plugin_says_of_the_parameters_beside_it(units: Path) -> None:
    output = run("tdisk", "7M", "--help", "size=8M").output

    assert output.endswith("\n\nOf size: 8M\n  as it stands\n\nThe options: nbdkitpy --help\n")


def test_help_does_not_mind_words_that_cannot_be(units: Path) -> None:
    assert "It has no parameters." in run("tplain", "--help", "word").output


def test_plugins_are_told_the_name_of_the_server(units: Path) -> None:
    assert "server=one\n" in run("tdisk", "--dump-plugin", "--name=one").output


def test_help_of_a_plugin_without_parameters_says_so() -> None:
    assert "It has no parameters." in run("--help", "tplain").output


def test_version() -> None:
    result = run("-V")

    assert (result.exit_code, result.output) == (0, f"nbdkitpy {nbdkitpy.__version__}\n")


def test_version_with_a_plugin_has_a_line_for_each_layer() -> None:
    result = run("--version", "--filter=tpass", "tdisk")

    assert result.output == f"nbdkitpy {nbdkitpy.__version__}\ntpass 4.2\ntdisk 7.1\n"


@pytest.mark.parametrize("question", ["--help", "--version", "--dump-plugin"])
@pytest.mark.parametrize("args", [["tgone"], ["no-such"], ["--filter=no-such", "tdisk"], ["../tdisk"]])
def test_question_about_a_unit_that_cannot_be_loaded_has_status_1(question: str, args: list[str]) -> None:
    result = run(question, *args)

    assert result.exit_code == 1
    assert result.output.startswith("nbdkitpy: error: ")
    assert result.output.count("\n") == 1


def test_lists_show_what_is_installed_and_where_it_is_from() -> None:
    plugins, filters = run("--list-plugins"), run("--list-filters")

    assert (plugins.exit_code, filters.exit_code) == (0, 0)
    assert ["tgone", "cli-test", "4.2"] in [line.split() for line in plugins.output.splitlines()]
    assert ["tpass", "cli-test", "4.2"] in [line.split() for line in filters.output.splitlines()]
    assert "tpass" not in plugins.output


def facts(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return dict(line.split("=", 1) for line in result.output.splitlines() if "=" in line)


def test_dump_config_tells_of_the_host() -> None:
    found = facts(run("--dump-config"))

    assert found["name"] == "nbdkitpy"
    assert found["version"] == nbdkitpy.__version__
    assert found["version"].startswith(f"{found['version_major']}.{found['version_minor']}.")
    assert found["python"] == sys.executable
    assert found["exit_with_parent"] == "yes"


def test_dump_plugin_tells_of_the_plugin_and_then_of_filters(units: Path) -> None:
    result = run("tdisk", "tag=a", "tag=b", "--filter=tpass", "--dump-plugin")

    found = facts(result)
    assert found == {
        "path": str(units / "cli_test_units.py"),
        "name": "tdisk",
        "version": "7.1",
        "distribution": "cli-test",
        "thread_model": "serialize_all_requests",
        "magic_config_key": "size",
        "has_load": "1",
        "has_unload": "1",
        "has_dump": "1",
        "has_open": "1",
        "marks": "a,b",
        "tpass_path": str(units / "cli_test_units.py"),
        "tpass_name": "tpass",
        "tpass_extra": "yes",
    }
    assert {"load {}", "unload"} < set(result.output.splitlines())


def test_dump_plugin_has_no_magic_key_where_there_is_none() -> None:
    assert "magic_config_key" not in facts(run("--dump-plugin", "tplain"))


# --- starting ---


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tgone"], 'plugin "tgone" of cli-test 4.2 cannot be loaded: ModuleNotFoundError'),
        (["tdefect"], "cannot start: LookupError: not to be found"),
        (["tdisk", "size=x"], 'tdisk: size must be a size such as 512, 10M or 1G, not "x"'),
        (["tdisk"], "tdisk: size=SIZE is missing"),
        (["tdisk", "1", "bound=10"], 'unknown parameter "bound"'),
        (["tdisk", "1", "bound=10", "--filter=tpass"], "tpass: bound must be an integer from 0 to 9"),
        (["tplain", "word"], "tplain: 'word' must be KEY=VALUE; parameters: none"),
        (["tdisk", "@/no/such/file"], "parameter file '/no/such/file' cannot be read"),
        (["tdisk", "1", "-U", "/no/such/directory/socket"], "/no/such/directory/socket"),
        (["tdisk", "1", "-f", "-P", "/no/such/directory/pid", "-U", "-"], "--pidfile: cannot write"),
        (["tdisk", "1", "--log=/no/such/file"], "--log: cannot open /no/such/file"),
    ],
)
def test_failure_to_start_has_status_1_and_one_line(args: list[str], message: str) -> None:
    result = run(*args)

    assert result.exit_code == 1
    errors = [line for line in result.output.splitlines() if line.startswith("nbdkitpy: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.output


def test_units_are_unloaded_after_a_failure() -> None:
    assert "unload" in run("tdisk", "size=x").output.splitlines()


def test_traceback_of_a_defect_is_for_the_verbose() -> None:
    output = run("tdefect", "-v").output

    assert "Traceback" in output
    assert "nbdkitpy: debug: version" in output


def test_debug_flags_are_set_before_load_and_those_unknown_are_warned_of() -> None:
    flags = ["tdisk.trace=3", "tdisk.x=1", "tpass.x=1", "nbdkit.backend.datapath=0", "nbdkitpy.nonsense=1"]

    output = run("tdisk", "x=1", *[word for flag in flags for word in ("-D", flag)]).output.splitlines()

    assert output[:4] == [
        "nbdkitpy: warning: -D tdisk.x is not used: tdisk has no such flag",
        "nbdkitpy: warning: -D tpass.x is not used: tpass is not in use",
        "nbdkitpy: warning: -D nbdkitpy.nonsense is not used: nbdkitpy has no such flag",
        "load {'trace': 3}",
    ]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the launch of a server is told; it does not happen."""
    told: dict[str, Any] = {}

    def launch(server: object, stack: Stack, **settings: object) -> int:
        told.update(settings, server=server)
        stack.unload()
        return 0

    monkeypatch.setattr("nbdkitpy.server.launch.launch", launch)
    monkeypatch.setattr("nbdkitpy.server.single.Single", lambda options: SimpleNamespace(name="the single one"))
    return told


def test_launch_is_told_all_about_the_process(launched: dict[str, Any]) -> None:
    options = "-u nbd -g disk --swap --selinux-label a:b -P /run/pid -e x --print-uri -v"

    result = run(*options.split(), "tdisk", "1")

    assert result.exit_code == 0, result.output
    del launched["server"]
    assert launched == {
        "command": None,
        "pidfile": "/run/pid",
        "export_name": "x",
        "announce": True,
        "print_uri": True,
        "background": True,
        "user": "nbd",
        "group": "disk",
        "swap": True,
        "selinux_label": "a:b",
        "notifier": None,
        "reload": None,
    }


def test_single_client_has_a_server_of_its_own(launched: dict[str, Any]) -> None:
    assert run("-s", "tdisk", "1").exit_code == 0

    assert (launched["server"].name, launched["background"]) == ("the single one", False)


def test_service_manager_is_told_if_it_wants_to_be(launched: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")

    assert run("tdisk", "1").exit_code == 0

    assert isinstance(launched["notifier"], Notifier)
    assert "NOTIFY_SOCKET" not in os.environ


def test_file_is_what_is_reloaded(launched: dict[str, Any], file: Path) -> None:
    assert run("--config", str(file)).exit_code == 0

    assert launched["reload"]() == ["nothing has changed"]


def test_messages_are_set_up_as_the_options_say(launched: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"

    assert run("-Dx.y=1", "--log-format=json", "--log", str(log), "--name=n", "tdisk", "1").exit_code == 0

    (line,) = log.read_text().splitlines()
    assert (json.loads(line)["name"], json.loads(line)["level"]) == ("n", "warning")


def test_exit_with_parent_comes_before_any_unit_and_its_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(parent: int) -> None:
        raise ConfigError(f"--exit-with-parent: no such parent as {parent}")

    monkeypatch.setattr("nbdkitpy.server.launch.exit_with_parent", refuse)

    result = run("--exit-with-parent", "tdefect")

    assert result.exit_code == 1
    assert result.output == f"nbdkitpy: error: --exit-with-parent: no such parent as {os.getppid()}\n"


def test_run_serves_the_command_and_ends_with_its_status(tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = run("tdisk", "1M", "--name=x", "--run", f'test -S "$unixsocket" && echo "$uri" > {out}; exit 3')

    assert result.exit_code == 3, result.output
    assert out.read_text().startswith("nbd+unix://?socket=/")


# --- shell completion ---


def completions(*args: str, incomplete: str) -> list[str]:
    complete = ShellComplete(cli.command(), {}, "nbdkitpy", "_NBDKITPY_COMPLETE")
    return [item.value for item in complete.get_completions(list(args), incomplete)]


def test_completion_of_options() -> None:
    assert "--readonly" in completions(incomplete="--read")
    assert completions("--log", incomplete="s") == ["stderr", "syslog"]
    assert completions("--log-format", incomplete="") == ["text", "json"]
    assert completions("--name", incomplete="x") == []
    assert completions("--config", incomplete="/etc/x") == ["/etc/x"]


def test_completion_of_units() -> None:
    assert completions(incomplete="td") == ["tdefect", "tdisk"]
    assert completions("--filter", incomplete="tp") == ["tpass"]


def test_completion_of_parameters() -> None:
    assert completions("tdisk", incomplete="s") == ["size=", "sync="]
    assert completions("--filter", "tpass", "tdisk", "size=1", incomplete="") == [
        *["bound=", "size=", "mode=", "sync=", "label=", "tag="]
    ]
    assert completions("tgone", incomplete="") == []


@pytest.mark.parametrize(
    ("args", "incomplete", "words"),
    [
        ([], "mode=f", ["mode=fast", "mode=faster"]),
        ([], "size=1", []),
        ([], "other=1", []),
        (["mode", "="], "f", ["fast", "faster"]),  # as bash splits it
        (["mode"], "=", ["fast", "faster", "safe"]),
    ],
)
def test_completion_of_words_to_choose_from(args: list[str], incomplete: str, words: list[str]) -> None:
    assert completions("tdisk", *args, incomplete=incomplete) == words


# --- the program ---


def program(units: Path, *args: str, module: bool = False, **kwargs: Any) -> subprocess.Popen[str]:
    start = ["-m", "nbdkitpy"] if module else ["-c", "from nbdkitpy.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(units), str(ROOT)])}
    return subprocess.Popen(
        [sys.executable, *start, *args],
        env=environment,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs},
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_program_serves_until_a_signal_and_leaves_nothing(units: Path, tmp_path: Path, number: signal.Signals) -> None:
    path, pidfile = tmp_path / "sock", tmp_path / "pid"

    with program(units, "-f", "tdisk", "1M", "-U", str(path), "-P", str(pidfile), "--print-uri") as server:
        assert server.stdout is not None
        assert server.stdout.readline() == f"nbd+unix://?socket={path}\n"
        pid = int(pidfile.read_text())
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            greeting = client.recv(8)
        server.send_signal(number)
        _, errors = server.communicate(timeout=60)

    assert greeting == b"NBDMAGIC"
    assert pid == server.pid
    assert server.returncode == 0, errors
    assert not path.exists()
    assert not pidfile.exists()
    assert errors == "load {}\nunload\n"


def test_A10_files_have_the_same_mode_whatever_the_umask(units: Path, tmp_path: Path) -> None:
    path, pidfile = tmp_path / "sock", tmp_path / "pid"

    with program(units, "-f", "tdisk", "1M", "-U", str(path), "-P", str(pidfile), "--print-uri", umask=0) as server:
        assert server.stdout is not None
        server.stdout.readline()
        modes = [oct(each.stat().st_mode & 0o777) for each in (path, pidfile)]
        server.terminate()
        server.communicate(timeout=60)

    assert modes == ["0o755", "0o644"]


def activated(units: Path, listening: socket.socket, *args: str, fds: str = "1") -> subprocess.Popen[str]:
    """The program, with a socket at descriptor 3 as a service manager would have it."""
    start = (
        "import os, sys; os.dup2(int(sys.argv.pop(1)), 3);"
        " os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv.pop(1));"
        " from nbdkitpy.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(units), str(ROOT)])}
    command = [sys.executable, "-c", start, str(listening.fileno()), fds, *args]
    return subprocess.Popen(
        command,
        env=environment,
        pass_fds=[listening.fileno()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("args", "fds", "status", "message"),
    [
        ([], "0", 1, "nbdkitpy: error: socket activation: LISTEN_FDS must be a number from 1 to 16, not '0'\n"),
        (["-p", "0"], "1", 2, "cannot use socket activation with the -p option\n"),
    ],
)
def test_wrong_activation_ends_the_program(units: Path, args: list[str], fds: str, status: int, message: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        activated(units, listening, *args, "tdisk", "1M", fds=fds) as server,
    ):
        _, errors = server.communicate(timeout=60)

    assert server.returncode == status
    assert errors.endswith(message)


def test_reload_applies_the_file_to_the_running_server(units: Path, tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    text = '[plugin]\nname = "tdisk"\nsize = "1M"\n[[filter]]\nname = "tpass"\nbound = {}\n[server]\nthreads = {}\n'
    config.write_text(text.format(1, 1))
    ours, theirs = socket.socketpair()

    with ours, theirs, program(units, "-s", "--config", str(config), stdin=theirs, stdout=theirs) as server:
        ours.settimeout(60)
        assert ours.recv(8) == b"NBDMAGIC"
        assert server.stderr is not None
        assert server.stderr.readline() == "load {}\n"
        config.write_text(text.format(2, 2))
        server.send_signal(signal.SIGHUP)
        lines = [server.stderr.readline() for _ in range(2)]
        config.write_text("[plugin")
        server.send_signal(signal.SIGHUP)
        lines += [server.stderr.readline()]
        ours.close()
        server.communicate(timeout=60)

    assert lines[:2] == [
        "nbdkitpy: reload: tpass: bound has been set: 2\n",
        f"nbdkitpy: reload: {config}: [server]: threads differs: that needs a restart\n",
    ]
    assert lines[2].startswith(f"nbdkitpy: error: {config} is not TOML: ")
    assert server.returncode == 0


def test_verbose_server_says_what_it_listens_on(units: Path) -> None:
    with program(units, "tdisk", "1M", "-i", "127.0.0.2", "-p", "0", "-v", "--run", "echo $port") as server:
        out, errors = server.communicate(timeout=60)

    assert f"nbdkitpy: listening on 127.0.0.2:{out.strip()} (nbd://127.0.0.2:{out.strip()})\n" in errors
    assert "nbdkitpy: debug: thread model of the whole stack: serialize_all_requests\n" in errors


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_standard_stream_is_refused(units: Path, tmp_path: Path, closed: int) -> None:
    with program(units, "--version", preexec_fn=lambda: os.close(closed), stdin=subprocess.DEVNULL) as server:
        out, errors = server.communicate(timeout=60)

    assert server.returncode == 1
    assert out == ""
    assert errors == ["nbdkitpy: error: stdin must be open\n", "nbdkitpy: error: stdout must be open\n", ""][closed]


def test_P5_program_as_a_module_does_not_import_from_the_current_directory(units: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("click", "logging", "socket", "syslog", "cli_test_units"):
        (hostile / f"{name}.py").write_text("raise SystemExit('taken over')")

    with program(units, "tdisk", "--version", module=True, cwd=hostile) as server:
        out, errors = server.communicate(timeout=60)

    assert errors == ""
    assert out.splitlines()[1] == "tdisk 7.1"


@pytest.mark.parametrize(
    ("isolated", "safe_path", "kept"),
    [
        (0, None, False),  # Python 3.10
        (0, False, False),
        (0, True, True),
        (1, True, True),
        (1, None, True),
    ],
)
def test_P5_module_drops_the_first_place_to_import_from_if_python_put_it_there(
    monkeypatch: pytest.MonkeyPatch, isolated: int, safe_path: bool | None, kept: bool
) -> None:
    others = {name: getattr(sys.flags, name) for name in dir(sys.flags) if name[0] != "_" and name != "safe_path"}
    flags = {**others, "isolated": isolated, **({} if safe_path is None else {"safe_path": safe_path})}
    monkeypatch.setattr(sys, "flags", SimpleNamespace(**flags))
    monkeypatch.syspath_prepend("/current/directory")
    monkeypatch.setattr(cli, "main", lambda: None)

    runpy.run_path(MAIN, run_name="__main__")

    assert ("/current/directory" in sys.path) is kept


def test_module_does_nothing_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "main", lambda: pytest.fail("it ran"))

    runpy.run_path(MAIN, run_name="nbdkitpy.__main__")


def test_main_takes_the_sockets_of_a_service_manager(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "17")
    monkeypatch.setattr(os, "umask", lambda mask: mask)

    with pytest.raises(SystemExit) as caught:
        cli.main()

    assert caught.value.code == 1
    assert capsys.readouterr().err == (
        "nbdkitpy: error: socket activation: LISTEN_FDS must be a number from 1 to 16, not '17'\n"
    )
    assert not {"LISTEN_PID", "LISTEN_FDS"} & os.environ.keys()


def test_main_sets_the_umask_and_exits_with_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.umask(0)
    monkeypatch.setattr(sys, "argv", ["nbdkitpy", "--version"])
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        umask = os.umask(before)

    assert caught.value.code == 0
    assert umask == 0o022
    assert capsys.readouterr().out == f"nbdkitpy {nbdkitpy.__version__}\n"


@pytest.mark.parametrize(
    ("closed", "message"),
    [
        (["stdin"], "nbdkitpy: error: stdin must be open\n"),
        (["stdin", "stdout"], "nbdkitpy: error: stdin and stdout must be open\n"),
        (["stdout", "stderr"], ""),
    ],
)
def test_main_refuses_closed_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], closed: list[str], message: str
) -> None:
    for name in closed:
        monkeypatch.setattr(sys, f"__{name}__", None)

    with pytest.raises(SystemExit) as caught:
        cli.main()

    assert caught.value.code == 1
    assert capsys.readouterr().err == message


def test_command_is_made_anew_each_time() -> None:
    assert isinstance(cli.command(), click.Command)
    assert cli.command() is not cli.command()

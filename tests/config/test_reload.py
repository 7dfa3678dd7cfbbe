"""The file is read again: live parameters are set, all or none, and what needs a restart is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle, Parameter, Plugin, Repeated, integer, log, parse_string
from nbdkitpy.config import Assignment
from nbdkitpy.config.file import read_file
from nbdkitpy.config.reload import Reloader
from nbdkitpy.config.units import UnitTable, configure
from nbdkitpy.stack import Stack
from tests.serving import NoServer


class Disk(Plugin):
    name = "disk"
    rate = Parameter(integer(0, 9), default=3, live=True)
    size = Parameter(integer(0, 9))

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        raise NotImplementedError


class Other(Plugin):
    name = "other"
    rate = Parameter(integer(0, 9), live=True)

    def config(self, key: str, value: str) -> bool:
        return super().config(key, value) or key == "extra"

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        raise NotImplementedError


class Rules(Filter):
    name = "rules"
    allow = Repeated(parse_string, live=True)
    mode = Parameter(parse_string)


class Service:
    """A stack that was configured by a file, which can be changed."""

    def __init__(
        self, path: Path, text: str, words: list[Assignment], plugin: Plugin, by_command_line: frozenset[str]
    ) -> None:
        self.path = path
        self.plugin = plugin
        path.write_text(text)
        document = read_file(str(path))
        self.filters = [Rules() for _ in document.filters]
        self.stack = Stack(plugin, self.filters, NoServer())
        is_files = document.plugin is not None and document.plugin.name == plugin.name
        own = document.plugin if is_files and document.plugin else UnitTable(plugin.name, "")
        configured = configure(self.stack, words, [*document.filters, own])
        self.options: dict[str, object] = {}
        self.reloader = Reloader(document, self.stack, configured, plugin.name, self.options.update, by_command_line)

    def reload(self, text: str) -> list[str]:
        """What is said of a reload with this text, without the file's path."""
        self.path.write_text(text)
        return [line.replace(f"{self.path}: ", "") for line in self.reloader()]


def service(
    tmp_path: Path, text: str, *words: Assignment, plugin: Plugin | None = None, given: tuple[str, ...] = ()
) -> Service:
    return Service(tmp_path / "x.toml", text, list(words), plugin or Disk(), frozenset(given))


PLUGIN = '[plugin]\nname = "disk"\n'
FILTER = '[[filter]]\nname = "rules"\n'


def rate(service: Service) -> object:
    assert isinstance(service.plugin, Disk)
    return service.plugin.rate


def test_nothing_has_changed(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN + "rate = 1\nsize = 2\n")

    assert running.reload("# comment\n" + PLUGIN + 'size = 2\nrate = "1"\n') == ["nothing has changed"]


def test_a_live_parameter_is_set_and_told_once(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN)

    assert running.reload(PLUGIN + "rate = 5\n") == ["disk: rate has been set: 5"]
    assert rate(running) == 5
    assert running.reload(PLUGIN + "rate = 5\n") == ["nothing has changed"]


def test_a_live_parameter_that_is_removed_gets_its_default(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN + "rate = 5\n")

    assert running.reload(PLUGIN) == ["disk: rate has been set: the default"]
    assert rate(running) == 3


SERVER = "[server]\n"


def test_limits_of_the_server_are_set_and_told_once(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN + SERVER + "max-connections = 5\nmax-options = 5\n")
    text = PLUGIN + SERVER + "max-connections = 7\nmax-connections-per-source = 3\nmax-handshakes = 2\n"

    assert running.reload(text + "max-options = 5\n") == [
        "[server]: max-connections has been set: 7",
        "[server]: max-connections-per-source has been set: 3",
        "[server]: max-handshakes has been set: 2",
    ]
    assert running.options == {"max_connections": 7, "max_connections_per_source": 3, "max_handshakes": 2}
    assert running.reload(text) == ["[server]: max-options differs: that needs a restart"]


def test_a_limit_of_the_server_that_is_removed_gets_its_default(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN + SERVER + "max-connections = 5\n")

    assert running.reload(PLUGIN) == ["[server]: max-connections has been set: the default"]
    assert running.options == {"max_connections": 1000}


def test_a_limit_of_the_server_that_the_command_line_gives_stays(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN, given=("max_connections",))

    assert running.reload(PLUGIN + SERVER + "max-connections = 5\nmax-handshakes = 6\n") == [
        "[server]: max-handshakes has been set: 6",
        "[server]: max-connections is not used, as the command line gives it",
    ]
    assert running.options == {"max_handshakes": 6}


def test_of_a_file_with_an_error_no_limit_of_the_server_is_set(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN)

    with pytest.raises(ConfigError):
        running.reload(PLUGIN + "rate = 99\n" + SERVER + "max-connections = 5\n")

    assert running.options == {}
    assert running.reload(PLUGIN + SERVER + "max-connections = 5\n") == ["[server]: max-connections has been set: 5"]


def test_filters_of_one_kind_have_their_own(tmp_path: Path) -> None:
    running = service(tmp_path, FILTER + 'allow = "a"\n' + FILTER + PLUGIN)

    lines = running.reload(FILTER + 'allow = "a"\n' + FILTER + 'allow = ["b", "c"]\n' + PLUGIN)

    assert lines == ["rules: allow has been set: b and c"]
    assert [each.allow for each in running.filters] == [("a",), ("b", "c")]


def test_a_value_that_stands_elsewhere_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "rate").write_text("1\n")
    text = f'{PLUGIN}rate = {{ file = "{tmp_path}/rate" }}\n'
    running = service(tmp_path, text)
    (tmp_path / "rate").write_text("2\n")

    assert running.reload(text) == ["disk: rate has been set: 2"]
    assert rate(running) == 2


def test_what_is_not_live_needs_a_restart_and_is_told_each_time(tmp_path: Path) -> None:
    running = service(tmp_path, FILTER + PLUGIN + "size = 1\n[server]\nthreads = 1\ndrain = 1\n")
    text = (
        FILTER
        + 'mode = "x"\n'
        + PLUGIN
        + '[server]\nthreads = 2\nverbose = true\ndrain = 1.0\n[[listen]]\ntransport = "unix"\n'
    )

    for _ in range(2):
        assert running.reload(text) == [
            "[server]: threads differs: that needs a restart",
            "[server]: verbose differs: that needs a restart",
            "[[listen]] differs: that needs a restart",
            "[[filter]] 1 (rules): mode differs: that needs a restart",
            "[plugin] (disk): size differs: that needs a restart",
        ]
    assert running.filters[0].mode is None


def test_other_units_need_a_restart_and_nothing_is_applied_meanwhile(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN)

    assert running.reload(FILTER + PLUGIN + "rate = 5\n") == [
        "the choice of plugin and filters differs: that needs a restart"
    ]
    assert running.reload('[plugin]\nname = "other"\nrate = 5\n') == [
        "the choice of plugin and filters differs: that needs a restart"
    ]
    assert rate(running) == 3


def test_the_command_line_still_wins(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN + "rate = 1\nsize = 1\n", ("rate", "7"), ("size", "7"))

    assert running.reload(PLUGIN + "rate = 2\nsize = 1\n") == [
        "[plugin] (disk): rate is not used, as the command line gives it"
    ]
    assert rate(running) == 7


def test_a_plugin_of_the_command_line_is_not_the_files(tmp_path: Path) -> None:
    other = Other()
    running = service(tmp_path, FILTER + PLUGIN + "rate = 1\n", plugin=other)

    assert running.reload(FILTER + 'allow = "a"\n' + PLUGIN + "rate = 2\n") == ["rules: allow has been set: a"]
    assert other.rate is None


def test_a_file_without_plugin_can_be_read_again(tmp_path: Path) -> None:
    running = service(tmp_path, FILTER)

    assert running.reload(FILTER + 'allow = "a"\n') == ["rules: allow has been set: a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILTER + 'allow = "b"\n' + PLUGIN + "rate = 99\n", r"disk: rate must be an integer from 0 to 9, not \"99\""),
        (FILTER + 'allow = "b"\n' + PLUGIN + "rate = [1]\n", r"\[plugin\] \(disk\): rate must be one value"),
        (FILTER + 'allow = "b"\n' + PLUGIN + "rat = 1\n", 'disk has no parameter "rat": did you mean "rate"'),
        (FILTER + 'allow = "b"\n' + PLUGIN + "[server]\nthread = 1\n", 'did you mean "threads"'),
        (FILTER + 'allow = "b"\n' + PLUGIN + "[server", "is not TOML"),
    ],
)
def test_of_a_file_with_an_error_nothing_is_applied(tmp_path: Path, text: str, message: str) -> None:
    running = service(tmp_path, FILTER + 'allow = "a"\n' + PLUGIN + "rate = 1\n")

    with pytest.raises(ConfigError, match=message):
        running.reload(text)

    assert (running.filters[0].allow, rate(running)) == (("a",), 1)
    assert running.reload(FILTER + 'allow = "c"\n' + PLUGIN + "rate = 1\n") == ["rules: allow has been set: c"]


def test_a_file_that_has_gone_is_an_error(tmp_path: Path) -> None:
    running = service(tmp_path, PLUGIN)
    running.path.unlink()

    with pytest.raises(ConfigError, match=r"x\.toml cannot be read"):
        running.reloader()


def test_parameters_that_are_not_declared_need_a_restart(tmp_path: Path) -> None:
    running = service(tmp_path, '[plugin]\nname = "other"\n', plugin=Other())

    assert running.reload('[plugin]\nname = "other"\nextra = 1\n') == [
        "[plugin] (other): extra differs: that needs a restart"
    ]


def test_the_log_file_is_opened_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    running = service(tmp_path, PLUGIN)

    with log.setup(str(file)):
        file.rename(tmp_path / "old")
        lines = running.reload(PLUGIN + "rate = 5\n")

    assert file.exists()
    assert lines == ["disk: rate has been set: 5", f"log file {file} reopened"]


def test_a_log_file_that_cannot_be_opened_does_not_keep_the_rest_from_being_told(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    file = tmp_path / "logs" / "log"
    running = service(tmp_path, PLUGIN)

    with log.setup(str(file)):
        file.unlink()
        file.parent.rmdir()
        first, second = running.reload(PLUGIN + "rate = 5\n")

    assert first == "disk: rate has been set: 5"
    assert re.fullmatch(r"--log: cannot open .*/logs/log: No such file or directory", second)

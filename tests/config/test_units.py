"""Parameters of the command line and of the file, on their way to the layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdkitpy import (
    Client,
    ConfigError,
    Filter,
    Handle,
    Parameter,
    Plugin,
    Repeated,
    integer,
    parse_size,
    parse_string,
    read_password,
)
from nbdkitpy.config.units import Given, Reference, UnitTable, configure
from nbdkitpy.stack import Stack
from tests.serving import NoServer


class Disk(Plugin):
    name = "disk"
    size = Parameter(parse_size, magic=True)
    tag = Repeated(parse_string)
    password = Parameter(read_password, secret=True)
    limit = Parameter(integer(0, 9), aliases=("maximum",))

    def __init__(self) -> None:
        super().__init__()
        self.others: list[tuple[str, str]] = []

    def config(self, key: str, value: str) -> bool:
        if key.startswith("x-"):
            self.others.append((key, value))
            return True
        return super().config(key, value)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        raise NotImplementedError


class Limit(Filter):
    name = "limit"
    limit = Parameter(integer(0, 9), default=1)


def table(name: str, **parameters: str | Reference | Given) -> UnitTable:
    given = {
        key.replace("_", "-"): value if isinstance(value, Given) else Given((value,))
        for key, value in parameters.items()
    }
    return UnitTable(name, f"FILE: [{name}]", given)


def array(*values: str | Reference) -> Given:
    return Given(values, is_array=True)


class Setup:
    """Two filters of one kind before a plugin."""

    def __init__(self) -> None:
        self.disk, self.outer, self.inner = Disk(), Limit(), Limit()
        self.stack = Stack(self.disk, [self.outer, self.inner], NoServer())


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_parameters_of_a_table_go_to_that_layer_only(setup: Setup) -> None:
    tables = [table("limit", limit="2"), table("limit", limit="3"), table("disk", limit="4", size="1k")]

    configure(setup.stack, [], tables)

    assert (setup.outer.limit, setup.inner.limit, setup.disk.limit, setup.disk.size) == (2, 3, 4, 1024)


def test_tables_are_those_of_the_innermost_layers(setup: Setup) -> None:
    configure(setup.stack, [], [table("limit", limit="3"), table("disk")])

    assert (setup.outer.limit, setup.inner.limit) == (1, 3)


def test_a_word_replaces_all_that_the_file_gives_to_the_layer_that_takes_it(setup: Setup) -> None:
    tables = [table("limit", limit="2"), table("limit", limit="3"), table("disk", tag=array("a", "b"), size="1")]

    configured = configure(setup.stack, [("limit", "5"), ("tag", "c"), ("tag", "d"), (None, "2k")], tables)

    assert (setup.outer.limit, setup.inner.limit) == (5, 3)
    assert (setup.disk.tag, setup.disk.size) == (("c", "d"), 2048)
    assert configured.given == {
        (setup.outer, "limit"): Given(("5",)),
        (setup.inner, "limit"): Given(("3",)),
        (setup.disk, "tag"): array("c", "d"),
        (setup.disk, "size"): Given(("2k",)),
    }
    assert configured.by_command_line == {(setup.outer, "limit"), (setup.disk, "tag"), (setup.disk, "size")}


def test_parameters_that_are_not_declared_are_given_one_by_one(setup: Setup) -> None:
    configure(setup.stack, [], [table("disk", x_a=array("1", "2"), x_b="3")])

    assert setup.disk.others == [("x-a", "1"), ("x-a", "2"), ("x-b", "3")]


def test_a_word_replaces_what_the_file_gives_by_another_name(setup: Setup) -> None:
    configured = configure(setup.stack, [("maximum", "5")], [table("disk", limit="6")])

    assert setup.disk.limit == 5
    assert list(configured.given) == [(setup.disk, "limit")]


def test_a_file_may_use_either_name_but_not_both(setup: Setup) -> None:
    configure(setup.stack, [], [table("disk", maximum="6")])

    assert setup.disk.limit == 6
    with pytest.raises(ConfigError, match=r"^FILE: \[disk\]: limit is given twice, by different names$"):
        configure(setup.stack, [], [table("disk", maximum="6", limit="6")])


def test_an_empty_array_gives_nothing(setup: Setup) -> None:
    configure(setup.stack, [], [table("disk", tag=array())])

    assert not Disk.tag.is_set(setup.disk)


@pytest.mark.parametrize(
    ("of_disk", "message"),
    [
        (table("disk", siz="1"), 'disk has no parameter "siz": did you mean "size"?'),
        (table("disk", **{"\x1b[2J": "1"}), r'disk has no parameter "\x1b[2J": there are size, tag, password, limit'),
        (table("disk", zzz=array()), 'disk has no parameter "zzz": there are size, tag, password, limit'),
        (table("disk", size="x"), 'disk: size must be a size such as 512, 10M or 1G, not "x"'),
        (table("disk", size=array("1")), "size must be one value, not an array: it cannot be given several times"),
        (
            table("disk", size=Reference("file", "/no/such/file")),
            "size: /no/such/file cannot be read: No such file or directory",
        ),
        (
            table("disk", size=Reference("credential", "x")),
            "size: credential 'x': there is no $CREDENTIALS_DIRECTORY, which LoadCredential= would set",
        ),
    ],
)
def test_what_is_wrong_names_file_and_table(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, of_disk: UnitTable, message: str
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)

    with pytest.raises(ConfigError) as caught:
        configure(setup.stack, [], [of_disk])

    assert str(caught.value) == f"FILE: [disk]: {message}"


def test_a_unit_without_parameters_says_so() -> None:
    class Plain(Filter):
        name = "plain"

    stack = Stack(Disk(), [Plain()], NoServer())

    with pytest.raises(ConfigError, match='plain has no parameter "x": it takes none'):
        configure(stack, [], [table("plain", x="1"), table("disk")])


def test_a_parameter_of_the_file_that_nobody_has_is_not_offered_to_other_layers(setup: Setup) -> None:
    with pytest.raises(ConfigError, match='limit has no parameter "size"'):
        configure(setup.stack, [], [table("limit", size="1"), table("disk")])


# --- values that stand elsewhere ------------------------------------------------------------------------------------


def test_a_value_may_be_the_first_line_of_a_file(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "size").write_text("4k\nmore")

    configured = configure(setup.stack, [], [table("disk", size=Reference("file", str(tmp_path / "size")))])

    assert setup.disk.size == 4096
    assert configured.given == {(setup.disk, "size"): Given((Reference("file", str(tmp_path / "size")),))}


def test_a_value_may_be_a_credential(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk-size").write_text("8k")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))

    configure(setup.stack, [], [table("disk", size=Reference("credential", "disk-size"))])

    assert setup.disk.size == 8192


@pytest.mark.parametrize("password", ["plain", "+plus", "-7", "-", ""])
def test_a_password_that_stands_elsewhere_is_taken_as_it_is(setup: Setup, tmp_path: Path, password: str) -> None:
    (tmp_path / "password").write_text(f"{password}\n")

    configure(setup.stack, [], [table("disk", password=Reference("file", str(tmp_path / "password")))])

    assert setup.disk.password == password


def test_a_file_that_is_no_text_is_refused(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "size").write_bytes(b"\xff")

    with pytest.raises(ConfigError, match="size is no text in UTF-8"):
        configure(setup.stack, [], [table("disk", size=Reference("file", str(tmp_path / "size")))])


def test_an_error_about_a_secret_does_not_show_it(setup: Setup, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(setup.stack, [], [table("disk", password="-secret")])

    assert "secret" not in str(caught.value)

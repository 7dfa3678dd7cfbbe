"""The grammar of parameters: words, bare words, files of them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from nbdkitpy import ConfigError, Parameter, Plugin, parse_size, parse_string
from nbdkitpy.config import DebugFlag, ServerConfig, parse_debug_flag, read_words, split_word, with_keys
from nbdkitpy.config.words import as_text


class Memory(Plugin):
    """Has a magic parameter."""

    name = "memory"
    size = Parameter(parse_size, magic=True)


class Python(Plugin):
    """Takes a script first."""

    name = "python"
    script = Parameter(parse_string)
    x = Parameter(parse_size)


class Plain(Plugin):
    """Has parameters, none of them magic."""

    name = "plain"
    a = Parameter(parse_size)
    b = Parameter(parse_string)


class Bare(Plugin):
    """Has none."""

    name = "bare"


class Sketch(Plugin):
    """Says what is magic by what it has been given."""

    name = "sketch"
    given: ClassVar[list[str]] = []

    def magic_config_key(self) -> str | None:
        return f"after-{len(self.given)}"


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("size=1M", "size", "1M"),
        ("size=", "size", ""),
        ("a.b-c_d9=x=y", "a.b-c_d9", "x=y"),
        ("file=two\nlines", "file", "two\nlines"),
        ("disk.img", None, "disk.img"),
        ("=x", None, "=x"),
        ("1a=x", None, "1a=x"),
        ("./a=b", None, "./a=b"),
        ("é=x", None, "é=x"),
        ("a b=x", None, "a b=x"),
        ("", None, ""),
    ],
)
def test_word_is_split_at_its_first_equals_sign_if_a_key_is_before_it(word: str, key: str | None, value: str) -> None:
    assert split_word(word) == (key, value)


def test_bare_words_are_values_of_the_magic_parameter_however_many() -> None:
    words = read_words(["1M", "limit=3", "2M"])

    assert list(with_keys(words, Memory())) == [("size", "1M"), ("limit", "3"), ("size", "2M")]
    assert Memory().magic_config_key() == "size"


def test_first_word_is_the_script_of_a_plugin_that_declares_one() -> None:
    assert list(with_keys(read_words(["x.py", "a=1"]), Python())) == [("script", "x.py"), ("a", "1")]


def test_plugin_is_asked_for_the_key_of_each_bare_word_when_it_has_those_before() -> None:
    plugin = Sketch()
    keys = []

    for key, value in with_keys(read_words(["one", "b=two", "three"]), plugin):
        plugin.given.append(value)
        keys.append(key)

    assert keys == ["after-0", "b", "after-2"]


def test_script_must_come_first() -> None:
    with pytest.raises(ConfigError, match=r"python: 'x.py' must be KEY=VALUE; parameters: script=STRING, x=SIZE"):
        list(with_keys(read_words(["a=1", "x.py"]), Python()))


def test_bare_word_for_a_plugin_without_magic_parameter_names_the_word_and_the_parameters() -> None:
    with pytest.raises(ConfigError, match=r"^plain: 'word' must be KEY=VALUE; parameters: a=SIZE, b=STRING$"):
        list(with_keys(read_words(["word"]), Plain()))


def test_bare_word_for_a_plugin_without_parameters_says_that_there_are_none() -> None:
    with pytest.raises(ConfigError, match="parameters: none"):
        list(with_keys(read_words(["word"]), Bare()))


def test_file_of_parameters_stands_for_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "words"
    file.write_text("# comment\n\n   \n  file=one \r\nbare\n #also comment\nfile=#three")

    assert read_words(["a=1", f"@{file}", "b=2"]) == (
        ("a", "1"),
        ("file", "one "),
        (None, "bare"),
        ("file", "#three"),
        ("b", "2"),
    )


def test_nested_files_are_relative_to_the_file_that_includes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "top").write_text("@sub/middle\n@./sub/../sub/middle\n")
    (tmp_path / "sub" / "middle").write_text("@./leaf\n")
    (tmp_path / "sub" / "leaf").write_text("a=1\n")
    monkeypatch.chdir(tmp_path)

    assert read_words(["@./top"]) == (("a", "1"), ("a", "1"))


def test_at_sign_without_a_slash_is_a_word_like_any_other() -> None:
    assert read_words(["@name", "@"]) == ((None, "@name"), (None, "@"))


def test_files_that_include_each_other_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("@./two\n")
    (tmp_path / "two").write_text("@./link\n")
    (tmp_path / "link").symlink_to("one")

    with pytest.raises(ConfigError, match=r"parameter file '.*/one' includes itself \(by '.*/two'\)"):
        read_words([f"@{tmp_path}/one"])


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"parameter file '.*/none' cannot be read: No such file or directory"):
        read_words([f"@{tmp_path}/none"])


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"a=1\0\n")

    with pytest.raises(ConfigError, match="has NUL in it"):
        read_words([f"@{tmp_path}/binary"])


def test_file_may_name_what_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes(b"file=\xff.img\n")

    assert read_words([f"@{tmp_path}/words"]) == (("file", "\udcff.img"),)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("1G", "1G"),
        (True, "true"),
        (False, "false"),
        (-7, "-7"),
        (0.25, "0.25"),
        ((1 << 64) - 1, "18446744073709551615"),
    ],
)
def test_values_as_texts(value: str | float, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    "value", [1 << 64, -(1 << 64), 10**5000], ids=["positive", "negative", "too long to be written"]
)
def test_a_number_that_no_parameter_can_have_is_no_text(value: int) -> None:
    with pytest.raises(ValueError, match="at most 64 bits"):
        as_text(value)


@pytest.mark.parametrize(
    ("text", "flag"),
    [
        ("file.trace=1", DebugFlag("file", "trace", 1)),
        ("nbdkit.backend.datapath=0", DebugFlag("nbdkit", "backend.datapath", 0)),
        ("a-b.c=-0x10", DebugFlag("a-b", "c", -16)),
    ],
)
def test_debug_flag(text: str, flag: DebugFlag) -> None:
    assert parse_debug_flag(text) == flag


@pytest.mark.parametrize("text", ["", "x", "x=1", "x.y", "x.y=", "x.y=z", ".y=1", "x.y=2147483648", "x.y=1\n"])
def test_debug_flag_of_a_wrong_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="integer"):
        parse_debug_flag(text)


def test_configuration_needs_no_more_than_a_plugin() -> None:
    config = ServerConfig("null")

    assert (config.filters, config.parameters, config.run, config.log) == ((), (), None, "default")

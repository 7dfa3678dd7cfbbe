import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.parameters import (
    MAX_DELAY,
    MAX_SIZE,
    Parameter,
    Repeated,
    choice,
    integer,
    parse_bool,
    parse_delay,
    parse_filename,
    parse_path,
    parse_probability,
    parse_size,
    parse_string,
    read_password,
)
from tests.fuzzing.attempts import attempted
from tests.fuzzing.effort import fuzz

MANY_DIGITS = "9" * 5000
FULL_WIDTH_ONE = "\uff11"
ARABIC_THREE = "\u0663"

unsigned_64 = integer(0, (1 << 64) - 1)
signed_64 = integer(-(1 << 63), (1 << 63) - 1)


# --- the parsing functions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1", 1),
        ("007", 7),  # sizes have no octal form
        ("1b", 1),
        ("1B", 1),
        ("2s", 1024),
        ("1k", 1 << 10),
        ("1K", 1 << 10),
        ("10M", 10 << 20),
        ("1g", 1 << 30),
        ("1T", 1 << 40),
        ("1p", 1 << 50),
        ("7E", 7 << 60),
        ("9223372036854775807", MAX_SIZE),
        ("9223372036854775807b", MAX_SIZE),
        ("8191P", 8191 << 50),
    ],
)
def test_size_is_a_decimal_number_with_one_suffix(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "k",
        "-1",
        "+1",
        "0x10",
        "1.5M",
        "1MB",
        "1MiB",
        "1kk",
        "1 k",
        " 1",
        "1 ",
        "1\n",
        "1e9",
        "1_000",
        "1z",
        "9223372036854775808",
        "9999999999999999999",
        "8E",
        "18446744073709551616",
        MANY_DIGITS,
        MANY_DIGITS + "k",
        FULL_WIDTH_ONE,
        ARABIC_THREE + "k",
        "1\u212a",  # the Kelvin sign, which lower() makes a k
        "1\u017f",  # the long s
        "1\0",
    ],
)
def test_P10_size_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a size "):
        parse_size(text)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, MAX_SIZE))
def test_size_round_trip(size: int) -> None:
    assert parse_size(str(size)) == size


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 7), st.sampled_from("bskmgtpeBSKMGTPE"))
def test_size_suffix_multiplies(number: int, suffix: str) -> None:
    unit = 512 if suffix in "sS" else 1024 ** "bkmgtpe".index(suffix.lower())

    assert parse_size(f"{number}{suffix}") == number * unit


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=30))
def test_size_answers_any_text_with_a_size_or_value_error(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert 0 <= size <= MAX_SIZE
    assert text.isascii()


@pytest.mark.parametrize("word", ["1", "true", "t", "yes", "y", "on"])
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_bool_true_words_in_any_case(word: str, case: Callable[[str], str]) -> None:
    assert parse_bool(case(word)) is True


@pytest.mark.parametrize("word", ["0", "false", "f", "no", "n", "off"])
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
def test_bool_false_words_in_any_case(word: str, case: Callable[[str], str]) -> None:
    assert parse_bool(case(word)) is False


@pytest.mark.parametrize(
    "text", ["", "2", "-1", "tru", "yes ", " yes", "on\n", "01", FULL_WIDTH_ONE, "none", MANY_DIGITS]
)
def test_bool_refuses_other_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"^true or false"):
        parse_bool(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("00", 0),
        ("42", 42),
        ("+42", 42),
        (" \t\n\v\f\r42", 42),
        ("0x2a", 42),
        ("0X2A", 42),
        ("0x0", 0),
        ("052", 42),
        ("18446744073709551615", (1 << 64) - 1),
        ("0xffffffffffffffff", (1 << 64) - 1),
        ("01777777777777777777777", (1 << 64) - 1),
    ],
)
def test_integer_takes_decimal_hexadecimal_and_octal(text: str, number: int) -> None:
    assert unsigned_64(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("-1", -1), ("-0", 0), ("-0x10", -16), (" -010", -8), ("-9223372036854775808", -(1 << 63))],
)
def test_signed_integer_takes_a_minus(text: str, number: int) -> None:
    assert signed_64(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "0x",
        "0xg",
        "08",
        "1 ",
        "1x",
        "1\n",
        "--1",
        "+-1",
        "- 1",
        "1.0",
        "1e3",
        "1_0",
        "0b1",
        "0o7",
        "-0",
        "-1",
        "18446744073709551616",
        "0x10000000000000000",
        MANY_DIGITS,
        "0x" + MANY_DIGITS,
        "0" + "7" * 5000,
        FULL_WIDTH_ONE,
        "\u00a01",  # a space of Unicode
        "1\0",
    ],
)
def test_P10_unsigned_integer_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"^an integer from 0 to 18446744073709551615$"):
        unsigned_64(text)


@pytest.mark.parametrize("text", ["0", "-1", "6"])
def test_integer_keeps_its_bounds(text: str) -> None:
    with pytest.raises(ValueError, match=r"^an integer from 1 to 5$"):
        integer(1, 5)(text)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.sampled_from(["{}", "{:+}", "{:#x}", "{:#X}"]))
def test_integer_round_trip(number: int, form: str) -> None:
    assert signed_64(form.format(number)) == number


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, (1 << 64) - 1))
def test_octal_round_trip(number: int) -> None:
    assert unsigned_64(f"0{number:o}") == number


def test_choice_takes_exactly_its_words() -> None:
    parse = choice("none", "default")

    assert parse("none") == "none"
    assert parse.words == ("none", "default")  # type: ignore[attr-defined]
    for wrong in ("", "None", "none ", "defaul"):
        with pytest.raises(ValueError, match=r"^one of none, default$"):
            parse(wrong)


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        ("0", 0.0),
        ("0.1", 0.1),
        (".5", 0.5),
        ("1.", 1.0),
        ("+0.5", 0.5),
        ("1e-1", 0.1),
        ("1E-8", 1e-8),
        ("10%", 0.1),
        ("0.5%", 0.005),
        ("200%", 2.0),
        ("1:10", 0.1),
        ("1/10", 0.1),
        ("2.5:5", 0.5),
        ("0/0", 0.0),
        ("0:0", 0.0),
        ("0/5", 0.0),
        ("3", 3.0),
    ],
)
def test_probability_forms(text: str, probability: float) -> None:
    assert parse_probability(text) == pytest.approx(probability)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "%",
        "-0.1",
        "-10%",
        "1:-10",
        "nan",
        "NaN",
        "inf",
        "Infinity",
        "1e999",
        "1e308/1e-308",
        "1e999%",
        "1/0",
        "5:0",
        "1/",
        "/10",
        "1:2:3",
        "1/2/3",
        "1:2/3",
        "1/2%",
        "10%%",
        "10 %",
        " 0.1",
        "0.1 ",
        "0.1\n",
        "0x1",
        "1_0",
        "half",
        ".",
        FULL_WIDTH_ONE,
        MANY_DIGITS,
        "1:" + MANY_DIGITS,
    ],
)
def test_P10_probability_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a probability such as"):
        parse_probability(text)


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, 1e300, allow_subnormal=False))
def test_probability_round_trip(number: float) -> None:
    assert parse_probability(repr(number)) == number


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("2", 2.0),
        ("1.5", 1.5),
        ("1.5s", 1.5),
        ("100ms", 0.1),
        ("20us", 2e-5),
        ("20\u03bcs", 2e-5),  # Greek letter mu
        ("20\u00b5s", 2e-5),  # micro sign
        ("5ns", 5e-9),
        ("1e-3", 1e-3),
        ("1e3ms", 1.0),
        ("2147483647", float(MAX_DELAY)),
        ("2147483647000ms", float(MAX_DELAY)),
    ],
)
def test_delay_forms(text: str, seconds: float) -> None:
    assert parse_delay(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "ms",
        "-1",
        "-0.5s",
        "1m",
        "1h",
        "1min",
        "1sm",
        "1ss",
        "1S",
        "1 s",
        " 1",
        "1s ",
        "nan",
        "inf",
        "infs",
        "1e999",
        "2147483648",
        "1e300",
        MANY_DIGITS,
        FULL_WIDTH_ONE + "s",
    ],
)
def test_P10_delay_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"^a time "):
        parse_delay(text)


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, MAX_DELAY, allow_subnormal=False), st.sampled_from(["", "s"]))
def test_delay_round_trip(seconds: float, unit: str) -> None:
    assert parse_delay(f"{seconds!r}{unit}") == seconds


@settings(deadline=None)  # the machine may be busy
@given(st.text())
def test_string_is_taken_as_it_is(text: str) -> None:
    assert parse_string(text) == text


def test_path_gets_the_current_directory_in_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert parse_path("disk") == f"{tmp_path}/disk"
    assert parse_path("/a/b") == "/a/b"


def test_path_keeps_its_meaning_behind_a_symbolic_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("elsewhere/deep")
    (tmp_path / "elsewhere" / "disk").touch()

    assert os.path.samefile(parse_path("link/../disk"), tmp_path / "elsewhere" / "disk")


def test_filename_resolves_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").touch()
    (tmp_path / "link").symlink_to("disk")

    assert parse_filename("link") == os.path.realpath(tmp_path / "disk")
    assert parse_filename(".") == os.path.realpath(tmp_path)


def test_filename_must_exist(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")

    with pytest.raises(ValueError, match=r"exists \(No such file or directory\)"):
        parse_filename(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"exists \(Too many levels"):
        parse_filename(str(tmp_path / "loop"))


@pytest.mark.parametrize("parse", [parse_path, parse_filename])
@pytest.mark.parametrize("text", ["", "a\0b"])
def test_paths_are_not_empty_and_have_no_nul(parse: Callable[[str], str], text: str) -> None:
    with pytest.raises(ValueError, match=r"^a path$"):
        parse(text)


# --- passwords -------------------------------------------------------------------------------------------------------


def _pipe_with(content: bytes) -> int:
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return reader


@pytest.mark.parametrize("text", ["", "hunter2", "with space ", "pä\u2028ss", "a-b+c"])
def test_password_is_the_text_itself(text: str) -> None:
    assert read_password(text) == text


FIRST_LINES = [
    (b"secret\n", "secret"),
    (b"secret", "secret"),
    (b"", ""),
    (b"\n", ""),
    (b"one\ntwo\n", "one"),
    (b"dos\r\n", "dos\r"),  # one newline is taken off, nothing else
    (b" -+x \n", " -+x "),
    ("pä\u2028ss\n".encode(), "pä\u2028ss"),
]


@pytest.mark.parametrize(("content", "password"), FIRST_LINES)
def test_P4_password_from_the_first_line_of_a_file(content: bytes, password: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)

    assert read_password(f"+{path}") == password


@pytest.mark.parametrize(("content", "password"), FIRST_LINES)
def test_P4_password_from_a_descriptor_which_is_closed(content: bytes, password: str) -> None:
    reader = _pipe_with(content)

    assert read_password(f"-{reader}") == password
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


@pytest.mark.parametrize("text", ["-0", "-1", "-2", "-02", "-secret", "-3x", "--", "- ", "-\uff13", "-" + MANY_DIGITS])
def test_password_refuses_other_words_with_a_minus(text: str) -> None:
    with pytest.raises(ValueError, match="-FD needs a descriptor above 2") as caught:
        read_password(text)

    assert "secret" not in str(caught.value)


def test_password_file_must_be_readable_text(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\n")

    with pytest.raises(ValueError, match="No such file or directory"):
        read_password(f"+{tmp_path}/missing")
    with pytest.raises(ValueError, match="Is a directory"):
        read_password(f"+{tmp_path}")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_password(f"+{binary}")
    with pytest.raises(ValueError, match="Bad file descriptor"):
        read_password("-999999")


def test_password_prompt_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, encoding="utf-8") as null:
        monkeypatch.setattr(sys, "stdin", null)

        with pytest.raises(ValueError, match="needs a terminal"):
            read_password("-")


class _Prompt:
    """A child process that asks for a password on a terminal of its own."""

    def __init__(self) -> None:
        self.terminal, inner = pty.openpty()
        program = (
            "from nbdkitpy.parameters import read_password\n"
            "try: print(ascii(read_password('-')))\n"
            "except ValueError as error: print(error)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=inner,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # without a controlling terminal, so that the developer's is not asked
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        os.close(inner)

    def answer(self, typed: bytes) -> tuple[str, bytes]:
        """What was read when `typed` was, and what the terminal showed of it."""
        assert self.process.stderr is not None
        prompt = b""
        while not prompt.endswith(b"password: "):
            character = self.process.stderr.read(1)
            assert character, prompt
            prompt += character
        os.write(self.terminal, typed)
        output, _ = self.process.communicate()
        os.set_blocking(self.terminal, False)
        try:
            echo = os.read(self.terminal, 1024)
        except OSError:  # nothing there, or the other end gone
            echo = b""
        os.close(self.terminal)
        return output.decode().strip(), echo


def test_password_prompt_does_not_show_what_is_typed() -> None:
    answer, echo = _Prompt().answer(b"hunter2\n")

    assert answer == "'hunter2'"
    assert b"hunter" not in echo


def test_password_prompt_without_an_answer_is_refused() -> None:
    answer, _ = _Prompt().answer(b"\x04")  # end of file

    assert "nothing was typed" in answer


class _Terminal:
    def isatty(self) -> bool:
        return True


def test_password_prompt_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["typed"])
    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))

    assert read_password("-") == "typed"
    assert list(answers) == []


def test_password_prompt_at_end_of_file_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def end_of_file(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(sys, "stdin", _Terminal())
    monkeypatch.setattr("getpass.getpass", end_of_file)

    with pytest.raises(ValueError, match="nothing was typed"):
        read_password("-")


# --- declarations ----------------------------------------------------------------------------------------------------


def _refuse(text: str) -> str:
    raise ValueError("something else")


def _refuse_in_its_own_words(text: str) -> str:
    raise ConfigError("unit: in its own words")


def _only_one(text: str) -> int:
    if text != "1":
        raise ValueError("1")
    return 1


class Unit:
    name = "unit"

    size = Parameter(parse_size, required=True, magic=True, help="Size of the disk.")
    cache_mode = Parameter(choice("none", "default"), default="default")
    label = Parameter(parse_string)
    class_ = Parameter(parse_string, default="")
    renamed = Parameter(parse_bool, default=False, key="other-name", metavar="YESNO")
    passphrase = Parameter(read_password, secret=True)
    refused = Parameter(_refuse)
    secret = Parameter(_refuse, secret=True)
    own_words = Parameter(_refuse_in_its_own_words)
    number = Parameter(integer(0, 9), default=3)
    text = Parameter(lambda text: text)
    rule = Repeated(_only_one, help="A rule.")
    file = Repeated(parse_path, required=True, magic=True, key="FILE", metavar="PATH")


def test_declaration_is_read_on_the_class() -> None:
    assert isinstance(Unit.size, Parameter)
    assert (Unit.size.required, Unit.size.magic, Unit.size.secret, Unit.size.repeated) == (True, True, False, False)
    assert Unit.size.help == "Size of the disk."
    assert Unit.passphrase.secret


@pytest.mark.parametrize(
    ("parameter", "key", "metavar"),
    [
        (Unit.size, "size", "SIZE"),
        (Unit.cache_mode, "cache-mode", "CHOICE"),
        (Unit.class_, "class", "STRING"),
        (Unit.renamed, "other-name", "YESNO"),
        (Unit.passphrase, "passphrase", "PASSWORD"),
        (Unit.number, "number", "INTEGER"),
        (Unit.text, "text", "VALUE"),
        (Unit.rule, "rule", "_ONLY_ONE"),
        (Unit.file, "FILE", "PATH"),
    ],
)
def test_key_and_metavar_follow_attribute_and_parser(parameter: Parameter[object], key: str, metavar: str) -> None:
    assert (parameter.key, parameter.metavar) == (key, metavar)


def test_value_is_the_default_until_set() -> None:
    unit = Unit()

    assert unit.cache_mode == "default"
    assert unit.label is None
    assert unit.rule == ()
    assert not Unit.cache_mode.is_set(unit)


def test_later_value_replaces_the_earlier_one() -> None:
    unit, other = Unit(), Unit()

    Unit.size.accept(unit, "1k")
    Unit.size.accept(unit, "2k")

    assert unit.size == 2048
    assert Unit.size.is_set(unit)
    assert not Unit.size.is_set(other)


def test_value_equal_to_the_default_counts_as_set() -> None:
    unit = Unit()

    Unit.number.accept(unit, "3")

    assert Unit.number.is_set(unit)


def test_repeated_values_are_kept_in_order_for_each_unit() -> None:
    unit, other = Unit(), Unit()

    for text in ("/a", "/b", "/a"):
        Unit.file.accept(unit, text)

    assert unit.file == ("/a", "/b", "/a")
    assert other.file == ()
    assert (Unit.file.repeated, Unit.file.required, Unit.file.magic) == (True, True, True)


def test_refused_value_keeps_those_before() -> None:
    unit = Unit()
    Unit.rule.accept(unit, "1")

    with pytest.raises(ConfigError, match=r'^unit: rule must be 1, not "2"$'):
        Unit.rule.accept(unit, "2")

    assert unit.rule == (1,)


def test_message_names_unit_key_and_what_was_given() -> None:
    with pytest.raises(ConfigError) as caught:
        Unit.renamed.accept(Unit(), "maybe")

    assert str(caught.value) == 'unit: other-name must be true or false (1, yes, on; 0, no, off), not "maybe"'


@pytest.mark.parametrize(
    ("given_text", "shown"),
    [
        ("a\nb", '"a\\nb"'),
        ("\x1b[31m", '"\\x1b[31m"'),
        ("a\u202eb", '"a\\u202eb"'),
        ("\udcff", '"\\udcff"'),
        ("é", '"é"'),
        ("x" * 80, '"' + "x" * 80 + '"'),
        ("x" * 5000, '"' + "x" * 80 + '…"'),
    ],
)
def test_message_shows_nothing_that_a_terminal_would_act_on(given_text: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Unit.refused.accept(Unit(), given_text)

    assert str(caught.value) == f"unit: refused must be something else, not {shown}"


def test_P4_message_never_shows_a_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        Unit.secret.accept(Unit(), "hunter2")

    assert str(caught.value) == "unit: secret must be something else, not what was given"
    assert caught.value.__suppress_context__


def test_P4_message_never_shows_a_password_given_in_a_wrong_form() -> None:
    with pytest.raises(ConfigError) as caught:
        Unit.passphrase.accept(Unit(), "-hunter2")

    assert "hunter2" not in str(caught.value)
    assert str(caught.value).startswith("unit: passphrase must be a password, +FILE, -FD or - (")


def test_parser_may_raise_config_error_in_its_own_words() -> None:
    with pytest.raises(ConfigError, match=r"^unit: in its own words$"):
        Unit.own_words.accept(Unit(), "x")


def test_parsing_a_password_file_leaves_no_descriptor_open(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret\n")
    unit = Unit()
    before = os.listdir("/proc/self/fd")

    Unit.passphrase.accept(unit, f"+{path}")

    assert unit.passphrase == "secret"
    assert os.listdir("/proc/self/fd") == before


# --- values that are set later ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "texts", "value"),
    [
        (Unit.number, ["4"], 4),
        (Unit.number, ["4", "5"], 5),
        (Unit.number, [], 3),
        (Unit.label, [], None),
        (Unit.rule, ["1", "1"], (1, 1)),
        (Unit.rule, [], ()),
    ],
)
def test_texts_can_be_read_without_setting_anything(
    parameter: Parameter[object], texts: list[str], value: object
) -> None:
    unit = Unit()

    assert parameter.read(unit, texts) == value
    assert vars(unit) == {}


def test_reading_does_not_add_to_what_was_given_before() -> None:
    unit = Unit()
    Unit.rule.accept(unit, "1")

    assert Unit.rule.read(unit, ["1"]) == (1,)
    assert unit.rule == (1,)


@pytest.mark.parametrize(
    ("parameter", "texts", "message"),
    [
        (Unit.number, ["1", "x"], 'unit: number must be an integer from 0 to 9, not "x"'),
        (Unit.size, [], "unit: size=SIZE is missing: Size of the disk."),
        (Unit.file, [], "unit: FILE=PATH is missing"),
    ],
)
def test_reading_refuses_what_is_wrong_or_missing(parameter: Parameter[object], texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parameter.read(Unit(), texts)

    assert str(caught.value) == message


def test_a_parameter_is_live_only_if_it_says_so() -> None:
    assert Parameter(parse_size, live=True).live
    assert Repeated(parse_size, live=True).live
    assert not any(parameter.live for parameter in (Unit.size, Unit.number, Unit.rule))


# --- any text at all ---

#: What the values of parameters are written with, and what may be taken for it.
LIKE_VALUES = st.text(st.sampled_from("0123456789abfxX+-.:/%eEsmunkgμµ \t\n٣²½\0\udc80,"), max_size=25)


@pytest.mark.parametrize(
    "parse",
    [
        parse_string,
        parse_size,
        parse_bool,
        parse_delay,
        parse_probability,
        parse_path,
        parse_filename,
        signed_64,
        unsigned_64,
        integer(1, 5),
        choice("none", "default"),
    ],
)
@fuzz(50)
@given(text=LIKE_VALUES | st.text(max_size=25) | st.just(MANY_DIGITS))
def test_any_text_is_a_value_or_a_configuration_error_of_one_line(parse: Callable[[str], object], text: str) -> None:
    class Unit:
        name = "unit"
        key = Parameter(parse)

    _, message = attempted(lambda: Unit.key.accept(Unit(), text), ConfigError)

    assert not message or message.startswith("unit: key must be ")

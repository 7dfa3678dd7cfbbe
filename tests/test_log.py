"""Where messages go, and what they look like there."""

from __future__ import annotations

import io
import logging
import re
import syslog
from pathlib import Path

import pytest

from nbdkitpy import ConfigError, log

ROOT = logging.getLogger("nbdkitpy")
UNIT = logging.getLogger("nbdkitpy.memory")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def raised() -> ZeroDivisionError:
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError as error:
        return error


def test_errors_go_to_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        ROOT.error("one")
        UNIT.warning("two %d", 2)

    assert capsys.readouterr().err == "nbdkitpy: error: one\nnbdkitpy: memory: warning: two 2\n"


def test_name_of_the_server_is_in_each_message(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup("stderr", name="disk1"):
        UNIT.critical("bad")

    assert capsys.readouterr().err == "nbdkitpy[disk1]: memory: error: bad\n"


def test_debug_messages_are_shown_only_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        ROOT.debug("unseen")
        ROOT.info("unseen")
        assert not UNIT.isEnabledFor(logging.DEBUG)
    with log.setup(verbose=True):
        UNIT.debug("seen")
        UNIT.info("and this")

    assert capsys.readouterr().err == "nbdkitpy: memory: debug: seen\nnbdkitpy: memory: and this\n"


def test_what_is_for_the_terminal_is_shown_whatever_the_sink(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup("null"):
        ROOT.info("listening", extra=log.TERMINAL)
        ROOT.error("cannot start", extra=log.TERMINAL)
        ROOT.error("unseen")

    assert capsys.readouterr().err == "nbdkitpy: listening\nnbdkitpy: error: cannot start\n"


def test_file_gets_errors_with_the_time_and_no_debugging(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with log.setup(str(path), verbose=True):
        ROOT.debug("debugging")
        ROOT.error("trouble \udcff")

    before, line = path.read_text().splitlines()
    assert before == "before"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} nbdkitpy: error: trouble \\udcff", line)
    assert capsys.readouterr().err == "nbdkitpy: debug: debugging\n"


def test_file_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"--log: cannot open .*/none/log: No such file or directory"),
        log.setup(f"{tmp_path}/none/log"),
    ):
        pytest.fail("it was opened")


def test_system_log_gets_errors_without_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(syslog, "openlog", lambda *args: calls.append(("open", *args)))
    monkeypatch.setattr(syslog, "syslog", lambda *args: calls.append(args))
    monkeypatch.setattr(syslog, "closelog", lambda: calls.append(("close",)))

    with log.setup("syslog", name="n"):
        UNIT.error("trouble")
        ROOT.warning("worry\0")
        ROOT.info("unseen")

    assert calls == [
        ("open", "nbdkitpy[n]", syslog.LOG_PID, syslog.LOG_DAEMON),
        (syslog.LOG_ERR, "memory: trouble"),
        (syslog.LOG_WARNING, "worry\\x00"),
        ("close",),
    ]


def test_traceback_is_for_the_verbose_only(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        UNIT.error("pread", exc_info=raised())
    assert capsys.readouterr().err == "nbdkitpy: memory: error: pread\n"

    with log.setup("null", verbose=True):
        UNIT.error("pread", exc_info=raised())
    assert "Traceback" in capsys.readouterr().err


def test_message_stays_on_one_line_and_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        ROOT.error("name %s", "a\nnbdkitpy: error: forged\x1b[2J\x9b é")

    assert capsys.readouterr().err == "nbdkitpy: error: name a\\nnbdkitpy: error: forged\\x1b[2J\\x9b é\n"


def test_errors_are_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    with log.setup():
        ROOT.error("red")
        ROOT.warning("plain")

    assert terminal.getvalue() == "\033[1;31mnbdkitpy: error: red\033[0m\nnbdkitpy: warning: plain\n"


def test_everything_is_put_back_at_the_end() -> None:
    before = list(ROOT.handlers), ROOT.level, ROOT.propagate

    with log.setup("null", verbose=True):
        assert not ROOT.propagate

    assert (list(ROOT.handlers), ROOT.level, ROOT.propagate) == before


@pytest.mark.parametrize("sink", ["stderr", "syslog", "null", "default", "/var/log/x"])
def test_sinks(sink: str) -> None:
    assert log.check_sink(sink) == sink


@pytest.mark.parametrize("sink", ["", "file", "relative/path", "/nul\0"])
def test_what_is_no_sink_is_refused(sink: str) -> None:
    with pytest.raises(ValueError, match="one of stderr, syslog, null, default or an absolute path"):
        log.check_sink(sink)

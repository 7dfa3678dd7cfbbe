"""Where messages go, and what they look like there."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import syslog
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy import ConfigError, log
from tests.environment import NBDKITPY, without_coverage

ROOT = logging.getLogger("nbdkitpy")
UNIT = logging.getLogger("nbdkitpy.memory")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Nasty:
    def __str__(self) -> str:
        raise RuntimeError("no")


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


@pytest.fixture
def system_log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The calls of the C library's functions."""
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(syslog, "openlog", lambda *args: calls.append(("open", *args)))
    monkeypatch.setattr(syslog, "syslog", lambda *args: calls.append(args))
    monkeypatch.setattr(syslog, "closelog", lambda: calls.append(("close",)))
    return calls


def test_system_log_gets_errors_without_the_word(system_log: list[tuple[object, ...]]) -> None:
    with log.setup("syslog", name="n"):
        UNIT.error("trouble")
        ROOT.warning("worry\0")
        ROOT.log(log.NOTICE, "reloaded")
        ROOT.info("unseen")

    assert system_log == [
        ("open", "nbdkitpy[n]", syslog.LOG_PID, syslog.LOG_DAEMON),
        (syslog.LOG_ERR, "memory: trouble"),
        (syslog.LOG_WARNING, "worry\\x00"),
        (syslog.LOG_NOTICE, "reloaded"),
        ("close",),
    ]


def test_system_log_gets_no_debugging_and_no_traceback(
    system_log: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    with log.setup("syslog", verbose=True):
        ROOT.debug("looking")
        ROOT.error("pread", exc_info=raised())

    assert system_log[1:-1] == [(syslog.LOG_ERR, "pread")]
    assert "looking" in capsys.readouterr().err


def test_name_cannot_break_the_tag_of_the_system_log(system_log: list[tuple[object, ...]]) -> None:
    with log.setup("syslog", name="a\n\0b"):
        pass

    assert system_log[0][1] == "nbdkitpy[a\\n\\x00b]"


def test_default_in_the_background_is_the_system_log_beside_the_terminal_that_we_leave(
    system_log: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    with log.setup(background=True):
        ROOT.error("trouble")

    assert (syslog.LOG_ERR, "trouble") in system_log
    assert capsys.readouterr().err == "nbdkitpy: error: trouble\n"


@pytest.mark.parametrize("sink", ["stderr", "null"])
def test_other_sinks_are_the_same_in_the_background(sink: str, system_log: list[tuple[object, ...]]) -> None:
    with log.setup(sink, background=True):
        ROOT.error("trouble")

    assert system_log == []


def test_notice_is_shown_where_errors_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        ROOT.log(log.NOTICE, "reloaded")
    with log.setup(f"{tmp_path}/log"):
        ROOT.log(log.NOTICE, "reloaded again")

    assert capsys.readouterr().err == "nbdkitpy: reloaded\n"
    assert (tmp_path / "log").read_text().endswith(" nbdkitpy: reloaded again\n")


def test_traceback_is_for_the_verbose_only(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        UNIT.error("pread", exc_info=raised())
    assert capsys.readouterr().err == "nbdkitpy: memory: error: pread\n"

    with log.setup("null", verbose=True):
        UNIT.error("pread", exc_info=raised())
    assert "Traceback" in capsys.readouterr().err


def test_F5_traceback_cannot_look_like_other_messages(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup(verbose=True):
        UNIT.error("pread", exc_info=ValueError("a name\nnbdkitpy: error: forged\x1b[2J"))

    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "nbdkitpy: memory: error: pread"
    assert rest == [
        "nbdkitpy: memory: debug: ValueError: a name",
        "nbdkitpy: memory: debug: nbdkitpy: error: forged\\x1b[2J",
    ]


# --- the file ---


def test_file_that_was_moved_away_is_made_anew_on_request(tmp_path: Path) -> None:
    path, old = tmp_path / "log", tmp_path / "log.1"
    with log.setup(str(path)):
        ROOT.error("one")
        path.rename(old)
        ROOT.error("two")
        assert log.reopen() == [f"log file {path} reopened"]
        ROOT.error("three")

    assert [line.rpartition(": ")[2] for line in old.read_text().splitlines()] == ["one", "two"]
    assert [line.rpartition(": ")[2] for line in path.read_text().splitlines()] == ["three"]


def test_file_stays_in_use_if_it_cannot_be_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with log.setup(str(path)):
        path.rename(tmp_path / "log.1")
        path.mkdir()
        with pytest.raises(ConfigError, match=r"--log: cannot open .*/log: Is a directory"):
            log.reopen()
        ROOT.error("still heard")

    assert "still heard" in (tmp_path / "log.1").read_text()


def test_nothing_is_reopened_where_there_is_no_file() -> None:
    assert log.reopen() == []
    with log.setup():
        assert log.reopen() == []


def test_file_is_not_for_everybody_and_not_for_our_children(tmp_path: Path) -> None:
    path = tmp_path / "log"

    def inherited() -> list[str]:
        return [fd for fd in os.listdir("/proc/self/fd") if leads_to(fd) == str(path) and os.get_inheritable(int(fd))]

    def leads_to(fd: str) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # of the listing itself
            return ""

    with log.setup(str(path)):
        log.reopen()
        assert path.stat().st_mode & 0o7777 == 0o640
        assert inherited() == []


def test_full_disk_is_no_reason_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup("/dev/full"):
        ROOT.error("nowhere")

    assert capsys.readouterr().err == ""


def test_closed_standard_error_is_no_reason_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w", buffering=1)
    monkeypatch.setattr("sys.stderr", stream)

    with log.setup():
        ROOT.error("nowhere")

    with pytest.raises(BrokenPipeError):  # what it would not let go of
        stream.close()


def test_thread_that_writes_after_the_end_harms_no_other_file(tmp_path: Path) -> None:
    with log.setup(f"{tmp_path}/log"):
        (file,) = [handler for handler in ROOT.handlers if handler.level == log.NOTICE]
    before = (tmp_path / "log").read_text()

    file.handle(logging.makeLogRecord({"name": "nbdkitpy", "msg": "late", "levelno": logging.ERROR}))
    file.close()

    assert (tmp_path / "log").read_text() == before == ""


def test_unit_with_an_odd_argument_is_not_harmed_by_logging(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup(format="json"):
        UNIT.error("a", extra={"client": Nasty()})
        UNIT.error("b")

    assert json.loads(capsys.readouterr().err)["message"] == "b"


# --- the journal ---


@contextlib.contextmanager
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_another: bool = False) -> Iterator[Path]:
    """A file that standard error leads to, and that is what $JOURNAL_STREAM says unless it is another."""
    path = tmp_path / "journal"
    with path.open("w", encoding="utf-8") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + is_another}")
        yield path


def test_journal_is_told_the_priority_of_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with journal(tmp_path, monkeypatch) as path, log.setup(verbose=True):
        ROOT.critical("a")
        UNIT.error("b", exc_info=ZeroDivisionError("c\n<0>d"))
        ROOT.warning("e")
        ROOT.log(log.NOTICE, "f")
        ROOT.info("g")
        ROOT.debug("h")

    assert path.read_text().splitlines() == [
        "<3>nbdkitpy: error: a",
        "<3>nbdkitpy: memory: error: b",
        "<7>nbdkitpy: memory: debug: ZeroDivisionError: c",
        "<7>nbdkitpy: memory: debug: <0>d",
        "<4>nbdkitpy: warning: e",
        "<5>nbdkitpy: f",
        "<6>nbdkitpy: g",
        "<7>nbdkitpy: debug: h",
    ]


def test_journal_is_told_priorities_of_json_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with journal(tmp_path, monkeypatch) as path, log.setup(format="json"):
        ROOT.error("a")

    assert re.fullmatch(r'<3>\{"time": .*\}\n', path.read_text())


def test_stream_that_was_redirected_since_is_not_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with journal(tmp_path, monkeypatch, is_another=True) as path, log.setup():
        ROOT.error("a")

    assert path.read_text() == "nbdkitpy: error: a\n"


# --- JSON ---


def test_json_has_an_object_on_each_line(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup(name="disk1", format="json"):
        UNIT.error("a %s", "b\nc\u2028\udcff é")
        ROOT.warning("")

    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "error",
        "name": "disk1",
        "unit": "memory",
        "message": "a b\\nc\\u2028\\udcff é",
    }
    assert second.keys() == {"time", "level", "name", "message"}
    assert (second["level"], second["message"]) == ("warning", "")


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (logging.DEBUG, "debug"),
        (logging.INFO, "info"),
        (log.NOTICE, "notice"),
        (logging.WARNING, "warning"),
        (logging.ERROR, "error"),
        (logging.CRITICAL, "error"),
    ],
)
def test_levels_in_json(number: int, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup(format="json", verbose=True):
        ROOT.log(number, "a")

    assert json.loads(capsys.readouterr().err)["level"] == word


def test_time_in_json_is_universal(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.makeLogRecord({"name": "nbdkitpy", "levelno": logging.ERROR, "msg": "a"})
    record.created, record.msecs = 951786061.25, 250.0
    with log.setup(format="json"):
        ROOT.handle(record)

    assert json.loads(capsys.readouterr().err)["time"] == "2000-02-29T01:01:01.250Z"


def in_thread(name: str, function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function, name=name)
    thread.start()
    thread.join(30)


@pytest.mark.parametrize("name", ["memory[7]", "memory[7].12", "a[1][7]"])
def test_json_names_the_connection_that_a_thread_serves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup(format="json"):
        in_thread(name, lambda: UNIT.error("a"))

    assert json.loads(capsys.readouterr().err)["connection"] == 7


def test_json_names_connection_and_client_of_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup(format="json"):
        ROOT.error("a", extra={"connection": 3, "client": "127.0.0.1:5\x1b"})
        in_thread("memory[x]", lambda: ROOT.error("b"))

    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["connection"], first["client"]) == (3, "127.0.0.1:5\\x1b")
    assert second.keys() == {"time", "level", "message"}


def test_json_has_the_traceback_in_the_same_line_for_the_verbose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    with log.setup(str(path), format="json"):
        UNIT.error("a", exc_info=raised())
    with log.setup(str(path), format="json", verbose=True):
        UNIT.error("b", exc_info=raised())

    quiet, verbose = map(json.loads, path.read_text().splitlines())
    assert "traceback" not in quiet
    assert verbose["traceback"].startswith("Traceback (most recent call last):\n")
    assert json.loads(capsys.readouterr().err) == verbose


def test_json_goes_to_the_system_log_as_well(system_log: list[tuple[object, ...]]) -> None:
    with log.setup("syslog", format="json"):
        UNIT.error("a")

    priority, text = system_log[1]
    assert priority == syslog.LOG_ERR
    assert json.loads(str(text))["unit"] == "memory"


def test_json_is_not_red_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)

    with log.setup(format="json"):
        ROOT.error("a")

    assert json.loads(terminal.getvalue())["message"] == "a"


def test_text_does_not_pay_for_json() -> None:
    code = "import sys\nfrom nbdkitpy import log\nwith log.setup(): print('json' in sys.modules)"

    env = without_coverage()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)

    assert done.stdout == "False\n"


# --- what is in the messages ---


def test_message_that_cannot_be_made_is_shown_as_far_as_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with log.setup():
        UNIT.error("size %d", "big\n")
        UNIT.error("size %s", Nasty())

    assert capsys.readouterr().err.splitlines() == [
        "nbdkitpy: memory: error: size %d (the rest of this message cannot be shown: TypeError)",
        "nbdkitpy: memory: error: size %s (the rest of this message cannot be shown: RuntimeError)",
    ]


def test_F5_message_stays_on_one_line_and_has_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
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


# --- before there is a log ---


@pytest.mark.parametrize(("journal", "prefix"), [(False, ""), (True, "<3>")])
def test_complaint_is_one_line_with_a_priority_for_the_journal_only(
    journal: bool, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stderr"
    with path.open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}" if journal else "1:1")
        monkeypatch.setattr("sys.stderr", stream)

        log.complain("wrong\n<0>forged")

    assert path.read_text() == f"{prefix}nbdkitpy: error: wrong\\n<0>forged\n"


@pytest.mark.parametrize(("words", "status"), [(["--no-such-option"], 2), (["no-such-plugin"], 1), (["--version"], 0)])
def test_mistakes_in_the_command_line_are_errors_of_the_journal(words: list[str], status: int, tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    with path.open("w") as stream:
        inode = os.fstat(stream.fileno())
        env = {**os.environ, "JOURNAL_STREAM": f"{inode.st_dev}:{inode.st_ino}"}
        done = subprocess.run([*NBDKITPY, *words], stderr=stream, stdout=subprocess.DEVNULL, env=env)

    lines = path.read_text().splitlines()
    assert done.returncode == status
    assert [line[:19] for line in lines] == ["<3>nbdkitpy: error:"] * bool(status)

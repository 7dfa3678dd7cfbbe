"""Where messages go: errors to a sink of the user's choice, debugging to standard error and nowhere else.

Units and the server log to ``nbdkitpy`` and its children ``nbdkitpy.NAME``. Nothing is set up before :func:`setup`.
A record with the extra attribute ``terminal`` is for whoever started us and goes to standard error in any case; one of
level :data:`NOTICE` is no error, but an operator will look for it where the errors are. The extra attributes
``connection`` (its number) and ``client`` say in JSON what a message is about.

Whatever comes from outside may be in a message. So each line that we write begins with what we put there, and has no
control characters: a client's text can neither look like a line of ours nor act on a terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import syslog
import time
from collections.abc import Iterator
from typing import NamedTuple, TextIO

from nbdkitpy.exceptions import ConfigError

__all__ = ["FORMATS", "NOTICE", "SINKS", "TERMINAL", "check_sink", "complain", "is_journal", "reopen", "setup"]

#: Sinks that have a name; any other is the absolute path of a file.
SINKS = ("stderr", "syslog", "null", "default")

#: How messages are written: for people, or as a JSON object on each line.
FORMATS = ("text", "json")

#: ``extra`` of records for whoever started us.
TERMINAL = {"terminal": True}

#: The level of what is no error but belongs among them, such as the outcome of a reload.
NOTICE = 25

_ROOT = "nbdkitpy"
_RED, _PLAIN = "\033[1;31m", "\033[0m"

#: What the log may hold is nobody's business but its owner's and his group's.
_FILE_MODE = 0o640

#: Threads that serve a client are named after the connection, as in ``memory[3]``; its workers are ``memory[3].0`` …
_CONNECTION = r"\[(\d+)\](\.\d+)?$"


class _Level(NamedTuple):
    least: int
    word: str
    priority: int
    spoken: bool  #: the word is part of the text


_LEVELS = (
    _Level(logging.ERROR, "error", syslog.LOG_ERR, True),
    _Level(logging.WARNING, "warning", syslog.LOG_WARNING, True),
    _Level(NOTICE, "notice", syslog.LOG_NOTICE, False),
    _Level(logging.INFO, "info", syslog.LOG_INFO, False),
    _Level(logging.NOTSET, "debug", syslog.LOG_DEBUG, True),
)


def check_sink(text: str) -> str:
    """Return `text` if it is a sink.

    Raises:
        ValueError: it is not.
    """
    if text not in SINKS and not (os.path.isabs(text) and "\0" not in text):
        raise ValueError(f"one of {', '.join(SINKS)} or an absolute path")
    return text


@contextlib.contextmanager
def setup(
    sink: str = "default", *, name: str = "", verbose: bool = False, format: str = "text", background: bool = False
) -> Iterator[None]:
    """Set up the logging of the whole process, and undo it at the end.

    Args:
        sink: Where notices, warnings and errors go: one of :data:`SINKS`, or the path of a file to append to.
        name: Of this server, to be shown in each message.
        verbose: Show debugging, and tracebacks, on standard error.
        format: One of :data:`FORMATS`.
        background: We shall go there. Then the default sink is the system log, and until standard error is gone,
            that as well.

    Raises:
        ConfigError: the file cannot be opened.
    """
    _one_line("\n")  # has Python load the codec while it can: -u may become a user who cannot read its library
    logger = logging.getLogger(_ROOT)
    before = logger.handlers, logger.level, logger.propagate
    journal = is_journal(sys.stderr)
    styles = _Styles(name, format == "json", verbose)
    here = _StderrHandler(sys.stderr, sink in ("stderr", "default"), verbose)
    here.setFormatter(styles.make(journal=journal, red=sys.stderr.isatty()))
    handlers = [here, *_sink_handlers(sink, styles, background)]
    logger.handlers, logger.propagate = handlers, False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        for handler in handlers:
            handler.close()


def reopen() -> list[str]:
    """Open the log file anew, if there is one, since it may have been moved away; return what was done, for people.

    Raises:
        ConfigError: it cannot be opened. The one that is open stays in use.
    """
    files = [handler for handler in logging.getLogger(_ROOT).handlers if isinstance(handler, _FileHandler)]
    for file in files:
        file.reopen()
    return [f"log file {file.path} reopened" for file in files]


def is_journal(stream: TextIO) -> bool:
    """Tell whether `stream` is connected to the journal, which takes priorities at the beginning of lines."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # it is no real file
        return False
    # The variable alone says nothing: the stream may have been redirected since.
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def complain(text: str) -> None:
    """Write an error on standard error before there is a log, with its priority where that is the journal."""
    priority = "<3>" if is_journal(sys.stderr) else ""
    print(f"{priority}nbdkitpy: error: {_one_line(text)}", file=sys.stderr, flush=True)


# --- handlers ---


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # A full disk, a closed terminal, an odd argument: what cannot be logged is no reason to end anything.
        with contextlib.suppress(Exception):
            self.write(self.format(record), record.levelno)

    def write(self, text: str, level: int) -> None:
        raise NotImplementedError


class _StderrHandler(_Handler):
    """Standard error; `is_sink` if errors go there too."""

    def __init__(self, stream: TextIO, is_sink: bool, verbose: bool) -> None:
        super().__init__()
        self._stream = stream
        self._is_sink = is_sink
        self._verbose = verbose

    def filter(self, record: logging.LogRecord) -> bool:
        for_sink = record.levelno >= NOTICE
        return (
            getattr(record, "terminal", False)
            or (self._is_sink and for_sink)
            or (self._verbose and (not for_sink or bool(record.exc_info)))
        )

    def write(self, text: str, level: int) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()


class _FileHandler(_Handler):
    def __init__(self, path: str) -> None:
        super().__init__(NOTICE)
        self.path = path
        self._fd = self._opened()

    def _opened(self) -> int:
        try:
            return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC, _FILE_MODE)
        except OSError as error:
            raise ConfigError(f"--log: cannot open {self.path}: {error.strerror}") from error

    def reopen(self) -> None:
        new = self._opened()
        os.dup2(new, self._fd, inheritable=False)  # in one step, so that no message is lost
        os.close(new)

    def write(self, text: str, level: int) -> None:
        os.write(self._fd, f"{text}\n".encode())  # one call, so that others may append to the same file

    def close(self) -> None:
        self.acquire()  # another thread may be writing, and must not find another file behind the number
        try:
            fd, self._fd = self._fd, -1
        finally:
            self.release()
        if fd >= 0:
            os.close(fd)
        super().close()


class _SyslogHandler(_Handler):
    """The system log, by the C library: the standard library's own handler drags in sockets and pickles."""

    def __init__(self, ident: str) -> None:
        super().__init__(NOTICE)
        syslog.openlog(ident, syslog.LOG_PID, syslog.LOG_DAEMON)

    def write(self, text: str, level: int) -> None:
        syslog.syslog(_level(level).priority, text)

    def close(self) -> None:
        syslog.closelog()
        super().close()


def _sink_handlers(sink: str, styles: _Styles, background: bool) -> list[logging.Handler]:
    """Handlers beside standard error's."""
    handler: logging.Handler
    if sink == "syslog" or (sink == "default" and background):
        handler = _SyslogHandler(styles.prefix)
        handler.setFormatter(styles.make(bare=True))
    elif os.path.isabs(sink):
        handler = _FileHandler(sink)
        handler.setFormatter(styles.make(times=True))
    else:
        return []
    return [handler]


# --- formats ---


class _Styles:
    """What the formatters of one process have in common."""

    def __init__(self, name: str, json: bool, verbose: bool) -> None:
        self.prefix = _one_line(f"{_ROOT}[{name}]" if name else _ROOT)
        self._name = name
        self._json = json
        self._verbose = verbose

    def make(
        self, *, bare: bool = False, times: bool = False, red: bool = False, journal: bool = False
    ) -> logging.Formatter:
        """Return a formatter.

        Args:
            bare: Leave out what the system log says itself.
            times: Say when it was.
            red: Show errors in red.
            journal: Begin lines with their priority.
        """
        formatter: _Formatter
        if self._json:
            formatter = _JsonFormatter(self._name)
        else:
            formatter = _TextFormatter("" if bare else f"{self.prefix}: ", levels=not bare, times=times, red=red)
        formatter.journal = journal
        # A traceback is for debugging, and that goes to standard error alone; in JSON it adds no lines.
        formatter.tracebacks = self._verbose and (self._json or not (bare or times))
        return formatter


class _Formatter(logging.Formatter):
    """Writes each record as one line, tracebacks perhaps as further ones."""

    journal = False
    tracebacks = False

    def format(self, record: logging.LogRecord) -> str:
        lines = self.lines(record)
        if self.journal:
            lines = ((level, f"<{_level(level).priority}>{text}") for level, text in lines)
        return "\n".join(text for _, text in lines)

    def lines(self, record: logging.LogRecord) -> Iterator[tuple[int, str]]:
        """Yield the level and the text of each line."""
        raise NotImplementedError

    def traceback(self, record: logging.LogRecord) -> list[str]:
        """The traceback that belongs to `record`, if there is one that is to be shown."""
        if not (self.tracebacks and record.exc_info):
            return []
        return [_one_line(line) for line in self.formatException(record.exc_info).split("\n")]


class _TextFormatter(_Formatter):
    """``nbdkitpy[NAME]: UNIT: error: text``."""

    def __init__(self, prefix: str, *, levels: bool, times: bool, red: bool) -> None:
        super().__init__()
        self._prefix = prefix
        self._levels = levels
        self._times = times
        self._red = red

    def lines(self, record: logging.LogRecord) -> Iterator[tuple[int, str]]:
        yield record.levelno, self._line(record, record.levelno, _message(record))
        for text in self.traceback(record):
            yield logging.DEBUG, self._line(record, logging.DEBUG, text)

    def _line(self, record: logging.LogRecord, number: int, text: str) -> str:
        level, unit = _level(number), _unit(record)
        word = f"{level.word}: " if self._levels and level.spoken else ""
        line = f"{self._prefix}{unit}{': ' if unit else ''}{word}{text}"
        if self._times:
            line = f"{self.formatTime(record)} {line}"
        return f"{_RED}{line}{_PLAIN}" if self._red and number >= logging.ERROR else line


class _JsonFormatter(_Formatter):
    """An object for each record; what is not known is left out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import json  # a few milliseconds of the start that only this format is worth

        self._encode = json.JSONEncoder(ensure_ascii=False).encode
        self._name = _one_line(name)

    def lines(self, record: logging.LogRecord) -> Iterator[tuple[int, str]]:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": _level(record.levelno).word,
            "name": self._name,
            "unit": _unit(record),
            "connection": _connection(record),
            "client": _one_line(str(getattr(record, "client", ""))),
            "message": _message(record),
            "traceback": "\n".join(self.traceback(record)),
        }
        yield record.levelno, self._encode({key: value for key, value in fields.items() if value or key == "message"})


def _level(number: int) -> _Level:
    return next(level for level in _LEVELS if number >= level.least)


def _unit(record: logging.LogRecord) -> str:
    return _one_line(record.name.partition(".")[2])


def _connection(record: logging.LogRecord) -> int | None:
    """The number of the connection in whose service the record was made, if that is known."""
    number = getattr(record, "connection", None)
    if isinstance(number, int):
        return number
    match = re.search(_CONNECTION, record.threadName or "")
    return int(match[1]) if match else None


def _message(record: logging.LogRecord) -> str:
    try:
        return _one_line(record.getMessage())
    except Exception as error:  # a unit's arguments may be anything
        return _one_line(f"{record.msg} (the rest of this message cannot be shown: {type(error).__name__})")


def _one_line(text: str) -> str:
    # No new line, no control sequence of a terminal, nothing that turns the direction of writing.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

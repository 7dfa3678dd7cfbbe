"""Where messages go: errors to a sink of the user's choice, debugging to standard error and nowhere else.

Units and the server log to ``nbdkitpy`` and its children ``nbdkitpy.NAME``. Nothing is set up before :func:`setup`.
A record with the extra attribute ``terminal`` is for whoever started us and goes to standard error in any case.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import syslog
from collections.abc import Iterator

from nbdkitpy.exceptions import ConfigError

__all__ = ["SINKS", "TERMINAL", "check_sink", "setup"]

#: Sinks that have a name; any other is the absolute path of a file.
SINKS = ("stderr", "syslog", "null", "default")

#: ``extra`` of records for whoever started us.
TERMINAL = {"terminal": True}

_ROOT = "nbdkitpy"
_RED, _PLAIN = "\033[1;31m", "\033[0m"
_LEVEL_WORDS = {logging.DEBUG: "debug: ", logging.INFO: "", logging.WARNING: "warning: "}


def check_sink(text: str) -> str:
    """Return `text` if it is a sink.

    Raises:
        ValueError: it is not.
    """
    if text not in SINKS and not (os.path.isabs(text) and "\0" not in text):
        raise ValueError(f"one of {', '.join(SINKS)} or an absolute path")
    return text


@contextlib.contextmanager
def setup(sink: str = "default", *, name: str = "", verbose: bool = False) -> Iterator[None]:
    """Set up the logging of the whole process, and undo it at the end.

    Args:
        sink: Where warnings and errors go: one of :data:`SINKS`, or the path of a file to append to.
        name: Of this server, to be shown in each message.
        verbose: Show debugging, and tracebacks, on standard error.

    Raises:
        ConfigError: the file cannot be opened.
    """
    prefix = f"{_ROOT}[{name}]" if name else _ROOT
    logger = logging.getLogger(_ROOT)
    before = logger.handlers, logger.level, logger.propagate
    handlers = [_stderr_handler(prefix, sink, verbose), *_sink_handlers(prefix, sink)]
    logger.handlers, logger.propagate = handlers, False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        for handler in handlers:
            handler.close()


def _stderr_handler(prefix: str, sink: str, verbose: bool) -> logging.Handler:
    here = sink in ("stderr", "default")

    def wanted(record: logging.LogRecord) -> bool:
        is_error = record.levelno >= logging.WARNING
        return (
            getattr(record, "terminal", False)
            or (here and is_error)
            or (verbose and (not is_error or bool(record.exc_info)))
        )

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(wanted)
    handler.setFormatter(_Formatter(prefix, red=sys.stderr.isatty(), tracebacks=verbose))
    return handler


def _sink_handlers(prefix: str, sink: str) -> list[logging.Handler]:
    """Handlers beside standard error's."""
    handler: logging.Handler
    if sink == "syslog":
        handler = _SyslogHandler(prefix)
        handler.setFormatter(_Formatter("", levels=False))
    elif os.path.isabs(sink):
        try:
            handler = logging.FileHandler(sink, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"--log: cannot open {sink}: {error.strerror}") from error
        handler.setFormatter(_Formatter(prefix, times=True))
    else:
        return []
    handler.setLevel(logging.WARNING)
    return [handler]


class _Formatter(logging.Formatter):
    """``nbdkitpy[NAME]: UNIT: error: text``, on one line whatever the text is."""

    def __init__(
        self, prefix: str, *, levels: bool = True, times: bool = False, red: bool = False, tracebacks: bool = False
    ) -> None:
        super().__init__()
        self._prefix = f"{prefix}: " if prefix else ""
        self._levels = levels
        self._times = times
        self._red = red
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        unit = record.name.partition(".")[2]
        level = _LEVEL_WORDS.get(record.levelno, "error: ") if self._levels else ""
        text = _one_line(f"{self._prefix}{unit}{': ' if unit else ''}{level}{record.getMessage()}")
        if self._times:
            text = f"{self.formatTime(record)} {text}"
        if self._red and record.levelno >= logging.ERROR:
            text = f"{_RED}{text}{_PLAIN}"
        if self._tracebacks and record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return text


def _one_line(text: str) -> str:
    # Whatever comes from outside may be in a message: no new line, no control sequence of a terminal.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _SyslogHandler(logging.Handler):
    """The system log, by the C library: the standard library's own handler drags in sockets and pickles."""

    def __init__(self, ident: str) -> None:
        super().__init__()
        syslog.openlog(ident, syslog.LOG_PID, syslog.LOG_DAEMON)

    def emit(self, record: logging.LogRecord) -> None:
        priority = syslog.LOG_ERR if record.levelno >= logging.ERROR else syslog.LOG_WARNING
        syslog.syslog(priority, self.format(record))

    def close(self) -> None:
        syslog.closelog()
        super().close()

"""A script: how it is loaded, and how its callbacks are called."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from nbdkitpy import ConfigError

from .api import Api, Caller
from .callbacks import CALLBACKS, LATEST_API, NOT_NBDKITS, REQUIRED, definition, mismatch

__all__ = ["Script", "ScriptError", "parse_script", "surroundings"]

_logger = logging.getLogger("nbdkitpy.python")

#: Under this name a script runs, as all do that are run and not imported.
_MAIN = "__main__"

#: The exceptions of these modules are subclasses of OSError, but their number is no errno.
_OTHER_NUMBERS = frozenset({"ssl", "socket"})


class ScriptError(Exception):
    """A callback failed, and said nothing that a client should be told."""


def parse_script(text: str) -> str:
    """Return the absolute path of a script, which must be there.

    Raises:
        ValueError: it is not, or cannot be one.
    """
    path = os.path.abspath(text) if text and "\0" not in text else ""
    if not os.path.exists(path):
        raise ValueError("the path of a Python script (there is no such file)")
    if os.path.isdir(path):
        raise ValueError("the path of a Python script (this is a directory)")
    return path


@contextlib.contextmanager
def surroundings(path: str, main: ModuleType, api: ModuleType) -> Iterator[None]:
    """Give the script of `path` what a script finds around it, for as long as it lives.

    That is its own module as ``__main__``, nbdkit's, no arguments, and the modules of its directory. They come last:
    what lies in that directory shall not take the place of a module that the server has not imported yet.
    """
    directory = os.path.dirname(os.path.realpath(path))
    modules = {name: sys.modules.get(name) for name in (_MAIN, "nbdkit")}
    arguments = sys.argv
    sys.modules.update({_MAIN: main, "nbdkit": api})
    sys.argv = [""]
    sys.path.append(directory)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(directory)
        sys.argv = arguments
        for name, module in modules.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class Script:
    """A script that has been run, and what it defines.

    Args:
        path: Absolute, of the file.
        module: In which it is run.

    Raises:
        ConfigError: it cannot be run, or lacks what it must have; the text says where.
    """

    def __init__(self, path: str, module: ModuleType) -> None:
        self.path = path
        self.name = os.path.basename(path)
        #: What it defines at the time; each callback is looked up for each call.
        self.callbacks = vars(module)
        self._warned: set[str] = set()
        self._ignored: set[str] = set()
        self._run()
        self.version = self._version()
        self._check()

    def _run(self) -> None:
        self.callbacks["__file__"] = self.path
        try:
            with open(self.path, "rb") as stream:
                source = stream.read()
            # The user's own file, named on the command line.
            exec(compile(source, self.path, "exec", dont_inherit=True), self.callbacks)  # noqa: S102
        except (Exception, SystemExit) as error:
            raise self._config_error(error) from error

    def _version(self) -> int:
        version = self.callbacks.get("API_VERSION", 1)
        if not isinstance(version, int) or not 1 <= version <= LATEST_API:
            raise ConfigError(f"python: {self.path}: API_VERSION must be 1 or {LATEST_API}, not {version!r}")
        return version

    def _check(self) -> None:
        for name in CALLBACKS:
            self._check_callback(name, self.callbacks.get(name))
        missing = [name for name in REQUIRED if not self.has(name)]
        if missing:
            lacks = " and no ".join(missing)
            raise ConfigError(f"python: {self.path} must define {', '.join(REQUIRED)}; it has no {lacks}")

    def _check_callback(self, name: str, value: object) -> None:
        if value is None:
            return
        if not callable(value):
            _logger.debug("%s: %s is not callable, and so no callback", self.path, name)
            return
        wrong = mismatch(name, value, self.version)
        if wrong is None:
            return
        place = definition(value, self.path)
        if place is not None and name not in NOT_NBDKITS:
            raise ConfigError(f"python: {place}: {wrong}")
        # As in `from functools import cache`.
        self._ignored.add(name)
        _logger.warning("%s: %s is taken to be something else than the callback: %s", self.path, name, wrong)

    def has(self, name: str) -> bool:
        """Tell whether there is a callback of this name."""
        return name not in self._ignored and callable(self.callbacks.get(name))

    # --- calls ---

    def call(self, name: str, *args: object, caller: Caller | None = None) -> Any:
        """Call a callback on behalf of `caller`.

        Raises:
            OSError: it failed, and said which errno the client is to be told.
            ScriptError: it failed, and said nothing of that.
        """
        calls = Api.calls
        calls.caller = caller
        calls.error = 0
        try:
            return self.callbacks[name](*args)
        except Exception as error:
            raise self.failure(error) from error

    def configure(self, name: str, *args: object) -> Any:
        """Call a callback, if there is one, in the life of the server.

        Raises:
            ConfigError: it failed; the text says where and why.
        """
        if not self.has(name):
            return None
        Api.calls.caller = None
        try:
            return self.callbacks[name](*args)
        except (Exception, SystemExit) as error:
            raise self._config_error(error, f"{name}: ") from error

    def failure(self, error: Exception) -> OSError | ScriptError:
        """Return what the server is told of an exception in a callback that the present thread has called.

        The errno is that of set_error, or else the exception's own if it is an OSError.
        """
        number = Api.calls.error or _number(error)
        if number:
            text = error.strerror if isinstance(error, OSError) and error.strerror else _text(error)
            return OSError(number, text)
        return ScriptError(f"{self._place(self.name, error)}: {_text(error)}")

    def _config_error(self, error: BaseException, what: str = "") -> ConfigError:
        _logger.debug("%s: %sfailed", self.path, what, exc_info=error)
        if isinstance(error, OSError) and error.filename == self.path:
            return ConfigError(f"python: {self.path} cannot be read: {error.strerror}")
        return ConfigError(f"python: {self._place(self.path, error)}: {what}{_text(error)}")

    def _place(self, path: str, error: BaseException) -> str:
        """The line of the script that an exception passed last, after what the script is called."""
        if isinstance(error, SyntaxError):
            return f"{error.filename}:{error.lineno}" if error.lineno else path
        frames = reversed([*traceback.walk_tb(error.__traceback__)])
        line = next((line for frame, line in frames if frame.f_code.co_filename == self.path), None)
        return f"{path}:{line}" if line else path

    def warn_once(self, name: str, message: str) -> None:
        """Log what is odd about a callback, the first time."""
        if name not in self._warned:
            self._warned.add(name)
            _logger.warning("%s: %s", self.path, message)


def _number(error: Exception) -> int:
    """The errno of an exception, 0 if it is none of the system's."""
    if not isinstance(error, OSError):
        return 0
    if type(error).__module__ in _OTHER_NUMBERS or error.errno is None or error.errno not in errno.errorcode:
        return errno.EIO
    return error.errno


def _text(error: BaseException) -> str:
    return traceback.format_exception_only(type(error), error)[-1].strip()

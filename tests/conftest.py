"""Fixtures that serve plugins within the process of the tests. Whatever they start has ended when the test has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from nbdkitpy import Filter, Plugin
from nbdkitpy.server.options import ServerOptions
from tests.certificates import Authority, make_directory
from tests.fuzzing import effort
from tests.serving import Disks, Running, Solo, join_others, unix_options

effort.register_profiles()


class StartServer(Protocol):
    """Serve a plugin behind filters on a Unix socket; `options` are fields of ServerOptions."""

    def __call__(self, plugin: Plugin | None = None, *filters: Filter, begin: bool = True, **options: Any) -> Running:
        """Return the server; it serves :class:`Disks` if no plugin is given."""


class StartSession(Protocol):
    """Serve a plugin behind filters to one client, by a session alone; `options` are fields of ServerOptions."""

    def __call__(self, plugin: Plugin | None = None, *filters: Filter, begin: bool = True, **options: Any) -> Solo:
        """Return the session; it serves :class:`Disks` if no plugin is given."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[effort.Tally.KEY] = effort.Tally()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in effort.report(config.stash[effort.Tally.KEY]):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> effort.Tally:
    """Counts what is tried, for the end of the run."""
    return pytestconfig.stash[effort.Tally.KEY]


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The certificate authority of :func:`certificates`."""
    return Authority(tmp_path_factory.mktemp("authority") / "ca")


@pytest.fixture(scope="session")
def certificates(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with certificates and keys of a server and of a client. Tests only read it."""
    return make_directory(authority, tmp_path_factory.mktemp("certificates") / "tls")


@pytest.fixture
def _no_thread_is_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    join_others(before)


@pytest.fixture
def start_server(tmp_path: Path, _no_thread_is_left: None) -> Iterator[StartServer]:
    """Start servers; at the end they are stopped, and no thread and no session is left."""
    servers: list[Running] = []
    ends = contextlib.ExitStack()

    def start(plugin: Plugin | None = None, *filters: Filter, begin: bool = True, **options: Any) -> Running:
        running = Running(plugin or Disks(), filters, unix_options(f"{tmp_path}/{len(servers)}", **options))
        servers.append(running)
        ends.callback(running.finish)
        return running.begin() if begin else running

    with ends:
        yield start
    assert not [session.name for server in servers for session in server.sessions()]


@pytest.fixture
def start_session(_no_thread_is_left: None) -> Iterator[StartSession]:
    """Start sessions on pairs of sockets; at the end they have ended."""
    ends = contextlib.ExitStack()

    def start(plugin: Plugin | None = None, *filters: Filter, begin: bool = True, **options: Any) -> Solo:
        solo = Solo(plugin or Disks(), filters, ServerOptions(**options))
        ends.callback(solo.finish)
        return solo.begin() if begin else solo

    with ends:
        yield start

"""The readonly filter: nothing is written, always or while a file exists."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError, Filter, FilterHandle, Handle
from nbdkitpy.stack import Capabilities
from nbdkitpy_filters.readonly import ReadOnly, register_filters
from tests.recording import Recorder, Recording, assert_bound_through, configured, opened, unfiltered

WRITES: list[Callable[[Handle], None]] = [
    lambda handle: handle.pwrite(memoryview(b"abc"), 1, 2),
    lambda handle: handle.trim(3, 1, 2),
    lambda handle: handle.zero(3, 1, 3),
]


# --- always ---------------------------------------------------------------------------------------------------------


def test_the_export_is_as_with_r() -> None:
    handle = Recorder()

    export = opened(ReadOnly(), handle)

    assert export.capabilities == unfiltered(handle, readonly=True).capabilities
    assert not export.capabilities.can_write


def test_requests_go_past_the_filter() -> None:
    handle = Recorder()

    assert_bound_through(opened(ReadOnly(), handle), handle)


def test_the_plugin_is_opened_for_reading_only() -> None:
    stack = configured([ReadOnly()], Recorder())
    assert isinstance(stack.plugin, Recording)

    stack.open("", False, Client(1))

    assert stack.plugin.opened_readonly is True


def test_a_filter_behind_it_that_would_write_does_not() -> None:
    class Overlay(Filter):
        name = "overlay"

        def wrap(self, handle: Handle, client: Client) -> Handle:
            return OverlayHandle(handle)

    class OverlayHandle(FilterHandle):
        def can_write(self) -> bool:
            return True

    stack = configured([ReadOnly(), Overlay()], Recorder())

    assert not stack.open("", False, Client(1)).capabilities.can_write


# --- while a file exists --------------------------------------------------------------------------------------------


@pytest.fixture
def switch(tmp_path: Path) -> Path:
    return tmp_path / "switch"


@pytest.mark.parametrize("exists", [False, True])
def test_a_client_is_told_what_the_plugin_can_do_whether_the_file_exists_or_not(switch: Path, exists: bool) -> None:
    handle = Recorder()
    if exists:
        switch.touch()

    export = opened(ReadOnly(), handle, f"readonly-file={switch}")

    assert export.capabilities == Capabilities.ask(handle)


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_possible_while_the_file_does_not_exist(switch: Path, write: Callable[[Handle], None]) -> None:
    direct, handle = Recorder(), Recorder()
    export = opened(ReadOnly(), handle, f"readonly-file={switch}")
    write(unfiltered(direct).handle)

    write(export.handle)

    assert handle.calls == direct.calls != []


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_refused_from_when_the_file_exists_until_it_does_not(
    switch: Path, write: Callable[[Handle], None]
) -> None:
    handle = Recorder()
    export = opened(ReadOnly(), handle, f"readonly-file={switch}")
    switch.touch()

    with pytest.raises(PermissionError) as caught:
        write(export.handle)

    assert caught.value.args == (errno.EPERM, f"readonly: the disk is read-only while {switch} exists")
    assert handle.calls == []
    switch.unlink()
    write(export.handle)
    assert handle.calls


def test_all_that_does_not_write_goes_past_the_filter(switch: Path) -> None:
    handle = Recorder()

    export = opened(ReadOnly(), handle, f"readonly-file={switch}")

    assert_bound_through(export, handle, "pwrite", "trim", "zero", "inline")
    assert export.handle.inline == {"pread", "flush", "cache", "extents"}


def test_a_path_below_what_is_no_directory_does_not_exist(switch: Path) -> None:
    switch.touch()
    handle = Recorder()

    WRITES[0](opened(ReadOnly(), handle, f"readonly-file={switch}/file").handle)

    assert handle.calls


def test_writing_is_refused_if_nobody_can_tell_whether_the_file_exists(switch: Path) -> None:
    switch.symlink_to(switch)

    with pytest.raises(PermissionError, match=f"readonly: {switch} cannot be looked for: Too many levels"):
        WRITES[0](opened(ReadOnly(), Recorder(), f"readonly-file={switch}").handle)


def test_a_link_to_nothing_does_not_exist(switch: Path) -> None:
    switch.symlink_to("nothing")
    handle = Recorder()

    WRITES[0](opened(ReadOnly(), handle, f"readonly-file={switch}").handle)

    assert handle.calls


def test_the_path_is_relative_to_where_the_server_was_started(
    tmp_path: Path, switch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export = opened(ReadOnly(), Recorder(), "readonly-file=switch")
    os.chdir("/")
    switch.touch()

    with pytest.raises(PermissionError):
        WRITES[0](export.handle)


@pytest.mark.parametrize("readonly", [True, False])
def test_what_is_read_only_anyway_costs_nothing(switch: Path, readonly: bool) -> None:
    handle = Recorder() if readonly else Recorder(can_write=False)

    export = opened(ReadOnly(), handle, f"readonly-file={switch}", readonly=readonly)

    assert not export.capabilities.can_write
    assert_bound_through(export, handle)


def test_an_empty_path_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r'^readonly: readonly-file must be a path, not ""'):
        opened(ReadOnly(), Recorder(), "readonly-file=")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [ReadOnly]

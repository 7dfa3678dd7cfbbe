"""The offset filter: which range is served. How it is shifted is range_of's matter."""

from __future__ import annotations

import errno

import pytest

from nbdkitpy import ConfigError, Filter
from nbdkitpy_filters.offset import Offset, register_filters
from tests.recording import SIZE, Recorder, assert_bound_through, opened


@pytest.mark.parametrize(
    ("parameters", "size"),
    [
        ([], SIZE),
        (["offset=0"], SIZE),
        (["offset=1"], SIZE - 1),
        (["offset=1000"], 0),
        (["range=10"], 10),
        (["range=0"], 0),
        (["offset=100", "range=900"], 900),
        (["offset=100", "range=5"], 5),
        (["offset=1", "offset=2"], SIZE - 2),
    ],
)
def test_the_range_is_served(parameters: list[str], size: int) -> None:
    handle = Recorder()

    export = opened(Offset(), handle, *parameters)

    assert export.capabilities.size == size


def test_requests_are_shifted() -> None:
    handle = Recorder()

    opened(Offset(), handle, "offset=100", "range=5").handle.pread(3, 2)

    assert handle.calls == [("pread", 3, 102)]


@pytest.mark.parametrize("parameters", [[], ["range=1000"], ["range=10"]])
def test_a_range_from_0_costs_nothing(parameters: list[str]) -> None:
    handle = Recorder()

    assert_bound_through(opened(Offset(), handle, *parameters), handle)


def test_reads_keep_their_shortcuts_and_all_stays_inline() -> None:
    handle = Recorder()

    export = opened(Offset(), handle, "offset=100")

    assert export.handle.inline == handle.inline
    assert export.handle.sparse
    assert export.handle.pread_into is not None
    assert export.handle.file_range is not None
    assert export.handle.file_range(1, 2) == (7, 10_102)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (["offset=1001"], "offset: the range of 0 bytes at 1001 is not within the 1000 bytes of the disk"),
        (["range=1001"], "offset: the range of 1001 bytes at 0 is not within the 1000 bytes of the disk"),
        (["offset=1", "range=1000"], "offset: the range of 1000 bytes at 1 is not within the 1000 bytes of the disk"),
    ],
)
def test_a_range_outside_of_the_disk_is_refused_and_the_handle_closed(parameters: list[str], text: str) -> None:
    handle = Recorder()

    with pytest.raises(OSError) as caught:
        opened(Offset(), handle, *parameters)

    assert caught.value.args == (errno.EINVAL, text)
    assert handle.calls == [("close",)]


@pytest.mark.parametrize("parameter", ["offset=-1", "offset=x", "range=", "range=-1"])
def test_what_is_no_size_is_a_configuration_error(parameter: str) -> None:
    with pytest.raises(ConfigError, match=rf"^offset: {parameter.split('=')[0]} must be a size"):
        opened(Offset(), Recorder(), parameter)


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Offset]

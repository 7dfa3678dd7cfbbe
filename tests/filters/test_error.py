"""The error filter: as many requests fail as it is told, with the error that it is told."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import Client, ConfigError, Filter, Handle
from nbdkitpy.backend import VERBS
from nbdkitpy_filters.error import Error, register_filters
from tests.recorder import Recorder, configured, request

AFFECTED = ["pread", "pwrite", "trim", "zero", "extents", "cache"]


def opened(*words: str, chances: Iterator[float] | None = None) -> tuple[Handle, Recorder]:
    stack = configured(Error() if chances is None else Error(lambda: next(chances)), *words)
    assert isinstance(stack.plugin, Recorder)
    return stack.open("", False, Client(1)).handle, stack.plugin


def outcome(handle: Handle, verb: str) -> str:
    """The name of the error with which a request fails, or "" if it does not."""
    try:
        request(handle, verb)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return ""


def outcomes(handle: Handle) -> dict[str, str]:
    return {verb: name for verb in VERBS if (name := outcome(handle, verb))}


@pytest.mark.parametrize("verb", AFFECTED)
def test_rate_of_one_verb_leaves_the_others_alone(verb: str) -> None:
    handle, plugin = opened(f"error-{verb}-rate=100%")

    assert outcomes(handle) == {verb: "EIO"}
    assert [call[0] for call in plugin.requests] == [other for other in VERBS if other != verb]


def test_rate_of_all_is_that_of_all_but_flush() -> None:
    handle, plugin = opened("error-rate=1")

    assert outcomes(handle) == dict.fromkeys(AFFECTED, "EIO")
    assert plugin.requests == [("flush",)]


@pytest.mark.parametrize("name", ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "ESHUTDOWN"])
def test_error_is_the_one_that_was_asked_for(name: str) -> None:
    handle, _ = opened("error-rate=1:1", f"error={name}")

    assert outcomes(handle) == dict.fromkeys(AFFECTED, name)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["error=ENOSPC", "error-pwrite-rate=1", "error-zero-rate=1"], {"pwrite": "ENOSPC", "zero": "ENOSPC"}),
        (["error-rate=1", "error-pread=EPERM"], {**dict.fromkeys(AFFECTED, "EIO"), "pread": "EPERM"}),
        (["error-pread=EPERM", "error-rate=1", "error=EINVAL"], dict.fromkeys(AFFECTED, "EINVAL")),
        (["error-pread-rate=1", "error-rate=0"], {}),
        (["error-rate=1", "error-pread-rate=0"], dict.fromkeys(AFFECTED[1:], "EIO")),
    ],
)
def test_what_is_given_last_counts(words: list[str], expected: dict[str, str]) -> None:
    handle, _ = opened(*words)

    assert outcomes(handle) == expected


def test_requests_fail_at_the_rate_and_below_it() -> None:
    handle, _ = opened("error-rate=25%", chances=iter([0.0, 0.2499, 0.25, 0.999]))

    assert [outcome(handle, "pread") for _ in range(4)] == ["EIO", "EIO", "", ""]


def test_error_says_what_was_done() -> None:
    handle, _ = opened("error-rate=1", "error=ENOMEM")

    with pytest.raises(OSError, match=r"injecting ENOMEM error into trim$"):
        request(handle, "trim")


def test_about_as_many_requests_fail_as_the_rate_says() -> None:
    handle, _ = opened("error-rate=1:2")

    failed = sum(bool(outcome(handle, "cache")) for _ in range(1000))

    assert 300 < failed < 700  # outside of which it is once in 10**36 runs


def test_fails_only_while_the_file_exists(tmp_path: Path) -> None:
    general, special = tmp_path / "general", tmp_path / "special"
    handle, _ = opened("error-rate=1", f"error-file={general}", f"error-pread-file={special}")
    assert outcomes(handle) == {}

    special.touch()
    assert outcomes(handle) == {"pread": "EIO"}

    general.touch()
    special.unlink()
    assert outcomes(handle) == dict.fromkeys(AFFECTED[1:], "EIO")


def test_without_a_rate_everything_goes_past_the_filter() -> None:
    handle, _ = opened("error=ENOSPC")

    assert all(getattr(handle, verb).__self__ is not handle for verb in VERBS)
    assert handle.sparse


def test_failing_writes_leave_the_shortcuts_of_reads() -> None:
    handle, _ = opened("error-pwrite-rate=10%")

    assert handle.pread_into is not None
    assert handle.file_range is not None
    assert handle.sparse


def test_failing_reads_have_no_shortcuts() -> None:
    handle, _ = opened("error-pread-rate=10%")

    assert (handle.pread_into, handle.file_range, handle.sparse) == (None, None, False)


def test_failing_block_status_does_not_make_reads_fail() -> None:
    handle, _ = opened("error-extents-rate=10%")

    assert not handle.sparse


@pytest.mark.parametrize(
    "word", ["error-rate=2", "error-rate=200%", "error-pread-rate=-1", "error-rate=", "error=EPIPE", "error-zero=eio"]
)
def test_what_is_no_value_is_a_configuration_error(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^error: {word.partition('=')[0]} must be"):
        configured(Error(), word)


def test_unknown_parameters_are_for_other_layers() -> None:
    assert not Error().config("error-flush", "EIO")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Error]

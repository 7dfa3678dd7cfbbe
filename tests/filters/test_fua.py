"""The fua filter: what becomes of FUA and of flushes in each mode."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from nbdkitpy import Client, ConfigError, Filter, Flags, Handle, Support
from nbdkitpy.backend import VERBS
from nbdkitpy_filters.fua import Fua, register_filters
from tests.recording import Recorder, assert_bound_through, opened

FUA, MAY_TRIM = int(Flags.FUA), int(Flags.MAY_TRIM)

WRITES: dict[str, Callable[[Handle, int], None]] = {
    "pwrite": lambda handle, flags: handle.pwrite(memoryview(b"abc"), 1, flags),
    "trim": lambda handle, flags: handle.trim(3, 1, flags),
    "zero": lambda handle, flags: handle.zero(3, 1, flags),
}
#: Of the filter, what the plugin can do, and what is offered then: FUA and flush.
OFFERS = [
    ("none", Support.NATIVE, True, Support.NONE, True),
    ("none", Support.NONE, False, Support.NONE, False),
    ("emulate", Support.NATIVE, True, Support.EMULATE, True),
    ("emulate", Support.NONE, True, Support.EMULATE, True),
    ("native", Support.EMULATE, True, Support.NATIVE, True),
    ("native", Support.NATIVE, False, Support.NATIVE, False),
    ("force", Support.EMULATE, True, Support.NATIVE, True),
    ("force", Support.NATIVE, False, Support.NATIVE, True),
    ("pass", Support.EMULATE, True, Support.EMULATE, True),
    ("pass", Support.NONE, False, Support.NONE, False),
    ("discard", Support.NONE, False, Support.NATIVE, True),
    ("discard", Support.EMULATE, True, Support.NATIVE, True),
]


@pytest.mark.parametrize(("mode", "fua", "flush", "offered_fua", "offered_flush"), OFFERS)
def test_what_is_offered(mode: str, fua: Support, flush: bool, offered_fua: Support, offered_flush: bool) -> None:
    export = opened(Fua(), Recorder(can_fua=fua, can_flush=flush), f"fua-mode={mode}")

    assert (export.capabilities.can_fua, export.capabilities.can_flush) == (offered_fua, offered_flush)


@pytest.mark.parametrize("parameters", [[], ["fua-mode=none"], ["fuamode=native"], ["fuamode=pass"]])
def test_modes_that_change_no_request_cost_nothing(parameters: list[str]) -> None:
    handle = Recorder(can_fua=Support.NATIVE)

    assert_bound_through(opened(Fua(), handle, *parameters), handle)


@pytest.mark.parametrize(
    ("mode", "inline"),
    [
        ("emulate", set(VERBS)),
        ("discard", set(VERBS)),
        ("force", set(VERBS) - {"pwrite", "trim", "zero"}),  # each of them waits now
    ],
)
def test_reads_go_past_the_filter_in_all_modes(mode: str, inline: set[str]) -> None:
    handle = Recorder(can_fua=Support.NATIVE)

    export = opened(Fua(), handle, f"fua-mode={mode}")

    assert_bound_through(export, handle, "pwrite", "trim", "zero", "flush", "inline")
    assert export.handle.inline == inline


@pytest.mark.parametrize("verb", WRITES)
@pytest.mark.parametrize(
    ("mode", "fua", "passed"),
    [
        ("native", FUA, FUA),
        ("native", 0, 0),
        ("pass", FUA, FUA),
        ("force", FUA, FUA),
        ("force", 0, FUA),
        ("discard", FUA, 0),
        ("discard", 0, 0),
        ("emulate", 0, 0),
    ],
)
def test_fua_reaches_the_plugin_as_the_mode_says(verb: str, mode: str, fua: int, passed: int) -> None:
    handle = Recorder(can_fua=Support.NATIVE)
    other = MAY_TRIM if verb == "zero" else 0

    WRITES[verb](opened(Fua(), handle, f"fua-mode={mode}").handle, fua | other)

    assert [(call[0], call[-1]) for call in handle.calls] == [(verb, passed | other)]


@pytest.mark.parametrize("verb", WRITES)
def test_emulation_flushes_after_the_request(verb: str) -> None:
    handle = Recorder(can_fua=Support.NATIVE)

    WRITES[verb](opened(Fua(), handle, "fua-mode=emulate").handle, FUA)

    assert [(call[0], call[-1]) for call in handle.calls] == [(verb, 0), ("flush", "flush")]


@pytest.mark.parametrize("verb", WRITES)
def test_emulation_does_not_flush_after_a_failure(verb: str) -> None:
    handle = Recorder(can_fua=Support.NATIVE)
    handle.failure = OSError(errno.EIO, "disk is on fire")

    with pytest.raises(OSError, match="disk is on fire"):
        WRITES[verb](opened(Fua(), handle, "fua-mode=emulate").handle, FUA)

    assert [call[0] for call in handle.calls] == [verb]


@pytest.mark.parametrize("verb", WRITES)
def test_forcing_with_a_plugin_that_can_only_flush_flushes_after_every_write(verb: str) -> None:
    handle = Recorder(can_fua=Support.EMULATE)

    WRITES[verb](opened(Fua(), handle, "fua-mode=force").handle, 0)

    assert [call[0] for call in handle.calls] == [verb, "flush"]


@pytest.mark.parametrize(
    ("mode", "calls"),
    [
        ("none", ["flush"]),
        ("emulate", ["flush"]),
        ("native", ["flush"]),
        ("pass", ["flush"]),
        ("force", []),
        ("discard", []),
    ],
)
def test_flushes_reach_the_plugin_as_the_mode_says(mode: str, calls: list[str]) -> None:
    handle = Recorder()

    opened(Fua(), handle, f"fua-mode={mode}").handle.flush()

    assert [call[0] for call in handle.calls] == calls


@pytest.mark.parametrize(
    ("mode", "missing", "what"),
    [("emulate", "can_flush", "flush"), ("native", "can_fua", "do FUA"), ("force", "can_fua", "do FUA")],
)
def test_a_plugin_that_lacks_what_the_mode_needs_is_refused(mode: str, missing: str, what: str) -> None:
    handle = Recorder(**{missing: Support.NONE if missing == "can_fua" else False})

    with pytest.raises(OSError) as caught:
        opened(Fua(), handle, f"fua-mode={mode}")

    assert caught.value.args == (errno.EINVAL, f"fua: fua-mode={mode} needs what can {what} behind it")
    assert handle.calls == [("close",)]


@pytest.mark.parametrize("mode", ["none", "emulate", "native", "force", "pass", "discard"])
def test_what_is_read_only_costs_nothing(mode: str) -> None:
    handle = Recorder(can_fua=Support.NONE, can_flush=False)

    export = opened(Fua(), handle, f"fua-mode={mode}", readonly=True)

    assert_bound_through(export, handle)


# --- flush-on-close -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pass", "discard", "force"])
def test_S7_the_plugin_is_flushed_before_the_handle_is_closed(mode: str) -> None:
    handle = Recorder()

    opened(Fua(), handle, f"fua-mode={mode}", "flush-on-close=true").close()

    assert handle.calls == [("flush",), ("close",)]


def test_S7_it_is_not_flushed_unless_that_was_asked_for() -> None:
    handle = Recorder()

    opened(Fua(), handle, "fua-mode=pass").close()

    assert handle.calls == [("close",)]


def test_a_client_that_only_asks_flushes_nothing() -> None:
    handle = Recorder()

    opened(Fua(), handle, "flush-on-close=true", client=Client(1, is_probe=True)).close()

    assert handle.calls == [("close",)]


def test_the_handle_is_closed_if_the_flush_fails() -> None:
    handle = Recorder()
    handle.failure = OSError(errno.EIO, "disk is on fire")

    with pytest.raises(OSError, match="disk is on fire"):
        opened(Fua(), handle, "flush-on-close=true").close()

    assert handle.calls == [("flush",), ("close",)]


def test_a_handle_that_is_closed_twice_is_flushed_once() -> None:
    handle = Recorder()
    export = opened(Fua(), handle, "flush-on-close=true")

    export.handle.close()
    export.handle.close()

    assert handle.calls == [("flush",), ("close",), ("close",)]


def test_requests_go_past_it() -> None:
    handle = Recorder()

    assert_bound_through(opened(Fua(), handle, "fua-mode=pass", "flush-on-close=true"), handle)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_plugin_that_cannot_flush_is_refused(readonly: bool) -> None:
    handle = Recorder(can_flush=False)

    with pytest.raises(OSError, match="fua: flush-on-close=true needs what can flush behind it"):
        opened(Fua(), handle, "flush-on-close=true", readonly=readonly)

    assert handle.calls == [("close",)]


# --- odds and ends --------------------------------------------------------------------------------------------------


def test_other_modes_are_configuration_errors() -> None:
    with pytest.raises(ConfigError, match=r'^fua: fua-mode must be one of none, emulate, .*, not "x"'):
        opened(Fua(), Recorder(), "fuamode=x")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Fua]

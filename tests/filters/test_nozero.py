"""The nozero filter: each mode of zeroes with each mode of fast zeroes."""

from __future__ import annotations

import errno

import pytest

from nbdkitpy import BlockSize, ConfigError, Filter, Flags, Support
from nbdkitpy_filters.nozero import NoZero, register_filters
from tests.recording import Recorder, assert_bound_through, opened

FUA, MAY_TRIM, FAST_ZERO = int(Flags.FUA), int(Flags.MAY_TRIM), int(Flags.FAST_ZERO)
ALL = FUA | MAY_TRIM | FAST_ZERO
MIB = 1 << 20


@pytest.mark.parametrize("fast_mode", ["default", "none", "slow", "ignore"])
@pytest.mark.parametrize(
    ("mode", "support", "fast"),
    [
        ("none", Support.NONE, None),
        ("emulate", Support.EMULATE, True),
        ("notrim", Support.NATIVE, None),
        ("plugin", Support.NATIVE, None),
    ],
)
@pytest.mark.parametrize("plugin_is_fast", [True, False])
def test_what_is_offered(mode: str, support: Support, fast: bool | None, fast_mode: str, plugin_is_fast: bool) -> None:
    handle = Recorder(can_fast_zero=plugin_is_fast)
    by_default = plugin_is_fast if fast is None else fast

    export = opened(NoZero(), handle, f"zero-mode={mode}", f"fast-zero-mode={fast_mode}")

    assert export.capabilities.can_zero is support
    offered = {"default": by_default, "none": False, "slow": True, "ignore": True}[fast_mode]
    assert export.capabilities.can_fast_zero is (offered and mode != "none")


def test_the_default_is_that_zeroes_are_not_offered() -> None:
    assert opened(NoZero(), Recorder()).capabilities.can_zero is Support.NONE


@pytest.mark.parametrize(
    "parameters",
    [[], ["zero-mode=none", "fast-zero-mode=slow"], ["zeromode=plugin"], ["zeromode=plugin", "fastzeromode=none"]],
)
def test_requests_go_past_the_filter_where_zeroes_are_not_changed(parameters: list[str]) -> None:
    handle = Recorder()

    assert_bound_through(opened(NoZero(), handle, *parameters), handle)


@pytest.mark.parametrize("mode", ["zero-mode=emulate", "zero-mode=notrim"])
def test_all_but_zero_goes_past_the_filter(mode: str) -> None:
    handle = Recorder()

    assert_bound_through(opened(NoZero(), handle, mode), handle, "zero", "inline")


@pytest.mark.parametrize(
    ("parameters", "passed"),
    [
        (["zero-mode=plugin"], ALL),
        (["zero-mode=notrim"], FUA | FAST_ZERO),
        (["zero-mode=plugin", "fast-zero-mode=ignore"], FUA | MAY_TRIM),
        (["zero-mode=notrim", "fast-zero-mode=ignore"], FUA),
    ],
)
def test_flags_of_zeroes_are_passed_on_but_for_those_that_the_mode_takes_away(
    parameters: list[str], passed: int
) -> None:
    handle = Recorder(can_fast_zero=True, can_fua=Support.NATIVE)

    opened(NoZero(), handle, *parameters).handle.zero(10, 20, ALL)

    assert handle.calls == [("zero", 10, 20, passed)]


@pytest.mark.parametrize(
    "parameters",
    [
        ["zero-mode=emulate"],
        ["zero-mode=emulate", "fast-zero-mode=slow"],
        ["zero-mode=plugin", "fast-zero-mode=slow"],
        ["zero-mode=notrim", "fast-zero-mode=slow"],
    ],
)
def test_fast_zeroes_are_refused_at_once_and_others_done(parameters: list[str]) -> None:
    handle = Recorder(can_fast_zero=True)
    export = opened(NoZero(), handle, *parameters)

    with pytest.raises(OSError) as caught:
        export.handle.zero(10, 20, FAST_ZERO | MAY_TRIM)

    assert caught.value.args == (errno.ENOTSUP, "nozero: fast zeroes are refused")
    assert handle.calls == []
    export.handle.zero(10, 20, 0)
    assert len(handle.calls) == 1


def test_zeroes_are_written_in_pieces() -> None:
    handle = Recorder(get_size=10 * MIB)

    opened(NoZero(), handle, "zero-mode=emulate").handle.zero(2 * MIB + 3, 5, MAY_TRIM)

    assert [(len(data), offset, flags) for _, data, offset, flags in handle.calls] == [
        (MIB, 5, 0),
        (MIB, MIB + 5, 0),
        (3, 2 * MIB + 5, 0),
    ]
    assert not any(data.strip(b"\0") for _, data, _, _ in handle.calls)


def test_the_pieces_are_not_larger_than_the_largest_block() -> None:
    handle = Recorder(get_size=MIB, block_size=BlockSize(512, 4096, 8192))

    opened(NoZero(), handle, "zero-mode=emulate").handle.zero(20_480, 0, 0)

    assert [len(data) for _, data, _, _ in handle.calls] == [8192, 8192, 4096]


def test_native_fua_goes_with_every_piece() -> None:
    handle = Recorder(get_size=10 * MIB, can_fua=Support.NATIVE)

    opened(NoZero(), handle, "zero-mode=emulate").handle.zero(2 * MIB + 1, 0, FUA)

    assert [call[3] for call in handle.calls] == [FUA] * 3


def test_fua_that_is_a_flush_is_done_once() -> None:
    handle = Recorder(get_size=10 * MIB, can_fua=Support.EMULATE)

    opened(NoZero(), handle, "zero-mode=emulate").handle.zero(2 * MIB, 0, FUA)

    assert [call[0] for call in handle.calls] == ["pwrite", "pwrite", "flush"]
    assert [call[3] for call in handle.calls[:2]] == [0, 0]


def test_fast_zeroes_that_are_ignored_are_written_as_others() -> None:
    handle = Recorder()

    opened(NoZero(), handle, "zero-mode=emulate", "fast-zero-mode=ignore").handle.zero(3, 5, FAST_ZERO)

    assert handle.calls == [("pwrite", bytes(3), 5, 0)]


@pytest.mark.parametrize("mode", ["notrim", "plugin"])
def test_a_plugin_without_zeroes_is_refused(mode: str) -> None:
    handle = Recorder(can_zero=Support.NONE)

    with pytest.raises(OSError, match=f"nozero: zero-mode={mode} needs what can write zeroes behind it"):
        opened(NoZero(), handle, f"zero-mode={mode}")

    assert handle.calls == [("close",)]


@pytest.mark.parametrize("mode", ["none", "emulate", "notrim", "plugin"])
def test_what_is_read_only_costs_nothing(mode: str) -> None:
    handle = Recorder()

    export = opened(NoZero(), handle, f"zero-mode={mode}", readonly=True)

    assert_bound_through(export, handle)
    assert export.capabilities.can_zero is Support.NONE


@pytest.mark.parametrize(("key", "words"), [("zero-mode", "none, emulate"), ("fast-zero-mode", "default, none")])
def test_other_modes_are_configuration_errors(key: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^nozero: {key} must be one of {words}"):
        opened(NoZero(), Recorder(), f"{key.replace('-', '')}=x")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [NoZero]

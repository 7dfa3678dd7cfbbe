"""The noparallel filter: the thread model is the one that was asked for, or a stricter one of the plugin."""

from __future__ import annotations

import pytest

from nbdkitpy import ConfigError, Filter, ThreadModel
from nbdkitpy_filters.noparallel import NoParallel, register_filters
from tests.recording import Recorder, assert_bound_through, configured, opened


@pytest.mark.parametrize(
    ("parameters", "model"),
    [
        ([], ThreadModel.SERIALIZE_REQUESTS),
        (["serialize=requests"], ThreadModel.SERIALIZE_REQUESTS),
        (["serialize=all-requests"], ThreadModel.SERIALIZE_ALL_REQUESTS),
        (["serialize=connections"], ThreadModel.SERIALIZE_CONNECTIONS),
    ],
)
def test_the_stack_has_the_model(parameters: list[str], model: ThreadModel) -> None:
    assert configured([NoParallel()], Recorder(), *parameters).model is model


def test_a_stricter_layer_wins() -> None:
    class Stricter(Filter):
        name = "stricter"

        def thread_model(self) -> ThreadModel:
            return ThreadModel.SERIALIZE_CONNECTIONS

    assert configured([NoParallel(), Stricter()], Recorder()).model is ThreadModel.SERIALIZE_CONNECTIONS


@pytest.mark.parametrize(("mode", "multi_conn"), [("requests", True), ("all-requests", True), ("connections", False)])
def test_multi_conn_is_offered_unless_there_is_one_connection_at_a_time(mode: str, multi_conn: bool) -> None:
    export = opened(NoParallel(), Recorder(can_multi_conn=True), f"serialize={mode}")

    assert export.capabilities.can_multi_conn is multi_conn
    export.close()


@pytest.mark.parametrize("mode", ["requests", "all-requests", "connections"])
def test_requests_go_past_the_filter(mode: str) -> None:
    handle = Recorder()

    assert_bound_through(opened(NoParallel(), handle, f"serialize={mode}"), handle)


@pytest.mark.parametrize("mode", ["", "all", "REQUESTS", "parallel"])
def test_other_modes_are_configuration_errors(mode: str) -> None:
    with pytest.raises(ConfigError, match=r"^noparallel: serialize must be one of requests, all-requests, connections"):
        configured([NoParallel()], Recorder(), f"serialize={mode}")


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [NoParallel]

"""No plugin or filter has been forgotten."""

from __future__ import annotations

from nbdkitpy.registry import Kind, Registry
from nbdkitpy.testing import FilterConformance, PluginConformance
from tests.conformance import test_filters, test_plugins


def in_tree(kind: Kind) -> set[str]:
    return {offer.name for offer in Registry().names(kind) if offer.distribution == "nbdkitpy"}


def test_every_plugin_has_a_suite() -> None:
    suites = [suite for suite in PluginConformance.__subclasses__() if suite.__module__ == test_plugins.__name__]

    assert {suite.plugin for suite in suites} == in_tree(Kind.PLUGIN)


def test_every_filter_has_a_suite() -> None:
    suites = [suite for suite in FilterConformance.__subclasses__() if suite.__module__ == test_filters.__name__]

    assert {suite.filter for suite in suites} == in_tree(Kind.FILTER)

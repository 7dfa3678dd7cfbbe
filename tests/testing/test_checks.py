"""How a suite is declared, and what it says of what it cannot test."""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from nbdkitpy import Client, Handle, Plugin
from nbdkitpy.testing import PluginConformance, TransmissionFlag
from nbdkitpy.testing.area import Area
from nbdkitpy.testing.checks import Conformance, at_once
from tests.serving import Disks


class Small(PluginConformance):
    """Of a disk that cannot be written."""

    plugin = Disks


def test_a_check_that_is_exempt_is_skipped_with_the_reason() -> None:
    class Suite(Small):
        exempt = {"test_all_of_it_can_be_read": "there is too much of it"}

    with pytest.raises(pytest.skip.Exception, match="there is too much of it"):
        Suite().test_all_of_it_can_be_read()


@pytest.mark.parametrize(
    ("exempt", "text"),
    [
        ({"test_all_of_it_can_be_raed": "why"}, "'test_all_of_it_can_be_raed', which is none of the checks"),
        ({"serving": "why"}, "'serving', which is none of the checks"),
        ({"test_all_of_it_can_be_read": ""}, "has to say why test_all_of_it_can_be_read is not made"),
    ],
)
def test_what_is_exempt_has_to_be_a_check_and_to_have_a_reason(exempt: Mapping[str, str], text: str) -> None:
    with pytest.raises(TypeError, match=f"Suite: exempt .*{text}"):
        type("Suite", (Small,), {"exempt": exempt})


def test_what_is_served_has_to_be_said() -> None:
    with pytest.raises(NotImplementedError):
        Conformance().layers()


def test_an_empty_export_cannot_be_tested() -> None:
    class Suite(PluginConformance):
        plugin = "null"

    with pytest.raises(AssertionError, match="the export is too small to be tested"):
        Suite().test_all_of_it_can_be_read()


def test_an_export_that_does_not_keep_data_is_not_held_to_them() -> None:
    class Suite(PluginConformance):
        plugin = "null"
        parameters = {"size": "1M"}

    with pytest.raises(AssertionError, match=r"at [0-9]+ is 0x00"):
        Suite().test_what_is_written_is_read_back()

    Suite.keeps_data = False
    Suite().test_what_is_written_is_read_back()


def test_an_export_of_another_name_is_opened() -> None:
    names = []

    class Named(Plugin):
        name = "named"

        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            names.append(export_name)
            return Disks().open(export_name, readonly, client)

    class Suite(PluginConformance):
        plugin = Named
        export_name = "other"

    Suite().test_it_can_be_opened_again_and_again()

    assert set(names) == {"other"}


def test_functions_at_once_raise_what_one_of_them_raises() -> None:
    both = threading.Barrier(2)

    def fail() -> None:
        both.wait(20)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        at_once(fail, lambda: both.wait(20))


class Server:
    """In place of a client, and of the server behind it: offers nothing, and answers to CACHE what the test says."""

    flags = TransmissionFlag(0)

    def __init__(self, error: OSError | None) -> None:
        self.error = error

    def cache(self, count: int, offset: int) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (None, "cache is not offered, and works"),
        (OSError(errno.EIO, "what?"), "cache is not offered, and fails: .*what?"),
    ],
)
def test_what_is_not_offered_has_to_be_refused(error: OSError | None, text: str) -> None:
    area: Any = object.__new__(Area)
    area.client = Server(error)

    with pytest.raises(AssertionError, match=text):
        area.cache(512, 0)

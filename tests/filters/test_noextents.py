"""The noextents filter: holes are not told, and everything else is as before."""

from __future__ import annotations

from nbdkitpy import Filter
from nbdkitpy_filters.noextents import NoExtents, register_filters
from tests.conftest import StartServer
from tests.nbdclient import Style
from tests.recording import Recorder, assert_bound_through, opened, unfiltered
from tests.serving import CONTENT, SIZE, Disk, Disks


def test_extents_are_the_only_capability_that_is_lost() -> None:
    without = unfiltered(Recorder()).capabilities

    export = opened(NoExtents(), Recorder())

    assert without.can_extents
    assert export.capabilities == without._replace(can_extents=False)


def test_requests_go_past_the_filter() -> None:
    handle = Recorder()

    assert_bound_through(opened(NoExtents(), handle), handle)


def test_reads_do_not_ask_for_holes(start_server: StartServer) -> None:
    class Sparse(Disk):
        sparse = True

        def extents(self, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
            raise AssertionError("nobody asks")

    client = start_server(Disks(Sparse), NoExtents()).connect(Style.STRUCTURED)

    assert client.read(0, SIZE) == CONTENT


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [NoExtents]

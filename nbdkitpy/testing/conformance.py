"""The suites that authors subclass: one for plugins, one for filters."""

from __future__ import annotations

import contextlib
import errno
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from nbdkitpy.backend import VERBS, BlockSize, Filter, Plugin, ThreadModel
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.library import EmbeddedServer, FilterLayer
from nbdkitpy.protocol.constants import Command, CommandFlag
from nbdkitpy.testing.area import Area
from nbdkitpy.testing.checks import Conformance, at_once
from nbdkitpy.testing.client import export_info
from nbdkitpy.testing.disk import CAPABILITIES, Disk
from nbdkitpy.testing.wire import Refused

__all__ = ["KINDS", "FilterConformance", "PluginConformance"]


class PluginConformance(Conformance):
    """What every plugin has to pass; tests whose names begin with ``test_``, for pytest.

    ::

        class TestMyPlugin(PluginConformance):
            plugin = MyPlugin
            parameters = {"size": "1M"}
    """

    #: The plugin, or the name under which it is installed. Each check serves it anew.
    plugin: str | type[Plugin]

    def layers(self) -> tuple[str | type[Plugin] | Plugin, Sequence[FilterLayer]]:
        return self.plugin, ()


#: Kinds of next layers that a filter may have, each as the arguments by which it is made.
KINDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "complete": {},
        "read-only": {"can": ()},
        "plain": {"can": ("write",)},
        "without-flags": {"can": CAPABILITIES - {"fua", "fast_zero"}},
        "large-blocks": {"block_size": BlockSize(4096, 4096, 64 << 10)},
        "shortcuts": {"shortcuts": True},
        "serialize-all-requests": {"model": ThreadModel.SERIALIZE_ALL_REQUESTS},
        "serialize-requests": {"model": ThreadModel.SERIALIZE_REQUESTS},
        "serialize-connections": {"model": ThreadModel.SERIALIZE_CONNECTIONS},
    }
)

#: Errors that reach clients under their own number.
_ERRORS = (errno.EPERM, errno.EIO, errno.ENOMEM, errno.ENOSPC, errno.EINVAL)


class FilterConformance(Conformance):
    """What every filter has to pass, before a disk in memory that watches how it is used.

    ::

        class TestMyFilter(FilterConformance):
            filter = MyFilter
            parameters = {"depth": 4}
    """

    #: The filter, or the name under which it is installed. Each check serves it anew.
    filter: str | type[Filter]

    #: Whether what is written through the filter can be found in the next layer after a flush.
    passes_writes: bool = True

    #: Kinds of next layers that the filter refuses, of :data:`KINDS`, and what it says then, or a part of that.
    unfit: Mapping[str, str] = MappingProxyType({})

    def content(self) -> bytes:
        """Return what the disk reads as at first: 1 MiB, some of it zeroes."""
        half = random.Random(10809).randbytes(512 << 10)
        return half[: 256 << 10] + bytes(512 << 10) + half[256 << 10 :]

    def layers(self) -> tuple[str | type[Plugin] | Plugin, Sequence[FilterLayer]]:
        return self.disk(), [self.filter]

    def disk(self, **kind: Any) -> Disk:
        """Return the next layer."""
        self.next = Disk(self.content(), **kind)
        return self.next

    @contextlib.contextmanager
    def served(
        self,
        plugin: str | type[Plugin] | Plugin,
        filters: Sequence[FilterLayer],
        *,
        alone: bool = False,
        **options: Any,
    ) -> Iterator[EmbeddedServer]:
        with super().served(plugin, filters, alone=alone, **options) as server:
            yield server
        self.check_next()

    def check_next(self) -> None:
        """See that nothing has been done against the contract of the next layer, and nothing of it is open."""
        disk = self.next
        assert not disk.mistakes, f"the next layer is not used as it may be: {disk.mistakes[0]}"
        assert disk.opened == disk.closed, f"of {disk.opened} handles of the next layer {disk.closed} are closed"

    # --- what a filter does to the next layer ---

    def test_the_next_layer_is_asked_only_for_what_it_can_do(self) -> None:
        """Ranges, blocks, flags and verbs are such as it takes, and no more calls are under way than it allows."""
        for kind in KINDS:
            self._check_use(kind)
        self._check_use("complete", readonly=True)

    def _check_use(self, kind: str, *, readonly: bool = False) -> None:
        """Have this kind of disk used, or refused if the filter says so of itself."""
        refusal = self.unfit.get(kind)
        try:
            self._use(kind, readonly=readonly)
        except (Refused, ConfigError) as error:
            assert refusal is not None, f"a next layer that is {kind} is refused: {error}"
            assert refusal in str(error), f"a next layer that is {kind} is refused by: {error}"
        else:
            assert refusal is None, f"a next layer that is {kind} is not refused"

    def _use(self, kind: str, *, readonly: bool) -> None:
        """Have clients do all that they can to this kind of disk."""
        disk, alone = self.disk(**KINDS[kind]), self.ends_with_last_client and kind == "serialize-connections"
        with self.served(disk, [self.filter], alone=alone, readonly=readonly) as server:
            at_once(*[functools.partial(self._do_all, server)] * (1 if alone else 2))

    def _do_all(self, server: EmbeddedServer) -> None:
        """Do all that a client can do."""
        with self.connect(server) as client:
            area = Area(client, keeps_data=False)  # as there is another one
            for count, offset in area.ranges(6):
                for flags in (0, CommandFlag.FUA):
                    area.write(area.data(count), offset, flags)
                    area.zero(count, offset, flags | CommandFlag.NO_HOLE)
                    area.zero(count, offset, flags | CommandFlag.FAST_ZERO)
                    area.trim(count, offset, flags)
                area.cache(count, offset)
            area.flush()
            area.check_extents([(area.size, 0)])
            client.pread(area.largest, area.end - area.largest)
            reads = [client.submit(Command.READ, offset, count) for count, offset in area.pieces(4)]
            for cookie in reads:
                client.result(cookie)

    def test_shortcuts_of_the_next_layer_read_the_same(self) -> None:
        """Where reads can be had by ``pread_into``, ``file_range`` or ``sparse``, they are what ``pread`` returns."""
        found = []
        for shortcuts in (False, True):
            with self.served(self.disk(shortcuts=shortcuts), [self.filter]) as server, self.connect(server) as client:
                area = self.area(client)
                ranges = [*area.ranges(12), (area.largest, area.end - area.largest)]
                found.append([client.pread(count, offset) for count, offset in ranges])

        is_same = found[0] == found[1]  # not in the assertion: pytest would work on that for minutes
        assert is_same, "what is read by shortcuts is not what pread returns"

    def test_every_handle_of_the_next_layer_is_closed_once(self) -> None:
        """Also those of clients that only ask, that vanish, or that are still there at the end."""
        with contextlib.ExitStack() as clients, self.serving() as server:
            export_info(server, self.export_name, tls=self.tls)
            self.connect(server).close()
            vanishing = self.connect(server)
            vanishing.submit(Command.READ, 0, vanishing.info.block_size.minimum)
            vanishing.abort()
            clients.callback(self.connect(server).abort)

        self.check_next()
        assert self.next.opened >= 4, "the next layer has not been opened for each"

    def test_a_next_layer_that_does_not_open_leaves_nothing_behind(self) -> None:
        """The client is refused too, and the next one can come."""
        with self.serving() as server:
            self.next.fails = {"open": errno.EACCES}
            for _ in range(2):
                try:
                    self.connect(server).close()
                except Refused:
                    continue
                raise AssertionError("the next layer does not open, and the filter does all the same")
            self.next.fails = {}
            self.connect(server).close()

    def test_the_next_layer_can_refuse_clients(self) -> None:
        """``preconnect`` of the next layer is called for each client."""
        with self.serving() as server:
            before = self.next.preconnects
            for _ in range(3):
                self.connect(server).close()

            assert self.next.preconnects == before + 3, "preconnect does not call super().preconnect"

    def test_errors_of_the_next_layer_reach_the_client(self) -> None:
        """Each under its own number, for the one request that met it."""
        with self.opened() as area:
            for verb in ("pread", "pwrite", "flush", "trim", "zero", "cache", "extents"):
                for number in _ERRORS:
                    self._check_error(area, verb, number)
            area.read()

    def _check_error(self, area: Area, verb: str, number: int) -> None:
        """Have the next layer fail; if it has been asked anything, the client has to be told so."""
        client, (count, offset) = area.client, area.pieces(1)[0]
        special: dict[str, tuple[Any, ...]] = {"flush": (), "pwrite": (area.data(count), offset)}
        self.next.fails, before = dict.fromkeys(VERBS, number), self.next.failures
        told = 0
        try:
            getattr(client, verb)(*special.get(verb, (count, offset)))
        except OSError as error:
            told = error.errno or 0
        self.next.fails = {}
        if self.next.failures > before:
            name = errno.errorcode[number]
            assert told == number, f"{verb}: the next layer raises {name}, and the client is told {told}"

    def test_what_has_been_flushed_is_durable(self) -> None:
        """After a flush, all that has been written is on the stable storage of the next layer."""
        with self.opened() as area:
            for count, offset in area.pieces(2):
                data = area.data(count)
                if area.write(data, offset) and area.flush():
                    self._check_durable(data)

    def test_what_is_written_with_fua_is_durable(self) -> None:
        """After a request with FUA, what it has written is on the stable storage of the next layer."""
        with self.opened() as area:
            for count, offset in area.pieces(2):
                data = area.data(count)
                if area.write(data, offset, CommandFlag.FUA):
                    self._check_durable(data)
                for verb in (area.zero, area.trim):
                    if verb(count, offset, CommandFlag.FUA):
                        self._check_durable()

    def _check_durable(self, data: bytes = b"") -> None:
        if self.passes_writes:
            assert data in self.next.content[:], "what has been written has not reached the next layer"
            is_flushed = self.next.durable == self.next.content[:]
            assert is_flushed, "what has been written has not been flushed"

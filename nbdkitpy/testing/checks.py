"""What has to be so whatever is served: checks that plugins and filters have in common, made by clients.

Each serves what it is about anew, and looks at it from outside.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from nbdkitpy.backend import Plugin
from nbdkitpy.library import EmbeddedServer, FilterLayer, Parameters, serve
from nbdkitpy.protocol.constants import Command, CommandFlag, TransmissionFlag
from nbdkitpy.testing.area import Area
from nbdkitpy.testing.client import NbdClient, export_info, list_exports
from nbdkitpy.testing.wire import Refused, Style

if TYPE_CHECKING:
    import ssl

__all__ = ["Conformance", "at_once"]

#: Requests of one client, and clients, at once.
_DEPTH = 8
_CLIENTS = 4

#: Of many exports the first are opened.
_MOST_EXPORTS = 20


class Conformance:
    """Checks for pytest; subclasses say what is served, and what is not to be expected of it.

    What checks write they write into the first 256 KiB of the export, and at its end.
    """

    #: Parameters, as for :func:`nbdkitpy.serve`.
    parameters: Parameters = MappingProxyType({})

    #: Further arguments for :func:`nbdkitpy.serve`.
    options: Mapping[str, Any] = MappingProxyType({})

    #: The export that is opened.
    export_name: str = ""

    #: How clients use TLS, if they do.
    tls: ssl.SSLContext | None = None

    #: Whether what is written can be read again, on any connection, as long as the server runs.
    keeps_data: bool = True

    #: Whether the server ends with its last client, so that one has to stay there.
    ends_with_last_client: bool = False

    #: Checks that are not made, by name, and why.
    exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, reason in cls.exempt.items():
            if not (name.startswith("test_") and hasattr(cls, name)):
                raise TypeError(f"{cls.__name__}: exempt names {name!r}, which is none of the checks")
            if not reason:
                raise TypeError(f"{cls.__name__}: exempt has to say why {name} is not made")
            setattr(cls, name, _skipped(reason))

    # --- what is served ---

    def layers(self) -> tuple[str | type[Plugin] | Plugin, Sequence[FilterLayer]]:
        """Return the plugin and the filters that are to be served."""
        raise NotImplementedError

    def connect(self, server: EmbeddedServer, style: Style = Style.EXTENDED) -> NbdClient:
        """Return a client of `server`, which has the export open."""
        return NbdClient(server, self.export_name, style=style, tls=self.tls)

    @contextlib.contextmanager
    def serving(self, **options: Any) -> Iterator[EmbeddedServer]:
        """Serve the layers. At the end, none of them has raised what is no error of the system."""
        plugin, filters = self.layers()
        with self.served(plugin, filters, **options) as server:
            yield server

    @contextlib.contextmanager
    def served(
        self,
        plugin: str | type[Plugin] | Plugin,
        filters: Sequence[FilterLayer],
        *,
        alone: bool = False,
        **options: Any,
    ) -> Iterator[EmbeddedServer]:
        """Serve any layers with the parameters and options of this class, as :meth:`serving` does.

        Args:
            plugin: The innermost layer.
            filters: Those before it.
            alone: There is going to be one client, and there can only be one.
            **options: Further arguments for :func:`nbdkitpy.serve`.
        """
        options = {"listen": False, **self.options, **options}
        with contextlib.ExitStack() as end:
            end.enter_context(_no_defects())
            server = end.enter_context(serve(plugin, self.parameters, filters=filters, **options))
            if self.ends_with_last_client and not alone:
                end.enter_context(self.connect(server))
            yield server

    @contextlib.contextmanager
    def opened(self, **options: Any) -> Iterator[Area]:
        """Serve the layers to one client, and work on what it has open."""
        with self.serving(**options) as server, self.connect(server) as client:
            yield self.area(client)

    def area(self, client: NbdClient) -> Area:
        """Return what of the export checks work on."""
        return Area(client, keeps_data=self.keeps_data)

    # --- from start to end ---

    def test_nothing_is_left_when_the_server_has_ended(self) -> None:
        """No thread and no descriptor is left, also if a client is still there at the end."""
        before = threading.enumerate(), _descriptors()

        with contextlib.ExitStack() as clients, self.serving() as server:
            client = self.connect(server)
            clients.callback(client.abort)
            self.area(client).check()

        left = [thread.name for thread in threading.enumerate() if thread not in before[0]]
        assert not left, f"threads are left: {left}"
        assert not _descriptors() - before[1], "descriptors are left"

    def test_it_can_be_opened_again_and_again(self) -> None:
        """Who has asked, or has opened the export and closed it, leaves nothing that is in the way of others."""
        with self.serving() as server:
            for _ in range(3):
                export_info(server, self.export_name, tls=self.tls)
                with self.connect(server) as client:
                    self.area(client).check()

    def test_it_says_the_same_each_time(self) -> None:
        """Two clients are told the same of the export."""
        infos = []

        with self.serving() as server:
            for _ in range(2):
                with self.connect(server) as client:
                    infos.append(client.info)

        assert infos[0] == infos[1], f"the second client is told something else: {infos}"

    def test_exports_that_are_listed_can_be_opened(self) -> None:
        """Each export of the list is there, and stands in it once."""
        with self.serving() as server:
            names = [export.name for export in list_exports(server, tls=self.tls)]
            assert len(set(names)) == len(names), f"listed twice: {names}"
            for name in names[:_MOST_EXPORTS]:
                export_info(server, name, tls=self.tls)

    def test_exports_that_are_not_there_are_refused_in_order(self) -> None:
        """A name that no export has may be opened or refused; either is no defect, and disturbs nobody."""
        with self.serving() as server:
            for name in ("no such export", "x" * 4096, "../" * 10, "ü\n"):
                with contextlib.suppress(Refused):
                    export_info(server, name, tls=self.tls)
            with self.connect(server) as client:
                self.area(client).check()

    def test_a_client_that_vanishes_disturbs_nobody(self) -> None:
        """One that is gone before it has its replies; others come after it."""
        with contextlib.ExitStack() as clients, self.serving() as server:
            for _ in range(2):
                client = self.connect(server)
                clients.callback(client.abort)
                for count, offset in self.area(client).pieces(_DEPTH):
                    client.submit(Command.READ, offset, count)
                client.abort()
            with self.connect(server) as client:
                self.area(client).check()

    # --- reading ---

    def test_all_of_it_can_be_read(self) -> None:
        """The export is as large as it says: its last bytes can be read, and as many at once as it says."""
        with self.opened() as area:
            for count in (area.unit, area.largest):
                assert len(area.client.pread(count, area.end - count)) == count

    def test_reads_agree_with_each_other(self) -> None:
        """A byte is the same however much is read, from where on, and in whichever form of replies."""
        with self.serving() as server:
            for style in Style:
                with self.connect(server, style) as client:
                    area = self.area(client)
                    for count, offset in area.ranges(12):
                        area.check_read(client.pread(count, offset), offset)

    def test_reads_at_once_do_not_get_in_each_others_way(self) -> None:
        """Each of several reads under way gets what is where it reads."""
        with self.opened() as area:
            ranges = list(area.ranges(_DEPTH))
            reads = [area.client.submit(Command.READ, offset, count) for count, offset in ranges]

            for cookie, (_, offset) in zip(reads, ranges):
                area.check_read(area.client.result(cookie).data, offset)

    def test_extents_cover_the_export_and_are_right(self) -> None:
        """Each question is answered for a beginning of its range; what is said to be zero reads as zeroes."""
        with self.opened() as area:
            area.check_extents([*area.ranges(8), (area.size, 0), (area.unit, area.end - area.unit)])

    def test_prefetching_works_if_it_is_offered(self) -> None:
        """It succeeds, and changes nothing."""
        with self.opened() as area:
            for count, offset in area.ranges(4):
                area.cache(count, offset)
            area.check()

    # --- writing ---

    def test_a_read_only_server_serves_the_same(self) -> None:
        """With ``readonly`` it can be opened and read, and not be written."""
        with self.opened(readonly=True) as area:
            assert area.client.flags & TransmissionFlag.READ_ONLY
            for count, offset in area.ranges(4):
                area.write(area.data(count), offset)
            area.check()

    def test_what_is_written_is_read_back(self) -> None:
        """Writes of all sizes, also over each other: the last one counts, and nothing beside it changes."""
        with self.opened() as area:
            for count, offset in area.ranges(16):
                area.write(area.data(count), offset)
            area.check()

    def test_all_of_it_can_be_written(self) -> None:
        """The last bytes can be written, and as many at once as it says."""
        with self.opened() as area:
            for count in (area.largest, area.unit):
                data, offset = area.data(count), area.end - count
                if area.write(data, offset) and self.keeps_data:
                    is_there = area.client.pread(count, offset) == data
                    assert is_there, "what has been written at the end is not there"

    def test_extents_are_right_after_writes(self) -> None:
        """What has been written is not said to be zero."""
        with self.opened() as area:
            for count, offset in area.ranges(4):
                area.write(area.data(count), offset)
            area.check_extents([(area.size, 0)])

    def test_zeroes_are_written_where_they_should_be_if_that_is_offered(self) -> None:
        """The range reads as zeroes, with and without holes, and nothing beside it changes."""
        with self.opened() as area:
            for flags in (0, CommandFlag.NO_HOLE):
                area.fill()
                for count, offset in area.ranges(4):
                    area.zero(count, offset, flags)
                area.check()

    def test_a_fast_zero_is_done_or_refused(self) -> None:
        """If it is refused, with ENOTSUP, nothing has changed."""
        with self.opened() as area:
            area.fill()
            for count, offset in area.ranges(4):
                area.zero(count, offset, CommandFlag.FAST_ZERO)
            area.check()

    def test_trimming_leaves_the_rest_alone_if_it_is_offered(self) -> None:
        """The range may read as anything afterwards, but always the same; nothing beside it changes."""
        with self.opened() as area:
            area.fill()
            for count, offset in area.ranges(4):
                area.trim(count, offset)
            area.check()

    def test_flushing_works_if_it_is_offered(self) -> None:
        """It succeeds, and changes nothing."""
        with self.opened() as area:
            area.flush()
            area.fill()
            area.flush()
            area.check()

    def test_fua_works_if_it_is_offered(self) -> None:
        """With FUA, each request does the same as without."""
        with self.opened() as area:
            area.fill()
            for count, offset in area.ranges(3):
                area.write(area.data(count), offset, CommandFlag.FUA)
            for verb in (area.zero, area.trim):
                for count, offset in area.ranges(3):
                    verb(count, offset, CommandFlag.FUA)
            area.check()

    # --- at once ---

    def test_writes_at_once_do_not_get_in_each_others_way(self) -> None:
        """Several writes under way, each to a place of its own."""
        with self.opened() as area:
            writes = []
            for count, offset in area.pieces(_DEPTH):
                data = area.data(count)
                if area.write(data[::-1], offset):
                    writes.append(area.client.submit(Command.WRITE, offset, data=data))
                    area.expect(data, offset)
            for cookie in writes:
                area.client.result(cookie)
            area.check()

    def test_of_writes_at_once_to_one_place_each_byte_is_of_one(self) -> None:
        """Several writes under way, over each other: what is there afterwards has been written by one of them."""
        with self.opened() as area:
            area.fill()
            if area.client.flags & TransmissionFlag.READ_ONLY:
                return
            ranges = list(area.ranges(_DEPTH))
            writes = [
                area.client.submit(Command.WRITE, offset, data=bytes([value]) * count)
                for value, (count, offset) in enumerate(ranges)
            ]
            for cookie in writes:
                area.client.result(cookie)
            found = area.read()
            edges = sorted({0, area.size, *(edge for count, offset in ranges for edge in (offset, offset + count))})
            for start, end in itertools.pairwise(edges) if self.keeps_data else ():
                values = {value for value, (count, offset) in enumerate(ranges) if offset <= start < offset + count}
                wrong = set(found[start:end]) - (values or set(area.content[start:end]))
                assert not wrong, f"between {start} and {end} is what nobody has written there: {wrong}"

    def test_clients_at_once_do_not_get_in_each_others_way(self) -> None:
        """Several clients, each of which writes and reads at a place of its own."""
        with self.serving() as server:
            with self.connect(server) as client:
                area = self.area(client)
            pieces = area.pieces(_CLIENTS)

            def work(number: int) -> None:
                count, offset = pieces[number]
                with self.connect(server) as client:
                    own = self.area(client)
                    for value in range(10 * number + 1, 10 * number + 4):
                        data = bytes([value]) * count
                        if own.write(data, offset):
                            area.expect(data, offset)
                        area.check_read(client.pread(count, offset), offset)

            at_once(*(functools.partial(work, number) for number in range(len(pieces))))
            with self.connect(server) as client:
                area.check(client)

    def test_data_outlive_the_connection(self) -> None:
        """What one client has written the next one reads."""
        with self.serving() as server:
            with self.connect(server) as client:
                area = self.area(client)
                area.fill()
                area.flush()
            with self.connect(server) as client:
                area.check(client)

    def test_a_flush_covers_all_connections_if_it_says_so(self) -> None:
        """With CAN_MULTI_CONN, what has been written and flushed on one connection is there on another."""
        with self.serving() as server, self.connect(server) as one:
            if one.flags & TransmissionFlag.CAN_MULTI_CONN:
                with self.connect(server) as other:
                    self.area(other)
                    area = self.area(one)
                    area.fill()
                    area.flush()
                    area.check(other)


def at_once(*functions: Callable[[], object]) -> None:
    """Call each in a thread of its own, wait for all, and raise what one of them has raised."""
    failures: list[BaseException] = []

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def _skipped(reason: str) -> Callable[[object], None]:
    def check(self: object) -> None:
        import pytest  # which nobody but testers has

        pytest.skip(reason)

    return check


def _descriptors() -> set[str]:
    """Numbers of open files; none where the system does not show them."""
    directory = "/proc/self/fd"
    with contextlib.suppress(FileNotFoundError):
        return {number for number in os.listdir(directory) if os.path.lexists(f"{directory}/{number}")}
    return set()


class _Defects(logging.Handler):
    """Collects what layers have raised that is no error of the system: the log shows a traceback of that."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append(record.getMessage())


@contextlib.contextmanager
def _no_defects() -> Iterator[None]:
    logger, defects = logging.getLogger("nbdkitpy"), _Defects()
    logger.addHandler(defects)
    try:
        yield
    finally:
        logger.removeHandler(defects)
    assert not defects.found, f"a plugin or filter has raised what is no OSError: {defects.found[0]}"

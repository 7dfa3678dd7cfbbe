"""Each check of filters fails on a filter that is wrong in that respect, and none on one that is right."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest

from nbdkitpy import Buffer, Client, ConfigError, Filter, FilterHandle, Flags, Handle, Support, ThreadModel
from nbdkitpy.testing import FilterConformance, PluginConformance
from nbdkitpy.testing.conformance import KINDS

SHIFT = 4096


class Right(Filter):
    """Leaves out the first 4 KiB, and counts what is read."""

    name = "right"
    handle: ClassVar[type[RightHandle]]

    def wrap(self, handle: Handle, client: Client) -> Handle:
        return self.handle(handle)


class RightHandle(FilterHandle):
    """What wrong ones override."""

    def get_size(self) -> int:
        return self.next.get_size() - SHIFT

    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset + SHIFT)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.next.pwrite(data, offset + SHIFT, flags)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset + SHIFT, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.next.zero(count, offset + SHIFT, flags)

    def cache(self, count: int, offset: int) -> None:
        self.next.cache(count, offset + SHIFT)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [
            (start - SHIFT, length, kind) for start, length, kind in self.next.extents(count, offset + SHIFT, flags)
        ]


Right.handle = RightHandle


class TestRight(FilterConformance):
    filter = Right


class TestNothing(FilterConformance):
    """A filter that does nothing is right."""

    class filter(Filter):
        """Does nothing."""

        name = "nothing"


WRONG: list[tuple[str, str, type[Filter]]] = []


def wrong(check: str, text: str) -> Callable[[type[Any]], type[Any]]:
    """Say which check a wrong filter, or one with a wrong handle, has to fail, and in which words."""

    def take(cls: type[Any]) -> type[Any]:
        unit = cls if issubclass(cls, Filter) else type(cls.__name__, (Right,), {"handle": cls})
        WRONG.append((f"test_{check}", text, unit))
        return cls

    return take


CAN_DO = "the_next_layer_is_asked_only_for_what_it_can_do"


@wrong(CAN_DO, "the range is empty")
class ReadsNothingAsWell(RightHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        return bytes(super().pread(count, offset)) + bytes(super().pread(0, offset + count))


@wrong(CAN_DO, "the export has 1048576 bytes")
class ReadsOnBehindTheEnd(RightHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        return bytes(super().pread(count + 1, offset))[:count]


@wrong(CAN_DO, "blocks have 4096 bytes")
class ReadsByteByByte(RightHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        return bytes(super().pread(1, offset)) + (bytes(super().pread(count - 1, offset + 1)) if count > 1 else b"")


@wrong(CAN_DO, "the maximum is 65536")
class ReadsAhead(RightHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        self.next.pread(128 << 10, SHIFT)
        return super().pread(count, offset)


@wrong(CAN_DO, "the handle does not offer FUA")
class AsksForFuaAlways(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        super().pwrite(data, offset, flags | Flags.FUA)


@wrong(CAN_DO, "it does not offer FAST_ZERO")
class AsksForFastZeroes(RightHandle):
    def zero(self, count: int, offset: int, flags: int) -> None:
        super().zero(count, offset, flags | Flags.FAST_ZERO)


@wrong(CAN_DO, "no flags for it")
class PassesWrongFlags(RightHandle):
    def trim(self, count: int, offset: int, flags: int) -> None:
        super().trim(count, offset, flags | Flags.MAY_TRIM)


@wrong(CAN_DO, "the handle cannot do that")
class FlushesAlways(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        super().pwrite(data, offset, flags)
        self.next.flush()


@wrong(CAN_DO, "the handle cannot do that")
class WritesThatItHasRead(RightHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        data = super().pread(count, offset)
        self.next.pwrite(memoryview(data), offset + SHIFT, 0)
        return data


@wrong(CAN_DO, "another call is under way, in spite of SERIALIZE_ALL_REQUESTS")
class ReadsInThreadsOfItsOwn(RightHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        thread = threading.Thread(target=self.next.pread, args=(count, offset + SHIFT))
        thread.start()
        data = super().pread(count, offset)
        thread.join()
        return data


@wrong(CAN_DO, "the handle is closed")
class FlushesAfterTheEnd(RightHandle):
    def close(self) -> None:
        super().close()
        self.next.flush()


@wrong(CAN_DO, "a next layer that is plain is refused: .*only disks that can trim")
class IsChoosy(Right):
    def wrap(self, handle: Handle, client: Client) -> Handle:
        if handle.can_write() and not handle.can_trim():
            raise OSError(errno.EINVAL, "only disks that can trim")
        return super().wrap(handle, client)


@wrong("shortcuts_of_the_next_layer_read_the_same", "not what pread returns")
class ForgetsThatThereAreOtherWaysToRead(RightHandle):
    def __init__(self, next: Handle) -> None:
        super().__init__(next)
        self.pread_into = next.pread_into


@wrong("shortcuts_of_the_next_layer_read_the_same", "not what pread returns")
class ForgetsThatFilesCanBeSent(RightHandle):
    def __init__(self, next: Handle) -> None:
        super().__init__(next)
        self.file_range = next.file_range


@wrong("every_handle_of_the_next_layer_is_closed_once", "of [1-9] handles of the next layer 0 are closed")
class DoesNotClose(RightHandle):
    def close(self) -> None:
        pass


@wrong("every_handle_of_the_next_layer_is_closed_once", "close: it is closed already")
class ClosesTwice(RightHandle):
    def close(self) -> None:
        self.next.close()
        super().close()


@wrong("every_handle_of_the_next_layer_is_closed_once", "the next layer has not been opened for each")
class SharesAHandle(Right):
    shared: Handle | None = None

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.shared = self.shared or super().open(export_name, readonly, client)
        return _Sharing(self.shared)

    def cleanup(self) -> None:
        if self.shared is not None:
            self.shared.close()


class _Sharing(FilterHandle):
    def close(self) -> None:
        pass


@wrong("a_next_layer_that_does_not_open_leaves_nothing_behind", "the next layer does not open, and the filter does")
class HasAnAnswerToEverything(Right):
    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        try:
            return super().open(export_name, readonly, client)
        except OSError:
            return _Empty()


class _Empty(Handle):
    def get_size(self) -> int:
        return 0

    def pread(self, count: int, offset: int) -> Buffer:
        return b""


@wrong("the_next_layer_can_refuse_clients", "preconnect does not call")
class LetsEverybodyIn(Right):
    def preconnect(self, client: Client, readonly: bool) -> None:
        pass


@wrong("errors_of_the_next_layer_reach_the_client", "pwrite: the next layer raises EPERM, and the client is told 5")
class MakesAllErrorsTheSame(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        try:
            super().pwrite(data, offset, flags)
        except OSError as error:
            raise OSError(errno.EIO, "cannot write") from error


@wrong("errors_of_the_next_layer_reach_the_client", "flush: the next layer raises EPERM, and the client is told 0")
class SwallowsErrors(RightHandle):
    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@wrong("what_has_been_flushed_is_durable", "what has been written has not been flushed")
class DoesNotFlush(RightHandle):
    def flush(self) -> None:
        pass


@wrong("what_has_been_flushed_is_durable", "what has been written has not reached the next layer")
class WritesLater(RightHandle):
    def __init__(self, next: Handle) -> None:
        super().__init__(next)
        self.data: dict[int, bytes] = {}

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.data[offset] = bytes(data)

    def close(self) -> None:
        for offset, data in self.data.items():
            super().pwrite(memoryview(data), offset, 0)
        super().close()


@wrong("what_is_written_with_fua_is_durable", "what has been written has not been flushed")
class ForgetsFua(RightHandle):
    def can_fua(self) -> Support:
        return Support.NATIVE

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        super().pwrite(data, offset, 0)


@pytest.mark.parametrize(("check", "text", "cls"), WRONG, ids=[cls.__name__ for *_, cls in WRONG])
def test_a_wrong_filter_fails(check: str, text: str, cls: type[Filter]) -> None:
    suite = type("Suite", (FilterConformance,), {"filter": cls})()

    with pytest.raises(AssertionError, match=text):
        getattr(suite, check)()


def test_each_check_of_filters_has_been_seen_to_fail() -> None:
    checks = set(dir(FilterConformance)) - set(dir(PluginConformance))

    assert {check for check, *_ in WRONG} == {name for name in checks if name.startswith("test_")}


def test_each_kind_of_next_layer_is_used() -> None:
    used: list[tuple[frozenset[str], ThreadModel]] = []

    class Noting(Right):
        def config_complete(self) -> None:
            super().config_complete()
            disk: Any = self.next
            used.append((disk.next.can, disk.next.thread_model()))

    class Suite(FilterConformance):
        filter = Noting

    Suite().test_the_next_layer_is_asked_only_for_what_it_can_do()

    assert len(used) == len(KINDS) + 1
    assert {model for _, model in used} == set(ThreadModel)


@pytest.mark.parametrize(
    ("refusal", "failure"),
    [
        ("only one connection", None),
        ("something else", "a next layer that is serialize-connections is refused by: only one connection"),
    ],
)
def test_a_filter_may_say_which_next_layers_it_refuses(refusal: str, failure: str | None) -> None:
    class Refusing(Right):
        def config_complete(self) -> None:
            disk: Any = self.next
            if disk.next.thread_model() is ThreadModel.SERIALIZE_CONNECTIONS:
                raise ConfigError("only one connection")

    class Suite(FilterConformance):
        filter = Refusing
        unfit = {"serialize-connections": refusal}

    check = Suite().test_the_next_layer_is_asked_only_for_what_it_can_do

    if failure is None:
        check()
    else:
        with pytest.raises(AssertionError, match=failure):
            check()


def test_what_a_filter_says_that_it_refuses_it_has_to_refuse() -> None:
    class Suite(FilterConformance):
        filter = Right
        unfit = {"plain": "cannot be"}

    with pytest.raises(AssertionError, match="a next layer that is plain is not refused"):
        Suite().test_the_next_layer_is_asked_only_for_what_it_can_do()

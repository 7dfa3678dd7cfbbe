"""Each check of plugins fails on a plugin that is wrong in that respect, and none on one that is right."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import pytest

from nbdkitpy import Client, Export, Extent, ExtentType, Flags, Handle, Plugin, Support, ThreadModel
from nbdkitpy.testing import PluginConformance

SIZE = 1 << 20

#: Seconds in which other calls come in between.
_A_WHILE = 0.002


class Right(Plugin):
    """A disk in memory that can do everything."""

    name = "right"
    handle: ClassVar[type[RightHandle]]

    def __init__(self) -> None:
        super().__init__()
        self.content = bytearray(b"right" * (SIZE // 5 + 1))[:SIZE]
        self.position = 0
        self.busy = 0
        self.opened = 0
        self.broken = False

    def thread_model(self) -> ThreadModel:
        return ThreadModel.PARALLEL

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.opened += 1
        return self.handle(self, client)


class RightHandle(Handle):
    """What wrong ones override."""

    def __init__(self, plugin: Right, client: Client) -> None:
        self.plugin = plugin
        self.client = client
        self.content = plugin.content

    def get_size(self) -> int:
        return len(self.content)

    def can_multi_conn(self) -> bool:
        return True

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(self.content[offset : offset + count])

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.content[offset : offset + len(data)] = data

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & Flags.FAST_ZERO and count % 2:
            raise OSError(errno.ENOTSUP, "not fast")
        self.content[offset : offset + count] = bytes(count)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.content[offset : offset + count] = bytes(count)

    def flush(self) -> None:
        pass

    def cache(self, count: int, offset: int) -> None:
        pass

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        for start in range(offset, offset + count, 512):
            data = self.content[start : start + 512]
            yield Extent(start, len(data), ExtentType.DATA if any(data) else ExtentType.ZERO)


Right.handle = RightHandle


class TestRight(PluginConformance):
    plugin = Right


WRONG: list[tuple[str, str, type[Right]]] = []


def wrong(check: str, text: str) -> Callable[[type[Any]], type[Any]]:
    """Say which check a wrong plugin, or one with a wrong handle, has to fail, and in which words."""

    def take(cls: type[Any]) -> type[Any]:
        plugin = cls if issubclass(cls, Plugin) else type(cls.__name__, (Right,), {"handle": cls})
        WRONG.append((f"test_{check}", text, plugin))
        return cls

    return take


# --- from start to end ---


@wrong("nothing_is_left_when_the_server_has_ended", r"threads are left: \['Thread")
class LeavesAThread(Right):
    end = threading.Event()

    def after_fork(self) -> None:
        threading.Thread(target=self.end.wait).start()


@wrong("nothing_is_left_when_the_server_has_ended", "descriptors are left")
class LeavesADescriptor(RightHandle):
    left: ClassVar[list[int]] = []

    def __init__(self, plugin: Right, client: Client) -> None:
        super().__init__(plugin, client)
        self.left.append(os.open("/", os.O_RDONLY))


@wrong("it_can_be_opened_again_and_again", "it is in use")
class OpensOnce(Right):
    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if self.opened:
            raise OSError(errno.EBUSY, "it is in use")
        return super().open(export_name, readonly, client)


@wrong("it_says_the_same_each_time", "the second client is told something else")
class ChangesItsMind(RightHandle):
    def can_trim(self) -> bool:
        return self.plugin.opened % 2 == 0


@wrong("exports_that_are_listed_can_be_opened", "no such export")
class ListsWhatIsNotThere(Right):
    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return [Export(""), Export("gone")]

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if export_name:
            raise OSError(errno.ENOENT, "no such export")
        return super().open(export_name, readonly, client)


@wrong("exports_that_are_listed_can_be_opened", r"listed twice: \['one', 'one'\]")
class ListsTwice(Right):
    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return [Export("one"), Export("one")]


@wrong("exports_that_are_not_there_are_refused_in_order", r"no OSError: .*KeyError: 'no such export'")
class DoesNotExpectOtherNames(Right):
    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        _ = {"": 1}[export_name]
        return super().open(export_name, readonly, client)


@wrong("a_client_that_vanishes_disturbs_nobody", r"no OSError: .*RuntimeError: never happens")
class DoesNotExpectThatClientsLeave(RightHandle):
    def pread(self, count: int, offset: int) -> bytes:
        try:
            self.client.sleep(_A_WHILE)
        except OSError as error:
            raise RuntimeError("never happens") from error
        return super().pread(count, offset)


# --- reading ---


@wrong("all_of_it_can_be_read", "internal error")
class IsSmallerThanItSays(RightHandle):
    def get_size(self) -> int:
        return super().get_size() + 1


@wrong("all_of_it_can_be_read", "internal error")
class ReadsNoMoreThanAPiece(RightHandle):
    def pread(self, count: int, offset: int) -> bytes:
        return super().pread(min(count, 64 << 10), offset)


@wrong("reads_agree_with_each_other", r"at [0-9]+ is")
class ReadsSectors(RightHandle):
    def pread(self, count: int, offset: int) -> bytes:
        return super().pread(count, offset - offset % 512)


class Seeking(RightHandle):
    """Has one position for all, and takes its time between setting and using it."""

    def seek(self, offset: int) -> int:
        self.plugin.position = offset
        time.sleep(_A_WHILE)
        return self.plugin.position


@wrong("reads_at_once_do_not_get_in_each_others_way", r"at [0-9]+ is")
class SeeksToRead(Seeking):
    def pread(self, count: int, offset: int) -> bytes:
        return super().pread(count, min(self.seek(offset), SIZE - count))


@wrong("extents_cover_the_export_and_are_right", "does not read as zeroes")
class SaysThatAllIsZero(RightHandle):
    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [Extent(0, SIZE, ExtentType.ZERO)]


@wrong("extents_cover_the_export_and_are_right", "internal error")
class SaysNothingOfTheEnd(RightHandle):
    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [Extent(0, SIZE - 4096, ExtentType.DATA)]


@wrong("prefetching_works_if_it_is_offered", r"cache is offered, and fails: .* cannot prefetch")
class CannotPrefetch(RightHandle):
    def cache(self, count: int, offset: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "cannot prefetch")


# --- writing ---


@wrong("a_read_only_server_serves_the_same", "it wants to be written")
class InsistsOnWriting(Right):
    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if readonly:
            raise OSError(errno.EROFS, "it wants to be written")
        return super().open(export_name, readonly, client)


@wrong("what_is_written_is_read_back", r"at [0-9]+ is")
class LosesTheLastByte(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        super().pwrite(data[:-1], offset, flags)


@wrong("all_of_it_can_be_written", r"pwrite is offered, and fails: .* full")
class IsFullBeforeTheEnd(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        if offset + len(data) > SIZE - 512:
            raise OSError(errno.ENOSPC, "full")
        super().pwrite(data, offset, flags)


@wrong("extents_are_right_after_writes", "does not read as zeroes")
class KnowsItsExtentsFromTheBeginning(RightHandle):
    def __init__(self, plugin: Right, client: Client) -> None:
        super().__init__(plugin, client)
        self.content[:] = bytes(SIZE)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [Extent(0, SIZE, ExtentType.ZERO)]


@wrong("zeroes_are_written_where_they_should_be_if_that_is_offered", r"at [0-9]+ is 0x00")
class ZeroesTooMuch(RightHandle):
    def zero(self, count: int, offset: int, flags: int) -> None:
        super().zero(count + 1, offset, Flags.NONE)


@wrong("zeroes_are_written_where_they_should_be_if_that_is_offered", "and should be 0x00")
class LeavesHoles(RightHandle):
    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & Flags.MAY_TRIM:
            super().zero(count, offset, Flags.NONE)


@wrong("a_fast_zero_is_done_or_refused", r"at [0-9]+ is 0x00")
class RefusesTooLate(RightHandle):
    def zero(self, count: int, offset: int, flags: int) -> None:
        super().zero(count // 2, offset, Flags.NONE)
        if flags & Flags.FAST_ZERO:
            raise OSError(errno.ENOTSUP, "not fast")


@wrong("trimming_leaves_the_rest_alone_if_it_is_offered", r"at [0-9]+ is 0x00")
class TrimsWholeSectors(RightHandle):
    def trim(self, count: int, offset: int, flags: int) -> None:
        start, end = offset - offset % 512, offset + count + 511
        super().trim(end - end % 512 - start, start, flags)


@wrong("flushing_works_if_it_is_offered", "flush is offered, and fails")
class SaysThatItFlushes(RightHandle):
    def flush(self) -> None:
        raise NotImplementedError


@wrong("fua_works_if_it_is_offered", r"pwrite is offered, and fails: .* unknown flag")
class DoesNotKnowFua(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        if flags:
            raise OSError(errno.EINVAL, "unknown flag")
        super().pwrite(data, offset, flags)


# --- at once ---


@wrong("writes_at_once_do_not_get_in_each_others_way", r"at [0-9]+ is")
class SeeksToWrite(Seeking):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        super().pwrite(data, min(self.seek(offset), SIZE - len(data)), flags)


@wrong("of_writes_at_once_to_one_place_each_byte_is_of_one", r"what nobody has written there: \{238\}")
class MixesWrites(RightHandle):
    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.plugin.busy += 1
        time.sleep(_A_WHILE)
        alone = self.plugin.busy == 1
        super().pwrite(data if alone else memoryview(b"\xee" * len(data)), offset, flags)
        self.plugin.busy -= 1


@wrong("clients_at_once_do_not_get_in_each_others_way", "closed")
class ClosesForAll(RightHandle):
    """The first of several clients that leaves closes what they share."""

    def __init__(self, plugin: Right, client: Client) -> None:
        super().__init__(plugin, client)
        plugin.busy += 1

    def pread(self, count: int, offset: int) -> bytes:
        if self.plugin.broken:
            raise OSError(errno.EBADF, "closed")
        time.sleep(_A_WHILE * self.client.number)
        return super().pread(count, offset)

    def close(self) -> None:
        self.plugin.busy -= 1
        self.plugin.broken = self.plugin.busy > 0


@wrong("data_outlive_the_connection", "at 0 is")
class HasADiskForEachClient(RightHandle):
    def __init__(self, plugin: Right, client: Client) -> None:
        super().__init__(plugin, client)
        self.content = plugin.content.copy()


@wrong("a_flush_covers_all_connections_if_it_says_so", "at 0 is")
class RemembersWhatItHasRead(RightHandle):
    def __init__(self, plugin: Right, client: Client) -> None:
        super().__init__(plugin, client)
        self.read: dict[tuple[int, int], bytes] = {}

    def pread(self, count: int, offset: int) -> bytes:
        return self.read.setdefault((count, offset), super().pread(count, offset))


@pytest.fixture
def _clean_up() -> Iterator[None]:
    """Undo what wrong plugins leave behind."""
    before = threading.enumerate()
    yield
    LeavesAThread.end.set()
    for fd in LeavesADescriptor.left:
        os.close(fd)
    LeavesADescriptor.left.clear()
    for thread in threading.enumerate():
        if thread not in before:
            thread.join()


@pytest.mark.usefixtures("_clean_up")
@pytest.mark.parametrize(("check", "text", "cls"), WRONG, ids=[cls.__name__ for *_, cls in WRONG])
def test_a_wrong_plugin_fails(check: str, text: str, cls: type[Right]) -> None:
    suite = type("Suite", (PluginConformance,), {"plugin": cls})()

    with pytest.raises((AssertionError, OSError), match=text):
        getattr(suite, check)()


def test_each_check_has_been_seen_to_fail() -> None:
    checks = {name for name in dir(PluginConformance) if name.startswith("test_")}

    assert {check for check, *_ in WRONG} == checks

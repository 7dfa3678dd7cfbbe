"""A model of a disk, and a state machine that compares what filters make of one with it."""

from __future__ import annotations

import errno
import functools
import random
from collections.abc import Sequence
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from nbdkitpy import Client, ExtentType, Filter, Flags, Handle, Plugin
from nbdkitpy.extents import Extent, normalise_extents
from nbdkitpy.stack import Stack
from nbdkitpy_plugins.memory import Memory
from tests.serving import NoServer, make_stack

CLIENT = Client(1)
SETTINGS = settings(max_examples=30, stateful_step_count=30, deadline=None)


def memory(size: int) -> Memory:
    """Return a RAM disk."""
    plugin = Memory()
    plugin.config("size", str(size))
    return plugin


def configured(unit: Filter, **parameters: str) -> Filter:
    """Return the filter, with these parameters; ``_`` stands for ``-``."""
    for key, value in parameters.items():
        assert unit.config(key.replace("_", "-"), value), key
    return unit


def opened(plugin: Plugin, *filters: Filter, name: str = "", readonly: bool = False) -> Handle:
    """Return the outermost handle of a stack of these."""
    return make_stack(plugin, filters, NoServer()).open(name, readonly, CLIENT).handle


def write(handle: Handle, data: bytes, offset: int, flags: int = 0) -> None:
    """Write bytes."""
    handle.pwrite(memoryview(data), offset, flags)


def read_now(handle: Handle, count: int, offset: int) -> bytes | None:
    """Return what can be read without waiting, None if nothing can."""
    buffer = bytearray(count)
    if handle.pread_into is None or not handle.pread_into(memoryview(buffer), offset):
        return None
    return bytes(buffer)


def extents(handle: Handle, count: int, offset: int = 0, flags: int = 0) -> list[Extent]:
    """Return the extents as the server would see them."""
    found = normalise_extents(handle.extents(count, offset, flags), count, offset)
    return found[:1] if flags & Flags.REQ_ONE else found


@functools.cache
def patchy(size: int) -> bytes:
    """Return so many bytes, of which every few KiB may be zeroes."""
    chance = random.Random(1)
    return b"".join(chance.choice((bytes(4096), chance.randbytes(4096))) for _ in range(size // 4096 + 1))[:size]


class DiskMachine(RuleBasedStateMachine):
    """Two connections to one disk, and what has to be on it."""

    size: ClassVar[int]
    largest: ClassVar[int]

    def plugin(self) -> Plugin:
        """Return what is below the filters; it is filled with :func:`patchy` content."""
        return memory(self.size)

    def filters(self) -> Sequence[Filter]:
        """Return the filters, outermost first."""
        raise NotImplementedError

    def prepare(self, data: st.DataObject) -> None:
        """Draw what the rest depends on."""

    def content(self) -> bytes:
        """Return what is below the filters at the beginning."""
        return patchy(self.size)

    def start(self) -> int:
        """Return where the clients' disk begins in that."""
        return 0

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.prepare(data)
        plugin = self.plugin()
        plugin.config_complete()
        self.inner = plugin.open("", False, CLIENT)
        self.inner.pwrite(memoryview(self.content()), 0, 0)
        self.stack: Stack = make_stack(plugin, self.filters(), NoServer())
        opened = [self.stack.open("", False, CLIENT) for _ in range(2)]
        self.handles = [export.handle for export in opened]
        self.can = opened[0].capabilities
        self.fua = Flags.FUA if self.can.can_fua else Flags.NONE
        start = self.start()
        self.model = bytearray(self.content()[start : start + self.can.size])

    def part(self, data: st.DataObject) -> tuple[Handle, int, int]:
        """Draw a handle and a range."""
        end = len(self.model)
        edge = st.sampled_from(range(0, end, 512))
        offset = data.draw(st.integers(0, end - 1) | edge, "offset")
        most = min(self.largest, end - offset)
        whole = st.sampled_from(range(512, most + 1, 512)) if most >= 512 else st.just(most)
        return data.draw(st.sampled_from(self.handles)), data.draw(st.integers(1, most) | whole, "count"), offset

    @rule(data=st.data(), byte=st.integers(0, 255), flags=st.sampled_from([0, Flags.FUA]))
    def writes(self, data: st.DataObject, byte: int, flags: int) -> None:
        handle, count, offset = self.part(data)
        content = bytes([byte]) * count

        write(handle, content, offset, flags & self.fua)

        self.model[offset : offset + count] = content

    @rule(data=st.data(), fua=st.sampled_from([0, Flags.FUA]), trim=st.sampled_from([0, Flags.MAY_TRIM]))
    def zeroes(self, data: st.DataObject, fua: int, trim: int) -> None:
        if not self.can.can_zero:
            return
        handle, count, offset = self.part(data)

        handle.zero(count, offset, fua & self.fua | trim)

        self.model[offset : offset + count] = bytes(count)

    @rule(data=st.data(), trim=st.sampled_from([0, Flags.MAY_TRIM]))
    def zeroes_fast(self, data: st.DataObject, trim: int) -> None:
        if not self.can.can_fast_zero:
            return
        handle, count, offset = self.part(data)
        try:
            handle.zero(count, offset, Flags.FAST_ZERO | trim)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
        else:
            self.model[offset : offset + count] = bytes(count)

    @rule(data=st.data(), flags=st.sampled_from([0, Flags.FUA]))
    def trims(self, data: st.DataObject, flags: int) -> None:
        if not self.can.can_trim:
            return
        handle, count, offset = self.part(data)

        handle.trim(count, offset, flags & self.fua)

        found = bytes(handle.pread(count, offset))
        assert all(now in (0, before) for now, before in zip(found, self.model[offset : offset + count], strict=True))
        self.model[offset : offset + count] = found

    @rule(data=st.data())
    def reads(self, data: st.DataObject) -> None:
        handle, count, offset = self.part(data)

        assert handle.pread(count, offset) == self.model[offset : offset + count]

    @rule(data=st.data())
    def reads_by_another_way(self, data: st.DataObject) -> None:
        handle, count, offset = self.part(data)
        found = read_now(handle, count, offset)

        assert found is None or found == self.model[offset : offset + count]

    @rule(data=st.data())
    def caches(self, data: st.DataObject) -> None:
        if not self.can.can_cache:
            return
        handle, count, offset = self.part(data)

        handle.cache(count, offset)

    @rule(data=st.data(), flags=st.sampled_from([0, Flags.REQ_ONE]))
    def asks_for_extents(self, data: st.DataObject, flags: int) -> None:
        if not self.can.can_extents:
            return
        handle, count, offset = self.part(data)

        for start, length, kind in extents(handle, count, offset, flags):
            if kind & ExtentType.ZERO:
                assert not any(self.model[start : start + length])

    @rule()
    def flushes(self) -> None:
        if self.can.can_flush:
            self.handles[0].flush()

    @rule(index=st.integers(0, 1))
    def reconnects(self, index: int) -> None:
        self.handles[index].close()
        self.handles[index] = self.stack.open("", False, CLIENT).handle

    @rule()
    def reads_all(self) -> None:
        assert self.handles[1].pread(len(self.model), 0) == self.model

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            for handle in self.handles:
                handle.close()
            self.stack.cleanup()
            self.stack.unload()

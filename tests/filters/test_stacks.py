"""Filters one before the other, in any order: the data stay right, and what is left alone costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from nbdkitpy import Client, Filter, Handle, Plugin, Support
from nbdkitpy.backend import VERBS
from nbdkitpy_filters.blocksize import Blocksize
from nbdkitpy_filters.cow import Cow
from nbdkitpy_filters.delay import Delay
from nbdkitpy_filters.error import Error
from nbdkitpy_filters.exitlast import ExitLast
from nbdkitpy_filters.fua import Fua
from nbdkitpy_filters.ip import Ip
from nbdkitpy_filters.limit import Limit
from nbdkitpy_filters.log import Log
from nbdkitpy_filters.noextents import NoExtents
from nbdkitpy_filters.noparallel import NoParallel
from nbdkitpy_filters.nozero import NoZero
from nbdkitpy_filters.offset import Offset
from nbdkitpy_filters.partition import Partitions
from nbdkitpy_filters.rate import Rate
from nbdkitpy_filters.readonly import ReadOnly
from nbdkitpy_filters.retry import Retry
from tests.filters.disk import SETTINGS, DiskMachine, configured, patchy
from tests.partitions import LINUX, Entry, boot_record
from tests.recording import Recorder
from tests.serving import NoServer, make_stack

SIZE = 300_000
PARTITION = 8 * 512  # where it begins; its length is no multiple of any block
FEW = 5

FUA_MODES = ("none", "emulate", "native", "force", "pass", "discard")
ZERO_MODES = ("none", "emulate", "notrim", "plugin")
SERIALIZE = ("requests", "all-requests")


class Recipe(NamedTuple):
    """A filter, and the parameters that it may have."""

    make: Callable[[], Filter]
    parameters: Mapping[str, Sequence[str]]


RECIPES = {
    "blocksize": Recipe(Blocksize, {"minblock": ["1", "512", "4096"], "maxdata": ["4096", "64k"]}),
    "cow": Recipe(Cow, {"cow_block_size": ["4k", "64k"], "cow_on_read": ["false", "true"]}),
    "delay": Recipe(Delay, {"rdelay": ["0", "1us"], "wdelay": ["0", "1us"], "delay_fast_zero": ["true", "false"]}),
    "error": Recipe(Error, {"error_rate": ["0"]}),
    "fua": Recipe(Fua, {"fuamode": FUA_MODES, "flush_on_close": ["true", "false"]}),
    "log": Recipe(Log, {"logfile": ["/dev/null"]}),
    "noextents": Recipe(NoExtents, {}),
    "noparallel": Recipe(NoParallel, {"serialize": SERIALIZE}),
    "nozero": Recipe(
        NoZero, {"zeromode": ["none", "emulate", "notrim", "plugin"], "fastzeromode": ["default", "slow"]}
    ),
    "offset": Recipe(Offset, {"offset": ["0", "1", "512", "4096", "5000"]}),
    "partition": Recipe(Partitions, {"partition": ["1"]}),
    "rate": Recipe(Rate, {"rate": ["1T"]}),
    "readonly": Recipe(ReadOnly, {"readonly_file": ["/nonexistent/file"]}),
    "retry": Recipe(Retry, {"retries": ["0", "1"]}),
}


class StackMachine(DiskMachine):
    """Some filters in random order. That of partitions is the innermost, where the table is."""

    size = SIZE
    largest = 70_000

    def prepare(self, data: st.DataObject) -> None:
        names = st.lists(st.sampled_from(sorted(RECIPES)), min_size=FEW, max_size=FEW, unique=True)
        order = data.draw(names, "filters")
        order.sort(key=lambda name: name == "partition")
        self.chosen = [(name, self.draw_parameters(data, name)) for name in order]

    def draw_parameters(self, data: st.DataObject, name: str) -> dict[str, str]:
        choices = RECIPES[name].parameters
        return {key: data.draw(st.sampled_from(texts), f"{name} {key}") for key, texts in choices.items()}

    def filters(self) -> Sequence[Filter]:
        return [configured(RECIPES[name].make(), **parameters) for name, parameters in self.chosen]

    def content(self) -> bytes:
        if "partition" not in dict(self.chosen):
            return patchy(self.size)
        table = boot_record([Entry(LINUX, PARTITION // 512, SIZE // 512 - PARTITION // 512)])
        return table + patchy(self.size)[len(table) :]

    def start(self) -> int:
        chosen = dict(self.chosen)
        return int(chosen.get("offset", {}).get("offset", "0")) + (PARTITION if "partition" in chosen else 0)


TestStacks = StackMachine.TestCase
TestStacks.settings = settings(SETTINGS, max_examples=60)


class Recorded(Plugin):
    """Has one handle, which can do everything."""

    name = "recorded"

    def __init__(self) -> None:
        super().__init__()
        self.handle = Recorder(can_fua=Support.NATIVE)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        return self.handle


def methods(handle: Handle) -> dict[str, object]:
    """Return what is called, without what it is bound to."""
    return {verb: getattr(getattr(handle, verb), "__func__", None) for verb in VERBS}


@pytest.mark.parametrize("order", [1, -1])
def test_filters_that_touch_no_data_are_not_there_when_it_is_read_and_written(order: int) -> None:
    untouching = [
        configured(Ip(), allow="all"),
        Limit(),
        ExitLast(),
        configured(Offset(), offset="0"),
        NoExtents(),
        configured(NoZero(), zeromode="plugin"),
        configured(Fua(), fuamode="pass"),
        configured(Error(), error_rate="0"),
        configured(Delay(), delay_open="1us"),
    ]
    plugin = Recorded()
    client = Client(1, uid=0)

    bare = make_stack(plugin, (), NoServer()).open("", False, client).handle
    handle = make_stack(plugin, untouching[::order], NoServer()).open("", False, client).handle

    assert type(handle) is not type(bare)
    for verb in set(VERBS) - {"zero", "extents"}:
        assert getattr(handle, verb) == getattr(plugin.handle, verb)
    assert methods(handle)["zero"] is methods(bare)["zero"]  # the core's, which is there with no filter too
    assert (handle.pread_into, handle.file_range) == (plugin.handle.pread_into, plugin.handle.file_range)
    assert handle.inline == bare.inline

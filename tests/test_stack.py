import errno
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest

from nbdkitpy.backend import (
    Backend,
    BlockSize,
    Buffer,
    Client,
    Export,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Plugin,
    ServerControl,
    Support,
    ThreadModel,
)
from nbdkitpy.exceptions import ConfigError, UnitError
from nbdkitpy.parameters import Parameter, Repeated, integer, parse_size, parse_string
from nbdkitpy.stack import MAX_EXPORTS, Capabilities, OpenExport, Stack
from tests.serving import NoServer

CLIENT = Client(number=1)
MIB = 1 << 20


class Disk(Handle):
    """Bytes in memory that can be written; what else it can do comes with the classes below."""

    def __init__(self, size: int = 4096) -> None:
        self.data = bytearray(b"\xff") * size
        self.calls: list[tuple[object, ...]] = []
        self.closed = 0

    def get_size(self) -> int:
        return len(self.data)

    def pread(self, count: int, offset: int) -> Buffer:
        self.calls.append(("pread", count, offset))
        return self.data[offset : offset + count]

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.calls.append(("pwrite", len(data), offset, flags))
        self.data[offset : offset + len(data)] = data

    def close(self) -> None:
        self.closed += 1


class Flushing(Disk):
    def flush(self) -> None:
        self.calls.append(("flush",))


class Trimming(Flushing):
    def trim(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("trim", count, offset, flags))


class Zeroing(Flushing):
    """Its zero works up to an offset, and answers `refusal` beyond it."""

    refusal: int = errno.EOPNOTSUPP
    zeroes_up_to = 0

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.calls.append(("zero", count, offset, flags))
        if offset + count > self.zeroes_up_to:
            raise OSError(self.refusal, "not here")
        self.data[offset : offset + count] = bytes(count)


class MemoryPlugin(Plugin):
    """Opens what `make` makes, and keeps it."""

    name = "memory"

    size = Parameter(parse_size)
    block_length = Parameter(parse_size)

    def __init__(self, make: Callable[[], Any] = Disk, model: ThreadModel = ThreadModel.PARALLEL) -> None:
        super().__init__()
        self.make = make
        self.model = model
        self.opened: list[Any] = []

    def thread_model(self) -> ThreadModel:
        return self.model

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        handle: Handle = self.make()
        self.opened.append(handle)
        return handle


class PassingFilter(Filter):
    name = "passing"


def stack_of(plugin: Plugin, *filters: Filter) -> Stack:
    stack = Stack(plugin, filters, NoServer())
    stack.config_complete()
    return stack


def open_disk(make: Callable[[], Handle], *filters: Filter, readonly: bool = False) -> tuple[OpenExport, Any]:
    """The export that a client opens, and the plugin's handle under it."""
    plugin = MemoryPlugin(make)
    export = stack_of(plugin, *filters).open("", readonly, CLIENT)
    return export, plugin.opened[0]


# --- the order of a life ---------------------------------------------------------------------------------------------

LIFE = (
    "load",
    "config",
    "config_complete",
    "thread_model",
    "get_ready",
    "after_fork",
    "cleanup",
    "unload",
    "preconnect",
    "list_exports",
    "default_export",
    "open",
)
QUESTIONS = (
    "get_size",
    "can_write",
    "can_zero",
    "can_fast_zero",
    "can_trim",
    "can_fua",
    "can_flush",
    "is_rotational",
    "can_multi_conn",
    "can_cache",
    "can_extents",
    "block_size",
)


def record(log: list[str], name: str, target: object, methods: Iterable[str]) -> None:
    """Have each call of one of `methods` of `target` noted in `log`, before it does what it does."""

    def recorded(method: str) -> Callable[..., object]:
        original: Callable[..., object] = getattr(target, method)

        def call(*arguments: object) -> object:
            log.append(f"{name}.{method}")
            return original(*arguments)

        return call

    for method in methods:
        setattr(target, method, recorded(method))


class RecordedPlugin(MemoryPlugin):
    def __init__(self, log: list[str], make: Callable[[], Any] = Disk) -> None:
        super().__init__(make)
        record(log, "plugin", self, LIFE)
        self.log = log

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        handle = super().open(export_name, readonly, client)
        record(self.log, "plugin", handle, (*QUESTIONS, "close"))
        return handle


class RecordedFilter(Filter):
    def __init__(self, log: list[str], label: str) -> None:
        super().__init__()
        record(log, label, self, (*LIFE, "wrap"))
        self.log, self.label = log, label

    def wrap(self, handle: Handle, client: Client) -> Handle:
        outer = FilterHandle(handle)
        record(self.log, self.label, outer, ("get_size", "can_write", "close"))
        return outer


def test_life_of_a_plugin_and_two_filters_in_order() -> None:
    log: list[str] = []
    stack = Stack(RecordedPlugin(log), [RecordedFilter(log, "outer"), RecordedFilter(log, "inner")], NoServer())

    stack.load()
    stack.config("size", "1k")
    stack.config_complete()
    stack.get_ready()
    stack.after_fork()
    stack.preconnect(CLIENT, False)
    stack.list_exports(CLIENT, False)
    stack.default_export(CLIENT, False)
    stack.open("", False, CLIENT).close()
    stack.cleanup()
    stack.unload()

    assert log == [
        *("plugin.load", "inner.load", "outer.load"),
        *("outer.config", "inner.config", "plugin.config"),
        *("outer.config_complete", "inner.config_complete", "plugin.config_complete"),
        *("outer.thread_model", "inner.thread_model", "plugin.thread_model"),
        *("plugin.get_ready", "inner.get_ready", "outer.get_ready"),
        *("plugin.after_fork", "inner.after_fork", "outer.after_fork"),
        *("outer.preconnect", "inner.preconnect", "plugin.preconnect"),
        *("outer.list_exports", "inner.list_exports", "plugin.list_exports", "plugin.default_export"),
        *("outer.default_export", "inner.default_export", "plugin.default_export"),
        *("outer.open", "inner.open", "plugin.open"),
        "plugin.get_size",
        "plugin.can_write",
        "plugin.can_zero",
        # can_fast_zero is not asked: zeroes are written, and the default says what follows
        "plugin.can_trim",
        "plugin.can_fua",
        "plugin.can_flush",
        "plugin.is_rotational",
        "plugin.can_multi_conn",
        "plugin.can_cache",
        "plugin.can_extents",
        "plugin.block_size",
        *("inner.wrap", "outer.wrap"),
        *("outer.get_size", "inner.get_size"),
        *("outer.can_write", "inner.can_write"),
        *("outer.close", "inner.close", "plugin.close"),
        *("outer.cleanup", "inner.cleanup", "plugin.cleanup"),
        *("plugin.unload", "inner.unload", "outer.unload"),
    ]


def test_plugin_is_asked_once_in_order_however_many_filters_ask() -> None:
    class Curious(Filter):
        def wrap(self, handle: Handle, client: Client) -> Handle:
            for _ in range(2):
                for question in QUESTIONS:
                    getattr(handle, question)()
            return FilterHandle(handle)

    log: list[str] = []
    plugin = RecordedPlugin(log, Zeroing)

    stack_of(plugin, Curious(), Curious(), Curious()).open("", False, CLIENT)

    assert [line for line in log if line.partition(".")[2] in QUESTIONS] == [f"plugin.{name}" for name in QUESTIONS]


def test_every_layer_knows_the_server_before_load() -> None:
    server: ServerControl = NoServer()
    plugin, filter = MemoryPlugin(), PassingFilter()

    stack = Stack(plugin, [filter], server)

    assert plugin.server is filter.server is server
    assert stack.layers == (filter, plugin)


@pytest.mark.parametrize("end", ["cleanup", "unload"])
def test_layer_that_fails_at_the_end_does_not_keep_the_others_from_theirs(end: str) -> None:
    log: list[str] = []
    plugin, outer, inner = RecordedPlugin(log), RecordedFilter(log, "outer"), RecordedFilter(log, "inner")

    def fail() -> None:
        raise OSError(errno.EIO, "disk on fire")

    setattr(inner, end, fail)
    stack = Stack(plugin, [outer, inner], NoServer())

    with pytest.raises(OSError, match="disk on fire"):
        getattr(stack, end)()

    assert sorted(log) == [f"outer.{end}", f"plugin.{end}"]


# --- parameters ------------------------------------------------------------------------------------------------------


class Greedy(Filter):
    name = "greedy"

    size = Parameter(parse_size)
    word = Parameter(parse_string)


def test_outermost_layer_that_takes_a_parameter_gets_it() -> None:
    plugin, filter = MemoryPlugin(), Greedy()
    stack = Stack(plugin, [PassingFilter(), filter], NoServer())

    stack.config("size", "1k")
    stack.config("block-length", "2k")

    assert (filter.size, plugin.size, plugin.block_length) == (1024, None, 2048)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sise", 'unknown parameter "sise" (asked: greedy, memory): did you mean "size"?'),
        ("block_length", 'unknown parameter "block_length" (asked: greedy, memory): did you mean "block-length"?'),
        ("xyz", 'unknown parameter "xyz" (asked: greedy, memory): there are block-length, size, word'),
        ("", 'unknown parameter "" (asked: greedy, memory): there are block-length, size, word'),
    ],
)
def test_unknown_parameter_is_told_the_nearest_name(key: str, message: str) -> None:
    stack = Stack(MemoryPlugin(), [Greedy()], NoServer())

    with pytest.raises(ConfigError) as caught:
        stack.config(key, "1")

    assert str(caught.value) == message


def test_unknown_parameter_where_there_are_none() -> None:
    class Plain(Plugin):
        name = "plain"

    with pytest.raises(ConfigError) as caught:
        Stack(Plain(), [PassingFilter()], NoServer()).config("size", "1")

    assert str(caught.value) == 'plain: unknown parameter "size": it takes no parameters'


def test_wrong_value_is_not_offered_to_the_next_layer() -> None:
    plugin = MemoryPlugin()
    stack = Stack(plugin, [Greedy()], NoServer())

    with pytest.raises(ConfigError, match=r"^greedy: size must be a size"):
        stack.config("size", "big")

    assert plugin.size is None


def test_the_layer_that_took_a_parameter_is_returned() -> None:
    plugin, filter = MemoryPlugin(), Greedy()
    stack = Stack(plugin, [filter], NoServer())

    assert stack.config("size", "1k") is filter
    assert stack.config("block-length", "2k") is plugin


# --- new values of live parameters ------------------------------------------------------------------------------------


class Lively(Filter):
    """Notes each reload, and refuses a `low` above `high`."""

    name = "lively"

    low = Parameter(integer(0, 9), default=1, live=True)
    high = Parameter(integer(0, 9), default=5, live=True, key="top")
    words = Repeated(parse_string, live=True)
    secret = Parameter(parse_string, live=True, secret=True)

    def __init__(self) -> None:
        super().__init__()
        self.reloads: list[dict[str, object]] = []

    def reload(self, values: Mapping[str, Any]) -> None:
        self.reloads.append(dict(values))
        super().reload(values)
        if self.low > self.high:
            raise ConfigError("lively: low must not be above top")


def lively_stack() -> tuple[Stack, Lively, Lively]:
    outer, inner = Lively(), Lively()
    return Stack(MemoryPlugin(), [outer, inner], NoServer()), outer, inner


def test_reload_sets_new_values_and_tells_of_them() -> None:
    stack, outer, inner = lively_stack()
    stack.config("words", "before")
    stack.config("low", "2")

    told = stack.reload({outer: {"low": [], "words": ["a", "b"], "secret": ["hunter2"]}, inner: {"top": ["7"]}})

    assert (outer.low, outer.words, outer.secret, inner.high) == (1, ("a", "b"), "hunter2", 7)
    assert outer.reloads == [{"low": 1, "words": ("a", "b"), "secret": "hunter2"}]
    assert told == [
        "lively: low has been set: the default",
        "lively: words has been set: a and b",
        "lively: secret has been set",
        "lively: top has been set: 7",
    ]


def test_reload_of_nothing_does_nothing() -> None:
    stack, outer, _ = lively_stack()

    assert stack.reload({}) == []
    assert outer.reloads == []


def test_a_value_that_cannot_be_parsed_keeps_all_from_being_set() -> None:
    stack, outer, inner = lively_stack()

    with pytest.raises(ConfigError, match=r"^lively: top must be an integer from 0 to 9"):
        stack.reload({outer: {"low": ["2"]}, inner: {"low": ["3"], "top": ["99"]}})

    assert (outer.low, inner.low) == (1, 1)
    assert outer.reloads == inner.reloads == []


def test_values_that_a_layer_refuses_are_taken_back_from_all() -> None:
    stack, outer, inner = lively_stack()

    with pytest.raises(ConfigError, match=r"^lively: low must not be above top$"):
        stack.reload({outer: {"low": ["2"]}, inner: {"low": ["6"]}})

    assert (outer.low, inner.low) == (1, 1)
    assert outer.reloads == [{"low": 2}, {"low": 1}]


# --- leaks -----------------------------------------------------------------------------------------------------------


class Breakable(FilterHandle):
    """Counts itself among the open handles, and fails where `breaks` says."""

    def __init__(self, next: Handle, breaks: str, open_handles: list[object]) -> None:
        super().__init__(next)
        self.breaks, self.open_handles = breaks, open_handles
        open_handles.append(self)

    def get_size(self) -> int:
        if self.breaks == "ask":
            raise OSError(errno.EIO, "ask")
        return -1 if self.breaks == "answer" else super().get_size()

    def close(self) -> None:
        self.open_handles.remove(self)
        super().close()


class BreakableFilter(Filter):
    name = "breakable"

    def __init__(self, breaks: str, open_handles: list[object]) -> None:
        super().__init__()
        self.breaks, self.open_handles = breaks, open_handles

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if self.breaks == "open":
            raise OSError(errno.EACCES, "open")
        return super().open(export_name, readonly, client)

    def wrap(self, handle: Handle, client: Client) -> Handle:
        if self.breaks == "wrap":
            raise OSError(errno.EACCES, "wrap")
        if self.breaks == "nothing returned":
            return None  # type: ignore[return-value]
        return Breakable(handle, self.breaks, self.open_handles)


class BreakablePlugin(Plugin):
    name = "plugin"

    def __init__(self, breaks: str, open_handles: list[object]) -> None:
        super().__init__()
        self.breaks, self.open_handles = breaks, open_handles

    def thread_model(self) -> ThreadModel:
        return ThreadModel.SERIALIZE_CONNECTIONS

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if self.breaks == "open":
            raise OSError(errno.ENOENT, "open")
        if self.breaks == "nothing returned":
            return None  # type: ignore[return-value]
        return Breakable(Disk(), self.breaks, self.open_handles)


@pytest.mark.parametrize(
    ("layer", "breaks", "message"),
    [
        (0, "open", "open"),
        (0, "wrap", "wrap"),
        (0, "nothing returned", "^breakable: wrap must return a Handle, not None$"),
        (0, "ask", "ask"),
        (0, "answer", r"^Breakable: get_size must be 0 to 2\*\*63 - 1, not -1$"),
        (1, "open", "open"),
        (1, "wrap", "wrap"),
        (1, "nothing returned", "^breakable: wrap must return a Handle, not None$"),
        (1, "ask", "ask"),
        (1, "answer", r"^Breakable: get_size must be 0 to 2\*\*63 - 1, not -1$"),
        (2, "open", "open"),
        (2, "nothing returned", "^plugin: open must return a Handle, not None$"),
        (2, "ask", "ask"),
        (2, "answer", r"^Breakable: get_size must be 0 to 2\*\*63 - 1, not -1$"),
    ],
)
def test_G7_open_that_fails_anywhere_closes_all_that_was_opened(layer: int, breaks: str, message: str) -> None:
    open_handles: list[object] = []
    outer, inner = BreakableFilter("", open_handles), BreakableFilter("", open_handles)
    plugin = BreakablePlugin("", open_handles)
    stack = stack_of(plugin, outer, inner)
    broken = (outer, inner, plugin)[layer]
    broken.breaks = breaks

    with pytest.raises((OSError, TypeError, ValueError), match=message):
        stack.open("", False, CLIENT)

    assert open_handles == []
    broken.breaks = ""
    export = stack.open("", False, CLIENT)  # would wait for ever if the failed one had not been released
    assert len(open_handles) == 3
    export.close()
    assert open_handles == []


def test_G7_close_that_fails_lets_the_next_client_in() -> None:
    class Stuck(Disk):
        def close(self) -> None:
            super().close()
            raise OSError(errno.EIO, "will not close")

    plugin = MemoryPlugin(Stuck, ThreadModel.SERIALIZE_CONNECTIONS)
    stack = stack_of(plugin)
    export = stack.open("", False, CLIENT)

    with pytest.raises(OSError, match="will not close"):
        export.close()

    assert stack.open("", False, CLIENT).name == ""
    assert [handle.closed for handle in plugin.opened] == [1, 0]


def test_filter_that_returns_no_handle_is_named() -> None:
    class Odd(Filter):
        name = "odd"

        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            return "handle"  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"^odd: open must return a Handle, not 'handle'$"):
        stack_of(MemoryPlugin(), PassingFilter(), Odd()).open("", False, CLIENT)


# --- capabilities ----------------------------------------------------------------------------------------------------


class Answering(Disk):
    """Answers what it is told to, and defaults to the best."""

    def __init__(self, answers: dict[str, object]) -> None:
        super().__init__()
        best: dict[str, object] = {
            "get_size": 4096,
            "can_write": True,
            "can_zero": Support.NATIVE,
            "can_fast_zero": True,
            "can_trim": True,
            "can_fua": Support.NATIVE,
            "can_flush": True,
            "is_rotational": True,
            "can_multi_conn": True,
            "can_cache": Support.NATIVE,
            "can_extents": True,
            "block_size": BlockSize(512, 4096, 65536),
        }
        self.asked: list[str] = []
        for name, answer in {**best, **answers}.items():
            setattr(self, name, self._answer(name, answer))

    def _answer(self, name: str, answer: object) -> Callable[[], object]:
        def ask() -> object:
            self.asked.append(name)
            return answer

        return ask

    def can_fast_zero(self) -> bool:  # only so that it counts as overridden
        raise AssertionError


BEST = Capabilities(
    size=4096,
    can_write=True,
    can_zero=Support.NATIVE,
    can_fast_zero=True,
    can_trim=True,
    can_fua=Support.NATIVE,
    can_flush=True,
    is_rotational=True,
    can_multi_conn=True,
    can_cache=Support.NATIVE,
    can_extents=True,
    block_size=BlockSize(512, 4096, 65536),
)
NO_WRITE: dict[str, Any] = {
    "can_write": False,
    "can_zero": Support.NONE,
    "can_fast_zero": False,
    "can_trim": False,
    "can_fua": Support.NONE,
}


@pytest.mark.parametrize(
    ("answers", "differences"),
    [
        ({}, {}),
        ({"get_size": 0}, {"size": 0}),
        ({"get_size": (1 << 63) - 1}, {"size": (1 << 63) - 1}),
        ({"can_write": False}, NO_WRITE),
        ({"can_zero": Support.NONE}, {"can_zero": Support.NONE, "can_fast_zero": False}),
        ({"can_zero": Support.EMULATE}, {"can_zero": Support.EMULATE}),
        ({"can_zero": 1, "can_fua": 0, "can_cache": 1}, {"can_zero": 1, "can_fua": 0, "can_cache": 1}),
        ({"can_zero": Support.EMULATE, "can_fast_zero": False}, {"can_zero": 1, "can_fast_zero": False}),
        ({"can_fast_zero": False}, {"can_fast_zero": False}),
        ({"can_trim": False}, {"can_trim": False}),
        ({"can_fua": Support.EMULATE}, {"can_fua": Support.EMULATE}),
        ({"can_flush": False}, {"can_flush": False}),
        ({"is_rotational": False}, {"is_rotational": False}),
        ({"can_multi_conn": False}, {"can_multi_conn": False}),
        ({"can_cache": Support.NONE}, {"can_cache": Support.NONE}),
        ({"can_extents": False}, {"can_extents": False}),
        ({"block_size": None}, {"block_size": None}),
        ({"block_size": (1, 512, 512)}, {"block_size": BlockSize(1, 512, 512)}),
        ({"block_size": (65536, 32 * MIB, 0xFFFFFFFF)}, {"block_size": BlockSize(65536, 32 * MIB, 0xFFFFFFFF)}),
        ({"block_size": (512, 4096, 4096 + 512)}, {"block_size": BlockSize(512, 4096, 4608)}),
    ],
)
def test_snapshot_holds_what_was_answered(answers: dict[str, object], differences: dict[str, Any]) -> None:
    export, _ = open_disk(lambda: Answering(answers), PassingFilter())

    assert export.capabilities == BEST._replace(**differences)


def test_supports_of_the_snapshot_are_supports() -> None:
    export, _ = open_disk(lambda: Answering({"can_zero": 1}))

    assert export.capabilities.can_zero is Support.EMULATE


@pytest.mark.parametrize("answers", [{}, {"can_write": False}])
def test_readonly_implies_no_trim_zero_or_fua_which_are_not_asked_for(answers: dict[str, object]) -> None:
    export, disk = open_disk(lambda: Answering(answers), readonly=True)

    assert export.capabilities == BEST._replace(**NO_WRITE)
    assert disk.asked == [
        "get_size",
        "can_write",
        "can_flush",
        "is_rotational",
        "can_multi_conn",
        "can_cache",
        "can_extents",
        "block_size",
    ]


def test_filter_cannot_make_a_readonly_export_writable() -> None:
    class Writing(FilterHandle):
        def can_write(self) -> bool:
            return True

        def can_trim(self) -> bool:
            return True

        def can_fua(self) -> Support:
            return Support.NATIVE

        def can_zero(self) -> Support:
            return Support.NATIVE

    class WritingFilter(Filter):
        def wrap(self, handle: Handle, client: Client) -> Handle:
            return Writing(handle)

    export, _ = open_disk(lambda: Answering({}), WritingFilter(), readonly=True)

    assert export.capabilities == BEST._replace(**NO_WRITE)


def test_filter_may_open_inward_in_another_mode() -> None:
    class Overlay(FilterHandle):
        def can_write(self) -> bool:
            return True

    class OverlayFilter(Filter):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            return Overlay(self.next.open("base of " + export_name, True, client))

    export, disk = open_disk(lambda: Answering({}), OverlayFilter())

    assert export.capabilities.can_write
    assert "can_zero" not in disk.asked


@pytest.mark.parametrize(
    ("make", "differences"),
    [
        (Disk, {}),
        (Flushing, {"can_flush": True, "can_fua": Support.EMULATE}),
        (Trimming, {"can_flush": True, "can_fua": Support.EMULATE, "can_trim": True}),
        (
            Zeroing,
            {"can_flush": True, "can_fua": Support.EMULATE, "can_zero": Support.NATIVE, "can_fast_zero": False},
        ),
    ],
)
def test_snapshot_of_what_is_inferred(make: Callable[[], Handle], differences: dict[str, Any]) -> None:
    plain = Capabilities(
        size=4096,
        can_write=True,
        can_zero=Support.EMULATE,
        can_fast_zero=True,
        can_trim=False,
        can_fua=Support.NONE,
        can_flush=False,
        is_rotational=False,
        can_multi_conn=False,
        can_cache=Support.NONE,
        can_extents=False,
        block_size=None,
    )

    export, _ = open_disk(make)

    assert export.capabilities == plain._replace(**differences)


def test_zero_that_is_not_used_makes_all_fast_zeroes_fail_fast() -> None:
    class Unused(Zeroing):
        def can_zero(self) -> Support:
            return Support.EMULATE

    export, disk = open_disk(Unused)

    assert export.capabilities.can_fast_zero
    with pytest.raises(OSError, match="would have to be written"):
        export.handle.zero(1, 0, Flags.FAST_ZERO)
    assert disk.calls == []


class NoIndex:
    def __repr__(self) -> str:
        return "NoIndex()"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"get_size": -1}, r"get_size must be 0 to 2\*\*63 - 1, not -1"),
        ({"get_size": 1 << 63}, r"get_size must be 0 to 2\*\*63 - 1, not 9223372036854775808"),
        ({"get_size": 1 << 64}, "get_size must be 0 to"),
        ({"get_size": 1.5}, "get_size must return int, not 1.5"),
        ({"get_size": "1M"}, "get_size must return int, not '1M'"),
        ({"get_size": None}, "get_size must return int, not None"),
        ({"get_size": True}, "get_size must return int, not True"),
        ({"can_write": 2}, "can_write must return bool, not 2"),
        ({"can_write": 1}, "can_write must return bool, not 1"),
        ({"can_write": None}, "can_write must return bool, not None"),
        ({"can_zero": True}, "can_zero must return a Support, not True"),
        ({"can_zero": 3}, "can_zero must return a Support, not 3"),
        ({"can_zero": -1}, "can_zero must return a Support, not -1"),
        ({"can_zero": None}, "can_zero must return a Support, not None"),
        ({"can_fast_zero": 1}, "can_fast_zero must return bool, not 1"),
        ({"can_trim": "no"}, "can_trim must return bool, not 'no'"),
        ({"can_fua": "native"}, "can_fua must return a Support, not 'native'"),
        ({"can_fua": 1.0}, "can_fua must return a Support, not 1.0"),
        ({"can_flush": NoIndex()}, r"can_flush must return bool, not NoIndex\(\)"),
        ({"is_rotational": 0}, "is_rotational must return bool, not 0"),
        ({"can_multi_conn": []}, r"can_multi_conn must return bool, not \[\]"),
        ({"can_cache": [1]}, r"can_cache must return a Support, not \[1\]"),
        ({"can_extents": 0}, "can_extents must return bool, not 0"),
        ({"block_size": 512}, "block_size must return a BlockSize or None, not 512"),
        ({"block_size": (1, 512)}, "block_size must return a BlockSize or None"),
        ({"block_size": [1, 512, 512]}, "block_size must return a BlockSize or None"),
        ({"block_size": (1, 512.0, 512)}, "block_size must return a BlockSize or None"),
        ({"block_size": (True, 512, 512)}, "block_size must return a BlockSize or None"),
        ({"block_size": (0, 512, 512)}, "minimum must be a power of 2 up to 65536, not 0"),
        ({"block_size": (-1, 512, 512)}, "minimum must be a power of 2 up to 65536, not -1"),
        ({"block_size": (3, 512, 513)}, "minimum must be a power of 2 up to 65536, not 3"),
        ({"block_size": (131072, 131072, 131072)}, "minimum must be a power of 2 up to 65536, not 131072"),
        ({"block_size": (1, 256, 512)}, "preferred must be a power of 2 from 512, .*, not 256"),
        ({"block_size": (1, 1000, 2000)}, "preferred must be a power of 2 from 512, .*, not 1000"),
        ({"block_size": (4096, 512, 4096)}, "preferred must be .* from the minimum, .*, not 512"),
        ({"block_size": (1, 64 * MIB, 64 * MIB)}, "preferred must be .* to 32 MiB, not 67108864"),
        ({"block_size": (512, 4096, 512)}, "maximum must be .* from the preferred size on, not 512"),
        ({"block_size": (512, 4096, 5000)}, "maximum must be .* a multiple of the minimum .*, not 5000"),
        ({"block_size": (512, 4096, 1 << 32)}, "maximum must be .*, not 4294967296"),
        ({"block_size": (512, 4096, -512)}, "maximum must be .*, not -512"),
    ],
)
def test_G4_wrong_answer_is_refused_at_open_and_names_the_class(answers: dict[str, object], message: str) -> None:
    plugin = MemoryPlugin(lambda: Answering(answers))

    with pytest.raises(ValueError, match=rf"^Answering: .*{message}"):
        stack_of(plugin).open("", False, CLIENT)

    assert [disk.closed for disk in plugin.opened] == [1]


# --- what the plugin lacks is emulated --------------------------------------------------------------------------------


def test_what_needs_no_emulation_is_bound_through_every_layer() -> None:
    class Native(Zeroing):
        def can_fua(self) -> Support:
            return Support.NATIVE

        def cache(self, count: int, offset: int) -> None: ...

    export, disk = open_disk(Native, PassingFilter(), PassingFilter(), PassingFilter())

    for verb in ("pread", "pwrite", "flush", "trim", "cache", "extents"):
        bound = getattr(export.handle, verb)
        assert bound.__self__ is disk
        assert bound.__func__ is getattr(Native, verb)


def test_bound_through_filters_that_wrap() -> None:
    class WrappingFilter(Filter):
        def wrap(self, handle: Handle, client: Client) -> Handle:
            return FilterHandle(handle)

    export, disk = open_disk(Flushing, WrappingFilter(), WrappingFilter(), WrappingFilter())

    assert isinstance(export.handle, FilterHandle)
    assert (export.handle.pread.__self__, export.handle.pread.__func__) == (disk, Flushing.pread)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("call", "verb"),
    [
        (lambda handle, flags: handle.pwrite(memoryview(b"abc"), 5, flags), ("pwrite", 3, 5)),
        (lambda handle, flags: handle.trim(3, 5, flags), ("trim", 3, 5)),
    ],
)
def test_D2_fua_is_emulated_by_a_flush_after_the_verb(
    call: Callable[[Handle, int], None], verb: tuple[object, ...]
) -> None:
    export, disk = open_disk(Trimming, PassingFilter())

    call(export.handle, 0)
    assert disk.calls == [(*verb, 0)]
    call(export.handle, Flags.FUA)
    assert disk.calls[1:] == [(*verb, 0), ("flush",)]


def test_other_flags_cause_no_flush() -> None:
    export, disk = open_disk(Trimming)

    export.handle.trim(3, 5, Flags.MAY_TRIM)

    assert disk.calls == [("trim", 3, 5, Flags.MAY_TRIM)]


def test_no_flush_after_a_verb_that_failed() -> None:
    class Full(Flushing):
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            raise OSError(errno.ENOSPC, "full")

    export, disk = open_disk(Full)

    with pytest.raises(OSError, match="full"):
        export.handle.pwrite(memoryview(b"a"), 0, Flags.FUA)
    with pytest.raises(OSError, match="full"):
        export.handle.zero(1, 0, Flags.FUA)
    assert disk.calls == []


def test_flush_that_fails_fails_the_request() -> None:
    class Lost(Disk):
        def flush(self) -> None:
            raise OSError(errno.EIO, "lost")

    export, _ = open_disk(Lost)

    with pytest.raises(OSError, match="lost"):
        export.handle.pwrite(memoryview(b"a"), 0, Flags.FUA)
    with pytest.raises(OSError, match="lost"):
        export.handle.zero(1, 0, Flags.FUA)


class NativeFua(Zeroing):
    def can_fua(self) -> Support:
        return Support.NATIVE


def test_native_fua_reaches_the_plugin() -> None:
    export, disk = open_disk(NativeFua)
    disk.zeroes_up_to = 512

    export.handle.pwrite(memoryview(b"abc"), 0, Flags.FUA)
    export.handle.zero(512, 0, Flags.FUA | Flags.MAY_TRIM)
    export.handle.zero(512, 512, Flags.FUA | Flags.MAY_TRIM)

    assert disk.calls == [
        ("pwrite", 3, 0, Flags.FUA),
        ("zero", 512, 0, Flags.FUA | Flags.MAY_TRIM),
        ("zero", 512, 512, Flags.FUA | Flags.MAY_TRIM),
        ("pwrite", 512, 512, Flags.FUA),
    ]


@pytest.mark.parametrize("refusal", [errno.EOPNOTSUPP, errno.ENOTSUP])
def test_zero_by_writing_where_the_plugin_refuses_zeroes_every_byte_and_flushes_once(refusal: int) -> None:
    size, count = 128 * MIB + 3, 128 * MIB + 1
    export, disk = open_disk(lambda: Zeroing(size), PassingFilter())
    disk.refusal = refusal

    export.handle.zero(count, 1, Flags.FUA | Flags.MAY_TRIM)

    assert disk.data.count(0) == count
    assert (disk.data[0], disk.data[-1]) == (0xFF, 0xFF)
    assert disk.calls[0] == ("zero", count, 1, Flags.MAY_TRIM)
    assert disk.calls.count(("flush",)) == 1
    assert disk.calls[-1] == ("flush",)
    assert {call[3] for call in disk.calls[1:-1]} == {0}
    assert max(call[1] for call in disk.calls[1:-1]) <= 64 * MIB


def test_zero_by_writing_without_fua_does_not_flush() -> None:
    export, disk = open_disk(Flushing)

    export.handle.zero(100, 50, Flags.MAY_TRIM)

    assert disk.calls == [("pwrite", 100, 50, 0)]
    assert disk.data == b"\xff" * 50 + bytes(100) + b"\xff" * (4096 - 150)


def test_zero_that_works_is_not_followed_by_writing() -> None:
    export, disk = open_disk(Zeroing)
    disk.zeroes_up_to = 4096

    export.handle.zero(4096, 0, 0)
    export.handle.zero(4096, 0, Flags.FUA)

    assert disk.calls == [("zero", 4096, 0, 0), ("zero", 4096, 0, 0), ("flush",)]
    assert disk.data == bytes(4096)


def test_zero_that_fails_otherwise_is_not_emulated() -> None:
    export, disk = open_disk(Zeroing)
    disk.refusal = errno.EIO

    with pytest.raises(OSError, match="not here") as caught:
        export.handle.zero(10, 0, Flags.FUA)

    assert caught.value.errno == errno.EIO
    assert disk.calls == [("zero", 10, 0, 0)]


@pytest.mark.parametrize("make", [Disk, Flushing, Zeroing, NativeFua])
@pytest.mark.parametrize("flags", [Flags.FAST_ZERO, Flags.FAST_ZERO | Flags.FUA | Flags.MAY_TRIM])
def test_fast_zero_never_writes(make: Callable[[], Handle], flags: int) -> None:
    export, disk = open_disk(make)

    with pytest.raises(OSError) as caught:
        export.handle.zero(4096, 0, flags)

    assert caught.value.errno in (errno.ENOTSUP, errno.EOPNOTSUPP)
    assert [call for call in disk.calls if call[0] != "zero"] == []
    assert disk.data == b"\xff" * 4096


def test_fast_zero_that_is_fast_is_passed_on() -> None:
    export, disk = open_disk(Zeroing)
    disk.zeroes_up_to = 4096

    export.handle.zero(512, 0, Flags.FAST_ZERO)

    assert disk.calls == [("zero", 512, 0, Flags.FAST_ZERO)]


def test_cache_is_emulated_by_reading_the_whole_range() -> None:
    class CacheByReading(Disk):
        def can_cache(self) -> Support:
            return Support.EMULATE

    export, disk = open_disk(lambda: CacheByReading(4 * MIB), PassingFilter())

    export.handle.cache(2 * MIB + 1, 7)

    assert disk.calls == [("pread", MIB, 7), ("pread", MIB, MIB + 7), ("pread", 1, 2 * MIB + 7)]


def test_cache_that_is_claimed_without_the_verb_does_nothing() -> None:
    class Claiming(Disk):
        def can_cache(self) -> Support:
            return Support.NATIVE

    export, disk = open_disk(Claiming)

    export.handle.cache(4096, 0)

    assert disk.calls == []


def test_emulation_keeps_the_largest_block_size() -> None:
    class Small(Flushing):
        def block_size(self) -> BlockSize | None:
            return BlockSize(512, 4096, 8192)

        def can_cache(self) -> Support:
            return Support.EMULATE

    export, disk = open_disk(lambda: Small(32768))

    export.handle.zero(20480, 512, 0)
    export.handle.cache(8704, 0)

    assert disk.calls == [
        ("pwrite", 8192, 512, 0),
        ("pwrite", 8192, 8704, 0),
        ("pwrite", 4096, 16896, 0),
        ("pread", 8192, 0),
        ("pread", 512, 8192),
    ]


def test_emulation_calls_the_plugin_and_not_the_filters() -> None:
    class Complaining(FilterHandle):
        def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
            raise AssertionError

    class ComplainingFilter(Filter):
        def wrap(self, handle: Handle, client: Client) -> Handle:
            return Complaining(handle)

    export, disk = open_disk(Flushing, ComplainingFilter())

    export.handle.zero(10, 0, Flags.FUA)

    assert disk.calls == [("pwrite", 10, 0, 0), ("flush",)]


@pytest.mark.parametrize("between", [(), (PassingFilter(),)])
def test_handle_that_a_filter_makes_of_its_own_gets_the_same_emulation(between: tuple[Filter, ...]) -> None:
    own = Trimming()

    class Instead(Filter):
        """Does not ask the inner layers."""

        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            return own

    plugin = MemoryPlugin()
    export = stack_of(plugin, *between, Instead()).open("", False, CLIENT)

    export.handle.pwrite(memoryview(b"abc"), 0, Flags.FUA)
    export.handle.zero(2, 0, 0)

    assert own.calls == [("pwrite", 3, 0, 0), ("flush",), ("pwrite", 2, 0, 0)]
    assert plugin.opened == []
    export.close()
    assert own.closed == 1


def test_plugin_that_returns_a_filter_handle_gets_the_same_emulation() -> None:
    disk = Trimming()

    export, _ = open_disk(lambda: FilterHandle(disk))
    export.handle.trim(1, 0, Flags.FUA)

    assert disk.calls == [("trim", 1, 0, 0), ("flush",)]


@pytest.mark.parametrize(
    ("make", "declared", "inline"),
    [
        (Disk, {"pread", "pwrite"}, {"pread", "pwrite"}),
        (Disk, {"zero"}, set()),
        (Disk, {"pwrite", "zero"}, {"pwrite", "zero"}),
        (Disk, {"cache"}, set()),
        (Disk, {"pread", "cache"}, {"pread", "cache"}),
        (Trimming, {"pwrite", "trim", "zero"}, set()),
        (Trimming, {"pwrite", "trim", "zero", "flush"}, {"pwrite", "trim", "zero", "flush"}),
        (NativeFua, {"pwrite", "trim", "zero"}, {"pwrite", "trim", "zero"}),
        (NativeFua, {"zero"}, set()),
    ],
)
def test_verb_whose_emulation_may_wait_is_not_inline(make: type[Disk], declared: set[str], inline: set[str]) -> None:
    some: type[Disk] = type("Inline", (make,), {"inline": frozenset(declared)})

    export, _ = open_disk(some, PassingFilter())

    assert export.handle.inline == inline


def test_native_cache_stays_inline() -> None:
    class Native(Disk):
        inline = frozenset({"cache"})

        def cache(self, count: int, offset: int) -> None: ...

    assert open_disk(Native)[0].handle.inline == {"cache"}


# --- thread models ---------------------------------------------------------------------------------------------------


class Modest(Filter):
    def __init__(self, model: ThreadModel) -> None:
        super().__init__()
        self.model = model

    def thread_model(self) -> ThreadModel:
        return self.model


@pytest.mark.parametrize("outer", ThreadModel)
@pytest.mark.parametrize("inner", ThreadModel)
@pytest.mark.parametrize("plugin", ThreadModel)
def test_strictest_model_counts(outer: ThreadModel, inner: ThreadModel, plugin: ThreadModel) -> None:
    stack = stack_of(MemoryPlugin(model=plugin), Modest(outer), Modest(inner))

    assert stack.model is min(outer, inner, plugin)
    assert (stack.request_lock is not None) == (stack.model <= ThreadModel.SERIALIZE_ALL_REQUESTS)


@pytest.mark.parametrize("answer", [4, -1, None, "parallel"])
def test_model_that_is_none_is_a_unit_error(answer: object) -> None:
    plugin = MemoryPlugin(model=answer)  # type: ignore[arg-type]

    with pytest.raises(UnitError, match=rf"^memory: thread_model must return a ThreadModel, not {answer!r}$"):
        stack_of(plugin)


class Coherent(MemoryPlugin):
    multi_process = True

    def thread_model(self) -> ThreadModel:
        return ThreadModel.SERIALIZE_REQUESTS


class CoherentFilter(Filter):
    name = "coherent"
    multi_process = True


class SerialFilter(CoherentFilter):
    name = "serial"

    def thread_model(self) -> ThreadModel:
        return ThreadModel.SERIALIZE_ALL_REQUESTS


def test_several_processes_may_serve_what_says_that_they_may() -> None:
    stack = Stack(Coherent(), [CoherentFilter()], NoServer(), multi_process=True)

    stack.config_complete()

    assert stack.model is ThreadModel.SERIALIZE_REQUESTS


@pytest.mark.parametrize(
    ("plugin", "filters", "text"),
    [
        (MemoryPlugin, [CoherentFilter], "memory has to be in one process with all clients"),
        (Coherent, [CoherentFilter, PassingFilter], "passing has to be in one process with all clients"),
        (
            Coherent,
            [SerialFilter],
            "serial must have the thread model serialize_requests or parallel, not serialize_",
        ),
    ],
)
def test_several_processes_cannot_serve_anything_else(
    plugin: type[Plugin], filters: list[type[Filter]], text: str
) -> None:
    stack = Stack(plugin(), [cls() for cls in filters], NoServer(), multi_process=True)

    with pytest.raises(ConfigError, match=f"^--workers: {text}.*; leave --workers out, or 0$"):
        stack.config_complete()


@pytest.mark.parametrize("model", ThreadModel)
def test_D5_multi_conn_needs_more_than_one_connection(model: ThreadModel) -> None:
    plugin = MemoryPlugin(lambda: Answering({}), model)

    export = stack_of(plugin).open("", False, CLIENT)

    assert export.capabilities.can_multi_conn == (model is not ThreadModel.SERIALIZE_CONNECTIONS)


class Watching(MemoryPlugin):
    """Notes, at each call, whether the request lock was held."""

    stack: Stack

    def note(self, what: str) -> None:
        lock = self.stack.request_lock
        self.noted.append((what, lock is not None and lock.locked()))

    def __init__(self, model: ThreadModel) -> None:
        self.noted: list[tuple[str, bool]] = []
        watching = self

        class Watched(Disk):
            def get_size(self) -> int:
                watching.note("get_size")
                return super().get_size()

            def close(self) -> None:
                watching.note("close")

        super().__init__(Watched, model)

    def preconnect(self, client: Client, readonly: bool) -> None:
        self.note("preconnect")

    def list_exports(self, client: Client, readonly: bool) -> Iterator[Export]:
        self.note("list_exports")
        yield Export("")

    def default_export(self, client: Client, readonly: bool) -> str:
        self.note("default_export")
        return ""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.note("open")
        return super().open(export_name, readonly, client)


@pytest.mark.parametrize("model", ThreadModel)
def test_calls_for_a_client_are_serialised_where_the_model_says_so(model: ThreadModel) -> None:
    plugin = Watching(model)
    plugin.stack = stack = stack_of(plugin)

    stack.preconnect(CLIENT, False)
    stack.list_exports(CLIENT, False)
    stack.default_export(CLIENT, False)
    stack.open("", False, CLIENT).close()

    held = model <= ThreadModel.SERIALIZE_ALL_REQUESTS
    assert plugin.noted == [
        ("preconnect", False),
        ("list_exports", held),
        ("default_export", held),
        ("open", held),
        ("get_size", held),
        ("close", held),
    ]
    assert stack.request_lock is None or not stack.request_lock.locked()


def test_second_client_waits_until_the_first_has_closed() -> None:
    stack = stack_of(MemoryPlugin(model=ThreadModel.SERIALIZE_CONNECTIONS))
    first = stack.open("", False, CLIENT)
    opened = threading.Event()
    exports: list[OpenExport] = []

    def second_client() -> None:
        stack.preconnect(Client(number=2), False)
        stack.list_exports(Client(number=2), False)
        asked.set()
        exports.append(stack.open("", False, Client(number=2)))
        opened.set()

    asked = threading.Event()
    thread = threading.Thread(target=second_client, daemon=True)
    thread.start()
    assert asked.wait(10)  # all but open goes on meanwhile
    assert not opened.wait(0.05)
    assert stack.request_lock is not None
    assert stack.request_lock.acquire(timeout=10)  # the one that waits holds up nobody's requests
    stack.request_lock.release()
    first.close()
    assert opened.wait(10)
    thread.join()
    exports[0].close()


def test_clients_do_not_wait_for_each_other_otherwise() -> None:
    stack = stack_of(MemoryPlugin(model=ThreadModel.SERIALIZE_ALL_REQUESTS))

    exports = [stack.open("", False, Client(number)) for number in range(1, 4)]

    for export in exports:
        export.close()
    assert [handle.closed for handle in _opened(stack)] == [1, 1, 1]


def _opened(stack: Stack) -> list[Disk]:
    assert isinstance(stack.plugin, MemoryPlugin)
    return stack.plugin.opened


# --- exports ---------------------------------------------------------------------------------------------------------


class Listing(MemoryPlugin):
    listed: object = ()
    default: object = ""

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return self.listed  # type: ignore[return-value]

    def default_export(self, client: Client, readonly: bool) -> str:
        return self.default  # type: ignore[return-value]


def test_open_export_carries_its_name() -> None:
    stack = stack_of(MemoryPlugin())

    assert stack.open("disk", False, CLIENT).name == "disk"


def test_exports_are_listed_as_they_are() -> None:
    plugin = Listing()
    plugin.listed = [Export("a", "first"), ("b",), ("c", "third"), Export("é" * 2048)]

    assert stack_of(plugin, PassingFilter()).list_exports(CLIENT, False) == [
        Export("a", "first"),
        Export("b"),
        Export("c", "third"),
        Export("é" * 2048),
    ]


def test_list_of_exports_may_be_empty_or_just_not_too_long() -> None:
    plugin = Listing()
    stack = stack_of(plugin)

    assert stack.list_exports(CLIENT, False) == []
    plugin.listed = [Export(str(number)) for number in range(MAX_EXPORTS)]
    assert len(stack.list_exports(CLIENT, False)) == 10_000


def test_endless_list_of_exports_is_refused() -> None:
    plugin = Listing()
    plugin.listed = iter(lambda: Export("again"), None)

    with pytest.raises(ValueError, match=r"^there are more than the 10000 exports that can be listed$"):
        stack_of(plugin).list_exports(CLIENT, False)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("disk", "list_exports must return Exports, not 'disk'"),
        ("ab", "list_exports must return Exports, not 'ab'"),
        (["a", "b"], "list_exports must return Exports"),
        ((), "list_exports must return Exports"),
        (("a", "b", "c"), "list_exports must return Exports"),
        (Export(None), "name of an export must be a string, not None"),  # type: ignore[arg-type]
        (Export(b"a"), "name of an export must be a string, not b'a'"),  # type: ignore[arg-type]
        (Export("a", None), "description of an export must be a string"),  # type: ignore[arg-type]
        (Export("a\0b"), "name of an export must be at most 4096 bytes of UTF-8 without NUL"),
        (Export("a", "\0"), "description of an export must be at most 4096 bytes"),
        (Export("x" * 4097), "name of an export must be at most 4096 bytes"),
        (Export("é" * 2049), "name of an export must be at most 4096 bytes"),
        (Export("a", "x" * 5000), "description of an export must be at most 4096 bytes"),
        (Export("\udcff"), "surrogates not allowed"),
    ],
)
def test_export_that_cannot_be_one_is_refused(entry: object, message: str) -> None:
    plugin = Listing()
    plugin.listed = [Export("good"), entry]

    with pytest.raises(ValueError, match=message) as caught:
        stack_of(plugin).list_exports(CLIENT, False)

    assert len(str(caught.value)) < 200


def test_default_export_is_checked_like_any_name() -> None:
    plugin = Listing()
    stack = stack_of(plugin)

    for wrong in (None, "a\0", "x" * 4097, 7):
        plugin.default = wrong
        with pytest.raises(ValueError, match="default export must be"):
            stack.default_export(CLIENT, False)
    plugin.default = "main"
    assert stack.default_export(CLIENT, False) == "main"


def test_filters_link_layers_that_they_can_ask() -> None:
    plugin, outer, inner = Listing(), PassingFilter(), PassingFilter()
    plugin.default = "main"

    Stack(plugin, [outer, inner], NoServer())

    assert all(isinstance(filter.next, Backend) for filter in (outer, inner))
    assert outer.next.default_export(CLIENT, False) == "main"


# --- description ---


class Described(Disk):
    description: Any = "a disk"

    def export_description(self) -> str | None:
        return self.description  # type: ignore[no-any-return]


@pytest.mark.parametrize("description", ["a disk", "", None])
def test_description_is_what_the_outermost_handle_says(description: str | None) -> None:
    export, disk = open_disk(Described, PassingFilter())
    disk.description = description

    assert export.description() == description


@pytest.mark.parametrize("description", [b"bytes", 7, "nul \0", "x" * 4097, "\udcff"])
def test_description_that_cannot_be_sent_is_refused(description: object) -> None:
    export, disk = open_disk(Described)
    disk.description = description

    with pytest.raises(ValueError):
        export.description()

import inspect
from collections.abc import Iterable, Iterator

import pytest

import nbdkitpy
from nbdkitpy.backend import (
    VERBS,
    Backend,
    BlockSize,
    Buffer,
    Client,
    Export,
    Family,
    FileRange,
    Filter,
    FilterHandle,
    Flags,
    Handle,
    Plugin,
    Support,
    ThreadModel,
)
from nbdkitpy.exceptions import ConfigError, NbdkitpyError, UnitError
from nbdkitpy.parameters import Parameter, Repeated, integer, parse_size, parse_string

CLIENT = Client(number=1)
NAMES_OF_SHORTCUTS = ("pread_into", "file_range")
CAPABILITIES = (
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
    "export_description",
)


class Whole(Handle):
    """Has every verb and every shortcut, and notes what was called last."""

    inline = frozenset({"pread", "pwrite", "zero"})
    sparse = True
    called: tuple[object, ...] = ()

    def get_size(self) -> int:
        return 4096

    def pread(self, count: int, offset: int) -> Buffer:
        self.called = ("pread", count, offset)
        return bytes(count)

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        return False

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return FileRange(3, offset)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.called = ("pwrite", bytes(data), offset, flags)

    def flush(self) -> None:
        self.called = ("flush",)

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.called = ("trim", count, offset, flags)

    def zero(self, count: int, offset: int, flags: int) -> None:
        self.called = ("zero", count, offset, flags)

    def cache(self, count: int, offset: int) -> None:
        self.called = ("cache", count, offset)

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        self.called = ("extents", count, offset, flags)
        return [(offset, count, 0)]

    def close(self) -> None:
        self.called = ("close",)


class Least(Handle):
    def get_size(self) -> int:
        return 0

    def pread(self, count: int, offset: int) -> Buffer:
        return b""


# --- what a handle can do is inferred from what it overrides ----------------------------------------------------------


def _capabilities(handle: Handle) -> dict[str, object]:
    return {name: getattr(handle, name)() for name in CAPABILITIES}


READ_ONLY = {
    "can_write": False,
    "can_zero": Support.EMULATE,
    "can_fast_zero": True,
    "can_trim": False,
    "can_fua": Support.NONE,
    "can_flush": False,
    "is_rotational": False,
    "can_multi_conn": False,
    "can_cache": Support.NONE,
    "can_extents": False,
    "block_size": None,
    "export_description": None,
}


def test_handle_that_only_reads_can_do_nothing_else() -> None:
    assert _capabilities(Least()) == READ_ONLY


@pytest.mark.parametrize(
    ("verb", "inferred"),
    [
        ("pread", {}),
        ("pwrite", {"can_write": True}),
        ("flush", {"can_flush": True, "can_fua": Support.EMULATE}),
        ("trim", {"can_trim": True}),
        ("zero", {"can_zero": Support.NATIVE, "can_fast_zero": False}),
        ("cache", {"can_cache": Support.NATIVE}),
        ("extents", {"can_extents": True}),
    ],
)
def test_capabilities_follow_from_the_verb_that_is_overridden(verb: str, inferred: dict[str, object]) -> None:
    handle: Handle = type("OneVerb", (Least,), {verb: getattr(Whole, verb)})()

    assert handle.overrides(verb)
    assert _capabilities(handle) == {**READ_ONLY, **inferred}


def test_every_verb_is_a_method_of_handle() -> None:
    assert all(inspect.isfunction(getattr(Handle, verb)) for verb in VERBS)
    assert not any(Handle().overrides(verb) for verb in VERBS)


@pytest.mark.parametrize(
    "call",
    [
        lambda handle: handle.get_size(),
        lambda handle: handle.pread(1, 0),
        lambda handle: handle.pwrite(memoryview(b"x"), 0, 0),
        lambda handle: handle.flush(),
        lambda handle: handle.trim(1, 0, 0),
        lambda handle: handle.zero(1, 0, 0),
        lambda handle: handle.cache(1, 0),
        lambda handle: handle.extents(1, 0, 0),
    ],
)
def test_what_is_not_overridden_says_whose_it_is(call: object) -> None:
    class Empty(Handle):
        pass

    assert callable(call)
    with pytest.raises(NotImplementedError, match=r"^Empty does not "):
        call(Empty())


def test_closing_a_handle_that_holds_nothing_needs_no_code() -> None:
    Least().close()


# --- bind-through ----------------------------------------------------------------------------------------------------


class Passing(FilterHandle):
    pass


class Trimming(FilterHandle):
    """Changes one verb that has nothing to do with reading."""

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.next.trim(count, offset, flags | Flags.FUA)


class Reading(FilterHandle):
    def pread(self, count: int, offset: int) -> Buffer:
        return bytes(self.next.pread(count, offset))[::-1]


class ReadingInline(Reading):
    inline = frozenset({"pread"})


class Offset(FilterHandle):
    """Changes reads, and every other way to the same bytes with them."""

    sparse = True

    def pread(self, count: int, offset: int) -> Buffer:
        return self.next.pread(count, offset + 512)

    def pread_into(self, buffer: memoryview, offset: int) -> bool:
        return False

    def file_range(self, count: int, offset: int) -> FileRange | None:
        return FileRange(4, offset + 512)


class Swapping(FilterHandle):
    dynamic_next = True


@pytest.mark.parametrize("name", [*VERBS, *NAMES_OF_SHORTCUTS])
def test_three_filters_that_pass_on_cost_nothing(name: str) -> None:
    plugin = Whole()

    outer = Passing(Passing(Passing(plugin)))

    bound = getattr(outer, name)
    assert bound.__self__ is plugin
    assert bound.__func__ is getattr(Whole, name)


@pytest.mark.parametrize("name", [*VERBS, *NAMES_OF_SHORTCUTS])
def test_verb_is_bound_to_the_first_layer_that_overrides_it(name: str) -> None:
    plugin = Whole()
    middle = Trimming(Passing(plugin))

    outer = Passing(middle)

    owner: Handle = middle if name == "trim" else plugin
    assert getattr(outer, name).__self__ is owner


def test_overridden_verb_is_called_and_calls_the_next() -> None:
    plugin = Whole()

    Passing(Trimming(plugin)).trim(10, 20, 0)

    assert plugin.called == ("trim", 10, 20, Flags.FUA)


class Everything(FilterHandle):
    """Overrides each verb."""

    def pread(self, count: int, offset: int) -> Buffer:
        raise AssertionError

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        raise AssertionError

    def flush(self) -> None:
        raise AssertionError

    def trim(self, count: int, offset: int, flags: int) -> None:
        raise AssertionError

    def zero(self, count: int, offset: int, flags: int) -> None:
        raise AssertionError

    def cache(self, count: int, offset: int) -> None:
        raise AssertionError

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        raise AssertionError


def test_read_shortcuts_pass_through() -> None:
    outer = Passing(Trimming(Whole()))

    assert outer.sparse is True
    assert outer.file_range is not None
    assert outer.file_range(1, 7) == FileRange(3, 7)


def test_read_shortcuts_are_lost_when_reads_are_changed() -> None:
    outer = Passing(Reading(Whole()))

    assert outer.pread_into is None
    assert outer.file_range is None
    assert outer.sparse is False


def test_read_shortcuts_that_are_overridden_too_are_kept() -> None:
    changing = Offset(Whole())

    outer = Passing(changing)

    assert getattr(outer.pread_into, "__self__", None) is changing
    assert outer.file_range is not None
    assert outer.file_range(1, 7) == FileRange(4, 519)
    assert outer.sparse is True


def test_verbs_that_an_instance_leaves_alone_are_bound_through() -> None:
    plugin = Whole()

    outer = Passing(Everything(plugin, untouched={"pread", "extents", "zero"}))

    assert [verb for verb in VERBS if getattr(outer, verb).__self__ is plugin] == ["pread", "zero", "extents"]
    assert getattr(outer.pread_into, "__self__", None) is plugin
    assert outer.sparse is True
    assert outer.inline == {"pread", "zero"}


def test_reads_are_not_sparse_by_extents_that_a_filter_has_changed() -> None:
    outer = Passing(Everything(Whole(), untouched={"pread"}))

    assert outer.sparse is False
    assert outer.file_range is not None


def test_handle_without_shortcuts_gives_none_to_the_filters_over_it() -> None:
    outer = Passing(Least())

    assert (outer.pread_into, outer.file_range, outer.sparse) == (None, None, False)


@pytest.mark.parametrize(
    ("make", "inline"),
    [
        (Passing, {"pread", "pwrite", "zero"}),
        (Trimming, {"pread", "pwrite", "zero"}),
        (Reading, {"pwrite", "zero"}),
        (ReadingInline, {"pread", "pwrite", "zero"}),
        (Swapping, set()),
    ],
)
def test_verbs_stay_inline_where_every_layer_says_so(make: type[FilterHandle], inline: set[str]) -> None:
    assert make(Whole()).inline == inline
    assert Passing(make(Whole())).inline == inline


def test_filter_does_not_make_inline_what_is_not() -> None:
    assert ReadingInline(Least()).inline == frozenset()


def test_handle_that_swaps_its_next_delegates_each_call() -> None:
    first, second = Whole(), Whole()
    middle = Swapping(first)
    outer = Passing(middle)

    middle.next = second
    outer.flush()

    assert second.called == ("flush",)
    assert first.called == ()


def test_nothing_is_bound_through_a_handle_that_swaps_its_next() -> None:
    middle = Swapping(Whole())

    outer = Passing(middle)

    assert all(getattr(outer, verb).__self__ is middle for verb in VERBS)
    assert (outer.pread_into, outer.file_range, outer.sparse) == (None, None, False)


@pytest.mark.parametrize(
    ("verb", "arguments", "called"),
    [
        ("pread", (3, 4), ("pread", 3, 4)),
        ("pwrite", (memoryview(b"abc"), 4, 2), ("pwrite", b"abc", 4, 2)),
        ("flush", (), ("flush",)),
        ("trim", (3, 4, 2), ("trim", 3, 4, 2)),
        ("zero", (3, 4, 9), ("zero", 3, 4, 9)),
        ("cache", (3, 4), ("cache", 3, 4)),
        ("extents", (3, 4, 4), ("extents", 3, 4, 4)),
        ("close", (), ("close",)),
    ],
)
def test_delegates_pass_every_argument_on(verb: str, arguments: tuple[object, ...], called: tuple[object, ...]) -> None:
    plugin = Whole()

    returned = getattr(Swapping(plugin), verb)(*arguments)

    assert plugin.called == called
    assert returned == {"pread": bytes(3), "extents": [(4, 3, 0)]}.get(verb)


def test_capabilities_are_the_next_ones_unless_overridden() -> None:
    class Answering(Least):
        def get_size(self) -> int:
            return 12

        def block_size(self) -> BlockSize | None:
            return BlockSize(512)

        def export_description(self) -> str | None:
            return "a disk"

        def is_rotational(self) -> bool:
            return True

        def can_multi_conn(self) -> bool:
            return True

    handle = Answering()
    outer = Passing(Swapping(handle))

    assert _capabilities(outer) == _capabilities(handle)
    assert outer.get_size() == 12


def test_a_filter_handle_delegates_every_method_of_handle() -> None:
    own = {"overrides", "__init__"}
    methods = {name for name, _ in inspect.getmembers(Handle, inspect.isfunction)} - own

    assert {name for name in methods if name not in vars(FilterHandle)} == set()


# --- backends --------------------------------------------------------------------------------------------------------


class Disk(Plugin):
    name = "disk"

    size = Parameter(parse_size, required=True, magic=True, help="Size of the disk:")
    block_length = Parameter(integer(1, 4096), default=512)
    word = Repeated(parse_string)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        return Whole()


class Special(Disk):
    name = "special"

    size = Parameter(parse_size, default=1024)  # no longer required
    word = "fixed"  # type: ignore[assignment]  # no longer a parameter
    extra = Parameter(parse_string)


class Mixin:
    mixed = Parameter(parse_string)


class Mixed(Mixin, Disk):
    name = "mixed"


def test_parameters_are_collected_by_key() -> None:
    assert dict(Disk.parameters) == {"size": Disk.size, "block-length": Disk.block_length, "word": Disk.word}


def test_parameters_are_inherited_replaced_and_taken_away() -> None:
    assert dict(Special.parameters) == {
        "size": Special.size,
        "block-length": Disk.block_length,
        "extra": Special.extra,
    }
    assert Special.size is not Disk.size
    assert not Special.size.required


def test_parameters_of_a_mixin_count() -> None:
    assert set(Mixed.parameters) == {"size", "block-length", "word", "mixed"}
    assert dict(Plugin.parameters) == dict(Filter.parameters) == {}


def test_config_takes_declared_parameters_only() -> None:
    disk = Disk()

    assert disk.config("size", "1M") is True
    assert disk.config("block_length", "5") is False
    assert disk.config("block-length", "5") is True
    assert (disk.size, disk.block_length, disk.word) == (1 << 20, 5, ())


def test_a_parameter_is_known_by_its_aliases_too() -> None:
    class Renamed(Disk):
        name = "renamed"
        zero_mode = Parameter(parse_string, aliases=("zeromode",))
        words = Repeated(parse_string, aliases=("word-list",))

    disk = Renamed()

    assert disk.config("zeromode", "a") is disk.config("word-list", "b") is disk.config("words", "c") is True
    assert (disk.zero_mode, disk.words) == ("a", ("b", "c"))
    assert [disk.canonical_key(key) for key in ("zeromode", "zero-mode", "other")] == ["zero-mode"] * 2 + ["other"]


def test_config_complete_misses_what_is_required() -> None:
    disk = Disk()

    with pytest.raises(ConfigError) as caught:
        disk.config_complete()
    disk.config("size", "0")
    disk.config_complete()

    assert str(caught.value) == "disk: size=SIZE is missing: Size of the disk"


def test_config_complete_without_help_text() -> None:
    class Terse(Disk):
        size = Parameter(parse_size, required=True)

    with pytest.raises(ConfigError, match=r"^disk: size=SIZE is missing$"):
        Terse().config_complete()


def test_each_backend_has_its_own_debug_flags() -> None:
    first, second = Disk(), Disk()

    first.debug["rules"] = 1

    assert second.debug == {}


def test_life_of_a_backend_that_needs_nothing() -> None:
    disk = Disk()
    before = dict(vars(disk))

    disk.load()
    disk.get_ready()
    disk.after_fork()
    disk.preconnect(CLIENT, False)
    disk.cleanup()
    disk.unload()

    assert vars(disk) == before
    assert disk.dump() == {}


def test_backend_itself_cannot_serve() -> None:
    backend = Backend()

    with pytest.raises(NotImplementedError):
        backend.open("", False, CLIENT)
    with pytest.raises(NotImplementedError):
        backend.list_exports(CLIENT, False)
    with pytest.raises(NotImplementedError):
        backend.default_export(CLIENT, False)


def test_plugin_is_serialised_and_filter_parallel_unless_they_say() -> None:
    assert Disk().thread_model() is ThreadModel.SERIALIZE_ALL_REQUESTS
    assert Filter().thread_model() is ThreadModel.PARALLEL


def test_plugin_lists_its_default_export() -> None:
    class Named(Disk):
        def default_export(self, client: Client, readonly: bool) -> str:
            return "main"

    assert list(Disk().list_exports(CLIENT, False)) == [Export("", "")]
    assert list(Named().list_exports(CLIENT, False)) == [Export("main")]


class Spy(Disk):
    """Notes every call with its arguments, and keeps its handles."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []
        self.handles: list[Whole] = []

    def preconnect(self, client: Client, readonly: bool) -> None:
        self.calls.append(("preconnect", client, readonly))

    def list_exports(self, client: Client, readonly: bool) -> Iterator[Export]:
        self.calls.append(("list_exports", client, readonly))
        yield Export("a")

    def default_export(self, client: Client, readonly: bool) -> str:
        self.calls.append(("default_export", client, readonly))
        return "a"

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.calls.append(("open", export_name, readonly, client))
        self.handles.append(Whole())
        return self.handles[-1]


def test_filter_passes_every_call_on() -> None:
    filter, spy = Filter(), Spy()
    filter.next = spy

    filter.preconnect(CLIENT, True)
    exports = list(filter.list_exports(CLIENT, True))
    name = filter.default_export(CLIENT, True)
    handle = filter.open("x", True, CLIENT)

    assert (exports, name, handle) == ([Export("a")], "a", spy.handles[0])
    assert spy.calls == [
        ("preconnect", CLIENT, True),
        ("list_exports", CLIENT, True),
        ("default_export", CLIENT, True),
        ("open", "x", True, CLIENT),
    ]


def test_filter_wraps_what_it_opened() -> None:
    class Wrapping(Filter):
        def wrap(self, handle: Handle, client: Client) -> Handle:
            assert client is CLIENT
            assert handle.get_size() == 4096
            return Trimming(handle)

    filter, spy = Wrapping(), Spy()
    filter.next = spy

    handle = filter.open("", False, CLIENT)

    assert isinstance(handle, Trimming)
    assert handle.next is spy.handles[0]


@pytest.mark.parametrize("failure", [OSError(1, "no"), KeyError("x"), KeyboardInterrupt()])
def test_filter_closes_what_it_cannot_wrap(failure: BaseException) -> None:
    class Failing(Filter):
        def wrap(self, handle: Handle, client: Client) -> Handle:
            raise failure

    filter, spy = Failing(), Spy()
    filter.next = spy

    with pytest.raises(type(failure)):
        filter.open("", False, CLIENT)

    assert spy.handles[0].called == ("close",)


def test_filter_that_forgets_to_return_a_handle_is_named_and_leaks_none() -> None:
    class Forgetful(Filter):
        name = "forgetful"

        def wrap(self, handle: Handle, client: Client) -> Handle:  # type: ignore[return]
            Trimming(handle)

    filter, spy = Forgetful(), Spy()
    filter.next = spy

    with pytest.raises(TypeError, match=r"^forgetful: wrap must return a Handle, not None$"):
        filter.open("", False, CLIENT)

    assert spy.handles[0].called == ("close",)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "text"),
    [
        (Client(7), "connection 7 (unknown address)"),
        (Client(1, Family.INET, "192.0.2.1", 4000), "connection 1 (192.0.2.1:4000)"),
        (Client(1, Family.INET6, "2001:db8::1", 4000), "connection 1 ([2001:db8::1]:4000)"),
        (Client(2, Family.UNIX, pid=10, uid=0), "connection 2 (unix pid=10 uid=0)"),
        (Client(3, Family.VSOCK, cid=2, port=1023), "connection 3 (vsock 2:1023)"),
    ],
)
def test_client_as_text(client: Client, text: str) -> None:
    assert str(client) == text


def test_numbers_are_nbdkits() -> None:
    assert [int(model) for model in ThreadModel] == [0, 1, 2, 3]
    assert [int(support) for support in Support] == [0, 1, 2]
    assert (int(Flags.MAY_TRIM), int(Flags.FUA), int(Flags.REQ_ONE), int(Flags.FAST_ZERO)) == (1, 2, 4, 8)
    assert BlockSize() == (1, 4096, 64 << 20)


def test_errors_form_one_family() -> None:
    assert issubclass(UnitError, ConfigError)
    assert issubclass(ConfigError, NbdkitpyError)


def test_top_level_offers_everything_that_a_unit_needs() -> None:
    assert all(hasattr(nbdkitpy, name) for name in nbdkitpy.__all__)
    assert nbdkitpy.Handle is Handle

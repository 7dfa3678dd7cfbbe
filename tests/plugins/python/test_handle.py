"""Open exports of scripts: what they can do, and how their callbacks are called, in both API versions."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest

from nbdkitpy import BlockSize, Client, ExtentType, Flags, Handle, Support
from nbdkitpy.stack import Capabilities
from tests.plugins.python.conftest import VERSION_1, VERSION_2, Load

VERBS = ("pwrite", "flush", "trim", "zero", "cache", "extents")

#: Adds every verb; what each is given is recorded, without the handle.
ALL_1 = f"""
{VERSION_1}
records = []
def pwrite(h, buf, offset): records.append((h, bytes(buf), buf.readonly, offset))
def flush(h): records.append((h,))
def trim(h, count, offset): records.append((h, count, offset))
def zero(h, count, offset, may_trim): records.append((h, count, offset, may_trim))
def cache(h, count, offset, flags): records.append((h, count, offset, flags))
def extents(h, count, offset, flags):
    records.append((h, count, offset, flags))
    return [(offset, count, 3)]
"""

ALL_2 = f"""
{VERSION_2}
records = []
def pwrite(h, buf, offset, flags): records.append((h, bytes(buf), buf.readonly, offset, flags))
def flush(h, flags): records.append((h, flags))
def trim(h, count, offset, flags): records.append((h, count, offset, flags))
def zero(h, count, offset, flags): records.append((h, count, offset, flags))
def cache(h, count, offset, flags): records.append((h, count, offset, flags))
def extents(h, count, offset, flags):
    records.append((h, count, offset, flags))
    yield (offset, count, 3)
"""

MAY_TRIM, FUA, REQ_ONE, FAST_ZERO = int(Flags.MAY_TRIM), int(Flags.FUA), int(Flags.REQ_ONE), int(Flags.FAST_ZERO)

EVERYTHING: list[tuple[str, tuple[Any, ...]]] = [
    ("pwrite", (memoryview(bytearray(b"data")), 512, 0)),
    ("flush", ()),
    ("trim", (1024, 512, 0)),
    ("zero", (1024, 512, MAY_TRIM)),
    ("zero", (1024, 512, 0)),
    ("cache", (1024, 512)),
    ("extents", (1024, 512, REQ_ONE)),
]


@pytest.mark.parametrize("source", [VERSION_1, VERSION_2], ids=["1", "2"])
def test_handle_overrides_only_what_its_script_defines(load: Load, source: str) -> None:
    handle = load(source).handle()

    assert not any(handle.overrides(verb) for verb in VERBS)
    assert Capabilities.ask(handle) == Capabilities.ask(Bare())


class Bare(Handle):
    """What a handle of the least that there can be is."""

    def get_size(self) -> int:
        return 1 << 20


@pytest.mark.parametrize("source", [ALL_1, ALL_2], ids=["1", "2"])
def test_handle_can_do_what_its_script_defines(load: Load, source: str) -> None:
    capabilities = Capabilities.ask(load(source).handle())

    assert capabilities == Capabilities(
        size=1 << 20,
        can_write=True,
        can_zero=Support.NATIVE,
        can_fast_zero=False,
        can_trim=True,
        can_fua=Support.EMULATE,
        can_flush=True,
        is_rotational=False,
        can_multi_conn=False,
        can_cache=Support.NATIVE,
        can_extents=True,
        block_size=None,
    )


def test_callbacks_of_version_1_get_no_flags(load: Load) -> None:
    plugin = load(ALL_1)
    handle = plugin.handle()

    for verb, args in EVERYTHING:
        getattr(handle, verb)(*args)

    assert plugin.records == [
        ("handle", b"data", True, 512),
        ("handle",),
        ("handle", 1024, 512),
        ("handle", 1024, 512, True),
        ("handle", 1024, 512, False),
        ("handle", 1024, 512, 0),
        ("handle", 1024, 512, REQ_ONE),
    ]


def test_callbacks_of_version_2_get_flags(load: Load) -> None:
    plugin = load(ALL_2)
    handle = plugin.handle()

    for verb, args in EVERYTHING:
        getattr(handle, verb)(*args)

    assert plugin.records == [
        ("handle", b"data", True, 512, 0),
        ("handle", 0),
        ("handle", 1024, 512, 0),
        ("handle", 1024, 512, MAY_TRIM),
        ("handle", 1024, 512, 0),
        ("handle", 1024, 512, 0),
        ("handle", 1024, 512, REQ_ONE),
    ]


def test_flags_arrive_as_plain_numbers(load: Load) -> None:
    plugin = load(ALL_2)

    plugin.handle().pwrite(memoryview(b"x"), 0, FUA)

    assert plugin.records == [("handle", b"x", True, 0, FUA)]


@pytest.mark.parametrize("source", [ALL_1, ALL_2], ids=["1", "2"])
def test_extents_are_a_list(load: Load, source: str) -> None:
    assert load(source).handle().extents(1024, 512, 0) == [(512, 1024, ExtentType.HOLE | ExtentType.ZERO)]


def test_failure_of_extents_on_the_way_is_one_of_the_callback(load: Load) -> None:
    plugin = load(f"{VERSION_2}\ndef extents(*args):\n    yield (0, 1, 0)\n    raise OSError(28, 'full')\n")

    with pytest.raises(OSError, match="full") as error:
        plugin.handle().extents(512, 0, 0)

    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("source", [ALL_1, ALL_2], ids=["1", "2"])
@pytest.mark.parametrize(("verb", "args"), [("pread", (512, 0)), *EVERYTHING])
def test_failures_are_those_of_the_script(load: Load, source: str, verb: str, args: tuple[Any, ...]) -> None:
    plugin = load(f"{source}\ndef {verb}(*args): raise OSError(28, 'full')\n")

    with pytest.raises(OSError, match="full") as error:
        getattr(plugin.handle(), verb)(*args)

    assert error.value.errno == errno.ENOSPC


# --- reading ---


@pytest.mark.parametrize(
    "expression",
    ["b'ab'", "b'abc'", "bytearray(b'ab')", "memoryview(b'abc')", "memoryview(b'ab').cast('H')", "array('H', b'ab')"],
)
def test_pread_of_version_1_returns_what_has_bytes(load: Load, expression: str) -> None:
    plugin = load("from array import array\n" + VERSION_1.replace("bytes(count)", expression))

    assert bytes(plugin.handle().pread(2, 0)) == b"ab"


def test_pread_of_version_1_returns_bytes_without_copying_them(load: Load) -> None:
    plugin = load("records = [b'some bytes']\n" + VERSION_1.replace("bytes(count)", "records[0]"))

    assert plugin.handle().pread(10, 0) is plugin.records[0]


def test_pread_of_version_1_that_returns_too_little_is_an_error(load: Load) -> None:
    plugin = load(VERSION_1.replace("bytes(count)", "b'a'"))

    with pytest.raises(OSError, match="pread must return 2 bytes, not 1") as error:
        plugin.handle().pread(2, 0)

    assert error.value.errno == errno.EIO


@pytest.mark.parametrize("expression", ["None", "'text'", "7", "[1, 2]"])
def test_pread_of_version_1_that_returns_no_bytes_is_an_error(load: Load, expression: str) -> None:
    plugin = load(VERSION_1.replace("bytes(count)", expression))

    with pytest.raises(TypeError, match="pread must return bytes or the like, not"):
        plugin.handle().pread(2, 0)


def test_pread_of_version_2_fills_the_buffer_that_is_sent(load: Load) -> None:
    plugin = load(
        "records = []\n" + VERSION_2.replace("pass", "records.append((buf.obj, offset, flags)); buf[:] = b'ab'")
    )

    data = plugin.handle().pread(2, 512)

    (record,) = plugin.records
    assert isinstance(record, tuple)
    assert data is record[0]
    assert (bytes(data), record[1:]) == (b"ab", (512, 0))


@pytest.mark.parametrize("data", ["b'a'", "b'abc'"])
def test_pread_of_version_2_cannot_change_the_length(load: Load, data: str) -> None:
    plugin = load(VERSION_2.replace("pass", f"buf[:] = {data}"))

    with pytest.raises(Exception, match="different structures"):
        plugin.handle().pread(2, 0)


@pytest.mark.parametrize("result", ["None", "2", "buf"])
def test_result_of_pread_of_version_2_does_not_matter(load: Load, result: str) -> None:
    plugin = load(VERSION_2.replace("pass", f"return {result}"))

    assert plugin.handle().pread(2, 0) == b"\0\0"


def test_pread_of_version_2_as_if_it_were_1_is_an_error(load: Load) -> None:
    plugin = load(VERSION_2.replace("pass", "return b'ab'"))

    with pytest.raises(TypeError, match="must fill the buffer that it is given, not return bytes: API_VERSION is 2"):
        plugin.handle().pread(2, 0)


# --- zeroing ---


@pytest.mark.parametrize("source", [VERSION_1, VERSION_2], ids=["1", "2"])
@pytest.mark.parametrize("number", ["ENOTSUP", "EOPNOTSUPP"])
@pytest.mark.parametrize("raises", ["", "; raise RuntimeError()"])
def test_zero_may_say_that_it_is_not_supported(load: Load, source: str, number: str, raises: str) -> None:
    plugin = load(
        f"import errno, nbdkit\n{source}\ndef zero(h, count, offset, flags): nbdkit.set_error(errno.{number}){raises}\n"
    )

    with pytest.raises(OSError, match=r".") as error:
        plugin.handle().zero(512, 0, 0)

    assert error.value.errno == getattr(errno, number)


def test_other_numbers_without_an_exception_are_no_failure_of_zero(load: Load) -> None:
    plugin = load(f"import nbdkit\n{VERSION_2}\ndef zero(h, count, offset, flags): nbdkit.set_error(28)\n")

    plugin.handle().zero(512, 0, 0)


def test_version_1_has_no_fast_zero(load: Load) -> None:
    plugin = load(ALL_1 + "def can_fast_zero(h): return True\n")

    with pytest.raises(OSError, match="no fast zero") as error:
        plugin.handle().zero(512, 0, FAST_ZERO)

    assert error.value.errno == errno.ENOTSUP
    assert plugin.records == []


# --- questions ---


YES_OR_NO = (
    "can_write",
    "can_fast_zero",
    "can_trim",
    "can_flush",
    "is_rotational",
    "can_multi_conn",
    "can_extents",
)


@pytest.mark.parametrize("name", YES_OR_NO)
@pytest.mark.parametrize("answer", [True, False])
def test_answers_of_questions_are_the_scripts(
    load: Load, name: str, answer: bool, caplog: pytest.LogCaptureFixture
) -> None:
    handle = load(f"{VERSION_2}\ndef {name}(h): return {answer}\n").handle()

    assert getattr(handle, name)() is answer
    assert not caplog.records


@pytest.mark.parametrize(("answer", "meant"), [("1", True), ("'yes'", True), ("None", False)])
def test_what_is_meant_by_an_answer_counts_and_is_warned_of_once(
    load: Load, caplog: pytest.LogCaptureFixture, answer: str, meant: bool
) -> None:
    plugin = load(f"{VERSION_2}\ndef can_write(h): return {answer}\ndef can_zero(h): return {answer}\n")

    answers = [plugin.handle().can_write() for _ in range(2)]
    support = plugin.handle().can_zero()

    assert answers == [meant, meant]
    assert support is (Support.NATIVE if meant else Support.EMULATE)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert f"can_write returned {answer}, not True or False; taken for {meant}" in caplog.text


def test_zero_is_a_no_without_a_word(load: Load, caplog: pytest.LogCaptureFixture) -> None:
    assert not load(f"{VERSION_2}\ndef can_write(h): return 0\n").handle().can_write()
    assert not caplog.records


@pytest.mark.parametrize("name", ["can_fua", "can_cache"])
@pytest.mark.parametrize(("answer", "support"), [("0", Support.NONE), ("True", Support.EMULATE), ("2", Support.NATIVE)])
def test_answers_that_are_a_support(load: Load, name: str, answer: str, support: Support) -> None:
    handle = load(f"{VERSION_2}\ndef {name}(h): return {answer}\n").handle()

    assert getattr(handle, name)() is support


@pytest.mark.parametrize("answer", ["3", "None", "'native'", "1.0"])
def test_answers_that_are_no_support(load: Load, answer: str) -> None:
    handle = load(f"{VERSION_2}\ndef can_fua(h): return {answer}\n").handle()

    wanted = "can_fua must return one of nbdkit.FUA_NONE, nbdkit.FUA_EMULATE, nbdkit.FUA_NATIVE, not"
    with pytest.raises(ValueError, match=f"{wanted} {answer}"):
        handle.can_fua()


@pytest.mark.parametrize(("flush", "support"), [("def flush(h): pass", Support.EMULATE), ("", Support.NONE)])
def test_version_1_cannot_honour_fua_itself(load: Load, flush: str, support: Support) -> None:
    handle = load(f"import nbdkit\n{VERSION_1}\ndef can_fua(h): return nbdkit.FUA_NATIVE\n{flush}\n").handle()

    assert handle.can_fua() is support


@pytest.mark.parametrize(
    ("answer", "sizes"),
    [
        ("(512, 4096, 65536)", BlockSize(512, 4096, 65536)),
        ("[512, 4096, -1]", BlockSize(512, 4096, 0xFFFFFFFF)),
        ("(0, 0, 0)", None),
    ],
)
def test_block_size(load: Load, answer: str, sizes: BlockSize | None) -> None:
    assert load(f"{VERSION_2}\ndef block_size(h): return {answer}\n").handle().block_size() == sizes


@pytest.mark.parametrize("answer", ["None", "512", "(1, 2)", "(1, 512, '4k')"])
def test_what_is_no_block_size(load: Load, answer: str) -> None:
    handle = load(f"{VERSION_2}\ndef block_size(h): return {answer}\n").handle()

    with pytest.raises(ValueError, match="block_size must return three ints, not"):
        handle.block_size()


@pytest.mark.parametrize("answer", ["'text'", "None"])
def test_export_description(load: Load, answer: str) -> None:
    handle = load(f"{VERSION_2}\ndef export_description(h): return {answer}\n").handle()

    assert repr(handle.export_description()) == answer


def test_size_may_be_anything_that_is_an_integer(load: Load) -> None:
    source = "class Number:\n    def __index__(self): return 42\n"

    assert load(source + VERSION_2.replace("1 << 20", "Number()")).handle().get_size() == 42


@pytest.mark.parametrize("answer", ["None", "1e6", "'1M'"])
def test_what_is_no_size(load: Load, answer: str) -> None:
    with pytest.raises(TypeError, match=r"script.py: get_size must return an int, not"):
        load(VERSION_2.replace("1 << 20", answer)).handle().get_size()


# --- life ---


def test_close_gets_the_handle(load: Load) -> None:
    plugin = load(f"records = []\n{VERSION_2}\ndef close(h): records.append(h)\n")

    plugin.handle().close()

    assert plugin.records == ["handle"]


def test_close_is_not_needed(load: Load) -> None:
    load(VERSION_2).handle().close()


def test_callbacks_may_be_replaced_at_any_time(load: Load) -> None:
    plugin = load(ALL_2 + "def other(h, flags): records.append('other')\n")
    handle = plugin.handle()

    plugin._script.callbacks["flush"] = plugin._script.callbacks["other"]
    handle.flush()

    assert plugin.records == ["other"]


def test_callbacks_may_be_defined_until_the_first_client_comes(load: Load) -> None:
    plugin = load(
        f"{VERSION_2}\ndef config_complete():\n    global pwrite\n    def pwrite(h, buf, offset, flags): pass\n"
    )
    plugin.config_complete()

    assert plugin.handle().can_write()


def test_module_knows_whom_each_verb_is_for(load: Load) -> None:
    plugin = load(
        "import nbdkit\nrecords = []\ndef know(): records.append((nbdkit.export_name(), nbdkit.peer_pid()))\n"
        + VERSION_2.replace("pass", "know()")
        + "def flush(h, flags): know()\n"
    )
    one, two = (plugin.handle(f"export {pid}", client=Client(1, pid=pid)) for pid in (1, 2))

    for handle in (one, two, one):
        handle.pread(1, 0)
        handle.flush()

    names = ["export 1", "export 1", "export 2", "export 2", "export 1", "export 1"]
    assert plugin.records == [(name, int(name[-1])) for name in names]

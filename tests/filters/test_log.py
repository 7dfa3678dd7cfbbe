"""The log filter: everything that clients do is a line that nobody can forge, or a call of a script."""

from __future__ import annotations

import errno
import os
import re
import resource
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from nbdkitpy import BlockSize, Client, ConfigError, Export, Filter, Flags, Handle
from nbdkitpy.backend import VERBS
from nbdkitpy.stack import Stack
from nbdkitpy_filters.log import Log, register_filters
from nbdkitpy_filters.log.sinks import Event, as_line
from tests.nbdclient import PATIENCE
from tests.recorder import Recorder, RecorderHandle, configured, request

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} "
FACTS = "size=0x100000 minsize=0x0 prefsize=0x0 maxsize=0x0"
ABLE = "write=1 flush=1 rotational=0 trim=1 zero=2 fua=2 extents=1 cache=2 fast_zero=1"


class Logged:
    """A recorder whose requests are logged to a file."""

    def __init__(self, path: Path, *words: str, plugin: Recorder | None = None) -> None:
        self.path = path
        self.plugin = plugin or Recorder()
        self.stack: Stack = configured(Log(), f"logfile={path}", *words, plugin=self.plugin)

    def open(self, name: str = "", *, readonly: bool = False, client: Client | None = None) -> Handle:
        return self.stack.open(name, readonly, client or Client(1)).handle

    def lines(self) -> list[str]:
        """What the file holds, without the times, and without what stands in each."""
        lines = self.path.read_text().splitlines()
        assert all(re.match(TIME, line) for line in lines)
        return [line[27:] for line in lines if line[27:] not in ("Ready", "Fork")]


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Logged]:
    found = Logged(tmp_path / "log")
    yield found
    found.stack.unload()


# --- lines ---


def test_server_that_begins_is_logged(tmp_path: Path) -> None:
    stack = Logged(tmp_path / "log").stack
    stack.unload()

    assert [line[27:] for line in (tmp_path / "log").read_text().splitlines()] == ["Ready", "Fork"]


def test_client_is_logged_from_beginning_to_end(logged: Logged) -> None:
    logged.stack.preconnect(Client(1), False)
    logged.stack.list_exports(Client(1), False)
    handle = logged.open("a disk", client=Client(1, tls=True))
    handle.pread(512, 0)
    handle.close()

    assert logged.lines() == [
        "Preconnect id=1 readonly=0 ...",
        "...Preconnect id=1 return=0",
        "ListExports id=1 readonly=0 tls=0 ...",
        '...ListExports id=1 exports=("") return=0',
        f'connection=1 Connect export="a disk" tls=1 {FACTS} {ABLE}',
        "connection=1 Read id=1 offset=0x0 count=0x200 ...",
        "connection=1 ...Read id=1 return=0",
        "connection=1 Disconnect transactions=1",
    ]


REQUEST_LINES = {
    "pread": "Read id=1 offset=0x1000 count=0x200",
    "pwrite": "Write id=1 offset=0x1000 count=0x200 fua=0",
    "flush": "Flush id=1",
    "trim": "Trim id=1 offset=0x1000 count=0x200 fua=0",
    "zero": "Zero id=1 offset=0x1000 count=0x200 trim=0 fua=0 fast=0",
    "cache": "Cache id=1 offset=0x1000 count=0x200",
    "extents": "Extents id=1 offset=0x1000 count=0x200 req_one=0",
}


@pytest.mark.parametrize("verb", VERBS)
def test_request_is_two_lines(logged: Logged, verb: str) -> None:
    handle = logged.open()

    request(handle, verb)

    line = REQUEST_LINES[verb]
    found = ' extents=(0x1000 0x200 "hole,zero")' if verb == "extents" else ""
    end = f"connection=1 ...{line.split()[0]} id=1{found} return=0"
    assert logged.lines()[1:] == [f"connection=1 {line} ...", end]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.ENOSPC, "full"), "ENOSPC"),
        (OSError("no number"), "EIO"),
        (OSError(99999, "no such number"), "EIO"),
        (KeyError("a defect"), "EIO"),
        (SystemExit(1), "EIO"),
    ],
)
def test_request_that_fails_is_logged_with_its_error(
    logged: Logged, verb: str, error: BaseException, name: str
) -> None:
    handle = logged.open()
    logged.plugin.fail(verb, error)

    with pytest.raises(type(error)):
        request(handle, verb)

    action = REQUEST_LINES[verb].split()[0]
    assert logged.lines()[-1] == f"connection=1 ...{action} id=1 return=-1 error={name}"


def test_flags_are_logged(logged: Logged) -> None:
    handle = logged.open()

    handle.pwrite(memoryview(b"x"), 0, Flags.FUA)
    handle.trim(1, 0, Flags.FUA)
    handle.zero(1, 0, Flags.MAY_TRIM | Flags.FUA)
    handle.zero(1, 0, Flags.FAST_ZERO)
    handle.extents(1, 0, Flags.REQ_ONE)

    begins = [line for line in logged.lines() if line.endswith(" ...")]
    assert [line.partition("count=0x1 ")[2] for line in begins] == [
        "fua=1 ...",
        "fua=1 ...",
        "trim=1 fua=1 fast=0 ...",
        "trim=0 fua=0 fast=1 ...",
        "req_one=1 ...",
    ]


def test_each_opening_is_a_connection_with_its_own_numbers(logged: Logged) -> None:
    first, second = logged.open(), logged.open()

    for handle in (second, first, second):
        handle.flush()

    begins = [line for line in logged.lines() if line.endswith(" ...")]
    assert begins == [f"connection={n} Flush id={i} ..." for n, i in ((2, 1), (1, 1), (2, 2))]


def test_what_a_read_only_export_cannot_do_is_logged(logged: Logged) -> None:
    logged.open(readonly=True)

    able = "write=0 flush=1 rotational=0 trim=0 zero=0 fua=0 extents=1 cache=2 fast_zero=0"
    assert logged.lines() == [f'connection=1 Connect export="" tls=0 {FACTS} {able}']


def test_size_constraints_are_logged(tmp_path: Path) -> None:
    class Blocks(RecorderHandle):
        def block_size(self) -> BlockSize | None:
            return BlockSize(512, 4096, 65536)

    class Disks(Recorder):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            return Blocks(self)

    logged = Logged(tmp_path / "log", plugin=Disks())
    logged.open()

    assert "minsize=0x200 prefsize=0x1000 maxsize=0x10000" in logged.lines()[0]
    logged.stack.unload()


def test_client_that_is_refused_is_logged(logged: Logged) -> None:
    def refuse(client: Client, readonly: bool) -> None:
        raise PermissionError(errno.EACCES, "no")

    logged.plugin.preconnect = refuse  # type: ignore[method-assign]

    with pytest.raises(PermissionError):
        logged.stack.preconnect(Client(1), True)

    assert logged.lines() == ["Preconnect id=1 readonly=1 ...", "...Preconnect id=1 return=-1 error=EACCES"]


def test_export_that_is_not_opened_is_no_connection(logged: Logged) -> None:
    logged.plugin.fail("open", OSError(errno.ENOENT, "no such disk"))

    with pytest.raises(OSError, match="no such disk"):
        logged.open()

    assert logged.lines() == []


def test_handle_is_closed_if_it_cannot_be_asked(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Log, "write", fail)

    with pytest.raises(MemoryError):
        logged.open()

    assert logged.plugin.calls[-1] == ("close", 1)


def test_list_that_fails_or_has_no_end(logged: Logged) -> None:
    def endless(client: Client, readonly: bool) -> Iterable[Export]:
        yield from iter(lambda: Export("disk"), None)

    def failing(client: Client, readonly: bool) -> Iterable[Export]:
        yield Export("disk")
        raise OSError(errno.EPERM, "no")

    for answer, error in ((endless, ValueError), (failing, OSError)):
        logged.plugin.list_exports = answer  # type: ignore[method-assign]
        with pytest.raises(error):
            logged.stack.list_exports(Client(1), False)

    lines = logged.lines()
    assert lines[1] == "...ListExports id=1 exports=(" + " ".join(['"disk"'] * 1000) + ") return=0"
    assert lines[3] == "...ListExports id=2 return=-1 error=EPERM"


def test_F5_no_name_of_an_export_forges_a_line_or_acts_on_a_terminal(logged: Logged) -> None:
    logged.open('a$b`c\\d"e')
    logged.open("one\nconnection=7 Disconnect\r\x1b[2J\x85\u2028é\U0001f4be")

    names = [line.partition("export=")[2].partition(" tls=")[0] for line in logged.lines()]
    assert names == [
        r'"a\$b\`c\\d\"e"',
        r'"one\nconnection=7 Disconnect\r\x1b[2J\x85\u2028é💾"',
    ]


def test_times_are_in_utc(tmp_path: Path) -> None:
    code = f"""
import datetime, sys
from nbdkitpy_filters.log.sinks import Event, LogFile
before = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
LogFile({str(tmp_path / "log")!r}, append=False).write(Event("PRINT", "Fork"))
print((datetime.datetime.fromisoformat(open({str(tmp_path / "log")!r}).read()[:26]) - before).total_seconds())
"""
    environment = {**os.environ, "TZ": "XYZ-9"}

    output = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)

    assert -1 < float(output.stdout) < PATIENCE


def test_extents_are_all_logged_up_to_a_thousand(logged: Logged) -> None:
    kinds = ['""', '"hole"', '"zero"', '"hole,zero"']

    class Many(RecorderHandle):
        def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
            return ((offset + n, 1, n % 4) for n in range(count))

    logged.plugin.open = lambda *_: Many(logged.plugin)  # type: ignore[method-assign]
    handle = logged.open()

    handle.extents(4, 0, 0)
    assert len(list(handle.extents(5000, 0, 0))) == 5000

    few, many = [line for line in logged.lines() if "extents=(" in line]
    assert f"extents=({' '.join(f'{n:#x} 0x1 {kind}' for n, kind in enumerate(kinds))}) return=0" in few
    assert many.count(" 0x1 ") == 1000


# --- the file ---


@pytest.mark.parametrize(("words", "kept"), [((), False), (["logappend=false"], False), (["logappend=true"], True)])
def test_file_is_emptied_unless_it_is_to_be_kept(tmp_path: Path, words: list[str], kept: bool) -> None:
    (tmp_path / "log").write_text("before\n")

    Logged(tmp_path / "log", *words).stack.unload()

    assert ("before" in (tmp_path / "log").read_text()) is kept


def test_file_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^log: logfile .*/nowhere/log cannot be opened: No such file or directory$"):
        Logged(tmp_path / "nowhere" / "log")


def test_full_disk_makes_no_request_fail_and_is_told_once(logged: Logged, caplog: pytest.LogCaptureFixture) -> None:
    handle = logged.open()
    size = logged.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        for _ in range(3):
            handle.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    handle.close()

    (record,) = caplog.records
    assert record.getMessage() == f"log: cannot write to {logged.path}: File too large; it lacks lines from now on"
    assert logged.plugin.requests == [("flush",)] * 3
    assert logged.lines()[-1] == "connection=1 Disconnect transactions=3"


def test_lines_of_many_threads_do_not_mix(logged: Logged) -> None:
    handle = logged.open()

    def work() -> None:
        for _ in range(200):
            handle.pread(512, 0)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    lines = logged.lines()[1:]
    assert len(lines) == 2 * 1600
    assert {line for line in lines if "..." not in line} == set()
    assert len(set(lines)) == len(lines)


def test_descriptor_is_closed_at_the_end(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))

    stack = Logged(tmp_path / "log").stack
    stack.unload()
    stack.unload()

    assert set(os.listdir("/proc/self/fd")) == before


# --- the script ---


def run_by_script(tmp_path: Path, script: str, use: Callable[[Stack], object]) -> list[str]:
    """What `script` prints, in the file $out, while `use` is made of a stack."""
    out = tmp_path / "out"
    stack = configured(Log(), f"logscript=out={shlex.quote(str(out))}; {script}")
    use(stack)
    stack.unload()
    return out.read_text().splitlines()


def test_script_has_what_happened_as_variables(tmp_path: Path) -> None:
    def use(stack: Stack) -> None:
        export = stack.open("it's $(a) disk", False, Client(1))
        export.handle.pread(512, 0)
        stack.plugin.fail("flush", OSError(errno.EPERM, "no"))  # type: ignore[attr-defined]
        with pytest.raises(OSError, match="no"):
            export.handle.flush()
        export.close()

    words = "$connection $type $id $act $offset $count $return $error $export $size $transactions"

    assert run_by_script(tmp_path, f"echo {words} >>$out", use) == [
        "PRINT Ready",
        "PRINT Fork",
        "1 PRINT Connect it's $(a) disk 0x100000",
        "1 ENTER 1 Read 0x0 0x200",
        "1 LEAVE 1 Read 0",
        "1 ENTER 2 Flush",
        "1 LEAVE 2 Flush -1 EPERM",
        "1 PRINT Disconnect 2",
    ]


def test_script_has_lists_as_words(tmp_path: Path) -> None:
    def use(stack: Stack) -> None:
        stack.plugin.list_exports = lambda *_: [Export("a b"), Export("c'd")]  # type: ignore[method-assign]
        stack.list_exports(Client(1), False)
        stack.open("", False, Client(1)).handle.extents(512, 0, 0)

    script = '[ $type = LEAVE ] && eval "set -- $exports $extents"; for word; do echo "$word"; done >>$out'

    assert run_by_script(tmp_path, script, use) == ["a b", "c'd", "0x0", "0x200", "hole,zero"]


def test_what_becomes_of_the_script_does_not_matter(tmp_path: Path) -> None:
    def use(stack: Stack) -> None:
        assert stack.open("", False, Client(1)).handle.pread(512, 0) == bytes(512)

    assert len(run_by_script(tmp_path, "echo >>$out; cat; exit 3", use)) == 5


def test_script_that_cannot_be_run_makes_no_request_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "run", fail)
    stack = configured(Log(), "logscript=true")

    stack.open("", False, Client(1)).handle.flush()

    assert "log: cannot run the logscript: Resource temporarily unavailable" in caplog.messages


def test_file_and_script_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    logged = Logged(tmp_path / "log", f"logscript=echo $act >>{shlex.quote(str(out))}")

    logged.open().flush()
    logged.stack.unload()

    assert len(logged.lines()) == 3
    assert out.read_text().split() == ["Ready", "Fork", "Connect", "Flush", "Flush"]


# --- odds and ends ---


def test_without_parameters_everything_goes_past_the_filter() -> None:
    stack = configured(Log())

    handle = stack.open("", False, Client(1)).handle

    assert handle.inline == RecorderHandle.inline
    assert handle.file_range is not None
    assert len(stack.list_exports(Client(1), False)) == 1


def test_logged_reads_have_no_shortcuts(logged: Logged) -> None:
    handle = logged.open()

    assert (handle.pread_into, handle.file_range, handle.sparse) == (None, None, False)


def test_event_without_anything_is_its_name() -> None:
    assert as_line(Event("PRINT", "Fork")) == "Fork"


@pytest.mark.parametrize("word", ["logfile=", "logappend=maybe"])
def test_what_is_no_value_is_a_configuration_error(word: str) -> None:
    with pytest.raises(ConfigError, match=f"^log: {word.partition('=')[0]} must be"):
        configured(Log(), word)


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Log]

"""Files and names of exports: nothing acts on who reads a log, and what a file cannot do is an error of that request.

Names begin with the number of the threat that a test is about: F1 to F11. Most of these lie beside the file plugin.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdkitpy import Filter
from nbdkitpy.protocol.constants import Command, CommandFlag, NbdError, Option, OptionReply
from nbdkitpy_filters.blocksize import Blocksize
from nbdkitpy_filters.cow import Cow
from nbdkitpy_filters.offset import Offset
from nbdkitpy_plugins.file import FilePlugin, linux
from tests.conftest import StartServer
from tests.interop.harness import Servers, full_image
from tests.nbdclient import NbdClient, OptionAnswer, Refused, Style
from tests.serving import Disk, Disks

MIB = 1 << 20


def configured(**parameters: object) -> FilePlugin:
    plugin = FilePlugin()
    for key, value in parameters.items():
        plugin.config(key, str(value))
    return plugin


# --- F5 and F6: names of exports ---

#: As they come over the wire. With each of these somebody might be taken in, or a terminal.
NAMES = [
    b"a\nnbdkitpy: error: forged",
    b"a\r\nnbdkitpy[1]: forged\r",
    b"\x1b[2J\x1b]0;title\x07\x9b1m\x08\x7f",
    "\u202egnp.exe\u2028\u2029\x85\ufeff\u200b\U000e0041".encode(),
    b"%s%n%(name)s{0}%999999999d",
    b'"; touch /tmp/x; `id` $(id) \\',
    b"x" * 4096,
    b"\x1b" * 4096,
    b"\xff\xfe\xf0\x9f\x92",
    b"\xed\xa0\x80",
    b"a\0b",
]


def go_data(name: bytes) -> bytes:
    return struct.pack(f">I{len(name)}sH", len(name), name, 0)


def ask_for(client: NbdClient, option: Option, name: bytes) -> list[OptionAnswer]:
    """Ask for an export by its bytes, and return the answers; none to EXPORT_NAME, which has none."""
    client.greet()
    if option is Option.EXPORT_NAME:
        client.send_option(option, name)
        client.at_end()
        return []
    client.send_option(option, go_data(name))
    return client.option_answers(option)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("served", ["any name", "no such name"])
def test_F5_no_name_acts_on_a_terminal_or_forges_a_line(serve: Servers, tmp_path: Path, served: str, form: str) -> None:
    log, requests = tmp_path / "log", tmp_path / "requests"
    plugin = ["memory", "1M"] if served == "any name" else ["file", f"dir={tmp_path}"]
    server = serve("-v", f"--log-format={form}", f"--log={log}", "--filter=log", *plugin, f"logfile={requests}")

    texts: list[bytes] = []
    for name in NAMES:
        for option in (Option.GO, Option.INFO, Option.EXPORT_NAME):
            with NbdClient(server.connect()) as client:
                answers = ask_for(client, option, name)
            texts += [answer.data for answer in answers if answer.reply & 1 << 31]
    server.end()

    for path in (log, requests, server._log):
        lines = path.read_bytes().decode().split("\n")
        assert all(map(str.isprintable, lines))
        assert not [line for line in lines if "forged" in line and not line.startswith(("nbdkitpy: ", "20", "{"))]
    said = [json.loads(line)["message"] if form == "json" else line for line in server.log()]
    assert all(map(str.isprintable, said))
    assert all(len(line) < 700 for line in said)
    assert all(text.decode().isprintable() and len(text) <= 1024 for text in texts)
    assert len(texts) >= (6 if served == "any name" else 2 * len(NAMES))


def test_F6_names_that_are_no_utf8_are_refused_and_the_handshake_goes_on(
    start_server: StartServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    with open(os.fsencode(tmp_path) + b"/\xff\xfe", "wb") as odd:
        odd.write(bytes(512))
    server = start_server(configured(dir=tmp_path))
    client = server.dial()
    client.greet()

    for option in (Option.GO, Option.INFO):
        client.send_option(option, go_data(b"\xff\xfe"))
        (answer,) = client.option_answers(option)
        assert answer.reply == OptionReply.ERR_INVALID

    assert client.exports() == ["disk"]
    client.go("disk")
    assert client.read(0, 512) == bytes(512)
    with server.dial() as other:
        assert ask_for(other, Option.EXPORT_NAME, b"\xff\xfe") == []
    server.wait_for_sessions(1)
    assert not [record for record in caplog.records if record.exc_info]


# --- F7: files that lose their end ---

FILTERS: dict[str, Callable[[], list[Filter]]] = {
    "file": list,
    "blocksize": lambda: [Blocksize()],
    "cow": lambda: [Cow()],
    "offset": lambda: [Offset()],
}

LENGTHS = (1, 512, 4096, 32769, 65536, 131073, 262144, 2 * MIB)


@pytest.mark.parametrize("cache", ["default", "none"])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("style", Style)
def test_F7_what_a_file_has_lost_is_an_error_of_each_read_and_never_zeroes(
    start_server: StartServer, tmp_path: Path, style: Style, filters: str, cache: str
) -> None:
    image = full_image(tmp_path / "disk.img", 4 * MIB)
    kept = image.read_bytes()[: 2 * MIB]
    server = start_server(configured(file=image, cache=cache), *FILTERS[filters]())
    client = server.connect(style, contexts=style is not Style.SIMPLE)
    assert len(client.read(0, 4 * MIB)) == 4 * MIB  # all is in the page cache

    os.truncate(image, 2 * MIB)

    for length in LENGTHS:
        for offset in {2 * MIB - length // 2 - length % 2, 2 * MIB, 4 * MIB - length}:
            reply = client.call(Command.READ, offset, length)
            lost = offset + length > 2 * MIB
            assert reply.error == (NbdError.EIO if lost else 0), (offset, length)
            assert client.read(0, length)[: 2 * MIB] == kept[:length]
    if style is not Style.SIMPLE:
        reply = client.call(Command.BLOCK_STATUS, 2 * MIB, 2 * MIB)
        assert reply.error or {kind for _, kind in reply.extents} == {0}  # data
    client.disconnect()


# --- F9: what cannot be written ---


def write(client: NbdClient) -> int:
    return client.call(Command.WRITE, 0, data=b"x" * 4096).error


def write_durably(client: NbdClient) -> int:
    return client.call(Command.WRITE, 0, data=b"x" * 4096, flags=CommandFlag.FUA).error


def zero(client: NbdClient) -> int:
    return client.call(Command.WRITE_ZEROES, 0, 4096).error


def flush(client: NbdClient) -> int:
    return client.call(Command.FLUSH).error


ERRORS = {
    errno.ENOSPC: NbdError.ENOSPC,
    errno.EDQUOT: NbdError.ENOSPC,
    errno.EFBIG: NbdError.ENOSPC,
    errno.EIO: NbdError.EIO,
    errno.EROFS: NbdError.EPERM,
}


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("request_", [write, write_durably, zero], ids=lambda request_: request_.__name__)
def test_F9_error_of_the_file_is_the_clients_and_later_requests_are_carried_out(
    start_server: StartServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request_: Callable[[NbdClient], int],
    number: int,
) -> None:
    image = full_image(tmp_path / "disk.img", 65536)
    client = start_server(configured(file=image)).connect()

    def fail(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        for name in ("punch_hole", "zero_range", "allocate"):
            patched.setattr(linux, name, fail)
        refused = request_(client)

    assert refused == ERRORS[number]
    assert request_(client) == 0
    client.disconnect()


@pytest.mark.parametrize("first", [flush, write_durably], ids=lambda first: first.__name__)
def test_F9_once_a_flush_has_failed_none_succeeds_on_any_connection(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: Callable[[NbdClient], int]
) -> None:
    failures = iter([OSError(errno.EIO, "lost")])

    def fdatasync(fd: int) -> None:
        for failure in failures:  # the system tells it once
            raise failure

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    server = start_server(configured(file=full_image(tmp_path / "disk.img", 65536)))
    one = server.connect()

    assert first(one) == NbdError.EIO

    assert (flush(one), write_durably(one), write(one)) == (NbdError.EIO, NbdError.EIO, 0)
    one.disconnect()
    other = server.connect()
    assert (flush(other), write_durably(other)) == (NbdError.EIO, NbdError.EIO)
    other.disconnect()


def test_F9_limit_of_file_sizes_is_no_end_of_the_server(serve: Servers, tmp_path: Path) -> None:
    image = full_image(tmp_path / "disk.img", 65536)
    before = image.read_bytes()
    server = serve("--log=null", "file", image)
    client, other = NbdClient(server.connect()).negotiate(), NbdClient(server.connect()).negotiate()

    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    client.write(4096, b"x" * 4096)
    beyond = [client.call(Command.WRITE, offset, data=b"y" * 4096, flags=flags).error
              for offset in (8192, 6144, 61440) for flags in (0, CommandFlag.FUA)]  # fmt: skip

    assert beyond == [NbdError.ENOSPC] * 6
    assert other.read(8192, 4096) == before[8192:12288]
    client.write(0, b"z" * 512)
    assert image.stat().st_size == 65536
    for each in (client, other):
        each.disconnect()


# --- F10: sizes ---


def test_F10_size_is_that_of_the_beginning_of_each_connection(start_server: StartServer, tmp_path: Path) -> None:
    image = full_image(tmp_path / "disk.img", MIB)
    server = start_server(configured(file=image))
    old = server.connect()

    os.truncate(image, 2 * MIB)
    new = server.connect()

    assert (old.size, new.size) == (MIB, 2 * MIB)
    assert old.call(Command.READ, MIB, 512).error == NbdError.EINVAL
    assert old.call(Command.WRITE, MIB - 256, data=bytes(512)).error == NbdError.ENOSPC
    assert old.call(Command.TRIM, MIB - 256, 512).error == NbdError.EINVAL
    assert new.read(MIB, 512) == bytes(512)
    os.truncate(image, 4096)
    assert old.call(Command.WRITE_ZEROES, 512, 512).error == 0
    assert image.stat().st_size == 4096
    for client in (old, new):
        client.disconnect()


@pytest.mark.parametrize("size", [1 << 63, (1 << 63) + 512, (1 << 64) - 1, 1 << 64, -1])
def test_F10_disk_of_2_to_the_63_bytes_or_more_is_refused(
    start_server: StartServer, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    class Huge(Disk):
        def get_size(self) -> int:
            return size

    plugin = Disks(Huge)
    client = start_server(plugin).dial()
    client.greet()

    with pytest.raises(Refused) as refused:
        client.go()

    assert refused.value.reply is OptionReply.ERR_UNKNOWN
    assert str(size) in caplog.text
    assert client.exports() == [""]  # it is still in step
    assert (plugin.opened, plugin.closed) == (1, 1)


def test_F10_largest_disk_is_served_to_its_end(start_server: StartServer) -> None:
    largest = (1 << 63) - 1

    class Largest(Disk):
        def get_size(self) -> int:
            return largest

        def pread(self, count: int, offset: int) -> bytes:
            return bytes(count)

    client = start_server(Disks(Largest)).connect()

    assert client.size == largest
    assert client.read(largest - 512, 512) == bytes(512)
    for offset, length in ((largest - 1, 2), (largest, 1), ((1 << 64) - 1, 1)):
        assert client.call(Command.READ, offset, length).error == NbdError.EINVAL
    client.disconnect()

"""Flaws that other servers had, each by the number under which it is known, and that this one does not have.

Those about the handshake and about requests stand with the rest of that, in ``test_handshake.py``, ``test_requests.py``
and ``test_filters.py``; those of one part of ours with the tests of that part.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdkitpy import Client, Handle
from nbdkitpy.protocol.constants import Command, InfoType, Option, OptionReply
from tests.conftest import StartServer
from tests.interop.harness import Server, Servers
from tests.nbdclient import PATIENCE, NbdClient, Refused, Style, go_data
from tests.serving import CONTENT, SIZE, Disks
from tests.threats.hostile import OPTION_MAGIC, meta_data, option

#: Seconds in which something has to happen that should happen at once, on a busy machine.
AT_ONCE = 5.0

STYLES = pytest.mark.parametrize("style", list(Style), ids=lambda style: style.value)


class Named(Disks):
    """Serves every name but those that begin with "missing", of which it says that they are."""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if export_name.startswith("missing"):
            raise OSError(errno.ENOENT, f'there is no export "{export_name}"')
        return super().open(export_name, readonly, client)


# --- handshakes ---

#: How far a client gets: what it sends after its flags, and which of its options is answered.
UNFINISHED: dict[bytes, list[int]] = {
    b"": [],
    option(Option.LIST): [Option.LIST],
    option(Option.STRUCTURED_REPLY) + option(Option.SET_META_CONTEXT, meta_data()): [
        Option.STRUCTURED_REPLY,
        Option.SET_META_CONTEXT,
    ],
    option(Option.LIST) + option(Option.GO, go_data())[:-1]: [Option.LIST],
    option(99) + option(Option.EXPORT_NAME, length=1): [99],
}


def test_N5_CVE_2019_14850_handshakes_that_are_not_finished_open_nothing(start_server: StartServer) -> None:
    plugin = Disks()
    server = start_server(plugin)
    for sent, answered in list(UNFINISHED.items()) * 20:
        client = server.dial()
        client.greet()
        client.send_bytes(sent)
        for number in answered:
            client.option_answers(number)

    assert plugin.opened == 0
    server.connect().read(0, 1)
    assert plugin.opened == 1


#: What a client may ask for on its way, and the answer.
ASKED: list[tuple[int, bytes, OptionReply]] = [
    (Option.INFO, go_data("", InfoType.NAME), OptionReply.ACK),
    (Option.INFO, go_data("missing"), OptionReply.ERR_UNKNOWN),
    (Option.GO, go_data("missing"), OptionReply.ERR_UNKNOWN),
    (Option.GO, go_data("no\0name"), OptionReply.ERR_INVALID),
    (Option.LIST, b"", OptionReply.ACK),
    (Option.LIST_META_CONTEXT, meta_data(b"missing"), OptionReply.ACK),
]
#: How it ends, and whether that opens the export.
ENDS = {
    option(Option.GO, go_data()): True,
    option(Option.EXPORT_NAME): True,
    option(Option.EXPORT_NAME, b"missing"): False,
    option(Option.ABORT): False,
    struct.pack(">IHHQQI", 0x25609513, 0, Command.READ, 1, 0, 512): False,
    b"": False,
}


def test_CVE_2019_14851_options_in_any_order_do_no_harm(start_server: StartServer) -> None:
    plugin = Named()
    server = start_server(plugin)
    ends = itertools.cycle(ENDS.items())
    opened = 0

    for order in itertools.permutations(ASKED, 4):
        end, opens = next(ends)
        client = server.dial()
        client.greet()
        client.send_bytes(b"".join(option(number, data) for number, data, _ in order))
        assert [client.option_answers(number)[-1].reply for number, _, _ in order] == [reply for _, _, reply in order]
        client.send_bytes(end)
        client.socket.close()
        opened += opens + [asked[:2] for asked in order].count(ASKED[0][:2])
    server.wait_for_sessions(0)

    assert plugin.opened == plugin.closed == opened
    assert server.connect().read(0, 512) == CONTENT[:512]


@pytest.mark.parametrize("number", [99, Option.LIST, Option.GO, Option.EXPORT_NAME, Option.SET_META_CONTEXT])
def test_CVE_2017_15119_client_that_sends_gigabytes_of_an_option_is_left_at_once(
    number: int, start_server: StartServer
) -> None:
    server = start_server()
    client = server.dial()
    client.greet()
    client.send_bytes(option(number, length=0xFFFFFFF0))
    sent = 0

    with contextlib.suppress(ConnectionError):
        while sent < 64 << 20:
            sent += client.socket.send(bytes(1 << 20))

    assert sent < 64 << 20
    server.wait_for_sessions(0)


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", "\x1b", "\u202e"], ids=ascii)
@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_CVE_2020_10761_error_about_the_longest_name_is_short_text(
    number: Option, character: str, start_server: StartServer
) -> None:
    client = start_server(Named()).dial()
    client.greet()
    name = "missing!" + character * ((4096 - 8) // len(character.encode()))

    with pytest.raises(Refused) as caught:  # whose text has been decoded
        client.go(name, option=number)

    assert caught.value.text.startswith('there is no export "missing!')
    assert caught.value.text.isprintable()
    assert len(caught.value.text.encode()) <= 4096
    client.go()


def test_CVE_2024_7409_silent_clients_neither_pile_up_nor_keep_the_server_from_ending(
    start_server: StartServer,
) -> None:
    server = start_server(max_handshakes=50, handshake_timeout=3600.0, drain=60.0)
    good = server.connect()
    for sent in itertools.islice(itertools.cycle(UNFINISHED), 200):
        client = server.dial()
        client.greet()
        client.send_bytes(sent)
    server.wait_for_sessions(51)
    assert good.read(0, 512) == CONTENT[:512]
    assert server.connect().read(0, 512) == CONTENT[:512]
    begin = time.monotonic()

    assert server.stop()

    assert time.monotonic() - begin < AT_ONCE


@pytest.mark.parametrize("workers", [0, 2])
def test_CVE_2013_7441_CVE_2011_1925_client_that_leaves_early_or_names_no_export_ends_its_connection_only(
    workers: int, serve: Servers, tmp_path: Path
) -> None:
    (tmp_path / "disks").mkdir()
    (tmp_path / "disks" / "disk").write_bytes(CONTENT)
    server = serve(f"--workers={workers}", "file", f"dir={tmp_path}/disks")
    stages = [b"", b"\0\0", b"\0\0\0\3", b"\0\0\0\3" + OPTION_MAGIC, b"\0\0\0\3" + option(Option.LIST)]

    for stage in stages * 20:
        with server.connect() as sock:
            sock.sendall(stage)
    for number in range(100):
        with NbdClient(server.connect()) as client:
            client.greet()
            if number % 2:
                client.send_option(Option.EXPORT_NAME, b"missing")
                assert client.at_end()
            else:
                with pytest.raises(Refused):
                    client.go("missing")

    with NbdClient(server.connect()).negotiate(name="disk") as client:
        assert client.read(0, SIZE) == CONTENT
    assert [line for line in server.end() if "No such file or directory" not in line] == []


# --- signals ---


@contextlib.contextmanager
def storm(server: Server) -> Iterator[None]:
    """Have many clients come and go meanwhile; none of them may be left without an answer."""
    is_over = threading.Event()
    left_alone: list[BaseException] = []

    def visit(some: random.Random) -> None:
        try:
            with NbdClient(server.connect()) as client:
                if some.random() < 0.5:
                    client.negotiate()
                    client.send(Command.READ, 0, 4096)
        except TimeoutError as error:
            left_alone.append(error)
        except (OSError, EOFError, Refused):  # the server is at its end
            pass

    def come_and_go(some: random.Random) -> None:
        while not is_over.is_set():
            visit(some)

    threads = [threading.Thread(target=come_and_go, args=(random.Random(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join(2 * PATIENCE)
    assert not left_alone


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("last", [signal.SIGTERM, signal.SIGINT])
def test_CVE_2015_0847_signals_while_clients_come_and_go_lock_nothing_up(
    workers: int, last: signal.Signals, serve: Servers, tmp_path: Path
) -> None:
    (tmp_path / "disk").write_bytes(CONTENT)
    server = serve(f"--workers={workers}", "file", tmp_path / "disk")

    with storm(server):
        for _ in range(300):
            os.kill(server.pid, signal.SIGHUP)
            server.connect().close()  # so much goes on between two signals
    with NbdClient(server.connect()).negotiate() as client:
        assert client.read(0, 512) == CONTENT[:512]
    with storm(server):
        os.kill(server.pid, last)
        lines = server.wait()

    assert {re.sub(r"\[\d+\]", "", line) for line in lines} <= {"nbdkitpy: reload: nothing to reload"}


# --- logs ---


@pytest.mark.parametrize("workers", [0, 2])
def test_nbdkit_1_44_verbose_messages_of_many_clients_do_not_mix(workers: int, serve: Servers, tmp_path: Path) -> None:
    server = serve("-v", f"--workers={workers}", "null", "1M")
    names = [f"{number:03}-" + chr(0x61 + number % 26) * 200 for number in range(200)]

    def visit(names: list[str]) -> None:
        for name in names:
            with NbdClient(server.connect()) as client:
                client.negotiate(name=name).disconnect()

    visitors = [threading.Thread(target=visit, args=(names[number::8],)) for number in range(8)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(PATIENCE)

    lines = server.end()
    found = [re.fullmatch(r'.*: opened export "(.*?)": Capabilities\(.*\)', line) for line in lines]
    assert sorted(match[1] for match in found if match) == names
    assert all(line.startswith("nbdkitpy: ") and line.count("nbdkitpy: ") == 1 for line in lines)

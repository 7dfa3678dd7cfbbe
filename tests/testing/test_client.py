"""The client that authors have: all verbs, in all forms, by all ways to a server."""

from __future__ import annotations

import errno
import socket
import ssl
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import BlockSize, Client, Export, Extent, ExtentType, Flags, Handle, Plugin, Support, serve
from nbdkitpy.testing import (
    Command,
    CommandFlag,
    ExportInfo,
    NbdClient,
    Refused,
    Style,
    TransmissionFlag,
    export_info,
    list_exports,
)
from nbdkitpy.testing.client import _Uri

SIZE = 1 << 20


class Disks(Plugin):
    """Exports "one" and "two", and notes what it is asked."""

    name = "disks"

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []
        self.closed = threading.Semaphore(0)

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return [Export("one", "the first"), Export("two")]

    def default_export(self, client: Client, readonly: bool) -> str:
        return "one"

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if export_name not in ("one", "two"):
            raise OSError(errno.ENOENT, "there are one and two")
        return DiskHandle(self)


class DiskHandle(Handle):
    """Reads as zeroes."""

    def __init__(self, plugin: Disks) -> None:
        self.plugin = plugin
        self.note = plugin.calls.append

    def get_size(self) -> int:
        return SIZE

    def can_fua(self) -> Support:
        return Support.NATIVE

    def can_fast_zero(self) -> bool:
        return True

    def block_size(self) -> BlockSize:
        return BlockSize(512, 4096, 1 << 20)

    def export_description(self) -> str:
        return "zeroes"

    def pread(self, count: int, offset: int) -> bytes:
        if offset == 512:
            raise OSError(errno.ENOMEM, "no room")
        self.note(("pread", count, offset))
        return bytes(count)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.note(("pwrite", bytes(data), offset, flags))

    def flush(self) -> None:
        self.note(("flush",))

    def trim(self, count: int, offset: int, flags: int) -> None:
        self.note(("trim", count, offset, flags))

    def zero(self, count: int, offset: int, flags: int) -> None:
        if flags & Flags.FAST_ZERO:
            raise OSError(errno.ENOTSUP, "slow")
        self.note(("zero", count, offset, flags))

    def cache(self, count: int, offset: int) -> None:
        self.note(("cache", count, offset))

    def extents(self, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
        return [Extent(0, 4096, ExtentType.HOLE | ExtentType.ZERO), Extent(4096, SIZE - 4096)]

    def close(self) -> None:
        self.plugin.closed.release()


@pytest.mark.parametrize("style", Style)
def test_all_verbs_in_all_forms(style: Style) -> None:
    disks = Disks()

    with serve(disks, listen=False) as server, NbdClient(server, style=style) as client:
        assert client.wire.style is style
        assert client.pread(1024, 4096) == bytes(1024)
        client.pwrite(b"x" * 512, 1024)
        client.pwrite(b"y" * 512, 0, CommandFlag.FUA)
        client.flush()
        client.trim(512, 1024)
        client.trim(512, 1024, CommandFlag.FUA)
        client.zero(512, 2048)
        client.zero(512, 2048, CommandFlag.NO_HOLE | CommandFlag.FUA)
        client.cache(512, 4096)

    assert disks.calls == [
        ("pread", 1024, 4096),
        ("pwrite", b"x" * 512, 1024, 0),
        ("pwrite", b"y" * 512, 0, Flags.FUA),
        ("flush",),
        ("trim", 512, 1024, 0),
        ("trim", 512, 1024, Flags.FUA),
        ("zero", 512, 2048, Flags.MAY_TRIM),
        ("zero", 512, 2048, Flags.FUA),
        ("cache", 512, 4096),
    ]


@pytest.mark.parametrize("style", [Style.STRUCTURED, Style.EXTENDED])
def test_extents(style: Style) -> None:
    with serve(Disks, listen=False) as server, NbdClient(server, style=style) as client:
        assert client.has_extents
        assert client.extents(8192, 2048) == [Extent(2048, 2048, 3), Extent(4096, 6144)]
        assert client.extents(8192, 2048, CommandFlag.REQ_ONE) == [Extent(2048, 2048, 3)]


def test_without_structured_replies_there_are_no_extents() -> None:
    with serve(Disks, listen=False) as server, NbdClient(server, style=Style.SIMPLE) as client:
        assert not client.has_extents
        with pytest.raises(OSError) as caught:
            client.extents(512, 0)

    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("style", Style)
def test_errors_are_those_that_the_server_has_sent(style: Style) -> None:
    with serve(Disks, listen=False) as server, NbdClient(server, style=style) as client:
        with pytest.raises(OSError) as caught:
            client.pread(512, 512)
        with pytest.raises(OSError) as refused:
            client.zero(512, 0, CommandFlag.FAST_ZERO)
        assert client.pread(512, 0) == bytes(512)

    text = "Cannot allocate memory" if style is Style.SIMPLE else "no room"
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOMEM, text)
    assert refused.value.errno == errno.ENOTSUP


def test_several_requests_may_be_under_way() -> None:
    with serve(Disks, listen=False) as server, NbdClient(server) as client:
        wrong = client.submit(Command.READ, 512, 512)
        reads = [client.submit(Command.READ, 4096 * number, 512 * number) for number in range(1, 9)]

        assert [len(client.result(cookie).data) for cookie in reversed(reads)] == [512 * n for n in range(8, 0, -1)]
        with pytest.raises(OSError, match="no room"):
            client.result(wrong)


def test_what_the_server_says_of_an_export() -> None:
    expected = ExportInfo(SIZE, TransmissionFlag.HAS_FLAGS, "one", "zeroes", BlockSize(512, 4096, 1 << 20))

    with serve(Disks, listen=False) as server, NbdClient(server) as client:
        assert client.info._replace(flags=TransmissionFlag.HAS_FLAGS) == expected
        assert client.flags & TransmissionFlag.SEND_FUA
        assert client.size == SIZE
        info = export_info(server)
        assert info.name == "one"
        assert export_info(server, "two")._replace(name="one", flags=info.flags) == info


def test_exports_are_listed() -> None:
    with serve(Disks, listen=False) as server:
        assert list_exports(server) == [Export("one", "the first"), Export("two")]


@pytest.mark.parametrize("ask", [NbdClient, export_info])
def test_an_export_that_is_not_there(ask: Any) -> None:
    with serve(Disks, listen=False) as server, pytest.raises(Refused, match="there are one and two") as caught:
        ask(server, "three")

    assert caught.value.errno == errno.ENOENT


def test_a_client_takes_its_leave_or_does_not() -> None:
    disks = Disks()

    with serve(disks, listen=False) as server:
        for leave in (NbdClient.close, NbdClient.abort):
            leave(NbdClient(server))
            assert disks.closed.acquire(timeout=20)


def test_a_client_can_be_closed_when_the_server_has_gone() -> None:
    with serve(Disks, listen=False) as server:
        client = NbdClient(server)

    client.close()


# --- ways to a server ---


@pytest.mark.parametrize("way", [{}, {"tcp": ("127.0.0.1", 0)}, {"tcp": ("::1", 0)}], ids=["unix", "IPv4", "IPv6"])
def test_a_uri(way: Any) -> None:
    with serve(Disks, export_name="two", **way) as server:
        assert list_exports(server.uri)[0].name == "one"
        with NbdClient(server.uri) as client:
            assert client.info.name == "two"
        with NbdClient(server.uri, "one") as client:
            assert client.info.name == "one"


def test_a_socket() -> None:
    with serve(Disks, listen=False) as server, NbdClient(server.connect(), "two") as client:
        assert client.info.name == "two"


def test_what_is_no_way_to_a_server() -> None:
    with pytest.raises(TypeError, match="a URI, a socket or an EmbeddedServer, not 3"):
        NbdClient(3)  # type: ignore[arg-type]  # that is what it is about


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("http://localhost", "is no URI of an NBD server"),
        ("nbd+tls://localhost", "is no URI of an NBD server"),
        ("nbd+unix:///name", "does not name a socket"),
    ],
)
def test_what_is_no_uri(uri: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NbdClient(uri)


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        NbdClient(f"nbd+unix://?socket={tmp_path}/none")


def test_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda sock, address: dialled.append((sock.family, address)))
    monkeypatch.setattr(socket, "AF_VSOCK", socket.AF_UNIX, raising=False)  # not all machines have any

    for uri in (_Uri("nbd+vsock://1:99/name"), _Uri("nbd+vsock://2")):
        uri.dialled(1).close()

    assert dialled == [(socket.AF_UNIX, (1, 99)), (socket.AF_UNIX, (2, 10809))]


def test_a_server_without_fixed_newstyle_is_refused() -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(b"NBDMAGICIHAVEOPT\0\0")

    with ours, pytest.raises(OSError) as caught:
        NbdClient(theirs)

    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert theirs.fileno() == -1


# --- TLS ---


def test_tls_by_a_context(certificates: Path) -> None:
    context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")

    with serve(Disks, listen=False, tls="require", tls_certificates=certificates) as server:
        with NbdClient(server, tls=context) as client:
            assert client.pread(512, 0) == bytes(512)
        assert list_exports(server, tls=context)
        with pytest.raises(Refused) as caught:
            NbdClient(server)

    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("verify", [False, True])
def test_tls_by_a_uri(certificates: Path, verify: bool) -> None:
    with serve(
        Disks, tcp=("localhost", 0), tls="require", tls_certificates=certificates, tls_verify_peer=verify
    ) as server:
        assert server.uri.startswith("nbds://")
        with NbdClient(server.uri) as client:
            assert client.pread(512, 0) == bytes(512)


def test_a_server_that_is_not_known_is_not_trusted(certificates: Path) -> None:
    with serve(Disks, tcp=("127.0.0.1", 0), tls="require", tls_certificates=certificates) as server:
        uri = server.uri.partition("?")[0]
        with pytest.raises(ssl.SSLCertVerificationError):
            NbdClient(uri)


def test_keys_need_a_context() -> None:
    with pytest.raises(ValueError, match="need a context of yours"):
        _Uri("nbds://localhost?tls-psk-file=/keys").context()

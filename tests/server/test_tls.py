"""TLS over connections: what is sent and received, how it ends, and that threads do not get in each other's way."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nbdkitpy import Client, Export, Handle
from nbdkitpy.backend import Buffer
from nbdkitpy.protocol.constants import Command, Option, OptionReply, TlsMode
from nbdkitpy.server.credentials import certificates_context
from nbdkitpy.server.options import Endpoint, Transport
from nbdkitpy.server.single import PipeTransport
from nbdkitpy.server.tls import Secured, Tls, TlsTransport
from nbdkitpy.server.transport import Connection, SocketTransport
from nbdkitpy_filters.ip import Ip
from tests.certificates import CLIENT_USE, SERVER_USE, Authority
from tests.conftest import StartServer
from tests.nbdclient import PATIENCE, NbdClient, Refused, Style
from tests.pools import eventually
from tests.server.test_single import PipeEnds
from tests.serving import CONTENT, SIZE, Disk, Disks, Running

EINVAL = 22


def client_context(directory: Path | None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """A client's context; it trusts the authority of `directory`, and shows a certificate if it has one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if directory is not None:
        context.load_verify_locations(directory / "ca-cert.pem")
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def with_certificate(directory: Path) -> ssl.SSLContext:
    return client_context(directory, directory / "client-cert.pem", directory / "client-key.pem")


def tls_of(directory: Path, mode: TlsMode = TlsMode.REQUIRE, **more: Any) -> Tls:
    options = {"priority": None, "verify_peer": False, **more}
    return Tls(mode, lambda: certificates_context(str(directory), **options), {})


class Start:
    """Starts servers with TLS."""

    def __init__(self, start_server: StartServer, directory: Path) -> None:
        self._start = start_server
        self.directory = directory

    def __call__(self, plugin: Disks | None = None, *filters: Any, tls: Tls | None = None, **options: Any) -> Running:
        running = self._start(plugin, *filters, begin=False, **options)
        running.server.tls = tls or tls_of(self.directory)
        return running.begin()

    def connect(self, running: Running, style: Style = Style.SIMPLE, *, contexts: bool = False) -> NbdClient:
        """Return a client with the handshake, and TLS, behind it."""
        client = self.greeted(running).start_tls(client_context(self.directory))
        return negotiated(client, style, contexts=contexts)

    def greeted(self, running: Running) -> NbdClient:
        client = running.dial()
        client.greet()
        return client


def negotiated(client: NbdClient, style: Style = Style.SIMPLE, *, contexts: bool = False) -> NbdClient:
    """Negotiate without the greeting, which was before TLS."""
    return client.negotiate_rest(style, contexts=contexts)


@pytest.fixture
def start(start_server: StartServer, certificates: Path) -> Start:
    return Start(start_server, certificates)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.DEBUG, "nbdkitpy")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


Messages = Callable[[], list[str]]


# --- serving ---


@pytest.mark.parametrize("style", Style)
def test_disk_is_served_over_tls(start: Start, style: Style) -> None:
    client = start.connect(start(), style)

    assert client.read(0, SIZE) == CONTENT
    assert client.read(12345, 17) == CONTENT[12345:12362]

    client.disconnect()


def test_it_is_told_when_the_client_takes_nothing(start: Start) -> None:
    running = start()
    client, other = start.connect(running), start.connect(running)
    session = running.sessions()[0]
    assert client.read(0, 1) == CONTENT[:1]
    assert not session._transport.is_full()

    with client.batched():
        for _ in range(20):
            client.send(Command.READ, 0, SIZE)

    eventually(lambda: other.read(0, 1) == CONTENT[:1] and session._transport.is_full())
    assert len(client.replies(20)) == 20


def test_end_is_said_by_close_notify(start: Start) -> None:
    client = start.connect(start())
    assert isinstance(client.socket, ssl.SSLSocket)
    client.socket.suppress_ragged_eofs = False  # type: ignore[attr-defined]

    client.send(Command.DISC)

    assert client.socket.recv(1) == b""  # else it would raise


def test_T8_nbdserver_7a64238_client_that_says_close_notify_and_disc_at_once_is_at_its_end(start: Start) -> None:
    """The end came with the last request: taking it for nothing was an endless loop."""
    running = start()
    raw = raw_client(running, client_context(start.directory))
    raw.tls.write(struct.pack(">IHHQQI", 0x25609513, 0, Command.DISC, 1, 0, 0))
    with contextlib.suppress(ssl.SSLWantReadError):
        raw.tls.unwrap()

    raw.flush()

    running.wait_for_sessions(0)
    raw.socket.close()


class Raw:
    """A client's end of TLS whose bytes the test carries."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.socket = sock
        self.received, self.sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.received, self.sent, server_hostname="localhost")

    def until_done(self, step: Callable[[], Any]) -> Any:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                result = step()
                self.flush()
                return result
            self.flush()
            data = self.socket.recv(1 << 16)
            assert data, "the server closed the connection"
            self.received.write(data)

    def flush(self) -> None:
        self.socket.sendall(self.sent.read())

    def sendall(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    def recv(self, count: int) -> bytes:
        return bytes(self.until_done(lambda: self.tls.read(count)))

    def recv_into(self, buffer: memoryview) -> int:
        data = self.recv(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def settimeout(self, seconds: float) -> None: ...

    def close(self) -> None:
        self.socket.close()


def raw_client(running: Running, context: ssl.SSLContext) -> Raw:
    """A client with the handshake behind it."""
    client = running.dial()
    client.greet()
    client.option(Option.STARTTLS)
    raw = Raw(client.socket, context)
    raw.until_done(raw.tls.do_handshake)
    client.socket = raw  # type: ignore[assignment]
    negotiated(client)
    return raw


@pytest.mark.parametrize("mode", [TlsMode.ON, TlsMode.REQUIRE])
def test_backends_are_told_of_tls(start: Start, mode: TlsMode) -> None:
    told: list[Client] = []

    class Asking(Disks):
        def list_exports(self, client: Client, readonly: bool) -> list[Export]:
            told.append(client)
            return []

        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            told.append(client)
            return super().open(export_name, readonly, client)

    client = start.greeted(start(Asking(), tls=tls_of(start.directory, mode)))
    client.start_tls(client_context(start.directory))

    client.exports()
    client.go()

    assert [(each.tls, each.tls_dn, each.tls_issuer_dn) for each in told] == [(True, None, None)] * 2


def test_names_of_a_verified_client_are_known_to_backends(start: Start) -> None:
    told: list[Client] = []

    class Asking(Disks):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            told.append(client)
            return super().open(export_name, readonly, client)

    client = start.greeted(start(Asking(), tls=tls_of(start.directory, verify_peer=True)))

    negotiated(client.start_tls(with_certificate(start.directory)))

    assert [(each.tls, each.tls_dn, each.tls_issuer_dn) for each in told] == [
        (True, "CN=client,O=Big Co", "CN=Test CA")
    ]


def test_names_are_not_taken_from_certificates_that_nobody_has_verified(start: Start, tmp_path: Path) -> None:
    told: list[Client] = []

    class Asking(Disks):
        def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
            told.append(client)
            return super().open(export_name, readonly, client)

    other = Authority(tmp_path / "ca", "Evil")
    other.issue(tmp_path / "cert.pem", tmp_path / "key.pem", "/O=Big Co/CN=client", CLIENT_USE)
    client = start.greeted(start(Asking()))

    negotiated(client.start_tls(client_context(start.directory, tmp_path / "cert.pem", tmp_path / "key.pem")))

    assert [(each.tls, each.tls_dn, each.tls_issuer_dn) for each in told] == [(True, None, None)]


@pytest.mark.parametrize(
    ("rules", "served"),
    [
        ({"allow": "dn:CN=client,O=Big Co", "deny": "all"}, True),
        ({"allow": "dn:*,o=big co", "deny": "all"}, True),
        ({"allow": "issuer-dn:CN=Test CA", "deny": "all"}, True),
        ({"allow": "dn:CN=client", "deny": "all"}, False),
        ({"allow": "issuer-dn:CN=client*", "deny": "all"}, False),
        ({"deny": "dn:*O=Big*"}, False),
        ({"deny": "dn:*O=Bad*"}, True),
    ],
)
def test_ip_rules_decide_by_the_names_of_a_certificate(start: Start, rules: dict[str, str], served: bool) -> None:
    ip = Ip()
    for key, value in rules.items():
        ip.config(key, value)
    client = start.greeted(start(None, ip, tls=tls_of(start.directory, verify_peer=True)))
    client.start_tls(with_certificate(start.directory))

    with contextlib.nullcontext() if served else pytest.raises(Refused):
        client.go()


def test_certificates_are_read_again_for_new_clients(
    start: Start, authority: Authority, tmp_path: Path, certificates: Path
) -> None:
    directory = tmp_path / "tls"
    directory.mkdir()
    for path in certificates.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tls = tls_of(directory)
    running = start(tls=tls)
    first = start.greeted(running).start_tls(client_context(directory))
    authority.issue(directory / "server-cert.pem", directory / "server-key.pem", "/O=Second/CN=localhost")

    tls.renew()

    second = start.greeted(running).start_tls(client_context(directory))
    subjects = [client.socket.getpeercert()["subject"][0] for client in (first, second)]  # type: ignore[attr-defined]
    assert subjects == [(("commonName", "localhost"),), (("organizationName", "Second"),)]
    assert negotiated(first).read(0, 512) == CONTENT[:512]


def test_certificates_that_cannot_be_read_again_leave_the_old_ones(start: Start, tmp_path: Path) -> None:
    calls = [certificates_context(str(start.directory), None, verify_peer=False)]
    tls = Tls(TlsMode.ON, calls.pop, {})

    with pytest.raises(IndexError):
        tls.renew()

    assert start.connect(start(tls=tls)).read(0, 512) == CONTENT[:512]


# --- T1: plain text where TLS is due ---


@pytest.mark.parametrize("behind", [b"I", struct.pack(">8sII", b"IHAVEOPT", Option.LIST, 0)])
def test_T1_CVE_2024_34083_plain_text_in_one_segment_with_starttls_ends_the_connection(
    start: Start, messages: Messages, behind: bytes
) -> None:
    client = start.greeted(start())

    client.send_bytes(struct.pack(">8sII", b"IHAVEOPT", Option.STARTTLS, 0) + behind)

    assert client.at_end()
    assert "something came in clear text behind STARTTLS" in messages()[0]


def test_T1_CVE_2024_34083_plain_text_before_the_client_hello_ends_the_connection(
    start: Start, messages: Messages
) -> None:
    plugin = Disks()
    running = start(plugin)
    client = start.greeted(running)
    client.option(Option.STARTTLS)

    client.send_option(Option.LIST)

    answer = client.socket.recv(1 << 16)
    assert answer[:1] in (b"", b"\x15")  # nothing, or an alert of TLS
    running.wait_for_sessions(0)
    assert "TLS handshake failed" in messages()[0]


def test_T1_first_answer_within_tls_is_to_the_first_option_within_tls(start: Start) -> None:
    client = start.greeted(start(tls=tls_of(start.directory, TlsMode.ON)))
    assert client.exports() == [""]

    client.start_tls(client_context(start.directory))

    client.send_option(99)
    (answer,) = client.option_answers(99)
    assert answer.reply == OptionReply.ERR_UNSUP


# --- T2 ---


def test_T2_CVE_2021_3716_replies_within_tls_are_those_agreed_on_there(start: Start) -> None:
    client = start.greeted(start(tls=tls_of(start.directory, TlsMode.ON)))
    client.option(Option.STRUCTURED_REPLY)
    query = struct.pack(">III", 0, 1, 15) + b"base:allocation"
    assert client.option(Option.SET_META_CONTEXT, query)
    client.start_tls(client_context(start.directory))

    client.go()

    assert client.read(0, 512) == CONTENT[:512]  # which takes no structured reply
    assert client.call(Command.BLOCK_STATUS, 0, 512).error == EINVAL


# --- T3 ---


def test_T3_N5_nbdkit_282c3b03_nothing_is_opened_without_tls_where_it_is_required(start: Start) -> None:
    plugin = Disks()
    running = start(plugin)
    client = start.greeted(running)

    for option in (Option.GO, Option.INFO, Option.LIST, 99):
        with pytest.raises(Refused) as refused:
            client.option(option)
        assert refused.value.reply is OptionReply.ERR_TLS_REQD
    client.send_option(Option.EXPORT_NAME, b"disk")

    assert client.at_end()
    running.wait_for_sessions(0)
    assert plugin.opened == 0


def test_T3_client_that_the_filters_refuse_gets_no_byte(start: Start) -> None:
    plugin, ip = Disks(), Ip()
    ip.config("deny", "all")

    client = start(plugin, ip).dial()

    assert client.at_end()
    assert plugin.opened == 0


def test_T3_nbdkit_282c3b03_refused_option_with_data_and_starttls_on_the_same_connection(start: Start) -> None:
    client = start.greeted(start())
    with pytest.raises(Refused):
        client.go("some name")

    client.start_tls(client_context(start.directory))

    assert negotiated(client).read(0, 512) == CONTENT[:512]


# --- T5: versions and ciphers ---


def fail_handshake(start: Start, running: Running, context: ssl.SSLContext) -> None:
    """Have a client begin TLS, which fails, and wait until the server is done with it."""
    with pytest.raises((ssl.SSLError, ConnectionError)):
        start.greeted(running).start_tls(context).receive_bytes(1)
    running.wait_for_sessions(0)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_T5_tls_1_2_and_1_3_are_served(start: Start, version: ssl.TLSVersion) -> None:
    context = client_context(start.directory)
    context.minimum_version = context.maximum_version = version

    client = negotiated(start.greeted(start()).start_tls(context))

    assert client.read(0, SIZE) == CONTENT
    client.disconnect()


@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_T5_older_versions_are_refused(start: Start, messages: Messages, version: str) -> None:
    context = client_context(start.directory)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]

    fail_handshake(start, start(), context)

    assert "TLS handshake failed: unsupported protocol" in messages()[-1]


@pytest.mark.parametrize("ciphers", ["aNULL:@SECLEVEL=0", "eNULL:@SECLEVEL=0", "DHE-RSA-AES128-SHA:@SECLEVEL=0"])
def test_T5_ciphers_that_protect_nothing_are_refused(start: Start, messages: Messages, ciphers: str) -> None:
    context = client_context(start.directory)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(ciphers)

    fail_handshake(start, start(), context)

    assert "TLS handshake failed: no shared cipher" in messages()[-1]


# --- T6: certificates of clients ---


def nothing(directory: Path, tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    return client_context(directory)


def issued(directory: Path, tmp_path: Path, authority: Authority, use: str = CLIENT_USE, **days: int) -> ssl.SSLContext:
    authority.issue(tmp_path / "cert.pem", tmp_path / "key.pem", "/CN=x", use, **days)
    return client_context(directory, tmp_path / "cert.pem", tmp_path / "key.pem")


def of_another(directory: Path, tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    return issued(directory, tmp_path, Authority(tmp_path / "ca"))


def self_signed(directory: Path, tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    other = Authority(tmp_path / "ca", "Self")
    return client_context(directory, other.certificate, other.key)


def expired(directory: Path, tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    return issued(directory, tmp_path, authority, begins=-3, ends=-1)


def not_yet_valid(directory: Path, tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    return issued(directory, tmp_path, authority, begins=1, ends=2)


def of_a_server(directory: Path, tmp_path: Path, authority: Authority) -> ssl.SSLContext:
    return issued(directory, tmp_path, authority, SERVER_USE)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nothing, "peer did not return a certificate"),
        (of_another, "the client's certificate: "),
        (self_signed, "the client's certificate: self-signed certificate"),
        (expired, "the client's certificate: certificate has expired"),
        (not_yet_valid, "the client's certificate: certificate is not yet valid"),
        (of_a_server, "the client's certificate: un"),  # "unsupported" or "unsuitable certificate purpose"
    ],
)
def test_T6_client_without_a_good_certificate_gets_nothing(
    start: Start,
    authority: Authority,
    tmp_path: Path,
    messages: Messages,
    make: Callable[[Path, Path, Authority], ssl.SSLContext],
    reason: str,
    version: ssl.TLSVersion,
) -> None:
    plugin = Disks()
    running = start(plugin, tls=tls_of(start.directory, verify_peer=True))
    context = make(start.directory, tmp_path, authority)
    context.maximum_version = version

    fail_handshake(start, running, context)

    running.wait_for_sessions(0)
    assert plugin.opened == 0
    assert f"TLS handshake failed: {reason}" in messages()[-1].replace("self signed", "self-signed")


def test_T6_client_with_a_good_certificate_is_served(start: Start) -> None:
    running = start(tls=tls_of(start.directory, verify_peer=True))

    client = negotiated(start.greeted(running).start_tls(with_certificate(start.directory)))

    assert client.read(0, 512) == CONTENT[:512]


def test_T6_revoked_certificate_is_refused_and_others_are_not(start: Start, tmp_path: Path, messages: Messages) -> None:
    authority = Authority(tmp_path / "ca")
    directory = tmp_path / "tls"
    directory.mkdir()
    (directory / "ca-cert.pem").write_bytes(authority.certificate.read_bytes())
    authority.issue(directory / "server-cert.pem", directory / "server-key.pem")
    for name in ("good", "bad"):
        authority.issue(tmp_path / f"{name}.pem", tmp_path / f"{name}-key.pem", f"/CN={name}", CLIENT_USE)
    authority.revoke(tmp_path / "bad.pem", crl=directory / "ca-crl.pem")
    running = start(tls=tls_of(directory, verify_peer=True))

    bad = client_context(directory, tmp_path / "bad.pem", tmp_path / "bad-key.pem")
    fail_handshake(start, running, bad)
    good = start.greeted(running).start_tls(client_context(directory, tmp_path / "good.pem", tmp_path / "good-key.pem"))

    assert negotiated(good).read(0, 512) == CONTENT[:512]
    assert "the client's certificate: certificate revoked" in messages()[0]


def test_T6_revocations_out_of_date_let_nobody_in(start: Start, tmp_path: Path, messages: Messages) -> None:
    authority = Authority(tmp_path / "ca")
    directory = tmp_path / "tls"
    directory.mkdir()
    (directory / "ca-cert.pem").write_bytes(authority.certificate.read_bytes())
    authority.issue(directory / "server-cert.pem", directory / "server-key.pem")
    authority.issue(tmp_path / "cert.pem", tmp_path / "key.pem", "/CN=x", CLIENT_USE)
    authority.revoke(crl=directory / "ca-crl.pem", begins=-3, ends=-1)
    running = start(tls=tls_of(directory, verify_peer=True))

    fail_handshake(start, running, client_context(directory, tmp_path / "cert.pem", tmp_path / "key.pem"))

    assert "the client's certificate: CRL has expired" in messages()[-1]


def test_client_that_does_not_trust_us_is_told_of_in_the_log(start: Start, messages: Messages) -> None:
    fail_handshake(start, start(), client_context(None))

    assert "TLS handshake failed: tlsv1 alert unknown ca" in messages()[-1]


# --- T7: TLS handshakes that do not end ---


def hello(start: Start) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client_context(start.directory).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("count", [0, 1, 5, 100, None])
def test_T7_tls_handshake_that_stalls_ends_with_the_time_for_the_handshake_and_holds_up_nobody(
    start: Start, messages: Messages, count: int | None
) -> None:
    running = start(handshake_timeout=0.5)
    stalled = start.greeted(running)
    stalled.option(Option.STARTTLS)
    stalled.send_bytes(hello(start)[:count])

    assert start.connect(running).read(0, 512) == CONTENT[:512]

    with contextlib.suppress(ConnectionError):
        while stalled.socket.recv(1 << 16):
            pass
    assert any("handshake not finished in time, closed" in message for message in messages())


def test_T7_client_may_leave_anywhere_in_the_tls_handshake(start: Start) -> None:
    plugin = Disks()
    running = start(plugin)
    greeting = hello(start)

    for count in range(0, len(greeting), 7):
        client = start.greeted(running)
        client.option(Option.STARTTLS)
        client.send_bytes(greeting[:count])
        client.socket.close()

    running.wait_for_sessions(0)
    assert plugin.opened == 0
    assert start.connect(running).read(0, 512) == CONTENT[:512]


def test_T7_garbage_in_place_of_tls_ends_the_connection(start: Start, messages: Messages) -> None:
    running = start()
    rng = random.Random(7)

    for _ in range(20):
        client = start.greeted(running)
        client.option(Option.STARTTLS)
        client.send_bytes(rng.randbytes(300))
        with contextlib.suppress(ConnectionError):
            while client.socket.recv(1 << 16):
                pass

    running.wait_for_sessions(0)
    assert all("TLS handshake failed" in message or "connection lost" in message for message in messages())


def test_T7_shutdown_does_not_wait_for_a_tls_handshake(start: Start) -> None:
    running = start(drain=30)
    client = start.greeted(running)
    client.option(Option.STARTTLS)

    assert running.stop()


# --- T8: abrupt ends ---


def test_T8_nbdserver_7a64238_end_without_close_notify_is_a_lost_connection(start: Start, messages: Messages) -> None:
    running = start()
    client = start.connect(running)

    client.socket.close()

    running.wait_for_sessions(0)
    assert messages()[-1].endswith("it ended without TLS's close_notify")


class Writable(Disk):
    """Notes what is written."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.written: list[tuple[int, int]] = []
        WRITTEN.append(self.written)

    def pwrite(self, data: memoryview, offset: int, flags: int) -> None:
        self.written.append((offset, len(data)))


WRITTEN: list[list[tuple[int, int]]] = []


@pytest.mark.parametrize("cut", [1, 1000, 16000])
def test_T8_write_that_is_cut_off_within_a_record_is_not_carried_out(start: Start, cut: int) -> None:
    WRITTEN.clear()
    running = start(Disks(Writable))
    raw = raw_client(running, client_context(start.directory))
    for piece in (struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 1, 0, 32000), bytes(32000)):
        while piece:
            piece = piece[raw.tls.write(piece) :]

    raw.socket.sendall(raw.sent.read()[:-cut])
    raw.socket.close()

    running.wait_for_sessions(0)
    assert WRITTEN == [[]]


def test_T8_record_that_was_tampered_with_ends_the_connection(start: Start, messages: Messages) -> None:
    WRITTEN.clear()
    running = start(Disks(Writable))
    raw = raw_client(running, client_context(start.directory))
    raw.tls.write(struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 1, 0, 512) + bytes(512))
    record = bytearray(raw.sent.read())
    record[-1] ^= 1

    raw.socket.sendall(record)

    raw.received.write(raw.socket.recv(1 << 16))
    with pytest.raises(ssl.SSLError, match=r"(?i)bad.record.mac"):  # the alert
        raw.tls.read(1)
    running.wait_for_sessions(0)
    assert "TLS failed: decryption failed or bad record mac" in messages()[-1]
    assert WRITTEN == [[]]
    raw.socket.close()


def test_T8_what_came_whole_before_such_a_record_is_carried_out(start: Start) -> None:
    WRITTEN.clear()
    running = start(Disks(Writable))
    raw = raw_client(running, client_context(start.directory))
    raw.tls.write(struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 1, 0, 512) + bytes(512))
    good = raw.sent.read()
    raw.tls.write(struct.pack(">IHHQQI", 0x25609513, 0, Command.WRITE, 2, 512, 512) + bytes(512))
    bad = bytearray(raw.sent.read())
    bad[-1] ^= 1

    raw.socket.sendall(good + bad)

    running.wait_for_sessions(0)
    assert WRITTEN == [[(0, 512)]]
    raw.socket.close()


# --- T11 ---


@pytest.mark.parametrize("transport", [Transport.UNIX, Transport.TCP], ids=lambda transport: transport.value)
def test_T11_cve_2023_40217_plain_text_and_a_reset_before_tls_is_not_taken_for_tls(
    start: Start, monkeypatch: pytest.MonkeyPatch, messages: Messages, transport: Transport
) -> None:
    plugin = Disks()
    at: dict[str, Any] = {} if transport is Transport.UNIX else {"endpoints": (Endpoint(port="0"),)}
    running = start(plugin, **at)
    gone = threading.Semaphore(0)
    accept = Tls.accept

    def late(tls: Tls, raw: Connection) -> Secured:
        assert gone.acquire(timeout=PATIENCE)  # when all has come and the client is not there any more
        return accept(tls, raw)

    monkeypatch.setattr(Tls, "accept", late)
    for _ in range(5):
        if transport is Transport.UNIX:
            client = running.dial()
        else:
            client = NbdClient(socket.create_connection(("127.0.0.1", running.server.port or 0)))
        client.greet()
        client.option(Option.STARTTLS)
        client.send_option(Option.GO, bytes(6))
        client.reset()
        gone.release()

    running.wait_for_sessions(0)

    assert plugin.opened == 0
    assert len(messages()) == 5
    assert all("TLS handshake failed" in message or "connection lost" in message for message in messages())


# --- R3: refused requests are skipped by way of TLS ---


def test_R3_payload_of_a_refused_write_is_skipped_within_tls(start: Start) -> None:
    client = start.connect(start())

    assert client.call(Command.WRITE, 0, data=bytes(100_000)).error
    assert client.read(0, 512) == CONTENT[:512]


# --- the transport by itself ---


class Pair:
    """Both ends of a connection with TLS."""

    def __init__(self, directory: Path, *, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        theirs.settimeout(PATIENCE)
        context = client_context(directory)
        context.maximum_version = version
        made: list[TlsTransport] = []
        tls = tls_of(directory)
        thread = threading.Thread(target=lambda: made.append(tls.accept(SocketTransport(ours)).transport))
        thread.start()
        self.client = context.wrap_socket(theirs, server_hostname="localhost")
        thread.join(PATIENCE)
        (self.transport,) = made

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.client.recv(count - len(data))
            assert piece
            data += piece
        return data


@pytest.fixture
def pair(certificates: Path) -> Iterator[Pair]:
    pair = Pair(certificates)
    yield pair
    pair.client.close()
    pair.transport.close()


@pytest.mark.parametrize(
    "sizes",
    [
        [0],
        [1],
        [16, 4096] * 64,
        [16, 1 << 20],
        [16 << 10],
        [(16 << 10) + 1],
        [1, 16 << 10, 1, (48 << 10) + 5, 0, 3],
        [5 << 20],
    ],
)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_pieces_of_any_size_arrive_in_order(pair: Pair, sizes: list[int], kind: type) -> None:
    rng = random.Random(1)
    pieces: list[Buffer] = [kind(rng.randbytes(size)) for size in sizes]
    sender = threading.Thread(target=pair.transport.send, args=(pieces,))

    sender.start()
    received = pair.receive(sum(sizes))
    sender.join(PATIENCE)

    assert received == b"".join(pieces)


def test_receiving_fills_the_buffer_with_all_that_has_arrived(pair: Pair) -> None:
    data = random.Random(2).randbytes(60_000)
    pair.client.sendall(data)
    buffer = memoryview(bytearray(100_000))
    filled = 0

    counts = []
    while filled < len(data):
        counts.append(pair.transport.receive_into(buffer[filled:]))
        filled += counts[-1]

    assert bytes(buffer[:filled]) == data
    assert max(counts) > 16 << 10


def test_receiving_gives_up_when_the_client_is_quiet(pair: Pair) -> None:
    pair.transport.set_patience(0.01)

    with pytest.raises(BlockingIOError):
        pair.transport.receive_into(memoryview(bytearray(10)))

    pair.transport.set_patience(0)
    pair.client.sendall(b"hello")
    assert pair.transport.receive_into(memoryview(bytearray(10))) == 5


def test_end_of_the_client_is_0_however_often_it_is_asked_for(pair: Pair) -> None:
    with contextlib.suppress(OSError):
        pair.client.settimeout(0.01)
        pair.client.unwrap()
    buffer = memoryview(bytearray(10))

    assert [pair.transport.receive_into(buffer) for _ in range(3)] == [0, 0, 0]


def test_end_that_we_have_asked_for_is_0(pair: Pair) -> None:
    pair.transport.stop_receiving()

    assert pair.transport.receive_into(memoryview(bytearray(10))) == 0


def test_end_without_close_notify_is_an_error(pair: Pair) -> None:
    pair.client.close()

    with pytest.raises(ConnectionAbortedError, match="without TLS's close_notify"):
        pair.transport.receive_into(memoryview(bytearray(10)))


def test_file_is_sent_as_far_as_it_goes(pair: Pair, tmp_path: Path) -> None:
    content = random.Random(3).randbytes(3 << 20)
    path = tmp_path / "file"
    path.write_bytes(content)
    sent: list[int] = []

    with path.open("rb") as file:
        sender = threading.Thread(
            target=lambda: sent.append(pair.transport.send_file(b"head", file.fileno(), 100, len(content)))
        )
        sender.start()
        received = pair.receive(4 + len(content) - 100)
        sender.join(PATIENCE)

    assert received == b"head" + content[100:]
    assert sent == [len(content) - 100]


def test_client_is_gone_when_its_connection_is(pair: Pair) -> None:
    assert not pair.transport.is_gone()

    pair.client.close()

    assert pair.transport.is_gone()


def test_close_does_not_wait_for_a_client_that_takes_nothing(pair: Pair) -> None:
    broken: list[OSError] = []

    def send() -> None:
        try:
            pair.transport.send([bytes(64 << 20)])
        except OSError as error:
            broken.append(error)

    stuck = threading.Thread(target=send)
    stuck.start()
    pair.receive(1)  # it has begun

    pair.transport.close()

    stuck.join(PATIENCE)
    assert broken


def test_abort_breaks_the_connection(pair: Pair) -> None:
    pair.transport.abort()

    with pytest.raises(OSError):
        pair.transport.receive_into(memoryview(bytearray(10)))
    with pytest.raises(OSError):
        pair.transport.send([b"x"])


def test_one_thread_receives_while_others_send(certificates: Path) -> None:
    pair = Pair(certificates)
    rounds, size = 99, 20_000
    sent_by_us, sent_by_client = random.Random(4).randbytes(size), random.Random(5).randbytes(size)
    received = bytearray()

    def receive() -> None:
        buffer = memoryview(bytearray(1 << 16))
        while len(received) < rounds * size:
            received.extend(buffer[: pair.transport.receive_into(buffer)])

    lock = threading.Lock()

    def send() -> None:
        for _ in range(rounds // 3):
            with lock:  # as a Sender does
                pair.transport.send([sent_by_us])

    threads = [threading.Thread(target=target) for target in (receive, send, send, send)]
    for thread in threads:
        thread.start()
    got = bytearray()
    for _ in range(rounds):  # by one thread: Python's own TLS sockets do not bear two before 3.13
        pair.client.sendall(sent_by_client)
        got += pair.receive(size)
    for thread in threads:
        thread.join(PATIENCE)

    assert got == sent_by_us * rounds
    assert bytes(received) == sent_by_client * rounds
    pair.client.close()
    pair.transport.close()


class Watched:
    """Calls of OpenSSL's object, each of which takes its time, so that another one would overlap with it."""

    def __init__(self, tls: ssl.SSLObject) -> None:
        self._tls = tls
        self._inside = threading.Semaphore(1)
        self._other = threading.Event()
        self.overlapped = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call: Callable[..., Any] = getattr(self._tls, name)

        def slow(*args: Any) -> Any:
            if not self._inside.acquire(blocking=False):
                self.overlapped = True
                self._other.set()
                return call(*args)
            try:
                self._other.wait(0.2)
                return call(*args)
            finally:
                self._inside.release()

        return slow


def test_openssl_is_never_called_by_two_threads_at_once(pair: Pair) -> None:
    watched = Watched(pair.transport._ssl)
    pair.transport._ssl = cast("ssl.SSLObject", watched)
    pair.transport._read = watched.read
    pair.client.sendall(b"hello")
    threads = [
        threading.Thread(target=pair.transport.receive_into, args=(memoryview(bytearray(5)),)),
        threading.Thread(target=pair.transport.send, args=([b"world"],)),
    ]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert pair.receive(5) == b"world"
    assert not watched.overlapped


def test_tls_over_pipes(certificates: Path) -> None:
    (receiving, to_server), (from_server, sending) = os.pipe(), os.pipe()
    made: list[TlsTransport] = []
    tls, pipes = tls_of(certificates), PipeTransport(receiving, sending)
    thread = threading.Thread(target=lambda: made.append(tls.accept(pipes).transport))
    thread.start()
    ends = PipeEnds(from_server, to_server)
    client = Raw(cast("socket.socket", ends), client_context(certificates))
    client.until_done(client.tls.do_handshake)
    thread.join(PATIENCE)
    (transport,) = made

    transport.send([b"hello"])
    transport.close()

    assert (client.recv(10), client.recv(10)) == (b"hello", b"")  # the end by close_notify, else this would raise
    ends.close()


def test_client_may_ask_for_new_keys(certificates: Path, tmp_path: Path) -> None:
    """Python cannot; openssl does for a line with a K, and has to get ours before what we send then."""
    path = str(tmp_path / "socket")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen()
    client = subprocess.Popen(
        ["openssl", "s_client", "-unix", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert client.stdin is not None
    assert client.stderr is not None
    transport = tls_of(certificates).accept(SocketTransport(listening.accept()[0])).transport
    buffer = memoryview(bytearray(100))

    client.stdin.write(b"K\n")
    client.stdin.flush()
    while b"KEYUPDATE" not in client.stderr.readline():
        pass
    client.stdin.write(b"hello\n")
    client.stdin.flush()

    count = transport.receive_into(buffer)
    assert bytes(buffer[:count]) == b"hello\n"
    transport.send([b"world\n"])
    transport.close()
    printed, _ = client.communicate(timeout=PATIENCE)
    assert b"world" in printed
    listening.close()

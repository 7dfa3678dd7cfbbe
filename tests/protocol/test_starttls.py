"""STARTTLS in the handshake: who may go over to TLS, who has to, and what is forgotten then."""

from __future__ import annotations

import pytest

from nbdkitpy.protocol.constants import Option, OptionReply, TlsMode
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.protocol.handshake import MAX_OPTIONS, Closed, Handshake, ListExports, OpenExport, Ready, StartTls
from tests.protocol.test_handshake import FACTS, Client, ack, flags, info, meta, option, replies

ON_OR_REQUIRE = [TlsMode.ON, TlsMode.REQUIRE]
OTHERS = [0, *(number for number in Option if number not in (Option.STARTTLS, Option.ABORT, Option.EXPORT_NAME)), 99]


def client_of(mode: TlsMode, client_flags: int = 3) -> Client:
    return Client(Handshake(tls=mode), client_flags=client_flags)


def started(mode: TlsMode = TlsMode.ON) -> Client:
    client = client_of(mode)
    start(client)
    return client


def start(client: Client) -> None:
    assert client.option(Option.STARTTLS) == StartTls()
    assert client.received() == ack(Option.STARTTLS)
    client.handshake.tls_started()


@pytest.mark.parametrize("mode", ON_OR_REQUIRE)
def test_starttls_is_acknowledged_and_left_to_the_driver(mode: TlsMode) -> None:
    client = client_of(mode)

    assert client.option(Option.STARTTLS) == StartTls()

    assert client.received() == ack(Option.STARTTLS)
    assert client.handshake.next_event() is None


def test_without_tls_starttls_is_against_the_policy_and_the_handshake_goes_on() -> None:
    client = client_of(TlsMode.OFF)

    client.refused(Option.STARTTLS, OptionReply.ERR_POLICY)

    assert client.handshake.refusals == []
    client.is_in_step()


@pytest.mark.parametrize("mode", TlsMode)
def test_starttls_with_data_is_invalid_and_the_handshake_goes_on_in_clear(mode: TlsMode) -> None:
    client = client_of(mode)

    client.refused(Option.STARTTLS, OptionReply.ERR_INVALID, b"data")

    if mode is not TlsMode.OFF:
        start(client)


@pytest.mark.parametrize("mode", ON_OR_REQUIRE)
def test_second_starttls_is_invalid(mode: TlsMode) -> None:
    client = started(mode)

    client.refused(Option.STARTTLS, OptionReply.ERR_INVALID)

    client.is_in_step()


# T1: plain text behind STARTTLS.


@pytest.mark.parametrize("mode", ON_OR_REQUIRE)
@pytest.mark.parametrize("behind", [b"I", option(Option.LIST), option(Option.ABORT), bytes.fromhex("160301")])
def test_T1_CVE_2024_34083_whatever_came_with_starttls_in_clear_text_ends_the_connection(
    mode: TlsMode, behind: bytes
) -> None:
    client = client_of(mode)

    with pytest.raises(RemoteProtocolError, match="clear text behind STARTTLS"):
        client.send(option(Option.STARTTLS) + behind)

    assert client.received() == b""
    assert client.send(option(Option.LIST)) is None
    assert client.received() == b""


# T2 (CVE-2021-3716): what was agreed on in clear text.


def test_T2_CVE_2021_3716_structured_replies_are_forgotten() -> None:
    client = client_of(TlsMode.ON)
    client.ask(Option.STRUCTURED_REPLY)

    start(client)

    assert not client.handshake.negotiated.structured_replies
    client.refused(Option.SET_META_CONTEXT, OptionReply.ERR_INVALID, meta(b"", b"base:allocation"))
    assert client.ask(Option.STRUCTURED_REPLY) == ack(Option.STRUCTURED_REPLY)


def test_T2_extended_headers_are_forgotten() -> None:
    client = client_of(TlsMode.ON)
    client.ask(Option.EXTENDED_HEADERS)

    start(client)

    assert not client.handshake.negotiated.extended_headers
    assert client.ask(Option.EXTENDED_HEADERS) == ack(Option.EXTENDED_HEADERS)


def test_T2_selected_contexts_are_forgotten() -> None:
    client = client_of(TlsMode.ON)
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, meta(b"", b"base:allocation"))
    assert client.handshake.negotiated.contexts

    start(client)
    client.ask(Option.STRUCTURED_REPLY)
    client.option(Option.GO, info(b""))

    assert client.handshake.negotiated.contexts == ()


def test_T2_what_info_asked_for_is_forgotten() -> None:
    client = client_of(TlsMode.ON)
    client.option(Option.INFO, info(b"first"))
    client.handshake.export_opened(FACTS)
    client.received()

    start(client)

    assert client.handshake.negotiated.contexts == ()
    assert client.option(Option.GO, info(b"second")) == OpenExport("second", Option.GO, wants_description=False)


def test_T2_options_and_lists_are_counted_anew() -> None:
    client = client_of(TlsMode.ON)
    client.option(Option.LIST)
    client.handshake.exports_listed([("a", "")])
    for _ in range(2 * MAX_OPTIONS - 2):
        client.ask(0)

    start(client)

    for _ in range(MAX_OPTIONS):
        client.ask(0)
    with pytest.raises(RemoteProtocolError, match="too many options"):
        client.option(0)


def test_T2_client_flags_hold_on() -> None:
    client = started()

    assert client.option(Option.EXPORT_NAME, b"x")
    client.handshake.export_opened(FACTS)

    assert len(client.received()) == 10  # without the 124 zeroes


# T3: what can be done without TLS where it is required.


@pytest.mark.parametrize("number", OTHERS)
@pytest.mark.parametrize("data", [b"", info(b"disk"), bytes(200_000)])
def test_T3_every_other_option_is_refused_before_tls_and_its_data_skipped(number: int, data: bytes) -> None:
    client = client_of(TlsMode.REQUIRE)

    client.refused(number, OptionReply.ERR_TLS_REQD, data)

    start(client)


def test_T3_export_name_without_tls_ends_the_connection_without_a_byte() -> None:
    client = client_of(TlsMode.REQUIRE)

    with pytest.raises(RemoteProtocolError, match="requires TLS"):
        client.option(Option.EXPORT_NAME, b"disk")

    assert client.received() == b""


@pytest.mark.parametrize("mode", TlsMode)
def test_T3_abort_is_acknowledged(mode: TlsMode) -> None:
    client = client_of(mode)

    assert client.option(Option.ABORT) == Closed()

    assert client.received() == ack(Option.ABORT)


@pytest.mark.parametrize("number", [*OTHERS, Option.STARTTLS])
def test_T3_without_fixed_newstyle_nothing_can_be_had(number: int) -> None:
    client = client_of(TlsMode.REQUIRE, client_flags=0)

    client.refused(number, OptionReply.ERR_INVALID)

    with pytest.raises(RemoteProtocolError):
        client.option(Option.EXPORT_NAME, b"disk")


def test_T3_that_tls_is_required_is_noted_for_the_log() -> None:
    client = client_of(TlsMode.REQUIRE)

    client.ask(Option.GO, info(b"disk"))

    assert client.handshake.refusals == ["option GO: this server requires TLS"]


@pytest.mark.parametrize("mode", ON_OR_REQUIRE)
def test_within_tls_everything_goes_on_as_ever(mode: TlsMode) -> None:
    client = started(mode)

    assert client.option(Option.LIST) == ListExports()
    client.handshake.exports_listed([("disk", "")])
    assert [reply.reply for reply in replies(client.received())] == [OptionReply.SERVER, OptionReply.ACK]
    client.refused(99, OptionReply.ERR_UNSUP)
    assert client.option(Option.GO, info(b"disk")) == OpenExport("disk", Option.GO, wants_description=False)
    client.handshake.export_opened(FACTS)
    assert client.handshake.next_event() == Ready()


def test_where_tls_is_only_offered_clear_text_is_served() -> None:
    client = client_of(TlsMode.ON)

    client.refused(99, OptionReply.ERR_UNSUP)

    assert client.option(Option.LIST) == ListExports()


def test_starttls_is_refused_while_the_server_shuts_down() -> None:
    client = client_of(TlsMode.ON)
    client.handshake.shutting_down = True

    client.refused(Option.STARTTLS, OptionReply.ERR_SHUTDOWN)


def test_starttls_byte_by_byte_is_the_same() -> None:
    client = Client(Handshake(tls=TlsMode.ON), client_flags=None)

    events = [client.send(bytes([byte])) for byte in flags() + option(Option.STARTTLS)]

    assert events[-1] == StartTls()
    assert not any(events[:-1])

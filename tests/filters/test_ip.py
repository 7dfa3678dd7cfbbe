"""The ip filter: rules, their parsing, and where they are applied."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy import Client, ConfigError, Export, Family, Filter, Handle, Plugin
from nbdkitpy.stack import Stack
from nbdkitpy_filters.ip import Ip, Peer, parse_rules, register_filters
from tests.serving import NoServer

REFUSAL = "client not permitted to connect because of source address restriction"


class Disk(Handle):
    def get_size(self) -> int:
        return 512

    def pread(self, count: int, offset: int) -> bytes:
        return bytes(count)


class Disks(Plugin):
    name = "disks"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.disk = Disk()

    def preconnect(self, client: Client, readonly: bool) -> None:
        self.asked.append("preconnect")

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        self.asked.append("list_exports")
        return [Export("secret")]

    def default_export(self, client: Client, readonly: bool) -> str:
        self.asked.append("default_export")
        return "secret"

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self.asked.append("open")
        return self.disk


def make_stack(*parameters: str, debug: bool = False) -> tuple[Stack, Disks]:
    plugin, ip = Disks(), Ip()
    if debug:
        ip.debug["rules"] = 1
    stack = Stack(plugin, [ip], NoServer())
    stack.load()
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        stack.config(key, value)
    stack.config_complete()
    return stack, plugin


def permits(client: Client, *parameters: str) -> bool:
    stack, _ = make_stack(*parameters)
    try:
        stack.preconnect(client, False)
    except PermissionError as error:
        if error.args != (errno.EACCES, REFUSAL):
            raise
        return False
    return True


def matches(client: Client, rule: str) -> bool:
    """Whether an allow rule matches; a deny rule has to agree, as nothing is unknown about the client."""
    allowed = permits(client, f"allow={rule}", "deny=all")
    assert permits(client, f"deny={rule}") is not allowed
    return allowed


def tcp(address: str | None) -> Client:
    family = Family.INET6 if address and ":" in address else Family.INET
    return Client(1, family, address=address, port=40000)


UNIX = Client(1, Family.UNIX, pid=4711, uid=1000, gid=100, security_label="system_u:system_r:svirt_t:s0")
VSOCK = Client(1, Family.VSOCK, cid=3, port=1023)
UNKNOWN = Client(1)
NAMELESS = Client(1, Family.INET)


# --- the decision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", [tcp("10.0.0.1"), UNIX, VSOCK, UNKNOWN, NAMELESS])
def test_without_rules_everybody_is_permitted(client: Client) -> None:
    assert permits(client)
    assert permits(client, "allow=", "deny=")


@pytest.mark.parametrize(
    ("parameters", "address", "permitted"),
    [
        (["allow=10.0.0.1", "deny=all"], "10.0.0.1", True),
        (["deny=all", "allow=10.0.0.1"], "10.0.0.1", True),
        (["deny=all", "allow=10.0.0.1"], "10.0.0.2", False),
        (["allow=10.0.0.1"], "10.0.0.2", True),
        (["deny=10.0.0.1"], "10.0.0.2", True),
        (["deny=10.0.0.1"], "10.0.0.1", False),
        (["allow=all", "deny=all"], "10.0.0.1", True),
        (["allow=10.0.0.1,10.0.0.0/24", "deny=all"], "10.0.0.77", True),
        (["allow=uid:1,uid:0,10.0.0.9", "deny=all"], "10.0.0.9", True),
        (["allow=10.0.0.1", "allow=10.0.0.2,10.0.0.3", "deny=all"], "10.0.0.1", True),
        (["allow=10.0.0.1", "allow=10.0.0.2,10.0.0.3", "deny=all"], "10.0.0.3", True),
        (["allow=10.0.0.1", "allow=", "deny=all"], "10.0.0.1", True),
        (["allow=10.0.0.1,", "deny=all"], "10.0.0.1", True),
        (["allow=10.0.0.1,", "deny=all"], "10.0.0.2", False),
    ],
)
def test_A3_allow_comes_first_then_deny_then_everybody(parameters: list[str], address: str, permitted: bool) -> None:
    assert permits(tcp(address), *parameters) is permitted


@pytest.mark.parametrize(
    "client", [UNKNOWN, NAMELESS, Client(1, Family.INET6), Client(1, Family.INET6, address="rubbish")]
)
@pytest.mark.parametrize(
    "parameters",
    [["deny=8.0.0.0/8"], ["deny=anyunix"], ["allow=127.0.0.1"], ["allow=anyipv4,anyipv6"], ["deny=all"]],
)
def test_A4_a_client_of_unknown_address_is_refused_by_any_rules(client: Client, parameters: list[str]) -> None:
    assert not permits(client, *parameters)


@pytest.mark.parametrize("client", [UNKNOWN, NAMELESS])
def test_only_a_rule_for_all_permits_a_client_of_unknown_address(client: Client) -> None:
    assert permits(client, "allow=all", "deny=all")


@pytest.mark.parametrize("client", [UNIX, VSOCK, UNKNOWN])
def test_A4_nbdkit_1_40_deny_all_refuses_other_families_than_the_allowed_one(client: Client) -> None:
    assert not permits(client, "allow=127.0.0.1,loopback,0.0.0.0/0,::/0", "deny=all")


# --- keywords -------------------------------------------------------------------------------------------------------

FAMILIES = {"ipv4": tcp("8.8.8.8"), "ipv6": tcp("2001:db8::1"), "unix": UNIX, "vsock": VSOCK}


@pytest.mark.parametrize("word", ["any", "all", "ANY", "All"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_keywords_match_their_family_alone(word: str, family: str) -> None:
    matched = {name for name, client in FAMILIES.items() if matches(client, word + family)}

    assert matched == {family}


@pytest.mark.parametrize("rule", ["all", "any", "ALL", "Any"])
@pytest.mark.parametrize("client", FAMILIES.values())
def test_A4_nbdkit_1_40_all_matches_every_family(rule: str, client: Client) -> None:
    assert matches(client, rule)


@pytest.mark.parametrize(
    ("rules", "matched"),
    [
        (["loopback", "LoopBack"], {"127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"}),
        (["loopbackipv4", "loopbackv4", "loopback4"], {"127.0.0.1", "127.1.2.3", "::ffff:127.0.0.1"}),
        (["loopbackipv6", "loopbackv6", "loopback6"], {"::1"}),
    ],
)
def test_loopback_keywords(rules: list[str], matched: set[str]) -> None:
    peers = ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "128.0.0.1", "126.255.255.255", "::2", "::"]
    for rule in rules:
        assert {peer for peer in peers if matches(tcp(peer), rule)} == matched
        assert not matches(UNIX, rule)


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "address", "matched"),
    [
        ("10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.10", False),
        ("10.0.0.10", "10.0.0.1", False),
        ("10.0.0.1/32", "10.0.0.1", True),
        ("10.0.0.0/31", "10.0.0.1", True),
        ("10.0.0.0/31", "10.0.0.2", False),
        ("10.0.0.77/24", "10.0.0.1", True),
        ("10.0.0.77/24", "10.0.1.77", False),
        ("0.0.0.0/0", "255.255.255.255", True),
        ("9.9.9.9/0", "1.2.3.4", True),
        ("0.0.0.0/0", "::1", False),
        ("::/0", "2001:db8::1", True),
        ("::/0", "10.0.0.1", False),
        ("2001:db8::1", "2001:0db8:0:0:0:0:0:1", True),
        ("2001:DB8::1", "2001:db8::1", True),
        ("2001:db8::1", "2001:db8::10", False),
        ("2001:db8::1/127", "2001:db8::", True),
        ("2001:db8::/128", "2001:db8::1", False),
        ("2001:db8:ffff::/32", "2001:db8::1", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("fe80::1", "fe80::1%2", True),
        ("fe80::1", "fe80::1%odd%name/0", True),
        ("::ffff:0:0/95", "::fffe:0:1", True),
        ("fe80::1", "fe80::2%2", False),
        ("::ffff:a00:1", "10.0.0.1", True),
    ],
)
def test_A2_A6_A7_CVE_2013_6410_an_address_matches_by_its_prefix(rule: str, address: str, matched: bool) -> None:
    assert matches(tcp(address), rule) is matched


def test_the_uid_of_a_unix_client_is_no_address() -> None:
    assert not matches(UNIX, "0.0.0.0/0")


def dotted(number: int) -> str:
    return ".".join(str(number >> shift & 255) for shift in (24, 16, 8, 0))


def colons(number: int) -> str:
    return ":".join(f"{number >> shift & 0xFFFF:x}" for shift in range(112, -1, -16))


@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.integers(0, 32))
def test_A2_ipv4_bits_matter_within_the_prefix_only(base: int, flipped: int, length: int) -> None:
    (rule,) = parse_rules(f"{dotted(base)}/{length}")

    assert rule.matches(Peer.of(tcp(dotted(base)))) is True
    assert rule.matches(Peer.of(tcp(dotted(base ^ 1 << flipped)))) is (flipped < 32 - length)


@given(st.integers(1 << 64, 2**128 - 1), st.integers(0, 127), st.integers(0, 128))
def test_A2_ipv6_bits_matter_within_the_prefix_only(base: int, flipped: int, length: int) -> None:
    (rule,) = parse_rules(f"{colons(base)}/{length}")

    assert rule.matches(Peer.of(tcp(colons(base)))) is True
    if (base ^ 1 << flipped) >> 32 != 0xFFFF:  # not a mapped one
        assert rule.matches(Peer.of(tcp(colons(base ^ 1 << flipped)))) is (flipped < 128 - length)


@given(st.integers(0, 2**32 - 1), st.integers(0, 31), st.integers(0, 32))
def test_A1_mapped_forms_of_rule_and_peer_mean_the_same_as_ipv4(base: int, flipped: int, length: int) -> None:
    rules = [parse_rules(f"{dotted(base)}/{length}")[0], parse_rules(f"::ffff:{dotted(base)}/{96 + length}")[0]]
    other = dotted(base ^ 1 << flipped)

    for rule in rules:
        for peer in (tcp(other), tcp(f"::ffff:{other}"), tcp(f"::ffff:{other}%eth0")):
            assert rule.matches(Peer.of(peer)) is (flipped < 32 - length)


@pytest.mark.parametrize(
    ("parameters", "permitted"),
    [
        (["deny=anyipv4"], False),
        (["allow=anyipv4", "deny=all"], True),
        (["allow=anyipv6", "deny=all"], False),
        (["deny=anyipv6"], True),
        (["deny=10.0.0.0/8"], False),
        (["deny=::ffff:10.0.0.0/104"], False),
        (["deny=::ffff:0:0/96"], False),
        (["allow=10.0.0.1", "deny=all"], True),
        (["allow=::/0", "deny=all"], False),
        (["allow=::/80", "deny=all"], False),
        (["allow=::ffff:0:0/95", "deny=all"], False),
        (["allow=::1", "deny=anyipv4"], False),
    ],
)
def test_A1_an_ipv4_client_of_an_ipv6_socket_is_an_ipv4_client(parameters: list[str], permitted: bool) -> None:
    assert permits(tcp("::ffff:10.0.0.1"), *parameters) is permitted
    assert permits(tcp("10.0.0.1"), *parameters) is permitted


# --- credentials ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        ("pid:4711", True),
        ("pid:471", False),
        ("uid:1000", True),
        ("UID:1000", True),
        ("uid:0x3e8", True),
        ("uid:0", False),
        ("gid:100", True),
        ("gid:1000", False),
        ("security:system_u:system_r:svirt_t:s0", True),
        ("security:system_u:system_r:svirt_t", False),
        ("security:SYSTEM_U:system_r:svirt_t:s0", False),
        ("vsock-cid:1000", False),
    ],
)
def test_A5_nbdkit_1_40_credentials_of_a_unix_client(rule: str, matched: bool) -> None:
    assert matches(UNIX, rule) is matched


@pytest.mark.parametrize(
    ("rule", "matched"),
    [("vsock-cid:3", True), ("vsock-cid:2", False), ("vsock-port:1023", True), ("vsock-port:1024", False)],
)
def test_context_and_port_of_a_vsock_client(rule: str, matched: bool) -> None:
    assert matches(VSOCK, rule) is matched


@pytest.mark.parametrize("rule", ["pid:1", "uid:0", "gid:0", "vsock-cid:0", "vsock-port:40000"])
def test_credentials_do_not_match_a_tcp_client(rule: str) -> None:
    assert not matches(tcp("10.0.0.1"), rule)


@pytest.mark.parametrize("rule", ["pid:1", "uid:0", "gid:0", "security:x"])
def test_A5_what_a_unix_client_hides_satisfies_deny_and_not_allow(rule: str) -> None:
    hidden = Client(1, Family.UNIX)

    assert not permits(hidden, f"allow={rule}", "deny=all")
    assert not permits(hidden, f"deny={rule}")


def test_a_security_label_of_a_tcp_client_matches() -> None:
    assert matches(Client(1, Family.INET, address="10.0.0.1", security_label="a:b"), "security:a:b")


def test_vsock_has_no_security_labels_to_match() -> None:
    assert not matches(VSOCK, "security:a:b")


def test_several_numeric_rules_in_one_list_each_count() -> None:
    for rules in ("uid:1,uid:1000", "uid:1000,uid:1", "pid:1,uid:1000,10.0.0.0/8"):
        assert matches(UNIX, rules)
    assert not matches(UNIX, "uid:1,uid:2")


# --- certificates ---------------------------------------------------------------------------------------------------

TLS = Client(
    1,
    Family.INET,
    address="10.0.0.1",
    tls=True,
    tls_dn="CN=alice,OU=Disks,O=BigCo,C=GB",
    tls_issuer_dn="CN=BigCo\nRoot",
)


def late_calls(stack: Stack) -> list[Callable[[Client], object]]:
    return [
        lambda client: stack.open("", False, client),
        lambda client: stack.list_exports(client, False),
        lambda client: stack.default_export(client, False),
    ]


def permits_late(client: Client, *parameters: str) -> bool:
    """What open, list_exports and default_export agree on, after a preconnect that decides nothing."""
    stack, plugin = make_stack(*parameters)
    stack.preconnect(client, False)
    verdicts = set()
    for call in late_calls(stack):
        plugin.asked.clear()
        try:
            call(client)
        except PermissionError as error:
            if error.args != (errno.EACCES, REFUSAL):
                raise
            verdicts.add(False)
        else:
            verdicts.add(True)
        assert bool(plugin.asked) is (True in verdicts)
    assert len(verdicts) == 1
    return verdicts.pop()


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        ("dn:CN=alice,OU=Disks,O=BigCo,C=GB", True),
        ("dn:*,O=BigCo,*", True),
        ("dn:*,o=bigco,*", True),
        ("DN:cn=ALIC?,*", True),
        ("dn:CN=alice", False),
        ("dn:O=BigCo", False),
        ("dn:*,O=BigCo", False),
        ("dn:cn=[ab]lice*", True),
        ("dn:cn=[!ab]lice*", False),
        ("dn:*", True),
        ("issuer-dn:CN=BigCo\nRoot", True),
        ("issuer-dn:CN=BigCo", False),
        ("issuer-dn:*Root", True),
        ("issuer-dn:*alice*", False),
    ],
)
def test_a_distinguished_name_is_matched_whole_by_a_wildcard(rule: str, matched: bool) -> None:
    assert permits_late(TLS, f"allow={rule}", "deny=all") is matched
    assert permits_late(TLS, f"deny={rule}") is not matched


@pytest.mark.parametrize("rule", ["dn:*", "issuer-dn:*"])
def test_a_client_without_certificate_satisfies_deny_and_not_allow(rule: str) -> None:
    assert not permits_late(tcp("10.0.0.1"), f"allow={rule}", "deny=all")
    assert not permits_late(tcp("10.0.0.1"), f"deny={rule}")


def test_one_name_rule_makes_all_rules_late() -> None:
    assert permits_late(tcp("10.0.0.1"), "allow=10.0.0.1", "allow=dn:CN=alice", "deny=all")
    assert not permits_late(tcp("10.0.0.2"), "allow=10.0.0.1", "allow=dn:CN=alice", "deny=all")
    assert not permits_late(TLS, "deny=10.0.0.1", "deny=issuer-dn:nobody")


def test_a_name_rule_behind_a_comma_is_a_rule_up_to_the_next_comma() -> None:
    assert [rule.text for rule in parse_rules("all,dn:CN=alice*,uid:1")] == ["all", "dn:CN=alice*", "uid:1"]


@pytest.mark.parametrize("value", ["dn:CN=alice,uid:1,", "issuer-dn:CN=x,O=y", "Issuer-DN:CN=x,O=y"])
def test_a_list_that_begins_with_a_name_rule_is_one_rule(value: str) -> None:
    assert [rule.text for rule in parse_rules(value)] == [value]


# --- where it is applied --------------------------------------------------------------------------------------------


def test_a_refused_client_never_reaches_the_inner_layers() -> None:
    stack, plugin = make_stack("deny=all")

    with pytest.raises(PermissionError):
        stack.preconnect(UNIX, False)

    assert not plugin.asked


def test_early_rules_are_applied_once_in_preconnect() -> None:
    stack, plugin = make_stack("deny=all")

    for call in late_calls(stack):
        call(UNIX)

    assert plugin.asked == ["open", "list_exports", "default_export"]


def test_a_permitted_client_reaches_the_inner_layers() -> None:
    stack, plugin = make_stack("allow=anyunix", "deny=all")

    stack.preconnect(UNIX, False)

    assert plugin.asked == ["preconnect"]


@pytest.mark.parametrize("parameters", [["deny=10.0.0.1"], ["deny=dn:x"]])
def test_no_layer_is_put_around_the_handle(parameters: list[str]) -> None:
    plugin, ip = Disks(), Ip()
    Stack(plugin, [ip], NoServer())
    for parameter in parameters:
        ip.config(*parameter.split("=", 1))

    assert ip.wrap(plugin.disk, TLS) is plugin.disk


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["allow", "deny"])
@pytest.mark.parametrize(
    ("value", "why"),
    [
        (",", "it is empty"),
        ("any,,all", "it is empty"),
        ("any,all,,", "it is empty"),
        (",any", "it is empty"),
        ("any, all", "neither an IPv4 or IPv6 address nor one of all, any"),
        ("localhost", "neither an IPv4 or IPv6 address nor one of all, any"),
        ("10.0.0.1,user:1", "'user:1' is none"),
        ("1.2.3", "4 octets"),
        ("1.2.3.4.5", "4 octets"),
        ("1.2.3.256", "256"),
        ("127.0.0.01", "[Ll]eading zeros"),
        ("0x7f.0.0.1", "digits"),
        ("１.2.3.4", "neither"),
        ("1.2.3.４", "digits"),
        ("1.2.3.4\n", "digits"),
        ("10.0.0.0/33", "from 0 to 32"),
        ("10.0.0.0/-1", "from 0 to 32"),
        ("10.0.0.0/08", "from 0 to 32, without leading zeros"),
        ("10.0.0.0/", "from 0 to 32"),
        ("10.0.0.0/8/8", "from 0 to 32"),
        ("10.0.0.0/255.0.0.0", "from 0 to 32"),
        ("::/129", "from 0 to 128"),
        ("/8", "is empty"),
        ("1::2::3", "::"),
        ("[::1]", "hex digits"),
        ("::ffff:127.0.0.01", "zeros"),
        ("fe80::1%eth0", "scope"),
        ("fe80::%eth0/64", "scope"),
        ("pid:0", "from 1 to 2147483647"),
        ("pid:-1", "from 1 to 2147483647"),
        ("pid:2147483648", "from 1 to 2147483647"),
        ("uid:", "from 0 to 4294967294"),
        ("uid:root", "from 0 to 4294967294"),
        ("uid:4294967295", "from 0 to 4294967294"),
        ("uid:010", "leading zeros"),
        ("uid: 1", "from 0"),
        ("uid:１", "from 0"),
        ("gid:1x", "from 0 to 4294967294"),
        ("gid:" + "9" * 5000, "from 0 to 4294967294"),
        ("vsock-cid:4294967296", "from 0 to 4294967295"),
        ("vsock-port:-1", "from 0 to 4294967295"),
        ("security:", "security label is missing"),
        ("dn:", "wildcard is missing"),
        ("issuer-dn:", "wildcard is missing"),
        ("dn", "neither"),
        ("all,dn:CN=x,O=y", "'O=y' is none"),
    ],
)
def test_A3_A7_what_is_no_rule_is_a_configuration_error(key: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"^ip: {key} must be rules separated by commas \(.*{why}.*\), not "):
        make_stack(f"{key}={value}")


@pytest.mark.parametrize("value", ["uid:4294967294", "pid:2147483647", "vsock-cid:4294967295", "vsock-port:0"])
def test_numbers_are_taken_to_the_ends_of_their_range(value: str) -> None:
    assert [rule.text for rule in parse_rules(value)] == [value]


LIKE_RULES = st.text(st.sampled_from("0123456789abcdefx:./,%[]!*?-^\\ dnuipallOo="), max_size=30)
KINDS = st.sampled_from(["", "", "", "dn:", "issuer-dn:", "uid:", "security:", "::ffff:", "10.0.0.0/"])


@given(KINDS, LIKE_RULES | st.text())
def test_any_text_is_rules_that_can_be_applied_or_a_value_error(kind: str, text: str) -> None:
    text = kind + text
    try:
        rules = parse_rules(text)
    except ValueError as error:
        assert str(error).startswith("rules separated by commas (")  # noqa: PT017  # most texts are rules of no kind
        return
    assert rules or not text
    for client in (tcp("10.0.0.1"), tcp("::1"), Client(1, tls=True, tls_dn="CN=client", tls_issuer_dn="CN=ca")):
        assert all(rule.matches(Peer.of(client)) in (True, False, None) for rule in rules)


@given(st.text() | st.ip_addresses().map(str))
def test_A7_no_address_text_of_a_peer_is_a_crash(address: str) -> None:
    peer = Peer.of(Client(1, Family.INET6, address=address))

    assert (peer.family is Family.UNKNOWN) is (peer.address is None)


# --- while it runs --------------------------------------------------------------------------------------------------


def reload(stack: Stack, **lists: list[str]) -> list[str]:
    return stack.reload({stack.filters[0]: lists})


def is_permitted(stack: Stack, client: Client) -> bool:
    try:
        stack.preconnect(client, False)
    except PermissionError:
        return False
    return True


def test_new_rules_are_for_clients_that_connect_from_then_on() -> None:
    stack, _ = make_stack("allow=10.0.0.1", "deny=all")
    export = stack.open("", False, tcp("10.0.0.1"))

    told = reload(stack, allow=["10.0.0.2,10.0.0.3", "::1"])

    assert told == ["ip: allow has been set: 10.0.0.2,10.0.0.3 and ::1"]
    addresses = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "::1", "::2"]
    assert [is_permitted(stack, tcp(address)) for address in addresses] == [False, True, True, True, False]
    assert export.handle.pread(512, 0) == bytes(512)


def test_rules_that_are_removed_no_longer_hold() -> None:
    stack, _ = make_stack("deny=all")

    reload(stack, deny=[])

    assert is_permitted(stack, UNKNOWN)


def test_a_wrong_rule_leaves_all_old_ones_in_force() -> None:
    stack, _ = make_stack("allow=10.0.0.1", "deny=all")

    with pytest.raises(ConfigError, match="ip: deny must be rules separated by commas"):
        reload(stack, allow=["all"], deny=["10.0.0.0/8", "localhost"])

    assert is_permitted(stack, tcp("10.0.0.1"))
    assert not is_permitted(stack, tcp("10.0.0.2"))


class AddressWithConsequences(str):
    """Something happens while a rule is about to be applied to it."""

    consequence: Callable[[], object]

    def partition(self, separator: str) -> tuple[str, str, str]:
        self.consequence()
        return super().partition(separator)


def test_a_check_that_has_begun_goes_by_the_old_rules() -> None:
    stack, _ = make_stack("deny=10.0.0.1")
    address = AddressWithConsequences("10.0.0.1")
    address.consequence = lambda: reload(stack, deny=[])

    assert not is_permitted(stack, tcp(address))
    assert is_permitted(stack, tcp("10.0.0.1"))


def test_a_client_that_was_to_be_checked_late_is_still_checked_when_late_rules_have_gone() -> None:
    stack, _ = make_stack("allow=dn:*alice*", "deny=all")
    stack.preconnect(tcp("10.0.0.1"), False)

    reload(stack, allow=["10.0.0.2"])

    for call in late_calls(stack):
        with pytest.raises(PermissionError):
            call(tcp("10.0.0.1"))
    assert not is_permitted(stack, tcp("10.0.0.1"))
    stack.preconnect(tcp("10.0.0.2"), False)
    stack.open("", False, tcp("10.0.0.2"))


def test_rules_may_become_late() -> None:
    stack, _ = make_stack("deny=all")

    reload(stack, allow=["dn:*alice*"])

    stack.preconnect(TLS, False)
    stack.open("", False, TLS)
    stack.preconnect(UNIX, False)
    with pytest.raises(PermissionError):
        stack.open("", False, UNIX)


# --- odds and ends --------------------------------------------------------------------------------------------------


def test_the_debug_flag_logs_rules_and_decisions(caplog: pytest.LogCaptureFixture) -> None:
    assert "rules" in Ip.debug_flags
    caplog.set_level(logging.DEBUG, "nbdkitpy.ip")

    stack, _ = make_stack("allow=10.0.0.0/8", "deny=anyunix,10.0.0.1", debug=True)
    stack.preconnect(tcp("::ffff:10.0.0.1"), False)
    stack.preconnect(tcp("8.8.8.8"), False)
    for client in (UNIX, UNKNOWN):
        with pytest.raises(PermissionError):
            stack.preconnect(client, False)

    assert [record.getMessage() for record in caplog.records] == [
        "ip: allow rules: ['10.0.0.0/8']",
        "ip: deny rules: ['anyunix', '10.0.0.1']",
        "ip: rules are applied at once",
        "ip: connection 1 ([::ffff:10.0.0.1]:40000), taken as 10.0.0.1: permitted: rule '10.0.0.0/8'",
        "ip: connection 1 (8.8.8.8:40000), taken as 8.8.8.8: permitted: no rule matches",
        "ip: connection 1 (unix pid=4711 uid=1000), taken as unix: refused: rule 'anyunix'",
        "ip: connection 1 (unknown address), taken as unknown: refused: its address is unknown",
    ]


def test_the_debug_log_says_that_name_rules_come_late(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nbdkitpy.ip")

    make_stack("deny=dn:x", debug=True)

    assert caplog.records[-1].getMessage() == "ip: rules are applied late, after TLS"


def test_without_the_debug_flag_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nbdkitpy.ip")

    stack, _ = make_stack("allow=all")
    stack.preconnect(UNIX, False)

    assert not caplog.records


def test_the_module_registers_the_filter() -> None:
    registered: list[type[Filter]] = []

    register_filters(registered.append)

    assert registered == [Ip]
    assert set(Ip.parameters) == {"allow", "deny"}

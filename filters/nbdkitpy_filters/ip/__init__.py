"""The ip filter: who may connect, by address, Unix socket credentials, vsock, security label or TLS certificate.

A client is permitted if a rule of ``allow=`` matches it, refused if a rule of ``deny=`` does, and permitted otherwise.
Whatever cannot be known is decided against the client: it does not satisfy an allow rule, and it does satisfy a deny
rule that would have to know it.
"""

from __future__ import annotations

import errno
import fnmatch
import ipaddress
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from nbdkitpy import Client, Export, Family, Filter, Handle, Repeated, hookimpl

__all__ = ["Ip", "Peer", "Rule", "parse_rules"]

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_REFUSAL = "client not permitted to connect because of source address restriction"

#: Decimal or hexadecimal. Not octal: whether ``uid:010`` is 8 or 10 is no question to have in an access rule.
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|0|[1-9][0-9]{0,19}", re.ASCII)

_MAX_PID = (1 << 31) - 1
_MAX_ID = (1 << 32) - 2  # (uid_t) -1 is how the system says that it does not know
_MAX_U32 = (1 << 32) - 1


class Peer(NamedTuple):
    """A client as the rules see it.

    IPv4 in the clothes of IPv6 (``::ffff:10.0.0.1``, from a socket that serves both) is IPv4 here, so that a rule
    means the same whatever kind of socket the client came by. A TCP client without a readable address is unknown.
    """

    client: Client
    family: Family
    address: Address | None = None

    @classmethod
    def of(cls, client: Client) -> Peer:
        """Return `client` as the rules see it."""
        if client.family not in (Family.INET, Family.INET6):
            return cls(client, client.family)
        try:
            # What follows % says by which interface the address is reached, and is no part of it.
            address = _unmapped(ipaddress.ip_address((client.address or "").partition("%")[0]))
        except ValueError:
            return cls(client, Family.UNKNOWN)
        return cls(client, Family.INET if address.version == 4 else Family.INET6, address)


def _unmapped(address: Address) -> Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


#: Tells whether a rule matches; None if that cannot be known, as the system did not say what the rule asks about.
Test: TypeAlias = Callable[[Peer], bool | None]


class Rule(NamedTuple):
    """One rule of an allow or deny list."""

    text: str  #: as it was given
    matches: Test
    late: bool = False  #: it can be decided only when TLS is up


# --- keywords -------------------------------------------------------------------------------------------------------


def _anyone(peer: Peer) -> bool:
    return True


def _family(family: Family) -> Test:
    return lambda peer: peer.family is family


def _within(*networks: Network) -> Test:
    # An address is never within a network of the other version.
    return lambda peer: peer.address is not None and any(peer.address in network for network in networks)


_LOOPBACK4 = ipaddress.IPv4Network("127.0.0.0/8")
_LOOPBACK6 = ipaddress.IPv6Network("::1/128")

_KEYWORDS: Mapping[str, Test] = MappingProxyType(
    {
        **dict.fromkeys(("all", "any"), _anyone),
        **dict.fromkeys(("allipv4", "anyipv4"), _family(Family.INET)),
        **dict.fromkeys(("allipv6", "anyipv6"), _family(Family.INET6)),
        **dict.fromkeys(("allunix", "anyunix"), _family(Family.UNIX)),
        **dict.fromkeys(("allvsock", "anyvsock"), _family(Family.VSOCK)),
        "loopback": _within(_LOOPBACK4, _LOOPBACK6),
        **dict.fromkeys(("loopbackipv4", "loopbackv4", "loopback4"), _within(_LOOPBACK4)),
        **dict.fromkeys(("loopbackipv6", "loopbackv6", "loopback6"), _within(_LOOPBACK6)),
    }
)


# --- rules of the form KIND:VALUE -----------------------------------------------------------------------------------


def _equals(attribute: str, families: frozenset[Family], wanted: int | str) -> Test:
    """The peer is of one of `families`, and this attribute of the client is what is `wanted`."""

    def matches(peer: Peer) -> bool | None:
        if peer.family not in families:
            return False
        value = getattr(peer.client, attribute)
        return None if value is None else bool(value == wanted)

    return matches


def _numeric(attribute: str, family: Family, minimum: int, maximum: int) -> Callable[[str], Test]:
    return lambda text: _equals(attribute, frozenset({family}), _number(text, minimum, maximum))


def _number(text: str, minimum: int, maximum: int) -> int:
    number = int(text, 0) if _NUMBER.fullmatch(text) else None
    if number is None or not minimum <= number <= maximum:
        raise ValueError(f"the number must be from {minimum} to {maximum}, without leading zeros")
    return number


def _security(text: str) -> Test:
    families = frozenset({Family.UNIX, Family.INET, Family.INET6})  # no other has labels
    return _equals("security_label", families, _nonempty(text, "security label"))


def _dn(attribute: str) -> Callable[[str], Test]:
    def parse(text: str) -> Test:
        wildcard = re.compile(fnmatch.translate(_nonempty(text, "wildcard").casefold()))

        def matches(peer: Peer) -> bool | None:
            name: str | None = getattr(peer.client, attribute)
            return None if name is None else wildcard.match(name.casefold()) is not None

        return matches

    return parse


def _nonempty(text: str, what: str) -> str:
    if not text:
        raise ValueError(f"the {what} is missing")
    return text


_LATE = ("dn", "issuer-dn")

_KINDS: Mapping[str, Callable[[str], Test]] = MappingProxyType(
    {
        "pid": _numeric("pid", Family.UNIX, 1, _MAX_PID),
        "uid": _numeric("uid", Family.UNIX, 0, _MAX_ID),
        "gid": _numeric("gid", Family.UNIX, 0, _MAX_ID),
        "security": _security,
        "vsock-cid": _numeric("cid", Family.VSOCK, 0, _MAX_U32),
        "vsock-port": _numeric("port", Family.VSOCK, 0, _MAX_U32),
        "dn": _dn("tls_dn"),
        "issuer-dn": _dn("tls_issuer_dn"),
    }
)


# --- parsing --------------------------------------------------------------------------------------------------------


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return the rules of one ``allow=`` or ``deny=``: separated by commas, except that a DN rule takes all the rest.

    Nothing is no rule at all, and one comma at the end does no harm.

    Raises:
        ValueError: one of the rules is none.
    """
    if text.partition(":")[0].lower() in _LATE:
        return (_parse_rule(text),)
    entries = text.removesuffix(",").split(",") if text else []
    return tuple(_parse_rule(entry) for entry in entries)


def _parse_rule(text: str) -> Rule:
    kind, colon, value = text.partition(":")
    kind = kind.lower()
    try:
        if text.lower() in _KEYWORDS:
            return Rule(text, _KEYWORDS[text.lower()])
        if colon and kind in _KINDS:
            return Rule(text, _KINDS[kind](value), late=kind in _LATE)
        return Rule(text, _within(_network(text)))
    except ValueError as error:
        raise ValueError(f"rules separated by commas ({text[:80]!r} is none: {error})") from None


def _network(text: str) -> Network:
    """The network that ``ADDRESS`` or ``ADDRESS/N`` means; bits of the address past the prefix do not matter."""
    base, slash, prefix = text.partition("/")
    address = _address(base)
    length = _number(prefix, 0, address.max_prefixlen) if slash else address.max_prefixlen
    if isinstance(address, ipaddress.IPv4Address):
        return ipaddress.IPv4Network((address, length), strict=False)
    network = ipaddress.IPv6Network((address, length), strict=False)
    mapped = network.network_address.ipv4_mapped
    # Mapped peers are compared as IPv4, so a rule written in the mapped form has to be too, or would never match. With
    # less than 96 bits the address of a network is never a mapped one.
    return network if mapped is None else ipaddress.IPv4Network((mapped, length - 96))


def _address(text: str) -> Address:
    if "%" in text:
        raise ValueError("an address with a scope (%) cannot be matched, leave the scope out")
    if text.count(":") >= 2:
        return ipaddress.IPv6Address(text)
    if re.match("[0-9]", text):
        return ipaddress.IPv4Address(text)
    known = ", ".join((*_KEYWORDS, *(f"{kind}:" for kind in _KINDS)))
    raise ValueError(f"it is neither an IPv4 or IPv6 address nor one of {known}" if text else "it is empty")


# --- the filter -----------------------------------------------------------------------------------------------------


class _Rules(NamedTuple):
    """Both lists, in one object, so that no client is checked by one old and one new list."""

    allow: tuple[Rule, ...] = ()
    deny: tuple[Rule, ...] = ()

    @property
    def late(self) -> bool:
        """All rules are to be applied after the TLS handshake, since one of them has to be."""
        return any(rule.late for rule in (*self.allow, *self.deny))


class Ip(Filter):
    """Refuse clients by where they come from and who they are."""

    name = "ip"
    longname = "nbdkitpy ip filter"
    description = "Filter clients by IP address, process ID, user ID, group ID and more."
    multi_process = True
    debug_flags = frozenset({"rules"})

    allow = Repeated(
        parse_rules,
        live=True,
        help="Rules separated by commas; a client that one of them matches is permitted. May be repeated.",
    )
    deny = Repeated(
        parse_rules,
        live=True,
        help="Rules separated by commas; a client that one of them matches is refused unless allowed. May be repeated.",
    )

    def __init__(self) -> None:
        super().__init__()
        self._rules = _Rules()
        self._late = False  # rules are, or once were, applied after the TLS handshake
        self._log = logging.getLogger("nbdkitpy.ip")

    def config_complete(self) -> None:
        super().config_complete()
        self._renew()

    def reload(self, values: Mapping[str, Any]) -> None:
        super().reload(values)
        self._renew()

    def _renew(self) -> None:
        """Make rules of the parameters. Clients may be checked meanwhile, by either the old rules or the new ones."""
        rules = _Rules(
            tuple(rule for rules in self.allow for rule in rules), tuple(rule for rules in self.deny for rule in rules)
        )
        # Never taken back, as clients that were not checked when they connected may not have come to open yet. And
        # first of all, as clients may already be let through to there by the new rules.
        self._late |= rules.late
        self._rules = rules
        if self.debug.get("rules"):
            self._log.debug("ip: allow rules: %s", [rule.text for rule in rules.allow])
            self._log.debug("ip: deny rules: %s", [rule.text for rule in rules.deny])
            self._log.debug("ip: rules are applied %s", "late, after TLS" if rules.late else "at once")

    def preconnect(self, client: Client, readonly: bool) -> None:
        rules = self._rules
        if not rules.late:
            self._check(rules, client)
        super().preconnect(client, readonly)

    # What a client could learn or open once TLS is up; before that, preconnect has decided.

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        self._check_late(client)
        return super().list_exports(client, readonly)

    def default_export(self, client: Client, readonly: bool) -> str:
        self._check_late(client)
        return super().default_export(client, readonly)

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        self._check_late(client)
        return super().open(export_name, readonly, client)

    def _check_late(self, client: Client) -> None:
        if self._late:
            self._check(self._rules, client)

    def _check(self, rules: _Rules, client: Client) -> None:
        """Refuse `client`, by raising PermissionError, if the rules say so."""
        if not rules.allow and not rules.deny:
            return
        peer = Peer.of(client)
        allowing = next((rule for rule in rules.allow if rule.matches(peer)), None)
        denying = None if allowing else next((rule for rule in rules.deny if rule.matches(peer) is not False), None)
        permitted = allowing is not None or (denying is None and peer.family is not Family.UNKNOWN)
        if self.debug.get("rules"):
            self._log_decision(peer, permitted, allowing or denying)
        if not permitted:
            raise PermissionError(errno.EACCES, _REFUSAL)

    def _log_decision(self, peer: Peer, permitted: bool, rule: Rule | None) -> None:
        verdict = "permitted" if permitted else "refused"
        because = f"rule {rule.text!r}" if rule else "no rule matches" if permitted else "its address is unknown"
        self._log.debug("ip: %s, taken as %s: %s: %s", peer.client, peer.address or peer.family.value, verdict, because)


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(Ip)

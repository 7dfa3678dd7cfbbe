"""How the server is to run: settled before it starts, the same until it ends."""

from __future__ import annotations

import enum
from typing import NamedTuple

from nbdkitpy.protocol.constants import DEFAULT_PORT, HandshakeFlag, TlsMode
from nbdkitpy.protocol.handshake import MAX_OPTIONS

__all__ = ["AddressFamily", "Endpoint", "ServerOptions", "Transport"]


class Transport(enum.Enum):
    """What the server listens on."""

    TCP = "tcp"
    UNIX = "unix"
    VSOCK = "vsock"


class AddressFamily(enum.Enum):
    """Which kinds of internet addresses TCP listens on."""

    ANY = "any"
    INET = "ipv4"
    INET6 = "ipv6"


class Endpoint(NamedTuple):
    """One thing to listen on. TCP may stand for several sockets, one for each address."""

    transport: Transport = Transport.TCP
    address: str | None = None  #: TCP: name or address to listen on; None is loopback, "any" is every interface
    address_family: AddressFamily = AddressFamily.ANY
    port: str = str(DEFAULT_PORT)  #: TCP: number or service name, 0 for any free one; vsock: 32-bit number
    unix_path: str | None = None  #: absolute path of the Unix socket; None makes one in a private directory
    fd: int | None = None  #: a socket that listens already, handed to us by a service manager


class ServerOptions(NamedTuple):
    """Settings of the server itself; those of the plugin and the filters are theirs."""

    endpoints: tuple[Endpoint, ...] = (Endpoint(),)  #: what to listen on, all at once
    export_name: str = ""  #: only for the URI
    readonly: bool = False
    threads: int = 16  #: the most workers that one connection has
    workers: int = 0  #: processes that serve, beside the one that accepts clients; 0 is that one alone
    oldstyle: bool = False
    handshake_flags: int = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    structured_replies: bool = True
    meta_contexts: bool = True
    pidfile: str | None = None
    drain: float = 5.0  #: seconds that clients have to take their replies when the server ends
    handshake_timeout: float = 10.0  #: seconds that a client has for the whole handshake; 0 is for ever
    idle_timeout: float = 0.0  #: seconds without a request after which a client is disconnected; 0 is for ever
    keepalive: bool = False  #: have the system find out whether TCP clients are still there
    max_connections: int = 1000  #: so many clients at once; 0 is any number, here and below
    max_connections_per_source: int = 0  #: so many of one address, or of one user of a Unix socket
    max_handshakes: int = 1000  #: so many unfinished handshakes are kept; past that the oldest is closed
    max_options: int = MAX_OPTIONS  #: of one handshake; at least 1
    max_buffered: int = 512 << 20  #: bytes of payloads and replies that a process holds for all of its clients
    max_buffered_per_connection: int = 128 << 20  #: and for one of them
    stall_timeout: float = 30.0  #: seconds that a client may keep what others wait for; 0 is for ever
    tls: TlsMode | None = None  #: None is on if there is what it takes
    tls_certificates: str | None = None  #: absolute path of the directory with certificates and keys
    tls_psk: str | None = None  #: absolute path of a file of pre-shared keys, which are used in place of certificates
    tls_verify_peer: bool = False  #: clients have to show a certificate that our authority has signed
    tls_priority: str | None = None  #: ciphers in OpenSSL's terms

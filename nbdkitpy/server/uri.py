"""NBD URIs of a server, as clients on the same machine reach it. In nbdkit's forms, so scripts may compare them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from nbdkitpy.protocol.constants import DEFAULT_PORT
from nbdkitpy.server.options import Transport

__all__ = ["make_uri"]

# RFC 3986's unreserved characters, and the slash, which stands for itself in a path and in a query.
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")

#: The context that a vsock client on the machine itself connects to.
_VSOCK_LOCAL = 1


def make_uri(
    transport: Transport,
    export_name: str = "",
    *,
    port: int | None = None,
    unix_path: str | None = None,
    host: str = "localhost",
    tls: Mapping[str, str] | None = None,
) -> str:
    """Return the URI, in the form that the transport has.

    ``nbd://HOST[:PORT][/EXPORT]``, ``nbd+unix://[/EXPORT]?socket=PATH`` or ``nbd+vsock://1[:PORT][/EXPORT]``, in which
    a guest puts 2, its host, in place of the 1. The standard port is left out, an IPv6 address put in brackets. With
    TLS ``nbds`` stands in place of ``nbd``.

    Args:
        transport: What the server listens on.
        export_name: What clients are to ask for; "" for the default export.
        port: For TCP and vsock.
        unix_path: For a Unix socket.
        host: For TCP, a name or an address.
        tls: If clients have to use TLS, the parameters by which a client finds what it needs for that.
    """
    scheme = "nbd" if tls is None else "nbds"
    query = [f"{key}={_quoted(value)}" for key, value in (tls or {}).items()]
    path = f"/{_quoted(export_name)}" if export_name else ""
    if transport is Transport.UNIX:
        query.insert(0, f"socket={_quoted(unix_path or '')}")
        return f"{scheme}+unix://{path}?{'&'.join(query)}"
    rest = ("" if port in (None, DEFAULT_PORT) else f":{port}") + path + (f"?{'&'.join(query)}" if query else "")
    if transport is Transport.VSOCK:
        return f"{scheme}+vsock://{_VSOCK_LOCAL}{rest}"
    if ":" in host:
        host = f"[{host.replace('%', '%25')}]"  # the % is that of a link-local address's zone
    return f"{scheme}://{host}{rest}"


def _quoted(text: str) -> str:
    # By hand: urllib.parse costs some milliseconds of each start.
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in os.fsencode(text))

"""NBD URIs of a server, as clients on the same machine reach it. In nbdkit's forms, so scripts may compare them."""

from __future__ import annotations

import os

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
) -> str:
    """Return the URI, in the form that the transport has.

    ``nbd://HOST[:PORT][/EXPORT]``, ``nbd+unix://[/EXPORT]?socket=PATH`` or ``nbd+vsock://1[:PORT][/EXPORT]``, in which
    a guest puts 2, its host, in place of the 1. The standard port is left out, an IPv6 address put in brackets.

    Args:
        transport: What the server listens on.
        export_name: What clients are to ask for; "" for the default export.
        port: For TCP and vsock.
        unix_path: For a Unix socket.
        host: For TCP, a name or an address.
    """
    path = f"/{_quoted(export_name)}" if export_name else ""
    if transport is Transport.UNIX:
        return f"nbd+unix://{path}?socket={_quoted(unix_path or '')}"
    suffix = "" if port in (None, DEFAULT_PORT) else f":{port}"
    if transport is Transport.VSOCK:
        return f"nbd+vsock://{_VSOCK_LOCAL}{suffix}{path}"
    if ":" in host:
        host = f"[{host.replace('%', '%25')}]"  # the % is that of a link-local address's zone
    return f"nbd://{host}{suffix}{path}"


def _quoted(text: str) -> str:
    # By hand: urllib.parse costs some milliseconds of each start.
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in os.fsencode(text))

"""The URI of each transport."""

from __future__ import annotations

from typing import Any

import pytest

from nbdkitpy.server.options import Transport
from nbdkitpy.server.uri import make_uri


@pytest.mark.parametrize(
    ("port", "name", "host", "uri"),
    [
        (10809, "", "localhost", "nbd://localhost"),
        (None, "", "localhost", "nbd://localhost"),
        (10810, "", "localhost", "nbd://localhost:10810"),
        (10809, "disk", "localhost", "nbd://localhost/disk"),
        (1, "a/b c?#%é", "localhost", "nbd://localhost:1/a/b%20c%3F%23%25%C3%A9"),
        (1, "/x", "localhost", "nbd://localhost:1//x"),
        (10809, "\udcff", "localhost", "nbd://localhost/%FF"),
        (10809, "A-Z.a_z~09", "10.0.0.1", "nbd://10.0.0.1/A-Z.a_z~09"),
        (10810, "", "::1", "nbd://[::1]:10810"),
        (10809, "x", "fe80::1%eth0", "nbd://[fe80::1%25eth0]/x"),
    ],
)
def test_tcp(port: int | None, name: str, host: str, uri: str) -> None:
    assert make_uri(Transport.TCP, name, port=port, host=host) == uri


@pytest.mark.parametrize(
    ("path", "name", "uri"),
    [
        ("/run/x.sock", "", "nbd+unix://?socket=/run/x.sock"),
        ("/run/x.sock", "disk 1", "nbd+unix:///disk%201?socket=/run/x.sock"),
        ("/a b&c=d", "", "nbd+unix://?socket=/a%20b%26c%3Dd"),
    ],
)
def test_unix(path: str, name: str, uri: str) -> None:
    assert make_uri(Transport.UNIX, name, unix_path=path) == uri


@pytest.mark.parametrize(
    ("transport", "where", "tls", "uri"),
    [
        (Transport.TCP, {"port": 10809}, {}, "nbds://localhost/x"),
        (Transport.TCP, {"port": 1}, {"tls-certificates": "/a b"}, "nbds://localhost:1/x?tls-certificates=/a%20b"),
        (Transport.UNIX, {"unix_path": "/s"}, {}, "nbds+unix:///x?socket=/s"),
        (Transport.UNIX, {"unix_path": "/s"}, {"tls-psk-file": "/k&"}, "nbds+unix:///x?socket=/s&tls-psk-file=/k%26"),
        (Transport.VSOCK, {"port": 5}, {"tls-psk-file": "/k"}, "nbds+vsock://1:5/x?tls-psk-file=/k"),
    ],
)
def test_CVE_2019_14842_CVE_2024_7383_uri_says_that_tls_is_required(
    transport: Transport, where: dict[str, Any], tls: dict[str, str], uri: str
) -> None:
    """Clients went on in clear text, or with anybody: what we can do for them is to say what they have to insist on."""
    assert make_uri(transport, "x", **where, tls=tls) == uri


@pytest.mark.parametrize(("port", "name", "uri"), [(10809, "", "nbd+vsock://1"), (5, "disk", "nbd+vsock://1:5/disk")])
def test_vsock(port: int, name: str, uri: str) -> None:
    assert make_uri(Transport.VSOCK, name, port=port) == uri

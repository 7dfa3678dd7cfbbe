"""Names in certificates, as text: RFC 4514 as GnuTLS, and so nbdkit, spell it."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy.server.distinguished_names import names_of
from tests.certificates import Authority
from tests.fuzzing.effort import fuzz

#: Attributes in openssl's words, with values that have to be escaped, and how GnuTLS writes them.
NAMES = {
    "/CN=client": "CN=client",
    "/C=US/ST=New York/L=York/O=Big/OU=Disks/CN=client": "CN=client,OU=Disks,O=Big,L=York,ST=New York,C=US",
    r"/O=Big, Co/CN=a\+b": r"CN=a\+b,O=Big\, Co",
    '/CN="q" <x>; \\\\z=1': r"CN=\"q\" \<x\>\; \\z=1",
    "/CN=x,O=BigCo/O=Evil": r"O=Evil,CN=x\,O=BigCo",
    "/CN= lead": r"CN=\ lead",
    "/CN=trail ": r"CN=trail\ ",
    "/CN= ": r"CN=\ ",
    "/CN=#1 #2": r"CN=\#1 #2",
    "/CN=Ünïcode": "CN=Ünïcode",
    "/DC=com/DC=example/UID=u1": "UID=u1,DC=example,DC=com",
    "/CN=a/emailAddress=a@b.c": "EMAIL=a@b.c,CN=a",
    "/GN=G/SN=S/title=T/initials=I/serialNumber=7": "serialNumber=7,initials=I,title=T,surName=S,givenName=G",
    "/CN=a+OU=b/O=c": "O=c,CN=a+OU=b",
    "/CN=a/postOfficeBox=pb": "2.5.4.18=#0c027062,CN=a",
    "/organizationIdentifier=oi/CN=a": "CN=a,2.5.4.97=#0c026f69",
}


def issued(authority: Authority, directory: Path, subject: str) -> Path:
    certificate = directory / "cert.pem"
    authority.issue(certificate, directory / "key.pem", subject)
    return certificate


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@pytest.mark.parametrize(("subject", "text"), NAMES.items())
def test_name_is_text_as_in_rfc_4514(authority: Authority, tmp_path: Path, subject: str, text: str) -> None:
    names = names_of(der(issued(authority, tmp_path, subject)))

    assert names == (text, "CN=Test CA")


@pytest.mark.parametrize("subject", NAMES)
def test_name_is_what_gnutls_says(authority: Authority, tmp_path: Path, subject: str) -> None:
    if shutil.which("certtool") is None:
        pytest.skip("certtool is not installed (Debian's package gnutls-bin)")
    certificate = issued(authority, tmp_path, subject)

    told = subprocess.run(["certtool", "-i", "--infile", certificate], capture_output=True, check=True).stdout.decode()

    assert f"\tSubject: {names_of(der(certificate)).subject}\n" in told


def element(tag: int, content: bytes) -> bytes:
    length = bytes([len(content)]) if len(content) < 0x80 else b"\x84" + len(content).to_bytes(4, "big")
    return bytes([tag]) + length + content


def certificate_with(name: bytes) -> bytes:
    fields = [element(0x02, b"\1"), element(0x30, b""), name, element(0x30, b""), name]
    return element(0x30, element(0x30, b"".join(fields)))


def common_name(tag: int, value: bytes) -> bytes:
    attribute = element(0x06, bytes.fromhex("550403")) + element(tag, value)
    return element(0x30, element(0x31, element(0x30, attribute)))


@pytest.mark.parametrize(
    ("tag", "value", "text"),
    [
        (0x0C, "é".encode(), "CN=é"),
        (0x13, b"abc", "CN=abc"),
        (0x14, "é".encode("latin-1"), "CN=é"),
        (0x16, b"a@b", "CN=a@b"),
        (0x1C, "é".encode("utf-32-be"), "CN=é"),
        (0x1E, "é".encode("utf-16-be"), "CN=é"),
        (0x04, b"\1", "2.5.4.3=#040101"),
        (0x0C, b"a\0b", r"CN=a\00b"),
        (0x0C, b"", "CN="),
        (0x0C, b"x" * 300, "CN=" + "x" * 300),
    ],
)
def test_value_is_decoded_by_its_type(tag: int, value: bytes, text: str) -> None:
    assert names_of(certificate_with(common_name(tag, value))) == (text, text)


def test_certificate_without_a_name_has_an_empty_one() -> None:
    assert names_of(certificate_with(element(0x30, b""))) == ("", "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x30",
        b"\x30\x80",
        b"\x30\x85\x01",
        b"\x30\x05\x01",
        element(0x30, b""),
        element(0x30, element(0x30, element(0x02, b"\1"))),
        certificate_with(common_name(0x0C, b"\xff")),
        certificate_with(common_name(0x13, b"\xe9")),
        certificate_with(element(0x30, element(0x31, element(0x30, element(0x06, b"\x55"))))),
        certificate_with(element(0x30, element(0x31, element(0x30, element(0x06, b"") + element(0x0C, b"x"))))),
        certificate_with(common_name(0x0C, b"x")) + b"\0\0",
    ],
)
def test_what_is_no_certificate_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        names_of(data)


def test_certificate_cut_off_anywhere_is_a_value_error(authority: Authority) -> None:
    whole = der(authority.certificate)

    for length in range(len(whole)):
        with pytest.raises(ValueError):
            names_of(whole[:length])


# --- certificates that are none ---


#: What is to be put in the place of a byte: tags and lengths that are wrong, mostly.
BYTES = st.sampled_from(
    [0x00, 0x01, 0x7F, 0x80, 0x81, 0x82, 0x84, 0xFF, 0x0C, 0x1C, 0x1E, 0x30, 0x31, 0xA0]
) | st.integers(0, 255)


def test_spoilt_certificate_has_names_or_is_a_value_error(authority: Authority, tmp_path: Path) -> None:
    good = der(issued(authority, tmp_path, "/C=US/O=Big, Co/CN=a+OU=b/2.5.4.97=x"))

    @fuzz(300)
    @given(st.lists(st.tuples(st.integers(0, 400), BYTES), max_size=6), st.integers(0, 2000))
    def check(changes: list[tuple[int, int]], end: int) -> None:
        spoilt = bytearray(good)
        for place, value in changes:
            spoilt[place % len(good)] = value
        try:
            names = names_of(bytes(spoilt[:end]) if end else bytes(spoilt))
        except ValueError:
            return
        assert all(isinstance(name, str) for name in names)

    check()


@fuzz(100)
@given(
    st.binary(max_size=60)
    | st.lists(st.tuples(BYTES, st.integers(0, 9)), max_size=30).map(lambda it: bytes(sum(it, ())))
)
def test_any_bytes_are_names_or_a_value_error(data: bytes) -> None:
    try:
        names_of(data)
    except ValueError:
        return


def test_number_of_a_type_that_never_ends_takes_no_time() -> None:
    """OpenSSL takes certificates of some 100 kB."""
    attribute = element(0x06, b"\x81" * 100_000 + b"\1") + element(0x0C, b"x")
    certificate = certificate_with(element(0x30, element(0x31, element(0x30, attribute))))
    begin = time.process_time()

    with pytest.raises(ValueError, match="too long"):
        names_of(certificate)

    assert time.process_time() - begin < 1

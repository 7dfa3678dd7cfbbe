"""Certificates and keys: what cannot be used is an error at the start, and names the file."""

from __future__ import annotations

import os
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.server.credentials import certificates_context, psk_context
from tests.certificates import CLIENT_USE, Authority, make_key, make_psk_file, openssl


@pytest.fixture
def directory(certificates: Path, tmp_path: Path) -> Path:
    """Certificates that a test may spoil."""
    return Path(shutil.copytree(certificates, tmp_path / "tls"))


def load(directory: Path, priority: str | None = None, *, verify_peer: bool = False) -> ssl.SSLContext:
    return certificates_context(str(directory), priority, verify_peer=verify_peer)


def failure(directory: Path, priority: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(directory, priority)
    return str(caught.value)


# --- what clients get ---


def test_T5_context_takes_nothing_below_tls_1_2(directory: Path) -> None:
    context = load(directory)

    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.maximum_version in (ssl.TLSVersion.MAXIMUM_SUPPORTED, ssl.TLSVersion.TLSv1_3)


def test_T5_context_allows_no_renegotiation_no_compression_and_no_resumption_by_tickets(directory: Path) -> None:
    context = load(directory)

    for option in (ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_COMPRESSION, ssl.OP_NO_TICKET):
        assert context.options & option
    assert context.num_tickets == 0


@pytest.mark.parametrize("priority", [None, "ALL", "ALL:@SECLEVEL=0", "ALL:COMPLEMENTOFALL:eNULL:@SECLEVEL=0"])
def test_T5_weak_ciphers_are_never_offered(directory: Path, priority: str | None) -> None:
    names = [cipher["name"] for cipher in load(directory, priority).get_ciphers()]

    assert names
    assert not [
        name for name in names for weak in ("NULL", "RC4", "3DES", "MD5", "ADH", "AECDH", "EXP") if weak in name
    ]


def test_priority_chooses_the_ciphers_of_tls_1_2(directory: Path) -> None:
    names = {cipher["name"] for cipher in load(directory, "ECDHE-ECDSA-AES128-GCM-SHA256").get_ciphers()}

    assert {name for name in names if not name.startswith("TLS_")} == {"ECDHE-ECDSA-AES128-GCM-SHA256"}


@pytest.mark.parametrize("priority", ["", "NORMAL", "aNULL", "RC4", "no\0thing", "@SECLEVEL=9"])
def test_priority_that_openssl_does_not_know_is_an_error(directory: Path, priority: str) -> None:
    assert failure(directory, priority).startswith("--tls-priority must be a list of ciphers that OpenSSL knows")


def test_priority_that_the_certificate_does_not_allow_is_an_error(directory: Path) -> None:
    # It has a key of 256 bits of an elliptic curve, which is worth 128.
    assert "is too weak" in failure(directory, "DEFAULT@SECLEVEL=5")


@pytest.mark.parametrize("verify_peer", [False, True])
def test_clients_need_a_certificate_only_if_they_are_to_be_verified(directory: Path, verify_peer: bool) -> None:
    context = load(directory, verify_peer=verify_peer)

    assert context.verify_mode is (ssl.CERT_REQUIRED if verify_peer else ssl.CERT_NONE)
    assert [ca["subject"] for ca in context.get_ca_certs()] == [((("commonName", "Test CA"),),)]


# --- T4: what cannot be used ---


def remove(path: Path) -> None:
    path.unlink()


def make_directory_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(remove, "cannot be read: No such file or directory"), (make_directory_of, "cannot be read: Is a directory")],
)
def test_T4_file_that_cannot_be_read_is_named(
    directory: Path, name: str, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(directory / name)

    assert failure(directory) == f"--tls-certificates: {directory / name} {reason}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_T4_key_that_we_may_not_read_is_named(directory: Path) -> None:
    (directory / "server-key.pem").chmod(0)

    assert failure(directory).endswith("server-key.pem cannot be read: Permission denied")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ca-cert.pem", "ca-cert.pem has no certificates in it"),
        ("server-cert.pem", "server-cert.pem has no certificates in it"),
        ("server-key.pem", "server-key.pem is no private key"),
        ("ca-crl.pem", "ca-crl.pem has no certificates in it"),
    ],
)
@pytest.mark.parametrize("content", ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_T4_file_with_something_else_is_named(directory: Path, name: str, reason: str, content: str) -> None:
    (directory / name).write_text(content)

    assert failure(directory).startswith(f"--tls-certificates: {directory}/{reason}")


def test_T4_key_of_another_certificate_is_named(directory: Path) -> None:
    (directory / "server-key.pem").write_bytes((directory / "client-key.pem").read_bytes())

    expected = f"--tls-certificates: {directory}/server-key.pem is not the key of {directory}/server-cert.pem"
    assert failure(directory) == expected


def test_T4_encrypted_key_is_an_error_rather_than_a_question(directory: Path) -> None:
    key = directory / "server-key.pem"
    openssl("pkey", "-in", directory / "client-key.pem", "-aes256", "-passout", "pass:secret", "-out", key)

    assert "server-key.pem is encrypted" in failure(directory)


@pytest.mark.parametrize(("begins", "ends", "what"), [(-3, -1, "has expired"), (1, 2, "is not valid yet")])
def test_T4_server_certificate_of_another_time_is_named(
    directory: Path, authority: Authority, begins: int, ends: int, what: str
) -> None:
    authority.issue(directory / "server-cert.pem", directory / "server-key.pem", begins=begins, ends=ends)

    assert failure(directory) == f"--tls-certificates: {directory}/server-cert.pem {what}"


@pytest.mark.parametrize(("begins", "ends"), [(-3, -1), (1, 2)])
def test_T4_authority_of_another_time_is_named(directory: Path, tmp_path: Path, begins: int, ends: int) -> None:
    authority = Authority(tmp_path / "ca", begins=begins, ends=ends)
    shutil.copy(authority.certificate, directory / "ca-cert.pem")

    assert "ca-cert.pem has only authorities that have expired or are not valid yet" in failure(directory)


def test_one_valid_authority_among_others_will_do(directory: Path, tmp_path: Path) -> None:
    old = Authority(tmp_path / "ca", begins=-3, ends=-1)
    path = directory / "ca-cert.pem"
    path.write_text(old.certificate.read_text() + path.read_text())

    load(directory)


def test_T4_authority_that_is_none_is_named(directory: Path) -> None:
    shutil.copy(directory / "client-cert.pem", directory / "ca-cert.pem")

    assert "ca-cert.pem has no authority in it" in failure(directory)


def test_T4_weak_server_certificate_is_named(directory: Path, authority: Authority) -> None:
    key = directory / "server-key.pem"
    make_key(key, "RSA", "rsa_keygen_bits:1024")
    authority.issue(directory / "server-cert.pem", key)

    assert "server-cert.pem is too weak (ee key too small)" in failure(directory)


def test_server_certificate_that_another_authority_has_signed_can_be_used(directory: Path, tmp_path: Path) -> None:
    other = Authority(tmp_path / "ca", "Other")
    other.issue(directory / "server-cert.pem", directory / "server-key.pem")

    load(directory, verify_peer=True)


# --- revocations ---


def test_T6_revocations_are_heeded_if_there_are_any(directory: Path, authority: Authority) -> None:
    without = load(directory)
    authority.revoke(crl=directory / "ca-crl.pem")

    with_them = load(directory)

    assert not without.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    assert with_them.verify_flags & ssl.VERIFY_CRL_CHECK_LEAF
    assert with_them.cert_store_stats()["crl"] == 1


def test_T6_certificate_in_place_of_revocations_is_not_trusted_but_an_error(directory: Path, tmp_path: Path) -> None:
    other = Authority(tmp_path / "ca", "Other")
    shutil.copy(other.certificate, directory / "ca-crl.pem")

    assert "ca-crl.pem must have certificate revocation lists in it, and nothing else" in failure(directory)


def test_T6_revocations_that_cannot_be_read_are_an_error(directory: Path) -> None:
    (directory / "ca-crl.pem").symlink_to("gone.pem")

    assert failure(directory).endswith("ca-crl.pem cannot be read: No such file or directory")


# --- T10: who else can read them ---


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o644, True), (0o604, True)])
def test_T10_key_that_everybody_can_read_is_a_warning(
    directory: Path, caplog: pytest.LogCaptureFixture, mode: int, warns: bool
) -> None:
    (directory / "server-key.pem").chmod(mode)

    load(directory)

    said = f"{directory}/server-key.pem is a secret, and all users of this machine can get at it"
    assert caplog.messages == ([said] if warns else [])


def test_T9_pre_shared_keys_that_everybody_can_read_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.psk"
    make_psk_file(path, "alice")
    path.chmod(0o644)

    psk_context(str(path), None)

    assert caplog.messages == [f"{path} is a secret, and all users of this machine can get at it"]


def test_T9_ciphers_of_pre_shared_keys_keep_what_was_said_secret_for_good(tmp_path: Path) -> None:
    make_psk_file(tmp_path / "keys.psk", "alice")

    names = [cipher["name"] for cipher in psk_context(str(tmp_path / "keys.psk"), None).get_ciphers()]

    assert all(name.startswith(("TLS_", "ECDHE-PSK-")) for name in names)
    assert any(name.startswith("ECDHE-PSK-") for name in names)


# --- the rehearsal ---


def test_T4_certificate_that_no_client_could_use_is_named(directory: Path, authority: Authority) -> None:
    key = directory / "server-key.pem"
    make_key(key, "EC", "ec_paramgen_curve:secp256k1")  # a curve that TLS does not have
    authority.issue(directory / "server-cert.pem", key)

    assert f"no client could use {directory}/server-cert.pem" in failure(directory)


def test_certificate_for_another_use_is_for_clients_to_refuse(directory: Path, authority: Authority) -> None:
    authority.issue(directory / "server-cert.pem", directory / "server-key.pem", extensions=CLIENT_USE)

    load(directory)

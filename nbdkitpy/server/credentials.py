"""Certificates and keys, read and checked: what is wrong with them is said when the server starts, not to a client."""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import stat
import time
from collections.abc import Sequence
from typing import NoReturn

from nbdkitpy import log
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server import psk
from nbdkitpy.server.starttls import CERTIFICATE_FILES

__all__ = ["certificates_context", "psk_context"]

_logger = logging.getLogger("nbdkitpy")

_CRL = "ca-crl.pem"

#: What nobody gets, whatever is asked for.
_NEVER = "!aNULL:!eNULL:!EXPORT:!RC4:!DES:!3DES:!MD5"

#: Of OpenSSL's X509_V_ERR_…: what time does to a certificate.
_WRONG_TIME = {9: "is not valid yet", 10: "has expired"}


def certificates_context(directory: str, priority: str | None, *, verify_peer: bool) -> ssl.SSLContext:
    """Return a context for the certificates in a directory.

    Args:
        directory: Absolute path.
        priority: Ciphers in OpenSSL's terms; None for those that Python takes.
        verify_peer: Clients have to show a certificate.

    Raises:
        ConfigError: a file is not there, is none, has expired, or does not belong to the others; the text names it.
    """
    ca, certificate, key = (os.path.join(directory, name) for name in CERTIFICATE_FILES)
    crl = os.path.join(directory, _CRL)
    for path in (ca, certificate, key):
        _check_readable(path)
    _warn_if_public(key)
    context = _context(priority)
    _load_chain(context, certificate, key)
    _load_authorities(context, ca)
    if os.path.lexists(crl):
        _load_revocations(context, crl)
    _check_validity(context, certificate, priority)
    if verify_peer:  # not before, as the check is a client without a certificate
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def psk_context(path: str, priority: str | None) -> ssl.SSLContext:
    """Return a context for the pre-shared keys in a file; arguments and errors as of :func:`certificates_context`."""
    keys = psk.read_keys(path)
    _warn_if_public(path)
    context = _context(priority or psk.CIPHERS)
    psk.use_keys(context, keys)
    return context


def _context(priority: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # No session is taken up again by a ticket: each client is checked anew.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.num_tickets = 0
    _set_ciphers(context, priority)
    return context


def _set_ciphers(context: ssl.SSLContext, priority: str | None) -> None:
    if priority is None:
        return
    try:
        context.set_ciphers(f"{priority}:{_NEVER}")
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"--tls-priority must be a list of ciphers that OpenSSL knows (openssl ciphers -v), not {priority!r}"
        ) from error


# --- files ---


def _check_readable(path: str) -> None:
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise ConfigError(f"--tls-certificates: {path} cannot be read: {error.strerror}") from error


def _warn_if_public(path: str) -> None:
    # Not if the group may read it: that is how keys are given to services, and how access lists look from afar.
    if os.stat(path).st_mode & stat.S_IRWXO:
        _logger.warning("%s is a secret, and all users of this machine can get at it", path, extra=log.TERMINAL)


def _load_chain(context: ssl.SSLContext, certificate: str, key: str) -> None:
    def ask_for_password() -> NoReturn:
        raise ConfigError(f"--tls-certificates: {key} is encrypted: nobody is there to give its password")

    _read_certificates(certificate)
    try:
        context.load_cert_chain(certificate, key, ask_for_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-certificates: {key} is not the key of {certificate}") from error
        if error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"):
            raise ConfigError(f"--tls-certificates: {certificate} is too weak ({_reason(error)})") from error
        raise ConfigError(f"--tls-certificates: {key} is no private key ({_reason(error)})") from error


def _read_certificates(path: str) -> ssl.SSLContext:
    """Return a context that trusts what is in a file of certificates or revocations, and nothing else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-certificates: {path} has no certificates in it ({_reason(error)})") from error
    return context


def _load_authorities(context: ssl.SSLContext, path: str) -> None:
    authorities = _read_certificates(path).get_ca_certs()
    if not any(_is_valid(_dates(authority)) for authority in authorities):
        what = (
            "has only authorities that have expired or are not valid yet" if authorities else "has no authority in it"
        )
        raise ConfigError(f"--tls-certificates: {path} {what}")
    context.load_verify_locations(path)


def _dates(certificate: object) -> Sequence[float]:
    assert isinstance(certificate, dict), "it was asked for in this form"
    return [ssl.cert_time_to_seconds(certificate[key]) for key in ("notBefore", "notAfter")]


def _is_valid(dates: Sequence[float]) -> bool:
    begin, end = dates
    return begin <= time.time() <= end


def _load_revocations(context: ssl.SSLContext, path: str) -> None:
    _check_readable(path)
    found = _read_certificates(path).cert_store_stats()
    if not found["crl"] or found["x509"]:  # a certificate would be trusted, where one is to be refused
        raise ConfigError(f"--tls-certificates: {path} must have certificate revocation lists in it, and nothing else")
    context.load_verify_locations(path)
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


# --- a rehearsal ---


def _check_validity(context: ssl.SSLContext, certificate: str, priority: str | None) -> None:
    """Have a client, in memory, connect and trust this certificate, so that only time can be a reason not to."""
    client = _read_certificates(certificate)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    _set_ciphers(client, priority)
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(one, other), context.wrap_bio(other, one, server_side=True))
    try:
        for end in (*ends, ends[0]):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        # There may be other reasons why clients will not take it, such as what it is for: they will tell.
        if error.verify_code in _WRONG_TIME:
            what = _WRONG_TIME[error.verify_code]
            raise ConfigError(f"--tls-certificates: {certificate} {what}") from error
    except ssl.SSLError as error:
        raise ConfigError(f"--tls-certificates: no client could use {certificate} ({_reason(error)})") from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")

"""Whether there is TLS, and with which certificates or keys: decided once, before anything is listened on.

Who asks for TLS by any option gets it or an error, and who asks for nothing gets it if there are certificates where
nbdkit looks for them. OpenSSL is not even loaded unless there are.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from nbdkitpy import log
from nbdkitpy.exceptions import ConfigError
from nbdkitpy.protocol.constants import HandshakeFlag, TlsMode
from nbdkitpy.server.options import ServerOptions

if TYPE_CHECKING:
    from nbdkitpy.server.tls import Tls

__all__ = ["CERTIFICATE_FILES", "load_tls"]

_logger = logging.getLogger("nbdkitpy")

#: What there has to be in a directory of certificates.
CERTIFICATE_FILES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")

_OF_ROOT = ("/etc/pki/nbdkit",)
_OF_USER = (".pki/nbdkit", ".config/pki/nbdkit")  # in the home directory


def load_tls(options: ServerOptions) -> Tls | None:
    """Return what goes through TLS handshakes, with certificates and keys loaded; None if there is no TLS.

    Raises:
        ConfigError: TLS was asked for, and it cannot be had; the text names the file.
    """
    if options.tls is TlsMode.OFF:
        return None
    _check_handshake(options)
    asked = any((options.tls, options.tls_certificates, options.tls_psk, options.tls_verify_peer, options.tls_priority))
    directory = options.tls_certificates or _default_directory()
    if directory is None and options.tls_psk is None:
        if not asked:
            return None
        raise ConfigError(
            "TLS needs certificates or keys: give --tls-certificates or --tls-psk, or put "
            f"{', '.join(CERTIFICATE_FILES)} into {' or '.join(_default_directories())}"
        )
    try:
        return _loaded(options, directory)
    except ConfigError as error:
        if asked:
            raise
        _logger.warning("there is no TLS: %s", error, extra=log.TERMINAL)
        return None


def _check_handshake(options: ServerOptions) -> None:
    if options.tls is not TlsMode.REQUIRE:
        return
    if options.oldstyle:
        raise ConfigError("--tls=require and --oldstyle exclude each other: the oldstyle protocol has no TLS")
    if not options.handshake_flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise ConfigError("--tls=require needs fixed newstyle, which --mask-handshake takes away")


def _loaded(options: ServerOptions, directory: str | None) -> Tls:
    from nbdkitpy.server.credentials import certificates_context, psk_context
    from nbdkitpy.server.tls import Tls

    mode, psk = options.tls or TlsMode.ON, options.tls_psk
    if psk is not None:
        return Tls(mode, lambda: psk_context(psk, options.tls_priority), {"tls-psk-file": psk})
    assert directory is not None, "else there is a file of keys"
    parameters = {"tls-certificates": directory} if options.tls_certificates else {}
    return Tls(
        mode,
        lambda: certificates_context(directory, options.tls_priority, verify_peer=options.tls_verify_peer),
        parameters,
    )


def _default_directories() -> list[str]:
    if os.geteuid() == 0:
        return list(_OF_ROOT)
    home = os.environ.get("HOME", "")
    return [os.path.join(home, directory) for directory in _OF_USER] if os.path.isabs(home) else []


def _default_directory() -> str | None:
    for directory in _default_directories():
        if all(os.access(os.path.join(directory, name), os.R_OK) for name in CERTIFICATE_FILES):
            return directory
    return None

"""Certificates, revocations and pre-shared keys, made when they are needed; by the openssl command."""

from __future__ import annotations

import secrets
import subprocess
import time
from pathlib import Path

#: By which name clients look for servers here.
HOST = "localhost"

SERVER_USE = "extendedKeyUsage = serverAuth"
CLIENT_USE = "extendedKeyUsage = clientAuth"

#: A certificate is valid from and to such days, counted from now; negative ones are past.
GOOD_FOR = 2

_CONFIG = """
[req]
distinguished_name = none
prompt = no
[none]
[ca]
default_ca = us
[us]
database = {directory}/index.txt
new_certs_dir = {directory}
serial = {directory}/serial
default_md = sha256
policy = any
unique_subject = no
copy_extensions = none
[any]
"""


def openssl(*words: object) -> str:
    """Run the command, and return what it prints."""
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


class Authority:
    """A certificate authority, in a directory of its own.

    Args:
        directory: It must not exist yet.
        name: What stands in its certificate.
        begins: The authority is valid from this day on.
        ends: And to that one.
    """

    def __init__(self, directory: Path, name: str = "Test CA", *, begins: int = -1, ends: int = GOOD_FOR) -> None:
        directory.mkdir()
        self._directory = directory
        self._config = directory / "openssl.cnf"
        self._config.write_text(_CONFIG.format(directory=directory))
        (directory / "index.txt").touch()
        (directory / "serial").write_text("01\n")
        self.key = directory / "ca-key.pem"
        self.certificate = directory / "ca-cert.pem"
        make_key(self.key)
        self._sign(
            self.certificate,
            self.key,
            f"/CN={name}",
            "basicConstraints = critical, CA:true\nkeyUsage = critical, keyCertSign, cRLSign\n",
            (begins, ends),
            "-selfsign",
        )

    def issue(
        self,
        certificate: Path,
        key: Path,
        subject: str = f"/CN={HOST}",
        extensions: str = f"subjectAltName = DNS:{HOST}, IP:127.0.0.1",
        *,
        begins: int = -1,
        ends: int = GOOD_FOR,
    ) -> None:
        """Make `certificate`, and `key` if that is not there yet.

        Args:
            certificate: File that is made.
            key: File of the private key.
            subject: In openssl's notation.
            extensions: Lines of openssl's configuration.
            begins: The certificate is valid from this day on.
            ends: And to that one.
        """
        if not key.exists():
            make_key(key)
        self._sign(certificate, key, subject, extensions, (begins, ends), "-cert", self.certificate)

    def _sign(
        self, certificate: Path, key: Path, subject: str, extensions: str, days: tuple[int, int], *words: object
    ) -> None:
        request, extra = (self._directory / name for name in ("request.pem", "extensions.cnf"))
        openssl("req", "-new", "-utf8", "-config", self._config, "-key", key, "-subj", subject, "-out", request)
        extra.write_text(extensions)
        begin, end = (_in_days(day) for day in days)
        openssl(
            *("ca", "-batch", "-notext", "-utf8", "-preserveDN", "-config", self._config),
            *("-keyfile", self.key, "-in", request, "-out", certificate, "-extfile", extra),
            *("-startdate", begin, "-enddate", end, *words),
        )

    def revoke(self, *certificates: Path, crl: Path, begins: int = -1, ends: int = GOOD_FOR) -> None:
        """Make `crl`, a list of all that has been revoked so far and of `certificates`."""
        words = ("ca", "-config", self._config, "-keyfile", self.key, "-cert", self.certificate)
        for certificate in certificates:
            openssl(*words, "-revoke", certificate)
        dates = ("-crl_lastupdate", _in_days(begins), "-crl_nextupdate", _in_days(ends))
        openssl(*words, "-gencrl", *dates, "-out", crl)


def make_key(path: Path, kind: str = "EC", *options: str) -> None:
    """Make a private key that only we may read."""
    options = options or ("ec_paramgen_curve:P-256",)
    words = [word for option in options for word in ("-pkeyopt", option)]
    openssl("genpkey", "-algorithm", kind, *words, "-out", path)
    path.chmod(0o600)


def make_directory(authority: Authority, directory: Path, *, client: str = "/O=Big Co/CN=client") -> Path:
    """Make a directory with all that a server and a client need, under the names that nbdkit and libnbd look for."""
    directory.mkdir()
    (directory / "ca-cert.pem").write_bytes(authority.certificate.read_bytes())
    authority.issue(directory / "server-cert.pem", directory / "server-key.pem")
    authority.issue(directory / "client-cert.pem", directory / "client-key.pem", client, CLIENT_USE)
    return directory


def make_psk_file(path: Path, *users: str) -> dict[str, bytes]:
    """Make a file of pre-shared keys as psktool does, and return them."""
    keys = {user: secrets.token_bytes(32) for user in users}
    path.write_text("".join(f"{user}:{key.hex()}\n" for user, key in keys.items()))
    path.chmod(0o600)
    return keys


def _in_days(days: int) -> str:
    return time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + days * 86400))

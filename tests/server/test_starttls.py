"""Whether there is TLS: who asks for it gets it or an error, others if there are certificates."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from nbdkitpy import ConfigError
from nbdkitpy.protocol.constants import HandshakeFlag, TlsMode
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.starttls import load_tls
from tests.certificates import make_psk_file


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose home directory is empty."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


def options(**values: Any) -> ServerOptions:
    return ServerOptions(**values)


def test_without_certificates_and_without_a_wish_there_is_no_tls() -> None:
    assert load_tls(options()) is None


@pytest.mark.parametrize("directory", [".pki/nbdkit", ".config/pki/nbdkit"])
def test_certificates_in_the_home_directory_turn_it_on(certificates: Path, tmp_path: Path, directory: str) -> None:
    shutil.copytree(certificates, tmp_path / directory)

    tls = load_tls(options())

    assert tls is not None
    assert tls.mode is TlsMode.ON
    assert tls.parameters == {}  # clients have directories of their own


def test_root_has_another_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    with pytest.raises(ConfigError, match=r"server-key.pem into /etc/pki/nbdkit$"):
        load_tls(options(tls=TlsMode.ON))


@pytest.mark.parametrize("home", ["", "relative"])
def test_home_directory_has_to_be_absolute(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    shutil.copytree(certificates, tmp_path / home / ".pki" / "nbdkit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", home)

    assert load_tls(options()) is None


def test_off_is_off_whatever_else_is_given(certificates: Path) -> None:
    given = options(
        tls=TlsMode.OFF, tls_certificates=str(certificates), tls_psk="/does/not/exist", tls_verify_peer=True
    )

    assert load_tls(given) is None


@pytest.mark.parametrize(
    "wish",
    [{"tls": TlsMode.ON}, {"tls": TlsMode.REQUIRE}, {"tls_verify_peer": True}, {"tls_priority": "DEFAULT"}],
    ids=str,
)
def test_T4_wish_that_cannot_be_granted_is_an_error(tmp_path: Path, wish: dict[str, Any]) -> None:
    expected = (
        "TLS needs certificates or keys: give --tls-certificates or --tls-psk, or put ca-cert.pem, server-cert.pem, "
        f"server-key.pem into {tmp_path}/.pki/nbdkit or {tmp_path}/.config/pki/nbdkit"
    )

    with pytest.raises(ConfigError) as caught:
        load_tls(options(**wish))

    assert str(caught.value) == expected


def test_T4_directory_that_is_given_has_to_have_certificates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^--tls-certificates: {tmp_path}/ca-cert.pem cannot be read"):
        load_tls(options(tls_certificates=str(tmp_path)))


def test_default_certificates_that_cannot_be_used_are_a_warning_if_nobody_asked(
    certificates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Path(shutil.copytree(certificates, tmp_path / ".pki" / "nbdkit"))
    (directory / "server-key.pem").write_text("")

    assert load_tls(options()) is None

    assert caplog.messages[0].startswith(f"there is no TLS: --tls-certificates: {directory}/server-key.pem is no")
    with pytest.raises(ConfigError):
        load_tls(options(tls=TlsMode.ON))


@pytest.mark.parametrize(("mode", "effective"), [(None, TlsMode.ON), *((mode, mode) for mode in list(TlsMode)[1:])])
def test_certificates_that_are_given_are_told_to_clients(
    certificates: Path, mode: TlsMode | None, effective: TlsMode
) -> None:
    tls = load_tls(options(tls=mode, tls_certificates=str(certificates)))

    assert tls is not None
    assert tls.mode is effective
    assert tls.parameters == {"tls-certificates": str(certificates)}


def test_pre_shared_keys_turn_it_on_in_place_of_certificates(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    make_psk_file(path, "alice")

    tls = load_tls(options(tls_psk=str(path), tls_certificates="/does/not/exist"))

    assert tls is not None
    assert tls.mode is TlsMode.ON
    assert tls.parameters == {"tls-psk-file": str(path)}


def test_T3_oldstyle_excludes_that_tls_is_required(certificates: Path) -> None:
    with pytest.raises(ConfigError, match="--tls=require and --oldstyle exclude each other"):
        load_tls(options(tls=TlsMode.REQUIRE, tls_certificates=str(certificates), oldstyle=True))


@pytest.mark.parametrize("flags", [0, HandshakeFlag.NO_ZEROES])
def test_T3_tls_cannot_be_required_without_fixed_newstyle(certificates: Path, flags: int) -> None:
    with pytest.raises(ConfigError, match="--tls=require needs fixed newstyle, which --mask-handshake takes away"):
        load_tls(options(tls=TlsMode.REQUIRE, tls_certificates=str(certificates), handshake_flags=flags))


def test_openssl_is_not_loaded_without_tls() -> None:
    import subprocess

    code = (
        "import sys; from nbdkitpy.server import service, single; from nbdkitpy.server.options import ServerOptions; "
        "from nbdkitpy.server.starttls import load_tls; load_tls(ServerOptions()); print('ssl' in sys.modules)"
    )

    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed == "False\n"

"""Pre-shared keys: the file, and how OpenSSL is given them."""

from __future__ import annotations

import _ssl
import ctypes
import os
import platform
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdkitpy import ConfigError
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.server import psk
from nbdkitpy.server.credentials import psk_context
from nbdkitpy.server.psk import Keys, read_keys, use_keys
from nbdkitpy.server.tls import Tls
from nbdkitpy.server.transport import SocketTransport, Stream
from tests.fuzzing.attempts import attempted
from tests.fuzzing.effort import fuzz
from tests.nbdclient import PATIENCE

KEY = "00112233445566778899aabbccddeeff"

BY_CTYPES = pytest.mark.skipif(sys.version_info >= (3, 13), reason="Python can do it by itself")


def keys_in(tmp_path: Path, text: str | bytes) -> Keys:
    path = tmp_path / "keys.psk"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_keys(str(path))


# --- the file ---


@pytest.mark.parametrize(
    ("line", "user"),
    [
        (f"alice:{KEY}", b"alice"),
        (f"alice:{KEY.upper()}  ", b"alice"),
        (f"a:b:c:{KEY}", b"a:b:c"),
        (f"Zoë:{KEY}", "Zoë".encode()),
        (f"#616c:{KEY}", b"al"),
        (f"{'u' * 128}:{KEY}", b"u" * 128),
    ],
)
def test_each_line_is_a_user_and_a_key(tmp_path: Path, line: str, user: bytes) -> None:
    keys = keys_in(tmp_path, f"\nother:{KEY}ff\r\n\n{line}\n")

    assert keys.key_of(user) == bytes.fromhex(KEY)
    assert keys.key_of(b"other") == bytes.fromhex(KEY + "ff")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no line USER:KEY"),
        ("\n \n", "has no line USER:KEY"),
        ("alice", "line 1: a line must be USER:KEY"),
        (f"a:{KEY}\nb:{KEY}\na:{KEY}", "line 3: the user is there already"),
        (f":{KEY}", "line 1: the user's name must have 1 to 128 bytes"),
        (f"{'u' * 129}:{KEY}", "the user's name must have 1 to 128 bytes"),
        (f"#00:{KEY}", "without NUL"),
        (f"#6:{KEY}", "the user's name after # must be in hexadecimal"),
        ("alice:", "the key must have 16 to 512 hexadecimal digits, not 0"),
        ("alice:00112233445566", "the key must have 16 to 512 hexadecimal digits, not 14"),
        (f"alice:{'00' * 257}", "the key must have 16 to 512 hexadecimal digits, not 514"),
        ("alice:secret-secret-secret", "the key must be in hexadecimal"),
        ("alice:ß0112233445566778899aabbccddeeff", "the key must be in hexadecimal"),
    ],
)
def test_T9_file_that_is_not_right_is_an_error_that_names_the_line_and_no_key(
    tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        keys_in(tmp_path, text)

    assert str(caught.value).startswith(f"--tls-psk: {tmp_path}/keys.psk")
    assert reason in str(caught.value)
    assert "secret" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_T9_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--tls-psk: {tmp_path} cannot be read: Is a directory"):
        read_keys(str(tmp_path))


def test_T9_unknown_user_has_a_key_of_its_own_that_stays_the_same(caplog: pytest.LogCaptureFixture) -> None:
    keys, others = Keys({b"alice": b"k" * 32}), Keys({b"alice": b"k" * 32})

    found = [keys.key_of(b"bob"), keys.key_of(b"bob"), keys.key_of(b"eve"), others.key_of(b"bob")]

    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert {len(key) for key in found} == {32}
    assert caplog.messages[0] == 'TLS: there is no user "bob" in the file of pre-shared keys'


def test_T9_name_of_a_user_is_escaped_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    Keys({b"alice": b"k" * 32}).key_of(b"x\n\x1b[31m\xff")

    assert caplog.messages == ['TLS: there is no user "x\\n\\x1b[31m\\xff" in the file of pre-shared keys']


PIECES = st.sampled_from(
    [b":", b"\n", b"\r\n", b"#", b" ", b"\0", b"user", b":00112233445566778899\n", b"0011", b"\xff", b"\x85"]
)


@fuzz(150)
@given(st.lists(PIECES | st.binary(max_size=5), max_size=12).map(b"".join))
def test_any_file_has_keys_or_is_a_configuration_error_that_tells_none(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        keys, message = attempted(lambda: read_keys(file.name), ConfigError)
    if keys is None:
        assert "0011" not in message.removeprefix(f"--tls-psk: {file.name}")
        return
    for line in filter(bytes.strip, content.splitlines()):
        user, _, key = line.rpartition(b":")
        name = bytes.fromhex(user[1:].decode()) if user.startswith(b"#") else user
        assert keys.key_of(name) == bytes.fromhex(key.decode())


# --- Pythons in which it cannot be done ---


def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


KEYS = Keys({b"alice": b"k" * 32})


def refuses(reason: str) -> None:
    with pytest.raises(ConfigError, match=f"--tls-psk needs Python 3.13 .* this is Python .*, and {reason}"):
        use_keys(context(), KEYS)


@BY_CTYPES
def test_other_interpreters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_implementation", lambda: "PyPy")

    refuses("it is no CPython of 64 bits")


@BY_CTYPES
def test_builds_for_debugging_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "gettotalrefcount", int, raising=False)

    refuses("it was built for debugging")


@BY_CTYPES
def test_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psk, "_CONTEXT_SIZE", 88)

    refuses("its ssl module is not as expected")


@BY_CTYPES
@pytest.mark.parametrize("path", [None, "/does/not/exist.so"])
def test_ssl_module_without_a_library_is_refused(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    if path is None:
        monkeypatch.delattr(_ssl, "__file__")
    else:
        monkeypatch.setattr(_ssl, "__file__", path)

    refuses("OpenSSL cannot be reached")


@BY_CTYPES
def test_library_without_openssl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import math

    monkeypatch.setattr(_ssl, "__file__", getattr(math, "__file__", None) or ctypes.__file__)

    refuses("OpenSSL cannot be reached")


@BY_CTYPES
def test_another_version_of_openssl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssl, "OPENSSL_VERSION_NUMBER", 1)

    refuses("the OpenSSL of its ssl module is not the one that was found")


@BY_CTYPES
@pytest.mark.parametrize("value", [0, 16, 1 << 47, (1 << 64) - 8])
def test_pointer_that_points_nowhere_is_refused(value: int) -> None:
    with pytest.raises(ConfigError, match="there is no pointer to OpenSSL"):
        psk._check_pointer(psk._library(), ctypes.c_void_p(value), context())


@BY_CTYPES
def test_pointer_to_something_else_is_refused() -> None:
    memory = ctypes.create_string_buffer(os.urandom(4096))

    with pytest.raises(ConfigError, match="there is no pointer to OpenSSL"):
        psk._check_pointer(psk._library(), ctypes.c_void_p(ctypes.addressof(memory)), context())


@BY_CTYPES
def test_pointer_to_another_context_is_refused() -> None:
    other = context()
    pointer = ctypes.c_void_p.from_address(id(other) + psk._POINTER_AT)

    with pytest.raises(ConfigError, match="there is no pointer to OpenSSL"):
        psk._check_pointer(psk._library(), pointer, context())


def test_options_of_the_context_stay_as_they_were() -> None:
    ours = context()
    before = ours.options

    use_keys(ours, KEYS)

    assert ours.options == before


@pytest.mark.skipif(sys.version_info < (3, 13), reason="Python cannot do it by itself")
def test_python_whose_openssl_has_no_psk_is_refused() -> None:
    class Context:
        def set_psk_server_callback(self, callback: Any) -> None:
            raise NotImplementedError("Pre-shared keys are not supported")

    with pytest.raises(ConfigError, match="and Pre-shared keys are not supported"):
        psk._use_natively(Context(), KEYS)


@BY_CTYPES
def test_system_that_allows_no_functions_for_openssl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ctypes, "CFUNCTYPE", lambda *types: fail)

    refuses("the system does not let it make functions that OpenSSL can call")


# --- with a client ---


class Client(NamedTuple):
    """What came of a client: whether it got what was sent, and what the server said of it."""

    served: bool
    error: str


def connect(tmp_path: Path, user: str, key: bytes, version: str) -> Client:
    """Have the openssl command connect to a server that has a key for alice."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    listening.listen()
    path = tmp_path / "keys.psk"
    path.write_text(f"alice:{KEY}\n")
    tls = Tls(TlsMode.REQUIRE, lambda: psk_context(str(path), None), {})
    words = ("-unix", str(tmp_path / "socket"), "-psk_identity", user, "-psk", key.hex(), f"-{version}", "-quiet")
    client = subprocess.Popen(
        ["openssl", "s_client", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    raw = SocketTransport(listening.accept()[0])
    transport: Stream = raw
    error = ""
    try:
        transport = tls.accept(raw).transport
        transport.send([b"hello"])
    except RemoteProtocolError as caught:
        error = str(caught)
    finally:
        transport.close()
        listening.close()
    received, _ = client.communicate(timeout=PATIENCE)
    return Client(received == b"hello", error)


VERSIONS = pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])


@VERSIONS
def test_T9_user_with_the_key_is_served(tmp_path: Path, version: str) -> None:
    assert connect(tmp_path, "alice", bytes.fromhex(KEY), version) == Client(True, "")


@VERSIONS
def test_T9_unknown_user_fails_as_one_with_a_wrong_key_does(tmp_path: Path, version: str) -> None:
    (tmp_path / "bob").mkdir()

    with_wrong_key = connect(tmp_path, "alice", bytes(16), version)
    unknown = connect(tmp_path / "bob", "bob", bytes.fromhex(KEY), version)

    assert not with_wrong_key.served
    assert with_wrong_key.error.startswith("TLS handshake failed: ")
    assert unknown == with_wrong_key

"""Pre-shared keys (PSK): the file of them, and how OpenSSL gets to ask for one.

Python's ssl module knows PSK from 3.13 on. Before that the OpenSSL library that the module itself uses is told, by
ctypes, if it can be made sure that it is that library and that the pointer is the right one; else PSK is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import platform
import ssl
import sys
from collections.abc import Mapping
from typing import Any

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.protocol.errors import printable

__all__ = ["CIPHERS", "Keys", "read_keys", "use_keys"]

_logger = logging.getLogger("nbdkitpy")

#: What every version of OpenSSL can take, in bytes.
_MAX_USER = 128
_MAX_KEY = 256

#: A shorter key can be found out by trying all, in bytes.
_MIN_KEY = 8

#: Suites of TLS 1.2 in which a key that gets known later does not tell what was said. Those of TLS 1.3 are all so.
CIPHERS = "kECDHEPSK+AESGCM:kECDHEPSK+CHACHA20:kECDHEPSK+AES:!SHA1:!eNULL"


class Keys:
    """The key of each user.

    For a user who is not there is a key as well, always the same one, which nobody has: whether there is such a user
    cannot be told from what the server does.

    Args:
        keys: By name of the user, in bytes.
    """

    def __init__(self, keys: Mapping[bytes, bytes]) -> None:
        self._keys = dict(keys)
        self._secret = os.urandom(32)

    def key_of(self, user: bytes) -> bytes:
        """Return the key that a client has to have who says to be `user`; a line is logged if there is no such user."""
        made_up = hmac.digest(self._secret, user, hashlib.sha256)
        found = self._keys.get(user)
        if found is None:
            _logger.error('TLS: there is no user "%s" in the file of pre-shared keys', printable(user))
        return found or made_up


# --- the file ---


def read_keys(path: str) -> Keys:
    """Read a file of lines ``USER:KEY``, the key in hexadecimal, as psktool writes it.

    Raises:
        ConfigError: it cannot be read, has no user, or a line is not of that form. Keys are never part of the text.
    """
    try:
        with open(path, "rb") as stream:
            lines = stream.read().splitlines()
    except OSError as error:
        raise ConfigError(f"--tls-psk: {path} cannot be read: {error.strerror}") from error
    keys: dict[bytes, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            user, key = _entry(line)
            if user in keys:
                raise ValueError("the user is there already")
        except ValueError as error:
            raise ConfigError(f"--tls-psk: {path}, line {number}: {error}") from None
        keys[user] = key
    if not keys:
        raise ConfigError(f"--tls-psk: {path} has no line USER:KEY")
    return Keys(keys)


def _entry(line: bytes) -> tuple[bytes, bytes]:
    user, colon, digits = line.rpartition(b":")
    if not colon:
        raise ValueError("a line must be USER:KEY")
    if user.startswith(b"#"):  # GnuTLS's way to write names that are no text
        user = _bytes(user[1:], "the user's name after #")
    if not 0 < len(user) <= _MAX_USER or b"\0" in user:
        raise ValueError(f"the user's name must have 1 to {_MAX_USER} bytes, without NUL")
    key = _bytes(digits.strip(), "the key")
    if not _MIN_KEY <= len(key) <= _MAX_KEY:
        raise ValueError(f"the key must have {2 * _MIN_KEY} to {2 * _MAX_KEY} hexadecimal digits, not {len(digits)}")
    return user, key


def _bytes(digits: bytes, what: str) -> bytes:
    try:
        return bytes.fromhex(digits.decode("ascii"))
    except ValueError:
        raise ValueError(f"{what} must be in hexadecimal") from None


# --- OpenSSL ---


def use_keys(context: ssl.SSLContext, keys: Keys) -> None:
    """Have `context`, of a server, get keys from `keys`.

    Raises:
        ConfigError: this Python cannot do that; the text says why.
    """
    if sys.version_info >= (3, 13):
        _use_natively(context, keys)
    else:
        _use_by_ctypes(context, keys)


def _use_natively(context: Any, keys: Keys) -> None:
    try:
        # Python decodes the name, and leaves out what is not UTF-8.
        context.set_psk_server_callback(lambda user: keys.key_of((user or "").encode()))
    except NotImplementedError as error:
        raise _refusal(str(error)) from error


#: Bytes of what ssl.SSLContext is made of, in CPython 3.10 to 3.12 on machines of 64 bits. These versions get no more
#: than corrections, so it stays like this.
_CONTEXT_SIZE = 96
#: Where the SSL_CTX * is in it: the first member after the header of each object.
_POINTER_AT = 16
#: Bytes that have to be there for a look at it; an SSL_CTX is larger.
_CHECKED = 512


def _use_by_ctypes(context: ssl.SSLContext, keys: Keys) -> None:
    import ctypes

    _check_interpreter()
    library = _library()
    pointer = ctypes.c_void_p.from_address(id(context) + _POINTER_AT)
    _check_pointer(library, pointer, context)
    callback_type = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_ubyte), ctypes.c_uint
    )

    def give_key(_: object, user: bytes | None, buffer: Any, size: int) -> int:
        key = keys.key_of(user or b"")
        if len(key) > size:
            return 0
        ctypes.memmove(buffer, key, len(key))
        return len(key)

    try:
        callback = callback_type(give_key)
    except MemoryError:  # it takes memory with code in it, which not every service may have
        raise _refusal("the system does not let it make functions that OpenSSL can call") from None
    set_callback = library.SSL_CTX_set_psk_server_callback
    set_callback.argtypes, set_callback.restype = (ctypes.c_void_p, callback_type), None
    set_callback(pointer, callback)
    vars(context)["_psk_callback"] = callback  # OpenSSL may call it for as long as there is the context


def _check_interpreter() -> None:
    """Refuse where the pointer may be elsewhere than we take it to be."""
    if platform.python_implementation() != "CPython" or sys.maxsize != (1 << 63) - 1:
        raise _refusal("it is no CPython of 64 bits")
    if hasattr(sys, "gettotalrefcount") or object.__basicsize__ != _POINTER_AT:
        raise _refusal("it was built for debugging")
    if ssl.SSLContext.__mro__[1].__basicsize__ != _CONTEXT_SIZE:
        raise _refusal("its ssl module is not as expected")


def _library() -> Any:
    """The OpenSSL that Python's ssl module uses: looked up through its extension module, so that it is no other one."""
    import _ssl
    import ctypes

    try:
        library = ctypes.CDLL(_ssl.__file__, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        library.OpenSSL_version_num.restype = ctypes.c_ulong
        library.SSL_CTX_get_options.argtypes = (ctypes.c_void_p,)
        library.SSL_CTX_get_options.restype = ctypes.c_ulong
        _ = library.SSL_CTX_set_psk_server_callback
    except (OSError, AttributeError) as error:
        raise _refusal("OpenSSL cannot be reached through its ssl module") from error
    if library.OpenSSL_version_num() != ssl.OPENSSL_VERSION_NUMBER:
        raise _refusal("the OpenSSL of its ssl module is not the one that was found")
    return library


def _check_pointer(library: Any, pointer: Any, context: ssl.SSLContext) -> None:
    """See that what is at `pointer` changes as the options of `context` do, having seen first that it can be read."""
    try:
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(pointer.value or 0)
            is_readable = len(memory.read(_CHECKED)) == _CHECKED
    except (OSError, OverflowError):
        is_readable = False
    if not is_readable:
        raise _refusal("there is no pointer to OpenSSL where it should be")
    before = context.options
    for options in (before ^ ssl.OP_NO_TICKET, before):
        context.options = options
        if library.SSL_CTX_get_options(pointer) != int(context.options):
            raise _refusal("there is no pointer to OpenSSL where it should be")


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        "--tls-psk needs Python 3.13 or later, or CPython 3.10 to 3.12 with OpenSSL as a library; this is Python "
        f"{platform.python_version()}, and {reason}"
    )

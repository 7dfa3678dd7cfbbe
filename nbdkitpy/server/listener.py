"""Sockets that clients connect to: made, described, and removed again."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator, Sequence

from nbdkitpy.exceptions import ConfigError
from nbdkitpy.server.options import AddressFamily, Endpoint, Transport

__all__ = ["UMASK", "Listener", "listen"]

_LOOPBACK = ("127.0.0.1", "::1")
_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104  # only when asked for by "-i any"
_MAX_UNIX_PATH = 107  # bytes that struct sockaddr_un has room for
_MAX_PORT = 65535  # of a larger number getaddrinfo takes the lower bits
UMASK = 0o022  # the mode of a socket is that of nbdkit's, whatever the caller's umask
_SOCKET_MODE = 0o755  # from which a umask can only take away

_FAMILIES = {
    AddressFamily.ANY: (socket.AF_INET, socket.AF_INET6),
    AddressFamily.INET: (socket.AF_INET,),
    AddressFamily.INET6: (socket.AF_INET6,),
}

#: A kind of address that this machine does not have. Not an error as long as there is another one to listen on.
_ABSENT = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

#: Attempts to find a port that is free for every address, when any port will do.
_ATTEMPTS = 10


class Listener:
    """One listening socket, and what has to be removed when it is closed.

    Args:
        sock: Listens already.
        directory: A private one that was made for the socket, and goes with it.
        host: By which TCP clients on this machine find it, if not by what follows from its address.
        is_ours: We made the socket; one that was handed to us leaves its file behind.
    """

    def __init__(
        self, sock: socket.socket, *, directory: str | None = None, host: str = "", is_ours: bool = True
    ) -> None:
        self.socket = sock
        self.is_ours = is_ours
        self._family = sock.family
        self._name = sock.getsockname()
        self._directory = directory
        self._host = host
        self._identity = _identity(self.unix_path) if self.unix_path is not None and is_ours else None

    @property
    def transport(self) -> Transport:
        """The kind of socket."""
        if self._family == socket.AF_UNIX:
            return Transport.UNIX
        return Transport.TCP if self._family in (socket.AF_INET, socket.AF_INET6) else Transport.VSOCK

    @property
    def unix_path(self) -> str | None:
        """The path of a Unix socket; one in the abstract namespace begins with "@"."""
        if self._family != socket.AF_UNIX:
            return None
        return os.fsdecode(self._name).replace("\0", "@")

    @property
    def port(self) -> int | None:
        """The port of a TCP or vsock listener."""
        return None if self._family == socket.AF_UNIX else int(self._name[1])

    @property
    def host(self) -> str:
        """A name or address by which a client on this machine finds a TCP listener."""
        address = str(self._name[0])
        return self._host or {_EVERYWHERE[0]: "localhost", _EVERYWHERE[1]: _LOOPBACK[1]}.get(address, address)

    def __str__(self) -> str:
        if self.unix_path is not None:
            return self.unix_path
        if self.transport is Transport.VSOCK:
            return f"vsock port {self.port}"
        return f"[{self._name[0]}]:{self.port}" if self._family == socket.AF_INET6 else f"{self._name[0]}:{self.port}"

    def close(self) -> None:
        """Stop listening, and remove what was made for it, unless somebody has put something else in its place."""
        path = self.unix_path if self._identity is not None else None
        self.socket.close()
        if path is not None and self._identity == _identity(path):
            with contextlib.suppress(OSError):
                os.unlink(path)
        if self._directory is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._directory)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def listen(endpoints: Sequence[Endpoint], umask: int | None = UMASK) -> list[Listener]:
    """Return sockets that listen at all `endpoints`: for TCP one for each address.

    Args:
        endpoints: Where.
        umask: For the mode of Unix sockets. It is the whole process's, so that None leaves it as it is, since other
            threads may be making files meanwhile; in no case may others than the owner connect.

    Raises:
        ConfigError: one cannot be listened on; the text says which and why. Nothing is left of the others.
    """
    listeners: list[Listener] = []
    try:
        for endpoint in endpoints:
            listeners += _listen(endpoint, umask)
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _listen(endpoint: Endpoint, umask: int | None) -> list[Listener]:
    if endpoint.fd is not None:
        return [Listener(socket.socket(fileno=endpoint.fd), is_ours=False)]
    if endpoint.transport is Transport.UNIX:
        return [_listen_unix(endpoint.unix_path, umask)]
    if endpoint.transport is Transport.VSOCK:
        return [_listen_vsock(endpoint.port)]
    return _listen_tcp(endpoint)


def _listen_unix(path: str | None, umask: int | None) -> Listener:
    directory = None
    if path is None:
        directory = _make_private_directory()
        path = f"{directory}/socket"
    length = len(os.fsencode(path))
    if length > _MAX_UNIX_PATH:
        raise ConfigError(f'unix: the path must have at most {_MAX_UNIX_PATH} bytes, not {length} as "{path}"')
    if not path or "\0" in path:  # the system would take it for a name that is not in the file system
        raise ConfigError(f"unix: the path must be that of a file, not {path!r}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), _SOCKET_MODE)
        with _umask(umask):
            sock.bind(path)
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        if directory is not None:
            os.rmdir(directory)
        raise _cannot_listen(path, error) from None
    return Listener(sock, directory=directory)


@contextlib.contextmanager
def _umask(umask: int | None) -> Iterator[None]:
    if umask is None:
        yield
        return
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def _make_private_directory() -> str:
    # Not by tempfile, which costs some milliseconds of each start. The path has to be short.
    path = f"/tmp/nbdkitpy{os.urandom(8).hex()}"  # noqa: S108  # nobody else can foresee it, or make it first
    try:
        os.mkdir(path, 0o700)
    except OSError as error:
        raise ConfigError(f"cannot make a directory for the socket, {path}: {error.strerror}") from error
    return path


def _listen_vsock(port: str) -> Listener:
    family = getattr(socket, "AF_VSOCK", None)
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 10 else 1 << 32
    if number >= 1 << 32:
        raise ConfigError(f'port must be a number from 0 to 4294967295 for vsock, not "{port}"')
    try:
        if family is None:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_listen("vsock", error) from None
    try:
        any_port = getattr(socket, "VMADDR_PORT_ANY", 0xFFFFFFFF)
        sock.bind((socket.VMADDR_CID_ANY, number or any_port))
        sock.listen(socket.SOMAXCONN)
    except OSError as error:
        sock.close()
        raise _cannot_listen(f"vsock port {port}", error) from None
    return Listener(sock)


def _listen_tcp(endpoint: Endpoint) -> list[Listener]:
    addresses = _tcp_addresses(endpoint)
    any_port = addresses[0][1][1] == 0
    # Without an address it is loopback of both kinds, which has a name, unless there is only the kind that has none.
    host = "localhost" if endpoint.address is None and addresses[0][0] == socket.AF_INET else ""
    for _ in range(_ATTEMPTS - 1 if any_port else 0):
        with contextlib.suppress(ConfigError):  # the port that one address gave us is taken on another
            return _bind_all(addresses, host, any_port=True)
    return _bind_all(addresses, host, any_port=any_port)


def _tcp_addresses(endpoint: Endpoint) -> list[tuple[int, tuple[str, int]]]:
    """Return families and socket addresses to listen on."""
    if (
        endpoint.port.isascii()
        and endpoint.port.isdigit()
        and (len(endpoint.port) > 5 or int(endpoint.port) > _MAX_PORT)
    ):
        raise ConfigError(
            f'port must be a number from 0 to {_MAX_PORT}, or the name of a service, not "{endpoint.port}"'
        )
    names = _EVERYWHERE if endpoint.address == "any" else (endpoint.address,) if endpoint.address else _LOOPBACK
    families = _FAMILIES[endpoint.address_family]
    found: list[tuple[int, tuple[str, int]]] = []
    for name in names:
        try:
            answers = socket.getaddrinfo(name, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f'cannot listen on address "{name}", port "{endpoint.port}": {reason}') from None
        for family, _, _, _, address in answers:
            if family in families and (int(family), address) not in found:
                found.append((int(family), (str(address[0]), int(address[1]), *address[2:])))
    if not found:
        raise ConfigError(
            f'"{endpoint.address}" has no address of the kind that {endpoint.address_family.value} asks for'
        )
    return found


def _bind_all(addresses: list[tuple[int, tuple[str, int]]], host: str, *, any_port: bool) -> list[Listener]:
    listeners: list[Listener] = []
    absent: ConfigError | None = None
    for family, address in addresses:
        if any_port and listeners:  # the same one for all
            address = (address[0], listeners[0].port or 0, *address[2:])
        try:
            listeners.append(_bind(family, address, host))
        except OSError as error:
            absent = _cannot_listen(f"{address[0]} port {address[1]}", error)
            if error.errno not in _ABSENT:
                for listener in listeners:
                    listener.close()
                raise absent from None
    if not listeners:
        raise absent or ConfigError("there is no address to listen on")
    return listeners


def _bind(family: int, address: tuple[str, int], host: str) -> Listener:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(socket.SOMAXCONN)
    except BaseException:
        sock.close()
        raise
    return Listener(sock, host=host)


def _cannot_listen(where: str, error: Exception) -> ConfigError:
    return ConfigError(f"cannot listen on {where}: {getattr(error, 'strerror', None) or error}")

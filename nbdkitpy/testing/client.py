"""A client: small, synchronous, and complete. Errors are OSError, with the number that the server has sent."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from nbdkitpy.backend import BlockSize, Export
from nbdkitpy.extents import Extent
from nbdkitpy.library import EmbeddedServer
from nbdkitpy.protocol.constants import (
    DEFAULT_PORT,
    Command,
    HandshakeFlag,
    InfoType,
    NbdError,
    Option,
    TransmissionFlag,
)
from nbdkitpy.testing.wire import Refused, Reply, Style, Wire

if TYPE_CHECKING:
    import ssl

__all__ = ["ExportInfo", "NbdClient", "Where", "export_info", "list_exports"]

#: A URI; a socket that is connected, and is the client's from then on; or a server within this program.
Where: TypeAlias = "str | socket.socket | EmbeddedServer"

#: Seconds after which a server that says nothing is given up.
TIMEOUT = 20.0

#: What the protocol says of exports that say nothing of it.
_DEFAULT_BLOCK_SIZE = BlockSize(1, 4096, 32 << 20)

_INFOS = (InfoType.NAME, InfoType.DESCRIPTION, InfoType.BLOCK_SIZE)


class ExportInfo(NamedTuple):
    """What a server says of an export."""

    size: int
    flags: TransmissionFlag
    name: str  #: as the server calls it
    description: str | None
    block_size: BlockSize  #: what the protocol takes for given if the server says nothing

    @classmethod
    def _read(cls, wire: Wire, name: str, told: dict[InfoType, bytes]) -> ExportInfo:
        description = told.get(InfoType.DESCRIPTION)
        sizes = told.get(InfoType.BLOCK_SIZE)
        wire.require(sizes is None or len(sizes) == 12, "block size", sizes)
        return cls(
            wire.size,
            wire.flags,
            told.get(InfoType.NAME, name.encode()).decode(),
            None if description is None else description.decode(),
            _DEFAULT_BLOCK_SIZE if sizes is None else BlockSize(*struct.unpack(">III", sizes)),
        )


def list_exports(where: Where, *, tls: ssl.SSLContext | None = None, timeout: float = TIMEOUT) -> list[Export]:
    """Return the exports that a server tells of; arguments and errors are those of :class:`NbdClient`."""
    with _asking(where, tls, timeout) as (wire, _):
        return [Export(*each) for each in wire.list_exports()]


def export_info(
    where: Where, export_name: str | None = None, *, tls: ssl.SSLContext | None = None, timeout: float = TIMEOUT
) -> ExportInfo:
    """Return what a server says of an export; arguments and errors are those of :class:`NbdClient`."""
    with _asking(where, tls, timeout) as (wire, name):
        name = name if export_name is None else export_name
        return ExportInfo._read(wire, name, wire.go(name, *_INFOS, option=Option.INFO))


class NbdClient:
    """A connection to an export that is open; closed at the end of a ``with`` block.

    Verbs are called as those of handles are. :meth:`submit` sends a request without waiting for the reply, so that
    there may be several under way.

    Args:
        where: A server: its URI, a socket that is connected to it, or an :class:`~nbdkitpy.EmbeddedServer`.
        export_name: None for that of the URI, or the default export.
        style: The form of replies to ask for; if the server does not have it, simpler ones are taken.
        tls: Goes over to TLS. None does so for URIs of the scheme nbds, with the certificates that they name.
        timeout: Seconds after which a server that says nothing is given up with TimeoutError.

    Raises:
        Refused: the server does not open the export: ENOENT if there is none of that name.
        ProtocolError: the server breaks the protocol.
        OSError: the connection cannot be made, or has ended.
        ValueError: this is no URI of an NBD server.
    """

    def __init__(
        self,
        where: Where,
        export_name: str | None = None,
        *,
        style: Style = Style.EXTENDED,
        tls: ssl.SSLContext | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.wire, name = _begun(where, tls, timeout)  #: for what this client does not do
        self._replies: dict[int, Reply] = {}  # that have come before they were asked for
        try:
            name = name if export_name is None else export_name
            _take_best(self.wire, style)
            #: Whether :meth:`extents` can be asked for.
            self.has_extents = self.wire.style is not Style.SIMPLE and _has_base_allocation(self.wire, name)
            self.info = ExportInfo._read(self.wire, name, self.wire.go(name, *_INFOS))  #: what the server says of it
        except BaseException:
            self.wire.socket.close()
            raise

    @property
    def size(self) -> int:
        """Bytes of the export."""
        return self.info.size

    @property
    def flags(self) -> TransmissionFlag:
        """What can be done with the export."""
        return self.info.flags

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take leave, if the server is there to hear it, and close the connection."""
        with contextlib.closing(self.wire.socket), contextlib.suppress(OSError):
            self.wire.send(Command.DISC)

    def abort(self) -> None:
        """Close the connection as if this program had been killed."""
        self.wire.socket.close()

    # --- verbs ---

    def pread(self, count: int, offset: int, flags: int = 0) -> bytes:
        """Read. Flag: DF. This and all others raise OSError with what the server answers."""
        return self.call(Command.READ, offset, count, flags=flags).data

    def pwrite(self, data: bytes, offset: int, flags: int = 0) -> None:
        """Write. Flag: FUA."""
        self.call(Command.WRITE, offset, flags=flags, data=data)

    def flush(self) -> None:
        """Have all that has been written put on stable storage."""
        self.call(Command.FLUSH)

    def trim(self, count: int, offset: int, flags: int = 0) -> None:
        """Have the range forgotten. Flag: FUA."""
        self.call(Command.TRIM, offset, count, flags=flags)

    def zero(self, count: int, offset: int, flags: int = 0) -> None:
        """Have the range read as zeroes. Flags: FUA, NO_HOLE, FAST_ZERO."""
        self.call(Command.WRITE_ZEROES, offset, count, flags=flags)

    def cache(self, count: int, offset: int) -> None:
        """Have the range fetched near."""
        self.call(Command.CACHE, offset, count)

    def extents(self, count: int, offset: int, flags: int = 0) -> list[Extent]:
        """Return what base:allocation says of a beginning of the range, and maybe of what is behind it.

        Flag: REQ_ONE.
        """
        extents = []
        for length, kind in self.call(Command.BLOCK_STATUS, offset, count, flags=flags).extents:
            extents.append(Extent(offset, length, kind))
            offset += length
        return extents

    # --- requests ---

    def call(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> Reply:
        """Send any request, and return the reply; arguments as for :meth:`submit`."""
        return self.result(self.submit(command, offset, length, flags=flags, data=data))

    def submit(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, data: bytes = b"") -> int:
        """Send a request, and return what :meth:`result` wants to know of it.

        Args:
            command: A :class:`Command`.
            offset: Where in the export.
            length: How many bytes; that of `data`, if there are any.
            flags: Of :class:`CommandFlag`.
            data: Of a WRITE.
        """
        return self.wire.send(command, offset, length, flags=flags, data=data)

    def result(self, cookie: int) -> Reply:
        """Return the reply to a request that :meth:`submit` has sent. Others may be asked for later.

        Raises:
            OSError: the reply is an error.
        """
        while cookie not in self._replies:
            reply = self.wire.reply()
            self._replies[reply.cookie] = reply
        reply = self._replies.pop(cookie)
        if reply.error:
            number = int(getattr(errno, NbdError(reply.error).name))
            raise OSError(number, reply.text or os.strerror(number))
        return reply


# --- the handshake ---


def _take_best(wire: Wire, style: Style) -> None:
    """Negotiate `style`, or the best that comes before it."""
    styles = list(Style)
    for each in reversed(styles[: styles.index(style) + 1]):
        with contextlib.suppress(Refused):
            wire.negotiate_style(each)
            return


def _has_base_allocation(wire: Wire, name: str) -> bool:
    try:
        return wire.select_base_allocation(name)
    except Refused:  # there are no contexts; or no such export, which GO will tell
        return False


@contextlib.contextmanager
def _asking(where: Where, tls: ssl.SSLContext | None, timeout: float) -> Iterator[tuple[Wire, str]]:
    """A connection for options, and the export that the URI names. We take our leave at the end."""
    wire, name = _begun(where, tls, timeout)
    with contextlib.closing(wire.socket):
        yield wire, name
        wire.send_option(Option.ABORT)


def _begun(where: Where, tls: ssl.SSLContext | None, timeout: float) -> tuple[Wire, str]:
    """A connection with the greeting and TLS behind it, and the export that the URI names."""
    uri = _Uri(where) if isinstance(where, str) else None
    wire = Wire(_dialled(where, uri, timeout), timeout)
    try:
        if not wire.greet(None) & HandshakeFlag.FIXED_NEWSTYLE:
            raise OSError(errno.EPROTONOSUPPORT, "the server does not have the fixed newstyle handshake")
        if uri is not None and uri.has_tls and tls is None:
            tls = uri.context()
        if tls is not None:
            wire.start_tls(tls, uri.host if uri is not None and uri.host else "localhost")
    except BaseException:
        wire.socket.close()
        raise
    return wire, "" if uri is None else uri.export_name


def _dialled(where: Where, uri: _Uri | None, timeout: float) -> socket.socket:
    if uri is not None:
        return uri.dialled(timeout)
    if isinstance(where, EmbeddedServer):
        return where.connect()
    if not isinstance(where, socket.socket):
        raise TypeError(f"a server is a URI, a socket or an EmbeddedServer, not {where!r}")
    return where


# --- URIs ---


class _Uri:
    """``nbd[s]://HOST[:PORT]/EXPORT``, ``nbd[s]+unix:///EXPORT?socket=PATH``, ``nbd[s]+vsock://CID[:PORT]/EXPORT``."""

    def __init__(self, text: str) -> None:
        parts = urllib.parse.urlsplit(text)
        scheme, _, self._transport = parts.scheme.partition("+")
        self._query = dict(urllib.parse.parse_qsl(parts.query))
        if scheme not in ("nbd", "nbds") or self._transport not in ("", "tcp", "unix", "vsock"):
            raise ValueError(f"{text!r} is no URI of an NBD server")
        if self._transport == "unix" and "socket" not in self._query:
            raise ValueError(f"{text!r} does not name a socket")
        self.has_tls = scheme == "nbds"
        self.host = parts.hostname or ""
        self._port = parts.port or DEFAULT_PORT
        self.export_name = urllib.parse.unquote(parts.path[1:])

    def dialled(self, timeout: float) -> socket.socket:
        if self._transport in ("", "tcp"):
            sock = socket.create_connection((self.host or "localhost", self._port), timeout)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
        is_unix = self._transport == "unix"
        sock = socket.socket(socket.AF_UNIX if is_unix else socket.AF_VSOCK)
        try:
            sock.settimeout(timeout)
            sock.connect(self._query["socket"] if is_unix else (int(self.host), self._port))
        except BaseException:
            sock.close()
            raise
        return sock

    def context(self) -> ssl.SSLContext:
        """What the URI says of TLS. Without certificates the system's are used, to know the server by."""
        import ssl

        if "tls-psk-file" in self._query:
            raise ValueError("pre-shared keys need a context of yours: give tls=")
        directory = self._query.get("tls-certificates")
        if directory is None:
            return ssl.create_default_context()
        context = ssl.create_default_context(cafile=os.path.join(directory, "ca-cert.pem"))
        certificate = os.path.join(directory, "client-cert.pem")
        if os.path.exists(certificate):
            context.load_cert_chain(certificate, os.path.join(directory, "client-key.pem"))
        return context

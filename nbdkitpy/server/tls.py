"""TLS over a connection, so that the engine does not notice.

One thread receives while others send, and OpenSSL's object must not be used by two of them at once, which Python does
not see to. So the object reads and writes memory, a lock of ours is held around each call of it, and nobody holds that
lock while waiting for the client.

Not needed, and not imported, unless TLS is on.
"""

from __future__ import annotations

import contextlib
import errno
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from nbdkitpy.backend import Buffer
from nbdkitpy.protocol.constants import TlsMode
from nbdkitpy.protocol.errors import RemoteProtocolError
from nbdkitpy.server.distinguished_names import names_of
from nbdkitpy.server.transport import Connection, send_by_reading

__all__ = ["Secured", "Tls", "TlsTransport"]

#: Bytes that go into one record, at most.
_RECORD = 16 << 10
#: So many records are made before they are sent, and before the receiving thread may have the lock.
_RECORDS_AT_ONCE = 16

#: Bytes that are received at once: few while a client says little, more while it says much.
_LEAST_RECEIVED = 8 << 10
_MOST_RECEIVED = 128 << 10


class Secured(NamedTuple):
    """A connection on which TLS is up, and what is known of the client by it."""

    transport: TlsTransport
    subject: str | None  #: of the client's certificate, if it was verified
    issuer: str | None
    description: str  #: version and cipher, for people


class Tls:
    """Goes through TLS handshakes with clients.

    Args:
        mode: Whether clients have to use TLS.
        make_context: Reads certificates or keys, and raises ConfigError if they cannot be used.
        parameters: What a URI tells clients on this machine, so that they find what they need.
    """

    def __init__(
        self, mode: TlsMode, make_context: Callable[[], ssl.SSLContext], parameters: Mapping[str, str]
    ) -> None:
        self.mode = mode
        self.parameters = parameters
        self._make_context = make_context
        self._context = make_context()

    def renew(self) -> None:
        """Read certificates or keys again, for clients that connect from now on.

        Raises:
            ConfigError: they cannot be used; the old ones stay.
        """
        self._context = self._make_context()

    def accept(self, raw: Connection) -> Secured:
        """Go through the handshake with a client who is about to begin it.

        Raises:
            RemoteProtocolError: there is nothing that both sides want, or the client has no valid certificate.
            OSError: the connection broke.
        """
        context = self._context
        transport = TlsTransport(raw, context)
        transport.shake_hands()
        certificate = transport.certificate if context.verify_mode is ssl.CERT_REQUIRED else None
        subject = issuer = None
        if certificate is not None:
            with contextlib.suppress(ValueError):  # who has to decide on a name that nobody can read, refuses
                subject, issuer = names_of(certificate)
        return Secured(transport, subject, issuer, transport.description)


class TlsTransport:
    """TLS, of the server's side, over `raw`, which it owns once :meth:`shake_hands` has returned."""

    def __init__(self, raw: Connection, context: ssl.SSLContext) -> None:
        self._raw = raw
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        #: The types that Python's stubs give are those without a buffer.
        self._read: Callable[[int, memoryview], int] = self._ssl.read  # type: ignore[assignment]
        self._lock = threading.Lock()  # around each use of all these
        self._sending = threading.Lock()  # from when something is encrypted until it is sent, so that it stays in order
        self._received = memoryview(bytearray(_LEAST_RECEIVED))
        self._stopped = False

    # --- handshake ---

    def shake_hands(self) -> None:
        """Go through the TLS handshake; raises as :meth:`Tls.accept` does."""
        while not self._is_agreed():
            if not self._receive():
                raise ConnectionResetError(errno.ECONNRESET, "the client left during the TLS handshake")

    def _is_agreed(self) -> bool:
        """Take a step of the handshake, with what has arrived; True if it was the last one."""
        try:
            with self._lock:
                self._ssl.do_handshake()
            agreed = True
        except ssl.SSLWantReadError:
            agreed = False
        except ssl.SSLError as error:
            self._raw.send_now(self._outgoing.read())  # the alert
            raise RemoteProtocolError(f"TLS handshake failed: {_reason(error)}") from error
        self._raw.send([self._outgoing.read()])
        return agreed

    @property
    def certificate(self) -> bytes | None:
        """The client's certificate, in DER, if it has shown one."""
        with self._lock:
            return self._ssl.getpeercert(binary_form=True)

    @property
    def description(self) -> str:
        """Version and cipher, for people."""
        with self._lock:
            cipher, _, _ = self._ssl.cipher() or ("no cipher", "", 0)
            return f"{self._ssl.version()} {cipher}"

    # --- receiving, by one thread ---

    def receive_into(self, buffer: memoryview) -> int:
        """Fill `buffer` with what has arrived; 0 at the end.

        Raises:
            BlockingIOError: nothing came within the time of :meth:`set_patience`.
            OSError: the connection broke, or ended without TLS saying so.
        """
        while True:
            count = self._decrypt_into(buffer)
            if count is not None:
                return count
            if self._receive():
                continue
            if self._stopped:
                return 0
            raise ConnectionAbortedError(errno.ECONNABORTED, "it ended without TLS's close_notify")

    def _decrypt_into(self, buffer: memoryview) -> int | None:
        """Return how many bytes there were; 0 at the end of what TLS protects, None if more has to be received."""
        filled = 0
        try:
            with self._lock:
                while filled < len(buffer):
                    count = self._read(len(buffer) - filled, buffer[filled:])  # of one record
                    if not count:  # close_notify
                        break
                    filled += count
        except ssl.SSLWantReadError:
            self._answer()
            return filled or None
        except ssl.SSLError as error:
            self._answer()
            if not filled:
                raise ConnectionAbortedError(errno.ECONNABORTED, f"TLS failed: {_reason(error)}") from error
        return filled

    def _answer(self) -> None:
        """Send what TLS itself has to say, such as an alert, unless somebody is sending: that will go with the next."""
        if self._outgoing.pending and self._sending.acquire(blocking=False):
            try:
                self._raw.send([self._outgoing.read()])
            finally:
                self._sending.release()

    def _receive(self) -> bool:
        """Wait for something from the client; False if there is nothing any more."""
        try:
            count = self._raw.receive_into(self._received)
        except BlockingIOError:
            self._received = memoryview(bytearray(_LEAST_RECEIVED))
            raise
        with self._lock:
            self._incoming.write(self._received[:count])
        if count == len(self._received) < _MOST_RECEIVED:
            self._received = memoryview(bytearray(2 * count))
        return bool(count)

    receive_soon = receive_into

    def set_patience(self, seconds: float) -> None:
        """Have receiving give up with BlockingIOError after so long; 0 is never."""
        self._raw.set_patience(seconds)

    # --- sending ---

    def send(self, pieces: Sequence[Buffer], *, more: bool = False) -> None:
        """Send all pieces, in order; `more` says that what follows belongs in the same packet."""
        records = list(_records(pieces))
        with self._sending:
            for first in range(0, len(records), _RECORDS_AT_ONCE):
                after = first + _RECORDS_AT_ONCE
                self._raw.send(self._encrypt(records[first:after]), more=more or after < len(records))

    def _encrypt(self, records: Sequence[memoryview]) -> list[bytes]:
        encrypted = []
        with self._lock:
            for record in records:
                while len(record):  # the client may have asked for shorter ones
                    record = record[self._ssl.write(record) :]
                encrypted.append(self._outgoing.read())
        return encrypted

    def send_file(self, head: bytes, fd: int, position: int, count: int) -> int:
        """Send `head`, then `count` bytes of a file; return how many of these went: fewer if the file has no more.

        Raises:
            OSError: the connection is broken.
        """
        self.send([head], more=True)
        return send_by_reading(self.send, fd, position, count)

    def is_full(self) -> bool:
        """Tell whether nothing can be sent before the client has taken something. From any thread."""
        return self._raw.is_full()

    # --- the end ---

    def is_gone(self) -> bool:
        """Tell whether the client hears nothing any more."""
        return self._raw.is_gone()

    def stop_receiving(self) -> None:
        """Have the receiving thread find the end of the stream, after what has already arrived."""
        self._stopped = True
        self._raw.stop_receiving()

    def abort(self) -> None:
        """Break the connection: whoever waits to send or to receive finds out at once."""
        self._raw.abort()

    def close(self) -> None:
        """End TLS, then the connection. Only :meth:`abort` and the like may be called after this."""
        if self._sending.acquire(blocking=False):  # else somebody is stuck, and closing frees him
            try:
                self._say_goodbye()
            finally:
                self._sending.release()
        self._raw.close()

    def _say_goodbye(self) -> None:
        """Say close_notify, but do not wait for the client's."""
        with self._lock:
            with contextlib.suppress(ssl.SSLError):  # that the client's has not come, or that TLS has failed
                self._ssl.unwrap()
            self._raw.send_now(self._outgoing.read())


def _records(pieces: Sequence[Buffer]) -> Iterator[memoryview]:
    """What goes into each record: small pieces are put together, large ones cut without being copied."""
    small = bytearray()
    for piece in pieces:
        left = memoryview(piece).cast("B")
        if small and len(small) + len(left) > _RECORD:
            yield memoryview(small)
            small = bytearray()
        while len(left) > _RECORD:
            yield left[:_RECORD]
            left = left[_RECORD:]
        small += left
    if small:
        yield memoryview(small)


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate: {error.verify_message}"
    return (error.reason or str(error)).lower().replace("_", " ")

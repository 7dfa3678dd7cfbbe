"""Messages to the service manager that started us: that we are ready, reload, end, and are alive."""

from __future__ import annotations

import logging
import os
import socket
import time
import weakref
from collections.abc import MutableMapping

__all__ = ["Notifier"]

_logger = logging.getLogger("nbdkitpy")

#: Seconds that a message may take. If the manager hangs, clients are to be served all the same.
_PATIENCE = 1.0

#: A number of more digits is either a mistake or for ever.
_MAX_DIGITS = 19


class Notifier:
    """Tells the service manager, if there is one that wants to be told, how we are. Nothing here ever raises.

    It is not for several threads at once.

    Args:
        environ: What it finds there for this purpose it removes, so that no child speaks in our name.
        pid: Of this process, if not what the system says.
    """

    #: Seconds between two calls of :meth:`alive`: half of what the manager waits before it takes us to hang.
    watchdog_interval: float | None

    def __init__(self, environ: MutableMapping[str, str], pid: int | None = None) -> None:
        self._address = _address(environ.pop("NOTIFY_SOCKET", ""))
        limit, whose = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        is_ours = whose in ("", str(os.getpid() if pid is None else pid))
        self.watchdog_interval = _interval(limit) if self._address is not None and is_ours else None
        self._socket: socket.socket | None = None
        self._has_complained = False

    def ready(self) -> None:
        """Say that clients can connect, or that a reload is over."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that a reload begins; :meth:`ready` says that it is over."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """Say that the end begins."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """Say in a few words, for people, what we are doing; later words replace earlier ones."""
        if self._address is not None:
            # A line that begins in the middle of it would be a message of its own.
            self._send("STATUS=" + "".join(c if c.isprintable() else " " for c in text))

    def alive(self) -> None:
        """Say that we do not hang."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Say nothing more, as a process that was forked from the one that is meant."""
        self._address, self._socket = None, None

    def _send(self, message: str) -> None:
        if self._address is None:
            return
        try:
            self._opened().sendto(message.encode("utf-8", "replace"), self._address)
        except OSError as error:
            self._complain(error.strerror or str(error))

    def _opened(self) -> socket.socket:
        # Made for the first message, when descriptors of whoever started us have been closed, and kept, since the
        # watchdog must not end us for want of a descriptor.
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            weakref.finalize(self, self._socket.close)
            self._socket.settimeout(_PATIENCE)
        return self._socket

    def _complain(self, reason: str) -> None:
        if not self._has_complained:  # the next message is likely to fail in the same way
            self._has_complained = True
            _logger.warning("cannot tell the service manager (NOTIFY_SOCKET): %s", reason)


def _address(text: str) -> str | None:
    """The socket's address: a path, or after "@" a name that is not in the file system."""
    if text.startswith("/"):
        return text
    if text.startswith("@") and len(text) > 1:
        return f"\0{text[1:]}"
    if text:
        _logger.warning("NOTIFY_SOCKET must be an absolute path, or @ and a name, not %r: ignored", text)
    return None


def _interval(limit: str) -> float | None:
    if limit.isascii() and limit.isdigit() and len(limit) <= _MAX_DIGITS and int(limit) > 0:
        return int(limit) / 1_000_000 / 2
    if limit:
        _logger.warning("WATCHDOG_USEC must be a number of microseconds, not %r: ignored", limit)
    return None

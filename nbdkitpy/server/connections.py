"""Who is connected, and whether there is room for one more: decided when a client is accepted, before it costs much.

Clients are counted in all, by where they come from, and as long as they have not finished the handshake. One that has
not may have to give way to a newcomer, so that those who connect and say nothing cannot take all the room; one that
has never does.
"""

from __future__ import annotations

import math
import socket
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from nbdkitpy.backend import Client, Family
from nbdkitpy.server.options import ServerOptions

__all__ = ["Connections", "source_of"]

C = TypeVar("C", bound=Hashable)

#: Bits of an IPv6 address that tell one network of a site from another: whoever has one has all addresses in it.
_NETWORK_BITS = 64


def source_of(client: Client) -> str:
    """Return whom a client is counted for: its IPv4 address, IPv6 network of 64 bits, user, or vsock context.

    All of whom that is not known are counted for one.
    """
    sources = {
        Family.INET: f"address {client.address}",
        Family.UNIX: f"uid {client.uid}",
        Family.VSOCK: f"vsock cid {client.cid}",
    }
    if client.family is Family.INET6:
        return f"network {_network(client.address or '::')}"
    return sources.get(client.family, "unknown addresses")


def _network(address: str) -> str:
    packed = socket.inet_pton(socket.AF_INET6, address)[: _NETWORK_BITS // 8]
    return f"{socket.inet_ntop(socket.AF_INET6, packed.ljust(16, bytes(1)))}/{_NETWORK_BITS}"


class Connections(Generic[C]):
    """Connections, by whatever they are known by. One thread lets them in; any thread may tell what becomes of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[C, str] = {}
        self._by_source: Counter[str] = Counter()
        self._handshakes: dict[C, float] = {}  # unfinished ones and when they have to end, the oldest first

    def refusal(self, client: Client, options: ServerOptions) -> str | None:
        """Return why there is no room for `client`, or None if there is; somebody may have to give way for it."""
        most, most_of_source, source = options.max_connections, options.max_connections_per_source, source_of(client)
        with self._lock:
            if most_of_source and self._by_source[source] >= most_of_source:
                return f"too many connections of {source}, at most {most_of_source}"
            if most and len(self._sources) >= most and not self._handshakes:
                return f"too many connections, at most {most}"
        return None

    def enter(self, connection: C, client: Client, deadline: float = math.inf) -> None:
        """Count a connection, whose handshake has to end by `deadline`."""
        source = source_of(client)
        with self._lock:
            self._sources[connection] = source
            self._by_source[source] += 1
            self._handshakes[connection] = deadline

    def is_crowded(self, options: ServerOptions) -> bool:
        """Tell whether :meth:`displaced` would return somebody."""
        with self._lock:
            return self._crowd(options) is not None

    def _crowd(self, options: ServerOptions) -> str | None:
        if options.max_handshakes and len(self._handshakes) > options.max_handshakes:
            return "too many unfinished handshakes, the oldest is closed"
        if options.max_connections and len(self._sources) > options.max_connections:
            return "too many connections, the oldest unfinished handshake is closed"
        return None

    def displaced(self, options: ServerOptions) -> tuple[C, str] | None:
        """Return who has to give way to the newcomer, and why; it is not counted any more, and to be disconnected.

        To be called after each :meth:`enter`. It may be the newcomer itself, if all others have been quick.
        """
        with self._lock:
            why = self._crowd(options)
            if why is None:
                return None
            oldest = next(iter(self._handshakes))
            self._forget(oldest)
        return oldest, why

    def established(self, connection: C) -> None:
        """Take note that a handshake is over."""
        with self._lock:
            self._handshakes.pop(connection, None)

    def leave(self, connection: C) -> None:
        """Count a connection no longer, if it is counted at all."""
        with self._lock:
            self._forget(connection)

    def _forget(self, connection: C) -> None:
        self._handshakes.pop(connection, None)
        source = self._sources.pop(connection, None)
        if source is None:
            return
        self._by_source[source] -= 1
        if not self._by_source[source]:
            del self._by_source[source]

    # --- unfinished handshakes ---

    @property
    def handshakes(self) -> list[C]:
        """Those that have not finished the handshake, the oldest first."""
        with self._lock:
            return list(self._handshakes)

    @property
    def deadline(self) -> float:
        """When the oldest of them has to have done so."""
        with self._lock:
            return next(iter(self._handshakes.values()), math.inf)

    def late(self, now: float, is_excused: Callable[[C], bool], until: float) -> list[C]:
        """Return those whose deadline is over, and take them for finished. Who is excused has `until` instead."""
        with self._lock:
            due = [connection for connection, deadline in self._handshakes.items() if deadline <= now]
            for connection in due:
                del self._handshakes[connection]
            excused = [connection for connection in due if is_excused(connection)]
            self._handshakes.update(dict.fromkeys(excused, until))
        return [connection for connection in due if connection not in excused]

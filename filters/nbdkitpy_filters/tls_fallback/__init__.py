"""The tls-fallback filter: shows clients without TLS a message, in place of the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from nbdkitpy import (
    Backend,
    Client,
    ConfigError,
    Export,
    Filter,
    Handle,
    Parameter,
    ThreadModel,
    hookimpl,
    parse_string,
)

__all__ = ["TlsFallback"]

_MESSAGE = "This NBD server requires TLS authentication before it will serve useful data.\n"
_SECTOR = 512


class TlsFallback(Filter):
    """Keep clients without TLS away from all that is behind."""

    name = "tls-fallback"
    longname = "nbdkitpy tls-fallback filter"
    description = "Serve a message instead of the disk to clients that do not use TLS."

    tlsreadme = Parameter(
        parse_string, default=_MESSAGE, metavar="MESSAGE", help="What clients without TLS read from the disk."
    )

    def config_complete(self) -> None:
        super().config_complete()
        for layer in self._inner_layers():
            # Whoever has the message open, and needs no right to that, would keep all others out.
            if layer.thread_model() is ThreadModel.SERIALIZE_CONNECTIONS:
                raise ConfigError(
                    f"tls-fallback: {layer.name} serves one connection at a time, which excludes this filter"
                )

    def _inner_layers(self) -> Iterator[Backend]:
        layer: Backend = self
        while isinstance(layer, Filter):
            layer = layer.next
            yield layer

    def list_exports(self, client: Client, readonly: bool) -> Iterable[Export]:
        return super().list_exports(client, readonly) if client.tls else [Export("")]

    def default_export(self, client: Client, readonly: bool) -> str:
        return super().default_export(client, readonly) if client.tls else ""

    def open(self, export_name: str, readonly: bool, client: Client) -> Handle:
        if client.tls:
            return super().open(export_name, readonly, client)
        return _Message(self.tlsreadme.encode("utf-8", "surrogateescape"))


class _Message(Handle):
    """A text as a disk, filled up with NUL to whole sectors. It cannot be written."""

    inline = frozenset({"pread"})

    def __init__(self, text: bytes) -> None:
        sectors = max(1, -(-len(text) // _SECTOR))
        self._content = text.ljust(sectors * _SECTOR, b"\0")

    def get_size(self) -> int:
        return len(self._content)

    def can_multi_conn(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        return self._content[offset : offset + count]


@hookimpl
def register_filters(register: Callable[[type[Filter]], None]) -> None:
    """Hand over the filter."""
    register(TlsFallback)

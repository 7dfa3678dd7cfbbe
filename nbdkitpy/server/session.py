"""One client, from the accepted socket to the closed one."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from nbdkitpy.backend import Client, Support, ThreadModel
from nbdkitpy.exceptions import describe
from nbdkitpy.protocol.constants import BASE_ALLOCATION, Option, OptionReply, TlsMode, TransmissionFlag
from nbdkitpy.protocol.errors import RemoteProtocolError, printable
from nbdkitpy.protocol.handshake import (
    Closed,
    Event,
    ExportFacts,
    Handshake,
    ListExports,
    Negotiated,
    OpenExport,
    Ready,
    StartTls,
)
from nbdkitpy.protocol.messages import BlockSizeInfo, oldstyle_greeting
from nbdkitpy.protocol.replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from nbdkitpy.protocol.transmission import MAX_PAYLOAD, Room, Transmission
from nbdkitpy.server.budget import Budget, Memory
from nbdkitpy.server.checks import reason
from nbdkitpy.server.commands import Log
from nbdkitpy.server.engine import Engine
from nbdkitpy.server.failures import GivenUp
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.transport import Connection, Stream
from nbdkitpy.stack import Capabilities, Stack
from nbdkitpy.stack import OpenExport as Opened

if TYPE_CHECKING:
    from nbdkitpy.server.tls import Tls

__all__ = ["Session", "admit", "session_name", "transmission_flags"]

#: Of the handshake; none of its messages is long.
_HANDSHAKE_BUFFER = 4096

_NO_OPTIONS = Negotiated(structured_replies=False, extended_headers=False, contexts=())


class Session:
    """Serves one client. :meth:`run` is the whole life of a connection, in a thread of its own.

    Args:
        transport: The connection; the session owns it.
        client: Who is at its other end.
        established: Called when the handshake is over but for its last message.
        is_admitted: The layers have been asked by :func:`admit` before.
        tls: By which clients may go over to TLS; None if they may not.
        memory: What the sessions of this process have in common; None if there is one only.
    """

    def __init__(
        self,
        transport: Connection,
        client: Client,
        stack: Stack,
        options: ServerOptions,
        log: logging.Logger,
        established: Callable[[Session], None],
        tls: Tls | None = None,
        *,
        is_admitted: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.name = session_name(stack, client)
        self.number = client.number
        self._connection = transport
        self._tls = tls
        self._transport: Stream = transport  # the connection, or TLS over it
        # Not methods of ours, as handles keep the client: we would wait for the garbage collector.
        self._client = client._replace(sleep=transport.sleep, disconnect=_disconnector(self))
        self._stack = stack
        self._options = options
        self._log = log
        self._established = established
        self._is_admitted = is_admitted
        self._export: Opened | None = None  # what the client has open
        self._engine: Engine | None = None
        #: What payloads and replies are counted by.
        self.budget = Budget(options.max_buffered_per_connection, memory or Memory(options.max_buffered))
        self._stopping = False
        #: A backend is being waited for, not the client.
        self.waits_for_backend = False

    # --- from any thread ---

    def stop(self) -> None:
        """Finish what the client has asked for so far, refuse the rest, and end."""
        self._stopping = True
        if self._engine is not None:
            self._engine.stop()
        else:
            self._transport.stop_receiving()

    def refuse(self) -> None:
        """Finish what the client has asked for so far, and refuse the rest until it leaves."""
        if self._engine is not None:
            self._engine.refuse()
        else:
            self.stop()

    def abort(self) -> None:
        """End at once: the connection breaks."""
        self._transport.abort()
        self.budget.cancel()

    @property
    def waits_for_client(self) -> bool:
        """Whether it is for the client to take replies, or to send what it has begun."""
        return self._transport.is_full() if self._engine is None else self._engine.waits_for_client

    def give_up(self) -> None:
        """End at once, as the server does, and have no coroutine of a backend go on with what it is at."""
        self.abort()
        self._stack.give_up()

    # --- in the session's own thread ---

    def run(self) -> None:
        """Serve the client until it leaves. Whatever happens ends here, and is logged."""
        try:
            self._serve()
        except RemoteProtocolError as error:
            self._log.error("%s: %s: %s", self.name, self._client, error)
        except OSError as error:
            self._log.info("%s: %s: connection lost: %s", self.name, self._client, describe(error))
        except BaseException as error:
            self._log.error("%s: %s: %s", self.name, self._client, describe(error), exc_info=error)
        finally:
            try:
                self._close_export()
            finally:
                self._transport.close()

    def _serve(self) -> None:
        if not (self._is_admitted or admit(self._stack, self._client, self._options.readonly, self._log)):
            return
        if self._options.oldstyle:
            negotiated, received = _NO_OPTIONS, b""
            facts = self._opened(OpenExport("", Option.EXPORT_NAME, wants_description=False), negotiated)
            if isinstance(facts, str):
                self._log.error("%s: %s: the export was not opened: %s", self.name, self._client, facts)
                return
            self._established(self)
            self._transport.send([oldstyle_greeting(facts.size, facts.flags)])
        else:
            handshake = Handshake(
                handshake_flags=self._options.handshake_flags,
                structured_replies=self._options.structured_replies,
                meta_contexts=self._options.meta_contexts,
                tls=TlsMode.OFF if self._tls is None else self._tls.mode,
                max_options=self._options.max_options,
            )
            if not self._negotiate(handshake):
                return
            negotiated, received = handshake.negotiated, handshake.take_unprocessed()
            del handshake
        self._transmit(negotiated, received)

    # --- handshake ---

    def _negotiate(self, handshake: Handshake) -> bool:
        """Go through the handshake; False if the client took its leave, or just left."""
        buffer = memoryview(bytearray(_HANDSHAKE_BUFFER))
        while True:
            handshake.shutting_down = self._stopping
            try:
                event = self._next_event(handshake)
            except RemoteProtocolError:
                with contextlib.suppress(OSError):  # what the client did is more to the point
                    self._send_answers(handshake)
                raise
            self._send_answers(handshake)  # after each event, as a list of exports may be long
            if isinstance(event, StartTls):
                self._start_tls()
                handshake.tls_started()
            if isinstance(event, (Ready, Closed)):
                return isinstance(event, Ready)
            if event is not None:
                continue
            count = self._transport.receive_into(buffer)
            if not count:
                self._log.debug("%s: left during the handshake", self.name)
                return False
            handshake.receive_data(buffer[:count])

    def _next_event(self, handshake: Handshake) -> Event | None:
        """Return the next event; if it asks for an export or a list of them, that has been answered."""
        event = handshake.next_event()
        if isinstance(event, OpenExport):
            self._answer_open(handshake, event)
        elif isinstance(event, ListExports):
            self._answer_list(handshake)
        return event

    def _send_answers(self, handshake: Handshake) -> None:
        for refusal in handshake.refusals:
            self._log.error("%s: %s", self.name, refusal)
        handshake.refusals.clear()
        output = handshake.data_to_send()
        if output:
            with self.budget.holding(len(output)):
                self._transport.send([output])

    def _start_tls(self) -> None:
        if self._tls is None:  # not reached: the client has been refused
            raise RuntimeError("there is no TLS")
        secured = self._tls.accept(self._connection)
        self._transport = secured.transport
        self._client = self._client._replace(tls=True, tls_dn=secured.subject, tls_issuer_dn=secured.issuer)
        whose = "" if secured.subject is None else f', certificate of "{printable(secured.subject)}"'
        self._log.debug("%s: TLS is up: %s%s", self.name, secured.description, whose)

    def _answer_open(self, handshake: Handshake, event: OpenExport) -> None:
        facts = self._opened(event, handshake.negotiated)
        if isinstance(facts, str):
            handshake.export_refused(OptionReply.ERR_UNKNOWN, facts)
            return
        if event.option is Option.INFO:
            self._close_export()
        else:
            self._established(self)  # before the client knows it, so that nobody takes it for one who has not finished
        handshake.export_opened(facts)

    def _opened(self, event: OpenExport, negotiated: Negotiated) -> ExportFacts | str:
        """Open what the client asks for; if that fails, return what the client is told of it."""
        self.waits_for_backend = True
        try:
            return self._open(event, negotiated)
        except BaseException as error:
            self._close_export()
            expected = isinstance(error, OSError)
            if not expected or event.option is not Option.EXPORT_NAME:  # that ends the connection, which is logged
                failed, trace = printable(event.name), None if expected else error
                self._log.error('%s: cannot open export "%s": %s', self.name, failed, describe(error), exc_info=trace)
            return (reason(error) if isinstance(error, OSError) else "") or "the export cannot be opened"
        finally:
            self.waits_for_backend = False

    def _open(self, event: OpenExport, negotiated: Negotiated) -> ExportFacts:
        """Open what the client asks for, and return what it is told of that."""
        readonly = self._options.readonly
        client = self._client._replace(is_probe=event.option is Option.INFO)
        name = event.name or self._stack.default_export(client, readonly)
        self._export = self._stack.open(name, readonly, client)
        capabilities = self._export.capabilities
        description = self._export.description() if event.wants_description else None
        self._log.debug('%s: opened export "%s": %s', self.name, printable(name), capabilities)
        return ExportFacts(
            size=capabilities.size,
            flags=transmission_flags(capabilities, negotiated),
            name=name or None,
            description=description,
            block_size=_block_size(capabilities),
        )

    def _answer_list(self, handshake: Handshake) -> None:
        try:
            exports = self._stack.list_exports(self._client, self._options.readonly)
        except BaseException as error:
            self._log.error("%s: cannot list the exports: %s", self.name, describe(error))
            handshake.list_refused(OptionReply.ERR_PLATFORM, "the exports cannot be listed")
            return
        handshake.exports_listed(exports)

    # --- transmission ---

    def _transmit(self, negotiated: Negotiated, received: bytes) -> None:
        export = self._export
        if export is None:  # not reached: the handshake ends by opening one
            raise RuntimeError("no export is open")
        serial = self._stack.model < ThreadModel.PARALLEL or self._options.threads == 1
        engine: type[Engine] = Engine
        log: Log = self._log
        if export.coroutines is not None and not serial:
            from nbdkitpy.server.coroutines import CoroutineEngine  # with asyncio

            # In the loop's thread the log cannot know from the thread's name whose request has failed.
            engine, log = CoroutineEngine, logging.LoggerAdapter(self._log, {"connection": self._client.number})
        self._engine = engine(
            self._transport,
            export,
            _transmission(export.capabilities, negotiated, self.budget),
            _replies(negotiated),
            threads=0 if serial else self._options.threads,
            lock=self._stack.request_lock,
            log=log,
            name=self.name,
            budget=self.budget,
            idle_timeout=self._options.idle_timeout,
        )
        if self._stopping:
            self._engine.stop()
        self._engine.run(received)
        self._log.debug("%s: finished", self.name)

    def _close_export(self) -> None:
        export, self._export = self._export, None
        if export is None:
            return
        try:
            export.close()
        except BaseException as error:
            self._log.error("%s: closing the export: %s", self.name, describe(error), exc_info=error)


def session_name(stack: Stack, client: Client) -> str:
    """Return what the session of `client` is called, in messages too."""
    return f"{stack.plugin.name}[{client.number}]"


def admit(stack: Stack, client: Client, readonly: bool, log: logging.Logger) -> bool:
    """Ask the layers whether `client` may come in, and log the answer."""
    name = session_name(stack, client)
    try:
        stack.preconnect(client, readonly)
    except OSError as error:
        log.error("%s: %s: refused: %s", name, client, reason(error) or describe(error))
        return False
    except GivenUp:  # not the unit's own
        raise
    except BaseException as error:
        log.error("%s: %s: %s", name, client, describe(error), exc_info=error)
        return False
    log.debug("%s: %s: accepted", name, client)
    return True


def _disconnector(session: Session) -> Callable[[bool], None]:
    reference = weakref.ref(session)

    def disconnect(force: bool) -> None:
        found = reference()
        if found is not None:
            (found.abort if force else found.refuse)()

    return disconnect


def _block_size(capabilities: Capabilities) -> BlockSizeInfo:
    """What is told to the client is what is enforced."""
    sizes = capabilities.block_size or BlockSizeInfo()
    return BlockSizeInfo(sizes.minimum, sizes.preferred, min(sizes.maximum, MAX_PAYLOAD))


def _transmission(capabilities: Capabilities, negotiated: Negotiated, room: Room) -> Transmission:
    sizes = _block_size(capabilities)
    return Transmission(
        capabilities.size,
        transmission_flags(capabilities, negotiated),
        minimum=sizes.minimum,
        maximum=sizes.maximum,
        structured=negotiated.structured_replies,
        extended=negotiated.extended_headers,
        contexts=BASE_ALLOCATION in negotiated.contexts,
        room=room,
    )


def _replies(negotiated: Negotiated) -> Replies:
    if negotiated.extended_headers:
        return ExtendedReplies()
    return StructuredReplies() if negotiated.structured_replies else SimpleReplies()


def transmission_flags(capabilities: Capabilities, negotiated: Negotiated) -> TransmissionFlag:
    """Return what a client is told that it can do with an export, and is then held to."""
    chunked = negotiated.structured_replies or negotiated.extended_headers
    offered = {
        TransmissionFlag.HAS_FLAGS: True,
        TransmissionFlag.READ_ONLY: not capabilities.can_write,
        TransmissionFlag.SEND_FLUSH: capabilities.can_flush,
        TransmissionFlag.SEND_FUA: capabilities.can_fua is not Support.NONE,
        TransmissionFlag.ROTATIONAL: capabilities.is_rotational,
        TransmissionFlag.SEND_TRIM: capabilities.can_trim,
        TransmissionFlag.SEND_WRITE_ZEROES: capabilities.can_zero is not Support.NONE,
        TransmissionFlag.SEND_FAST_ZERO: capabilities.can_fast_zero,
        TransmissionFlag.SEND_DF: chunked,
        TransmissionFlag.CAN_MULTI_CONN: capabilities.can_multi_conn,
        TransmissionFlag.SEND_CACHE: capabilities.can_cache is not Support.NONE,
        TransmissionFlag.BLOCK_STATUS_PAYLOAD: negotiated.extended_headers and bool(negotiated.contexts),
    }
    flags = TransmissionFlag(0)
    for flag, is_offered in offered.items():
        if is_offered:
            flags |= flag
    return flags

"""The main process of a server with workers: it accepts clients, and hands them over to processes that serve them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import socket
import time
from collections.abc import Callable
from typing import ClassVar

from nbdkitpy.backend import Client, SharedCount
from nbdkitpy.server import linux
from nbdkitpy.server.channel import Channel, Kind
from nbdkitpy.server.connections import Connections
from nbdkitpy.server.failures import GivenUp, Reported, report
from nbdkitpy.server.forking import (
    check_threads,
    described_exit,
    exit_status,
    fork,
    live_and_exit,
    unblock_signals,
)
from nbdkitpy.server.front import Front, described_clients
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.process_count import ProcessCount
from nbdkitpy.server.service import GRACE, LEAVING
from nbdkitpy.server.session import admit
from nbdkitpy.server.transport import describe_client
from nbdkitpy.server.worker import Worker, pack_reload, settle
from nbdkitpy.stack import Stack

__all__ = ["Pool"]

#: A worker that ends within so many seconds is followed by another one only after as many.
_SHORT_LIFE = 1.0

#: Seconds that workers have beyond those that their sessions have.
_MARGIN = 1.0


@dataclasses.dataclass(eq=False)
class _Process:
    """A worker, as the main process sees it."""

    number: int  #: from 1 on; who takes its place has the same one
    pid: int
    channel: Channel
    begun: float
    clients: set[int] = dataclasses.field(default_factory=set)  #: their numbers
    is_ready: bool = False
    is_done: bool = False  #: has no clients any more, and will end
    is_buried: bool = False  #: has ended, and nothing is left of it

    def __str__(self) -> str:
        return f"worker {self.number} (pid {self.pid})"


class Pool(Front):
    """Listens, lets clients in, and hands each to the worker that has the fewest.

    It has one thread, so that it can fork at any time. It is what backends see of the server in the workers too, where
    what they ask for goes to the main process.
    """

    def __init__(self, options: ServerOptions) -> None:
        linux.require("--workers")
        super().__init__(options)
        self._live: Callable[[Callable[[Stack], bool]], int] | None = None  # what a worker does; None before the first
        self._processes: dict[int, _Process] = {}  # by number
        self._due: dict[int, float] = {}  # numbers of those to be begun, and when
        self._latest = 0  # number of the one that was given the last client
        self._connections: Connections[int] = Connections()
        self._counts: list[ProcessCount] = []
        self._is_starting = True
        self._is_ending = False
        self._is_admitting = False  # a unit is asked about a client
        self._all_well = True  # none has failed to end in order
        self._main: Channel | None = None  # in a worker: to the main process

    # --- what backends ask for, here or in a worker ---

    def finish(self) -> None:
        if not self._told_main(Kind.FINISH):
            super().finish()

    def shutdown(self) -> None:
        if not self._told_main(Kind.SHUTDOWN):
            super().shutdown()

    def abort(self) -> None:
        super().abort()
        if self._is_admitting:  # and does not return, as the first signal would have ended us
            raise GivenUp

    def _told_main(self, kind: Kind) -> bool:
        if self._main is None:
            return False
        with contextlib.suppress(OSError):  # it has gone, which ends us
            self._main.send(kind)
        return True

    def shared_count(self, on_zero: Callable[[], None] | None = None) -> SharedCount:
        """Return a count that all processes share.

        Raises:
            RuntimeError: the workers are there already, or this is one.
        """
        if self._live is not None:
            raise RuntimeError("shared_count must be called in load or get_ready, before the workers begin")
        count = ProcessCount(1 + self.options.workers, on_zero)
        self._counts.append(count)
        return count

    # --- the beginning ---

    def start_workers(self, live: Callable[[Callable[[Stack], bool]], int]) -> bool:
        """Start them one after the other, so that if something is wrong only one says so."""
        check_threads("start workers", "leave --workers out")
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # then nobody could tell how they end
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._live = live
        for number in range(1, self.options.workers + 1):
            self._begin_first(number)
        self._is_starting = False
        return True

    def _begin_first(self, number: int) -> None:
        if self._stopping:
            return
        process = self._begin(number)
        self._wait_until(lambda: process.is_ready or process.is_buried or self._stopping)
        if process.is_buried:
            raise Reported

    def _begin(self, number: int) -> _Process:
        """Fork one worker.

        Raises:
            OSError: the system has no room for it.
        """
        ours, theirs = Channel.pair()
        try:
            pid = fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if not pid:
            ours.close()
            live_and_exit(lambda: self._live_as_worker(number, theirs), f"worker {number}")
        unblock_signals()
        theirs.close()
        process = self._processes[number] = _Process(number, pid, ours, time.monotonic())
        self._watch(ours.fileno(), functools.partial(self._hear, process))
        return process

    def _live_as_worker(self, number: int, channel: Channel) -> int:
        settle(number)
        self._forget_main(number, channel)
        assert self._live is not None, "start_workers has set it"
        worker = Worker(self.options, channel)
        worker.tls = self.tls
        return self._live(worker.serve)

    def _forget_main(self, number: int, channel: Channel) -> None:
        """Leave to the main process what is its own."""
        self._main = channel
        for count in self._counts:
            count.place = number
        for process in self._processes.values():
            process.channel.close()
        for listener in self._listeners:
            listener.socket.close()
        if self.notifier is not None:
            self.notifier.close()

    # --- clients ---

    def _has_room(self) -> bool:
        most = self.options.max_connections
        if most and self._connected() >= most + LEAVING:
            return False
        return any(process.is_ready and process.channel.has_room() for process in self._processes.values())

    def _take(self, sock: socket.socket, number: int, stack: Stack) -> bool:
        with sock:  # the worker's is another descriptor
            try:
                client = describe_client(sock, number)
            except OSError as error:  # gone before it could be looked at
                self._log.info("connection %d: %s", number, error)
                return True
            refusal = self._connections.refusal(client, self.options)
            if refusal is not None:
                self._catch_up()
                refusal = self._connections.refusal(client, self.options)
            if refusal is not None:
                self._complain("%s: %s is disconnected", refusal, client)
            elif self._admits(client, stack):
                self._connections.enter(number, client)
                self._hand_over(sock, number)
                self._make_room()
        return True

    def _admits(self, client: Client, stack: Stack) -> bool:
        self._is_admitting = True
        try:
            return admit(stack, client, self.options.readonly, self._log)
        finally:
            self._is_admitting = False

    def _hand_over(self, sock: socket.socket, number: int) -> None:
        for process in self._by_load():
            try:
                process.channel.send(Kind.CLIENT, number, sock.fileno())
            except OSError:  # it was killed just now, or does not do anything
                continue
            process.clients.add(number)
            self._latest = process.number
            return
        self._connections.leave(number)
        self._complain("connection %d: no worker can take it", number)

    def _make_room(self) -> None:
        """Disconnect who has to give way to the newcomer."""
        if self._connections.is_crowded(self.options):
            self._catch_up()
        displaced = self._connections.displaced(self.options)
        if displaced is not None:
            number, why = displaced
            self._complain("%s: connection %d", why, number)
            for process in self._processes.values():
                if number in process.clients:
                    self._tell(process, Kind.DROP, number)

    def _by_load(self) -> list[_Process]:
        """Workers that can serve, the one with the fewest clients first; among equals they take turns."""
        ready = [process for process in self._processes.values() if process.is_ready]
        turn = self._latest + 1
        return sorted(ready, key=lambda each: (len(each.clients), (each.number - turn) % (self.options.workers + 1)))

    def _connected(self) -> int:
        return sum(len(process.clients) for process in self._processes.values())

    # --- what workers say, and what becomes of them ---

    def _catch_up(self) -> None:
        """Hear what workers have said so far: who has left, or finished the handshake, is in nobody's way."""
        for process in list(self._processes.values()):
            while self._has_heard(process):
                pass

    def _hear(self, process: _Process) -> bool:
        self._has_heard(process)
        return True

    def _has_heard(self, process: _Process) -> bool:
        """Do what one message asks for, if there is one; tell whether there may be more."""
        try:
            message = process.channel.receive()
        except BlockingIOError:
            return False
        if message is None:
            self._bury(process)
            return False
        self._HEARD[message.kind](self, process, message.number)
        return True

    def _is_ready(self, process: _Process, _: int) -> None:
        process.is_ready = True

    def _is_done(self, process: _Process, _: int) -> None:
        process.is_done = True

    def _is_established(self, _: _Process, number: int) -> None:
        self._connections.established(number)

    def _has_left(self, process: _Process, number: int) -> None:
        process.clients.discard(number)
        self._connections.leave(number)

    _HEARD: ClassVar[dict[Kind, Callable[[Pool, _Process, int], None]]] = {
        Kind.READY: _is_ready,
        Kind.ESTABLISHED: _is_established,
        Kind.LEFT: _has_left,
        Kind.DONE: _is_done,
        Kind.FINISH: lambda pool, *_: pool.finish(),
        Kind.SHUTDOWN: lambda pool, *_: pool.shutdown(),
    }

    def _bury(self, process: _Process) -> None:
        """Say how a worker has ended, and have another one take its place."""
        status = self._reap(process)
        self._all_well &= status == 0 or not self._is_ending
        if status < 0 or not (self._is_starting or self._is_ending):  # else it has said itself what there is to say
            how, clients = described_exit(status), described_clients(len(process.clients))
            self._log.error("%s %s: %s disconnected", process, how, clients)
        if self._replaces:
            now = time.monotonic()
            self._due[process.number] = now + (_SHORT_LIFE if now - process.begun < _SHORT_LIFE else 0.0)

    def _reap(self, process: _Process) -> int:
        """See that a worker has ended and leaves nothing behind; return its exit status, or minus a signal's number."""
        self._unwatch(process.channel.fileno())
        process.channel.close()
        status = exit_status(process.pid)
        process.is_buried = True
        del self._processes[process.number]
        for count in self._counts:
            _release(count, process.number)
        for number in process.clients:
            self._connections.leave(number)
        return status

    @property
    def _replaces(self) -> bool:
        """Whether others take the place of workers that end."""
        return not (self._is_starting or self._is_ending or self._finishing or self._stopping)

    def _next_deadline(self) -> float:
        due = min(self._due.values(), default=float("inf")) if self._replaces else float("inf")
        return min(due, super()._next_deadline())

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        for number in [number for number, due in self._due.items() if self._replaces and due <= now]:
            del self._due[number]
            try:
                self._begin(number)
            except OSError as error:
                self._complain("cannot begin worker %d: %s", number, error.strerror)
                self._due[number] = now + _SHORT_LIFE

    def reloaded(self, stack: Stack) -> None:
        try:
            fd = pack_reload(stack)
        except OSError as error:
            report("reload of the workers", error)
            return
        for process in self._processes.values():
            self._tell(process, Kind.RELOAD, fd=fd)
        os.close(fd)

    # --- the end ---

    def close(self) -> None:
        super().close()
        if self._processes:
            self._end()

    def _end(self) -> bool:
        self._is_ending = True
        self._tell_all(Kind.STOP)
        self._wait_until(lambda: self._aborting or not self._busy(), self.options.drain + GRACE + _MARGIN)
        if not self._aborting:
            self._kill(self._busy())
        self._wait_until(lambda: self._aborting or not self._processes)  # what is left to a unit takes its time
        self._tell_all(Kind.ABORT)
        self._wait_until(lambda: not self._processes, GRACE + _MARGIN)
        self._kill(list(self._processes.values()))
        return self._all_well

    def _busy(self) -> list[_Process]:
        return [process for process in self._processes.values() if not process.is_done]

    def _tell_all(self, kind: Kind) -> None:
        for process in self._processes.values():
            self._tell(process, kind)

    def _tell(self, process: _Process, kind: Kind, number: int = 0, *, fd: int | None = None) -> None:
        try:
            process.channel.send(kind, number, fd)
        except BlockingIOError:  # though clients leave room for this
            self._log.error("%s takes no messages", process)
        except OSError:
            pass  # it has ended, which will be noticed

    def _kill(self, processes: list[_Process]) -> None:
        for process in processes:
            self._log.error("%s does not end, and is killed", process)
            self._reap(process)
            self._all_well = False


def _release(count: ProcessCount, number: int) -> None:
    try:
        count.release(number)
    except BaseException as error:  # of a unit that was told that there is none any more
        report("on_zero", error)

"""One client on standard input and output: sockets, pipes, and that nobody else speaks on them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from nbdkitpy import Client, ConfigError, Family, Filter
from nbdkitpy.backend import Buffer
from nbdkitpy.server import single as module
from nbdkitpy.server.notify import Notifier
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.single import PipeTransport, Single
from tests.environment import NBDKITPY
from tests.nbdclient import PATIENCE, NbdClient, Style
from tests.serving import CONTENT, SIZE, Disk, Disks, make_stack

ROOT = Path(__file__).parent.parent.parent


class PipeEnds:
    """The client's ends of two pipes, as much of a socket as the client needs."""

    def __init__(self, receiving: int, sending: int) -> None:
        self._receiving = receiving
        self._sending = sending

    def settimeout(self, seconds: float) -> None:
        """Do nothing: the tests have a timeout of their own."""

    def recv(self, count: int) -> bytes:
        return os.read(self._receiving, count)

    def recv_into(self, buffer: memoryview) -> int:
        return os.readv(self._receiving, [buffer])

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._sending, view) :]

    def close(self) -> None:
        for fd in (self._receiving, self._sending):
            with contextlib.suppress(OSError):
                os.close(fd)


def pipe_client(receiving: int, sending: int) -> NbdClient:
    return NbdClient(cast("socket.socket", PipeEnds(receiving, sending)))


# --- the transport ---


class Pipes(NamedTuple):
    """A transport, and the other ends of its pipes."""

    transport: PipeTransport
    write: int  #: what it receives
    read: int  #: what it has sent


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    receiving, write = os.pipe()
    read, sending = os.pipe()
    transport = PipeTransport(receiving, sending)
    yield Pipes(transport, write, read)
    transport.close()
    for fd in (write, read):
        with contextlib.suppress(OSError):
            os.close(fd)


def in_a_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Call `function` in a thread; its result, or what it raised, will be in the list."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except OSError as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def received(transport: PipeTransport, count: int = 100) -> bytes:
    buffer = bytearray(count)
    return bytes(buffer[: transport.receive_into(memoryview(buffer))])


def read_all(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += os.read(fd, count - len(data))
    return data


def test_receives_what_has_arrived_and_then_the_end(pipes: Pipes) -> None:
    os.write(pipes.write, b"some")
    assert received(pipes.transport, 3) == b"som"
    assert received(pipes.transport) == b"e"

    os.close(pipes.write)

    assert received(pipes.transport) == b""


def test_receiving_runs_out_of_patience_only_if_told_so(pipes: Pipes) -> None:
    pipes.transport.set_patience(0.01)
    with pytest.raises(BlockingIOError):
        received(pipes.transport)

    pipes.transport.set_patience(0)
    thread, results = in_a_thread(lambda: received(pipes.transport))
    os.write(pipes.write, b"late")
    thread.join(PATIENCE)

    assert results == [b"late"]


def test_receiving_goes_on_if_another_process_has_taken_the_data(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    readv = os.readv
    stolen = [True]

    def read(fd: int, buffers: Sequence[memoryview]) -> int:
        if stolen and stolen.pop():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return readv(fd, buffers)

    monkeypatch.setattr(os, "readv", read)
    os.write(pipes.write, b"data")

    assert received(pipes.transport) == b"data"


def test_stop_lets_through_what_has_arrived(pipes: Pipes) -> None:
    os.write(pipes.write, b"arrived")

    pipes.transport.stop_receiving()

    assert received(pipes.transport) == b"arrived"
    assert received(pipes.transport) == b""


def test_stopped_transport_still_sends(pipes: Pipes) -> None:
    pipes.transport.stop_receiving()

    pipes.transport.send([b"reply"])

    assert os.read(pipes.read, 100) == b"reply"


@pytest.mark.parametrize("end", [PipeTransport.stop_receiving, PipeTransport.abort])
def test_who_waits_to_receive_is_woken_up(pipes: Pipes, end: Callable[[PipeTransport], None]) -> None:
    thread, results = in_a_thread(lambda: received(pipes.transport))

    end(pipes.transport)
    thread.join(PATIENCE)

    assert results == [b""]


PIPE_ENDS: list[Callable[[Pipes], None]] = [
    lambda pipes: pipes.transport.stop_receiving(),
    lambda pipes: pipes.transport.abort(),
    lambda pipes: os.close(pipes.write),
    lambda pipes: os.close(pipes.read),
]


@pytest.mark.parametrize("end", PIPE_ENDS)
def test_who_sleeps_is_woken_up_when_the_connection_ends(pipes: Pipes, end: Callable[[Pipes], None]) -> None:
    os.write(pipes.write, b"never read")
    thread, results = in_a_thread(lambda: pipes.transport.sleep(3600))

    end(pipes)
    thread.join(PATIENCE)

    (error,) = results
    assert isinstance(error, OSError)
    assert error.errno == errno.ESHUTDOWN


def test_who_says_no_more_is_gone_only_when_he_does_not_listen_either(pipes: Pipes) -> None:
    os.close(pipes.write)
    assert not pipes.transport.is_gone()

    os.close(pipes.read)

    assert pipes.transport.is_gone()


def test_client_who_has_been_left_is_gone(pipes: Pipes) -> None:
    pipes.transport.abort()

    assert pipes.transport.is_gone()


def test_sleep_ends_by_itself(pipes: Pipes) -> None:
    begin = time.monotonic()

    pipes.transport.sleep(0.001)

    assert time.monotonic() - begin >= 0.001


def test_aborted_transport_receives_nothing(pipes: Pipes) -> None:
    os.write(pipes.write, b"arrived")

    pipes.transport.abort()

    assert received(pipes.transport) == b""


def test_who_waits_to_send_is_woken_up_by_abort(pipes: Pipes) -> None:
    thread, results = in_a_thread(lambda: pipes.transport.send([bytes(1 << 20)]))
    os.read(pipes.read, 1)  # it has begun, and has no room for all

    pipes.transport.abort()
    thread.join(PATIENCE)

    (error,) = results
    assert isinstance(error, BrokenPipeError)


def test_sends_all_pieces_whatever_their_number_and_kind(pipes: Pipes) -> None:
    words = memoryview(bytearray(range(8))).cast("I")
    pieces: list[Buffer] = [b"", words, bytearray(b"x"), *(b"%4d" % number for number in range(3000)), bytes(200_000)]
    expected = bytes(range(8)) + b"x" + b"".join(b"%4d" % number for number in range(3000)) + bytes(200_000)

    thread, results = in_a_thread(lambda: pipes.transport.send(pieces, more=True))

    assert read_all(pipes.read, len(expected)) == expected
    thread.join(PATIENCE)
    assert results == [None]


def test_client_that_reads_no_more_is_an_error(pipes: Pipes) -> None:
    os.close(pipes.read)

    with pytest.raises(BrokenPipeError):
        pipes.transport.send([b"reply"])


@pytest.mark.parametrize(("count", "sent"), [(300_000, 300_000), (500_000, 399_990), (0, 0)])
def test_file_is_sent_as_far_as_it_goes(pipes: Pipes, tmp_path: Path, count: int, sent: int) -> None:
    content = os.urandom(400_000)
    (tmp_path / "file").write_bytes(content)

    with (tmp_path / "file").open("rb") as file:
        thread, results = in_a_thread(lambda: pipes.transport.send_file(b"head", file.fileno(), 10, count))
        assert read_all(pipes.read, 4 + sent) == b"head" + content[10 : 10 + sent]
        thread.join(PATIENCE)

    assert results == [sent]


def test_pipe_is_full_when_the_client_takes_nothing(pipes: Pipes) -> None:
    assert not pipes.transport.is_full()
    thread, results = in_a_thread(lambda: pipes.transport.send([bytes(1 << 20)]))
    read_all(pipes.read, 1 << 19)  # so that it has begun
    while not pipes.transport.is_full():
        thread.join(0.001)

    assert read_all(pipes.read, 1 << 19) == bytes(1 << 19)
    thread.join(PATIENCE)

    assert results == [None]
    assert not pipes.transport.is_full()


def test_file_that_cannot_be_read_sends_nothing_of_it(pipes: Pipes, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert pipes.transport.send_file(b"head", file.fileno(), 0, 10) == 0


def test_file_for_a_client_that_is_gone_is_an_error(pipes: Pipes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    os.close(pipes.read)

    with (tmp_path / "file").open("rb") as file, pytest.raises(BrokenPipeError):
        pipes.transport.send_file(b"head", file.fileno(), 0, 4)


def test_close_leaves_the_descriptor_as_it_was_for_others() -> None:
    receiving, write = os.pipe()
    read, sending = os.pipe()
    others = os.dup(sending)
    transport = PipeTransport(receiving, sending)
    assert not os.get_blocking(others)

    transport.close()
    transport.close()
    transport.abort()

    assert os.get_blocking(others)
    os.close(others)
    assert os.read(read, 1) == b""
    with pytest.raises(BrokenPipeError):
        os.write(write, b"x")
    for fd in (read, write):
        os.close(fd)


# --- the server, in this process ---


class Standard(NamedTuple):
    """Descriptors that stand for the standard streams."""

    stdin: int
    stdout: int
    stderr: int


@pytest.fixture
def standard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int, int], Standard]]:
    """Make copies of descriptors stand for the standard streams; the originals are closed."""
    made: list[int] = []

    def become(*originals: int) -> Standard:
        streams = Standard(*(os.dup(fd) for fd in originals))
        for fd in set(originals):
            os.close(fd)
        made.extend(streams)
        for name, fd in zip(("_STDIN", "_STDOUT", "_STDERR"), streams):
            monkeypatch.setattr(module, name, fd)
        return streams

    yield become
    for fd in made:
        os.close(fd)


def null() -> int:
    return os.open(os.devnull, os.O_RDWR)


class Serving:
    """A server in a thread of its own."""

    def __init__(self, single: Single, plugin: Disks | None = None, *filters: Filter) -> None:
        self.single = single
        self.plugin = plugin or Disks()
        self.stack = make_stack(self.plugin, filters, single)
        self.thread, self.results = in_a_thread(lambda: single.serve(self.stack))

    def result(self) -> object:
        """Wait for the server to end, and return whether the session has."""
        self.thread.join(PATIENCE)
        self.single.close()
        return self.results[0]


@pytest.fixture
def on_a_socket(standard: Callable[[int, int, int], Standard]) -> Iterator[tuple[NbdClient, Callable[..., Single]]]:
    """A client, and what makes the server with options on the other end of its socket."""
    ours, theirs = socket.socketpair()
    client = NbdClient(theirs)

    def make(**options: float) -> Single:
        fd = ours.detach()
        standard(fd, fd, null())
        return Single(ServerOptions(**options))  # type: ignore[arg-type]

    with client:
        yield client, make
    ours.close()


def test_client_on_a_socket_is_served_until_it_leaves(
    on_a_socket: tuple[NbdClient, Callable[..., Single]],
) -> None:
    client, make = on_a_socket
    serving = Serving(make())

    client.negotiate(Style.STRUCTURED)
    assert client.read(1000, 5000) == CONTENT[1000:6000]
    client.disconnect()

    assert serving.result() is True
    assert (serving.plugin.opened, serving.plugin.closed) == (1, 1)


def test_client_on_pipes_is_served_until_it_leaves(standard: Callable[[int, int, int], Standard]) -> None:
    stdin, write = os.pipe()
    read, stdout = os.pipe()
    standard(stdin, stdout, null())
    clients: list[Client] = []

    class Noting(Filter):
        name = "noting"

        def preconnect(self, client: Client, readonly: bool) -> None:
            clients.append(client)

    serving = Serving(Single(ServerOptions()), None, Noting())
    client = pipe_client(read, write)
    client.negotiate(Style.STRUCTURED)
    assert client.size == SIZE
    assert client.read(0, 500_000) == CONTENT[:500_000]
    client.send(2)  # DISC

    assert serving.result() is True
    assert [known.family for known in clients] == [Family.UNKNOWN]
    client.socket.close()


def test_client_that_says_nothing_and_leaves_is_no_error(standard: Callable[[int, int, int], Standard]) -> None:
    read, stdout = os.pipe()
    standard(null(), stdout, null())

    serving = Serving(Single(ServerOptions()))

    assert read_all(read, 18).startswith(b"NBDMAGIC")
    assert serving.result() is True
    os.close(read)


def test_there_is_nowhere_to_connect_to(on_a_socket: tuple[NbdClient, Callable[..., Single]]) -> None:
    client, make = on_a_socket
    single = make()

    single.bind()

    assert (single.uri, list(single.listening), single.port, single.unix_path) == ("", [], None, None)
    single.close()
    single.close()
    assert client.at_end()


def test_client_on_pipes_who_is_not_served_is_left(standard: Callable[[int, int, int], Standard]) -> None:
    read, stdout = os.pipe()
    streams = standard(null(), stdout, null())
    single = Single(ServerOptions())

    single.close()

    assert os.read(read, 1) == b""
    assert os.readlink(f"/proc/self/fd/{streams.stdout}") == "/dev/null"
    os.close(read)


def test_S1_shutdown_ends_an_idle_client(on_a_socket: tuple[NbdClient, Callable[..., Single]]) -> None:
    client, make = on_a_socket
    serving = Serving(make())
    client.negotiate()

    serving.single.shutdown()

    assert client.at_end()
    assert serving.result() is True


def test_client_that_does_not_finish_the_handshake_is_left(
    on_a_socket: tuple[NbdClient, Callable[..., Single]], caplog: pytest.LogCaptureFixture
) -> None:
    client, make = on_a_socket

    serving = Serving(make(handshake_timeout=0.05))

    client.greet()
    assert client.at_end()
    assert serving.result() is True
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "disks[1]: handshake not finished in time, closed"
    ]


def test_client_that_has_finished_the_handshake_has_time(
    on_a_socket: tuple[NbdClient, Callable[..., Single]],
) -> None:
    client, make = on_a_socket
    serving = Serving(make(handshake_timeout=PATIENCE))
    client.negotiate()

    client.read(0, 1)  # which is carried out after it has been noted that the handshake is over

    assert serving.single._established
    client.disconnect()
    assert serving.result() is True


class Held(Disk):
    """Does not return from a read until it is let go."""

    def __init__(self, plugin: Disks) -> None:
        super().__init__(plugin)
        self.entered = threading.Event()
        self.go = threading.Event()

    def pread(self, count: int, offset: int) -> bytes:
        self.entered.set()
        assert self.go.wait(PATIENCE)
        return super().pread(count, offset)


def test_client_who_waits_for_a_backend_in_the_handshake_is_not_late(
    on_a_socket: tuple[NbdClient, Callable[..., Single]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, make = on_a_socket
    late = threading.Event()
    wait = Single._wait_until

    def wait_until(single: Single, condition: Callable[[], bool], seconds: float = float("inf")) -> bool:
        holds = wait(single, condition, seconds)
        if not holds:
            late.set()
        return holds

    def open_late(plugin: Disks) -> Disk:
        assert late.wait(PATIENCE)
        return Disk(plugin)

    monkeypatch.setattr(Single, "_wait_until", wait_until)
    serving = Serving(make(handshake_timeout=0.5), Disks(open_late))

    client.negotiate()
    assert client.read(0, 10) == CONTENT[:10]
    client.disconnect()
    assert serving.result() is True


def test_S1_client_that_does_not_take_its_replies_is_left_after_the_drain_time(
    on_a_socket: tuple[NbdClient, Callable[..., Single]],
) -> None:
    client, make = on_a_socket
    serving = Serving(make(drain=0.05))
    client.negotiate()
    with client.batched():
        for _ in range(8):
            client.send(0, 0, SIZE)
    client.receive_bytes(16)

    serving.single.shutdown()

    assert serving.result() is True


def test_abort_does_not_wait_for_the_drain_time(on_a_socket: tuple[NbdClient, Callable[..., Single]]) -> None:
    client, make = on_a_socket
    serving = Serving(make(drain=10 * PATIENCE))
    client.negotiate()
    with client.batched():
        for _ in range(8):
            client.send(0, 0, SIZE)
    client.receive_bytes(16)

    serving.single.shutdown()
    serving.single.abort()

    assert serving.result() is True


def test_session_that_a_backend_holds_up_is_abandoned(
    on_a_socket: tuple[NbdClient, Callable[..., Single]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, make = on_a_socket
    monkeypatch.setattr(module, "_GRACE", 0.05)
    handles: list[Held] = []

    def hold(plugin: Disks) -> Held:
        handles.append(Held(plugin))
        return handles[-1]

    serving = Serving(make(drain=0.05), Disks(hold))
    client.negotiate()
    client.send(0, 0, 512)
    assert handles[0].entered.wait(PATIENCE)

    serving.single.shutdown()

    assert serving.result() is False
    assert "still held up in the backend, abandoned: disks[1]" in caplog.text
    handles[0].go.set()
    for thread in threading.enumerate():
        if thread.name.startswith("disks"):
            thread.join(PATIENCE)


def test_what_is_called_soon_is_called_by_the_serving_thread(
    on_a_socket: tuple[NbdClient, Callable[..., Single]],
) -> None:
    client, make = on_a_socket
    serving = Serving(make())
    called: list[threading.Thread] = []
    done = threading.Event()

    serving.single.call_soon(lambda: called.append(threading.current_thread()))
    serving.single.call_soon(done.set)

    assert done.wait(PATIENCE)
    assert called == [serving.thread]
    client.socket.close()
    assert serving.result() is True


def test_service_manager_is_told_that_it_is_alive_and_when_it_ends(
    on_a_socket: tuple[NbdClient, Callable[..., Single]],
) -> None:
    client, make = on_a_socket
    messages: list[str] = []
    alive = threading.Event()

    class FakeNotifier(Notifier):
        def _send(self, message: str) -> None:
            messages.append(message)
            if len(messages) == 3:
                alive.set()

    single = make()
    single.notifier = FakeNotifier({})
    single.notifier.watchdog_interval = 0.01
    serving = Serving(single)

    assert alive.wait(PATIENCE)
    client.socket.close()
    assert serving.result() is True
    assert messages[:3] == ["WATCHDOG=1"] * 3
    assert messages.count("STOPPING=1") == 1


# --- what may be on standard input ---


@pytest.mark.parametrize("kind", ["datagram", "listening"])
def test_socket_on_which_no_client_can_be_served_is_an_error(
    standard: Callable[[int, int, int], Standard], kind: str
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM) as sock:
        if kind == "listening":
            sock.bind("")
            sock.listen()
        standard(os.dup(sock.fileno()), os.dup(sock.fileno()), null())

        with pytest.raises(ConfigError, match="-s: standard input must be a connection with a client; it is "):
            Single(ServerOptions())


def test_standard_streams_are_not_the_clients_any_more(
    standard: Callable[[int, int, int], Standard], tmp_path: Path
) -> None:
    stdin, write = os.pipe()
    read, stdout = os.pipe()
    streams = standard(stdin, stdout, os.open(tmp_path / "stderr", os.O_RDWR | os.O_CREAT))
    single = Single(ServerOptions())

    assert os.read(streams.stdin, 1) == b""
    os.write(streams.stdout, b"printed ")
    os.write(streams.stderr, b"logged")
    single.close()

    assert os.read(read, 1) == b""
    assert (tmp_path / "stderr").read_bytes() == b"printed logged"
    for fd in (read, write):
        os.close(fd)


@pytest.mark.parametrize("which", [0, 1])
def test_standard_error_that_is_the_clients_is_silenced(
    standard: Callable[[int, int, int], Standard], which: int
) -> None:
    stdin, write = os.pipe()
    read, stdout = os.pipe()
    streams = standard(stdin, stdout, (write, stdout)[which])
    single = Single(ServerOptions())

    os.write(streams.stderr, b"logged")
    os.write(streams.stdout, b"printed")
    single.close()

    assert os.read(read, 1) == b""
    os.close(read)


# --- a process of its own ---


def nbdkitpy(*words: str) -> list[str]:
    """The command that serves on its standard streams."""
    return [*NBDKITPY, "-s", *words]


NOISY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from nbdkitpy.server.options import ServerOptions
from nbdkitpy.server.single import Single

server = Single(ServerOptions())  # before any plugin

import os, signal, threading
from nbdkitpy import log
from nbdkitpy.server.launch import launch
from nbdkitpy.stack import Stack
from tests.serving import Disk, Disks

class Noisy(Disk):
    def pread(self, count, offset):
        print("noise")
        os.write(1, b"more noise")
        os.system("echo and more")
        return super().pread(count, offset)

    def flush(self):
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    def can_flush(self):
        return True

    def pwrite(self, data, offset, flags):
        pass

with log.setup():
    stack = Stack(Disks(Noisy), [], server)
    stack.load()
    raise SystemExit(launch(server, stack, print_uri=True, announce=True))
"""


@contextlib.contextmanager
def started(words: list[str], stderr: int = subprocess.DEVNULL) -> Iterator[tuple[subprocess.Popen[bytes], NbdClient]]:
    """Start a server with a socket as its standard input and output."""
    ours, theirs = socket.socketpair()
    with ours, NbdClient(theirs) as client:
        process = subprocess.Popen(words, stdin=ours.fileno(), stdout=ours.fileno(), stderr=stderr)
        ours.close()
        with process:
            yield process, client
            client.socket.close()
            process.wait(PATIENCE)


@pytest.mark.parametrize("stderr", [subprocess.DEVNULL, subprocess.STDOUT])
def test_G8_what_a_plugin_prints_does_not_reach_the_client(stderr: int) -> None:
    with started([sys.executable, "-c", NOISY], stderr) as (process, client):
        client.negotiate()
        assert client.read(0, 100) == CONTENT[:100]
        client.disconnect()

        assert process.wait(PATIENCE) == 0


def test_signal_that_the_sessions_thread_gets_ends_the_server() -> None:
    with started([sys.executable, "-c", NOISY]) as (process, client):
        client.negotiate()
        assert not client.call(3).error  # FLUSH
        assert client.at_end()

        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signal_ends_it_in_order(number: signal.Signals) -> None:
    with started(nbdkitpy("memory", "1M")) as (process, client):
        client.negotiate()

        process.send_signal(number)

        assert client.at_end()
        assert process.wait(PATIENCE) == 0


def test_end_of_standard_input_ends_it_in_order() -> None:
    done = subprocess.run(nbdkitpy("memory", "1M"), stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)

    assert (done.returncode, done.stdout[:16], done.stderr) == (0, b"NBDMAGICIHAVEOPT", b"")


def test_process_serves_on_pipes() -> None:
    with subprocess.Popen(nbdkitpy("memory", "1M"), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        client = pipe_client(process.stdout.fileno(), process.stdin.fileno())
        client.negotiate(Style.EXTENDED)
        client.write(1000, b"data")
        assert client.read(998, 8) == b"\0\0data\0\0"
        client.send(2)  # DISC

        assert process.wait(PATIENCE) == 0


def test_failure_of_the_start_says_nothing_to_the_client() -> None:
    done = subprocess.run(
        nbdkitpy("memory", "no size"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1

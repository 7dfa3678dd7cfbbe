"""A server within the tests' own process: what it takes, what it gives, and that nothing is left of it."""

from __future__ import annotations

import errno
import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbdkitpy
from nbdkitpy import ConfigError, EmbeddedServer, Plugin, UnitError, serve
from nbdkitpy.library import Parameters
from nbdkitpy.server import service
from nbdkitpy.server.options import ServerOptions
from tests.certificates import Authority, make_directory
from tests.environment import without_coverage
from tests.library.units import Disk, Sticker, descriptors, holding_up
from tests.nbdclient import PATIENCE, NbdClient, Refused

#: Fields of ServerOptions that a server within a program does not have, and why.
NOT_OFFERED = {
    "endpoints": "unix, tcp and listen say that",
    "workers": "a process that has threads should not be forked",
    "pidfile": "the process is not ours",
    "oldstyle": "only nbd-client of twenty years ago needs it",
    "handshake_flags": "for tests of clients",
    "structured_replies": "likewise",
    "meta_contexts": "likewise",
}

LIFE = ["load", "config_complete", "get_ready", "after_fork"]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = threading.enumerate(), descriptors()
    yield
    assert threading.enumerate() == before[0]
    assert descriptors() <= before[1]


def dialled(server: EmbeddedServer) -> NbdClient:
    """A client by the server's Unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    assert server.unix_path is not None
    sock.connect(server.unix_path)
    return NbdClient(sock)


def client_of(server: EmbeddedServer) -> NbdClient:
    """A client without a listener, with the handshake behind it."""
    return NbdClient(server.connect()).negotiate()


def size_of(server: EmbeddedServer) -> int:
    with client_of(server) as client:
        return client.size


# --- where it listens ---


def test_it_listens_on_a_temporary_unix_socket_which_is_gone_at_the_end() -> None:
    with serve(Disk) as server, dialled(server).negotiate() as client:
        client.write(512, b"x" * 512)
        assert client.read(0, 1024) == bytes(512) + b"x" * 512
        assert server.port is None
        assert server.uri == f"nbd+unix://?socket={server.unix_path}"

    assert not os.path.exists(os.path.dirname(server.unix_path or ""))


def test_it_listens_on_a_unix_socket_of_ones_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    with serve(Disk, unix=Path("socket"), export_name="a b") as server, dialled(server) as client:
        client.negotiate()
        assert server.unix_path == str(tmp_path / "socket")
        assert server.uri == f"nbd+unix:///a%20b?socket={tmp_path}/socket"

    assert not (tmp_path / "socket").exists()


def test_it_listens_on_tcp() -> None:
    with serve(Disk, tcp=("127.0.0.1", 0)) as server:
        assert server.unix_path is None
        assert server.uri == f"nbd://127.0.0.1:{server.port}"
        with NbdClient(socket.create_connection(("127.0.0.1", server.port or 0))) as client:
            client.negotiate()


def test_it_listens_on_both() -> None:
    with serve(Disk, unix="/tmp/nbdkitpy-test-both", tcp=("127.0.0.1", 0)) as server:
        with dialled(server) as client:
            client.negotiate()

        assert server.uri == "nbd+unix://?socket=/tmp/nbdkitpy-test-both"


def test_it_need_not_listen_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "bind", None)

    with serve(Disk, listen=False) as server, client_of(server) as client:
        assert (server.uri, server.unix_path, server.port) == ("", None, None)
        assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize(
    ("places", "text"),
    [
        ({"listen": False, "unix": "/tmp/x"}, "listen=False excludes unix and tcp, which say where to listen"),
        ({"listen": False, "tcp": ("::1", 0)}, "listen=False excludes unix and tcp, which say where to listen"),
        ({"unix": ""}, "unix must be a path, not ''"),
        (
            {"unix": "/no/such/directory/socket"},
            "cannot listen on /no/such/directory/socket: No such file or directory",
        ),
        ({"tcp": ("", 0)}, 'tcp: the address must be a name or an address, or "any" for every interface, not ""'),
        ({"tcp": ("127.0.0.1", 65536)}, 'port must be a number from 0 to 65535, or the name of a service, not "65536"'),
    ],
)
def test_a_place_where_it_cannot_listen_is_refused(places: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught, serve(Disk, **places):
        pass

    assert str(caught.value) == text


def test_the_umask_of_the_process_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", None)

    with serve(Disk, unix=tmp_path / "socket"):
        mode = (tmp_path / "socket").stat().st_mode

    assert mode & 0o022 == 0  # nobody but the owner may write, which is to connect


def test_clients_use_tls(tmp_path: Path) -> None:
    directory = make_directory(Authority(tmp_path / "ca"), tmp_path / "tls")

    with serve(Disk, tls="require", tls_certificates=directory) as server, dialled(server) as client:
        assert server.uri.startswith("nbds+unix://?socket=")
        client.greet()
        with pytest.raises(Refused):
            client.go()


def test_certificates_that_the_program_did_not_name_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdkitpy.server.starttls._default_directory", None)

    with serve(Disk) as server:
        assert size_of(server) == 1 << 16


def test_tls_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca-cert\.pem"), serve(Disk, tls_certificates=tmp_path):
        pass


# --- what it serves ---


def test_a_plugin_is_a_class_or_an_instance_or_a_name() -> None:
    disk = Disk()
    disk.config("size", "1M")

    sizes = []
    for plugin, parameters in (("memory", {"size": "3M"}), (Disk, {"size": "2M"}), (disk, {})):
        with serve(plugin, parameters) as server:
            sizes.append(size_of(server))

    assert sizes == [3 << 20, 2 << 20, 1 << 20]


def test_a_plugin_is_given_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "library_test_zeroes.py"
    file.write_text("from nbdkitpy_plugins.null import Null\n\n\nclass Zeroes(Null):\n    pass\n")

    with serve(str(file), {"size": "1M"}) as server, client_of(server) as client:
        assert client.read(0, 3) == bytes(3)

    del sys.modules["library_test_zeroes"]


def test_values_are_texts_as_on_the_command_line_or_what_stands_for_them(tmp_path: Path) -> None:
    disk = Disk()
    parameters: Parameters = {"size": 1 << 20, "depth": "0x10", "label": True, "path": tmp_path, "tag": ["a", 1.5, "b"]}

    with serve(disk, parameters):
        pass

    assert (disk.size, disk.depth, disk.label) == (1 << 20, 16, "true")
    assert (disk.path, disk.tag) == (str(tmp_path), ("a", "1.5", "b"))


def test_parameters_go_to_the_outermost_layer_that_takes_them() -> None:
    disk, outer, inner = Disk(), Sticker(), Sticker()

    with serve(disk, {"note": "n", "label": "l", "depth": 2}, filters=[outer, inner]):
        pass

    assert (outer.note, outer.label, inner.note, inner.label, disk.label, disk.depth) == ("n", "l", "", "", "", 2)


def test_a_filter_is_a_class_or_an_instance_or_a_name_maybe_with_parameters_for_it_alone() -> None:
    sticker = Sticker()

    with serve(Disk, filters=["readonly", (sticker, {"note": "mine"}), Sticker, ("offset", {"range": 512})]) as server:
        assert size_of(server) == 512

    assert sticker.note == "mine"


@pytest.mark.parametrize(
    ("plugin", "parameters", "filters", "text"),
    [
        (
            Disk,
            {"siez": 1},
            [],
            'unknown parameter "siez" (asked: disk): did you mean "size"?',
        ),
        (Disk, {"size": "big"}, [], 'disk: size must be a size such as 512, 10M or 1G, not "big"'),
        (Disk, {"size": -1}, [], 'disk: size must be a size such as 512, 10M or 1G, not "-1"'),
        (Disk, {"depth": 65}, [], 'disk: depth must be an integer from 1 to 64, not "65"'),
        (Disk, {"depth": 1.0}, [], 'disk: depth must be an integer from 1 to 64, not "1.0"'),
        (Disk, {"depth": [1, 2]}, [], "disk: depth must be one value, not an array: it cannot be given several times"),
        (Disk, {"size": 1 << 64}, [], "size must be a number of at most 64 bits"),
        (
            Disk,
            {"label": None},
            [],
            "label must be text, a number, a truth value or a path, not of the type NoneType",
        ),
        (
            Disk,
            {"secret": b"open sesame"},
            [],
            "secret must be text, a number, a truth value or a path, not of the type bytes",
        ),
        (Disk, {}, [(Sticker, {"size": 1})], 'filters[0]: sticker has no parameter "size": there are note, label'),
        (Disk, {}, ["readonly", (Sticker, {"note": [1, 2]})], "filters[1]: note must be one value, not an array: "),
        ("memory", {}, [], "memory: size=SIZE is missing: "),
    ],
)
def test_wrong_parameters_are_refused_in_the_words_of_the_command_line(
    plugin: str | type[Plugin], parameters: Any, filters: Any, text: str
) -> None:
    with pytest.raises(ConfigError) as caught, serve(plugin, parameters, filters=filters):
        pass

    assert str(caught.value).startswith(text)


def test_unknown_units_are_refused() -> None:
    with pytest.raises(UnitError, match='there is no plugin "memroy": did you mean "memory"'), serve("memroy"):
        pass
    with pytest.raises(UnitError, match='there is no filter "memory"'), serve(Disk, filters=["memory"]):
        pass


@pytest.mark.parametrize(
    ("plugin", "filters", "text"),
    [
        (Sticker, [], "a plugin must be a name, a subclass of Plugin, or an instance of one, not <class"),
        (3, [], "a plugin must be a name, a subclass of Plugin, or an instance of one, not 3"),
        (Disk, [Disk], "a filter must be a name, a subclass of Filter, or an instance of one, not <class"),
    ],
)
def test_what_is_no_unit_is_refused(plugin: Any, filters: Any, text: str) -> None:
    with pytest.raises(TypeError) as caught, serve(plugin, filters=filters):
        pass

    assert str(caught.value).startswith(text)


# --- options ---


def test_every_option_of_a_server_can_be_given_or_there_is_a_reason_why_not() -> None:
    offered = set(inspect.signature(serve).parameters) - {"plugin", "parameters", "filters", "unix", "tcp", "listen"}

    assert offered == set(ServerOptions._fields) - NOT_OFFERED.keys()


def test_options_are_those_of_the_server_and_its_defaults() -> None:
    given: dict[str, Any] = {"drain": 0.5, "handshake_timeout": 0, "idle_timeout": 2.5, "max_handshakes": 7}
    given |= {"threads": 3, "keepalive": True, "readonly": True}
    given |= {"max_connections": 5, "max_connections_per_source": 4, "max_options": 6, "stall_timeout": 0.5}
    given |= {"max_buffered": 1 << 30, "max_buffered_per_connection": 0}

    with serve(Disk, **given) as some, serve(Disk) as none:
        options = [server._running[0].options for server in (some, none) if server._running is not None]

    assert {name: getattr(options[0], name) for name in given} == given
    assert options[1] == ServerOptions(endpoints=options[1].endpoints, tls=options[1].tls)


def test_read_only_it_refuses_writes() -> None:
    with serve(Disk, readonly=True) as server, client_of(server) as client:
        assert client.call(1, 0, data=b"x").error == errno.EPERM


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": -1}, "threads must be an integer from 0 to 65536, not -1"),
        ({"drain": -0.5}, "drain must be a time such as 2, 1.5s, 100ms, 20us or 5ns, not -0.5"),
        ({"max_handshakes": -1}, "max_handshakes must be an integer from 0 to 4294967295, not -1"),
        ({"max_buffered": "1.5G"}, "max_buffered must be a size such as 512, 10M or 1G, not '1.5G'"),
        ({"tls": "maybe"}, "tls must be off, on or require, not 'maybe'"),
    ],
)
def test_options_out_of_their_range_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ConfigError) as caught, serve(Disk, **options):
        pass

    assert str(caught.value) == text


# --- from start to end ---


def test_the_steps_of_a_life_are_done_in_order_and_in_one_thread_but_for_clients() -> None:
    disk = Disk()

    with serve(disk) as server, client_of(server):
        assert server.clients == 1

    assert disk.steps == [*LIFE, "open", "close", "cleanup", "unload"]
    assert {thread.name for thread in disk.threads} == {"nbdkitpy server", "disk[1]"}


def test_several_servers_run_at_the_same_time() -> None:
    with serve(Disk, {"size": 512}) as one, serve(Disk, {"size": 1024}) as other, serve("null") as third:
        assert [size_of(server) for server in (one, other, third)] == [512, 1024, 0]


def test_it_ends_when_the_block_raises() -> None:
    disk = Disk()
    clients: list[NbdClient] = []

    def serve_and_fail() -> None:
        with serve(disk) as server:
            clients.append(client_of(server))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        serve_and_fail()

    assert clients[0].at_end()
    clients[0].socket.close()
    assert disk.steps[-3:] == ["close", "cleanup", "unload"]


def test_it_serves_once() -> None:
    server = serve(Disk)
    with server:
        pass

    with pytest.raises(RuntimeError, match="has been started before"), server:
        pass


def test_it_can_be_told_to_end_and_waited_for() -> None:
    with serve(Disk) as server, client_of(server) as client:
        assert not server.wait(0)
        server.shutdown()
        assert server.wait(PATIENCE)
        assert client.at_end()
        assert server.clients == 0
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        server.shutdown()


def test_a_layer_can_end_it() -> None:
    with serve("null", filters=["exitlast"]) as server:
        with client_of(server):
            late = NbdClient(server.connect())
        late.socket.close()
        assert server.wait(PATIENCE)


def test_nobody_can_connect_before_it_has_started() -> None:
    with pytest.raises(ConnectionRefusedError):
        serve(Disk).connect()


def raising(error: BaseException) -> Any:
    def raises(*_: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ConfigError("no"), KeyError("a defect")], ids=repr)
@pytest.mark.parametrize(
    ("step", "undone"),
    [
        ("load", []),
        ("config_complete", ["unload"]),
        ("get_ready", ["unload"]),
        ("after_fork", ["cleanup", "unload"]),
    ],
)
def test_an_error_at_the_start_is_raised_and_what_was_begun_is_undone(
    step: str, undone: list[str], error: Exception
) -> None:
    disk = Disk()
    disk.does[step] = raising(error)

    with pytest.raises(type(error)) as caught, serve(disk):
        pytest.fail("it has started")

    assert caught.value is error
    assert disk.steps == [*LIFE[: LIFE.index(step) + 1], *undone]


def test_an_error_at_the_end_is_raised() -> None:
    disk = Disk()
    disk.does["cleanup"] = raising(OSError(errno.EIO, "cannot be cleaned up"))

    with pytest.raises(OSError, match="cannot be cleaned up"), serve(disk):
        pass

    assert disk.steps[-2:] == ["cleanup", "unload"]


def test_an_error_at_the_end_does_not_hide_that_of_the_block(caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    disk.does["unload"] = raising(OSError(errno.EIO, "cannot be unloaded"))

    with pytest.raises(ZeroDivisionError), serve(disk):
        _ = 1 / 0

    assert "the server has not ended in order: [Errno 5] cannot be unloaded" in caplog.text


def test_a_plugin_that_does_not_return_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "GRACE", 0.05)
    disk, inside, release = Disk(), threading.Event(), threading.Event()
    disk.does["open"] = holding_up(inside, release)
    server = serve(disk, drain=0.05)

    def serve_and_hang() -> None:
        with server:
            clients.append(NbdClient(server.connect()))
            clients[0].greet()
            clients[0].send_option(7, bytes(6))
            assert inside.wait(PATIENCE)

    clients: list[NbdClient] = []
    with pytest.raises(TimeoutError, match="has not returned, and is abandoned"):
        serve_and_hang()

    assert "cleanup" not in disk.steps
    release.set()
    for thread in disk.threads:
        thread.join(PATIENCE)
    clients[0].socket.close()


def test_without_a_thread_it_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", raising(RuntimeError("can't start new thread")))

    with pytest.raises(RuntimeError, match="can't start new thread"), serve(Disk):
        pass


def interrupting(going_on: threading.Event) -> Any:
    """Have Ctrl-C pressed, and wait until the main thread has got it."""

    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        going_on.wait(PATIENCE)

    return interrupt


@pytest.mark.parametrize("step", ["get_ready", "cleanup"])
def test_ctrl_c_ends_the_waiting_for_a_plugin(step: str) -> None:
    disk, going_on = Disk(), threading.Event()
    disk.does[step] = interrupting(going_on)
    server = serve(disk)

    with pytest.raises(KeyboardInterrupt), server:
        pass

    going_on.set()
    assert server.wait(PATIENCE)
    assert disk.steps == [*LIFE, "cleanup", "unload"]


def test_ctrl_c_breaks_the_connections_that_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "GRACE", 0.05)
    disk, inside, release = Disk(), threading.Event(), threading.Event()
    disk.does["pread"] = holding_up(inside, release)
    server = serve(disk, drain=2 * PATIENCE)

    def interrupt() -> None:
        assert inside.wait(PATIENCE)
        while not server._is_to_end:
            os.sched_yield()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def serve_and_wait() -> None:
        with server:
            clients.append(client_of(server))
            clients[0].send(0, 0, 512)
            assert inside.wait(PATIENCE)

    clients: list[NbdClient] = []
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        serve_and_wait()

    assert clients[0].at_end()
    assert server.wait(PATIENCE)
    release.set()
    clients[0].socket.close()
    for each in (thread, *disk.threads):
        each.join(PATIENCE)


# --- what is not its own ---


def test_signal_handlers_and_loggers_are_left_alone() -> None:
    logger = logging.getLogger("nbdkitpy")

    def state() -> list[object]:
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        return [handlers, signal.set_wakeup_fd(-1), list(logger.handlers), logger.level, logger.propagate]

    before = state()
    with serve(Disk) as server, client_of(server):
        during = state()

    assert before == during == state()


def test_messages_go_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with serve(Disk) as server, NbdClient(server.connect()) as client:
        client.send_bytes(b"\xff" * 20)
        assert client.receive_bytes(18)
        assert client.at_end()

    assert {record.name.partition(".")[0] for record in caplog.records} == {"nbdkitpy"}
    assert "client flags 0xffffffff are not among" in caplog.text


def test_it_runs_in_any_thread() -> None:
    sizes: list[int] = []

    def run() -> None:
        with serve(Disk) as server:
            sizes.append(size_of(server))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)

    assert sizes == [1 << 16]


QUIET = """
import socket, sys
import nbdkitpy

class Ones(nbdkitpy.Plugin):
    def open(self, export_name, readonly, client):
        return OnesHandle()

class OnesHandle(nbdkitpy.Handle):
    def get_size(self): return 512
    def pread(self, count, offset): return b"1" * count

before = set(sys.modules)
server = nbdkitpy.serve(Ones)
assert not [name for name in set(sys.modules) - before if name.startswith(("nbdkitpy.server", "nbdkitpy.config"))]
with server:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.unix_path)
        assert sock.recv(8) == b"NBDMAGIC"
"""


def test_it_prints_nothing_and_imports_nothing_before_it_begins() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", QUIET],
        capture_output=True,
        env=without_coverage(),
        timeout=60,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_package_imports_nothing_of_it_by_itself() -> None:
    code = "import nbdkitpy, sys; print(*[name for name in sys.modules if name.startswith('nbdkitpy.')])"

    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=without_coverage())

    assert not [name for name in done.stdout.split() if name.startswith(("nbdkitpy.library", "nbdkitpy.server"))]


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="module 'nbdkitpy' has no attribute 'sevre'"):
        _ = nbdkitpy.sevre  # type: ignore[attr-defined]  # that is what it is about


FORKING = """
import os, socket
import nbdkitpy

with nbdkitpy.serve("memory", {"size": 512}) as server:
    pid = os.fork()
    if not pid:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(server.unix_path)
            assert sock.recv(8) == b"NBDMAGIC"
        try:
            server.connect()
        except ConnectionRefusedError:
            raise SystemExit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(server.unix_path)
        assert sock.recv(8) == b"NBDMAGIC"
assert not os.path.exists(server.unix_path)
"""


def test_a_process_that_is_forked_meanwhile_leaves_it_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING], capture_output=True, env=without_coverage(), timeout=60
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")

"""Several processes that serve: clients are shared out, and what happens in one is right in the others."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy.protocol.constants import Command
from nbdkitpy.server import pool as module
from nbdkitpy.server.channel import Channel, Kind
from nbdkitpy.server.forking import described_exit
from tests.interop.harness import PATIENCE
from tests.nbdclient import NbdClient, Refused
from tests.pools import Pool, dial, ended, events, eventually, kill_worker_of, popen, prepared, run, worker_of
from tests.serving import Disks, make_stack, open_descriptors, unix_options


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return prepared(tmp_path)


@pytest.fixture
def begin(directory: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begin the program; at the end it has ended, and so have its workers when they find out."""
    with contextlib.ExitStack() as ends:

        def begin(*words: str, **options: object) -> subprocess.Popen[str]:
            process = ends.enter_context(popen(directory, *words, **options))  # type: ignore[arg-type]
            ends.callback(process.kill)  # first
            return process

        yield begin


@pytest.fixture
def start(directory: Path) -> Iterator[Callable[..., Pool]]:
    """Start servers; at the end no process is left of them."""
    pools: list[Pool] = []

    def begin(*words: str | Path, **options: object) -> Pool:
        pools.append(Pool(directory, *words, **options))  # type: ignore[arg-type]
        return pools[-1]

    yield begin
    for pool in pools:
        with ended(*pool.pids("after_fork")):
            pool.kill()


# --- sharing out ---


def test_clients_are_shared_out_evenly(start: Callable[..., Pool]) -> None:
    pool = start()

    clients = [pool.client() for _ in range(4)]

    assert sorted(Counter(map(worker_of, clients)).values()) == [2, 2]
    assert pool.pid not in map(worker_of, clients)


def test_each_process_calls_what_is_its_part(start: Callable[..., Pool]) -> None:
    pool = start()
    client = pool.client()
    worker = worker_of(client)
    client.disconnect()
    pool.end()

    first, second = pool.pids("after_fork")
    assert pool.events()[:4] == [
        ("get_ready", pool.pid),
        ("after_fork", first),
        ("after_fork", second),
        ("preconnect", pool.pid),
    ]
    assert pool.events()[4] == ("close", worker)
    assert sorted(pool.pids("cleanup")) == sorted([first, second])
    assert pool.events()[-1] == ("unload", pool.pid)
    assert len({pool.pid, first, second}) == 3


@pytest.mark.parametrize(
    ("bad", "said"), [("preconnect", "KeyError"), ("unspeakable", "refused: Unspeakable"), ("exits", "SystemExit: 0")]
)
def test_G1_a_unit_that_fails_to_judge_a_client_ends_that_client_alone(
    start: Callable[..., Pool], bad: str, said: str
) -> None:
    pool = start(parameters=[f"bad={bad}"])

    for _ in range(2):
        assert pool.dial().at_end()

    assert [said in line for line in pool.end()] == [True, True]


def test_G1_a_unit_that_fails_when_its_count_is_zero_ends_nothing(start: Callable[..., Pool]) -> None:
    pool = start(parameters=["bad=zero"])
    kill_worker_of(pool.client())

    eventually(lambda: bool(pool.pids("zero")))

    assert worker_of(pool.client())
    assert "nbdkitpy: error: on_zero: Unspeakable" in pool.end()


def test_G3_a_unit_that_does_not_judge_a_client_is_given_up_at_the_second_signal(start: Callable[..., Pool]) -> None:
    pool = start(parameters=["bad=hangs"])
    pool.dial()
    eventually(lambda: bool(pool.pids("preconnect")))

    def has_ended_after_another_signal() -> bool:
        os.kill(pool.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            pool._process.wait(0.1)
        return not pool.is_running

    eventually(has_ended_after_another_signal)

    assert pool._process.wait() == 1
    assert "nbdkitpy: error: given up, as a second signal came" in pool.log()


def test_a_refused_client_gets_nothing_and_the_reason_is_logged(start: Callable[..., Pool]) -> None:
    pool = start("--filter=ip", parameters=["deny=all"])

    assert pool.dial().at_end()

    (line,) = pool.end()
    assert line.startswith("nbdkitpy: error: pids[1]: connection 1 (unix ")
    assert "refused: client not permitted to connect" in line


def test_the_main_process_keeps_nothing_of_its_clients(start: Callable[..., Pool]) -> None:
    pool = start()
    worker_of(pool.client())
    kinds = ("fd", "task")
    before = [len(os.listdir(f"/proc/{pool.pid}/{kind}")) for kind in kinds]

    for _ in range(200):
        with pool.client() as client:
            client.disconnect()

    assert [len(os.listdir(f"/proc/{pool.pid}/{kind}")) for kind in kinds] == before
    assert before[1] == 1


def sockets(pid: int) -> set[str]:
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return {link for link in links if link.startswith("socket:")}


def test_P2_workers_have_no_socket_but_the_one_to_the_main_process(start: Callable[..., Pool]) -> None:
    pool = start(workers=3)

    found = [sockets(pid) for pid in pool.pids("after_fork")]

    assert [len(each) for each in found] == [1, 1, 1]
    assert not set.intersection(*found)


# --- counts ---


def accepted(pool: Pool) -> NbdClient | None:
    """A client if it gets in."""
    client = pool.dial()
    with contextlib.suppress(OSError, EOFError, Refused):
        return client.negotiate()
    client.socket.close()
    return None


def test_the_limit_is_that_of_all_workers_and_slots_of_a_killed_one_come_back(start: Callable[..., Pool]) -> None:
    pool = start("--filter=limit", parameters=["limit=3"])
    found: list[NbdClient | None] = []
    barrier = threading.Barrier(40)

    def come() -> None:
        barrier.wait(PATIENCE)
        found.append(accepted(pool))

    threads = [threading.Thread(target=come) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clients = [client for client in found if client is not None]
    assert len(clients) == 3

    victim = worker_of(clients[0])
    theirs = [client for client in clients if worker_of(client) == victim]
    kill_worker_of(clients[0])
    for _ in theirs:
        eventually(lambda: accepted(pool) is not None)

    assert accepted(pool) is None
    assert all(worker_of(client) for client in clients if client not in theirs)
    pool.end()


def test_the_server_ends_after_the_very_last_client_of_all_workers(start: Callable[..., Pool]) -> None:
    pool = start("--filter=exitlast")
    clients = [pool.client() for _ in range(4)]

    for client in clients[:-1]:
        client.disconnect()
        assert worker_of(clients[-1])
    clients[-1].disconnect()

    assert pool.wait() == []


def test_the_server_ends_also_if_the_worker_of_the_last_client_is_killed(start: Callable[..., Pool]) -> None:
    pool = start("--filter=exitlast")
    clients = [pool.client() for _ in range(3)]
    workers = [worker_of(client) for client in clients]
    (alone,) = (client for client, worker in zip(clients, workers) if workers.count(worker) == 1)
    for client in clients:
        if client is not alone:
            client.disconnect()
    eventually(lambda: len(pool.pids("close")) == 2)

    pid = kill_worker_of(alone)

    assert [line.partition(") ")[2] for line in pool.wait()] == ["was killed by SIGKILL: 1 client is disconnected"]
    assert pid in pool.pids("after_fork")


def test_past_the_limit_of_all_workers_a_client_gets_no_byte(start: Callable[..., Pool]) -> None:
    pool = start("--max-connections=3")
    clients = [pool.client() for _ in range(3)]
    workers = [worker_of(client) for client in clients]
    assert pool.dial().at_end()

    victim = next(worker for worker in workers if workers.count(worker) == 1)
    kill_worker_of(clients[workers.index(victim)])
    eventually(lambda: served(pool))

    assert pool.pids("preconnect") == [pool.pid] * (4 + len(workers) - 3)
    assert [line for line in pool.end() if "too many connections, at most 3" in line]


def served(pool: Pool) -> bool:
    """Whether one more client gets in, who then leaves."""
    client = pool.dial()
    try:
        worker_of(client.negotiate())
    except (OSError, EOFError):
        return False
    client.disconnect()
    return True


def test_the_limit_of_a_source_is_that_of_all_workers(start: Callable[..., Pool]) -> None:
    pool = start("--max-connections-per-source=2")
    clients = [pool.client() for _ in range(2)]
    assert pool.dial().at_end()

    clients[0].disconnect()
    assert any(served(pool) for _ in range(1000))  # the worker may say so a little later

    assert [line for line in pool.end() if f"too many connections of uid {os.getuid()}, at most 2" in line]


def test_of_too_many_handshakes_of_all_workers_the_oldest_gives_way(start: Callable[..., Pool]) -> None:
    pool = start("--max-handshakes=3")
    established = [pool.client() for _ in range(3)]
    assert all(map(worker_of, established))
    silent = [pool.dial() for _ in range(3)]
    for client in silent:
        client.greet()

    newcomer = pool.client()

    assert silent[0].at_end()
    for client in (*established, newcomer, *(client.negotiate_rest() for client in silent[1:])):
        assert worker_of(client)
    (line,) = pool.end()
    assert line.endswith("too many unfinished handshakes, the oldest is closed: connection 4")


def test_the_limit_may_be_changed_by_a_reload(start: Callable[..., Pool], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    text = f'server.max-connections = %d\n[plugin]\nname = "pids"\njournal = "{tmp_path}/journal"\n'
    config.write_text(text % 1)
    pool = start("--config", str(config))
    assert worker_of(pool.client())
    assert pool.dial().at_end()

    config.write_text(text % 2)
    os.kill(pool.pid, signal.SIGHUP)

    eventually(lambda: served(pool))


# --- a worker that is killed ---


def test_a_killed_worker_takes_only_its_clients_and_is_replaced(start: Callable[..., Pool]) -> None:
    pool = start()
    clients = [pool.client() for _ in range(4)]
    victim = worker_of(clients[0])
    others = [client for client in clients if worker_of(client) != victim]

    kill_worker_of(clients[0])

    assert len({worker_of(client) for client in others}) == 1
    eventually(lambda: worker_of(pool.client()) not in (victim, worker_of(others[0])))
    lines = pool.end()
    assert lines[0] in [
        f"nbdkitpy: error: worker {number} (pid {victim}) was killed by SIGKILL: 2 clients are disconnected"
        for number in (1, 2)
    ]
    assert len(pool.pids("after_fork")) == 3


def test_all_workers_may_be_killed_and_clients_wait_for_others(start: Callable[..., Pool]) -> None:
    pool = start()
    clients = [pool.client() for _ in range(2)]

    for client in clients:
        kill_worker_of(client)

    assert worker_of(pool.client()) in pool.pids("after_fork")[2:]


def test_a_worker_that_cannot_begin_any_more_is_tried_again_now_and_then(start: Callable[..., Pool]) -> None:
    pool = start(parameters=["bad=replaced"], workers=1)
    client = pool.client()
    Path(f"{pool.journal}.bad").touch()
    kill_worker_of(client)
    later = pool.dial()  # it has to wait

    eventually(lambda: len(pool.pids("after_fork")) >= 3)
    tries = len(pool.pids("after_fork"))
    Path(f"{pool.journal}.bad").unlink()

    assert worker_of(later.negotiate()) == pool.pids("after_fork")[-1]
    assert tries == 3
    lines = pool.end()
    assert [line for line in lines if "after_fork: the disk is on fire" in line]
    assert [line for line in lines if "has ended with exit status 1: 0 clients are disconnected" in line]


# --- the beginning ---


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ("after_fork", r"nbdkitpy: error: after_fork: the disk is on fire"),
        ("killed", r"nbdkitpy: error: worker 1 \(pid \d+\) was killed by SIGKILL: 0 clients are disconnected"),
        (
            "thread",
            r"nbdkitpy: error: cannot start workers: a back end has started threads \(early\) before after_fork; "
            "leave --workers out",
        ),
    ],
)
@pytest.mark.parametrize("foreground", [True, False])
def test_a_failure_at_the_beginning_is_told_in_one_line(foreground: bool, bad: str, text: str, directory: Path) -> None:
    if bad == "thread" and not foreground:
        text = text.replace("start workers", "go into the background").replace("leave --workers out", "use -f")
    words = [*(["-f"] if foreground else []), "-U", "-", "pids", f"journal={directory}/j", f"bad={bad}"]

    status, _, errors = run(directory, *words)

    assert status == 1
    assert re.fullmatch(f"{text}\n", errors)
    assert len([event for event, _ in events(directory / "j") if event == "after_fork"]) == (bad != "thread")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["memory", "1M"], "--workers: memory has to be in one process with all clients"),
        (["--check-config", "memory", "1M"], "--workers: memory has to be in one process with all clients"),
        (["-s", "null", "1M"], "--workers: with -s there is one client, which one process serves"),
        (["--workers=-1", "null", "1M"], "an integer from 0 to 1024"),
    ],
)
def test_what_cannot_have_workers_says_so(words: list[str], text: str, tmp_path: Path) -> None:
    status, _, errors = run(tmp_path, *words)

    assert status in (1, 2)
    assert text in errors


def test_P2_P8_in_the_background_workers_have_nothing_of_the_caller(directory: Path) -> None:
    options = ("-U", f"{directory}/s", "-P", f"{directory}/pid", "--log=null")

    done = run(directory, *options, "pids", f"journal={directory}/j")

    assert done == (0, "", "")  # it was read to the end: nobody keeps it open
    main = int((directory / "pid").read_text())
    with ended(main):
        with dial(f"{directory}/s") as client:
            worker = worker_of(client)
            streams = [os.readlink(f"/proc/{worker}/fd/{fd}") for fd in (0, 1, 2)]
            pipes = [fd for fd in os.listdir(f"/proc/{worker}/fd") if not _is_ours(worker, fd, main)]
        os.kill(main, signal.SIGTERM)
    assert main != worker
    assert streams == ["/dev/null"] * 3
    assert not pipes
    assert not os.path.exists(f"{directory}/pid")


def _is_ours(pid: int, fd: str, main: int) -> bool:
    """Whether a descriptor is none of a pipe, or of one that the main process has too: that which wakes it up."""
    link = os.readlink(f"/proc/{pid}/fd/{fd}")
    if not link.startswith("pipe:"):
        return True
    ends = [os.readlink(f"/proc/{each}/fd/{n}") for each in (pid, main) for n in os.listdir(f"/proc/{each}/fd")]
    return ends.count(link) >= 2


def test_workers_that_have_begun_end_in_order_if_another_one_cannot_begin(directory: Path) -> None:
    status, _, errors = run(directory, "-f", "-U", "-", "pids", f"journal={directory}/j", "bad=second")

    assert (status, errors) == (1, "nbdkitpy: error: after_fork: one disk too many\n")
    noted = events(directory / "j")
    assert [event for event, _ in noted] == ["get_ready", *["after_fork"] * 2, *["cleanup"] * 2, "unload"]
    assert {pid for event, pid in noted if event == "cleanup"} == {pid for event, pid in noted if event == "after_fork"}


def test_a_count_that_comes_too_late_to_be_shared_is_an_error(directory: Path) -> None:
    status, _, errors = run(directory, "-f", "-U", "-", "pids", f"journal={directory}/j", "bad=count")

    assert status == 1
    assert "shared_count must be called in load or get_ready, before the workers begin" in errors


def test_S4_a_beginning_that_does_not_end_is_cut_short_by_the_second_signal(
    begin: Callable[..., subprocess.Popen[str]], directory: Path
) -> None:
    journal = directory / "j"
    process = begin("-f", "-U", f"{directory}/s", "pids", f"journal={journal}", "bad=waits")
    eventually(lambda: [event for event, _ in events(journal)].count("after_fork") == 1)

    process.send_signal(signal.SIGTERM)
    eventually(lambda: not os.path.exists(f"{directory}/s"))  # it has taken note
    process.send_signal(signal.SIGTERM)

    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    worker = events(journal)[1]
    assert errors == f"nbdkitpy: error: worker 1 (pid {worker[1]}) does not end, and is killed\n"


# --- the end ---


def test_a_backend_in_a_worker_can_end_the_whole_server(start: Callable[..., Pool]) -> None:
    pool = start()
    clients = [pool.client() for _ in range(2)]

    clients[0].send(Command.READ, 8192, 512)

    assert clients[1].at_end()
    assert pool.wait() == []


def test_an_interrupt_at_the_terminal_is_for_the_main_process(
    begin: Callable[..., subprocess.Popen[str]], directory: Path
) -> None:
    journal = directory / "j"
    words = ("-f", "-U", f"{directory}/s", "--print-uri", "pids", f"journal={journal}")
    process = begin(*words, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline()
    client = dial(f"{directory}/s")
    with client:
        os.killpg(process.pid, signal.SIGINT)
        assert client.at_end()

    _, errors = process.communicate(timeout=PATIENCE)

    assert (process.returncode, errors) == (0, "")
    assert len([event for event, _ in events(journal) if event == "cleanup"]) == 2


def test_workers_end_in_order_when_the_main_process_is_killed(start: Callable[..., Pool]) -> None:
    pool = start()
    clients = [pool.client() for _ in range(2)]
    workers = [worker_of(client) for client in clients]

    with ended(*workers):
        os.kill(pool.pid, signal.SIGKILL)

    assert all(client.at_end() for client in clients)
    assert sorted(pool.pids("cleanup")) == sorted(workers)
    assert not pool.pids("unload")


def held_up(pool: Pool) -> NbdClient:
    """A client of which a read does not come back."""
    client = pool.client()
    client.send(Command.READ, 4096, 512)
    eventually(lambda: bool(pool.pids("held up")))
    return client


def test_S3_a_backend_that_does_not_return_does_not_hold_up_the_end(start: Callable[..., Pool]) -> None:
    pool = start("--drain=0.1")
    held_up(pool)

    os.kill(pool.pid, signal.SIGTERM)

    assert pool._process.wait(PATIENCE) == 1
    assert pool.log() == ["nbdkitpy: error: still held up in the backend, abandoned: pids[1]"]
    assert len(pool.pids("cleanup")) == 1  # of the other one


def test_S4_the_second_signal_ends_all_at_once(start: Callable[..., Pool]) -> None:
    pool = start("--drain=3600")
    client = held_up(pool)

    os.kill(pool.pid, signal.SIGTERM)
    eventually(lambda: not os.path.exists(pool.unix_path))  # it has taken note
    os.kill(pool.pid, signal.SIGTERM)

    assert client.at_end()
    assert pool._process.wait(PATIENCE) == 1


def test_S4_a_cleanup_that_does_not_return_is_cut_short_by_the_second_signal(start: Callable[..., Pool]) -> None:
    pool = start(parameters=["bad=cleanup"])
    os.kill(pool.pid, signal.SIGTERM)
    eventually(lambda: len(pool.pids("cleanup")) == 2)

    os.kill(pool.pid, signal.SIGTERM)

    assert pool._process.wait(PATIENCE) == 1
    assert [line.partition(") ")[2] for line in pool.log()] == ["does not end, and is killed"] * 2


def test_S6_the_server_ends_with_the_command_of_run_and_its_status(directory: Path) -> None:
    done = run(directory, "--run", 'test -S "$unixsocket" && echo "$uri"; exit 7', "pids", f"journal={directory}/j")

    assert done[0] == 7
    assert done[1].startswith("nbd+unix://")
    assert done[2] == ""
    assert len([event for event, _ in events(directory / "j") if event == "cleanup"]) == 2


# --- what else has to work with several processes ---


def test_a_reload_reaches_all_workers_and_those_begun_later(start: Callable[..., Pool], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    log, long = tmp_path / "log", "w" * 500_000  # more than there is room for in a message

    def say(word: str) -> None:
        config.write_text(
            f'server.log = "{log}"\n[plugin]\nname = "pids"\njournal = "{tmp_path}/journal"\nword = "{word}"\n'
        )

    say("before")
    pool = start("--config", str(config))
    clients = [pool.client() for _ in range(2)]

    for word in ("after", long):
        say(word)
        log.rename(tmp_path / "old")
        os.kill(pool.pid, signal.SIGHUP)
        for client in clients:
            eventually(lambda client=client, word=word: word.encode() in client.read(0, 600_000))  # type: ignore[misc]
    kill_worker_of(clients[0])

    eventually(lambda: worker_of(pool.client()) == [*pool.pids("after_fork"), 0][2])
    newcomer = pool.client()
    assert long.encode() in newcomer.read(0, 600_000)
    for pid in (pool.pid, worker_of(clients[1])):
        assert str(log) in [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]


def test_a_reload_that_a_worker_refuses_is_logged_and_ends_nothing(start: Callable[..., Pool], tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    text = f'[plugin]\nname = "pids"\njournal = "{tmp_path}/journal"\nword = "%s"\n'
    config.write_text(text % "right")
    pool = start("--config", str(config))
    client = pool.client()

    config.write_text(text % "wrong")
    os.kill(pool.pid, signal.SIGHUP)
    eventually(lambda: len([line for line in pool.log() if "only a worker minds" in line]) == 2)

    assert b"right" in client.read(0, 64)


def test_a_flush_in_one_worker_covers_writes_in_another(start: Callable[..., Pool], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    pool = start(plugin="file", parameters=[f"file={disk}"])
    writer, flusher = pool.client(), pool.client()
    data = random.Random(4).randbytes(4096)

    writer.write(8192, data)
    flusher.send(Command.FLUSH)
    assert not flusher.reply().error

    assert flusher.read(8192, 4096) == data
    assert disk.read_bytes()[8192:12288] == data


def test_the_service_manager_is_told_by_the_main_process_alone(
    begin: Callable[..., subprocess.Popen[str]], directory: Path
) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(f"{directory}/notify")
    manager.settimeout(PATIENCE)
    env = {"NOTIFY_SOCKET": f"{directory}/notify", "WATCHDOG_USEC": "100000"}
    process = begin("-f", "-U", f"{directory}/s", "pids", f"journal={directory}/j", env=env)
    told = told_by(manager)
    assert next(told) == "READY=1"
    clients = []
    for number in (1, 2, 3):
        clients.append(dial(f"{directory}/s"))
        wanted = "STATUS=1 client is connected" if number == 1 else f"STATUS={number} clients are connected"
        assert wanted in told
    assert "WATCHDOG=1" in told
    kill_worker_of(clients[2])
    assert "WATCHDOG=1" in told
    process.send_signal(signal.SIGTERM)
    assert "STOPPING=1" in told
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "was killed by SIGKILL" in errors
    manager.close()
    for client in clients:
        client.socket.close()


def told_by(manager: socket.socket) -> Iterator[str]:
    while True:
        yield manager.recv(1024).decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is sure to be allowed to")
def test_the_memory_of_each_process_is_locked(start: Callable[..., Pool]) -> None:
    pool = start("--swap")

    for pid in (pool.pid, *pool.pids("after_fork")):
        status = Path(f"/proc/{pid}/status").read_text()
        locked = next(line.split()[1] for line in status.splitlines() if line.startswith("VmLck:"))
        assert int(locked) > 0


# --- the main process alone, in that of the tests ---


class Workers:
    """In place of workers: processes that do nothing, whose part in what is said a test plays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: list[Channel] = []
        self.pids: list[int] = []
        self.failures: list[OSError] = []
        # Made before there are channels, which a new process has open for a moment even if it is not to inherit them.
        self._spare = [os.posix_spawn("/bin/sleep", ["sleep", "3600"], {}) for _ in range(3)]
        self._pair = Channel.pair
        monkeypatch.setattr(Channel, "pair", self.pair)
        monkeypatch.setattr(module, "fork", self.fork)

    def pair(self) -> tuple[Channel, Channel]:
        ours, theirs = self._pair()
        copy = Channel(theirs._socket.dup(), waits=True)
        self.ends.append(copy)
        return ours, theirs

    def fork(self) -> int:
        if self.failures:
            self.ends.pop().close()
            raise self.failures.pop()
        self.pids.append(self._spare.pop())
        self.ends[-1].send(Kind.READY)
        return self.pids[-1]

    def leave(self) -> None:
        """Have no more to do with the main process."""
        for end in self.ends:
            end.close()

    def finish(self) -> None:
        self.leave()
        for pid in self._spare:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    made = Workers(monkeypatch)
    yield made
    made.finish()


@pytest.fixture
def main(workers: Workers, tmp_path: Path) -> Iterator[module.Pool]:
    """A main process with two workers."""
    pool = module.Pool(unix_options(f"{tmp_path}/s", workers=2))
    pool.bind()
    pool.start_workers(lambda serve: 0)
    yield pool
    workers.leave()
    pool.close()


def test_a_process_that_the_system_has_no_room_for_leaves_nothing_behind(workers: Workers, tmp_path: Path) -> None:
    pool = module.Pool(unix_options(f"{tmp_path}/s", workers=2))
    before = open_descriptors()
    workers.failures.append(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))

    with pytest.raises(BlockingIOError):
        pool.start_workers(lambda serve: 0)

    assert open_descriptors() == before


def test_it_is_tried_again_to_begin_a_worker(
    main: module.Pool, workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SHORT_LIFE", 0.0)
    workers.failures.append(OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)))

    workers.ends[0].close()
    for _ in range(3):
        main._wait()

    assert caplog.messages[:2] == [
        f"worker 1 (pid {workers.pids[0]}) was killed by SIGKILL: 0 clients are disconnected",
        "cannot begin worker 1: Resource temporarily unavailable",
    ]
    assert len(workers.pids) == 3


def test_who_has_the_fewest_clients_gets_the_next(main: module.Pool, workers: Workers) -> None:
    numbers = itertools.count(1)

    def given() -> list[int]:
        """Hand over two clients; how many each worker has then."""
        for _ in range(2):
            ours, theirs = socket.socketpair()
            main._take(theirs, next(numbers), make_stack(Disks()))
            ours.close()
        return [len(process.clients) for process in main._processes.values()]

    assert given() == [1, 1]
    assert given() == [2, 2]
    for number in main._processes[1].clients.copy():
        workers.ends[0].send(Kind.LEFT, number)
        main._wait()

    assert given() == [2, 2]


def test_a_client_that_no_worker_can_take_is_turned_away(
    main: module.Pool, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = socket.socketpair()
    workers.leave()

    assert main._take(theirs, 7, make_stack(Disks()))

    assert ours.recv(1) == b""
    assert caplog.messages == ["connection 7: no worker can take it"]
    ours.close()


def test_clients_wait_in_the_queue_while_too_many_are_about_to_go(
    main: module.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAVING", 1)
    main.change_options(max_connections=1)
    ends = []
    for number in (1, 2):
        assert main._has_room()
        ours, theirs = socket.socketpair()
        ends.append(ours)
        main._take(theirs, number, make_stack(Disks()))

    assert not main._has_room()
    for end in ends:
        end.close()


def test_clients_wait_in_the_queue_while_workers_have_no_room(
    main: module.Pool, monkeypatch: pytest.MonkeyPatch, workers: Workers
) -> None:
    assert main._has_room()
    for process in main._processes.values():
        while process.channel.has_room():
            process.channel.send(Kind.STOP)

    assert not main._has_room()
    assert main._accept(main._listeners[0].socket, make_stack(Disks())) is False


def test_a_client_that_has_gone_already_is_no_matter(
    main: module.Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nbdkitpy")

    def gone(sock: socket.socket, number: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(module, "describe_client", gone)
    ours, theirs = socket.socketpair()

    assert main._take(theirs, 7, make_stack(Disks()))

    assert ours.recv(1) == b""
    assert caplog.messages == ["connection 7: [Errno 22] Invalid argument"]
    ours.close()


def test_a_reload_for_which_there_is_no_room_is_an_error(
    main: module.Pool, workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stack = make_stack(Disks())
    for process in main._processes.values():
        with contextlib.suppress(BlockingIOError):
            while True:
                process.channel.send(Kind.STOP)

    main.reloaded(stack)

    assert caplog.messages == [f"worker {n} (pid {workers.pids[n - 1]}) takes no messages" for n in (1, 2)]
    caplog.clear()

    def full(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", full)
        main.reloaded(stack)

    assert caplog.messages == ["reload of the workers: Too many open files"]


def test_a_child_that_somebody_else_has_waited_for_is_no_matter(
    main: module.Pool, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    os.kill(workers.pids[0], signal.SIGKILL)
    os.waitpid(workers.pids[0], 0)

    workers.ends[0].close()
    main._wait()

    assert caplog.messages[0].endswith("has ended with exit status 0: 0 clients are disconnected")


def test_ends_of_children_can_be_told_even_if_who_started_us_ignores_them(workers: Workers, tmp_path: Path) -> None:
    pool = module.Pool(unix_options(f"{tmp_path}/s", workers=1))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        pool.start_workers(lambda serve: 0)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)
    workers.leave()
    pool.close()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (3, "has ended with exit status 3"),
        (-signal.SIGSEGV, "was killed by SIGSEGV"),
        (-(signal.SIGRTMIN + 1), f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_the_end_of_a_worker_is_described(status: int, text: str) -> None:
    assert described_exit(status) == text

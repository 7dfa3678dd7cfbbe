"""Real systemd: activation, readiness, watchdog, reload, stop, and the journal."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbd  # type: ignore[import-not-found, unused-ignore]
import pytest

from tests.vm.guest.harness import NBDKITPY, PATIENCE, Units, greeted, has_ended, journal, open_export, run
from tests.vm.guest.writer import block

#: Seconds that clients have to take their replies when the server ends, if nobody says otherwise.
DRAIN = 5

TCP = ("127.0.0.1", 10810)
VSOCK = (1, 10810)
TCP_URI = "nbd://127.0.0.1:10810"
VSOCK_URI = "nbd+vsock://1:10810"

#: Priorities of the journal.
ERROR, DEBUG = "3", "7"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.sock"


@pytest.fixture
def uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


@pytest.fixture
def listen(path: Path) -> list[str]:
    """Lines of a socket unit."""
    return [f"ListenStream={TCP[0]}:{TCP[1]}", f"ListenStream={path}"]


@contextlib.contextmanager
def client(uri: str) -> Iterator[nbd.NBD]:
    """A client that leaves at the end."""
    handle = open_export(uri)
    yield handle
    handle.shutdown()


# --- activation ---


def test_clients_of_all_sockets_find_one_server(units: Units, listen: list[str], uri: str) -> None:
    run("modprobe", "vsock_loopback")
    unit = units([f"ExecStart={NBDKITPY} memory 1M"], [*listen, f"ListenStream=vsock::{VSOCK[1]}"])
    assert unit.show("ActiveState") == "inactive"

    with client(TCP_URI) as tcp, client(uri) as unix, client(VSOCK_URI) as vsock:
        for number, each in enumerate([tcp, unix, vsock]):
            each.pwrite(bytes([number + 1]) * 512, 512 * number)
        read = [bytes(each.pread(1536, 0)) for each in (tcp, unix, vsock)]

    assert set(read) == {b"\1" * 512 + b"\2" * 512 + b"\3" * 512}
    assert unit.show("ActiveState") == "active"


def test_stopped_server_leaves_the_sockets_and_is_started_by_the_next_client(
    units: Units, listen: list[str], path: Path, uri: str
) -> None:
    unit = units([f"ExecStart={NBDKITPY} memory 1M"], listen)
    with client(uri):
        first = unit.pid

    unit("stop")

    assert unit.show("Result") == "success"
    assert path.is_socket()
    with client(uri), client(TCP_URI):
        assert unit.pid not in (0, first)


def test_server_with_exitlast_ends_with_its_last_client_and_is_started_by_the_next(
    units: Units, listen: list[str], uri: str
) -> None:
    unit = units([f"ExecStart={NBDKITPY} --filter=exitlast memory 1M"], listen)
    seen = set()

    for where in (uri, TCP_URI, uri):
        with client(where) as last:
            with client(TCP_URI):
                pass
            assert last.pread(512, 0) == bytes(512)
            last.pwrite(b"x" * 512, 0)
            seen.add(unit.pid)
        unit.wait_for("ActiveState", "inactive".__eq__)
        assert unit.show("Result") == "success"

    assert len(seen) == 3


def test_no_client_is_refused_while_servers_with_exitlast_come_and_go(
    units: Units, listen: list[str], uri: str
) -> None:
    unit = units([f"ExecStart={NBDKITPY} --filter=exitlast memory 1M"], listen)

    for where in [uri, TCP_URI] * 3:
        with client(where) as each:
            assert each.pread(512, 0) == bytes(512)

    unit.wait_for("ActiveState", "inactive".__eq__)
    assert unit.show("Result") == "success"
    assert unit.journal() == []


def test_option_that_says_where_to_listen_is_refused(units: Units, listen: list[str]) -> None:
    unit = units([f"ExecStart={NBDKITPY} -p 0 memory 1M"], listen)

    unit("start", status=1)

    (record,) = [record for record in unit.journal() if record["PRIORITY"] == ERROR]
    assert "cannot use socket activation with the -p option" in record["MESSAGE"]


def test_too_many_sockets_end_the_server(units: Units, tmp_path: Path) -> None:
    sockets = [f"ListenStream={tmp_path}/{number}.sock" for number in range(17)]
    unit = units([f"ExecStart={NBDKITPY} memory 1M"], sockets)

    unit("start", status=1)

    assert unit.show("ExecMainStatus") == "1"
    (record,) = unit.journal()
    assert "LISTEN_FDS must be a number from 1 to 16, not '17'" in record["MESSAGE"]


def test_each_client_of_an_accepting_socket_has_a_server_in_single_mode(units: Units, path: Path, uri: str) -> None:
    # What inetd does.
    service = ["Type=exec", f"ExecStart={NBDKITPY} -s memory 1M", "StandardInput=socket", "StandardError=journal"]
    units(service, ["Accept=yes", f"ListenStream={path}"])

    with client(uri) as first, client(uri) as second:
        first.pwrite(b"x" * 512, 0)
        assert second.pread(512, 0) == bytes(512)
        assert first.pread(512, 0) == b"x" * 512


# --- readiness and the watchdog ---


def test_start_returns_when_clients_can_connect(units: Units, path: Path) -> None:
    unit = units([f"ExecStart={NBDKITPY} -f -U {path} memory 1M"])

    unit("start")

    greeted(socket.AF_UNIX, str(path)).close()
    assert unit.show("SubState") == "running"


def test_start_fails_if_the_server_does(units: Units, path: Path) -> None:
    unit = units([f"ExecStart={NBDKITPY} -f -U {path} file /nowhere/disk"])

    unit("start", status=1)

    assert unit.show("Result") == "exit-code"
    assert unit.show("ExecMainStatus") == "1"
    assert not path.exists()


def test_daemon_is_started_when_clients_can_connect(units: Units, path: Path, tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    unit = units(["Type=forking", f"PIDFile={pidfile}", f"ExecStart={NBDKITPY} -P {pidfile} -U {path} memory 1M"])

    unit("start")

    with client(f"nbd+unix:///?socket={path}"):
        assert unit.pid == int(pidfile.read_text())
    unit("stop")
    assert unit.show("Result") == "success"
    assert not pidfile.exists()


def test_status_is_the_number_of_clients(units: Units, listen: list[str], uri: str) -> None:
    unit = units([f"ExecStart={NBDKITPY} memory 1M"], listen)

    with client(uri):
        with client(TCP_URI):
            unit.wait_for("StatusText", lambda text: bool(re.search(r"\b2\b", text)))
        unit.wait_for("StatusText", lambda text: bool(re.search(r"\b1\b", text)))
    unit.wait_for("StatusText", lambda text: not re.search(r"\b[12]\b", text))


WATCHED = ["WatchdogSec=4s", "Restart=on-failure", "RestartSec=100ms", "TimeoutAbortSec=3s", "LimitCORE=0"]


def test_server_that_hangs_is_started_again_and_serves_who_waits(
    units: Units, listen: list[str], path: Path, uri: str
) -> None:
    unit = units([f"ExecStart={NBDKITPY} memory 1M", *WATCHED], listen)
    before = greeted(socket.AF_UNIX, str(path))
    first = unit.pid

    run("kill", "-STOP", str(first))

    with client(uri):  # it waits in the queue of the socket
        assert unit.pid not in (0, first)
        assert unit.show("NRestarts") == "1"
    assert has_ended(before)


def test_server_that_has_nothing_to_do_is_not_taken_to_hang(units: Units, listen: list[str], uri: str) -> None:
    unit = units([f"ExecStart={NBDKITPY} memory 1M", *WATCHED], listen)
    with client(uri) as idle:
        first = unit.pid
        begin = int(unit.show("WatchdogTimestampMonotonic"))

        unit.wait_for("WatchdogTimestampMonotonic", lambda now: int(now) > begin + 5_000_000 or now == "0")

        assert unit.pid == first
        assert idle.pread(512, 0) == bytes(512)


# --- reload ---


def rules(configuration: Path, allow: str) -> None:
    configuration.write_text(
        f'[[filter]]\nname = "ip"\nallow = {allow}\ndeny = "all"\n[plugin]\nname = "memory"\nsize = "1M"\n'
    )


def test_reload_applies_new_rules_to_new_clients_only(units: Units, listen: list[str], path: Path, uri: str) -> None:
    configuration = path.with_name("disk.toml")
    rules(configuration, '["127.0.0.1", "anyunix"]')
    unit = units([f"ExecStart={NBDKITPY} --config {configuration}", "ExecReload=kill -HUP $MAINPID"], listen)
    with client(TCP_URI) as old:
        first = unit.pid
        rules(configuration, '["anyunix"]')

        unit("reload")

        assert "anyunix" in unit.wait_for_message("allow")
        with pytest.raises(ConnectionError):
            greeted(socket.AF_INET, TCP)
        assert old.pread(512, 0) == bytes(512)
        with client(uri):
            pass
        unit.wait_for("ActiveState", "active".__eq__)
        assert unit.pid == first


def test_reload_of_a_wrong_file_changes_nothing(units: Units, listen: list[str], path: Path) -> None:
    configuration = path.with_name("disk.toml")
    rules(configuration, '["127.0.0.1"]')
    unit = units([f"ExecStart={NBDKITPY} --config {configuration}", "ExecReload=kill -HUP $MAINPID"], listen)
    with client(TCP_URI) as old:
        rules(configuration, '["anyunix", "nonsense"]')

        unit("reload")

        message = unit.wait_for_message("nonsense")
        (record,) = [record for record in unit.journal() if record["MESSAGE"] == message.rstrip()]
        assert record["PRIORITY"] == ERROR
        unit.wait_for("ActiveState", "active".__eq__)
        greeted(socket.AF_INET, TCP).close()
        assert old.pread(512, 0) == bytes(512)
        with pytest.raises(ConnectionError):
            greeted(socket.AF_UNIX, str(path))


# --- stop ---


def test_stop_waits_for_no_client_that_does_nothing(units: Units, listen: list[str], path: Path, uri: str) -> None:
    unit = units([f"ExecStart={NBDKITPY} memory 1M"], listen)
    idle, silent = open_export(uri), greeted(socket.AF_INET, TCP)

    unit("stop")

    assert unit.show("Result") == "success"
    assert unit.show("ExecMainStatus") == "0"
    assert has_ended(silent)
    with pytest.raises(nbd.Error):
        idle.pread(512, 0)
    stopped = int(unit.show("InactiveEnterTimestampMonotonic")) - int(unit.show("ActiveExitTimestampMonotonic"))
    assert stopped < DRAIN * 1_000_000


def test_stop_keeps_every_write_that_was_acknowledged(units: Units, listen: list[str], path: Path, uri: str) -> None:
    size, enough = 4096, 200
    disk = path.with_name("disk")
    disk.touch()
    os.truncate(disk, 1 << 30)
    unit = units([f"ExecStart={NBDKITPY} file {disk}"], listen)
    script = Path(__file__).with_name("writer.py")
    writer = subprocess.Popen(
        [sys.executable, "-B", script, uri, str(size), str(enough)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "enough\n"

    unit("stop")

    output, _ = writer.communicate(timeout=PATIENCE)
    acknowledged = list(map(int, output.split()))
    assert len(acknowledged) >= enough
    with disk.open("rb") as stream:
        wrong = [
            number for number in acknowledged if os.pread(stream.fileno(), size, number * size) != block(number, size)
        ]
    assert wrong == []
    assert unit.show("Result") == "success"
    assert unit.show("ExecMainStatus") == "0"


# --- the journal ---


def test_errors_of_the_start_are_errors_of_the_journal(units: Units) -> None:
    unit = units([f"ExecStart={NBDKITPY} -f -U - file /nowhere/disk"])

    unit("start", status=1)

    (record,) = unit.journal()
    assert record["PRIORITY"] == ERROR
    assert "/nowhere/disk" in record["MESSAGE"]


def test_refused_clients_are_in_the_journal_and_debugging_only_if_asked_for(units: Units, listen: list[str]) -> None:
    priorities = {}
    for verbose in ("", "-v"):
        unit = units([f"ExecStart={NBDKITPY} {verbose} --filter=ip memory 1M deny=anyipv4"], listen)
        with pytest.raises(ConnectionError):
            greeted(socket.AF_INET, TCP)
        unit.wait_for_message("127.0.0.1")
        run("systemctl", "stop", f"{unit.name}.socket", f"{unit.name}.service")
        priorities[verbose] = [record["PRIORITY"] for record in unit.journal()]

    assert len(priorities[""]) == 1
    assert DEBUG not in priorities[""]
    assert set(priorities["-v"]) >= {*priorities[""], DEBUG}


def test_client_cannot_write_a_line_of_the_journal(units: Units, listen: list[str], path: Path, uri: str) -> None:
    unit = units([f"ExecStart={NBDKITPY} -v file dir={path.parent}"], listen)
    handle = nbd.NBD()
    handle.set_export_name("x\n<0>forged\r\n<0>forged\033[2K")

    with pytest.raises(nbd.Error):
        handle.connect_unix(str(path))

    unit.wait_for_message("forged")
    records = unit.journal()
    assert {record["PRIORITY"] for record in records} <= set("34567")
    assert not [record for record in records if str(record["MESSAGE"]).startswith("forged")]
    assert all(isinstance(record["MESSAGE"], str) for record in records)  # no byte that needs hiding


def test_system_log_has_errors_and_the_name_of_the_server(units: Units) -> None:
    unit = units([f"ExecStart={NBDKITPY} -f -U - --log=syslog --name=disk7 file /nowhere/disk"])

    unit("start", status=1)

    found = [record for record in journal("SYSLOG_IDENTIFIER=nbdkitpy[disk7]") if record["_TRANSPORT"] == "syslog"]
    (record,) = found
    assert record["PRIORITY"] == ERROR
    assert "/nowhere/disk" in record["MESSAGE"]

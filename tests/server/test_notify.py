"""Messages to the service manager: their words, where they go, and that nothing about them can fail."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdkitpy.server.notify import Notifier

PID = 4711


class Manager:
    """The service manager's end."""

    def __init__(self, address: str | bytes) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(30)
        self._socket.bind(address)

    def hear(self) -> bytes:
        """Return the next message."""
        return self._socket.recv(65536)

    def has_heard_all(self) -> bool:
        self._socket.setblocking(False)
        try:
            return not self._socket.recv(65536)
        except BlockingIOError:
            return True

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notify")


@pytest.fixture
def manager(path: str) -> Iterator[Manager]:
    manager = Manager(path)
    yield manager
    manager.close()


MESSAGES: list[tuple[Callable[[Notifier], None], bytes]] = [
    (Notifier.ready, b"READY=1"),
    (Notifier.stopping, b"STOPPING=1"),
    (Notifier.alive, b"WATCHDOG=1"),
    (lambda notifier: notifier.status("2 clients – all well"), "STATUS=2 clients – all well".encode()),
    (lambda notifier: notifier.status(""), b"STATUS="),
]


@pytest.mark.parametrize(("send", "message"), MESSAGES, ids=[message.decode() for _, message in MESSAGES])
def test_message_is_one_datagram_in_systemds_words(
    path: str, manager: Manager, send: Callable[[Notifier], None], message: bytes
) -> None:
    send(Notifier({"NOTIFY_SOCKET": path}))

    assert manager.hear() == message
    assert manager.has_heard_all()


def test_reload_begins_with_the_time(path: str, manager: Manager) -> None:
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    Notifier({"NOTIFY_SOCKET": path}).reloading()

    reloading, when = manager.hear().split(b"\n")
    name, equals, microseconds = when.partition(b"=")
    assert (reloading, name, equals) == (b"RELOADING=1", b"MONOTONIC_USEC", b"=")
    assert before <= int(microseconds) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_messages_come_in_the_order_in_which_they_are_sent(path: str, manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": path})

    notifier.status("starting")
    notifier.ready()
    notifier.stopping()

    assert [manager.hear() for _ in range(3)] == [b"STATUS=starting", b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize(
    "text", ["a\nMAINPID=1", "a\r\nb", "a\0b", "a\x1b[31m\x85b", "a\u2028b", "a\udcffb"], ids=ascii
)
def test_status_cannot_contain_a_message_of_its_own(path: str, manager: Manager, text: str) -> None:
    Notifier({"NOTIFY_SOCKET": path}).status(text)

    heard = manager.hear().decode()
    assert heard.startswith("STATUS=a ")
    assert heard.isprintable()


def test_name_that_is_not_in_the_file_system_begins_with_an_at_sign() -> None:
    name = f"nbdkitpy-test-{os.getpid()}"
    manager = Manager(b"\0" + name.encode())

    Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()

    assert manager.hear() == b"READY=1"
    manager.close()


def test_path_that_is_no_text_is_found(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    manager = Manager(path)

    Notifier({"NOTIFY_SOCKET": os.fsdecode(path)}).ready()

    assert manager.hear() == b"READY=1"
    manager.close()


def test_variables_are_removed_and_no_others(path: str) -> None:
    environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1", "NOTIFY": "1", "LISTEN_PID": "1"}

    Notifier(environ)

    assert environ == {"NOTIFY": "1", "LISTEN_PID": "1"}


def send_everything(notifier: Notifier) -> None:
    notifier.status("starting")
    notifier.ready()
    notifier.reloading()
    notifier.alive()
    notifier.stopping()


def test_without_a_manager_nothing_is_opened_or_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "socket", lambda *args: pytest.fail("a socket was made"))
    notifier = Notifier({})

    send_everything(notifier)

    assert notifier.watchdog_interval is None
    assert not caplog.records


@pytest.mark.parametrize("address", ["relative", "@", "vsock:2:1234", "\n"], ids=ascii)
def test_address_of_an_unknown_kind_is_ignored_with_one_line_in_the_log(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"})

    send_everything(notifier)

    assert notifier.watchdog_interval is None
    (record,) = caplog.records
    assert record.getMessage() == (f"NOTIFY_SOCKET must be an absolute path, or @ and a name, not {address!r}: ignored")


@pytest.mark.parametrize(
    ("address", "reason"),
    [("/nowhere/notify", "No such file or directory"), ("/" + "x" * 200, "AF_UNIX path too long")],
    ids=["missing", "too long"],
)
def test_failure_to_send_is_logged_once_and_harms_nobody(
    address: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    send_everything(Notifier({"NOTIFY_SOCKET": address}))

    (record,) = caplog.records
    assert record.getMessage() == f"cannot tell the service manager (NOTIFY_SOCKET): {reason}"


def test_manager_that_hangs_does_not_hold_us_up(
    path: str, manager: Manager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nbdkitpy.server.notify._PATIENCE", 0.01)
    notifier = Notifier({"NOTIFY_SOCKET": path})

    for _ in range(10_000):  # the system queues some hundred at most
        notifier.alive()
        if caplog.records:
            break

    assert [record.getMessage() for record in caplog.records] == [
        "cannot tell the service manager (NOTIFY_SOCKET): timed out"
    ]
    assert manager.hear() == b"WATCHDOG=1"


def test_manager_that_comes_back_is_told_again(path: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": path})
    first = Manager(path)
    notifier.ready()
    first.close()
    os.unlink(path)
    notifier.alive()
    second = Manager(path)

    notifier.status("well")

    assert second.hear() == b"STATUS=well"
    second.close()


def open_descriptors() -> set[int]:
    gc.collect()  # what other tests have left
    found = set()
    for fd in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            found.add(fd)
    return found


def test_one_descriptor_serves_all_messages_and_is_not_inherited(path: str, manager: Manager) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": path})
    before = open_descriptors()

    send_everything(notifier)

    (ours,) = open_descriptors() - before
    assert not os.get_inheritable(ours)
    del notifier
    assert open_descriptors() == before


# --- the watchdog ---


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID)}, 15.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "1"}, 0.0000005),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID + 1)}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "x"}, None),
        ({"WATCHDOG_PID": str(PID)}, None),
        ({}, None),
    ],
    ids=str,
)
def test_watchdog_is_fed_twice_in_its_time_if_it_is_ours(
    path: str, variables: dict[str, str], interval: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert Notifier({"NOTIFY_SOCKET": path, **variables}, PID).watchdog_interval == interval
    assert not caplog.records


def test_watchdog_of_this_process_is_ours(path: str) -> None:
    environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}

    assert Notifier(environ).watchdog_interval == 1.0


def test_watchdog_that_cannot_be_told_is_none(caplog: pytest.LogCaptureFixture) -> None:
    assert Notifier({"WATCHDOG_USEC": "30000000"}).watchdog_interval is None
    assert not caplog.records


@pytest.mark.parametrize(
    "limit", ["0", "-1", "1x", " 1", "1_000", "1.5", "١", "9" * 20, "9" * 5000], ids=lambda x: x[:20]
)
def test_P10_watchdog_time_that_is_none_is_logged(path: str, limit: str, caplog: pytest.LogCaptureFixture) -> None:
    assert Notifier({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": limit}).watchdog_interval is None

    (record,) = caplog.records
    assert record.getMessage() == f"WATCHDOG_USEC must be a number of microseconds, not {limit!r}: ignored"

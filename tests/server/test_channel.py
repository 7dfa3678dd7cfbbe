"""Messages between processes: whole or not at all, with descriptors that are not inherited."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import threading

import pytest

from nbdkitpy.server.channel import Channel, Kind, Message
from tests.nbdclient import PATIENCE


def test_messages_arrive_one_by_one_in_order() -> None:
    main, worker = Channel.pair()

    main.send(Kind.CLIENT, 1 << 40)
    main.send(Kind.STOP)

    assert worker.receive() == Message(Kind.CLIENT, 1 << 40, None)
    assert worker.receive() == Message(Kind.STOP, 0, None)
    with pytest.raises(BlockingIOError):
        worker.receive()
    main.close()
    assert worker.receive() is None
    worker.close()


def test_G9_a_worker_waits_for_room_whatever_default_timeout_a_unit_has_set() -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.01)
    main, worker = Channel.pair()
    socket.setdefaulttimeout(before)
    sent: list[int] = []

    def send() -> None:
        for number in range(1000):
            worker.send(Kind.LEFT, number)
            sent.append(number)

    sender = threading.Thread(target=send)
    sender.start()
    sender.join(0.1)  # which it does not do, as there is no room for all
    assert sender.is_alive()
    poll = select.poll()
    poll.register(main, select.POLLIN)
    received = [main.receive() for _ in range(1000) if poll.poll(PATIENCE * 1000)]
    sender.join()

    assert received == [Message(Kind.LEFT, number, None) for number in range(1000)]
    main.close()
    worker.close()


def test_a_descriptor_is_a_copy_that_is_not_inherited() -> None:
    main, worker = Channel.pair()
    read, write = os.pipe()

    main.send(Kind.CLIENT, 7, write)
    os.close(write)
    message = worker.receive()

    assert message is not None
    assert message.fd is not None
    assert not os.get_inheritable(message.fd)
    os.write(message.fd, b"x")
    assert os.read(read, 2) == b"x"
    for fd in (read, message.fd):
        os.close(fd)
    main.close()
    worker.close()


def test_a_descriptor_for_which_there_is_no_room_is_missing() -> None:
    main, worker = Channel.pair()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    main.send(Kind.CLIENT, 7, 0)

    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        message = worker.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert message == Message(Kind.CLIENT, 7, None)
    main.close()
    worker.close()


def test_who_does_not_wait_is_told_that_there_is_no_room() -> None:
    main, worker = Channel.pair()
    sent = 0
    while main.has_room():
        main.send(Kind.CLIENT, sent)
        sent += 1
    for _ in range(50):  # there is more room than has_room says, for what is urgent
        main.send(Kind.STOP)
    with contextlib.suppress(BlockingIOError):
        for _ in range(10000):
            main.send(Kind.STOP)

    with pytest.raises(BlockingIOError):
        main.send(Kind.STOP)

    assert sent > 10
    assert worker.receive() == Message(Kind.CLIENT, 0, None)
    main.close()
    worker.close()


def test_an_end_with_messages_unread_is_an_end() -> None:
    main, worker = Channel.pair()
    main.send(Kind.STOP)

    worker.close()

    assert main.receive() is None
    with pytest.raises(OSError, match="Broken pipe"):
        main.send(Kind.STOP)
    main.close()

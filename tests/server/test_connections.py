"""Who is let in, who is refused, and who has to give way."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nbdkitpy import Client
from nbdkitpy.backend import Family
from nbdkitpy.server.connections import Connections, source_of
from nbdkitpy.server.options import ServerOptions


def inet(address: str) -> Client:
    return Client(1, Family.INET, address=address, port=1)


def inet6(address: str) -> Client:
    return Client(1, Family.INET6, address=address, port=1)


A, B = inet("192.0.2.1"), inet("192.0.2.2")


def limits(**given: Any) -> ServerOptions:
    return ServerOptions(**{"max_connections": 0, "max_handshakes": 0, **given})


def entered(count: int, client: Client = A, *, established: bool = True) -> Connections[int]:
    """So many connections, from 0 on."""
    connections: Connections[int] = Connections()
    for number in range(count):
        connections.enter(number, client)
        if established:
            connections.established(number)
    return connections


# --- sources ---


@pytest.mark.parametrize(
    ("client", "source"),
    [
        (A, "address 192.0.2.1"),
        (inet6("2001:db8:1:2:3:4:5:6"), "network 2001:db8:1:2::/64"),
        (inet6("2001:db8:1:2::"), "network 2001:db8:1:2::/64"),
        (inet6("::1"), "network ::/64"),
        (Client(1, Family.UNIX, pid=5, uid=1000, gid=7), "uid 1000"),
        (Client(1, Family.UNIX), "uid None"),
        (Client(1, Family.VSOCK, cid=3, port=9), "vsock cid 3"),
        (Client(1), "unknown addresses"),
    ],
)
def test_a_client_is_counted_for_where_it_comes_from(client: Client, source: str) -> None:
    assert source_of(client) == source


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (inet6("2001:db8::1"), inet6("2001:db8::2")),  # who has one of these has them all
        (inet("192.0.2.1"), inet("192.0.2.1")._replace(port=2)),
        (Client(1, Family.UNIX, pid=1, uid=5), Client(1, Family.UNIX, pid=2, uid=5)),
        (Client(1, Family.UNIX), Client(1, Family.UNIX)),  # whom nobody knows are no exception
        (Client(1), Client(1)),
    ],
)
def test_clients_of_one_source_are_counted_together(one: Client, other: Client) -> None:
    connections = entered(2, one)

    assert connections.refusal(other, limits(max_connections_per_source=3)) is None
    assert connections.refusal(other, limits(max_connections_per_source=2)) == (
        f"too many connections of {source_of(other)}, at most 2"
    )


@pytest.mark.parametrize("other", [B, inet6("2001:db8::1"), Client(1, Family.UNIX, uid=0), Client(1, Family.VSOCK)])
def test_other_sources_are_not_counted(other: Client) -> None:
    assert entered(5).refusal(other, limits(max_connections_per_source=1)) is None


def test_who_has_left_is_not_counted_and_leaves_nothing() -> None:
    connections = entered(2)

    for number in (0, 1, 1, 7):
        connections.leave(number)

    assert connections.refusal(A, limits(max_connections=1, max_connections_per_source=1)) is None
    assert not connections._by_source
    assert not connections._sources


# --- in all ---


def test_past_the_limit_clients_are_refused() -> None:
    assert entered(2).refusal(B, limits(max_connections=3)) is None
    assert entered(3).refusal(B, limits(max_connections=3)) == "too many connections, at most 3"


def test_without_limits_everybody_is_let_in() -> None:
    connections = entered(5000, established=False)

    assert connections.refusal(A, limits()) is None
    assert connections.displaced(limits()) is None


def test_who_has_finished_the_handshake_does_not_give_way_to_who_has_not() -> None:
    connections = entered(3)
    connections.enter(3, B)

    assert connections.refusal(B, limits(max_connections=4)) is None
    connections.enter(4, B)

    assert connections.displaced(limits(max_connections=4)) == (
        3,
        "too many connections, the oldest unfinished handshake is closed",
    )
    assert connections.handshakes == [4]
    assert connections.displaced(limits(max_connections=4)) is None


def test_a_newcomer_has_to_go_if_all_others_have_been_quick() -> None:
    connections = entered(2, established=False)
    assert connections.refusal(A, limits(max_connections=2)) is None
    for number in (0, 1):
        connections.established(number)

    connections.enter(2, A)

    displaced = connections.displaced(limits(max_connections=2))
    assert displaced is not None
    assert displaced[0] == 2


def test_of_too_many_unfinished_handshakes_the_oldest_gives_way() -> None:
    connections = entered(3, established=False)

    assert connections.displaced(limits(max_handshakes=3)) is None
    assert connections.displaced(limits(max_handshakes=2)) == (
        0,
        "too many unfinished handshakes, the oldest is closed",
    )
    assert connections.handshakes == [1, 2]


def test_an_unfinished_handshake_makes_no_exception_for_its_source() -> None:
    connections = entered(2, established=False)

    assert connections.refusal(A, limits(max_connections_per_source=2)) is not None


# --- deadlines ---


def test_handshakes_whose_time_is_over_are_told_once_unless_they_are_excused() -> None:
    connections: Connections[int] = Connections()
    assert connections.deadline == math.inf
    for number in range(4):
        connections.enter(number, A, 10.0 + number)
    connections.established(0)
    assert connections.deadline == 11.0

    late = connections.late(12.5, lambda number: number == 1, 20.0)

    assert late == [2]
    assert connections.handshakes == [3, 1]
    assert connections.late(12.5, lambda _: False, 20.0) == []
    assert connections.late(20.0, lambda _: False, 30.0) == [3, 1]
    assert connections.refusal(A, limits(max_connections=4)) == "too many connections, at most 4", "they are there yet"

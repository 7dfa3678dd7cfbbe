from __future__ import annotations

import pytest

from nbdkitpy.server.ways import Ways

WINDOW, PIECE = 16 << 20, 256 << 10
WINDOWS_TO_TRIAL = 24


class Client:
    """Takes data at one rate if they come from the file, at another if they were copied; in bytes per second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, from_file: float, copied: float) -> None:
        self.now = 0.0
        self.rates = {True: from_file, False: copied}
        monkeypatch.setattr("nbdkitpy.server.ways.time.perf_counter", lambda: self.now)
        self.ways = Ways()

    def read(self, length: int = PIECE) -> bool:
        """Read so many bytes, and return whether they came from the file."""
        way = self.ways.from_file(length)
        self.now += length / self.rates[way]
        return way

    def window(self) -> bool:
        """Read as much as is looked at together, and return which way that came."""
        (way,) = {self.read() for _ in range(WINDOW // PIECE)}
        return way


@pytest.mark.parametrize(("copied", "usual"), [(2e9, True), (4e9, True), (4.5e9, True), (5e9, False), (9e9, False)])
def test_the_faster_way_is_taken_and_the_cheaper_one_if_there_is_little_in_it(
    copied: float, usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(monkeypatch, 4e9, copied)
    client.now += 0.5  # before it begins

    first = [client.window() for _ in range(2)]
    later = [client.window() for _ in range(WINDOWS_TO_TRIAL)]
    trial = client.window()

    assert first == [True, False]
    assert later == [usual] * WINDOWS_TO_TRIAL
    assert trial is not usual


def test_a_client_that_changes_is_served_in_the_other_way_after_some_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(monkeypatch, 4e9, 1e9)
    for _ in range(3):
        assert client.window() in (True, False)

    client.rates = {True: 1e9, False: 4e9}
    taken = [client.window() for _ in range(2 * WINDOWS_TO_TRIAL)]

    assert taken[-2:] == [False, False]


def test_a_client_that_pauses_says_nothing_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(monkeypatch, 4e9, 1e9)
    for _ in range(3):
        client.window()

    for _ in range(2 * WINDOWS_TO_TRIAL):
        assert client.window()
        client.now += 2.0


def test_a_client_that_reads_little_is_not_experimented_with(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(monkeypatch, 4e9, 8e9)

    assert all(client.read(65536) for _ in range(100))

"""Test where the benchmark's servers and clients meet."""

import errno
import socket
from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.figures import MIB
from benchmarks.place import Place, chill, free_port, make_image


@pytest.mark.parametrize(
    ("place", "export", "uri"),
    [
        (Place(Path("/tmp/a b"), MIB, "s"), "", "nbd+unix:///?socket=/tmp/a%20b/s"),
        (Place(Path("/tmp"), MIB, "s"), "disk", "nbd+unix:///disk?socket=/tmp/s"),
        (Place(Path("/tmp"), MIB, "s", port=7), "", "nbd://127.0.0.1:7/"),
    ],
)
def test_place_has_a_uri(place: Place, export: str, uri: str) -> None:
    assert place.uri(export) == uri


def test_connection_is_to_the_unix_socket(tmp_path: Path) -> None:
    place = Place(tmp_path, MIB, "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.path))
        listener.listen()

        with place.connect() as connection:
            assert connection.getpeername() == str(place.path)


def test_connection_is_to_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        with Place(Path("/"), MIB, "s", port).connect() as connection:
            assert connection.getpeername() == ("127.0.0.1", port)


def test_connection_to_nobody_fails() -> None:
    with pytest.raises(OSError, match="refused") as caught:
        Place(Path("/"), MIB, "s", free_port()).connect()

    assert caught.value.errno == errno.ECONNREFUSED


def test_place_is_seen_from_another_root() -> None:
    place = Place(Path("/srv/root/tmp/x"), MIB, "s")

    seen = place.seen_from(Path("/srv/root"))

    assert (seen.image, seen.path) == (Path("/tmp/x/image"), Path("/tmp/x/s"))
    assert place.seen_from(Path("/")) == place


def test_place_outside_of_the_root_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="/tmp/x is not within /srv/root: choose another --directory"):
        Place(Path("/tmp/x"), MIB, "s").seen_from(Path("/srv/root"))


def test_what_a_server_leaves_is_removed_and_the_image_is_not(tmp_path: Path) -> None:
    place = Place(tmp_path, MIB, "s")
    for path in (place.image, place.path, place.config):
        path.touch()

    place.clear()

    assert list(tmp_path.iterdir()) == [place.image]


def test_image_is_random_and_of_the_size_asked_for(tmp_path: Path) -> None:
    make_image(tmp_path / "image", 2 * MIB)

    data = (tmp_path / "image").read_bytes()

    assert len(data) == 2 * MIB
    assert data[:MIB] != data[MIB:]
    assert len(set(data)) == 256


def test_chilling_changes_nothing_of_the_image(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x" * 5000)

    chill(tmp_path / "image")

    assert (tmp_path / "image").read_bytes() == b"x" * 5000

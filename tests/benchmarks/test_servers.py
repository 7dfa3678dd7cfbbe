"""Test how the benchmark calls servers, and those servers that are its own."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.clients import BenchmarkError
from benchmarks.figures import MIB
from benchmarks.place import Place
from benchmarks.plan import Plan, workspace
from benchmarks.servers import BARE, PEERS, Contender, build_bare, our_program, ours
from benchmarks.service import Running, Service
from nbdkitpy.protocol.constants import Command, NbdError
from tests.nbdclient import NbdClient, Style

UNIX = Place(Path("/tmp"), 4096, "s")
TCP = replace(UNIX, port=7)
ON_LOOPBACK = ["-i", "127.0.0.1", "-p", "7"]


def test_nbdkit_and_ours_are_called_alike() -> None:
    arguments = ["-f", "-U", "/tmp/s", "--filter=ip", "--filter=limit", "-t", "1", "file", "/tmp/image"]
    expected = [*arguments, "allow=all", "limit=2000"]

    for contender in (ours("file"), PEERS["nbdkit-file"]):
        command = replace(contender, filters=2, options=("-t", "1")).command(UNIX)

        assert command == [*contender.program, *expected]


def test_ten_filters_are_given_their_parameters_once() -> None:
    command = replace(ours("file"), filters=10).command(UNIX)

    assert [word for word in command if word.startswith("--filter=")] == [
        "--filter=ip",
        "--filter=limit",
        "--filter=exitlast",
        *["--filter=ip"] * 7,
    ]
    assert command[-2:] == ["allow=all", "limit=2000"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nbdkit-memory", ["memory", "4096"]),
        ("nbdkit-null", ["null", "4096"]),
        ("nbdkit-python", ["python", "/tmp/nbdkit_bytearray.py", "size=4096", "model=default"]),
        ("nbdkit-python-parallel", ["python", "/tmp/nbdkit_bytearray.py", "size=4096", "model=parallel"]),
        ("nbdkit-delayed", ["-t", "64", "--filter=delay", "memory", "4096", "rdelay=5ms", "wdelay=5ms"]),
    ],
)
def test_plugins_are_given_the_size_and_tcp_its_port(name: str, words: list[str]) -> None:
    assert PEERS[name].command(TCP) == ["nbdkit", "-f", *ON_LOOPBACK, *words]


def test_nbdkit_is_run_in_another_root_directory() -> None:
    command = replace(PEERS["nbdkit-file"], root=Path("/srv/root")).command(Place(Path("/srv/root/tmp"), 4096, "s"))

    assert command == ["chroot", "/srv/root", "nbdkit", "-f", "-U", "/tmp/s", "file", "/tmp/image"]


@pytest.mark.parametrize(("place", "listen"), [(UNIX, ["-k", "/tmp/s"]), (TCP, ["-b", "127.0.0.1", "-p", "7"])])
def test_qemu_nbd_serves_the_image_raw_to_many(place: Place, listen: list[str]) -> None:
    assert PEERS["qemu-nbd"].command(place) == [
        "qemu-nbd",
        "--persistent",
        "--shared=2000",
        "--format=raw",
        *listen,
        "/tmp/image",
    ]


@pytest.mark.parametrize(("port", "listen"), [(0, "unixsock = {}/s"), (7, "listenaddr = 127.0.0.1\nport = 7")])
def test_nbd_server_reads_where_to_listen(tmp_path: Path, port: int, listen: str) -> None:
    command = PEERS["nbd-server"].command(Place(tmp_path, 4096, "s", port))

    assert command == ["nbd-server", "-C", f"{tmp_path}/s.conf", "-p", f"{tmp_path}/s.pid"]
    assert (tmp_path / "s.conf").read_text() == (
        f"[generic]\n{listen.format(tmp_path)}\n[disk]\nexportname = {tmp_path}/image\n"
    )


def test_peers_serve_what_ours_can_serve_too() -> None:
    for peer in PEERS.values():
        assert ours(peer.source).source == peer.source


def test_our_program_is_that_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert our_program() == (str(Path(sys.executable).with_name("nbdkitpy")),)

    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert our_program() == (str(tmp_path / "python"), "-m", "nbdkitpy")


@contextmanager
def served(contender: Contender, *, tcp: bool = False) -> Iterator[tuple[Running, Path]]:
    """Serve a random image of 1 MiB."""
    plan = Plan([], size=MIB)
    with workspace(plan) as directory, contextlib.ExitStack() as ends:
        service = Service(contender, directory, plan.size, tcp=tcp, ends=ends)
        yield ends.enter_context(service.launch()), directory / "image"


@contextmanager
def client(running: Running, style: Style) -> Iterator[NbdClient]:
    with NbdClient(running.connect()) as connected:
        yield connected.negotiate(style)


@pytest.fixture(scope="session")
def bare() -> Contender:
    if shutil.which("cc") is None and "CI" not in os.environ:
        pytest.skip("not installed: cc")
    build_bare()
    return PEERS["bare"]


STYLES = pytest.mark.parametrize("style", [Style.SIMPLE, Style.STRUCTURED])


@STYLES
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_bare_reads_what_is_in_the_image(bare: Contender, style: Style, tcp: bool) -> None:
    with served(bare, tcp=tcp) as (running, image), client(running, style) as connection:
        content = image.read_bytes()

        for offset, length in [(0, 512), (7, 4096), (1000, 40000), (0, MIB)]:
            assert connection.read(offset, length) == content[offset : offset + length]


@STYLES
def test_bare_answers_a_batch_of_requests_of_all_sizes(bare: Contender, style: Style) -> None:
    with served(bare) as (running, image), client(running, style) as connection:
        content = image.read_bytes()
        ranges = [(1000 * n, 100 + 500 * n) for n in range(100)]

        with connection.batched():
            cookies = [connection.send(Command.READ, offset, length) for offset, length in ranges]
        replies = connection.replies(len(ranges))

        assert [replies[cookie].data for cookie in cookies] == [content[a : a + length] for a, length in ranges]


@STYLES
def test_bare_answers_more_requests_than_fit_into_one_gather_write(bare: Contender, style: Style) -> None:
    with served(bare) as (running, _), client(running, style) as connection:
        with connection.batched():
            for _ in range(3000):
                connection.send(Command.READ, 0, 16)

        assert len(connection.replies(3000)) == 3000


@STYLES
@pytest.mark.parametrize("length", [512, 100_000, 400_000])
def test_bare_writes_what_it_is_sent(bare: Contender, style: Style, length: int) -> None:
    data = os.urandom(length)
    with served(bare) as (running, image), client(running, style) as connection:
        for offset in (5, 500_000):
            connection.write(offset, data)
        reply = connection.call(Command.FLUSH)

        content = image.read_bytes()

    assert not reply.error
    assert content[5 : 5 + length] == content[500_000 : 500_000 + length] == data
    assert len(content) == MIB


@STYLES
def test_bare_refuses_what_is_beyond_the_end_and_stays_in_step(bare: Contender, style: Style) -> None:
    with served(bare) as (running, image), client(running, style) as connection:
        replies = [
            connection.call(Command.READ, MIB - 1, 2),
            connection.call(Command.WRITE, MIB, 10, data=bytes(10)),
            connection.call(Command.TRIM, 0, 512),
        ]

        assert [reply.error for reply in replies] == [NbdError.EINVAL] * 3
        assert connection.read(0, 4096) == image.read_bytes()[:4096]


def test_bare_says_which_version_it_is(bare: Contender) -> None:
    assert bare.version() == "bare, a loop in C"


def test_bare_is_not_compiled_without_need(bare: Contender, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = BARE.stat().st_mtime_ns

    build_bare()

    assert BARE.stat().st_mtime_ns == before


def test_bare_is_compiled_when_it_is_not_there(
    bare: Contender, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("benchmarks.servers.BARE", tmp_path / "made" / "bare")

    build_bare()

    assert os.access(tmp_path / "made" / "bare", os.X_OK)


def test_missing_compiler_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("benchmarks.servers.BARE", tmp_path / "bare")

    with pytest.raises(BenchmarkError, match="not installed: cc"):
        build_bare()


IN_NBDKIT = [
    pytest.param(PEERS[name], marks=pytest.mark.interop)
    for name in ("nbdkit-python", "nbdkit-python-parallel", "nbdkit-delayed")
]


@pytest.mark.parametrize(
    "contender", [ours("bytearray"), ours("delayed"), *IN_NBDKIT], ids=lambda contender: contender.source
)
def test_disk_of_our_own_or_its_peers_gives_back_what_was_written(contender: Contender) -> None:
    if shutil.which(contender.invocation[0]) is None and "CI" not in os.environ:
        pytest.skip(f"not installed: {contender.invocation[0]}")
    data = os.urandom(5000)
    with served(contender) as (running, _), client(running, Style.STRUCTURED) as connection:
        connection.write(1000, data)

        assert connection.size == MIB
        assert connection.read(0, 10000) == bytes(1000) + data + bytes(4000)

"""qemu-img and qemu-io against the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.interop.harness import MIB, Servers, Tool, allocated, empty_image, full_image, sha256, sparse_image

pytestmark = pytest.mark.interop

SIZE = 32 * MIB
DATA = {0: 2 * MIB, 10 * MIB: 5 * MIB, SIZE - 65536: 65536}
SLACK = MIB

#: What qemu-io prints after a comparison that fails; its exit status alone does not tell.
FAILURE = re.compile(r"fail|error|mismatch|invalid", re.IGNORECASE)


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    return sparse_image(tmp_path / "sparse.img", SIZE, DATA)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return empty_image(tmp_path / "target.img", SIZE)


def qemu_io_commands(qemu_io: Tool, uri: str, *commands: str) -> str:
    """Run these commands of qemu-io, all of which have to succeed."""
    output = qemu_io("-f", "raw", *(word for command in commands for word in ("-c", command)), uri)
    assert not FAILURE.search(output), output
    return output


def data_of(qemu_img: Tool, uri: str) -> list[tuple[int, int]]:
    """Return offset and length of what qemu-img says is data."""
    found: list[dict[str, Any]] = qemu_img.json("map", "--output=json", "-f", "raw", uri)
    assert sum(extent["length"] for extent in found) == SIZE
    return [(extent["start"], extent["length"]) for extent in found if extent["data"]]


def test_info_tells_size_and_format(serve: Servers, qemu_img: Tool) -> None:
    server = serve("memory", str(SIZE))

    found = qemu_img.json("info", "--output=json", server.uri)

    assert (found["virtual-size"], found["format"]) == (SIZE, "raw")


def test_map_shows_the_holes_of_a_file_as_they_are(serve: Servers, qemu_img: Tool, sparse: Path) -> None:
    server = serve("file", sparse)

    assert data_of(qemu_img, server.uri) == list(DATA.items())


@pytest.mark.parametrize("options", [[], ["-W", "-m", "16"]], ids=" ".join)
def test_images_are_converted_onto_a_file_and_back(
    serve: Servers, qemu_img: Tool, sparse: Path, target: Path, tmp_path: Path, options: list[str]
) -> None:
    server, back = serve("file", target), tmp_path / "back.img"
    convert = ["convert", *options, "-f", "raw", "-O", "raw"]

    qemu_img(*convert, "-n", sparse, server.uri)
    qemu_img(*convert, server.uri, back)

    qemu_img("compare", "-s", "-f", "raw", "-F", "raw", sparse, server.uri)
    assert sha256(back) == sha256(target) == sha256(sparse)
    assert max(allocated(target), allocated(back)) <= sum(DATA.values()) + SLACK
    assert data_of(qemu_img, server.uri) == list(DATA.items())


def test_convert_without_looking_for_zeroes_writes_them(
    serve: Servers, qemu_img: Tool, sparse: Path, target: Path
) -> None:
    server = serve("file", target)

    qemu_img("convert", "-S", "0", "-f", "raw", "-O", "raw", "-n", sparse, server.uri)

    assert sha256(target) == sha256(sparse)


def test_images_are_converted_to_memory_and_back(serve: Servers, qemu_img: Tool, sparse: Path, tmp_path: Path) -> None:
    server, back = serve("memory", str(SIZE)), tmp_path / "back.img"

    qemu_img("convert", "-f", "raw", "-O", "raw", "-n", "-W", sparse, server.uri)
    qemu_img("convert", "-f", "raw", "-O", "raw", server.uri, back)

    assert sha256(back) == sha256(sparse)
    assert data_of(qemu_img, server.uri) == list(DATA.items())


def test_convert_zeroes_what_was_in_the_target(serve: Servers, qemu_img: Tool, sparse: Path, tmp_path: Path) -> None:
    target = full_image(tmp_path / "target.img", SIZE)
    server = serve("file", target)

    qemu_img("convert", "-f", "raw", "-O", "raw", "-n", sparse, server.uri)

    assert sha256(target) == sha256(sparse)


def test_compare_finds_the_one_byte_that_differs(serve: Servers, qemu_img: Tool, sparse: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(sparse.read_bytes())
    with other.open("r+b") as stream:
        stream.seek(20 * MIB)
        stream.write(b"\x01")
    server, second = serve("-r", "file", sparse), serve("-r", "file", other)

    output = qemu_img("compare", "-f", "raw", "-F", "raw", server.uri, second.uri, status=1)

    assert f"offset {20 * MIB}" in output


def test_a_qcow2_image_lives_on_an_export(serve: Servers, qemu_img: Tool, sparse: Path) -> None:
    server = serve("memory", "40M")

    qemu_img("create", "-f", "qcow2", server.uri, str(SIZE))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-n", sparse, server.uri)

    qemu_img("check", "-f", "qcow2", server.uri)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", sparse, server.uri)


@pytest.mark.parametrize("words", [["memory", "32M"], ["file"], ["--no-sr", "file"], ["-t", "1", "file"]], ids=" ".join)
def test_io_of_every_kind_does_what_it_says(serve: Servers, qemu_io: Tool, target: Path, words: list[str]) -> None:
    server = serve(*words, *([target] if words[-1] == "file" else []))

    qemu_io_commands(
        qemu_io,
        server.uri,
        "read -P 0 0 1M",
        "write -P 0x5a 0 4M",
        "write -f -P 0x5b 1M 64k",
        "flush",
        "read -P 0x5a 0 1M",
        "read -P 0x5b 1M 64k",
        "write -z 64k 64k",
        "write -z -u 256k 64k",
        "write -z -f 512k 64k",
        "write -z -n 640k 64k",
        "read -P 0 64k 64k",
        "read -P 0 256k 64k",
        "read -P 0 512k 64k",
        "read -P 0x5a 0 64k",
        "read -P 0x5a 128k 128k",
        "read -P 0x5a 320k 192k",
        "discard 2M 1M",
        "discard 3333k 333k",
        "read -P 0x5a 3M 256k",
        f"write -P 0xff {SIZE - 1} 1",
        f"read -P 0xff {SIZE - 1} 1",
        "write -P 0x11 1000001 13",
        "read -P 0x11 1000001 13",
        "writev -P 0x22 5M 4k 8k 12k",
        "readv -P 0x22 5M 12k 12k",
        "flush",
    )


def test_asynchronous_io_does_what_it_says(serve: Servers, qemu_io: Tool, target: Path) -> None:
    server = serve("file", target)

    writes = [f"aio_write -P {number + 1} {number * 256}k 256k" for number in range(32)]
    zeroes = [f"aio_write -z -u {number * 256 + 64}k 64k" for number in range(32)]
    reads = [f"aio_read -P {number + 1} {number * 256 + 128}k 128k" for number in range(32)]
    qemu_io_commands(qemu_io, server.uri, *writes, "aio_flush", *zeroes, "aio_flush", *reads, "aio_flush", "flush")

    written = target.read_bytes()
    for number in range(32):
        piece = written[number * (256 << 10) : (number + 1) * (256 << 10)]
        expected = bytes([number + 1]) * len(piece)
        assert piece == expected[: 64 << 10] + bytes(64 << 10) + expected[128 << 10 :]


def test_discarded_ranges_become_holes(serve: Servers, qemu_io: Tool, tmp_path: Path) -> None:
    image = full_image(tmp_path / "disk.img", 16 * MIB)
    server = serve("file", image)

    qemu_io("-f", "raw", "-d", "unmap", "-c", "discard 4M 8M", "-c", "flush", server.uri)

    assert allocated(image) <= 8 * MIB + SLACK


def test_a_read_only_export_cannot_be_opened_for_writing(serve: Servers, qemu_io: Tool, sparse: Path) -> None:
    server = serve("-r", "file", sparse)
    before = sha256(sparse)

    qemu_io("-f", "raw", "-c", "write -P 1 0 64k", server.uri, status=1)
    qemu_io("-r", "-f", "raw", "-c", "read 0 64k", server.uri)

    assert sha256(sparse) == before


def test_bench_finishes_with_64_requests_in_flight(serve: Servers, qemu_img: Tool, target: Path) -> None:
    server = serve("file", target)

    output = qemu_img(
        "bench", "-f", "raw", "-w", "-c", "4000", "-d", "64", "-s", "4k", "--flush-interval=500", server.uri
    )

    assert "Run completed" in output

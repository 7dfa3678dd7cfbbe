"""nbdcopy to and from the server: what arrives is what was sent, and holes stay holes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.interop.harness import (
    GIB,
    MIB,
    Servers,
    Tool,
    allocated,
    empty_image,
    full_image,
    sha256,
    sparse_image,
)

pytestmark = pytest.mark.interop

SIZE = 48 * MIB
DATA = {0: 4 * MIB, 17 * MIB: 10 * MIB, 32 * MIB + 8192: 64 << 10, SIZE - MIB: MIB}

#: What a file system may use beside the data.
SLACK = MIB


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_image(tmp_path_factory.mktemp("sparse") / "sparse.img", SIZE, DATA)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_image(tmp_path_factory.mktemp("full") / "full.img", 32 * MIB)


def map_of(nbdinfo: Tool, uri: str) -> list[tuple[int, int, int]]:
    found: list[dict[str, Any]] = nbdinfo.json("--map", "--json", uri)
    return [(extent["offset"], extent["length"], extent["type"]) for extent in found]


@pytest.mark.parametrize(
    "options",
    [[], ["--synchronous"], ["--connections=1"], ["--connections=4", "--requests=64"], ["--request-size=32768"]],
    ids=" ".join,
)
def test_a_sparse_file_is_copied_out_with_its_holes(
    serve: Servers, nbdcopy: Tool, sparse: Path, tmp_path: Path, options: list[str]
) -> None:
    server = serve("-r", "file", sparse)

    nbdcopy(*options, server.uri, tmp_path / "copy.img")

    assert sha256(tmp_path / "copy.img") == sha256(sparse)
    assert allocated(tmp_path / "copy.img") <= sum(DATA.values()) + SLACK


@pytest.mark.parametrize("options", [[], ["--synchronous"], ["--connections=4", "--requests=64"]], ids=" ".join)
def test_a_sparse_file_is_copied_in_with_its_holes(
    serve: Servers, nbdcopy: Tool, nbdinfo: Tool, sparse: Path, tmp_path: Path, options: list[str]
) -> None:
    target = empty_image(tmp_path / "target.img", SIZE)
    server, source = serve("file", target), serve("-r", "file", sparse)

    nbdcopy(*options, "--flush", sparse, server.uri)

    assert sha256(target) == sha256(sparse)
    assert allocated(target) <= sum(DATA.values()) + SLACK
    assert map_of(nbdinfo, server.uri) == map_of(nbdinfo, source.uri)


def test_a_full_file_is_copied_in_and_out(serve: Servers, nbdcopy: Tool, full: Path, tmp_path: Path) -> None:
    target = empty_image(tmp_path / "target.img", full.stat().st_size)
    server = serve("file", target)

    nbdcopy("--flush", full, server.uri)
    nbdcopy(server.uri, tmp_path / "copy.img")

    assert sha256(target) == sha256(tmp_path / "copy.img") == sha256(full)


def test_what_was_in_the_target_is_zeroed_where_the_source_has_holes(
    serve: Servers, nbdcopy: Tool, sparse: Path, tmp_path: Path
) -> None:
    target = full_image(tmp_path / "target.img", SIZE)
    server = serve("file", target)

    nbdcopy("--flush", sparse, server.uri)

    assert sha256(target) == sha256(sparse)
    assert allocated(target) <= sum(DATA.values()) + SLACK


def test_allocated_leaves_no_holes(serve: Servers, nbdcopy: Tool, sparse: Path, tmp_path: Path) -> None:
    target = empty_image(tmp_path / "target.img", SIZE)
    server = serve("file", target)

    nbdcopy("--allocated", "--flush", sparse, server.uri)

    assert sha256(target) == sha256(sparse)
    assert allocated(target) >= SIZE


@pytest.mark.parametrize("image", ["sparse", "full"])
def test_memory_gives_back_what_it_was_given(
    serve: Servers, nbdcopy: Tool, nbdinfo: Tool, sparse: Path, full: Path, tmp_path: Path, image: str
) -> None:
    source = {"sparse": sparse, "full": full}[image]
    server, original = serve("memory", str(source.stat().st_size)), serve("-r", "file", source)

    nbdcopy("--flush", source, server.uri)
    nbdcopy(server.uri, tmp_path / "copy.img")

    assert sha256(tmp_path / "copy.img") == sha256(source)
    assert allocated(tmp_path / "copy.img") <= allocated(source) + SLACK
    assert map_of(nbdinfo, server.uri) == map_of(nbdinfo, original.uri)


@pytest.mark.parametrize("options", [["--no-sr"], ["--no-mc"], ["-t", "1"], ["-o"]], ids=" ".join)
def test_copies_are_right_with_less_of_the_protocol(
    serve: Servers, nbdcopy: Tool, sparse: Path, tmp_path: Path, options: list[str]
) -> None:
    target = empty_image(tmp_path / "target.img", SIZE)

    nbdcopy("--flush", serve(*options, "-r", "file", sparse).uri, serve(*options, "file", target).uri)

    assert sha256(target) == sha256(sparse)


def test_one_server_is_copied_to_another_over_tcp(serve: Servers, nbdcopy: Tool, sparse: Path, tmp_path: Path) -> None:
    target = empty_image(tmp_path / "target.img", SIZE)

    nbdcopy("--flush", serve.tcp("-r", "file", sparse).uri, serve.tcp("file", target).uri)

    assert sha256(target) == sha256(sparse)
    assert allocated(target) <= sum(DATA.values()) + SLACK


def test_a_gigabyte_in_memory_is_read_through(serve: Servers, nbdcopy: Tool) -> None:
    server = serve("memory", str(GIB))

    nbdcopy("--no-extents", server.uri, "null:")


def test_a_file_without_its_page_cache_is_copied_rightly(
    serve: Servers, nbdcopy: Tool, full: Path, tmp_path: Path
) -> None:
    server = serve("-r", "file", full, "cache=none", "fadvise=sequential")

    nbdcopy(server.uri, tmp_path / "copy.img")

    assert sha256(tmp_path / "copy.img") == sha256(full)


def test_the_last_copy_ends_a_server_with_exitlast(serve: Servers, nbdcopy: Tool, sparse: Path, tmp_path: Path) -> None:
    server = serve("--filter=exitlast", "-r", "file", sparse)

    nbdcopy("--connections=4", server.uri, tmp_path / "copy.img")

    assert server.wait() == []
    assert sha256(tmp_path / "copy.img") == sha256(sparse)

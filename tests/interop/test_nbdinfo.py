"""nbdinfo against the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.interop.harness import GIB, MIB, Servers, Tool, sparse_image

pytestmark = pytest.mark.interop

#: nbdinfo --can and --is; a disk of which all of it is true, or is not.
ABILITIES = ("cache", "df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero")
WRITING = {"fast-zero", "fua", "trim", "write", "zero"}

#: Exit statuses of nbdinfo.
YES, NO = 0, 2


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse_image(tmp_path / "disk.img", 16 * MIB, {0: MIB, 8 * MIB: 64 << 10, 15 * MIB: MIB})


def only_export(found: Any) -> dict[str, Any]:
    (export,) = found["exports"]
    assert isinstance(export, dict)
    return export


def test_json_tells_what_there_is(serve: Servers, nbdinfo: Tool) -> None:
    server = serve("memory", "1G")

    found = nbdinfo.json("--json", server.uri)

    export = only_export(found)
    assert (found["protocol"], found["TLS"], found["structured"]) == ("newstyle-fixed", False, True)
    assert (export["export-name"], export["export-size"], export["content"]) == ("", GIB, "data")
    assert export["contexts"] == ["base:allocation"]
    offered = ("can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero")
    assert all(export[each] for each in offered)
    assert not any(export[each] for each in ("is_read_only", "is_rotational"))
    sizes = [export[f"block_size_{each}"] for each in ("minimum", "preferred", "maximum")]
    assert sizes == [1, 4096, 64 * MIB]


def test_json_tells_of_a_read_only_disk(serve: Servers, nbdinfo: Tool, image: Path) -> None:
    server = serve("-r", "file", image)

    export = only_export(nbdinfo.json("--json", server.uri))

    assert export["is_read_only"]
    assert not any(export[each] for each in ("can_fast_zero", "can_fua", "can_trim", "can_zero"))
    assert export["export-size"] == 16 * MIB


@pytest.mark.parametrize(
    ("options", "protocol", "structured"),
    [
        (["--no-sr"], "newstyle-fixed", False),
        (["--mask-handshake=0"], "newstyle", False),
        (["-o"], "oldstyle", False),
    ],
)
def test_json_tells_of_the_protocol(
    serve: Servers, nbdinfo: Tool, options: list[str], protocol: str, structured: bool
) -> None:
    server = serve(*options, "memory", "1M")

    found = nbdinfo.json("--json", server.uri)

    assert (found["protocol"], found["structured"]) == (protocol, structured)
    assert only_export(found)["export-size"] == MIB


def test_map_shows_the_holes_of_a_file_as_they_are(serve: Servers, nbdinfo: Tool, image: Path) -> None:
    server = serve("file", image)

    found = nbdinfo.json("--map", "--json", server.uri)

    hole = 3
    assert [(extent["offset"], extent["length"], extent["type"]) for extent in found] == [
        (0, MIB, 0),
        (MIB, 7 * MIB, hole),
        (8 * MIB, 64 << 10, 0),
        (8 * MIB + (64 << 10), 7 * MIB - (64 << 10), hole),
        (15 * MIB, MIB, 0),
    ]


def test_map_of_a_terabyte_in_memory_is_one_hole(serve: Servers, nbdinfo: Tool) -> None:
    server = serve("memory", "1T")

    found = nbdinfo.json("--map", "--json", "--totals", server.uri)

    assert [(total["size"], total["type"]) for total in found] == [(1 << 40, 3)]


def test_map_cannot_be_had_without_meta_contexts(serve: Servers, nbdinfo: Tool) -> None:
    server = serve("--no-mc", "memory", "1M")

    nbdinfo("--map", server.uri, status=1)


def test_can_is_answered_for_each_ability(serve: Servers, nbdinfo: Tool) -> None:
    writable, readonly = serve("memory", "1M"), serve("-r", "memory", "1M")

    for ability in ABILITIES:
        nbdinfo("--can", ability, writable.uri, status=YES)
        nbdinfo("--can", ability, readonly.uri, status=NO if ability in WRITING else YES)


def test_is_is_answered(serve: Servers, nbdinfo: Tool) -> None:
    writable, readonly = serve("memory", "1M"), serve("-r", "memory", "1M")

    nbdinfo("--is", "read-only", writable.uri, status=NO)
    nbdinfo("--is", "read-only", readonly.uri, status=YES)
    nbdinfo("--is", "rotational", writable.uri, status=NO)


def test_list_shows_the_files_of_a_directory(serve: Servers, nbdinfo: Tool, tmp_path: Path) -> None:
    directory = tmp_path / "images"
    directory.mkdir()
    for number, name in enumerate(["a.img", "b c.img", "日本語"], start=1):
        sparse_image(directory / name, number * MIB, {})
    server = serve("file", f"dir={directory}")

    found = nbdinfo.json("--list", "--json", server.uri)

    sizes = {export["export-name"]: export["export-size"] for export in found["exports"]}
    assert sizes == {"a.img": MIB, "b c.img": 2 * MIB, "日本語": 3 * MIB}


def test_list_shows_the_default_export(serve: Servers, nbdinfo: Tool) -> None:
    server = serve("memory", "1M")

    found = nbdinfo.json("--list", "--json", server.uri)

    assert only_export(found)["export-name"] == ""


@pytest.mark.parametrize("where", [["-4"], ["-i", "127.0.0.1"], ["-i", "::1"], ["-i", "any"], []], ids=" ".join)
def test_tcp_is_reached_by_the_uri_that_is_printed(serve: Servers, nbdinfo: Tool, where: list[str]) -> None:
    server = serve.at(*where, "-p", "0", "memory", "1M")

    assert nbdinfo("--size", server.uri).strip() == str(MIB)


def test_ipv6_alone_is_reached_by_its_address(serve: Servers, nbdinfo: Tool) -> None:
    server = serve.at("-6", "-p", "0", "memory", "1M")

    assert nbdinfo("--size", f"nbd://[::1]:{server.port}").strip() == str(MIB)
    nbdinfo("--size", f"nbd://127.0.0.1:{server.port}", status=1)


def test_a_unix_socket_with_an_odd_path_is_reached_by_the_uri(serve: Servers, nbdinfo: Tool, tmp_path: Path) -> None:
    path = tmp_path / "a b&c=%?#é.sock"
    server = serve.at("-U", path, "memory", "1M")

    assert nbdinfo("--size", server.uri).strip() == str(MIB)

    server.end()
    assert not path.exists()


def test_an_export_that_does_not_exist_cannot_be_opened(serve: Servers, nbdinfo: Tool, tmp_path: Path) -> None:
    server = serve("-e", "absent", "file", f"dir={tmp_path}")

    nbdinfo("--size", server.uri, status=1)

    (line,) = server.end()
    assert 'cannot open export "absent"' in line

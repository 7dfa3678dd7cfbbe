"""The newest clients against the server: extended headers, and lengths of more than 32 bits.

They are in a root directory that NBDKITPY_NEWEST_PEERS names, with libnbd (1.18 at least, its tools and its Python
binding) and qemu, since no stable Debian has them all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.interop.harness import (
    GIB,
    MIB,
    SCRIPTS,
    Server,
    Servers,
    allocated,
    empty_image,
    make_distribution,
    run,
    sha256,
    sparse_image,
)

pytestmark = pytest.mark.interop

SIZE = 48 * MIB
DATA = {0: 4 * MIB, 17 * MIB: 10 * MIB, SIZE - MIB: MIB}
SLACK = MIB

#: A filter that writes down the calls that pass.
RECORDER = """
from nbdkitpy import Filter, FilterHandle, Parameter, hookimpl, parse_path


class RecordingHandle(FilterHandle):
    def __init__(self, next, log):
        super().__init__(next)
        self.log = log

    def record(self, verb, count, offset):
        with open(self.log, "a") as log:
            print(verb, count, offset, file=log)

    def zero(self, count, offset, flags):
        self.record("zero", count, offset)
        self.next.zero(count, offset, flags)

    def trim(self, count, offset, flags):
        self.record("trim", count, offset)
        self.next.trim(count, offset, flags)

    def cache(self, count, offset):
        self.record("cache", count, offset)
        self.next.cache(count, offset)

    def extents(self, count, offset, flags):
        self.record("extents", count, offset)
        return self.next.extents(count, offset, flags)


class Recorder(Filter):
    name = "recorder"
    log = Parameter(parse_path, required=True)

    def wrap(self, handle, client):
        return RecordingHandle(handle, self.log)


@hookimpl
def register_filters(register):
    register(Recorder)
"""


class Newest:
    """The newest clients, by their names."""

    def __init__(self, root: str) -> None:
        self._root = root

    def __call__(self, *argv: str, text: str | None = None) -> str:
        """Run one of them, and return its standard output."""
        return run(["chroot", self._root, *argv], text=text)

    def json(self, *argv: str, text: str | None = None) -> Any:
        """Run one of them, and return what its standard output says as JSON."""
        return json.loads(self(*argv, text=text))


@pytest.fixture(scope="module")
def newest() -> Newest:
    root = os.environ.get("NBDKITPY_NEWEST_PEERS")
    if not root:
        pytest.skip("NBDKITPY_NEWEST_PEERS names no directory with the newest clients, which apt cannot install")
    if os.geteuid() != 0 or shutil.which("chroot") is None:
        pytest.skip("only root may chroot to the newest clients")
    return Newest(root)


def uri_of(server: Server) -> str:
    """Return a URI for which no name has to be looked up."""
    return f"nbd://127.0.0.1:{server.port}"


@pytest.fixture
def recorded(serve: Servers, tmp_path: Path) -> tuple[Server, Path]:
    """Eight GiB in memory, and the file in which the calls are written down."""
    make_distribution(tmp_path, "recorder", filters=RECORDER)
    log = tmp_path / "calls"
    log.touch()
    env = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    return serve.tcp("--filter=recorder", "memory", "8G", f"log={log}", env=env), log


def calls(log: Path, verb: str) -> list[tuple[int, int]]:
    """Return count and offset of each call of `verb`."""
    words = [line.split() for line in log.read_text().splitlines()]
    return [(int(count), int(offset)) for found, count, offset in words if found == verb]


def test_five_gib_are_one_request_with_libnbd(newest: Newest, recorded: tuple[Server, Path]) -> None:
    server, log = recorded
    length = 5 * GIB

    found = newest.json(
        "python3", "-", uri_of(server), str(length), text=(SCRIPTS / "extended.py").read_text(encoding="utf-8")
    )

    assert found["protocol"] == "newstyle-fixed"
    hole, data = 3, 0
    assert found["before"] == [[MIB, hole], [MIB, data], [length - 3 * MIB, hole], [MIB, data]]
    assert found["after"] == [[length, hole]]
    assert calls(log, "zero") == calls(log, "trim") == calls(log, "cache") == [(length, 0)]
    assert [call for call in calls(log, "extents") if call[0] == length] == [(length, 0)] * 2


def test_nbdinfo_sees_extended_headers(newest: Newest, serve: Servers) -> None:
    found = newest.json("nbdinfo", "--json", uri_of(serve.tcp("memory", "8G")))

    assert found["extended"] is True
    assert found["exports"][0]["export-size"] == 8 * GIB


def test_nbdinfo_maps_more_than_4_gib_by_one_request(newest: Newest, recorded: tuple[Server, Path]) -> None:
    server, log = recorded

    found = newest.json("nbdinfo", "--map", "--json", uri_of(server))

    assert [(extent["offset"], extent["length"], extent["type"]) for extent in found] == [(0, 8 * GIB, 3)]
    assert calls(log, "extents") == [(8 * GIB, 0)]


def test_qemu_img_maps_more_than_4_gib(newest: Newest, recorded: tuple[Server, Path]) -> None:
    server, _ = recorded

    found = newest.json("qemu-img", "map", "--output=json", "-f", "raw", uri_of(server))

    assert sum(extent["length"] for extent in found) == 8 * GIB
    assert not any(extent["data"] for extent in found)


@pytest.fixture
def pair(serve: Servers, tmp_path: Path) -> tuple[Path, Server, Path, Server]:
    """A sparse file and an empty one, each with its server."""
    source, target = (
        sparse_image(tmp_path / "source.img", SIZE, DATA),
        empty_image(tmp_path / "target.img", SIZE),
    )
    return source, serve.tcp("-r", "file", source), target, serve.tcp("file", target)


def test_nbdcopy_copies_with_extended_headers(newest: Newest, pair: tuple[Path, Server, Path, Server]) -> None:
    source, source_server, target, target_server = pair

    newest("nbdcopy", "--flush", uri_of(source_server), uri_of(target_server))

    assert sha256(target) == sha256(source)
    assert allocated(target) <= sum(DATA.values()) + SLACK


def test_qemu_img_converts_with_extended_headers(newest: Newest, pair: tuple[Path, Server, Path, Server]) -> None:
    source, source_server, target, target_server = pair
    uris = uri_of(source_server), uri_of(target_server)

    newest("qemu-img", "convert", "-f", "raw", "-O", "raw", "-n", "-W", *uris)

    newest("qemu-img", "compare", "-s", "-f", "raw", "-F", "raw", *uris)
    assert sha256(target) == sha256(source)
    assert allocated(target) <= sum(DATA.values()) + SLACK


@pytest.mark.parametrize("script", ["commands.py", "pipeline.py", "multi_conn.py"])
def test_all_that_the_older_libnbd_does_the_newest_does_too(newest: Newest, serve: Servers, script: str) -> None:
    args = {"commands.py": ["1", "1"], "pipeline.py": ["1000"], "multi_conn.py": []}[script]
    server = serve.tcp("memory", "64M")

    newest("python3", "-", uri_of(server), *args, text=(SCRIPTS / script).read_text(encoding="utf-8"))

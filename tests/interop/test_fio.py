"""fio's nbd engine against the server: everything that was written is read back and verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.interop.harness import MIB, Servers, Tool, empty_image, missing

pytestmark = pytest.mark.interop

JOBS = 4
EACH = 6 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return empty_image(tmp_path / "disk.img", JOBS * EACH)


def run_fio(fio: Tool, uri: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run jobs, each on a part of the disk of its own; return what fio reports of all of them together."""
    if "nbd" not in fio("--enghelp").split():
        missing("this fio has no nbd engine")
    result = tmp_path / "fio.json"  # on standard output there are other lines too
    fio(
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--numjobs={JOBS}",
        f"--size={EACH}",
        f"--offset_increment={EACH}",
        "--group_reporting",
        "--verify_state_save=0",  # a file in the current directory
        "--output-format=json",
        f"--output={result}",
        *options,
    )
    (job,) = json.loads(result.read_text())["jobs"]
    assert job["error"] == 0
    assert isinstance(job, dict)
    return job


@pytest.mark.parametrize("words", [["file"], ["--no-sr", "file"], ["-t", "1", "file"], ["memory", "24M"]], ids=" ".join)
def test_four_jobs_at_depth_64_read_what_they_wrote(
    serve: Servers, fio: Tool, image: Path, tmp_path: Path, words: list[str]
) -> None:
    server = serve(*words, *([image] if words[-1] == "file" else []))

    job = run_fio(
        fio,
        server.uri,
        tmp_path,
        "--rw=randwrite",
        "--iodepth=64",
        "--bsrange=4k-64k",
        "--verify=crc32c",
        "--verify_fatal=1",
    )

    assert job["write"]["io_bytes"] >= JOBS * EACH
    assert job["read"]["io_bytes"] >= JOBS * EACH
    assert job["iodepth_level"][">=64"] > 0


def test_jobs_pass_through_filters_over_tcp(serve: Servers, fio: Tool, image: Path, tmp_path: Path) -> None:
    server = serve.tcp("--filter=ip", "--filter=limit", "file", image, "allow=loopback", "deny=all", f"limit={JOBS}")

    run_fio(
        fio, server.uri, tmp_path, "--rw=randwrite", "--iodepth=64", "--bs=4k", "--verify=crc32c", "--verify_fatal=1"
    )


def test_reads_and_writes_mixed_have_no_errors(serve: Servers, fio: Tool, image: Path, tmp_path: Path) -> None:
    server = serve("file", image)

    job = run_fio(
        fio, server.uri, tmp_path, "--rw=randrw", "--iodepth=16", "--bs=4k", "--fsync=64", "--time_based", "--runtime=1"
    )

    assert job["read"]["total_ios"] > 0
    assert job["write"]["total_ios"] > 0


def test_trims_have_no_errors(serve: Servers, fio: Tool, image: Path, tmp_path: Path) -> None:
    server = serve("file", image)

    job = run_fio(fio, server.uri, tmp_path, "--rw=randtrim", "--iodepth=16", "--bs=64k")

    assert job["trim"]["io_bytes"] == JOBS * EACH

"""Filters under the same command line and the same random requests as nbdkit's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.harness import MIB, sparse_image
from tests.interop.sidebyside import IMAGE, SideBySide, random_requests
from tests.partitions import EXTENDED, LINUX, Entry, gpt_disk, mbr_disk

pytestmark = pytest.mark.interop

SIZE = 4 * MIB

#: Filter and parameters: fast zeroes are offered by our plugin file, and not by nbdkit's.
SAME_ON_FILES = [
    "offset",
    "offset offset=1M",
    "offset offset=1234567",
    "offset range=1M",
    "offset offset=4097 range=100001",
    "offset offset=4M",
    "readonly",
    "nozero",
    "nozero zeromode=emulate fastzeromode=none",
    "nozero zeromode=notrim fastzeromode=none",
    "nozero zeromode=plugin fastzeromode=none",
    "noextents",
    "fua",
    "fua fuamode=emulate",
    "fua fuamode=native",
    "fua fuamode=force",
    "fua fuamode=pass",
    "fua fuamode=discard",
    "noparallel",
    "noparallel serialize=all-requests",
    "noparallel serialize=connections",
]
#: What nbdkit 1.32 does not have.
NEWER = {"readonly": (1, 38)}

#: Fast zeroes are the same with the plugin memory, the extents of which are not as fine in nbdkit.
SAME_IN_MEMORY = [
    f"nozero zeromode={mode} fastzeromode={fast}"
    for mode in ("none", "emulate", "notrim", "plugin")
    for fast in ("default", "none", "slow", "ignore")
    if (mode, fast) != ("emulate", "ignore")  # against its manual, nbdkit does not ignore the flag then
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse_image(tmp_path / "disk.img", SIZE, {0: MIB // 2, MIB: MIB + 12345, SIZE - 8192: 4096})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        *(("", line) for line in SAME_ON_FILES),
        *(("-r", line) for line in ("offset offset=1M", "readonly", "nozero zeromode=plugin", "fua fuamode=force")),
        *(("--no-sr", line) for line in ("offset offset=1M", "noextents")),
    ],
)
def test_a_filter_before_a_file_is_like_nbdkits(side_by_side: SideBySide, image: Path, options: str, line: str) -> None:
    name, *parameters = line.split()
    side_by_side.nbdkit.needs(*NEWER.get(name, (1,)))

    outcome = side_by_side.compare(
        *options.split(),
        f"--filter={name}",
        "file",
        IMAGE,
        *parameters,
        requests=random_requests(f"{line} {options}", SIZE),
        image=image,
        fast_zero=False,
    )

    assert outcome is not None


@pytest.mark.parametrize("line", SAME_IN_MEMORY)
def test_fast_zeroes_of_a_disk_in_memory_are_like_nbdkits(side_by_side: SideBySide, line: str) -> None:
    name, *parameters = line.split()
    requests = random_requests(line, SIZE, verbs=("pwrite", "zero", "zero", "pread", "trim"))

    side_by_side.compare(f"--filter={name}", "memory", "4M", *parameters, requests=requests, ignored=["block_size"])


@pytest.mark.parametrize("exists", [False, True])
def test_readonly_file_is_like_nbdkits(side_by_side: SideBySide, image: Path, exists: bool) -> None:
    side_by_side.nbdkit.needs(1, 38)
    switch = "/" if exists else "/there/is/no/such/file"  # which is the same wherever nbdkit runs

    outcome = side_by_side.compare(
        "--filter=readonly",
        "file",
        IMAGE,
        f"readonly-file={switch}",
        requests=random_requests(1, SIZE),
        image=image,
        fast_zero=False,
    )

    assert outcome is not None
    assert ("EPERM" in outcome["answers"]) is exists
    assert not outcome["facts"]["read_only"]


@pytest.mark.parametrize("parameters", ["offset=4M range=1", "offset=5M", "range=5M"])
def test_a_range_outside_of_the_disk_is_refused_by_both(side_by_side: SideBySide, image: Path, parameters: str) -> None:
    assert side_by_side.compare("--filter=offset", "file", IMAGE, *parameters.split(), image=image) is None


# --- partitions -----------------------------------------------------------------------------------------------------

TABLES = {
    "MBR": mbr_disk(
        SIZE // 512,
        {
            0: [Entry(LINUX, 8, 100), Entry(), Entry(EXTENDED, 200, 1000), Entry(LINUX, 4000, 5000)],
            200: [Entry(LINUX, 2, 90), Entry(EXTENDED, 300, 20)],
            500: [Entry(LINUX, 1, 99), Entry(EXTENDED, 400, 20)],
            600: [Entry(), Entry(EXTENDED, 500, 9)],
            700: [Entry(LINUX, 3, 33)],
        },
    ),
    "a chain that is a circle": mbr_disk(
        SIZE // 512, {0: [Entry(EXTENDED, 64, 100)], 64: [Entry(LINUX, 2, 6), Entry(EXTENDED, 0, 20)]}
    ),
    "GPT": gpt_disk([(100, 199), None, (300, 300), (50, 40), (100, 9000), (1000, 8000)], sectors=SIZE // 512),
    "nothing": bytearray(SIZE),
}


@pytest.mark.parametrize(
    ("table", "number"),
    [
        *(("MBR", number) for number in range(1, 10)),
        *(("a chain that is a circle", number) for number in (5, 6)),
        *(("GPT", number) for number in range(1, 8)),
        ("nothing", 1),
    ],
)
def test_partitions_are_like_nbdkits(side_by_side: SideBySide, tmp_path: Path, table: str, number: int) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(TABLES[table])

    side_by_side.compare(
        "--filter=partition",
        "file",
        IMAGE,
        f"partition={number}",
        requests=random_requests(number, 50_000, 60, longest=20_000),
        image=image,
        fast_zero=False,
    )

"""The filters blocksize and cow do what nbdkit's do, request by request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.harness import MIB, sparse_image
from tests.interop.sidebyside import FLAGS, IMAGE, Request, SideBySide, random_requests

pytestmark = pytest.mark.interop

SIZE = 4 * MIB
ODD = SIZE + 1234


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse_image(tmp_path / "disk.img", ODD, {0: MIB, 2 * MIB: 3 << 12, 3 * MIB + 4096: 5 << 12})


BLOCKSIZES = [
    [],
    ["minblock=512"],
    ["minblock=4k", "maxdata=8k", "maxlen=64k"],
    ["minblock=64k"],
    ["maxdata=1000", "maxlen=70000"],
]


@pytest.mark.parametrize("parameters", BLOCKSIZES, ids=" ".join)
def test_blocksize_is_like_nbdkits(side_by_side: SideBySide, image: Path, parameters: list[str]) -> None:
    words = ("--filter=blocksize", "file", IMAGE, *parameters)

    side_by_side.compare(*words, requests=random_requests(2, SIZE), image=image, fast_zero=False)


#: nbdkit's cow has no zeroes of its own, and clients that are told so write them.
NO_ZERO = tuple(verb for verb in FLAGS if verb != "zero")
DIFFERENT = ("zero", "fast_zero")


def requests(seed: int) -> list[Request]:
    """Requests for both; where one extent is asked for, that of nbdkit's cow ends where the block does."""
    return [request.without("REQ_ONE") for request in random_requests(seed, SIZE, verbs=NO_ZERO)]


@pytest.mark.parametrize(
    "parameters",
    [[], ["cow-block-size=32k"], ["cow-on-read=true"], ["cow-on-cache=true"], ["cow-block-size=1M"]],
    ids=" ".join,
)
def test_cow_is_like_nbdkits(side_by_side: SideBySide, image: Path, parameters: list[str]) -> None:
    words = ("--filter=cow", "file", IMAGE, *parameters)

    side_by_side.compare(*words, requests=requests(3), image=image, ignored=DIFFERENT)


def test_cow_over_a_disk_that_clients_may_not_write_is_like_nbdkits(side_by_side: SideBySide, image: Path) -> None:
    words = ("-r", "--filter=cow", "file", IMAGE)

    side_by_side.compare(*words, requests=requests(4), image=image, ignored=DIFFERENT)


@pytest.mark.parametrize("order", [["blocksize", "cow"], ["cow", "blocksize"]], ids=" ".join)
def test_blocksize_and_cow_together_are_like_nbdkits(side_by_side: SideBySide, image: Path, order: list[str]) -> None:
    words = [*(f"--filter={name}" for name in order), "file", IMAGE, "minblock=4k", "maxdata=64k"]

    side_by_side.compare(*words, requests=requests(5), image=image, ignored=DIFFERENT)

"""The filters blocksize and cow do what nbdkit's do, request by request."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.harness import MIB, sparse_image
from tests.interop.sidebyside import IMAGE, SideBySide, random_requests

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

"""Plugins without filters do what nbdkit's do, request by request; and a difference does not go unnoticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.harness import MIB, sparse_image
from tests.interop.sidebyside import IMAGE, Request, SideBySide, _check, random_requests

pytestmark = pytest.mark.interop

SIZE = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return sparse_image(tmp_path / "disk.img", SIZE, {0: MIB, 4 * MIB: 2 * MIB, SIZE - 4096: 4096})


@pytest.mark.parametrize("options", [[], ["-r"], ["--no-sr"]], ids=" ".join)
def test_file_is_like_nbdkits(side_by_side: SideBySide, image: Path, options: list[str]) -> None:
    side_by_side.compare(*options, "file", IMAGE, requests=random_requests(1, SIZE), image=image, fast_zero=False)


def test_the_same_is_asked_of_both(side_by_side: SideBySide, image: Path) -> None:
    requests = [
        Request("pwrite", 512, 1024, ("FUA",), seed=1),
        Request("pread", 4096),
        Request("zero", MIB, MIB // 2, ("NO_HOLE",)),
        Request("extents", SIZE),
        Request("pread", 1, SIZE),
        Request("flush"),
    ]

    outcome = side_by_side.compare("file", IMAGE, requests=requests, image=image, fast_zero=False)

    assert outcome is not None
    assert outcome["facts"]["size"] == SIZE
    write, _, zero, extents, beyond, flush = outcome["answers"]
    assert (write, zero, beyond, flush) == (None, None, "EINVAL", None)
    assert sum(length for length, _ in extents) == SIZE


FACTS = {"size": 1, "block_size": [0, 0]}


@pytest.mark.parametrize(
    "theirs",
    [
        None,
        {"facts": {**FACTS, "size": 2}, "answers": ["EIO"], "content": "x"},
        {"facts": {**FACTS, "block_size": [512, 4096]}, "answers": ["EIO"], "content": "x"},
        {"facts": FACTS, "answers": [None], "content": "x"},
        {"facts": FACTS, "answers": ["EIO"], "content": "y"},
    ],
    ids=["refused", "size", "block size", "answer", "content"],
)
def test_a_difference_is_noticed(theirs: dict[str, object] | None) -> None:
    ours = {"facts": {**FACTS, "block_size": [1, 4096]}, "answers": ["EIO"], "content": "x"}

    with pytest.raises(AssertionError):
        _check([Request("flush")], ours, theirs)

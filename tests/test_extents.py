import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdkitpy import extents
from nbdkitpy.extents import MAX_EXTENTS, Extent, ExtentType, normalise_extents

DATA, HOLE, ZERO = ExtentType.DATA, ExtentType.HOLE, ExtentType.ZERO


def test_values_are_those_of_base_allocation() -> None:
    assert (int(DATA), int(HOLE), int(ZERO)) == (0, 1, 2)
    assert Extent(0, 1).type == DATA


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        pytest.param([(100, 50, HOLE)], [(100, 50, HOLE)], id="exactly the range"),
        pytest.param([(100, 20, HOLE)], [(100, 20, HOLE)], id="a beginning of the range"),
        pytest.param([(0, 1000, HOLE)], [(100, 50, HOLE)], id="clipped at both ends"),
        pytest.param([(90, 20, DATA), (110, 100, ZERO)], [(100, 10, DATA), (110, 40, ZERO)], id="clipped pair"),
        pytest.param([(0, 50, ZERO), (50, 50, DATA), (100, 50, HOLE)], [(100, 50, HOLE)], id="ends before offset"),
        pytest.param([(-5, 200, DATA)], [(100, 50, DATA)], id="begins before the disk"),
        pytest.param([(100, 1 << 80, DATA)], [(100, 50, DATA)], id="far too long"),
        pytest.param([(100, 5, 3), (105, 5, 3)], [(100, 10, 3)], id="equal neighbours merged"),
        pytest.param([(90, 15, 1), (105, 5, 1), (110, 9, 0)], [(100, 10, 1), (110, 9, 0)], id="merged after a cut"),
        pytest.param([(100, 5, 1), (105, 5, 2), (110, 5, 1)], [(100, 5, 1), (105, 5, 2), (110, 5, 1)], id="kept apart"),
        pytest.param([(100, 0, 1), (100, 5, 2)], [(100, 5, 2)], id="zero length skipped"),
        pytest.param([(100, 5, 1), (105, 0, 2), (105, 5, 1)], [(100, 10, 1)], id="merged over zero length"),
        pytest.param([(999, 0, 1), (100, 5, 2), (3, 0, 0)], [(100, 5, 2)], id="zero length anywhere"),
        pytest.param([(100, 50, 0), (7, 7, 7)], [(100, 50, 0)], id="nothing looked at past the range"),
    ],
)
def test_normalised(found: list[tuple[int, int, int]], expected: list[tuple[int, int, int]]) -> None:
    assert normalise_extents(found, 50, 100) == expected


def test_answer_is_of_extents() -> None:
    assert all(type(extent) is Extent for extent in normalise_extents([(0, 4, 0), (4, 4, 1)], 8, 0))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        pytest.param([], "no extent covers the offset 100", id="nothing"),
        pytest.param([(100, 0, 0)], "no extent covers the offset 100", id="only zero length"),
        pytest.param([(0, 100, 0)], "no extent covers the offset 100", id="all before offset"),
        pytest.param([(101, 5, 0)], "first extent begins at 101", id="begins late"),
        pytest.param([(200, 5, 0)], "first extent begins at 200", id="begins past the range"),
        pytest.param([(100, 5, 0), (106, 5, 0)], "extent at 106 does not begin .* at 105", id="gap"),
        pytest.param([(100, 5, 0), (104, 5, 0)], "extent at 104 does not begin .* at 105", id="overlap"),
        pytest.param([(100, 5, 0), (100, 5, 0)], "extent at 100 does not begin", id="twice the same"),
        pytest.param([(0, 50, 0), (60, 50, 0)], "extent at 60 does not begin", id="gap before offset"),
        pytest.param([(100, -1, 0)], "length -1", id="negative length"),
        pytest.param([(100, 5, 4)], "type 4", id="unknown type"),
        pytest.param([(100, 5, -1)], "type -1", id="negative type"),
        pytest.param([(100, 0, 4)], "type 4", id="unknown type at zero length"),
    ],
)
def test_refused(found: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalise_extents(found, 50, 100)


@pytest.mark.parametrize("nonsense", [(100.0, 50, 0), (100, 50.0, 0), (100, 50, 0.0), (100, 50, "1"), (100, None, 0)])
def test_what_is_not_of_integers_is_refused(nonsense: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not one that can be"):
        normalise_extents([nonsense], 50, 100)


@pytest.mark.parametrize("nonsense", [(), (100, 50), (100, 50, 0, 0)])
def test_what_is_no_triple_is_refused(nonsense: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="values to unpack"):
        normalise_extents([nonsense], 50, 100)


def _alternating() -> Iterator[tuple[int, int, int]]:
    return ((start, 1, start & 1) for start in itertools.count())


def test_no_more_is_taken_of_an_endless_answer_than_the_range_needs() -> None:
    found = _alternating()

    assert len(normalise_extents(found, 10, 5)) == 10
    assert next(found) == (15, 1, 1)


def test_at_most_so_many_extents_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extents, "MAX_EXTENTS", 3)

    assert normalise_extents(_alternating(), 1000, 0) == [(0, 1, 0), (1, 1, 1), (2, 1, 0)]


def test_last_extent_kept_still_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extents, "MAX_EXTENTS", 2)

    assert normalise_extents([(0, 1, 0), (1, 1, 1), (2, 5, 1), (7, 1, 0)], 100, 0) == [(0, 1, 0), (1, 6, 1)]


def test_the_limit_is_nbdkits() -> None:
    assert MAX_EXTENTS == 1048576


# --- against a model: a list with the type of each byte --------------------------------------------------------------


def _model(found: list[tuple[int, int, int]], count: int, offset: int) -> list[tuple[int, int, int]]:
    kinds = {at: kind for start, length, kind in found for at in range(start, start + length)}
    known = itertools.takewhile(lambda at: at in kinds, range(offset, offset + count))
    runs = [list(run) for _, run in itertools.groupby(known, key=kinds.__getitem__)]
    return [(run[0], len(run), kinds[run[0]]) for run in runs]


@st.composite
def _contiguous(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    start = draw(st.integers(0, 20))
    found = []
    for length, kind in draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=12)):
        found.append((start, length, kind))
        start += length
    return found


@settings(deadline=None)  # the machine may be busy
@given(_contiguous(), st.integers(1, 60), st.integers(20, 60))
def test_says_of_each_byte_what_the_answer_says(found: list[tuple[int, int, int]], count: int, offset: int) -> None:
    expected = _model(found, count, offset)

    if expected:
        assert normalise_extents(found, count, offset) == expected
    else:
        with pytest.raises(ValueError, match="no extent covers"):
            normalise_extents(found, count, offset)


_anything = st.lists(st.tuples(st.integers(-5, 40), st.integers(-2, 20), st.integers(-1, 5)), max_size=6)


@settings(deadline=None)  # the machine may be busy
@given(_anything, st.integers(1, 40), st.integers(0, 20))
def test_any_answer_gives_a_sound_list_or_value_error(
    found: list[tuple[int, int, int]], count: int, offset: int
) -> None:
    try:
        answer = normalise_extents(found, count, offset)
    except ValueError:
        return
    assert answer[0].offset == offset
    assert all(extent.length > 0 for extent in answer)
    assert all(a.offset + a.length == b.offset and a.type != b.type for a, b in itertools.pairwise(answer))
    assert answer[-1].offset + answer[-1].length <= offset + count

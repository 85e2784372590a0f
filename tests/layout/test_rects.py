"""Rectangles in integers: intersections, exact covers, flat intervals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkov_dist.errors import QkovError
from qkov_dist.layout.rects import Rect, check_exact_cover, first_overlap, merged, rects_of_flat_interval

sizes = st.integers(1, 7)


@st.composite
def rects(draw: st.DrawFn, bound: int = 8) -> Rect:
    row, row_end = sorted(draw(st.tuples(st.integers(0, bound), st.integers(0, bound))))
    col, col_end = sorted(draw(st.tuples(st.integers(0, bound), st.integers(0, bound))))
    return Rect(row, row_end, col, col_end)


def painted(*pieces: Rect, bound: int = 9) -> np.ndarray:
    """How often each element is covered: the dense oracle."""
    canvas = np.zeros((bound, bound), int)
    for piece in pieces:
        canvas[piece.rows, piece.cols] += 1
    return canvas


@settings(deadline=None)
@given(rects(), rects())
def test_an_intersection_holds_the_common_elements(a: Rect, b: Rect) -> None:
    both = a.intersect(b)
    common = (painted(a) > 0) & (painted(b) > 0)
    assert (both.area if both else 0) == common.sum()
    assert both == b.intersect(a)
    if both is None:
        assert not common.any()
    else:
        assert (painted(both) == common).all()


@settings(deadline=None)
@given(rects())
def test_area_shape_and_transpose_agree(rect: Rect) -> None:
    assert rect.area == painted(rect).sum() == rect.shape[0] * rect.shape[1]
    assert (painted(rect.transposed) == painted(rect).T).all()
    assert rect.transposed.transposed == rect


@settings(deadline=None)
@given(rects(), st.integers(-1, 9))
def test_split_rows_covers_exactly_in_bands(rect: Rect, max_rows: int) -> None:
    bands = rect.split_rows(max_rows)
    assert all(1 <= band.shape[0] <= max(max_rows, 1) for band in bands)
    if rect.area:
        check_exact_cover("bands", rect, bands)
    assert list(bands) == sorted(bands)


@settings(deadline=None)
@given(rects(), st.integers(-1, 30), st.integers(1, 4))
def test_split_covers_exactly_in_pieces_of_the_longer_side(rect: Rect, max_area: int, least: int) -> None:
    pieces = rect.split(max_area, least)
    if not rect.area:
        assert not pieces
        return
    check_exact_cover("pieces", rect, pieces)
    assert all(piece.area <= max(max_area, least) for piece in pieces)
    shorter, longer = sorted(rect.shape)
    if max_area >= shorter * min(least, longer):
        assert all(min(piece.shape) == shorter or max(piece.shape) == shorter for piece in pieces)


@settings(deadline=None)
@given(sizes, sizes, st.data())
def test_a_flat_interval_is_at_most_three_rectangles(num_rows: int, num_cols: int, data: st.DataObject) -> None:
    ends = st.integers(0, num_rows * num_cols)
    start, stop = sorted((data.draw(ends), data.draw(ends)))
    pieces = rects_of_flat_interval(start, stop, num_cols)
    flat = np.zeros(num_rows * num_cols, int)
    flat[start:stop] = 1
    assert len(pieces) <= 3
    canvas = painted(*pieces)
    assert (canvas[:num_rows, :num_cols] == flat.reshape(num_rows, num_cols)).all()
    assert canvas.sum() == stop - start


@settings(deadline=None)
@given(sizes, sizes, st.lists(st.integers(0, 49), max_size=4))
def test_cuts_of_a_flat_matrix_cover_it_exactly_once(num_rows: int, num_cols: int, cuts: list[int]) -> None:
    total = num_rows * num_cols
    edges = [0, *sorted(min(cut, total) for cut in cuts), total]
    pieces = [r for a, b in pairwise(edges) for r in rects_of_flat_interval(a, b, num_cols)]
    check_exact_cover("flat partition", Rect.of_shape(num_rows, num_cols), pieces)


@settings(deadline=None)
@given(st.lists(rects(), max_size=12))
def test_first_overlap_finds_one_exactly_where_there_is_one(pieces: list[Rect]) -> None:
    overlap = first_overlap(pieces)
    assert (overlap is not None) == bool((painted(*pieces) > 1).any())
    if overlap:
        assert overlap[0].intersect(overlap[1])


@settings(deadline=None)
@given(st.lists(rects(), max_size=12))
def test_merged_rectangles_hold_the_same_elements(pieces: list[Rect]) -> None:
    disjoint: list[Rect] = []
    for piece in pieces:
        if piece.area and first_overlap([*disjoint, piece]) is None:
            disjoint.append(piece)
    found = merged(disjoint)
    assert (painted(*found) == painted(*disjoint)).all()
    assert len(found) <= len(disjoint)
    assert merged(Rect(n, n + 1, m, m + 2) for n in range(3) for m in (0, 2)) == (Rect(0, 3, 0, 4),)


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([Rect(0, 2, 0, 3)], "covered elements"),
        ([Rect(0, 4, 0, 3), Rect(3, 4, 2, 3)], "overlap"),
        ([Rect(0, 4, 0, 3), Rect(4, 5, 0, 3)], "inside"),
        ([Rect(0, 4, 0, 2), Rect(0, 4, 0, 1), Rect(0, 2, 2, 3)], "overlap"),
        ([], "covered elements"),
    ],
)
def test_an_inexact_cover_is_refused_by_name(pieces: list[Rect], complaint: str) -> None:
    with pytest.raises(QkovError, match=complaint) as refusal:
        check_exact_cover("the weight", Rect.of_shape(4, 3), pieces)
    assert refusal.value.where == "the weight"


def test_a_cover_may_be_ragged_and_hold_empty_pieces() -> None:
    pieces = [Rect(0, 1, 1, 3), Rect(0, 4, 0, 1), Rect(1, 4, 1, 3), Rect(2, 2, 0, 3)]
    check_exact_cover("the weight", Rect.of_shape(4, 3), pieces)

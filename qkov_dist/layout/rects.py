"""Rectangles of a weight, in integers.

Every weight is seen in the orientation [out, in], whatever its module stores. A head, a shard and a tile are all
rectangles of that matrix, and everything that decides who computes what is an intersection or a cover of them.
A vector (a bias) is a matrix of one column.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

from qkov_dist.errors import QkovError


@dataclass(frozen=True, order=True)
class Rect:
    """The half-open rectangle of rows [row, row_end) and columns [col, col_end)."""

    row: int
    row_end: int
    col: int
    col_end: int

    @staticmethod
    def of_shape(num_rows: int, num_cols: int) -> Rect:
        """The whole matrix."""
        return Rect(0, num_rows, 0, num_cols)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return max(self.row_end - self.row, 0), max(self.col_end - self.col, 0)

    @property
    def area(self) -> int:
        """Number of elements."""
        rows, cols = self.shape
        return rows * cols

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """(first row, end of rows, first column, end of columns)."""
        return self.row, self.row_end, self.col, self.col_end

    @property
    def rows(self) -> slice:
        """The rows as a slice."""
        return slice(self.row, self.row_end)

    @property
    def cols(self) -> slice:
        """The columns as a slice."""
        return slice(self.col, self.col_end)

    @property
    def transposed(self) -> Rect:
        """The same elements of the transposed matrix."""
        return Rect(self.col, self.col_end, self.row, self.row_end)

    def intersect(self, other: Rect) -> Rect | None:
        """The common elements, or None where there are none."""
        row, row_end = max(self.row, other.row), min(self.row_end, other.row_end)
        col, col_end = max(self.col, other.col), min(self.col_end, other.col_end)
        return Rect(row, row_end, col, col_end) if row < row_end and col < col_end else None

    def split_rows(self, max_rows: int) -> tuple[Rect, ...]:
        """Cut into bands of at most ``max_rows`` rows, all of about one height, in order."""
        height = self.row_end - self.row
        num_bands = -(-height // max(max_rows, 1))
        cuts = [self.row + height * n // max(num_bands, 1) for n in range(num_bands + 1)]
        return tuple(Rect(low, high, self.col, self.col_end) for low, high in pairwise(cuts))

    def split(self, max_area: int, least: int = 1) -> tuple[Rect, ...]:
        """Cut into pieces of at most ``max_area`` elements, all of about one shape, in order.

        The longer side is cut, as a product is quickest where its shorter side stays whole; the other one too, where
        pieces would come out narrower than ``least``. A piece has ``least`` elements of one row or column even where
        these are more than ``max_area``.
        """
        rows, cols = self.shape
        if rows * cols <= max_area:
            return (self,) if rows * cols else ()
        if cols > rows:
            return tuple(piece.transposed for piece in self.transposed.split(max_area, least))
        if not cols:
            return ()
        height = max(max_area // cols, min(least, rows), 1)
        width = max(max_area // height, 1)
        return tuple(
            piece.transposed for band in self.split_rows(height) for piece in band.transposed.split_rows(width)
        )


def rects_of_flat_interval(start: int, stop: int, num_cols: int) -> tuple[Rect, ...]:
    """Cut the interval [start, stop) of a row-major flattened matrix into at most three rectangles."""
    if start >= stop:
        return ()
    first, first_col = divmod(start, num_cols)
    last, last_col = divmod(stop, num_cols)
    if first == last:
        return (Rect(first, first + 1, first_col, last_col),)
    head = [Rect(first, first + 1, first_col, num_cols)] if first_col else []
    body_start = first + 1 if first_col else first
    body = [Rect(body_start, last, 0, num_cols)] if body_start < last else []
    tail = [Rect(last, last + 1, 0, last_col)] if last_col else []
    return (*head, *body, *tail)


def merged(rects: Iterable[Rect]) -> tuple[Rect, ...]:
    """The same elements of disjoint rectangles as fewer: neighbours of one width, then of one height, become one."""
    return tuple(rect.transposed for rect in _stacked(rect.transposed for rect in _stacked(rects)))


def _stacked(rects: Iterable[Rect]) -> list[Rect]:
    """Those of the same columns that lie one below another as one, column by column."""
    found: list[Rect] = []
    for rect in sorted(rects, key=lambda r: (r.col, r.col_end, r.row)):
        last = found[-1] if found else None
        if last and (last.col, last.col_end, last.row_end) == (rect.col, rect.col_end, rect.row):
            found[-1] = Rect(last.row, rect.row_end, rect.col, rect.col_end)
        else:
            found.append(rect)
    return found


def first_overlap(rects: Iterable[Rect]) -> tuple[Rect, Rect] | None:
    """The first two rectangles that share an element, or None.

    Found by a sweep over rows: the rectangles that reach the row in hand share no column, so that the next one need be
    compared with its neighbours alone.
    """
    cols: list[int] = []  # the first column of each rectangle that reaches the row in hand, sorted
    reaching: dict[int, Rect] = {}
    ends: list[tuple[int, int]] = []
    for rect in sorted((r for r in rects if r.area), key=lambda r: r.bounds):
        while ends and ends[0][0] <= rect.row:
            _, col = heappop(ends)
            del cols[bisect_left(cols, col)], reaching[col]
        place = bisect_left(cols, rect.col)
        for col in cols[max(place - 1, 0) : place + 1]:
            if rect.intersect(reaching[col]):
                return reaching[col], rect
        cols.insert(place, rect.col)
        reaching[rect.col] = rect
        heappush(ends, (rect.row_end, rect.col))
    return None


def check_exact_cover(name: str, whole: Rect, pieces: Sequence[Rect]) -> None:
    """Raise unless ``pieces`` cover every element of ``whole`` exactly once.

    Raises:
        QkovError: for a piece outside, an overlap, or a gap; ``name`` says whose rectangles they are.
    """
    remedy = "Report this layout or sharding: each element of a weight must belong to exactly one piece."
    for piece in pieces:
        if piece.area and piece.intersect(whole) != piece:
            raise QkovError(name, expected=f"pieces inside {whole}", got=f"{piece}", remedy=remedy)
    if overlap := first_overlap(pieces):
        raise QkovError(name, expected="disjoint pieces", got=f"{overlap[0]} and {overlap[1]} overlap", remedy=remedy)
    covered = sum(piece.area for piece in pieces)
    if covered != whole.area:
        raise QkovError(name, expected=f"{whole.area} covered elements", got=f"{covered}", remedy=remedy)

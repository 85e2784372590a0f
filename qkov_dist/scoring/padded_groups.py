"""Samples of like length side by side, so that one batched product forms the gradients of many.

Factors lie in the store as the real tokens of all samples, row after row. A group is some samples padded to the longest
of them, [n, T, width]. Padding repeats a sample's last row of X and is zero in D, and so adds nothing to D^T X. Where
samples of one length lie one behind another the group is a view, and nothing is copied. Samples kept as gradients are
groups of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from qkov_dist.capture.factors import SampleIndex, Span, Whole
from qkov_dist.memory import moved

_SHORTEST, _SLACK = 7 / 8, 4  # of the longest of a group; tokens by which a member may be shorter in any case


@dataclass(frozen=True)
class PaddedGroup:
    """Samples ``first`` to ``last`` of an ordering, padded to ``length`` tokens.

    Attributes:
        first: The first of them.
        last: One past the last.
        length: T.
        start: The row of the first token, where all rows lie one behind another; None where they have to be gathered.
        rows: The row of every token [n, T], where padding repeats the sample's last; or, of samples kept as gradients,
            the place of each [n].
        real: Which tokens are real, bool [n, T]; None of samples kept as gradients.
    """

    first: int
    last: int
    length: int
    start: int | None
    rows: Tensor
    real: Tensor | None

    def inputs(self, values: Tensor) -> Tensor:
        """X of the group, [n, T, width], from that of all tokens [tokens, width]; T is 0 for kept gradients."""
        if self.start is not None or self.real is None:
            return self._view(values)
        return values[moved(self.rows, values.device)]

    def outputs(self, values: Tensor) -> Tensor:
        """D of the group, [n, T, width], zero where padded."""
        if self.start is not None or self.real is None:
            return self._view(values)
        return values[moved(self.rows, values.device)] * moved(self.real, values.device).unsqueeze(-1)

    def wholes(self, whole: Whole) -> Whole | None:
        """The gradients of the group, where these are kept."""
        if self.real is not None:
            return None
        return Whole(whole.values[moved(self.rows, whole.values.device)], whole.row, whole.col)

    def to(self, device: torch.device | str) -> PaddedGroup:
        """The same for factors that are there."""
        real = None if self.real is None else moved(self.real, device)
        return replace(self, rows=moved(self.rows, device), real=real)

    def only(self, places: Sequence[int]) -> PaddedGroup:
        """Some of the samples, as a group of their own."""
        chosen = moved(torch.tensor(places), self.rows.device)
        real = None if self.real is None else self.real[chosen]
        return PaddedGroup(0, len(places), self.length, None, self.rows[chosen], real)

    def _view(self, values: Tensor) -> Tensor:
        num, start = self.last - self.first, self.start or 0
        return values[start : start + num * self.length].view(num, self.length, values.shape[1])


@dataclass(frozen=True)
class Ordering:
    """Samples sorted by length within each part that has a role of its own, and grouped.

    Attributes:
        order: Positions of the samples, as they are scored.
        place: Where each position is in ``order``: its inverse.
        groups: Every sample once.
    """

    order: tuple[int, ...]
    place: tuple[int, ...]
    groups: tuple[PaddedGroup, ...]

    def to(self, device: torch.device | str) -> Ordering:
        """The same for factors that are there."""
        return replace(self, groups=tuple(group.to(device) for group in self.groups))


def order_samples(members: Sequence[int], sample_index: SampleIndex, cuts: Sequence[int]) -> Ordering:
    """Sort and group samples.

    Args:
        members: The samples, by number.
        sample_index: Where each of them is.
        cuts: Positions between which samples keep together, so that a range of roles stays a range.
    """
    edges = sorted({0, *cuts, len(members)})
    order: list[int] = []
    groups: list[PaddedGroup] = []
    for low, high in pairwise(edges):
        factored = [n for n in range(low, high) if members[n] in sample_index.spans]
        spans = {n: sample_index.spans[members[n]] for n in factored}
        factored.sort(key=lambda n: (spans[n][0] - spans[n][1], spans[n][0]))
        groups += _grouped([spans[n] for n in factored], len(order))
        order += factored
        if whole := [n for n in range(low, high) if members[n] not in sample_index.spans]:
            places = torch.tensor([sample_index.whole[members[n]] for n in whole])
            groups.append(PaddedGroup(len(order), len(order) + len(whole), 0, None, places, None))
            order += whole
    return Ordering(tuple(order), tuple(int(n) for n in np.argsort(order)), tuple(groups))


def _grouped(spans: Sequence[Span], first: int) -> Iterator[PaddedGroup]:
    """Cut samples, longest first, where one would be padded too much."""
    start = 0
    for end in range(1, len(spans) + 1):
        longest = spans[start][1] - spans[start][0]
        if end < len(spans):
            length = spans[end][1] - spans[end][0]
            if length >= min(_SHORTEST * longest, longest - _SLACK):
                continue
        yield _group(spans[start:end], first + start)
        start = end


def _group(spans: Sequence[Span], first: int) -> PaddedGroup:
    starts, stops = torch.tensor(spans, dtype=torch.int64).T
    lengths = stops - starts
    longest = int(lengths[0])
    token = torch.arange(longest)
    rows = torch.minimum(starts.unsqueeze(1) + token, stops.unsqueeze(1) - 1)
    adjoin = bool((lengths == longest).all()) and bool((starts[1:] == stops[:-1]).all())
    return PaddedGroup(
        first, first + len(spans), longest, int(starts[0]) if adjoin else None, rows, token < lengths.unsqueeze(1)
    )

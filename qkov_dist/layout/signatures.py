"""What a query, a key, a value and an output head respond like when their slice is nudged.

What is observed is the input of the output projection, position by position. It must change in the columns that the
layout gives to exactly that query head (for K and V: to the query heads of that kv head), and

    a nudge of                  changes O-input at            and is told apart because
    Q rows at position p        p only, in all features       K and V reach other positions; a gate answers only in the
                                                              features of the rows that were nudged (a quarter of them)
    V rows at position p        p and others                  the response is linear, or keeps one direction and sign
                                                              (values may be normalised), as sum_t a_t v_t is
    K rows at position p        others, p perhaps             it is neither: it goes through the softmax
    K serving as V too          p and others, p = 0 too       as K; from position 0 a causal K cannot reach itself
    weight rows, any position   any                           only that head changes: orientation and rows are right
    weight columns of O         output = input @ noise^T      O's columns lie where the layout says, in storage too

A nudge can miss by chance (softmax already saturated), so a slice that stays silent is nudged again, harder. Where too
little responds all the same, weights may be to blame (a head that was zeroed or pruned): ``proof`` looks again with
random weights in their place. A response where none belongs is never forgiven. Where a slice borders on another block
in a fused projection, its edge rows are nudged alone as well, so that a boundary in the wrong place is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkov_dist.errors import QkovError

from .heads import HeadSlice, Projection
from .linear_map import check_linear_map
from .probe import Probe, nudge_rows, nudge_weight
from .weights import is_plain, region_of

DRAWS = 8
AMPLITUDE, ESCALATION = 30.0, 4.0  # first nudge in units of the projection's own RMS; growth from draw to draw
MIDDLE = 3  # a position with earlier and later ones
# Other heads are computed by the same operations on the same numbers, so they should not change at all; this fraction
# of the largest response allows for kernels that reorder sums. A wrong slice responds at order 1.
SILENCE = 1e-4
# A single row of a trained model may be dead: one that moves the O-input by less than this share is not judged.
AUDIBLE = 1e-2
# Linear or one-directional up to rounding: eps of the dtype over the relative size of the response, with a margin.
LINEARITY = {torch.float64: 1e-6, torch.float32: 1e-3}
LINEARITY_HALF = 0.06  # bfloat16 keeps 8 bits, float16 11


class SilentError(QkovError):
    """Too little responds to a slice: because of the weights, or because the layout is wrong."""


@dataclass(frozen=True)
class SliceCheck:
    """The nudges of one slice. Each method returns what was seen, or raises."""

    probe: Probe
    projection: Projection
    piece: HeadSlice
    generator: torch.Generator

    @property
    def expected(self) -> frozenset[int]:
        """The query heads that should respond."""
        return frozenset(self.probe.layer.query_heads(self.piece.block, self.piece.head))

    def weight_rows(self) -> str:
        """Only the expected heads change when the weight slice does; nothing to say of a weight that is not plain."""
        linear = self.probe.linear(self.projection)
        if not is_plain(getattr(linear, "weight", None)):
            return ""
        seen: frozenset[int] = frozenset()
        for draw in range(DRAWS):
            noise = self._weight_noise(linear, ESCALATION**draw)
            seen |= self._heads(self.probe.response(nudge_weight(linear, self.projection, self.piece.rect, noise)))
            if seen == self.expected:
                return "; weight slice"
        raise self._silence(f"a response of query heads {sorted(seen)} to the weight slice")

    def query(self, rows: Sequence[int], *, may_be_silent: bool = False) -> str:
        """Rows of a query, at one position, move all features of one head at that position alone."""
        share, loudest = 0.0, 0.0
        for _, delta in self._draws(rows, (MIDDLE,)):
            response = self._respond(MIDDLE, delta)
            heads, positions = self._heads(response), self._positions(response)
            if positions - {MIDDLE}:
                raise self._refusal(f"changes at positions {sorted(positions)} after a nudge at {MIDDLE} (not a query)")
            share, loudest = self._share_of_features(response), max(loudest, self._loudness(response))
            if heads == self.expected and share > 0.5:
                return "own position only"
        if may_be_silent and loudest < AUDIBLE:
            return "silent"
        raise self._silence(f"changes in {share:.0%} of the head's features (silent, or a gate)")

    def value(self, rows: Sequence[int], *, may_be_silent: bool = False) -> str:
        """The response reaches the own position and others, and is that of a sum of values."""
        seen: frozenset[int] = frozenset()
        loudest = 0.0
        for position, delta in self._draws(rows, (0, MIDDLE)):
            response = self._respond(position, delta)
            seen |= self._heads(response)
            reached, loudest = self._positions(response), max(loudest, self._loudness(response))
            complete = seen == self.expected and position in reached and len(reached) > 1
            if complete and self._is_sum_of_values(position, response, delta):
                return "linear or one direction, own position and others"
        if may_be_silent and loudest < AUDIBLE:
            return "silent"
        raise self._silence(f"query heads {sorted(seen)} responding, never as to a value")

    def key(self, rows: Sequence[int], *, may_be_silent: bool = False) -> str:
        """The response goes through the softmax; where keys are values too, it reaches its own position as well."""
        also_values = "V" not in self.probe.layer.blocks
        seen: frozenset[int] = frozenset()
        through_softmax, reaches_self, loudest = False, False, 0.0
        for position, delta in self._draws(rows, (0, MIDDLE)):
            response = self._respond(position, delta)
            seen |= self._heads(response)
            reached, loudest = self._positions(response), max(loudest, self._loudness(response))
            reaches_self = reaches_self or (position == 0 and 0 in reached)
            through_softmax = through_softmax or (
                len(reached) > 1 and not self._is_sum_of_values(position, response, delta)
            )
            if seen == self.expected and through_softmax and (reaches_self or not also_values):
                return "through the softmax" + (", keys serve as values" if also_values else "")
        if may_be_silent and loudest < AUDIBLE:
            return "silent"
        raise self._silence(f"query heads {sorted(seen)} responding, never as to a key")

    def edge_rows(self) -> tuple[int, ...]:
        """The first and the last row, where a row of another block (or of none) is next to it in a fused projection."""
        alike = [piece.rect for piece in self.projection.slices if piece.block == self.piece.block]
        rect, num_rows = self.piece.rect, self.projection.shape[0]
        first = rect.row > 0 and all(other.row_end != rect.row for other in alike)
        last = rect.row_end < num_rows and all(other.row != rect.row_end for other in alike)
        return (*((rect.row,) if first else ()), *((rect.row_end - 1,) if last else ()))

    def output_columns(self) -> str:
        """A nudge of O's weight columns changes its output by input @ noise^T.

        Raises:
            QkovError: where O is no linear map, or its columns lie elsewhere.
        """
        linear = self.probe.linear(self.projection)
        weight = getattr(linear, "weight", None)
        if not is_plain(weight):
            return "columns of the input"
        assert isinstance(weight, Tensor)
        noise = self._weight_noise(linear, AMPLITUDE)
        x = self.probe.baseline.to(weight).unsqueeze(0)
        before = linear(x)
        check_linear_map(self.projection.module, linear, linear.forward, x, before)
        with nudge_weight(linear, self.projection, self.piece.rect, noise):
            change = (linear(x) - before).to("cpu", torch.float64).squeeze(0)
        wanted = self.probe.baseline[:, self.piece.rect.cols] @ noise.to(torch.float64).T
        if not bool(wanted.any()):
            raise self._silence("an input that is zero in all of these columns")
        error = float((change - wanted).norm() / wanted.norm().clamp_min(1e-300))
        if not error <= self._tolerance:
            raise self._refusal(f"an output that differs from input @ noise^T by {error:.2g} of its norm")
        return "weight slice"

    @property
    def _tolerance(self) -> float:
        dtype = next((p.dtype for p in self.probe.model.parameters() if p.is_floating_point()), torch.float32)
        return LINEARITY.get(dtype, LINEARITY_HALF)

    def _weight_noise(self, linear: nn.Module, scale: float) -> Tensor:
        rect = self.piece.rect
        rms = region_of(linear, self.projection, rect).float().pow(2).mean().sqrt()
        unit = float(rms) or self.projection.shape[1] ** -0.5
        return torch.randn(rect.shape, generator=self.generator) * (unit * scale)

    def _draws(self, rows: Sequence[int], positions: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Nudges of some rows at each position in turn, growing, in units of the output's RMS."""
        for draw in range(DRAWS):
            noise = torch.rand(len(rows), generator=self.generator) + 0.5
            signs = torch.randint(2, (len(rows),), generator=self.generator) * 2 - 1
            delta = torch.zeros(self.projection.shape[0])
            delta[list(rows)] = noise * signs * AMPLITUDE * ESCALATION ** (draw // 2)
            yield positions[draw % len(positions)], delta

    def _respond(self, position: int, delta: Tensor) -> Tensor:
        linear = self.probe.linear(self.projection)
        return self.probe.response(nudge_rows(linear, self.projection.shape[0], position, delta))

    def _heads(self, response: Tensor) -> frozenset[int]:
        """Query heads whose O columns change.

        Raises:
            QkovError: where a head changes that should not.
        """
        changed = _changed(response, self.probe.baseline).any(dim=0)
        slices = self.probe.layer.output.slices
        heads = frozenset(piece.head for piece in slices if bool(changed[piece.rect.cols].any()))
        if heads - self.expected:
            raise self._refusal(f"changes in the O-input of query heads {sorted(heads)}")
        return heads

    def _positions(self, response: Tensor) -> frozenset[int]:
        changed = _changed(response, self.probe.baseline).any(dim=1)
        return frozenset(int(position) for position in changed.nonzero().flatten())

    def _share_of_features(self, response: Tensor) -> float:
        """The share of the expected heads' features that change."""
        changed = _changed(response, self.probe.baseline).any(dim=0)
        shares = [
            changed[p.rect.cols].double().mean() for p in self.probe.layer.output.slices if p.head in self.expected
        ]
        return float(torch.stack(shares).mean())

    def _loudness(self, response: Tensor) -> float:
        return float(response.norm() / self.probe.baseline.norm().clamp_min(1e-300))

    def _is_sum_of_values(self, position: int, response: Tensor, delta: Tensor) -> bool:
        """Whether sum_t a_t v_t explains it: one direction in each head, or linear in the nudge."""
        columns = [p.rect.cols for p in self.probe.layer.output.slices if p.head in self.expected]
        if all(_one_direction(response[:, cols], self._tolerance) for cols in columns):
            return True
        error = self._respond(position, 2 * delta) - 2 * response
        return bool(error.norm() <= self._tolerance * 2 * response.norm())

    def _refusal(self, got: str) -> QkovError:
        return QkovError(**self._parts(got))

    def _silence(self, got: str) -> SilentError:
        return SilentError(**self._parts(got))

    def _parts(self, got: str) -> dict[str, str]:
        return {
            "where": f"layer {self.probe.layer.index}, {self.projection.module} ({self.projection.order}), "
            f"{self.piece.block} head {self.piece.head}",
            "expected": f"a response of query heads {sorted(self.expected)} as {self.piece.block} gives",
            "got": got,
            "remedy": "The layout is wrong for this model: register the right one with register_layout.",
        }


def _changed(response: Tensor, baseline: Tensor) -> Tensor:
    """Where a response is more than rounding."""
    size = response.abs()
    return size > torch.maximum(size.max() * SILENCE, baseline.abs().max() * 1e-7)


def _one_direction(response: Tensor, tolerance: float) -> bool:
    """Whether all positions [T, D] respond along one vector, with one sign: weights of a softmax are positive."""
    left, singular, _ = torch.linalg.svd(response, full_matrices=False)
    weights = left[:, 0] * singular[0]
    heard = weights[weights.abs() > tolerance * singular[0]]
    one_sign = bool((heard > 0).all() or (heard < 0).all())
    return one_sign and (len(singular) < 2 or bool(singular[1] <= tolerance * singular[0]))

"""The family of scores as one table. **Add a score here**, and its name to ``metric.score`` in ``config``.

    M_ij = sum_p left(g_i) right(g_j) / R^power

    map         of a gradient's element g
    gradient    g
    magnitude   |g|
    square      g^2

What else is to be known of a score follows from its two maps: with the same on both sides M_AB and M_BA are transposes
of each other, and only where g itself is a map may a score be negative (then low scores are the conflicts, and there is
no logarithm of means). No other module asks for a score by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Score = Literal["interference", "signed", "symmetric", "curvature"]
ElementMap = Literal["gradient", "magnitude", "square"]
MAP_NUMBERS: Mapping[ElementMap, int] = {"gradient": 0, "magnitude": 1, "square": 2}  # as compiled kernels number them


@dataclass(frozen=True)
class ScoreKind:
    """One score.

    Attributes:
        left: Map of the gradient of sample i.
        right: Map of the gradient of sample j.
        power: Of R, by which products are divided.
    """

    left: ElementMap
    right: ElementMap
    power: float = 1.0

    @property
    def is_symmetric(self) -> bool:
        """Whether M_AB^T = M_BA under one Fisher."""
        return self.left == self.right

    @property
    def may_be_negative(self) -> bool:
        """Whether a term may be below 0."""
        return "gradient" in (self.left, self.right)

    @property
    def degree(self) -> int:
        """Power of gradients' scale by which a term grows, given R."""
        return sum(2 if of_side == "square" else 1 for of_side in (self.left, self.right))

    @property
    def maps_in_place(self) -> bool:
        """Whether both maps can be formed in the memory of the gradients and of their squares."""
        return self.is_symmetric or "square" in (self.left, self.right)

    @property
    def weight_power(self) -> float:
        """Power of 1 / R that multiplies the left map: all of it, or half of it where both sides take the same."""
        return self.power / 2 if self.is_symmetric else self.power


KINDS: Mapping[Score, ScoreKind] = {
    "interference": ScoreKind("square", "magnitude"),
    "signed": ScoreKind("gradient", "gradient"),
    "symmetric": ScoreKind("magnitude", "magnitude"),
    "curvature": ScoreKind("square", "square"),
}


def may_be_negative(score: object) -> bool:
    """Whether scores of this name, as a file tells it, may be negative; a name that is not known is taken not to."""
    kind = KINDS.get(score)  # type: ignore[call-overload]
    return kind is not None and kind.may_be_negative

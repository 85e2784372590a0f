"""Why a pass of a model cannot be used: what was expected, what was found, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site


@dataclass(frozen=True)
class Refusal:
    """Why a pass cannot be used, but for where."""

    expected: str
    got: str
    remedy: str

    def at(self, place: str, **facts: int) -> QkovError:
        """The error; ``facts`` fill in what was found."""
        return QkovError(place, expected=self.expected, got=self.got.format(**facts), remedy=self.remedy)


NOT_FINITE_ELSEWHERE = Refusal(
    "finite ones at some scale of the loss (float16)",
    "NaN or infinity on another rank of this pass, or in a sum",
    "Load the model in a wider type (model.dtype: float32 or bfloat16).",
)
CALLED_TWICE = Refusal(
    "one call of the projection in a forward pass",
    "a second call",
    "A projection shared by several layers is not supported; choose other layers (metric.layers).",
)
CHANGED_IN_PLACE = Refusal(
    "an input that stays as the projection saw it",
    "an input changed in place after the call",
    "Replace the in-place operation in the model's forward.",
)
_NOT_REACHED = Refusal(
    "a forward and a backward pass through every projection",
    "{count} projection(s) that the loss does not depend on",
    "Restrict metric.layers to layers that take part, remove what cuts them off (a hook that detaches, a "
    "kernel without a gradient), or register the layout that the model really uses.",
)


def not_reached(missing: Sequence[Site]) -> QkovError:
    """The error for projections that a pass does not reach."""
    place = ", ".join(site.module for site in missing[:4]) + (", …" if len(missing) > 4 else "")
    return _NOT_REACHED.at(place, count=len(missing))

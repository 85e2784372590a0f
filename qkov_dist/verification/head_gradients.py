r"""Per-sample gradients of single heads, there whole in float64, and what follows from them.

    step               u = P gbar_B,    P = 1 (sgd) or R^(-1/2) (adam),    R = I + lambda as the metric has it
    change             - sum_p gbar_A u                       first-order change of A's mean loss for a unit step
    curvature          1/2 sum_p F_A u^2                      second-order rise, by the diagonal of A's Fisher
    curvature_along    1/2 mean_{n in A} (sum_p g_n u)^2      the same by the whole of it

A run forms ``change`` and ``curvature`` too, tile by tile (``scoring``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkov_dist.layout.heads import Site
from qkov_dist.scoring.block_totals import block_totals
from qkov_dist.scoring.score import sample_gradients
from qkov_dist.scoring.settings import ScoreSettings

from .examined_model import Captured
from .head_targets import Target, pieces


@dataclass(frozen=True)
class HeadGradients:
    """One head.

    Attributes:
        a: Gradients of A's samples, float64 [n_a, P].
        b: Of B's, [n_b, P].
        regularised: R, float64 [P].
    """

    a: Tensor
    b: Tensor
    regularised: Tensor

    def step(self, optimizer: str) -> Tensor:
        """P gbar_B, [P]; 0 where no sample has a gradient and R is 0."""
        if optimizer == "sgd":
            return self.b.mean(0)
        return torch.where(self.regularised > 0, self.b.mean(0) * self.regularised.rsqrt(), 0.0)

    def predictions(self, optimizer: str) -> dict[str, float]:
        """What the step does to A's loss, for a unit of it, and the size of both mean gradients."""
        step = self.step(optimizer)
        return {
            "change": -float(self.a.mean(0) @ step),
            "curvature": 0.5 * float(self.a.square().mean(0) @ step.square()),
            "curvature_along": 0.5 * float((self.a @ step).square().mean()),
            "||gA|| ||gB||": float(self.a.mean(0).norm() * self.b.mean(0).norm()),
        }


def head_gradients(captured: Captured, targets: Sequence[Target]) -> Iterator[tuple[Target, HeadGradients]]:
    """Gradients and R of each target, layer by layer; one head's at a time."""
    examined, settings = captured.examined, ScoreSettings()
    roles = examined.roles()
    weights = torch.as_tensor(roles.weights.sum(0))
    for layer in examined.tile_plan().layers:
        of_layer = [target for target in targets if target.layer == layer.layer]
        if not of_layer:
            continue
        totals = block_totals(layer, captured.store, roles, settings)
        for target in of_layer:
            gradients = _gradients(captured, target)
            ridge = settings.ridge_relative * totals[target.block] / layer.block_sizes[target.block]
            regularised = weights.to(gradients) @ gradients.square() + ridge
            yield target, HeadGradients(gradients[: len(examined.a)], gradients[len(examined.a) :], regularised)


def _gradients(captured: Captured, target: Target) -> Tensor:
    """Per-sample gradients on all rectangles of a head, float64 [N, P]."""
    store = captured.store
    spans = [store.spans[n] for n in range(captured.examined.num_samples)]
    parts = []
    for projection, piece in pieces(captured.examined, target):
        site = Site(target.layer, projection.module)
        x, d = store.x(site).features(piece.rect.cols).double(), store.d(site).features(piece.rect.rows).double()
        parts.append(sample_gradients(x, d, spans))
    return torch.cat(parts, dim=1)

r"""Per-sample gradients of single heads, there whole in float64, and what follows from them: steps, influences.

    the step on B in one head    P gbar_B,    P = 1 (sgd) or R^(-1/2) (adam),    R = I + lambda as the metric has it

The columns of influences are those of ``results.influences``; a run forms the same tile by tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qkov_dist.layout.heads import Site
from qkov_dist.results.influences import COLUMNS, OPTIMIZERS, Floats, Samples
from qkov_dist.scoring.block_totals import block_totals
from qkov_dist.scoring.score import sample_gradients
from qkov_dist.scoring.settings import ScoreSettings

from .examined_model import Captured, ExaminedModel
from .head_targets import Target, pieces


@dataclass(frozen=True)
class HeadGradients:
    """One head.

    Attributes:
        gradients: Of each sample, A's first, float64 [N, P].
        regularised: R, float64 [P].
    """

    gradients: Tensor
    regularised: Tensor

    def scale(self, optimizer: str) -> Tensor:
        """P; 0 where no sample has a gradient and R is 0."""
        if optimizer == "sgd":
            return torch.ones_like(self.regularised)
        return torch.where(self.regularised > 0, self.regularised.rsqrt(), 0.0)

    def step(self, optimizer: str, samples: Samples) -> Tensor:
        """P gbar_B, [P]."""
        return self.scale(optimizer) * self.gradients[torch.as_tensor(samples.b)].mean(0)

    def influences(self, samples: Samples) -> Floats:
        """[optimizer, column, N]."""
        found = np.zeros((len(OPTIMIZERS), len(COLUMNS), len(self.gradients)))
        squares = self.gradients.square()
        for task, other in ("ab", "ba"):
            own, others = (torch.as_tensor(samples.of(name)) for name in (task, other))
            of_task, of_other = self.gradients[own].mean(0), self.gradients[others].mean(0)
            fisher_of_other = squares[others].mean(0)
            for place, optimizer in enumerate(OPTIMIZERS):
                scale = self.scale(optimizer)
                columns = (
                    -self.gradients[own] @ (scale * of_other),
                    -self.gradients[own] @ (scale * of_task),
                    0.5 * squares[own] @ (scale * of_other).square(),
                    self.gradients[own] @ (fisher_of_other * scale.square() * of_task),
                    squares[own] @ scale,
                )
                found[place][:, samples.of(task)] = torch.stack(columns).cpu().numpy()
        return found


def samples_of(examined: ExaminedModel) -> Samples:
    """All samples of both tasks."""
    is_a = np.arange(examined.num_samples) < len(examined.a)
    return Samples(is_a, ~is_a)


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
            yield target, HeadGradients(gradients, weights.to(gradients) @ gradients.square() + ridge)


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

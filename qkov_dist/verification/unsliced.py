"""Each block scored as one set of elements, without slicing: no head is looped over, none can be counted twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qkov_dist.layout.heads import AttentionLayer, Projection, Site
from qkov_dist.scoring.score import diagonal_fisher, pair_scores, sample_gradients
from qkov_dist.scoring.settings import Roles

from .examined_model import Captured
from .property_result import PLAIN


def unsliced(captured: Captured, layer: AttentionLayer) -> dict[str, Tensor]:
    """Each block scored as one set of elements: no slice is looped over, none can be counted twice."""
    roles = captured.examined.roles()
    weights = torch.as_tensor(roles.weights.sum(0))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for projection in layer.projections:
        gradients = whole_gradients(captured, layer, projection)
        for block in projection.blocks:
            mask = torch.zeros(projection.shape, dtype=torch.bool)
            for piece in projection.slices:
                if piece.block == block:
                    mask[piece.rect.rows, piece.rect.cols] = True
            of_block = gradients[:, mask]
            found.setdefault(block, []).append((of_block, diagonal_fisher(of_block, weights)))
    return {block: _whole_scores(parts, roles) for block, parts in found.items()}


def _whole_scores(parts: Sequence[tuple[Tensor, Tensor]], roles: Roles) -> Tensor:
    """The score of a block from its gradients and I in each projection."""
    mean = torch.cat([fisher for _, fisher in parts]).mean()
    ridge = PLAIN.ridge_absolute + PLAIN.ridge_relative * float(mean)
    of_parts = [
        pair_scores(
            gradients,
            fisher,
            left=roles.left,
            right=roles.right,
            score=PLAIN.score,
            epsilon=PLAIN.epsilon,
            ridge=ridge,
        )
        for gradients, fisher in parts
    ]
    return torch.stack(of_parts).sum(0)


def whole_gradients(captured: Captured, layer: AttentionLayer, projection: Projection) -> Tensor:
    """Per-sample gradients of a whole weight, float64 [N, out, in]."""
    site, whole = Site(layer.index, projection.module), projection.whole()
    x, d = captured.store.x(site).features(whole.cols).double(), captured.store.d(site).features(whole.rows).double()
    spans = [captured.store.spans[n] for n in range(captured.examined.num_samples)]
    return sample_gradients(x, d, spans).view(-1, *projection.shape)

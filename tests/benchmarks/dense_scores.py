"""This product's scores of all pairs, computed from per-sample gradients that another tool formed, head by head.

All gradients of all samples are kept in memory, as the Fisher needs them before the first score. Each head is then one
product of matrices, as anybody would write it.
"""

from __future__ import annotations

import torch
from gradients import Gradients, projections
from material import Subject
from pair_loop import RIDGE, heads_of
from torch import Tensor

Scores = dict[tuple[int, str, int], Tensor]  # (layer, block, head) -> [N, N]


def dense_scores(subject: Subject, gradients: Gradients) -> Scores:
    """Sum g_i^2 / (I + lambda) |g_j| of all pairs of samples and every head, I the mean of g^2."""
    num, model = 2 * subject.samples, subject.loaded.model
    kept = {
        name: torch.empty(num, *model.get_submodule(name).weight.shape, device=model.device)
        for name in projections(subject)
    }
    for numbers, found in gradients:
        for name, of_batch in found.items():
            kept[name][list(numbers)] = of_batch
    scores = {}
    for head in heads_of(subject):
        g = kept[head.module][:, head.rows, head.cols].flatten(1)
        squares = g.square()
        scores[head.layer, head.block, head.head] = squares.div_(squares.mean(0) + RIDGE) @ g.abs().T
    return scores

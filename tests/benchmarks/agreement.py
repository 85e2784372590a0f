"""Whether the contestants compute the same thing: one layer's gradients, and scores, against this product's.

A deviation is the largest difference as a share of the largest value, in float32 on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peers
import torch
from dense_scores import dense_scores
from gradients import Gradients, autograd_loop, from_factors, gathered, projections, vmap_of_grad
from material import Subject
from pair_loop import RIDGE, heads_of, kept_gradients, mean_fisher, per_pair_loop
from torch import Tensor

from qkov_dist.config import FisherConfig, RidgeConfig, RunConfig
from qkov_dist.results.heatmap import Heatmap

TOLERANCE = 1e-3  # float32 sums of other orders; another gradient, or a neighbour's, is off by more than 0.1
METHODS: dict[str, Callable[[Subject], Gradients]] = {
    "autograd_loop": autograd_loop,
    "vmap": vmap_of_grad,
    "opacus": peers.opacus_gradients,
    "bergson": peers.bergson_gradients,
}


def gradient_deviation(subject: Subject, method: str) -> float:
    """How far a method's gradients of the middle layer are from D^T X."""
    layer = len(subject.layout.layers) // 2
    names = projections(subject, layer)
    expected = from_factors(subject, subject.layout.layers[layer].index)
    return largest_deviation(gathered(METHODS[method](subject), names), expected)


def kronfluence_deviation(subject: Subject) -> float:
    """How far Kronfluence's scores of the middle layer are from those of D^T X."""
    layer = len(subject.layout.layers) // 2
    expected = {}
    for name, g in from_factors(subject, subject.layout.layers[layer].index).items():
        weighted = g[: subject.samples] / (g.square().mean(dim=0) + peers.DAMPING)
        expected[name] = weighted.flatten(1) @ g[subject.samples :].flatten(1).t()
    found = peers.kronfluence_analysis(subject)()
    return largest_deviation({name: found[name] for name in expected}, expected)


def dattri_deviation(subject: Subject) -> float:
    """How far dattri-LLM's scores, over all layers, are from those of one backward pass a sample."""
    gradients = torch.stack([torch.cat([g.flatten() for g in of.values()]) for of in kept_gradients(subject)])
    expected = gradients[: subject.samples] @ gradients[subject.samples :].T
    return largest_deviation({"": peers.dattri_scores(subject)}, {"": expected})


def same_metric(config: RunConfig) -> RunConfig:
    """The configuration under which the product's scores are those of the per-pair loop."""
    ridge = RidgeConfig(epsilon=0.0, absolute=RIDGE, relative=0.0)
    return replace(config, fisher=FisherConfig(estimator="mean"), ridge=ridge)


def loop_deviation(subject: Subject, heatmap: Heatmap) -> float:
    """How far the per-pair loop's scores are from those of a run under :func:`same_metric`."""
    gradients = kept_gradients(subject)
    of_a, of_b = gradients[: subject.samples], gradients[subject.samples :]
    scores = per_pair_loop(of_a, of_b, mean_fisher(gradients), heads_of(subject))
    found: dict[str, list[float]] = {}
    expected: dict[str, list[float]] = {}
    for (i, j, layer, block, head), score in scores.items():
        found.setdefault(block, []).append(score)
        expected.setdefault(block, []).append(_score(heatmap, block, layer, head, i, j))
    return largest_deviation(*({block: torch.tensor(v) for block, v in side.items()} for side in (found, expected)))


def dense_deviation(subject: Subject, heatmap: Heatmap) -> float:
    """How far scores from vmap's gradients are from those of a run under :func:`same_metric`."""
    found, expected = {}, {}
    for (layer, block, head), scores in dense_scores(subject, vmap_of_grad(subject)).items():
        cross: Any = heatmap.cross
        found[f"{layer} {block} {head}"] = scores[: subject.samples, subject.samples :].cpu()
        expected[f"{layer} {block} {head}"] = torch.as_tensor(cross[block][heatmap.layers.index(layer), head])
    return largest_deviation(found, expected)


def largest_deviation(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference as a share of the largest value of each tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


def _score(heatmap: Heatmap, block: str, layer: int, head: int, i: int, j: int) -> Any:
    cross: Any = heatmap.cross
    return cross[block][heatmap.layers.index(layer), head, i, j]

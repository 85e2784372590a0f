r"""What a step on one task does to the other, head by head: predicted on some samples, measured on others.

For one head's slice W of one block, with the step u = P gbar_B (``head_gradients``) and a size eta,

    change = L_A(W - eta u) - L_A(W) = odd + even
    odd    = (L_A(W - eta u) - L_A(W + eta u)) / 2           first order:  eta change, and what is of third order
    even   = (L_A(W - eta u) + L_A(W + eta u)) / 2 - L_A(W)  second order: eta^2 curvature, and what is of fourth

with the mean loss of A's samples; weights are restored bit for bit. Predictors are taken on one half of A's samples;
losses are measured on the other half, which no predictor has seen, and on the same half: there the odd part is the
prediction itself as eta shrinks. ``agreement`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from qkov_dist.data.batches import content_of
from qkov_dist.data.copies import different_pairs
from qkov_dist.errors import QkovError
from qkov_dist.results.influences import Floats
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.score_kinds import KINDS, Score
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.stats.permutation import draw_labels, head_nulls, pair_counts

from .examined_model import Captured, ExaminedModel
from .head_gradients import head_gradients
from .head_targets import Target, halves, refuse_unchangeable, stepped

HELD_OUT, SAME = "held out", "same"


@dataclass(frozen=True)
class Parts:
    """The measured change of A's mean loss for each size: its odd and its even part."""

    odd: tuple[float, ...]
    even: tuple[float, ...]


@dataclass(frozen=True)
class HeadEffect:
    """What is known of one head.

    Attributes:
        target: Which head.
        predicted: Predictor -> value, for a unit step.
        measured: ``held out`` and ``same``: on which half of A's samples.
    """

    target: Target
    predicted: Mapping[str, float]
    measured: Mapping[str, Parts]


def measure(
    examined: ExaminedModel,
    targets: Sequence[Target],
    sizes: Sequence[float],
    *,
    optimizer: str,
    seed: int,
    on_head: Callable[[int], object] = lambda n: None,
) -> list[HeadEffect]:
    """Predict what a step on B in each target alone does to A's loss, take it both ways, and measure.

    Args:
        examined: The model and the samples; its layers are those of the targets.
        targets: The heads.
        sizes: Step sizes eta.
        optimizer: ``sgd`` or ``adam``.
        seed: Deals A's samples into halves.
        on_head: Called with 1 after each head.

    Raises:
        QkovError: where weights cannot be changed in place, A has fewer than four samples, or the tasks share samples.
    """
    refuse_unchangeable(examined)
    refuse_common_samples(examined)
    first, second = halves(len(examined.a), seed, "task A")
    predicting = replace(examined, a=tuple(examined.a[place] for place in first))
    predicted, steps = _predictions(predicting, targets, optimizer)
    batches = examined.batches(examined.a)
    before, parts = examined.losses(batches), {HELD_OUT: list(second), SAME: list(first)}
    effects = []
    for target in targets:
        backward, forward = list[Floats](), list[Floats]()
        for size in sizes:
            for losses, sign in ((forward, 1.0), (backward, -1.0)):
                with stepped(examined, target, sign * size * steps[target]):
                    losses.append(examined.losses(batches) - before)
        measured = {
            name: parts_of(np.array(forward)[:, places], np.array(backward)[:, places])
            for name, places in parts.items()
        }
        effects.append(HeadEffect(target, predicted[target], measured))
        on_head(1)
    return effects


def parts_of(forward: Floats, backward: Floats) -> Parts:
    """From changes of losses [sizes, samples] by a step, and by its opposite."""
    ahead, back = forward.mean(axis=1), backward.mean(axis=1)
    return Parts(tuple(((ahead - back) / 2).tolist()), tuple(((ahead + back) / 2).tolist()))


def refuse_common_samples(examined: ExaminedModel) -> None:
    """That what is a step for one task is not measured on the same samples.

    Raises:
        QkovError: where a sample is in both tasks.
    """
    contents = [{content_of(s, examined.objective) for s in samples} for samples in (examined.a, examined.b)]
    if common := len(contents[0] & contents[1]):
        remedy = "Take the samples that both have out of one of them."
        raise QkovError("qkov validate", expected="two tasks without common samples", got=f"{common}", remedy=remedy)


def _predictions(
    examined: ExaminedModel, targets: Sequence[Target], optimizer: str
) -> tuple[dict[Target, dict[str, float]], dict[Target, Tensor]]:
    """Every predictor, and the step on B, of every target."""
    predicted, steps = dict[Target, dict[str, float]](), dict[Target, Tensor]()
    with examined.captured() as captured:
        scores = _scores(captured)
        for target, head in head_gradients(captured, targets):
            predicted[target] = {**head.predictions(optimizer), **scores[target]}
            steps[target] = head.step(optimizer)
    return predicted, steps


def _scores(captured: Captured) -> dict[Target, dict[str, float]]:
    """Scores of the engine, among all samples under one Fisher."""
    interference, signed = (_pooled_statistics(captured, score) for score in ("interference", "signed"))
    return {
        target: {
            "interference": of_head["cross_mean"],
            "overlap": of_head["overlap"],
            "-signed": -signed[target]["cross_mean"],
        }
        for target, of_head in interference.items()
    }


def _pooled_statistics(captured: Captured, score: Score) -> dict[Target, dict[str, float]]:
    """``cross_mean`` and, of scores that are never negative, ``overlap`` of every head examined, by the engine."""
    examined, num = captured.examined, captured.examined.num_samples
    roles = Roles(tuple(range(num)), examined.roles().weights, slice(0, num), slice(0, num))
    observed = draw_labels(0, len(examined.a), len(examined.b), 0)
    pairs = torch.from_numpy(different_pairs([""] * num))
    counts = pair_counts(observed, pairs)
    settings = ScoreSettings(score=score, device=next(examined.model.parameters()).device)
    found = {}
    for layer in examined.tile_plan().layers:
        for block, part in score_layer(layer, captured.store, roles, settings).items():
            scores, with_overlap = part.scores.cpu(), not KINDS[score].may_be_negative
            nulls = head_nulls(scores, observed, pairs, counts, with_overlap=with_overlap)
            for place, head in enumerate(part.heads):
                values = {name: float(null.values[place, 0]) for name, null in nulls.items()}
                found[Target(layer.layer, block, head)] = values
    return found

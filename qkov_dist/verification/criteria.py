"""By what heads may be chosen to be frozen: one number a head for each criterion, the larger the sooner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qkov_dist.data.copies import different_pairs
from qkov_dist.results.influences import Floats, Samples, changes, curvatures, harm
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.score_kinds import KINDS, Score
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.stats.permutation import draw_labels, head_nulls, pair_counts

from .examined_model import Captured, ExaminedModel
from .head_gradients import head_gradients, samples_of
from .head_targets import Target, every_target

CRITERIA = ("change_adam", "curvature", "harm", "interference", "overlap")
ByTarget = Mapping[Target, float]


def head_criteria(examined: ExaminedModel, step: float) -> dict[str, dict[Target, float]]:
    """What each criterion says of every head examined; effects are those of ``adam`` on A's loss.

    Args:
        examined: The model and the samples.
        step: Learning rate times number of steps, for the harm.
    """
    samples, targets = samples_of(examined), every_target(examined)
    with examined.captured() as captured:
        influences = {target: of.influences(samples) for target, of in head_gradients(captured, targets)}
        pooled = pooled_statistics(captured, "interference")
    return {
        **_effects(np.stack([influences[target] for target in targets]), samples, step, targets),
        "interference": {target: pooled[target]["cross_mean"] for target in targets},
        "overlap": {target: pooled[target]["overlap"] for target in targets},
    }


def _effects(
    influences: Floats, samples: Samples, step: float, targets: Sequence[Target]
) -> dict[str, dict[Target, float]]:
    found = {
        "change_adam": changes(influences, samples, "adam"),
        "curvature": curvatures(influences, samples, "adam", "a"),
        "harm": harm(influences, samples, "adam", "a", step),
    }
    return {name: dict(zip(targets, estimate.value.tolist(), strict=True)) for name, estimate in found.items()}


def highest(values: ByTarget, count: int) -> tuple[Target, ...]:
    """The heads with the ``count`` largest values; of equal ones the first, and none that has no value."""
    known = [target for target, value in values.items() if not np.isnan(value)]
    return tuple(sorted(known, key=lambda target: -values[target])[:count])


def pooled_statistics(captured: Captured, score: Score) -> dict[Target, dict[str, float]]:
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

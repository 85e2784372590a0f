r"""Do scores predict what a training step on one task does to the other? Measured, head by head.

For one head's slice W of one block, with gbar_T the mean gradient of task T's samples over that slice,

    change = L_A(W - eta gbar_B) - L_A(W),

the mean loss of A's samples after one gradient step on B that moves nothing but this slice; weights are restored bit
for bit. To first order the change is -eta gbar_A . gbar_B, so that for a small step no number can predict the *signed*
change better than the plain inner product. The other plain baseline is ||gbar_A|| ||gbar_B||, the most that the inner
product can be. A score is worth its Fisher where it ranks heads at least as well as these (``agreement``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qkov_dist.capture.losses import sample_losses
from qkov_dist.data.batches import Batch, make_batches
from qkov_dist.data.copies import different_pairs
from qkov_dist.data.samples import Sample
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS, HeadSlice, Projection, Site
from qkov_dist.layout.weights import changed, region_of
from qkov_dist.modes import evaluating, input_device
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.score import sample_gradients
from qkov_dist.scoring.score_kinds import KINDS, Score
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.stats.permutation import draw_labels, head_nulls, pair_counts

from .examined_model import Captured, ExaminedModel


@dataclass(frozen=True)
class Target:
    """One head of one block of one layer, by the model's numbers."""

    layer: int
    block: str
    head: int


@dataclass(frozen=True)
class HeadEffect:
    """What is known of one head.

    Attributes:
        target: Which head.
        predicted: Predictor -> value.
        changes: Change of A's mean loss for each step size.
    """

    target: Target
    predicted: Mapping[str, float]
    changes: tuple[float, ...]


def sample_targets(examined: ExaminedModel, count: int, seed: int) -> tuple[Target, ...]:
    """About ``count`` heads, as many of each block, spread over the layers examined; at random within a layer."""
    rng = np.random.default_rng(seed)
    targets: list[Target] = []
    per_block = -(-count // len(BLOCKS))
    for block in BLOCKS:
        layers = [layer for layer in examined.attention_layers if block in layer.blocks]
        left = {layer.index: rng.permutation(layer.heads(block)).tolist() for layer in layers}
        for place in range(min(per_block, sum(map(len, left.values())))):
            open_layers = [index for index in left if left[index]]
            index = open_layers[place % len(open_layers)]
            targets.append(Target(index, block, left[index].pop()))
    return tuple(sorted(targets, key=lambda target: (target.layer, BLOCKS.index(target.block), target.head)))


def measure(
    examined: ExaminedModel,
    targets: Sequence[Target],
    steps: Sequence[float],
    on_head: Callable[[int], object] = lambda n: None,
) -> list[HeadEffect]:
    """Score every target, take each step on B in it alone, and measure the change of A's mean loss.

    Args:
        examined: The model and the samples; its layers are those of the targets.
        targets: The heads.
        steps: Step sizes eta.
        on_head: Called with 1 after each head.

    Raises:
        QkovError: where weights cannot be changed in place.
    """
    if not examined.all_plain():
        raise QkovError(
            "qkov validate",
            expected="weights that a step can change: dense and floating",
            got="quantized or sharded weights",
            remedy="Load the model with --dtype float32, in one process.",
        )
    with examined.captured() as captured:
        gradients = {target: _mean_gradients(captured, target) for target in targets}
        predicted = _predictors(captured, gradients)
    batches = _batches(examined, examined.a)
    effects = []
    with evaluating(examined.model), torch.no_grad():
        before = mean_loss(examined.model, batches)
        for target in targets:
            changes = []
            for step in steps:
                with stepped(examined, target, [step * of_b for _, of_b in gradients[target]]):
                    changes.append(mean_loss(examined.model, batches) - before)
            effects.append(HeadEffect(target, predicted[target], tuple(changes)))
            on_head(1)
    return effects


@contextmanager
def stepped(examined: ExaminedModel, target: Target, updates: Sequence[Tensor]) -> Iterator[None]:
    """Subtract one update [out, in] from each rectangle of a head's slice; restore the weights exactly."""
    with ExitStack() as stack:
        for (projection, piece), update in zip(_pieces(examined, target), updates, strict=True):
            region = region_of(examined.model.get_submodule(projection.module), projection, piece.rect)
            stack.enter_context(_subtracted(region, update))
        yield


def _subtracted(region: Tensor, update: Tensor) -> AbstractContextManager[None]:
    return changed([region], lambda place: place.sub_(update.to(place)))


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean of the samples' own losses, averaged in float64."""
    losses = [sample_losses(model, batch, "mean").double() for batch in batches]
    return float(torch.cat(losses).mean())


def _batches(examined: ExaminedModel, samples: Sequence[Sample]) -> list[Batch]:
    device = input_device(examined.model)
    names = [sample.id for sample in samples]
    made = make_batches(
        samples,
        names=names,
        batch_tokens=examined.batch_tokens,
        objective=examined.objective,
        alone=examined.soundness.alone,
    )
    return [batch.to(device) for batch in made]


def _pieces(examined: ExaminedModel, target: Target) -> list[tuple[Projection, HeadSlice]]:
    """The rectangles of a head, each with its projection."""
    return [
        (projection, piece)
        for projection in examined.layout.layer(target.layer).projections
        for piece in projection.slices
        if (piece.block, piece.head) == (target.block, target.head)
    ]


def _mean_gradients(captured: Captured, target: Target) -> list[tuple[Tensor, Tensor]]:
    """Mean gradients of A and of B on each rectangle of a head, float64 [out, in]."""
    examined, store = captured.examined, captured.store
    spans, num_a = [store.spans[n] for n in range(examined.num_samples)], len(examined.a)
    means = []
    for projection, piece in _pieces(examined, target):
        site = Site(target.layer, projection.module)
        x, d = store.x(site).features(piece.rect.cols).double(), store.d(site).features(piece.rect.rows).double()
        gradients = sample_gradients(x, d, spans).view(-1, *piece.rect.shape)
        means.append((gradients[:num_a].mean(dim=0), gradients[num_a:].mean(dim=0)))
    return means


def _predictors(
    captured: Captured, gradients: Mapping[Target, Sequence[tuple[Tensor, Tensor]]]
) -> dict[Target, dict[str, float]]:
    """Every predictor of every target; scores are those of the engine, among all samples under one Fisher."""
    interference, signed = (_pooled_statistics(captured, score) for score in ("interference", "signed"))
    found = {}
    for target, pieces in gradients.items():
        of_a, of_b = (torch.cat([piece[side].flatten() for piece in pieces]) for side in (0, 1))
        product, agreement = float(of_a @ of_b), signed[target]["cross_mean"]
        found[target] = {
            "signed": agreement,
            "-signed": -agreement,
            "|signed|": abs(agreement),
            "interference": interference[target]["cross_mean"],
            "overlap": interference[target]["overlap"],
            "||gA|| ||gB||": float(of_a.norm() * of_b.norm()),
            "-gA.gB": -product,
            "|gA.gB|": abs(product),
        }
    return found


def _pooled_statistics(captured: Captured, score: Score) -> dict[Target, dict[str, float]]:
    """``cross_mean`` and, of scores that are never negative, ``overlap`` of every head examined."""
    examined, num = captured.examined, captured.examined.num_samples
    roles = Roles(tuple(range(num)), examined.roles().weights, slice(0, num), slice(0, num))
    observed = draw_labels(0, len(examined.a), len(examined.b), 0)
    pairs = torch.from_numpy(different_pairs([""] * num))
    counts = pair_counts(observed, pairs)
    device = next(examined.model.parameters()).device
    found = {}
    for layer in examined.tile_plan().layers:
        for block, part in score_layer(layer, captured.store, roles, ScoreSettings(score=score, device=device)).items():
            nulls = head_nulls(
                part.scores.cpu(), observed, pairs, counts, with_overlap=not KINDS[score].may_be_negative
            )
            for place, head in enumerate(part.heads):
                values = {name: float(null.values[place, 0]) for name, null in nulls.items()}
                found[Target(layer.layer, block, head)] = values
    return found

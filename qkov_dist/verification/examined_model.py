"""A model under examination: its scores on a few samples, with or without a change to its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.losses import sample_losses
from qkov_dist.capture.soundness import Soundness
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import Batch, Objective, make_batches
from qkov_dist.data.samples import Sample
from qkov_dist.distributed.ownership import Owned
from qkov_dist.layout.heads import AttentionLayer, Layout, Projection
from qkov_dist.layout.rects import Rect
from qkov_dist.layout.weights import changed, is_plain, region_of
from qkov_dist.modes import evaluating, input_device
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.fisher import Estimator, by_task, fisher_steps, fisher_weights
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.tiles import Selection, TilePlan, make_tile_plan

FISHER_BATCH, DECAY, BUDGET = 8, 0.99, 2**30
Scores = dict[int, dict[str, Tensor]]  # layer -> block -> [heads, left, right]


@dataclass(frozen=True)
class Captured:
    """The factors of both tasks' samples at the layers examined."""

    examined: ExaminedModel
    store: FactorStore
    losses: np.ndarray

    def scores(self, settings: ScoreSettings, *, swapped: bool = False, owned: Owned | None = None) -> Scores:
        """Scores of A x B, or of B x A when ``swapped``; of one simulated rank's part where ``owned`` is given."""
        roles = self.examined.roles(swapped=swapped)
        return {
            layer.layer: {block: part.scores for block, part in score_layer(layer, self.store, roles, settings).items()}
            for layer in self.examined.tile_plan(owned).layers
        }


@dataclass(frozen=True)
class ExaminedModel:
    """A model, its layout, and a few samples of two tasks.

    Attributes:
        model: The model; every change to it is undone.
        layout: Where its heads are said to be.
        a: Samples of task A.
        b: Samples of task B.
        layers: Layer numbers to score.
        objective: How labels align with outputs.
        batch_tokens: Padded tokens in one compute batch.
        estimator: Of the Fisher.
    """

    model: nn.Module
    layout: Layout
    a: Sequence[Sample]
    b: Sequence[Sample]
    layers: tuple[int, ...]
    objective: Objective = "causal"
    batch_tokens: int = 2048
    estimator: Estimator = "ema"

    @cached_property
    def soundness(self) -> Soundness:
        """What is known of the model's passes, whatever the changes to its weights."""
        return Soundness()

    @property
    def num_samples(self) -> int:
        """Samples of both tasks."""
        return len(self.a) + len(self.b)

    @property
    def attention_layers(self) -> tuple[AttentionLayer, ...]:
        """The layers to score."""
        return tuple(self.layout.layer(index) for index in self.layers)

    def tile_plan(self, owned: Owned | None = None) -> TilePlan:
        """The tiles of the layers examined."""
        selection = Selection(self.layers)
        return make_tile_plan(self.layout, selection, include_bias=False, num_samples=self.num_samples, owned=owned)

    def roles(self, *, swapped: bool = False) -> Roles:
        """All samples, under one and the same Fisher whichever way the pairs go."""
        num_a, num = len(self.a), self.num_samples
        steps = fisher_steps((num_a, num - num_a), batch_size=FISHER_BATCH, scope="pooled")
        weights = by_task(fisher_weights(steps, num, estimator=self.estimator, decay=DECAY), np.arange(num) >= num_a)
        of_a, of_b = slice(0, num_a), slice(num_a, num)
        return Roles(tuple(range(num)), weights, *((of_b, of_a) if swapped else (of_a, of_b)))

    @contextmanager
    def captured(self, *, loss_factor: float = 1.0, one_by_one: bool = False) -> Iterator[Captured]:
        """Run the samples, in batches as a run does or each alone, and keep their factors inside the block."""
        with closing(FactorStore(BUDGET)) as store:
            batch_tokens = 1 if one_by_one else self.batch_tokens
            sites = self.tile_plan().sites
            collection = Collection(
                store,
                sites,
                self.objective,
                loss_factor=loss_factor,
                batch_tokens=batch_tokens,
                soundness=self.soundness,
            )
            collection.run_tasks(self.model, [("a", self.a), ("b", self.b)])
            yield Captured(self, store, np.array([record.loss for record in collection.records]))

    def scores(self, settings: ScoreSettings, *, loss_factor: float = 1.0) -> Scores:
        """Run the samples and score A x B."""
        with self.captured(loss_factor=loss_factor) as captured:
            return captured.scores(settings)

    def batches(self, samples: Sequence[Sample]) -> list[Batch]:
        """Samples in compute batches, where the model is; ``samples`` of a batch are their places."""
        with evaluating(self.model):
            self.soundness.see(self.model, samples, self.objective)
        device = input_device(self.model)
        made = make_batches(
            samples,
            names=[sample.id for sample in samples],
            batch_tokens=self.batch_tokens,
            objective=self.objective,
            alone=self.soundness.alone,
        )
        return [batch.to(device) for batch in made]

    def losses(self, batches: Sequence[Batch]) -> npt.NDArray[np.float64]:
        """Each sample's own loss, in the order of the samples that the batches are of."""
        found = np.full(sum(len(batch.samples) for batch in batches), np.nan)
        with evaluating(self.model), torch.no_grad():
            for batch in batches:
                found[list(batch.samples)] = sample_losses(self.model, batch, "mean").double().cpu().numpy()
        return found

    @contextmanager
    def heads_multiplied(self, changes: Sequence[tuple[str, Callable[[int], bool], float]]) -> Iterator[None]:
        """Multiply head slices, weights and their own biases, in every layer examined; restore them exactly.

        Args:
            changes: (block, whether a native head is meant, factor).
        """
        with ExitStack() as stack:
            for layer in self.attention_layers:
                for projection in layer.projections:
                    linear = self.model.get_submodule(projection.module)
                    for block, meant, factor in changes:
                        for piece in projection.slices:
                            if piece.block == block and meant(piece.head):
                                stack.enter_context(_multiplied(linear, projection, piece.rect, factor, block))
            yield

    def all_plain(self) -> bool:
        """Whether the weights of the layers examined can be changed in place (dense, unsharded, floating)."""
        projections = (projection for layer in self.attention_layers for projection in layer.projections)
        return all(is_plain(getattr(self.model.get_submodule(p.module), "weight", None)) for p in projections)

    @contextmanager
    def all_weights_doubled(self) -> Iterator[None]:
        """Double every parameter; a power of two, so that halving restores it exactly."""
        unique = {parameter.data_ptr(): parameter for parameter in self.model.parameters() if is_plain(parameter)}
        try:
            _multiply_all(unique.values(), 2.0)
            yield
        finally:
            _multiply_all(unique.values(), 0.5)


def _multiplied(
    linear: nn.Module, projection: Projection, rect: Rect, factor: float, block: str
) -> AbstractContextManager[None]:
    regions = [region_of(linear, projection, rect)]
    if projection.has_bias and block != "O":
        regions.append(linear.get_parameter("bias").detach()[rect.rows])
    return changed(regions, lambda region: region.mul_(factor))


def _multiply_all(parameters: Iterable[Tensor], factor: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(factor)

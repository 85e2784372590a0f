"""The engine's scores of a whole job in one call."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from samples import mixed_samples
from zoo import VOCAB, Tiny

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.data.batches import sequence
from qkov_dist.data.samples import Sample
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.resolve import resolve
from qkov_dist.scoring.block_totals import block_totals
from qkov_dist.scoring.engine import BlockScores, score_layers
from qkov_dist.scoring.fisher import by_task, fisher_steps, fisher_weights
from qkov_dist.scoring.influence_records import mean_weights
from qkov_dist.scoring.sample_norms import layer_squares, unit_scales
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.tiles import Selection, make_tile_plan


@dataclass(frozen=True)
class Job:
    """Everything that a score depends on, with small defaults."""

    a: list[Sample]
    b: list[Sample]
    selection: Selection = field(default_factory=Selection)
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    include_bias: bool = False
    estimator: str = "ema"
    scope: str = "pooled"
    decay: float = 0.9
    fisher_batch: int = 2
    batch_tokens: int = 32
    budget: int = 2**30
    tile_bytes: int = 2**20
    objective: str = "causal"
    reduction: str = "mean"
    loss_factor: float = 1.0
    gradients_above: int | None = None
    known_lengths: bool = False
    sample_scale: str = "none"

    @property
    def steps(self) -> list[list[int]]:
        return fisher_steps((len(self.a), len(self.b)), batch_size=self.fisher_batch, scope=self.scope)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence(sample, self.objective).input_ids) for sample in (*self.a, *self.b)]

    def roles(self) -> Roles:
        num_a, num = len(self.a), len(self.a) + len(self.b)
        weights = fisher_weights(self.steps, num, estimator=self.estimator, decay=self.decay)
        weights = by_task(weights, np.arange(num) >= num_a)
        means = mean_weights(np.ones(num, bool), (num_a, num - num_a))
        return Roles(tuple(range(num)), weights, slice(0, num_a), slice(num_a, num), means, (num_a, num - num_a))

    def run(
        self, model: Any, folder: Path | None = None, layout: Layout | None = None
    ) -> dict[int, dict[str, BlockScores]]:
        """The engine's result: layer -> block -> scores."""
        layout = layout or resolve(model)
        num = len(self.a) + len(self.b)
        tile_plan = make_tile_plan(
            layout, self.selection, include_bias=self.include_bias, num_samples=num, tile_bytes=self.tile_bytes
        )
        store = FactorStore(
            self.budget,
            folder,
            lengths=self.lengths if self.known_lengths else (),
            gradients_above={}
            if self.gradients_above is None
            else dict.fromkeys(tile_plan.sites, self.gradients_above),
        )
        collection = Collection(
            store, tile_plan.sites, self.objective, self.reduction, self.loss_factor, batch_tokens=self.batch_tokens
        )
        collection.run(model, "a", self.a)
        collection.run(model, "b", self.b)
        sources, roles = [(layer, store) for layer in tile_plan.layers], self.roles()
        if self.sample_scale == "unit":
            squares = sum(layer_squares(layer, store, roles, self.settings) for layer in tile_plan.layers)
            roles = replace(roles, scales=unit_scales(np.sqrt(squares)))
        totals = {}
        if self.settings.ridge_relative:
            totals = {layer.layer: block_totals(layer, store, roles, self.settings) for layer in tile_plan.layers}
        scores = {layer.layer: found for layer, found in score_layers(sources, roles, self.settings, totals)}
        store.close()
        return scores


def job_for(entry: Tiny, **changes) -> Job:
    a, b = mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2)
    return replace(Job(a, b, objective="masked" if entry.masked_lm else "causal"), **changes)


@dataclass(frozen=True)
class Pooled(Job):
    """A job of all pairs that asks for own shares, too."""

    def roles(self):
        of_pairs = super().roles()
        every = slice(0, of_pairs.num_scored)
        return replace(of_pairs, left=every, right=every, own_shares=True)


def pooled(entry, **changes) -> Pooled:
    return Pooled(**(vars(job_for(entry)) | changes))

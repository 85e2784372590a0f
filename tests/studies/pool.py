"""What the studies share: samples captured once, and scored under any order, split and Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real import smollm2
from torch import Tensor

from qkov_dist.capture.collect import Collection
from qkov_dist.capture.store import FactorStore
from qkov_dist.config import TaskConfig
from qkov_dist.data.samples import Sample
from qkov_dist.data.tasks import load_task
from qkov_dist.layout.heads import BLOCKS, Site
from qkov_dist.layout.rects import Rect
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.models import LoadedModel
from qkov_dist.scoring.engine import score_layer
from qkov_dist.scoring.fisher import by_task, fisher_steps, fisher_weights
from qkov_dist.scoring.score import sample_gradients
from qkov_dist.scoring.settings import Roles, ScoreSettings
from qkov_dist.scoring.tiles import Selection, TilePlan, make_tile_plan
from qkov_dist.stats.head_tests import Design, correct, head_tests

Scores = Mapping[str, Tensor]  # block -> [heads of all layers, N, N]
BUDGET = 2**31
RESULTS, IMAGES = Path(__file__).parent / "results", Path(__file__).parents[2] / ".github" / "images"


@dataclass(frozen=True)
class FisherRule:
    """How the Fisher weights the samples."""

    estimator: str = "mean"
    scope: str = "pooled"
    decay: float = 0.99
    batch_size: int = 8

    def weights(self, num_a: int, num_b: int) -> np.ndarray:
        steps = fisher_steps((num_a, num_b), batch_size=self.batch_size, scope=self.scope)
        weights = fisher_weights(steps, num_a + num_b, estimator=self.estimator, decay=self.decay)
        return by_task(weights, np.arange(num_a + num_b) >= num_a)


@dataclass(frozen=True)
class Pool:
    """N captured samples."""

    store: FactorStore
    tile_plan: TilePlan
    num_samples: int

    def scores(
        self, rule: FisherRule, order: Sequence[int], num_a: int, settings: ScoreSettings | None = None
    ) -> Scores:
        """Scores among the samples in ``order``, of which the first ``num_a`` are called A."""
        num = len(order)
        roles = Roles(tuple(order), rule.weights(num_a, num - num_a), slice(0, num), slice(0, num))
        parts: dict[str, list[Tensor]] = {}
        for layer in self.tile_plan.layers:
            for block, found in score_layer(layer, self.store, roles, settings or ScoreSettings()).items():
                parts.setdefault(block, []).append(found.scores)
        return {block: torch.cat(parts[block]) for block in BLOCKS if block in parts}


@contextmanager
def pooled(model: Any, samples: Sequence[Sample], layers: tuple[int, ...] | None = None) -> Iterator[Pool]:
    """Run the samples once and keep their factors inside the block."""
    tile_plan = make_tile_plan(resolve(model), Selection(layers), include_bias=False, num_samples=len(samples))
    with closing(FactorStore(BUDGET)) as store:
        Collection(store, tile_plan.sites).run(model, "pool", samples)
        yield Pool(store, tile_plan, len(samples))


def head_gradients(
    model: Any, samples: Sequence[Sample], layers: tuple[int, ...], every: int = 1
) -> Iterator[tuple[Rect, Tensor]]:
    """Of every n-th head of each projection: where it lies, and all samples' gradients [N, rows * cols]."""
    with pooled(model, samples, layers) as pool, torch.no_grad():
        spans = [pool.store.spans[n] for n in range(len(samples))]
        for number in layers:
            for projection in resolve(model).layer(number).projections:
                site = Site(number, projection.module)
                x, d = pool.store.x(site), pool.store.d(site)
                for rect in (piece.rect for piece in projection.slices[::every]):
                    yield rect, sample_gradients(x.features(rect.cols), d.features(rect.rows), spans)


def task_samples(loaded: LoadedModel, name: str, num: int, max_tokens: int = 64) -> tuple[Sample, ...]:
    """Samples of a generated task."""
    task = TaskConfig(name=name, path=f"builtin:{name}", max_samples=num, max_tokens=max_tokens)
    return load_task(task, loaded.tokenizer, vocab_size=loaded.vocab_size, max_positions=loaded.max_positions).samples


def small_real_model() -> LoadedModel:
    return smollm2()


def reordered(scores: Scores, order: Sequence[int]) -> Scores:
    """The scores of the same samples in another order, under the same Fisher."""
    at = torch.as_tensor(order)
    return {block: part[:, at][:, :, at] for block, part in scores.items()}


def tested(scores: Scores, design: Design) -> dict[str, dict[str, Mapping[str, np.ndarray]]]:
    """Statistic -> block -> name -> [heads], corrected as the product does."""
    tests, max_z = head_tests(scores, design)
    return {name: {block: correct(found[name], max_z[name]) for block, found in tests.items()} for name in design.names}

"""The engine against the oracle, on every architecture."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from jobs import Job, closeness, mixed_samples
from zoo import TINY, VOCAB, Tiny

from qkov_dist.engine import ScoreSettings
from qkov_dist.layout import resolve

TOLERANCE = 1e-3  # the bar for float32: a share of the block's largest score


def expected_scores(entry: Tiny, model, job: Job) -> dict[int, dict[str, torch.Tensor]]:
    samples = [(s.input_ids, s.labels) for s in (*job.a, *job.b)]
    gradients, _ = oracle.per_sample_gradients(model, samples, causal=not entry.masked_lm, reduction=job.reduction)
    everyone = range(len(samples))
    left, right = list(everyone[job.roles().left]), list(everyone[job.roles().right])
    fishers = {
        "ema": lambda squares: oracle.ema_fisher(squares, job.steps, job.decay),
        "mean": lambda squares: torch.stack([squares[n] for step in job.steps for n in step]).mean(dim=0),
    }
    scores = {}
    for layer in resolve(model).layers:
        heads = [oracle.heads_of_layer(model, entry.family, layer.module, g) for g in gradients]
        scores[layer.index] = {
            block: oracle.block_scores(
                heads,
                block,
                fishers[job.estimator],
                left=left,
                right=right,
                score=job.settings.score,
                epsilon=job.settings.epsilon,
                absolute=job.settings.ridge_absolute,
                relative=job.settings.ridge_relative,
            )
            for block in heads[0]
        }
    return scores


def assert_close(got, expected, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys()
    for layer, blocks in expected.items():
        assert got[layer].keys() == blocks.keys()
        for block, scores in blocks.items():
            assert got[layer][block].heads == tuple(range(len(scores))), (layer, block)
            assert closeness(got[layer][block].scores, scores) < tolerance, (layer, block)


def job_for(entry: Tiny, **changes) -> Job:
    a, b = mixed_samples(5, VOCAB, seed=1), mixed_samples(3, VOCAB, seed=2)
    return replace(Job(a, b, objective="masked" if entry.masked_lm else "causal"), **changes)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_equals_the_oracle(name):
    entry = TINY[name]
    model = entry.build()
    job = job_for(entry)
    assert_close(job.run(model), expected_scores(entry, model, job))

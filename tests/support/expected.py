"""What the oracle says of a job: the scores of all layers and heads."""

from __future__ import annotations

import oracle
import torch
from jobs import Job
from zoo import Tiny

from qkov_dist.layout.resolve import resolve


def expected_scores(entry: Tiny, model, job: Job) -> dict[int, dict[str, torch.Tensor]]:
    """The oracle's scores of all layers and heads."""
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
        heads = [
            oracle.heads_of_layer(model, entry.family, layer.module, g, include_bias=job.include_bias)
            for g in gradients
        ]
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

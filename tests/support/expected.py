"""What the oracle says of a job: the scores of all layers and heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import oracle
import torch
from influences import records_of
from jobs import Job
from zoo import Tiny

from qkov_dist.layout.resolve import resolve
from qkov_dist.results.influences import Samples

Scores = dict[int, dict[str, torch.Tensor]]
Records = dict[int, dict[str, np.ndarray]]


def expected_of(entry: Tiny, model, job: Job) -> tuple[Scores, Records]:
    """The oracle's scores, and its records, of all layers and heads, from the same gradients."""
    heads = list(_heads(entry, model, job))
    return _scores(job, heads), _records(job, heads)


def expected_scores(entry: Tiny, model, job: Job) -> Scores:
    """The oracle's scores of all layers and heads."""
    return _scores(job, _heads(entry, model, job))


def expected_influences(entry: Tiny, model, job: Job) -> Records:
    """The oracle's records [head, optimizer, sums and N] of all layers and heads."""
    return _records(job, _heads(entry, model, job))


def _scores(job: Job, heads_of_layers: Iterable[tuple[int, list[oracle.Heads]]]) -> Scores:
    roles, everyone = job.roles(), range(len(job.a) + len(job.b))
    left, right = list(everyone[roles.left]), list(everyone[roles.right])
    return {
        layer: {
            block: oracle.block_scores(
                heads, block, _fisher(job), left=left, right=right, score=job.settings.score, **_regularisation(job)
            )
            for block in heads[0]
        }
        for layer, heads in heads_of_layers
    }


def _records(job: Job, heads_of_layers: Iterable[tuple[int, list[oracle.Heads]]]) -> Records:
    is_a = np.arange(len(job.a) + len(job.b)) < len(job.a)
    found: Records = {}
    for layer, heads in heads_of_layers:
        found[layer] = {}
        for block in heads[0]:
            regularised = oracle.regularised_fishers(heads, block, _fisher(job), **_regularisation(job))
            gradients = [np.stack([sample[block][h].numpy() for sample in heads]) for h in range(len(regularised))]
            of_heads = zip(gradients, regularised, strict=True)
            records = [records_of(g, r.numpy(), Samples(is_a, ~is_a), len(job.a)) for g, r in of_heads]
            found[layer][block] = np.stack(records)
    return found


def _heads(entry: Tiny, model, job: Job) -> Iterator[tuple[int, list[oracle.Heads]]]:
    """Each layer, and every sample's gradients of it by block and head."""
    samples = [(s.input_ids, s.labels) for s in (*job.a, *job.b)]
    gradients, _ = oracle.per_sample_gradients(model, samples, causal=not entry.masked_lm, reduction=job.reduction)
    found = {
        layer.index: [
            oracle.heads_of_layer(model, entry.family, layer.module, g, include_bias=job.include_bias)
            for g in gradients
        ]
        for layer in resolve(model).layers
    }
    if job.sample_scale == "unit":
        norms = [_norm(entry, model, g, job) for g in gradients]
        found = {n: [_scaled(*of_sample) for of_sample in zip(heads, norms, strict=True)] for n, heads in found.items()}
    yield from found.items()


def expected_norms(entry: Tiny, model, job: Job) -> list[float]:
    """Each sample's norm over all scored weights."""
    samples = [(s.input_ids, s.labels) for s in (*job.a, *job.b)]
    gradients, _ = oracle.per_sample_gradients(model, samples, causal=not entry.masked_lm, reduction=job.reduction)
    return [_norm(entry, model, g, job) for g in gradients]


def _norm(entry: Tiny, model, gradients: dict[str, torch.Tensor], job: Job) -> float:
    total = 0.0
    for layer in resolve(model).layers:
        heads = oracle.heads_of_layer(model, entry.family, layer.module, gradients, include_bias=job.include_bias)
        total += sum(float(head.square().sum()) for of_block in heads.values() for head in of_block)
        bias = gradients.get(f"{layer.output.module}.bias") if job.include_bias else None
        total += 0.0 if bias is None else float(bias.square().sum())
    return math.sqrt(total)


def _scaled(heads: oracle.Heads, norm: float) -> oracle.Heads:
    return {block: [head / norm for head in of_block] for block, of_block in heads.items()}


def _fisher(job: Job) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    if job.estimator == "ema":
        return lambda squares: oracle.ema_fisher(squares, job.steps, job.decay)
    return lambda squares: torch.stack([squares[n] for step in job.steps for n in step]).mean(dim=0)


def _regularisation(job: Job) -> dict[str, float]:
    settings = job.settings
    return {"epsilon": settings.epsilon, "absolute": settings.ridge_absolute, "relative": settings.ridge_relative}

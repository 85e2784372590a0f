"""Tiny models under examination, and their losses by other means."""

from __future__ import annotations

import torch
from samples import mixed_samples
from torch.nn.functional import cross_entropy
from zoo import TINY, VOCAB

from qkov_dist.layout.resolve import resolve
from qkov_dist.verification.examined_model import ExaminedModel


def examined_of(name: str, dtype=torch.float64, *, num: int = 4) -> ExaminedModel:
    model = TINY[name].build().to(dtype)
    a, b = (mixed_samples(num, VOCAB, seed=seed) for seed in (1, 2))
    return ExaminedModel(model, resolve(model), a, b, (0, 1), estimator="mean")


def loss_of(model, samples) -> torch.Tensor:
    """The mean of the samples' own losses, one sample at a time; transformers' own loss would be float32."""
    losses = []
    for sample in samples:
        logits = model(input_ids=torch.from_numpy(sample.input_ids)[None]).logits[0, :-1]
        losses.append(cross_entropy(logits, torch.from_numpy(sample.labels[1:])))
    return torch.stack(losses).mean()

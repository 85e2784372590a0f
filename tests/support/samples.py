"""Samples of tests: made up, padded as a tokenizer would, and written down as a task."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from qkov_dist.data.samples import Sample


def mixed_samples(num: int, vocab: int, *, seed: int, lengths: tuple[int, int] = (3, 12), mask: bool = True):
    """Random samples of mixed length; every other one has its first labels masked, and one has gaps."""
    rng = np.random.default_rng(seed)
    samples = []
    for n in range(num):
        ids = rng.integers(3, vocab, size=rng.integers(*lengths)).astype(np.int64)
        labels = ids.copy()
        labels[0] = -100
        if mask and n % 2:
            labels[: len(ids) // 2] = -100
        if mask and n == 2:
            labels[-1] = -100
        samples.append(Sample(f"{seed}-{n}", ids, labels, ""))
    return samples


def write_task(path: Path, samples) -> None:
    lines = [{"id": s.id, "input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def padded(samples, side: str):
    """The batch a tokenizer would make: ids, mask and labels, padded on one side with a token that is also real."""
    width = max(len(s.input_ids) for s in samples)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for s in samples:
        fill = [0] * (width - len(s.input_ids))

        def row(values, pad, fill=fill):
            pads = [pad] * len(fill)
            return [*values, *pads] if side == "right" else [*pads, *values]

        batch["input_ids"].append(row(s.input_ids.tolist(), 7))
        batch["attention_mask"].append(row([1] * len(s.input_ids), 0))
        batch["labels"].append(row(s.labels.tolist(), -100))
    return {key: torch.tensor(rows) for key, rows in batch.items()}

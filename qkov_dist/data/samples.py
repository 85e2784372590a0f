"""Tokenized samples, and what makes two tasks the same.

Labels follow transformers: ``labels[t]`` is predicted from the tokens before t, and -100 is ignored.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORED = -100


Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenized sample: ``input_ids`` and ``labels`` are int64 [T]; ``text`` is what a report shows."""

    id: str
    input_ids: Ids
    labels: Ids
    text: str

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Task:
    """A name and its samples, in file order; what may (notes) and what must (warnings) be known of them."""

    name: str
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def task_fingerprint(task: Task) -> str:
    """SHA-256 over the token ids and labels of every sample, in order; names, ids and texts do not enter."""
    digest = hashlib.sha256()
    for sample in task.samples:
        digest.update(sample.num_tokens.to_bytes(8, "little"))
        for array in (sample.input_ids, sample.labels):
            digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()

"""Padded batches of samples, whose composition changes no sample's gradient.

Position t of ``targets`` is what the model's output at position t has to predict: the labels shifted by one for a
causal model, the labels themselves for a masked one. A causal sample ends at its last predicting position: later
tokens cannot influence its loss. Samples are sorted by length before they are grouped, so that little is padded, and
padded on the right, where no causal model can see it.

Some models see how long a batch is (a rope whose frequencies follow from the length). Theirs are ``alone``: uncut, and
beside samples of exactly their own length, so that nothing is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .samples import IGNORED, Sample

Objective = Literal["causal", "masked"]
SMALL_MODEL = 10**9  # parameters below which a GPU needs more tokens than 2048 to have more work than launches


@dataclass(frozen=True)
class Batch:
    """N samples padded to T tokens.

    Attributes:
        samples: The samples' numbers in the pooled order, [N].
        names: How a message calls each sample, [N].
        input_ids: Token ids, int64 [N, T].
        attention_mask: 1 on real tokens, 0 on padding, int64 [N, T].
        targets: What the output at each position predicts, int64 [N, T]; -100 where nothing.
        kept: 1 on tokens whose factors are kept, int64 [N, T]: all real ones up to the last that can influence a loss.
    """

    samples: tuple[int, ...]
    names: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    kept: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample whose factors are kept."""
        return tuple(self.kept.sum(dim=1).tolist())

    @property
    def num_targets(self) -> Tensor:
        """Labelled positions of each sample, int64 [N]."""
        return (self.targets != IGNORED).sum(dim=1)

    def halves(self) -> tuple[Batch, Batch]:
        """Two batches of half the samples, each padded to its own longest; at least two samples."""
        middle = len(self.samples) // 2
        return self._part(slice(0, middle)), self._part(slice(middle, None))

    def _part(self, part: slice) -> Batch:
        longest = int(self.attention_mask[part].sum(dim=1).max())
        return Batch(self.samples[part], self.names[part], *(tensor[part, :longest] for tensor in self._tensors))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.samples, self.names, *(tensor.to(device) for tensor in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.attention_mask, self.targets, self.kept


@dataclass(frozen=True)
class Sequenced:
    """One sample as the model will see it.

    Attributes:
        input_ids: Its tokens, int64 [T].
        targets: What each position predicts, int64 [T].
        num_kept: The tokens, from the first, that can influence its loss.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    num_kept: int


def default_batch_tokens(*, on_cpu: bool, moves: bool, num_parameters: int) -> int:
    """Padded tokens in one batch, where none are asked for.

    On a CPU few: what a layer leaves stays in its caches, and matrix products are no slower. More on a GPU, which they
    have to fill, all the more where the layers are small; and where each batch moves weights or sums (``moves``: tensor
    parallel, sharded or offloaded weights).
    """
    if on_cpu and not moves:
        return 512
    return 8192 if num_parameters < SMALL_MODEL and not moves else 2048


def sequence(sample: Sample, objective: Objective, *, uncut: bool = False) -> Sequenced:
    """Align a sample's labels with the outputs that predict them, and cut what cannot matter unless ``uncut``."""
    if objective == "masked":
        return Sequenced(sample.input_ids, sample.labels, len(sample.input_ids))
    targets = np.append(sample.labels[1:], IGNORED)
    num_kept = int(np.flatnonzero(targets != IGNORED)[-1]) + 1
    end = len(targets) if uncut else num_kept
    return Sequenced(sample.input_ids[:end], targets[:end], num_kept)


def content_of(sample: Sample, objective: Objective) -> str:
    """A hash of what the model is shown and has to predict: samples of one content have one gradient."""
    seen = sequence(sample, objective)
    digest = hashlib.sha256(len(seen.input_ids).to_bytes(8, "little"))
    for array in (seen.input_ids, seen.targets):
        digest.update(np.asarray(array).astype("<i8").tobytes())
    return digest.hexdigest()[:32]


def num_targets(sample: Sample, objective: Objective) -> int:
    """How many positions of a sample carry a loss."""
    return int((sequence(sample, objective).targets != IGNORED).sum())


def make_batch(samples: Sequence[Sequenced], numbers: Sequence[int], names: Sequence[str], *, length: int = 0) -> Batch:
    """Pad a few samples to the longest of them, or to ``length`` where that is more."""
    shape = (len(samples), max(length, *(len(s.input_ids) for s in samples)))
    ids, mask, kept = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    targets = torch.full(shape, IGNORED, dtype=torch.int64)
    for n, sample in enumerate(samples):
        length = len(sample.input_ids)
        ids[n, :length] = torch.from_numpy(sample.input_ids)
        mask[n, :length] = 1
        kept[n, : sample.num_kept] = 1
        targets[n, :length] = torch.from_numpy(sample.targets)
    return Batch(tuple(numbers), tuple(names), ids, mask, targets, kept)


def make_batches(
    samples: Sequence[Sample],
    *,
    names: Sequence[str],
    numbers: Sequence[int] | None = None,
    batch_tokens: int,
    objective: Objective,
    alone: bool = False,
) -> Iterator[Batch]:
    """Group samples of like length into batches of at most ``batch_tokens`` padded tokens.

    A single sample longer than ``batch_tokens`` makes a batch of its own.

    Args:
        samples: The samples, in file order.
        names: How a message calls each of them.
        numbers: Pooled number of each of them; from 0 by default.
        batch_tokens: Padded tokens in one batch.
        objective: Whether labels are shifted (causal) or not (masked).
        alone: Whether the model sees how long a batch is: samples are then uncut, and of one length in each batch.
    """
    sequenced = [sequence(sample, objective, uncut=alone) for sample in samples]
    numbers = range(len(samples)) if numbers is None else numbers
    for group in groups_of([len(s.input_ids) for s in sequenced], batch_tokens, alike=alone):
        yield make_batch([sequenced[n] for n in group], [numbers[n] for n in group], [names[n] for n in group])


def groups_of(lengths: Sequence[int], batch_tokens: int, *, alike: bool = False) -> Iterator[list[int]]:
    """Sample numbers, longest first, cut where one more would exceed ``batch_tokens``, or be shorter if ``alike``."""
    group: list[int] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        too_many = group and (len(group) + 1) * lengths[group[0]] > batch_tokens
        if too_many or (alike and group and lengths[n] != lengths[group[0]]):
            yield group
            group = []
        group.append(n)
    if group:
        yield group

"""A part of a batch's positions, as one of the ranks that share its tokens runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qkov_dist.data.batches import Batch


@dataclass(frozen=True)
class SpanBatch(Batch):
    """The positions from ``start`` on of N samples, S of each.

    Attributes:
        start: Position of the first.
        length: Positions of the whole batch, T.
        targets_of_whole: Labelled positions of each sample in the whole batch, int64 [N].
    """

    start: int
    length: int
    targets_of_whole: Tensor

    @property
    def num_targets(self) -> Tensor:
        """Labelled positions of each whole sample, by which a mean divides."""
        return self.targets_of_whole

    def to(self, device: torch.device) -> SpanBatch:
        """The same on another device."""
        tensors = (tensor.to(device) for tensor in (*self._tensors, self.targets_of_whole))
        ids, mask, targets, kept, of_whole = tensors
        return SpanBatch(self.samples, self.names, ids, mask, targets, kept, self.start, self.length, of_whole)

    @property
    def positions(self) -> Tensor:
        """Where each token is in its sample, int64 [N, S]; padding beyond the batch is at its last position."""
        num, size = self.input_ids.shape
        places = torch.arange(self.start, self.start + size, device=self.input_ids.device)
        return places.clamp(max=self.length - 1).expand(num, size)

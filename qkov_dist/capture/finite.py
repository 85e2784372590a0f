"""Whether gradients and inputs are finite: at once, naming the sample, or by their sums, all of a batch in one look.

A sum keeps any NaN or infinity, and reads each number once; where it is not finite, the numbers are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qkov_dist.data.batches import Batch
from qkov_dist.errors import QkovError


def check_finite(tensors: Mapping[str, Tensor], batch: Batch, where: str) -> None:
    """Raise unless all is finite.

    Args:
        tensors: By what messages call them, [tokens, width] of the batch's real tokens, sample after sample.
        batch: Names and lengths of its samples.
        where: What a message says after the sample's name.

    Raises:
        QkovError: names the first sample that is not.
    """
    for what, tensor in tensors.items():
        if bool(total(tensor).isfinite()):
            continue  # a sum that only overflows is looked at more closely
        start = 0
        for name, length in zip(batch.names, batch.lengths, strict=True):
            if not bool(torch.isfinite(tensor[start : start + length]).all()):
                raise QkovError(
                    f"{name}, {where}",
                    expected=f"a finite {what}",
                    got="NaN or infinity",
                    remedy="Check the sample, or load the model in a wider type (model.dtype: float32 or bfloat16).",
                )
            start += length


def total(tensor: Tensor) -> Tensor:
    """The sum of all numbers, where they are."""
    return tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def all_finite(sums: Sequence[Tensor]) -> bool:
    """Whether all numbers are, waiting for each device once."""
    devices = {one.device for one in sums}
    return all(bool(torch.stack([one for one in sums if one.device == device]).isfinite().all()) for device in devices)


def check_losses(losses: Tensor, batch: Batch) -> None:
    """Raise, naming the sample, unless every loss is finite."""
    losses = losses.detach()
    if bool(torch.isfinite(losses).all()):
        return
    n = int((~torch.isfinite(losses)).nonzero()[0])
    raise QkovError(
        batch.names[n],
        expected="a finite loss",
        got=str(float(losses[n])),
        remedy="Check the sample, or load the model in a wider type (model.dtype: float32 or bfloat16).",
    )


def refuse_not_finite(
    scores: Tensor,
    where: str,
    heads: Sequence[int],
    left: Sequence[str],
    right: Sequence[str],
    *,
    with_absent: bool = False,
) -> None:
    """Refuse scores [heads, left, right] that are not finite.

    Args:
        scores: The scores.
        where: Layer and block, for the message.
        heads: The heads' numbers.
        left: Names of the samples in the role of i.
        right: Names of the samples in the role of j.
        with_absent: Whether a head that is NaN throughout is absent, and passes.

    Raises:
        QkovError: at the first score that is not finite.
    """
    if np.isfinite(scores.numpy(force=True)).all():  # the usual case
        return
    wrong = ~scores.isfinite()
    if with_absent:
        wrong &= ~scores.isnan().all(-1).all(-1)[:, None, None]
    if wrong.any():
        head, i, j = wrong.nonzero()[0].tolist()
        raise QkovError(
            f"{where}, head {heads[head]}, samples {left[i]!r} and {right[j]!r}",
            expected="a finite score",
            got=f"{scores[head, i, j].item()}",
            remedy="These samples' gradients overflow: widen compute.score_dtype or model.dtype, or leave them out.",
        )

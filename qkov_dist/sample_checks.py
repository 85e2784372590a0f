"""What scores say of single samples: that one's gradients overflow, or that one has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .errors import QkovError
from .partial_schema import BlockPartial
from .results import SampleTable

_LISTED = 5  # samples in a warning


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


@dataclass
class WithoutGradient:
    """Samples whose gradient is zero in heads where others have one: they take no part in the scores there.

    Attributes:
        heads: Pooled number of such a sample -> how many heads, and the first of them.
        num_heads: Heads seen.
    """

    heads: dict[int, tuple[int, str]] = field(default_factory=dict)
    num_heads: int = 0

    def see(self, layer: int, block: str, part: BlockPartial, *, pooled: bool) -> None:
        """Look at one block's scores, summed over ranks: a sample without gradient has zeros with all others.

        Args:
            layer: The layer's number.
            block: The block.
            part: Its scores, [heads, N, N] of all samples if ``pooled``, else [heads, A, B].
            pooled: Which of the two.
        """
        self.num_heads += len(part.heads)
        scores = part.scores[part.scores.any(axis=(1, 2))]
        heads = part.heads[part.scores.any(axis=(1, 2))].tolist()
        silent = ~scores.any(axis=2)
        if not pooled:
            silent = np.concatenate([silent, ~scores.any(axis=1)], axis=1)
        for head, sample in np.argwhere(silent).tolist():
            count, first = self.heads.get(sample, (0, f"{block}, layer {layer}, head {heads[head]}"))
            self.heads[sample] = (count + 1, first)

    def warnings(self, tasks: Sequence[str], samples: Sequence[SampleTable]) -> list[str]:
        """One sentence that names them, those of most heads first; none where every sample has gradients."""
        if not self.heads:
            return []
        names = [
            f"task {task!r}, sample {name!r}" for task, table in zip(tasks, samples, strict=True) for name in table.ids
        ]
        ranked = sorted(self.heads, key=lambda number: (-self.heads[number][0], number))
        listed = [
            f"{names[number]} in {self.heads[number][0]} of {self.num_heads} heads (first {self.heads[number][1]})"
            for number in ranked[:_LISTED]
        ]
        more = f"; {len(ranked) - _LISTED} samples more" if len(ranked) > _LISTED else ""
        return [
            f"gradients that are exactly zero, and so are the scores: {'; '.join(listed)}{more}. "
            "Check these samples, and their loss if the model is in half precision."
        ]

"""How scores are formed: what of a configuration the engine has to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from qkov_dist.config import RunConfig

from .native_kernel import NativeKernel, native_kernel
from .pair_trial import PairTrials
from .score_kinds import Score
from .tiles import GPU_TILE_BYTES

KEPT_BYTES = 64 * 2**20  # of a layer's scores that stay where they were formed until its heads are tested there
DTYPES = {"float32": torch.float32, "float64": torch.float64}  # in which scores may be formed


def may_stay(num_heads: int, of_a_head: int) -> bool:
    """Whether a layer's scores, of so many heads and bytes of each, are few enough to stay where they were formed."""
    return num_heads * of_a_head <= KEPT_BYTES


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are formed; what they mean is in :mod:`qkov_dist.scoring.score` and ``scoring/README.md``."""

    score: Score = "interference"
    epsilon: float = 0.0
    ridge_absolute: float = 0.0
    ridge_relative: float = 1e-3
    dtype: torch.dtype = torch.float32
    matmul_precision: str = "highest"  # of float32 products, whatever the process has set
    device: torch.device | str = "cpu"
    compile: bool = False
    scratch: Path | None = None  # where scores are that are too large for memory
    warn: Callable[[str], object] = lambda line: None  # takes a line where memory ran out
    head_batch_bytes: int | None = (
        None  # of gradients of several heads at a time; 0: one head; None: as the device likes it
    )
    kernel_heads: int | None = None  # that a worker has the kernel score at a time; None: as a layer has many
    trials: PairTrials | None = None  # which kernel scores tiles fastest on a GPU; None: torch's products do
    kept_layers: frozenset[int] = frozenset()  # whose scores stay where they were formed, too, for tests there

    @staticmethod
    def of(config: RunConfig) -> ScoreSettings:
        """What a configuration says of them; where, and how else, is the run's business."""
        ridge, compute = config.ridge, config.compute
        return ScoreSettings(
            cast(Score, config.metric.score),
            ridge.epsilon,
            ridge.absolute,
            ridge.relative,
            DTYPES[compute.score_dtype],
            compute.matmul_precision,
        )

    @property
    def kernel(self) -> NativeKernel | None:
        """What scores heads on a CPU, where that is compiled; None where torch's products do, as those of less than
        float32 do.

        Raises:
            QkovError: where it cannot be compiled.
        """
        exact = self.matmul_precision == "highest" and torch.device(self.device).type == "cpu"
        return native_kernel(self.dtype) if self.compile and exact else None

    def max_elements(self, num_samples: int) -> int:
        """Elements that the heads which are worked on together may have in a tile."""
        preferred = GPU_TILE_BYTES if torch.device(self.device).type == "cuda" else 0
        size = preferred if self.head_batch_bytes is None else self.head_batch_bytes
        return size // (num_samples * self.dtype.itemsize)


@dataclass(frozen=True)
class Roles:
    """Which samples take part.

    Attributes:
        members: Pooled sample numbers whose gradients are formed, [N].
        weights: Each member's weight in the Fisher, float64 [tasks, N]: in the row of its task.
        left: Members in the role of i, a range of positions in ``members``.
        right: Members in the role of j.
        means: For effects, the weight of each member with a role in the mean gradient of its task, float64
            [num_scored]; 0 of those that count in neither. None leaves effects out.
        sizes: How many members with a role each task has, one task behind another from the first member on.
        scales: What each member's gradient is multiplied by (``sample_norms``), float64 [N]; None leaves them alone.
        own_shares: Whether sums are formed for what samples' own shares of the Fisher do to ``overlap``: of all pairs.
    """

    members: tuple[int, ...]
    weights: np.ndarray
    left: slice
    right: slice
    means: np.ndarray | None = None
    sizes: tuple[int, ...] = (0, 0)
    scales: np.ndarray | None = None
    own_shares: bool = False

    @property
    def num_scored(self) -> int:
        """Members that have a role: the first so many. Those behind them the Fisher alone needs."""
        return int(max(self.left.stop, self.right.stop))

    @property
    def shape(self) -> tuple[int, int]:
        """(samples in the role of i, samples in the role of j)."""
        return self.left.stop - self.left.start, self.right.stop - self.right.start

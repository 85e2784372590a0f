"""Which of the ways to score a tile on a GPU is fastest there: tried once for each shape of tile that a run has.

The kernels of ``pair_kernel`` are compiled by Triton for whatever GPU and in whatever release is at hand. So each is
first compared with torch's products on random gradients, and used only where it gives the same scores in less time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qkov_dist.memory import UnlessShort, is_shortage

from .kernel import Rule, add_tile
from .pair_kernel import PairKernel, can_use
from .settings import ScoreSettings
from .tile_gradients import Buffers

TURNS = 3  # that are timed, after one in which kernels are compiled
TOLERANCE = {"ieee": 1e-4, "tf32": 1e-2}  # of the largest score; sums of thousands of products in another order


@dataclass
class PairTrials:
    """What was found for each shape of tile, for one run's samples and score.

    Attributes:
        settings: Where scores are formed and how.
    """

    settings: ScoreSettings
    _found: dict[tuple[int, int], PairKernel | None] = field(default_factory=dict)

    @staticmethod
    def of(settings: ScoreSettings) -> PairTrials | None:
        """Those of a run; None where kernels cannot be used, or nothing is to be compiled."""
        usable = settings.compile and can_use(settings.dtype, torch.device(settings.device))
        return PairTrials(settings) if usable else None

    def fastest(self, heads: int, size: int, rule: Rule, weights: Tensor) -> PairKernel | None:
        """The kernel that scores tiles fastest; None where torch's products do, or where there is no room to try.

        Args:
            heads: That are worked on together.
            size: Elements of the tile of each.
            rule: The score.
            weights: Each sample's weight in the Fisher, by task [T, N].
        """
        if (heads, size) not in self._found:
            self._found[heads, size] = None
            with UnlessShort():
                self._found[heads, size] = self._tried(heads, size, rule, weights)
        return self._found[heads, size]

    def _tried(self, heads: int, size: int, rule: Rule, weights: Tensor) -> PairKernel | None:
        settings, device = self.settings, torch.device(self.settings.device)
        made = torch.Generator(device).manual_seed(0)
        gradients = torch.randn(weights.shape[1], heads, size, generator=made, device=device, dtype=settings.dtype)
        expected, least = timed_scores(rule, gradients, weights)
        best = None
        for kernel in PairKernel.candidates(settings.matmul_precision):
            try:
                found, taken = timed_scores(replace(rule, pairs=kernel), gradients, weights)
            except Exception as error:  # whatever Triton or a driver has against it
                if is_shortage(error):
                    raise
                settings.warn(f"scores are not formed by {kernel}: {str(error).splitlines()[0]}")
                continue
            if not (deviation := largest_deviation(found, expected)) <= TOLERANCE[kernel.precision]:
                settings.warn(f"scores are not formed by {kernel}: it is off torch's products by {deviation:.2g} here")
            elif taken < least:
                best, least = kernel, taken
        return best


def timed_scores(rule: Rule, gradients: Tensor, weights: Tensor) -> tuple[list[Tensor], float]:
    """Scores of a tile and what tasks add to its Fisher, and the seconds that these take."""
    num_left, num_right = (part.stop - part.start for part in (rule.left, rule.right))
    scores, buffers = gradients.new_zeros(gradients.shape[1], num_left, num_right), Buffers()
    used_up = gradients.clone()

    def add() -> Tensor:
        return add_tile(scores, used_up, weights, rule, buffers)

    found = [add(), scores.clone()]
    return found, seconds(add, gradients.device)


def largest_deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """By how much they differ at most, as a share of the largest."""
    each = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in each)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that work on a device takes, of which it waits for the end."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    taken = []
    for _ in range(TURNS):
        start = now()
        work()
        taken.append(now() - start)
    return min(taken)

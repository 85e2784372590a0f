"""Which of the ways to score a tile on a GPU is fastest there: tried once in a run for each shape of tile that it has.

The kernels of ``pair_kernel`` are compiled by Triton for whatever GPU and in whatever release is at hand. So each is
first compared with torch's products on random gradients, and used only where it gives the same scores in less time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qkov_dist.memory import UnlessShort, is_shortage

from .kernel import Rule, add_tile
from .pair_kernel import PairKernel
from .tile_gradients import Buffers

TURNS = 3  # that are timed, after one in which kernels are compiled
TOLERANCE = {"ieee": 1e-4, "tf32": 1e-2}  # of the largest score; sums of thousands of products in another order
RIDGE = 1e-3  # of random gradients, whose I is of order 1


@dataclass
class PairTrials:
    """What was found for one run's samples and score.

    Attributes:
        matmul_precision: Of float32 products of scoring.
        warn: Takes a line about a kernel that cannot be used; such a one is not tried again.
    """

    matmul_precision: str
    warn: Callable[[str], object]
    _found: dict[tuple[int, int], PairKernel | None] = field(default_factory=dict)
    _refused: set[PairKernel] = field(default_factory=set)

    def fastest(self, rule: Rule, heads: int, size: int, weights: Tensor, buffers: Buffers) -> Rule:
        """A rule with what scores tiles fastest: torch's products also where there is no room to try.

        Args:
            rule: The score, without a kernel.
            heads: That are worked on together.
            size: Elements of the tile of each.
            weights: Each sample's weight in the Fisher, by task [T, N].
            buffers: The worker's.
        """
        if rule.may_vanish(weights.dtype):  # a kernel is not used there, nor could it be tried
            return rule
        if (heads, size) not in self._found:
            self._found[heads, size] = None
            with UnlessShort():
                self._found[heads, size] = self._tried(rule, heads, size, weights, buffers)
        return replace(rule, pairs=self._found[heads, size])

    def _tried(self, rule: Rule, heads: int, size: int, weights: Tensor, buffers: Buffers) -> PairKernel | None:
        rule, best = replace(rule, epsilon=0.0, ridges=(RIDGE,)), None
        expected, least = timed_scores(rule, heads, size, weights, buffers)
        for kernel in self._candidates():
            try:
                found, taken = timed_scores(replace(rule, pairs=kernel), heads, size, weights, buffers)
            except Exception as error:  # whatever Triton or a driver has against it
                if is_shortage(error):
                    raise
                self._refuse(kernel, f"{type(error).__name__}: {' '.join(str(error).split())}")
                continue
            if not (deviation := largest_deviation(found, expected)) <= TOLERANCE[kernel.precision]:
                self._refuse(kernel, f"it is off torch's products by {deviation:.2g} of the largest here")
            elif taken < least:
                best, least = kernel, taken
        return best

    def _candidates(self) -> Iterator[PairKernel]:
        return (kernel for kernel in PairKernel.candidates(self.matmul_precision) if kernel not in self._refused)

    def _refuse(self, kernel: PairKernel, why: str) -> None:
        self._refused.add(kernel)
        self.warn(f"scores are not formed by {kernel}: {why}")


def timed_scores(
    rule: Rule, heads: int, size: int, weights: Tensor, buffers: Buffers
) -> tuple[tuple[Tensor, Tensor], float]:
    """What a tile of random gradients of each head adds to the Fisher, by task, and to scores; the seconds it takes.

    The gradients are the same for all rules.
    """
    num, device = weights.shape[1], weights.device
    gradients = buffers.take("gradients", (num, heads * size), weights.dtype, device)
    gradients.normal_(generator=torch.Generator(device).manual_seed(0))
    scores = gradients.new_zeros(heads, *(part.stop - part.start for part in (rule.left, rule.right)))

    def add() -> Tensor:
        return add_tile(scores, gradients.view(num, heads, size), weights, rule, buffers)

    found = add(), scores.clone()
    return found, _seconds(add, device)


def largest_deviation(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """By how much they differ at most, as a share of the largest; not a number where something is none."""
    each = zip(found, expected, strict=True)
    return float(torch.stack([(one - other).abs().max() / other.abs().max() for one, other in each]).max())


def _seconds(work: Callable[[], object], device: torch.device) -> float:
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

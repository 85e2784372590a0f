"""A tile's Fisher and scores in two passes over its gradients on a GPU, by Triton: no map of them is ever in memory.

By torch's own products a tile is squared, mapped, and each time written. Here each map is formed where it is multiplied
(``triton_kernels``). Which is faster depends on the number of samples, the precision of products and the GPU: so both
are tried, on a tile of the run's own shape (``pair_trial``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .score import mirror, power_of
from .score_kinds import MAP_NUMBERS, ScoreKind

PRECISIONS = {"highest": "ieee", "high": "tf32", "medium": "tf32"}  # ``compute.matmul_precision`` in Triton's words
SQUARED_COLUMNS, SQUARED_TASKS = 512, 8  # that a program sums squares for
PROGRAMS, LEAST_PART = 512, 512  # products that fill a GPU; the fewest elements that are summed in one


@dataclass(frozen=True)
class PairKernel:
    """The two passes.

    Attributes:
        block: Samples on either side of a product.
        step: Elements that are read at a time.
        warps: Of 32 threads, that work on a product.
        precision: Of float32 products: ``ieee`` or ``tf32``.
    """

    block: int
    step: int
    warps: int
    precision: str = "ieee"

    @staticmethod
    def candidates(matmul_precision: str) -> list[PairKernel]:
        """What may be fastest: as large as blocks may be before registers of an A100 or H100 are spilled, and less."""
        precision = PRECISIONS[matmul_precision]
        shapes = ((128, 16, 8), (64, 16, 4), (32, 16, 4)) if precision == "ieee" else ((128, 16, 8), (64, 16, 4))
        return [PairKernel(*shape, precision) for shape in shapes]

    def put_squares(self, gradients: Tensor, weights: Tensor, by_task: Tensor) -> None:
        """Put the weighted sums of squares into ``by_task``.

        Args:
            gradients: float32 [N, P], rows contiguous.
            weights: Each sample's weight in the Fisher, by task [T, N].
            by_task: [T, P], contiguous.
        """
        from .triton_kernels import put_squares

        (num, size), row, tasks = gradients.shape, gradients.stride(0), len(weights)
        at_once = min(1 << (tasks - 1).bit_length(), SQUARED_TASKS)
        programs, weights = (-(-size // SQUARED_COLUMNS), -(-tasks // at_once)), weights.contiguous()
        with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]  # Triton launches on the current one
            put_squares[programs](gradients, weights, by_task, num, tasks, size, row, at_once, SQUARED_COLUMNS)

    def add_pairs(
        self, scores: Tensor, gradients: Tensor, inverse: Tensor, kind: ScoreKind, left: slice, right: slice
    ) -> None:
        """Add the products of all pairs to the scores.

        Args:
            scores: [heads, left, right].
            gradients: float32 [N, heads * P], rows contiguous.
            inverse: 1 / R [heads * P], finite.
            kind: The score.
            left: Samples in the role of i.
            right: Samples in the role of j.
        """
        from .triton_kernels import put_products

        heads, num_left, num_right = scores.shape
        size, half = gradients.shape[1] // heads, kind.is_symmetric and left == right
        blocks = -(-num_left // self.block) * -(-num_right // self.block)
        parts = max(min(PROGRAMS // (heads * blocks), size // LEAST_PART), 1)
        products = scores.new_empty(heads, parts, num_left, num_right)
        with torch.cuda.device_of(gradients):  # type: ignore[no-untyped-call]
            put_products[blocks, parts, heads](
                gradients,
                power_of(inverse, kind.weight_power),
                products,
                left.start,
                num_left,
                right.start,
                num_right,
                size,
                -(-size // (parts * self.step)) * self.step,
                gradients.stride(0),
                MAP_NUMBERS[kind.left],
                MAP_NUMBERS[kind.right],
                kind.is_symmetric,
                half,
                self.block,
                self.step,
                self.precision,
                num_warps=self.warps,
            )
        added = products.sum(1)
        if half:
            mirror(added)
        scores += added


@cache
def has_triton() -> bool:
    """Whether kernels in Triton's language can be had."""
    try:
        from . import triton_kernels  # noqa: F401
    except ImportError:
        return False
    return True


def can_use(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether gradients of a type can be worked on by these kernels where they are."""
    return dtype == torch.float32 and device.type == "cuda" and has_triton()

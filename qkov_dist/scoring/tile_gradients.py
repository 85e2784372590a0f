"""A tile's gradients of all samples, formed from padded factors: one batched product for each group of samples.

    g_n = D_n^T X_n,       [n, rows, cols] for heads that are bands of rows and lie one below another;
    g_n^T = X_n^T D_n,     [n, cols, rows] for those that are bands of columns, side by side

so that the heads that a GPU works on together are one product, and each head's elements one stretch of memory (nothing
that is done with them asks for their order). Factors in bfloat16 or float16 stay so on a GPU that adds up their
products in float32: these are the same products, as every product of two such numbers is a float32 number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from qkov_dist.capture.factors import FeatureSlice, Whole
from qkov_dist.layout.rects import Rect

from .padded_groups import PaddedGroup


@dataclass(frozen=True)
class Padded:
    """One group's factors at a projection: X [n, T, in] and D [n, T, out]; or its gradients, where these are kept.

    Attributes:
        group: The samples.
        x: Inputs.
        d: Output gradients.
        whole: Gradients, where these are kept.
        scale: What gradients formed of these factors are multiplied by, [n, 1, 1]; None of factors that are scaled.
    """

    group: PaddedGroup
    x: FeatureSlice
    d: FeatureSlice
    whole: Whole | None = None
    scale: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is there."""
        return [self.x.values, self.d.values, *([] if self.whole is None else [self.whole.values])]

    def put_gradients(self, rect: Rect, bias: bool, out: Tensor, *, turned: bool = False) -> None:
        """Form the gradients of a rectangle in ``out``, [n, rows, cols]; turned, they are [n, cols, rows]."""
        if self.whole is not None:
            whole = self.whole.bias(rect.rows) if bias else self.whole.rect(rect.rows, rect.cols)
            out.copy_(whole.mT if turned else whole)
            return
        d = self.d.features(rect.rows)
        if bias:
            torch.sum(d, dim=1, out=out.view(len(out), -1), dtype=out.dtype)
        else:
            x = self.x.features(rect.cols)
            _put_products(x if turned else d, d if turned else x, out)
        if self.scale is not None:
            out.mul_(self.scale)


def _put_products(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Left^T right of each sample, with sums in the type of ``out``."""
    if left.dtype == right.dtype == out.dtype:
        torch.bmm(left.mT, right, out=out)
    elif left.dtype == right.dtype:
        torch.bmm(left.mT, right, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(left.mT.to(out.dtype), right.to(out.dtype), out=out)


@cache
def adds_up_in_float32(dtype: torch.dtype, device_type: str) -> bool:
    """Whether a device's products of a type's numbers can be had in float32, as they were added up."""
    if device_type != "cuda" or dtype.itemsize != 2:
        return False
    ones = torch.ones(1, 8, 8, dtype=dtype, device=device_type)
    try:
        torch.bmm(ones, ones, out_dtype=torch.float32)
    except RuntimeError:  # of a GPU or a build that has no such products
        return False
    return True


def product_dtype(stored: torch.dtype, dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The type in which a factor is multiplied: that of scores, or its own half type where nothing is lost by it.

    Args:
        stored: The type in which it is kept.
        dtype: Of scores.
        device: Where gradients are formed.
    """
    if dtype != torch.float32 or not adds_up_in_float32(stored, torch.device(device).type):
        return dtype
    rounds = stored == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation  # the process asks for it
    return dtype if rounds else stored


@dataclass
class Buffers:
    """One worker's memory, by what it is for; it grows to the largest tile and is used again."""

    held: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of this shape with any content; the next one of this name takes its place."""
        size, held = shape[0] * shape[1], self.held.get(name)
        if held is None or held.numel() < size or held.dtype != dtype or held.device != device:
            held = self.held[name] = torch.empty(size, dtype=dtype, device=device)
        return held[:size].view(shape)


def tile_gradients(
    factors: Sequence[Padded], rects: Sequence[Rect], *, bias: bool, dtype: torch.dtype, buffers: Buffers
) -> Tensor:
    """Per-sample gradients D^T X of tiles of one shape, side by side; of a bias, the sums of D over tokens.

    Args:
        factors: All groups.
        rects: The tiles.
        bias: Whether they are of a bias.
        dtype: Of gradients.
        buffers: The worker's.

    Returns:
        [N, tiles, rows * cols], in a buffer; the order of a tile's elements is any.
    """
    num, size = factors[-1].group.last, rects[0].area
    device = factors[0].d.values.device
    gradients = buffers.take("gradients", (num, len(rects) * size), dtype, device)
    pieces, turned = joined(rects)
    for padded in factors:
        of_group, start = gradients[padded.group.first : padded.group.last], 0
        for rect in pieces:
            shape = (rect.shape[1], rect.shape[0]) if turned else rect.shape
            out = of_group[:, start : start + rect.area].view(-1, *shape)
            padded.put_gradients(rect, bias, out, turned=turned)
            start += rect.area
    return gradients.view(num, len(rects), size)


def joined(rects: Sequence[Rect]) -> tuple[list[Rect], bool]:
    """Rectangles put together where they lie one below another, or side by side, in order: these are to be turned."""
    below = _runs(rects, lambda one, other: one.row_end == other.row and one.cols == other.cols)
    beside = _runs(rects, lambda one, other: one.col_end == other.col and one.rows == other.rows)
    return (beside, True) if len(beside) < len(below) else (below, False)


def _runs(rects: Sequence[Rect], adjoin: Callable[[Rect, Rect], bool]) -> list[Rect]:
    """Each run of rectangles that adjoin, as one."""
    found = [rects[0]]
    for one, other in pairwise(rects):
        if adjoin(one, other):
            found[-1] = Rect(found[-1].row, other.row_end, found[-1].col, other.col_end)
        else:
            found.append(other)
    return found

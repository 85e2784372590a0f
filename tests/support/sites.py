"""Where a model is captured, and a gradient that is not finite for the samples that a test marks."""

from __future__ import annotations

import torch
from torch import nn

from qkov_dist.layout.heads import Site
from qkov_dist.layout.resolve import resolve


def sites_of(model: nn.Module) -> list[Site]:
    return [Site(layer.index, p.module) for layer in resolve(model).layers for p in layer.projections]


class NanBackward(torch.autograd.Function):
    """The identity, whose gradient is NaN in the rows of a batch that hold a marked token."""

    @staticmethod
    def forward(ctx, x, marked):
        ctx.save_for_backward(marked)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (marked,) = ctx.saved_tensors
        return grad.masked_fill(marked[:, None, None], float("nan")), None

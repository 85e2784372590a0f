"""Heads of a model under examination, frozen for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from qkov_dist.layout.weights import region_of

from .examined_model import ExaminedModel
from .head_targets import Target, pieces


@contextmanager
def frozen_heads(examined: ExaminedModel, heads: Sequence[Target]) -> Iterator[None]:
    """Leave some heads' slices as they are, whatever an optimizer does inside."""
    regions = [
        region_of(examined.model.get_submodule(projection.module), projection, piece.rect)
        for target in heads
        for projection, piece in pieces(examined, target)
    ]
    saved = [region.clone() for region in regions]

    def put_back(*_: Any) -> None:
        with torch.no_grad():
            for region, values in zip(regions, saved, strict=True):
                region.copy_(values)

    handle = register_optimizer_step_post_hook(put_back)
    try:
        yield
    finally:
        handle.remove()

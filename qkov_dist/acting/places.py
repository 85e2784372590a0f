"""Where a selection's heads lie in a model that trains: parameters, and rectangles of what this rank holds of each.

A model may be wrapped (data parallelism, ``torch.compile``, activation checkpointing, PEFT) and its weights may be
DTensors: names are compared as those of the plain model, and rectangles are cut with what the rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkov_dist.distributed.sharding import held, logical_shape
from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import inner_model
from qkov_dist.layout.names import plain_name
from qkov_dist.layout.rects import Rect
from qkov_dist.results.head_slices import HeadRange
from qkov_dist.values import nearest

_ZERO = ("ds_id", "_hp_mapping")  # what DeepSpeed leaves at a parameter: of ZeRO-3, of ZeRO-1 and 2


@dataclass(frozen=True, eq=False)
class Place:
    """Rectangles of one parameter, as they lie in this rank's part of it: storage orientation, a vector as a column."""

    name: str
    parameter: nn.Parameter
    rects: tuple[Rect, ...]

    def views(self) -> list[Tensor]:
        """The rectangles of the parameter; changes of them change the weights."""
        return _views(self.parameter, self.rects)

    def gradient_views(self) -> list[Tensor]:
        """The rectangles of its gradient; none before there is one, or where it is not cut as the parameter is."""
        gradient = self.parameter.grad
        if gradient is None or _local(gradient).shape != _local(self.parameter).shape:
            return []
        return _views(gradient, self.rects)


def _views(tensor: Tensor, rects: Iterable[Rect]) -> list[Tensor]:
    local = _local(tensor)
    matrix = local[:, None] if local.ndim == 1 else local
    return [matrix[rect.rows, rect.cols] for rect in rects]


def _local(tensor: Any) -> Tensor:
    """What is in this rank's memory of a tensor, without its history."""
    found: Tensor = tensor.detach()
    return found.to_local() if hasattr(found, "to_local") else found


def place_of(name: str, parameter: nn.Parameter, rects: Iterable[Rect]) -> Place | None:
    """The part of rectangles (of the whole parameter, in storage orientation) that this rank holds; None for none.

    Raises:
        QkovError: for a rectangle outside the parameter, and for weights that cannot be changed in place.
    """
    rows, cols = (*logical_shape(parameter), 1)[:2]
    wanted = sorted(set(rects))
    if parameter.is_meta:
        remedy = "Load the model without offloading to CPU or disk."
        raise QkovError(name, expected="a weight in memory", got="one on the meta device", remedy=remedy)
    if any(rect.row_end > rows or rect.col_end > cols for rect in wanted):
        raise QkovError(
            name,
            expected=f"a parameter with rows up to {max(r.row_end for r in wanted)}"
            f" and columns up to {max(r.col_end for r in wanted)}",
            got=f"shape {list(logical_shape(parameter))}",
            remedy="Choose heads from a heatmap of this model.",
        )
    mine = tuple(
        Rect(common.row - part.row, common.row_end - part.row, common.col - part.col, common.col_end - part.col)
        for part in held(parameter)
        for rect in wanted
        if (common := rect.intersect(part))
    )
    return Place(name, parameter, mine) if mine else None


def rect_of(piece: HeadRange, shape: tuple[int, ...]) -> Rect:
    """A range as a rectangle of a parameter of this shape; a vector is one column."""
    rows, cols = (*shape, 1)[:2]
    band = (piece.start, piece.stop)
    return Rect(*band, 0, cols) if piece.axis == "rows" else Rect(0, rows, *band)


def trained_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers, its weights as its optimizer has them.

    Raises:
        QkovError: for what cannot be held: DeepSpeed's ZeRO, FSDP1.
    """
    wrapped: Any = model
    while isinstance(wrapped, nn.Module):
        if type(wrapped).__name__ == "DeepSpeedEngine":
            raise zero_refused(type(wrapped).__name__)
        wrapped = getattr(wrapped, "module", None) or getattr(wrapped, "_orig_mod", None)
    inner = inner_model(model)
    for name, parameter in inner.named_parameters():
        if any(hasattr(parameter, mark) for mark in _ZERO):
            raise zero_refused(name)
    modules: Iterator[Any] = inner.modules()
    for module in modules:
        if type(module).__name__.startswith("FSDP") and hasattr(module, "reshard"):
            module.reshard()  # after a pass without backward the whole weights may still be in place of the shards
    return inner


def zero_refused(where: str) -> QkovError:
    """Why DeepSpeed's ZeRO cannot be trained with slices held."""
    return QkovError(
        where,
        expected="one process, DDP, FSDP2 or tensor parallel, with an optimizer of torch",
        got="DeepSpeed ZeRO, which steps flat float32 copies of the weights that are cut across heads, and writes them "
        "over the weights afterwards",
        remedy="Train with FSDP2 (torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate) to hold heads.",
    )


def named_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by their name in the plain model; several where PEFT keeps a copy to train beside the original."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(plain_name(name), []).append(parameter)
    return found


def find(name: str, known: dict[str, list[nn.Parameter]]) -> list[nn.Parameter]:
    """The parameters of a name.

    Raises:
        QkovError: where the model has none.
    """
    if name not in known:
        near = nearest(name, known)
        hint = f"Its nearest parameter is {near!r}. " if near else ""
        raise QkovError(
            "selection",
            expected="heads of parameters that the model has",
            got=f"{name!r}, which it lacks",
            remedy=f"{hint}Choose heads from a heatmap of this model.",
        )
    return known[name]


def is_dense(parameter: Tensor) -> bool:
    """Whether a weight is floating numbers rather than packed integers."""
    return parameter.is_floating_point() and parameter.ndim in (1, 2) and parameter.dtype.itemsize > 1


def joined(places: Iterable[Place | None]) -> Iterator[Place]:
    """One place a parameter, each rectangle once: tied parameters come under several names."""
    rects: dict[int, tuple[str, nn.Parameter, dict[Rect, None]]] = {}
    for place in places:
        if place is not None:
            entry = rects.setdefault(id(place.parameter), (place.name, place.parameter, {}))
            entry[2].update(dict.fromkeys(place.rects))
    for name, parameter, found in rects.values():
        yield Place(name, parameter, tuple(found))


def whole(tensor: Any) -> Tensor:
    """A tensor with all its parts; every rank asks."""
    found: Tensor = tensor.detach()
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def is_zero(places: Iterable[Tensor]) -> bool:
    """Whether tensors hold nothing but zeros."""
    return not any(bool(torch.count_nonzero(place)) for place in places)

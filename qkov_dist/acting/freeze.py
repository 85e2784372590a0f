"""Heads of a selection held, or slowed, while a model trains with any optimizer of torch.

Masking gradients would not hold a slice: weight decay and momentum move it all the same. So copies of the slices are
put back after each step of each optimizer (a hook that torch calls for all of them, whenever they were made), and bit
for bit. Gradients there are zeroed as soon as they are accumulated, so that neither the norm that clipping looks at nor
momentum counts them. With a factor, the update of each step is multiplied by it instead, and gradients stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qkov_dist.errors import wrong_argument
from qkov_dist.results.head_slices import HeadRange
from qkov_dist.results.selection import Selection

from .adapters import adapter_places, adapters_of, bias_places, wrapped_modules
from .places import Place, find, is_dense, joined, named_parameters, place_of, rect_of, trained_model


@contextmanager
def freeze_heads(model: nn.Module, selection: Selection | str | Path, factor: float = 0.0) -> Iterator[None]:
    """Train with the slices of some heads left bit for bit as they are.

    Enter it after the model was wrapped, sharded and given adapters::

        with freeze_heads(model, heatmap.select(by="change_adam", top=20)):
            trainer.train()

    Args:
        model: One process, DDP, FSDP2, DTensor tensor parallel, LoRA of PEFT; every rank enters.
        selection: What ``heatmap.select`` returned, or the path of the JSON of ``qkov heads --format json``.
        factor: What each step's update of these slices is multiplied by, in place of freezing them.

    Raises:
        QkovError: where a slice cannot be held (ZeRO, FSDP1, trained or unusual adapters), or the model lacks it.
    """
    if not (isinstance(factor, int | float) and math.isfinite(factor) and factor >= 0):
        raise wrong_argument("factor", "a finite number of at least 0", factor)
    chosen = selection if isinstance(selection, Selection) else Selection.from_json(selection)
    chosen.check_ranges()
    undo: list[Callable[[], None]] = []
    with ExitStack() as stack:
        stack.callback(_call_all, undo)
        slices = [_Slices(place, factor) for place in places_of(trained_model(model), chosen, factor, undo)]
        for of_parameter in slices:
            of_parameter.begin(stack)

        def before_step(*_: Any) -> None:
            undo.clear()  # from here on adapters move the weights: what was zeroed has to stay so
            for of_parameter in slices:
                of_parameter.before_step()

        def after_step(*_: Any) -> None:
            for of_parameter in slices:
                of_parameter.after_step()

        stack.callback(register_optimizer_step_pre_hook(before_step).remove)
        stack.callback(register_optimizer_step_post_hook(after_step).remove)
        yield


def scale_heads(model: nn.Module, selection: Selection | str | Path, factor: float) -> AbstractContextManager[None]:
    """Train with each step's update of some heads' slices multiplied by a factor; see :func:`freeze_heads`."""
    return freeze_heads(model, selection, factor)


def places_of(model: nn.Module, selection: Selection, factor: float, undo: list[Callable[[], None]]) -> list[Place]:
    """Every rectangle of a selection that trains, whole or through an adapter; ``undo`` takes what puts things back."""
    known, wrapped = named_parameters(model), wrapped_modules(model)
    found: list[Place | None] = []
    ranges = sorted({piece for head in selection.heads for piece in head.ranges})
    for name, group in groupby(ranges, key=lambda piece: piece.parameter):
        pieces = list(group)
        for parameter in find(name, known):
            if parameter.requires_grad or is_dense(parameter):  # packed ones are trained by their adapters alone
                rects = [rect_of(piece, tuple(parameter.shape)) for piece in pieces]
                found.append(place_of(name, parameter, rects))
        found += _of_adapters(name, wrapped, pieces, factor, undo)
    return list(joined(found))


def _of_adapters(
    name: str, wrapped: dict[str, nn.Module], pieces: list[HeadRange], factor: float, undo: list[Callable[[], None]]
) -> Iterator[Place | None]:
    path, _, kind = name.rpartition(".")
    if kind == "weight" and path in wrapped:
        for adapter in adapters_of(path, wrapped[path]):
            yield from adapter_places(adapter, wrapped[path], pieces, factor, undo)
    if kind == "bias" and path in wrapped:
        yield from bias_places(path, wrapped[path], pieces)


def _call_all(undo: list[Callable[[], None]]) -> None:
    for put_back in reversed(undo):
        put_back()


class _Slices:
    """The slices of one parameter: copies of them as they were after the last step, from when it first trains."""

    def __init__(self, place: Place, factor: float) -> None:
        self._place, self._factor = place, factor
        self._copies: list[Tensor] = []
        self._trains = False

    def begin(self, stack: ExitStack) -> None:
        """Take copies of a parameter that trains; at the end what is held is as it was, whoever changed it."""
        stack.callback(self._end)
        if not self._place.parameter.requires_grad:
            return  # it may yet begin to train: the next step asks again
        self._take()
        if self._factor == 0:
            parameter: Any = self._place.parameter
            stack.callback(parameter.register_post_accumulate_grad_hook(lambda _: self._silence()).remove)

    def before_step(self) -> None:
        """Of a parameter that trains only now, take copies; zero what was accumulated by other ways."""
        if not self._trains and self._place.parameter.requires_grad:
            self._take()
        if self._factor == 0:
            self._silence()

    def after_step(self) -> None:
        """Put the slices back, or keep the factor's part of what has changed."""
        if not self._trains:
            return
        for view, copy in zip(self._place.views(), self._copies, strict=True):
            if self._factor == 0:
                view.copy_(copy)
            else:
                view.copy_(_between(copy, view, self._factor))
                copy.copy_(view)

    def _take(self) -> None:
        self._copies = [view.clone() for view in self._place.views()]
        self._trains = True

    def _silence(self) -> None:
        for view in self._place.gradient_views():
            view.zero_()

    def _end(self) -> None:
        if self._factor == 0:
            self.after_step()


def _between(before: Tensor, after: Tensor, factor: float) -> Tensor:
    """Before + factor * (after - before), in float32 at least."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    return torch.lerp(before.to(dtype), after.to(dtype), factor)

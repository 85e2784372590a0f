"""Training of a tiny model, and what of it a selection holds: for tests of acting on heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from qkov_dist.layout.names import plain_name
from qkov_dist.layout.resolve import resolve
from qkov_dist.results.head_slices import head_ranges, slices_of
from qkov_dist.results.selection import SelectedHead, Selection

SOME_HEADS = (("Q", 0, 1), ("K", 1, 0), ("V", 0, 1), ("O", 1, 2), ("O", 0, 3))


def selection_of(model: Any, heads: Iterable[tuple[str, int, int]] = SOME_HEADS, **options: bool) -> Selection:
    """A selection of given heads of a plain model."""
    ranges = head_ranges({"slices": slices_of(resolve(model), include_bias=options.get("include_bias", False))})
    return Selection("change_adam", tuple(SelectedHead(*head, 1.0, None, ranges[head]) for head in heads))


def adamw(model: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, weight_decay=0.1, **options)


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 20, seed: int = 0, **how: Any) -> None:
    """Steps on random tokens; ``clip`` bounds the gradients' norm, ``accumulate`` adds up several batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for _ in range(how.get("accumulate", 1)):
            ids = torch.randint(4, 90, (2, 8), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
        if "clip" in how:
            torch.nn.utils.clip_grad_norm_(trained(model), how["clip"])
        optimizer.step()
        optimizer.zero_grad()


def whole_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters by plain name, gathered where they are sharded; every rank asks."""
    inner = getattr(model, "module", model)
    return {
        plain_name(name): (p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach()).clone()
        for name, p in inner.named_parameters()
    }


def slices(values: dict[str, torch.Tensor], selection: Selection) -> dict[str, torch.Tensor]:
    """The slices of a selection, each under its block, layer, head and parameter."""
    found = {}
    for head in selection.heads:
        for piece in head.ranges:
            whole, band = values[piece.parameter], slice(piece.start, piece.stop)
            part = whole[band] if piece.axis == "rows" else whole[:, band]
            found[f"{head.block}.{head.layer}.{head.head} {piece.parameter} {piece.start}"] = part
    return found


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The names of what is not bit for bit the same."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def others(values: dict[str, torch.Tensor], selection: Selection) -> dict[str, torch.Tensor]:
    """All values, with the slices of a selection set to zero."""
    left = {name: value.clone() for name, value in values.items()}
    for part in slices(left, selection).values():
        part.zero_()
    return left


def moved_slices(model: Any, selection: Selection, training: Callable[[], object]) -> tuple[set[str], set[str]]:
    """Which slices a training moves, and which parameters outside of them."""
    before = whole_parameters(model)
    training()
    after = whole_parameters(model)
    return moved(slices(before, selection), slices(after, selection)), moved(
        others(before, selection), others(after, selection)
    )

"""Each sample's own loss: the cross-entropy over its own labelled tokens, which no neighbour can change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import Batch
from .errors import QkovError
from .samples import IGNORED


def sample_losses(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    """Each sample's cross-entropy over its own labelled tokens, float32 or better, [N].

    The output projection is handed only the positions that carry a label: no logits are formed elsewhere.
    """
    labelled = batch.targets != IGNORED
    with _only_rows(model, labelled) as selected:
        logits = forward_logits(model, batch)
    if not selected:
        logits = logits[labelled]
    logits = logits.reshape(-1, logits.shape[-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = functional.cross_entropy(logits, batch.targets[labelled], reduction="none")
    owner = labelled.nonzero()[:, 0]
    sums = losses.new_zeros(len(batch.samples)).index_add(0, owner, losses)
    return sums / batch.num_targets if reduction == "mean" else sums


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits for a batch, without a cache."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if not bool(batch.attention_mask.all()):
        inputs["attention_mask"] = batch.attention_mask
    if _takes(model, "use_cache"):
        inputs["use_cache"] = False
    logits: Tensor = model(**inputs).logits
    return logits


def _takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward, or that of the model inside a wrapper, names this argument."""
    return any(
        argument in inspect.signature(m.forward).parameters
        for m in (model, getattr(model, "module", None), *_wrapped(model))
        if isinstance(m, nn.Module)
    )


def _wrapped(model: nn.Module) -> list[nn.Module]:
    base = getattr(model, "get_base_model", None)
    return [base()] if callable(base) else []


@contextmanager
def _only_rows(model: nn.Module, labelled: Tensor) -> Iterator[list[bool]]:
    """Let the output projection see only the labelled positions, as one row of tokens [1, M, hidden]."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    done: list[bool] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].shape[:-1] != labelled.shape:
            return None
        done.append(True)
        return (args[0][labelled].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep) if isinstance(head, nn.Module) else None
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()


def check_losses(losses: Tensor, batch: Batch) -> None:
    """Raise, naming the sample, unless every loss is finite."""
    losses = losses.detach()
    if bool(torch.isfinite(losses).all()):
        return
    n = int((~torch.isfinite(losses)).nonzero()[0])
    raise QkovError(
        batch.names[n],
        expected="a finite loss",
        got=str(float(losses[n])),
        remedy="Check the sample, or load the model in a wider type (model.dtype: float32 or bfloat16).",
    )

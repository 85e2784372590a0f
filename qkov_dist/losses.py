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

CHUNK_BYTES = 8 << 20  # of logits that are exponentiated at a time: what caches hold


def sample_losses(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    """Each sample's cross-entropy over its own labelled tokens, float32 or better, [N].

    The output projection is handed only the positions that carry a label: no logits are formed elsewhere.
    """
    labelled = batch.targets != IGNORED
    with _only_rows(model, labelled) as selected:
        logits = forward_logits(model, batch)
    if not selected:
        logits = logits[labelled]
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), batch.targets[labelled])
    owner = labelled.nonzero()[:, 0]
    sums = losses.new_zeros(len(batch.samples)).index_add(0, owner, losses)
    return sums / batch.num_targets if reduction == "mean" else sums


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row of logits [M, vocabulary] with its target [M]: [M], float32 or better.

    A few rows at a time, so that beside the logits and their gradient nothing of their size is ever held.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    """The gradient of a row is softmax(row) less one at its target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        rows = zip(_few_rows(logits), _few_rows(targets, like=logits), strict=True)
        return torch.cat([functional.nll_loss(_log_softmax(part), of_part, reduction="none") for part, of_part in rows])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        found = torch.empty_like(logits)
        everything = (_few_rows(t, like=logits) for t in (logits, targets.unsqueeze(1), grads[0].unsqueeze(1), found))
        for part, of_part, grad, out in zip(*everything, strict=True):
            shares = torch.softmax(part, -1, dtype=grad.dtype)
            out.copy_(shares.mul_(grad).scatter_add_(1, of_part, -grad))
        return found, None


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=logits.dtype if logits.dtype == torch.float64 else torch.float32)


def _few_rows(values: Tensor, like: Tensor | None = None) -> tuple[Tensor, ...]:
    """Views of as many rows as ``CHUNK_BYTES`` hold of ``like`` (or of the values themselves)."""
    like = values if like is None else like
    return torch.split(values, max(CHUNK_BYTES // max(like.shape[1] * like.element_size(), 1), 1))


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

"""Each sample's own loss: the cross-entropy over its own labelled tokens, which no neighbour can change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkov_dist.data.batches import Batch
from qkov_dist.data.samples import IGNORED
from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import text_config

from .ropes import fresh_ropes, whole_ropes
from .span_batch import SpanBatch

CHUNK_BYTES = 8 << 20  # of logits that are exponentiated at a time: what caches hold


def sample_losses(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    """Each sample's cross-entropy over its own labelled tokens, float32 or better, [N].

    The output projection is handed only the positions that carry a label: no logits are formed elsewhere. Of a span of
    a batch it is what this span adds to them.
    """
    logits, labelled = labelled_logits(model, batch), batch.targets != IGNORED
    losses = cross_entropy(logits, batch.targets[labelled])
    owner = labelled.nonzero()[:, 0]
    sums = losses.new_zeros(len(batch.samples)).index_add(0, owner, losses)
    return sums / batch.num_targets if reduction == "mean" else sums


def labelled_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits at the positions that carry a label, sample after sample, [labelled, vocabulary]."""
    labelled = batch.targets != IGNORED
    with _only_rows(model, labelled) as selected:
        logits = forward_logits(model, batch)
    return logits.reshape(-1, logits.shape[-1]) if selected else logits[labelled]


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
    """The model's logits for a batch [N, T, vocabulary] (or where the output projection was handed less), uncached."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if isinstance(batch, SpanBatch):  # padding is on the right, where no causal model sees it
        inputs |= {"position_ids": batch.positions, "attention_mask": torch.ones_like(batch.input_ids)}
    elif not bool(batch.attention_mask.all()):
        inputs["attention_mask"] = batch.attention_mask
    if takes(model, "use_cache"):
        inputs["use_cache"] = False
    with fresh_ropes(model), whole_ropes(model, batch) if isinstance(batch, SpanBatch) else nullcontext():
        return _logits_of(model, model(**inputs), batch)


def _logits_of(model: nn.Module, output: Any, batch: Batch) -> Tensor:
    """The logits in what a forward returns: an object with them, or a tuple that begins with them.

    Raises:
        QkovError: where there are none for each position, over the whole vocabulary.
    """
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple | list) and output else output
    vocab = int(text_config(model).vocab_size)
    places = {tuple(batch.input_ids.shape), (1, int((batch.targets != IGNORED).sum()))}
    if not isinstance(logits, Tensor):
        got = f"{type(output).__name__} without them"
    elif logits.ndim != 3 or tuple(logits.shape[:2]) not in places or logits.shape[2] < vocab:
        got = f"a tensor {[*logits.shape]}"
    else:
        return logits
    raise QkovError(
        type(model).__name__,
        expected=f"logits {[*batch.input_ids.shape, vocab]} (samples, tokens, vocabulary) from a language-model head",
        got=got,
        remedy="Load it with AutoModelForCausalLM or AutoModelForMaskedLM. Heads of other tasks, virtual tokens "
        "(prompt tuning, prefixes) and models without a head have no loss of each token.",
    )


def takes(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward, or that of the model inside a wrapper, names this argument."""
    return any(
        argument in inspect.signature(m.forward).parameters
        for m in (model, getattr(model, "module", None), *_wrapped(model))
        if isinstance(m, nn.Module)
    )


def _wrapped(model: nn.Module) -> list[nn.Module]:
    base = getattr(model, "get_base_model", None)
    return [base()] if callable(base) else []


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """The output projection, where the model says which it is."""
    find: Any = getattr(model, "get_output_embeddings", None)
    try:
        found = find() if find else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


@contextmanager
def _only_rows(model: nn.Module, labelled: Tensor) -> Iterator[list[bool]]:
    """Let the output projection see only the labelled positions, as one row of tokens [1, M, hidden]."""
    head = _output_embeddings(model)
    done: list[bool] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args or args[0].shape[:-1] != labelled.shape:
            return None
        done.append(True)
        return (args[0][labelled].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(keep) if head is not None else None
    try:
        yield done
    finally:
        if handle is not None:
            handle.remove()

"""Refusing models that others have prepared to share a sample's tokens among ranks: context and sequence parallelism.

A gradient is complete only with all tokens of its sample, before anything is squared: ``context_parallel`` and
``capture.spans`` see to that. What else cuts samples shows in what it puts around attention:

    torch's context_parallel    its own function in the place of scaled_dot_product_attention, or hooks on modules
    DeepSpeed-Ulysses           its own function among those that transformers chooses attention from
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qkov_dist.errors import QkovError

OF_TORCH, OF_DEEPSPEED = "torch.distributed.", "deepspeed.runtime.sequence_parallel"


def refuse_cut_samples(model: nn.Module) -> None:
    """Refuse a model of which a pass would take some of a sample's tokens on each rank.

    Raises:
        QkovError: names what cuts them, and what to use in its place.
    """
    if found := _what_cuts(model):
        raise QkovError(
            found,
            expected="all tokens of a sample on the rank that runs it",
            got="attention over tokens that lie on several ranks",
            remedy="Collect outside of it. Where one rank has no memory for a sample's tokens, let N ranks share them "
            "(parallel.cp=N of qkov run, FisherCollector(cp=N)); else use fsdp (fully_shard) and small batches.",
        )


def _what_cuts(model: nn.Module) -> str | None:
    if _home(functional.scaled_dot_product_attention).startswith(OF_TORCH):
        return "torch's context_parallel"
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if "context_parallel" in _home(getattr(hook, "func", hook)):
                return f"torch's context parallelism of {name}"
    chosen = {getattr(getattr(m, "config", None), "_attn_implementation", None) for m in model.modules()}
    if any(_home(ALL_ATTENTION_FUNCTIONS[n]).startswith(OF_DEEPSPEED) for n in chosen if n in ALL_ATTENTION_FUNCTIONS):
        return "DeepSpeed-Ulysses sequence parallelism"
    return None


def _home(function: object) -> str:
    """The module that a function was written in; none of a builtin."""
    return getattr(function, "__module__", None) or ""

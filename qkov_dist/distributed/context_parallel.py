"""Attention over tokens that lie on several ranks: a sample's keys and values are gathered, its queries stay.

Of N ranks each has one N-th of a batch's positions, in order, so that the rank at place r holds those from r S to
(r + 1) S. A layer's keys and values are all-gathered up to the rank's last position, and its queries attend to them by
the model's own attention function (sdpa, or the eager one of its class); in the backward pass their gradients are
summed back to the ranks that they came from. All else of a decoder looks at one token at a time.

This asks nothing of the number of heads, or of the widths of keys and values. Masks are transformers' own, made for
these queries and keys: sliding windows and chunks are what they are in one process. Both functions are registered with
transformers under ``NAME``, for as long as the context lasts. What moves tokens in another way (convolutions, states,
attention beside transformers' interface) is found out by ``capture.outputs.check_shared_tokens``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import text_config

from .world import TorchWorld

NAME = "qkov_context_parallel"
KERNELS = ("sdpa", "eager")
_CHOSEN = "_attn_implementation_internal"  # set past the property, which would set those of parts as well


@contextmanager
def shared_tokens(model: nn.Module, group: TorchWorld, *, rehearsed: bool = False) -> Iterator[None]:
    """Let a model's attention see the tokens of all ranks of a group, each of which passes its own.

    Args:
        model: The model.
        group: The ranks.
        rehearsed: Take each rank for the last, with its own keys and values in place of all others': shapes, and what
            fails for them, are those of a pass, alike on all ranks, and none waits for another.

    Raises:
        QkovError: for an attention function that has not been made to.
    """
    kernel = text_config(model)._attn_implementation
    if kernel not in KERNELS:
        raise QkovError(
            "parallel.cp",
            expected=f"a model whose attention is {' or '.join(KERNELS)}",
            got=str(kernel),
            remedy="Set model.attn_implementation=sdpa, or parallel.cp=1.",
        )
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), _CHOSEN)}
    with ExitStack() as stack:
        rank = group.size - 1 if rehearsed else group.rank
        gather = partial(_repeated, size=group.size) if rehearsed else partial(_AllGather.apply, group)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, partial(_mask, kernel, rank))
        stack.callback(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop, NAME)
        ALL_ATTENTION_FUNCTIONS.register(NAME, partial(_attention, kernel, rank, gather))
        stack.callback(ALL_ATTENTION_FUNCTIONS._global_mapping.pop, NAME)
        for config in configs.values():
            stack.callback(setattr, config, _CHOSEN, getattr(config, _CHOSEN))
            setattr(config, _CHOSEN, NAME)
        yield


def _mask(
    kernel: str,
    rank: int,
    *,
    q_length: int,
    device: torch.device,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    **others: Any,
) -> Any:
    """The mask of this rank's queries over all keys up to the last of them; None where a GPU's sdpa knows it as causal.

    What is padded lies behind all that counts: an ``attention_mask`` has nothing to say. On a CPU it is a sum: of a
    boolean one each layer would keep a sum of its own for the backward pass.
    """
    kv_length, on_cpu = (rank + 1) * q_length, device.type == "cpu"
    is_causal = allow_is_causal_skip and (local_size is None or kv_length < local_size)
    if kernel == "sdpa" and is_causal and not on_cpu:
        return None
    make = ALL_MASK_ATTENTION_FUNCTIONS["eager" if on_cpu else kernel]
    places = {"q_length": q_length, "q_offset": rank * q_length, "kv_length": kv_length, "kv_offset": 0}
    return make(**{**others, **places, "device": device, "attention_mask": None, "allow_is_causal_skip": False})


def _attention(
    kernel: str,
    rank: int,
    gather: Callable[[Tensor], Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, Any]:
    """Attention of this rank's queries [N, heads, S, width] to keys and values of all ranks up to itself."""
    widths = [key.shape[-1], value.shape[-1]]
    gathered = gather(torch.cat([key, value], dim=-1))[: rank + 1]
    key, value = torch.split(torch.cat([*gathered], dim=2), widths, dim=-1)
    masked_on_gpu = attention_mask is not None and query.device.type != "cpu"
    if masked_on_gpu or kernel != "sdpa" or settings.get("position_bias") is not None:
        found: tuple[Tensor, Any] = _function(kernel, module)(module, query, key, value, attention_mask, **settings)
        return found
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(query.shape[2], key.shape[2]) if attention_mask is None else attention_mask,
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous(), None


class _AllGather(torch.autograd.Function):
    """What every rank has, by rank; its gradient here is the sum of all ranks'.

    That of ``torch.distributed.nn`` names the wrong ranks where gloo's group is not that of all.
    """

    @staticmethod
    def forward(ctx: Any, group: TorchWorld, mine: Tensor) -> Tensor:
        ctx.group = group
        gathered = mine.new_empty(group.size, *mine.shape)
        torch.distributed.all_gather([*gathered.unbind(0)], mine.contiguous(), group=group.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (grad,) = grads
        summed = grad.new_empty(grad.shape[1:])
        torch.distributed.reduce_scatter(summed, [*grad.contiguous().unbind(0)], group=ctx.group.group)
        return None, summed


def _repeated(mine: Tensor, size: int) -> Tensor:
    return mine.unsqueeze(0).expand(size, *mine.shape)


def _function(kernel: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that a module would use in one process."""
    homes = (vars(sys.modules[cls.__module__]) for cls in type(module).__mro__)
    eager = (home["eager_attention_forward"] for home in homes if "eager_attention_forward" in home)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[kernel] if kernel != "eager" else next(eager)
    return found

"""Ropes whose frequencies follow from how long an input is: longrope (Phi-3), dynamic NTK.

They are those of the longest sample that a model sees at a time, and dynamic ones remember the longest yet. A sample
has its own gradient only if it is run as if it were the first, and beside none of another length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .span_batch import SpanBatch

BY_LENGTH = ("dynamic", "longrope")
CACHED, FREQUENCIES, ORIGINAL = "max_seq_len_cached", "inv_freq", "original_inv_freq"


def ropes_by_length(model: nn.Module) -> list[nn.Module]:
    """The modules of transformers that make such ropes."""
    return [module for module in model.modules() if any(kind in rope for rope in _kinds(module) for kind in BY_LENGTH)]


def _kinds(module: nn.Module) -> list[str]:
    """The rope types that a module states, one or one for each type of layer."""
    stated: Any = getattr(module, "rope_type", None)
    return list(map(str, stated.values())) if isinstance(stated, Mapping) else [str(stated)]


@contextmanager
def fresh_ropes(model: nn.Module) -> Iterator[None]:
    """Run a model as if no sample had gone before; what its ropes remember is put back."""
    ropes = ropes_by_length(model)
    before = [(rope, _state(rope)) for rope in ropes]
    try:
        for rope in ropes:
            _forget(rope)
        yield
    finally:
        for rope, state in before:
            for name, value in state.items():
                setattr(rope, name, value)


@contextmanager
def whole_ropes(model: nn.Module, span: SpanBatch) -> Iterator[None]:
    """Have them see how long the whole batch is, of which a span is run; what they make is cut to the span."""
    size = span.input_ids.shape[1]
    ends = torch.arange(span.start + size, device=span.input_ids.device).clamp(max=span.length - 1)
    whole = torch.cat([ends, ends.new_full((1,), span.length - 1)]).unsqueeze(0)

    def lengthen(_rope: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": whole}
        return (args[0], whole, *args[2:]), kwargs

    def cut(_rope: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(part[:, span.start : span.start + size] for part in output)
        return output[:, span.start : span.start + size]

    with ExitStack() as stack:
        for rope in ropes_by_length(model):
            stack.callback(rope.register_forward_pre_hook(lengthen, with_kwargs=True).remove)
            stack.callback(rope.register_forward_hook(cut).remove)
        yield


def _state(rope: nn.Module) -> dict[str, Any]:
    """Its frequencies, the longest input yet, and its scaling, for each type of layer."""
    names = [*vars(rope), *rope._buffers]
    kept = [name for name in names if name.endswith((CACHED, FREQUENCIES, "attention_scaling"))]
    state = {name: getattr(rope, name) for name in kept}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def _forget(rope: nn.Module) -> None:
    longest: Any = getattr(rope, "original_max_seq_len", None)
    for name in [*vars(rope), *rope._buffers]:
        prefix = name.removesuffix(ORIGINAL)
        if name == prefix or (frequencies := getattr(rope, f"{prefix}{FREQUENCIES}", None)) is None:
            continue
        setattr(rope, f"{prefix}{FREQUENCIES}", getattr(rope, name).to(frequencies).clone())
        if longest is not None:
            setattr(rope, f"{prefix}{CACHED}", longest)

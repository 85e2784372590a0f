"""Ropes whose frequencies follow from how long an input is: longrope (Phi-3), dynamic NTK.

They are those of the longest sample that a model sees at a time, and dynamic ones remember the longest yet. A sample
has its own gradient only if it is run as if it were the first, and beside none of another length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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

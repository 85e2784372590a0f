"""How long an input a model takes: as many tokens as it has positions, or as many as its rope is stretched to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
STRETCHED = ("linear", "dynamic", "yarn", "longrope", "su", "llama3")  # ropes that reach beyond where they were trained


def max_positions(model: nn.Module, settings: Any) -> int | None:
    """The longest input in tokens, None for no limit: positions that are learned end, rope goes as far as it is scaled.

    RoBERTa-style embeddings keep some positions for padding.

    Args:
        model: The model.
        settings: The configuration of its text model.
    """
    limits = [getattr(settings, key, None) for key in POSITION_KEYS]
    limit = next((value for value in limits if isinstance(value, int) and value > 0), None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    if limit is None or not has_rope(model):
        return limit
    return max([limit, *_reached(settings, limit)])


def has_rope(model: nn.Module) -> bool:
    """Whether positions are rotations, which exist for any input however long; else they are rows of a table."""
    return any("rotary" in name.rpartition(".")[2] for name, _ in model.named_modules())


def _reached(settings: Any, limit: int) -> Iterator[int]:
    """Positions that each scaled rope of a model reaches; a model with several kinds of layers may have several."""
    found = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None)
    if not isinstance(found, Mapping):
        return
    for rope in (found, *(part for part in found.values() if isinstance(part, Mapping))):
        factor = rope.get("factor")
        trained = rope.get("original_max_position_embeddings") or limit
        if rope.get("rope_type", rope.get("type")) in STRETCHED and isinstance(factor, int | float):
            yield int(trained * factor)

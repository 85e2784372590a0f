"""Loading a model and its tokenizer.

Weights come from safetensors, or from tensors-only checkpoints: nothing is unpickled.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoTokenizer,
)
from transformers.utils.hub import has_file

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError

from .adapters import Adapter, put_on
from .architecture import AUTO_CLASSES, kind_of, settings_of
from .checkpoint import check_gguf, check_loaded
from .explained import explained, quiet
from .gguf_reading import read_once
from .positions import max_positions
from .whereabouts import adapter_of, base_config, base_of, source_of

TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in eval mode and what its samples must respect.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer, or None where the checkpoint has none.
        objective: ``causal`` or ``masked``.
        vocab_size: Token ids lie in [0, vocab_size).
        max_positions: Longest input in tokens, or None for no limit.
        engine: What keeps a model's parts together (a DeepSpeed engine); held, not used.
        warnings: What a reader of its results must know, one sentence each.
        notes: What a reader of its results may want to know, one sentence each.
    """

    model: Any
    tokenizer: Any
    objective: str
    vocab_size: int
    max_positions: int | None
    engine: Any = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Warnings and notes, as lines of the terminal."""
        return (*(f"warning: {text}" for text in self.warnings), *(f"note: {text}" for text in self.notes))


def load_model(config: ModelConfig, *, device_map: Any = None, distributed: Any = None) -> LoadedModel:
    """Load the weights, in eval mode, and the tokenizer; of an adapter, those of its base model with it on them.

    Args:
        config: Path and dtype; ``dtype: auto`` keeps the checkpoint's.
        device_map: As in ``transformers``; None loads on the CPU.
        distributed: A transformers ``DistributedConfig``: every rank reads its own shards.

    Raises:
        QkovError: The path, its files, the dtype or the attention implementation do not do.
    """
    name, options = source_of(config.path, config.revision)
    if adapter := adapter_of(config.path, name, options):
        return _load_adapted(config, adapter, options, device_map=device_map, distributed=distributed)
    options["trust_remote_code"] = config.trust_remote_code
    with read_once() if "gguf_file" in options else nullcontext():
        return _load_plain(config, name, options, device_map=device_map, distributed=distributed)


def _load_plain(
    config: ModelConfig, name: str, options: dict[str, Any], *, device_map: Any, distributed: Any
) -> LoadedModel:
    settings = settings_of(name, options, config.path)
    kind = kind_of(settings, config.path)
    extra: dict[str, Any] = {"device_map": device_map, "dtype": _dtype(config.dtype), "weights_only": True}
    if distributed is not None:
        extra["distributed_config"] = distributed
    if config.attn_implementation is not None:
        extra["attn_implementation"] = config.attn_implementation
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quiet(), explained(config.path, "a model that loads"):
        model, report = AUTO_CLASSES[kind].from_pretrained(name, output_loading_info=True, **options, **extra)
    warnings = check_loaded(model, report, config.path)
    model = model.eval()
    if "gguf_file" in options:
        warnings, model = (*warnings, *check_gguf(model, Path(name) / options["gguf_file"])), _plain(model)
    text_settings = model.config.get_text_config()
    return LoadedModel(
        model,
        _tokenizer(name, options, config.path),
        "masked" if kind == "masked" else "causal",
        int(text_settings.vocab_size),
        max_positions(model, text_settings),
        warnings=warnings,
    )


def _load_adapted(config: ModelConfig, adapter: Adapter, options: dict[str, Any], **how: Any) -> LoadedModel:
    """An adapter's base model with the adapter on it; its own tokenizer goes before that of the base."""
    base = base_of(config, adapter)
    try:
        if base_config(base):
            remedy = "Merge that adapter into its base model first."
            raise QkovError(adapter.base, expected="a model", got="another adapter", remedy=remedy)
        loaded = load_model(base, **how)
    except QkovError as error:
        raise error.within(f"{adapter.place}: base model") from error
    with quiet(), explained(adapter.place, "an adapter that fits its base model"):
        model, note = put_on(loaded.model, adapter, options)
    own = _tokenizer(adapter.place, {**options, "trust_remote_code": config.trust_remote_code}, adapter.place)
    return replace(loaded, model=model, tokenizer=own or loaded.tokenizer, notes=(*loaded.notes, note))


def _dtype(name: str) -> Any:
    return name if name == "auto" else getattr(torch, name)


def _plain(model: Any) -> Any:
    """Take away the traces of a GGUF quantizer from a model whose weights are dense; tied weights stay tied."""
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        return model
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def _tokenizer(name: str, options: dict[str, Any], place: str) -> Any:
    with quiet(), explained(place, "a tokenizer that loads"):
        where = {key: options[key] for key in ("revision", "local_files_only") if key in options}
        if "gguf_file" in options or any(has_file(name, file, **where) for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(name, **options)
    return None

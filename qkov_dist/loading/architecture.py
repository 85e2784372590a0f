"""A model's architecture without its weights: its configuration, its class, and the model built of the two."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError

from .explained import explained, quiet
from .whereabouts import base_config, source_of

AUTO_CLASSES: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "image-text": AutoModelForImageTextToText,  # given text alone
}


def meta_model(source: str | ModelConfig | transformers.PretrainedConfig) -> Any:
    """The model on the meta device, from its configuration alone: module names and shapes, no weights."""
    if isinstance(source, transformers.PretrainedConfig):
        settings, place, trust = source, source.model_type, False
    else:
        config = ModelConfig(source) if isinstance(source, str) else source
        config = base_config(config) or config
        place, trust = config.path, config.trust_remote_code
        name, options = source_of(config.path, config.revision)
        settings = settings_of(name, {**options, "trust_remote_code": trust}, place)
    auto = AUTO_CLASSES[kind_of(settings, place)]
    with quiet(), explained(place, "a configuration that builds a model"), torch.device("meta"):
        return auto.from_config(settings, trust_remote_code=trust).eval()


def fill_computed_buffers(model: nn.Module, config: ModelConfig) -> None:
    """Give buffers that no checkpoint holds the values that the model's own code computes for them.

    A model that is made on the meta device, for each rank to read its shards, may be left with whatever its memory held
    (transformers does so with the multipliers of falcon_h1).

    Args:
        model: A loaded model, or this rank's shards of it.
        config: What it was loaded by.
    """
    settings: Any = copy.deepcopy(model.config)
    settings.__dict__.pop("distributed_config", None)
    auto = AUTO_CLASSES[kind_of(settings, config.path)]
    with quiet(), explained(config.path, "a configuration that builds a model"), init_empty_weights(False):
        fresh = dict(auto.from_config(settings, trust_remote_code=config.trust_remote_code).named_buffers())
    held = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name not in held and name in fresh and fresh[name].shape == buffer.shape:
            buffer.copy_(fresh[name])


def settings_of(name: str, options: dict[str, Any], place: str) -> Any:
    """The configuration of a model that lies where ``source_of`` says; messages call it ``place``."""
    with quiet(), explained(place, "a readable model configuration"):
        return AutoConfig.from_pretrained(name, **options)


def kind_of(settings: Any, place: str) -> str:
    """Which of ``AUTO_CLASSES`` a model is: ``masked`` is for encoders that are not set up as decoders."""
    remedy = "Give a decoder language model, or a BERT-style encoder with a masked LM head."
    if getattr(settings, "is_encoder_decoder", False):
        raise QkovError(place, expected="a model of one stack", got="an encoder-decoder", remedy=remedy)
    remote = getattr(settings, "auto_map", None) or {}
    masked = settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or "AutoModelForMaskedLM" in remote
    causal = settings.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in remote
    if masked and not getattr(settings, "is_decoder", False):
        return "masked"
    if causal:
        return "causal"
    remote_image = "AutoModelForImageTextToText" in remote
    if remote_image or settings.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image-text"
    raise QkovError(place, expected="a language model", got=f"model type {settings.model_type!r}", remedy=remedy)

"""A small copy of a model that is too sharded to be perturbed: the same attention, everything else shrunk.

Where heads live is a matter of the architecture, not of the weights. A model of the same configuration with random
weights, one layer of each kind, a small vocabulary and narrow feed-forwards, is proved in its place.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .comm import World
from .errors import QkovError
from .layout import resolve
from .proof import prove, resolve_proved
from .shards import is_sharded
from .slices import Layout
from .structure import is_masked_lm

NARROW, VOCABULARY = 16, 128
FEED_FORWARD = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
TOWER_DEPTHS = ("num_hidden_layers", "depth", "num_layers")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def proved_layout(model: nn.Module, world: World) -> Layout:
    """A model's layout, proved on the model itself; where it is sharded, on a small copy that rank 0 makes.

    Raises:
        QkovError: as the proof does; of a sharded model, for an architecture that is not known.
    """
    sharded = any(world.gather(any(is_sharded(parameter) for parameter in model.parameters())))
    if not sharded:
        return resolve_proved(model)
    layout, refusal = resolve(model), None
    if world.rank == 0:
        try:
            prove_stand_in(model, layout)
        except QkovError as error:
            refusal = error.parts
    if refusal := world.gather(refusal)[0]:
        raise QkovError(**refusal)
    return layout


def prove_stand_in(model: nn.Module, layout: Layout) -> None:
    """Prove a layout on a small copy of the model, which has one layer of each kind that the model has.

    Args:
        model: The sharded model; only its configuration is read.
        layout: Its layout.

    Raises:
        QkovError: as :func:`qkov_dist.proof.prove` does.
    """
    copy_of = stand_in(model, num_layers=max(layout.distinct_layers()) + 1)
    found = resolve(copy_of)
    prove(copy_of, found, layers=found.distinct_layers())


def stand_in(model: nn.Module, num_layers: int) -> Any:
    """The first layers of the model's architecture, attention at full size, with random weights, on the CPU."""
    configs = (getattr(module, "config", None) for module in model.modules())
    whole: Any = copy.deepcopy(next(config for config in configs if getattr(config, "model_type", None)))
    config = whole.get_text_config(decoder=True)
    depth = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name in FEED_FORWARD:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, NARROW)
    for name in TOKEN_IDS:
        setattr(config, name, 0 if name == "pad_token_id" else None)
    for part in (whole, config):
        part.__dict__.pop("distributed_config", None)
    auto: Any = AutoModelForMaskedLM if is_masked_lm(model) else AutoModelForCausalLM
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and auto is AutoModelForCausalLM:
        auto = AutoModelForImageTextToText
        for name in whole.sub_configs:
            _shrink_tower(getattr(whole, name), config)
        config = whole
    return auto.from_config(config).float().eval()


def _shrink_tower(tower: Any, text: Any) -> None:
    """Leave one layer of what is not the text model: text alone is passed through."""
    for name in TOWER_DEPTHS:
        if tower is not text and isinstance(getattr(tower, name, None), int):
            setattr(tower, name, 1)

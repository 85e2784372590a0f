"""A small copy of a model that is too sharded to be perturbed: the same attention, everything else shrunk.

Where heads live is a matter of the architecture, not of the weights. A model of the same configuration with random
weights, one layer of each kind, a small vocabulary and narrow feed-forwards, is proved in its place.
"""

from __future__ import annotations

import copy
import hashlib
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.modules import is_masked_lm
from qkov_dist.layout.proof import prove, resolve_proved
from qkov_dist.layout.resolve import resolve
from qkov_dist.layout.weights import is_sharded

from .cut_samples import refuse_cut_samples
from .shared_errors import SharedError, together
from .world import World

NARROW, VOCABULARY = 16, 128
PER_LAYER = re.compile("layer|block|pattern|_types$")  # names of lists with an entry for each layer, in configurations
FEED_FORWARD = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner")
TOWER_DEPTHS = ("num_hidden_layers", "depth", "num_layers")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def proved_layout(model: nn.Module, world: World) -> Layout:
    """A model's layout, proved on the model itself; where it is sharded, on a small copy that rank 0 makes.

    Raises:
        QkovError: as the proof does; for stages of a pipeline and samples that are cut between ranks; of a sharded
            model, for an architecture that is not known.
    """
    refuse_parts(model, world)
    together(world, lambda: refuse_cut_samples(model))
    sharded = any(world.all_gather(any(is_sharded(parameter) for parameter in model.parameters())))
    if not sharded:
        return together(world, lambda: resolve_proved(model))
    layout = together(world, lambda: resolve(model))
    together(world, lambda: prove_stand_in(model, layout) if world.rank == 0 else None)
    return layout


def refuse_parts(model: nn.Module, world: World) -> None:
    """Refuse a model of which ranks have different modules, such as the stages of a pipeline.

    Raises:
        QkovError: on every rank; names the first rank that differs from rank 0, and a module.
    """
    mine = sorted({name.rpartition(".")[0] for name, _ in model.named_parameters()})
    if len(set(world.all_gather(hashlib.sha256(" ".join(mine).encode()).hexdigest()))) == 1:
        return
    first, *others = world.all_gather(mine)
    for rank, names in zip(world.names[1:], others, strict=True):
        if only := sorted(set(first) ^ set(names)):
            raise SharedError(
                f"rank {rank}: model",
                expected=f"the modules that rank {world.names[0]} has, or shards of them",
                got=f"others ({', '.join(only[:3])}{', …' if len(only) > 3 else ''}: on one of the two alone)",
                remedy="Give all ranks the same model, and not the stages of a pipeline: fsdp (parallel.shard=fsdp, or "
                "DistributedConfig(fsdp_size=N)) spreads any model.",
            )


def prove_stand_in(model: nn.Module, layout: Layout) -> None:
    """Prove a layout on a small copy of the model, which has one layer of each kind that the model has.

    Args:
        model: The sharded model; only its configuration is read.
        layout: Its layout.

    Raises:
        QkovError: as :func:`qkov_dist.layout.proof.prove` does.
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
    if getattr(config, "num_kv_shared_layers", 0):
        num_layers = depth  # which layers lend their keys and values to which follows from all of them
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == depth and PER_LAYER.search(name):
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers
    config.vocab_size = min(config.vocab_size, VOCABULARY)
    for name in FEED_FORWARD:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, NARROW)
    for name in TOKEN_IDS:
        setattr(config, name, 0)  # the model's own may be beyond the vocabulary
    for part in (whole, config):
        part.__dict__.pop("distributed_config", None)
    auto: Any = AutoModelForMaskedLM if is_masked_lm(model) else AutoModelForCausalLM
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and auto is AutoModelForCausalLM:
        auto = AutoModelForImageTextToText
        for name in whole.sub_configs:
            _shrink_tower(getattr(whole, name), config)
        config = whole
    try:
        with torch.random.fork_rng(devices=[]):  # one rank makes it: its generator would leave those of the others
            return auto.from_config(config).float().eval()
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise QkovError(
            f"model type {config.model_type!r}",
            expected="a small copy of its architecture, to prove the layout on while the weights are sharded",
            got=f"{type(error).__name__} ({error})",
            remedy="Run it unsharded, in one process or with parallel.shard=ddp.",
        ) from error


def _shrink_tower(tower: Any, text: Any) -> None:
    """Leave one layer of what is not the text model: text alone is passed through."""
    for name in TOWER_DEPTHS:
        if tower is not text and isinstance(getattr(tower, name, None), int):
            setattr(tower, name, 1)

"""Reading the structure of a model: its text config, its decoder layers, its linears. No weight's value is read.

Everything works on the meta device, and through the wrappers that others put around a model (LoRA, quantization, data
parallelism), because only modules, names and declared sizes are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qkov_dist.errors import QkovError

from .names import WRAPPERS

NOT_TEXT = frozenset(
    (
        *("vision_tower", "visual", "vision_model", "vision_encoder", "image_encoder", "embed_vision"),
        *("audio_tower", "audio_model", "audio_encoder", "embed_audio", "code2wav", "talker"),
        *("crossattention", "cross_attn", "encoder_attn", "mtp"),
    )
)
ATTENTION_LIKE = re.compile(r"attn|attention|qkv|query|key|value|[qkvo]_proj|mixer", re.IGNORECASE)
OTHER_MIXERS = ("linear_attn", "mamba", "mixer", "conv", "temporal_block", "ssm", "linear_attention", "rwkv")
EXPERTS = re.compile(r"^(?!.*shared).*experts", re.IGNORECASE)  # a shared expert meets every token
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")


def text_config(model: nn.Module) -> Any:
    """The config of the text model inside ``model``, whatever wraps it.

    Raises:
        QkovError: where no module has a config with a model type.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "model_type", None):
            return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    raise QkovError(
        type(model).__name__,
        expected="a model with a config that has a model_type, as transformers models do",
        got="none",
        remedy="Give the model a `config` attribute with `model_type`, `num_attention_heads` and `num_hidden_layers`.",
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has an encoder beside its decoder, or layers that attend across."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return any(getattr(c, "is_encoder_decoder", False) or getattr(c, "add_cross_attention", False) for c in configs)


DATA_WRAPPERS = ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "OptimizedModule")


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of data parallelism, DeepSpeed and ``torch.compile``.

    Raises:
        QkovError: for FSDP1, which flattens the weights of a layer into one, and for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise QkovError(
            type(model).__name__,
            expected="a transformers language model, whole or sharded",
            got="no torch.nn.Module",
            remedy="Give the model itself, and not the schedule or a stage of a pipeline: fsdp (fully_shard, or "
            "DistributedConfig(fsdp_size=N)) spreads any model.",
        )
    while type(model).__name__ in DATA_WRAPPERS:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise QkovError(
            type(model).__name__,
            expected="a replica, DTensor weights, FSDP2 or DeepSpeed",
            got="FullyShardedDataParallel (FSDP1)",
            remedy="Shard with FSDP2: torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate.",
        )
    return model


def routed(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose children are called as often as tokens are sent to them: experts that are modules of their own.

    So are all experts in one module whose own code runs one after the other, with an activation that is a module; where
    a grouped product takes all of them, the module and what is in it are called once a pass, whatever the tokens are.
    """
    for name, module in model.named_modules():
        path, _, own = name.rpartition(".")
        if EXPERTS.search(own) and (any(map(_weighs, module.children())) or _runs_one_by_one(module)):
            yield model.get_submodule(path) if isinstance(module, nn.ModuleList | nn.ModuleDict) else module


def _runs_one_by_one(module: nn.Module) -> bool:
    """Whether a module that holds all experts' weights calls the modules in it for one expert after the other."""
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    holds_weights = any(True for _ in module.parameters(recurse=False))
    return holds_weights and any(True for _ in module.children()) and chosen in (None, "eager")


def _weighs(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def is_masked_lm(model: nn.Module) -> bool:
    """Whether labels stand at the tokens they are predicted for, not one place later."""
    return any(type(module).__name__.endswith("ForMaskedLM") for module in model.modules())


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The descendant at a dotted path, or None where it is absent or set to None."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
        if not isinstance(found, nn.Module):
            return None
    return found if isinstance(found, nn.Module) else None


def layer_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Every outermost ``ModuleList`` outside vision and audio towers, with its path."""
    outer: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not path.startswith(outer):
            outer = (*outer, f"{path}.")
            if not NOT_TEXT.intersection(path.split(".")):
                yield path, module


def base_linear(path: str, module: nn.Module) -> tuple[str, nn.Module]:
    """The linear that maps X to Y inside any LoRA-like or other wrapper, with its path."""
    for name in ("base_layer", *WRAPPERS):
        if isinstance(inner := module._modules.get(name), nn.Module):
            return base_linear(f"{path}.{name}", inner)
    return path, module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Logical (out, in) of a linear, dense or quantized; None where the module is no linear."""
    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    out, into = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (out, into) if isinstance(out, int) and isinstance(into, int) else None


def check_own_weight(path: str, module: nn.Module) -> None:
    """Raise where a linear's weight is no parameter: pruning and parametrizations compute it before each use.

    Raises:
        QkovError: at ``path``.
    """
    if isinstance(getattr(module, "weight", None), Tensor) and module._parameters.get("weight") is None:
        raise QkovError(
            f"{path}.weight",
            expected="a weight that is a parameter",
            got=f"one computed from {', '.join(name for name, _ in module.named_parameters()) or 'elsewhere'}",
            remedy="Make it permanent first: torch.nn.utils.prune.remove(module, 'weight'), or "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight').",
        )


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out]."""
    return isinstance(module, Conv1D)


def read_int(module: nn.Module, path: str) -> int | None:
    """An integer attribute at a dotted path; ``a/b`` is an exact quotient of two; None where it is absent."""
    if "/" in path:
        over, under = (read_int(module, part) for part in path.split("/"))
        return over // under if over and under and over % under == 0 else None
    *parents, name = path.split(".")
    owner = submodule(module, ".".join(parents))
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def declared_heads(attention: nn.Module, config: Any) -> int | None:
    """The number of query heads that the module states, or else its config."""
    return _first_int(attention, _HEADS) or _first_int(config, _HEADS)


def declared_kv_heads(attention: nn.Module, config: Any, num_heads: int) -> int | None:
    """The number of kv heads that the module states (its own before the config: layers may differ)."""
    groups = _first_int(attention, ("num_key_value_groups",))
    if groups:
        return num_heads // groups
    return _first_int(attention, _KV_HEADS) or _first_int(config, _KV_HEADS)


def unassigned_linears(attention: nn.Module, assigned: Collection[str]) -> list[str]:
    """Paths of linears in an attention module that are not (inside) an assigned one."""
    inside = tuple(f"{path}." for path in assigned)
    linears = (path for path, module in attention.named_modules() if linear_shape(module) is not None)
    return [path for path in linears if path not in assigned and not path.startswith(inside)]


def other_mixers(layer: nn.Module) -> list[str]:
    """Class names of what mixes positions in a layer without being softmax attention."""
    return [type(child).__name__ for name in OTHER_MIXERS if (child := submodule(layer, name)) is not None]


def _first_int(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def attention_linears(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Linears that look like attention, or sit beside one, each with its logical shape.

    Layer numbers are starred out and each form comes once. Where nothing looks like attention, all linears come.
    """
    linears = [(path, shape) for path, module in model.named_modules() if (shape := linear_shape(module))]
    parents = {path.rpartition(".")[0] for path, _ in linears if ATTENTION_LIKE.search(path)}
    alike = [(path, shape) for path, shape in linears if not parents or path.rpartition(".")[0] in parents]
    yield from dict.fromkeys((re.sub(r"\.\d+(?=\.|$)", ".*", path), shape) for path, shape in alike)


def num_parameters(model: Any) -> int:
    """Parameters of a whole, unsharded model."""
    return sum(int(parameter.numel()) for parameter in model.parameters())

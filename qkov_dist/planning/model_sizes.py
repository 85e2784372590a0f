"""What a model is made of, in integers: its weights, the matrices that a token meets, and what a pass keeps of it.

Only modules, names and shapes are looked at: the meta device will do, and so will sharded and quantized weights.

    a matrix of n elements   2 n operations a token forward, and as many backward for the gradient of its input
                             (weights are frozen: no gradient of theirs is formed)
    softmax attention        2 T^2 H (d_q + d_v) operations a sample of T padded tokens and layer forward, twice that
                             backward, and 2.5 times where the kernel forms the attention weights again
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from qkov_dist.distributed.plans import expert_weights, style_of
from qkov_dist.distributed.sharding import logical_shape
from qkov_dist.layout.heads import AttentionLayer, Layout
from qkov_dist.layout.modules import linear_shape, text_config

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
PARALLEL_FLAGS = ("use_parallel_residual", "parallel_attn", "new_decoder_architecture")
ALWAYS_PARALLEL = ("codegen", "cohere", "cohere2", "gptj", "phi")
NORM_BYTES = 4  # of a number that a norm keeps: it computes in float32


@dataclass(frozen=True)
class Weight:
    """A parameter, whole and as stored.

    ``style`` is how tensor parallelism would cut it; ``expert``: whether expert parallelism would, between experts.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int
    layer: int | None
    style: str | None
    expert: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Matrix:
    """What a token is multiplied with in one module; ``labelled``: only a token that has to predict another.

    ``size`` is the elements that one token meets: of experts, those it is sent to. ``expert``: whether expert
    parallelism would spread it.
    """

    module: str
    size: int
    layer: int | None
    style: str | None
    labelled: bool
    expert: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """A model in integers.

    Attributes:
        name: Its model type.
        weights: Every parameter once, tied ones too.
        buffers: Bytes of its buffers, which every rank holds.
        matrices: Every matrix as often as it is used.
        kept: By layer, bytes that autograd and the capture keep of one token until the layer's backward pass: those of
            the residual stream, and those of heads and feed-forwards, which tensor parallelism cuts.
        itemsize: Bytes of a number that flows between layers.
        hidden: Width of the residual stream.
        vocabulary: Width of the logits.
        recomputes: Whether the attention kernel forms the attention weights again in its backward pass.
        parallel: Whether a layer's feed-forward takes the layer's input, beside attention and not behind it.
        quantized: The method, where the model's weights are packed when they are loaded.
    """

    name: str
    weights: tuple[Weight, ...]
    buffers: int
    matrices: tuple[Matrix, ...]
    kept: Mapping[int, tuple[int, int]]
    itemsize: int
    hidden: int
    vocabulary: int
    recomputes: bool
    parallel: bool = False
    quantized: str | None = None

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def styles(self) -> dict[str, str | None]:
        """By module, how tensor parallelism would cut its weight."""
        return {matrix.module: matrix.style for matrix in self.matrices}


def model_sizes_of(model: nn.Module, layout: Layout, dtype: str = "auto") -> ModelSizes:
    """Take a model apart.

    Args:
        model: The model, on any device.
        layout: Its attention layers.
        dtype: The name of the dtype its weights are loaded in; ``auto`` keeps what they have.
    """
    config = text_config(model)
    styles: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    forced, experts = None if dtype == "auto" else getattr(torch, dtype).itemsize, expert_weights(model)
    weights = tuple(
        Weight(
            name,
            logical_shape(p),
            forced or p.dtype.itemsize,
            _layer(name, layout),
            style_of(name, styles),
            name in experts,
        )
        for name, p in model.named_parameters()
    )
    itemsize = forced or torch.empty(0, dtype=getattr(model, "dtype", torch.float32)).element_size()
    matrices = tuple(_matrices(model, layout, styles, _chosen_experts(config)))
    hidden = int(config.hidden_size)
    return ModelSizes(
        name=str(config.model_type),
        weights=weights,
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        matrices=matrices,
        kept=_kept(weights, matrices, layout, itemsize, hidden),
        itemsize=itemsize,
        hidden=hidden,
        vocabulary=int(config.vocab_size),
        recomputes=getattr(config, "_attn_implementation", None) != "eager",
        parallel=config.model_type in ALWAYS_PARALLEL or any(getattr(config, flag, False) for flag in PARALLEL_FLAGS),
        quantized=_quantized(config),
    )


def attention_flops(layer: AttentionLayer) -> int:
    """Operations of one layer's attention for each pair of tokens of a sample, forward."""
    return 2 * layer.num_heads * (layer.head_dim + layer.v_head_dim)


def _layer(name: str, layout: Layout) -> int | None:
    """The decoder layer that a parameter or module is in."""
    first = layout.layers[0]
    stack, _, _ = f"{first.module}.".partition(f".{first.index}.")
    number = name.removeprefix(f"{stack}.").partition(".")[0]
    return int(number) if name.startswith(f"{stack}.") and number.isdigit() else None


def _matrices(model: nn.Module, layout: Layout, styles: Mapping[str, str], chosen: tuple[int, int]) -> Iterator[Matrix]:
    head_of: Any = getattr(model, "get_output_embeddings", None)
    head, experts = head_of() if head_of else None, {name.rpartition(".")[0] for name in expert_weights(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        size = _matrix_size(module)
        if size:
            met = size * chosen[0] // chosen[1] if "experts" in name.split(".") else size
            style = style_of(f"{name}.weight", styles) or _style_of_own(name, module, styles)
            yield Matrix(name, met, _layer(name, layout), style, labelled=module is head, expert=name in experts)


def _matrix_size(module: nn.Module) -> int:
    """Elements of a module's own matrices; a quantized linear is as large as what it stands for."""
    shape = linear_shape(module)
    if shape is not None and any(True for _ in module.parameters(recurse=False)):
        return math.prod(shape)
    shapes = (logical_shape(parameter) for parameter in module.parameters(recurse=False))
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


def _style_of_own(name: str, module: nn.Module, styles: Mapping[str, str]) -> str | None:
    """The style of a parameter that belongs to no linear, such as all experts' matrices in one."""
    names = [f"{name}.{own}" for own, p in module.named_parameters(recurse=False) if len(logical_shape(p)) > 1]
    return next((style for own in names if (style := style_of(own, styles))), None)


def _chosen_experts(config: Any) -> tuple[int, int]:
    """(experts that a token is sent to, experts)."""
    places = (config, getattr(config, "ffn_config", None))
    chosen, every = (
        next((n for key in keys for place in places if (n := getattr(place, key, None))), 1)
        for keys in (CHOSEN, EXPERTS)
    )
    return (chosen, every) if isinstance(chosen, int) and isinstance(every, int) and chosen <= every else (1, 1)


def _kept(
    weights: tuple[Weight, ...], matrices: tuple[Matrix, ...], layout: Layout, itemsize: int, hidden: int
) -> dict[int, tuple[int, int]]:
    """An estimate for layers as most models have them; :class:`ModelSizes` says of what.

    Norms keep their input in float32, and capture keeps the input of Q, K and V. Attention keeps rotated queries, keys
    and values (at query heads) and its output, of which capture keeps a copy as the input of O. Of a gated feed-forward
    stay the gate, its activation, and what it is multiplied with; a plain one, which keeps less, is counted like it.
    """
    scored = {projection.module for layer in layout.layers for projection in layer.projections}
    stream, inner = Counter[int](), Counter[int]()
    for weight in weights:
        if weight.layer is not None and weight.shape == (hidden,) and weight.name.endswith("weight"):
            stream[weight.layer] += NORM_BYTES * hidden
    for matrix in matrices:
        if matrix.layer is not None and matrix.module not in scored:
            inner[matrix.layer] += itemsize * (matrix.size // hidden)
    for layer in layout.layers:
        stream[layer.index] += itemsize * hidden
        inner[layer.index] += itemsize * layer.num_heads * (2 * layer.head_dim + 3 * layer.v_head_dim)
    return {index: (stream[index], inner[index]) for index in sorted({*stream, *inner})}


def _quantized(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))

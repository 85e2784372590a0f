"""Guesses for an architecture that nobody described: which layouts do its module names allow?

The children of attention modules are called much the same everywhere. A set of names is matched against a vocabulary,
and a fused projection is given every row order in use. Nothing is believed: ``proof`` tries each guess on the model and
keeps the only one that it cannot refute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

from torch import nn

from .families import FAMILIES, OUTPUT_MARK, Family, HeadDims
from .modules import base_linear, layer_lists, linear_shape, read_int, submodule
from .names import without_wrappers

_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("self.query", "self.key", "self.value"),
    ("query_proj", "key_proj", "value_proj"),
    ("wq", "wk", "wv"),
    ("w_q", "w_k", "w_v"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("linear_q", "linear_k", "linear_v"),
    ("Wq", "Wk", "Wv"),
    ("project_q", "project_k", "project_v"),
)
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv", "W_pack", "in_proj", "to_qkv", "att_proj")
_OUTPUT = (
    *("o_proj", "out_proj", "dense", "c_proj", "wo", "w_o", "o", "out", "out_lin", "to_out", "to_out.0"),
    *("output.dense", "proj", "proj_out", "attn_out", "output", "linear_out", "Wo", "attention_out"),
)
_HEAD_DIM = (
    *("head_dim", "head_size", "attention_head_size", "self.attention_head_size", "d_head", "dim_head", "d_k", "d_kv"),
    *("dim_per_head", "size_per_head", "head_dimension", "depth"),
    *("d_model/n_heads", "embed_dim/num_heads", "hidden_size/num_heads", "dim/n_heads"),
)


def guess_families(model: nn.Module) -> list[Family]:
    """Every family that the names of some attention-like module allow, most usual first.

    Each comes twice: for every module with these projections, and for those at one place in a layer only (a hybrid may
    give its linear attention the same names).
    """
    found: dict[Family, None] = {}
    for _, stack in layer_lists(model):
        for layer in stack:
            for path, module in layer.named_modules():
                for guess in _families_of(module):
                    family = replace(guess, optional=_missing_elsewhere(stack, path, guess))
                    found.update({family: None, replace(family, attention=without_wrappers(path)): None})
    return list(found)


def _missing_elsewhere(stack: nn.ModuleList, path: str, family: Family) -> tuple[str, ...]:
    """Of K and V, the projections that a module at the same place in another layer lacks, while it has Q and O.

    Such layers take the keys and values of an earlier one.
    """
    attentions = [module for layer in stack if (module := submodule(layer, path)) is not None]
    (first, _), *others = family.inputs
    taking = [module for module in attentions if _linear(module, first) and _linear(module, family.output[0])]
    return tuple(name for name, _ in others if not all(_linear(module, name) for module in taking))


def _families_of(attention: nn.Module) -> Iterator[Family]:
    """The guesses for one module; none where it lacks an output or an input projection."""
    output = next((name for name in _OUTPUT if _linear(attention, name)), None)
    if output is None:
        return
    if _linear(attention, "kv_b_proj"):
        yield replace(next(family for family in FAMILIES if family.name == "mla"), model_types=(), attention=None)
    head_dim = next((name for name in _HEAD_DIM if read_int(attention, name) is not None), "head_dim")
    for orders in _input_orders(attention):
        every = (*orders, (output, f"{OUTPUT_MARK}H*v"))
        yield Family("found by structure", (), None, every, dims=HeadDims(q=head_dim))


def _input_orders(attention: nn.Module) -> Iterator[tuple[tuple[str, str], ...]]:
    for q, k, v in _SEPARATE:
        if all(_linear(attention, name) for name in (q, k, v)):
            for order in ("H*q", "H*(q gate)", "H*(gate q)", "H*q H*gate", "H*gate H*q"):
                yield (q, order), (k, "K*k"), (v, "K*v")
    for name in _FUSED:
        if _linear(attention, name):
            yield from (((name, order),) for order in _fused_orders())


def _fused_orders() -> Iterator[str]:
    """Blocks, heads and groups, with q, k and v in every order; most usual order first."""
    for blocks in permutations(("q", "k", "v")):
        counted = {"q": "H*q", "k": "K*k", "v": "K*v"}
        yield " ".join(counted[block] for block in blocks)
        yield f"K*({' '.join('G*q' if block == 'q' else block for block in blocks)})"
        yield f"4*({' '.join(f'H/4*{block}' for block in blocks)})"
    yield from ("H*q K*(k v)", "H*q K*(v k)", "K*(k v) H*q", "K*(v k) H*q")


def _linear(attention: nn.Module, name: str) -> bool:
    """Whether there is a linear, or a wrapper of one, at this path."""
    module = submodule(attention, name)
    return module is not None and linear_shape(base_linear(name, module)[1]) is not None

"""What of a checkpoint a model does not use: refused where it belongs to attention or is a scale, said otherwise.

A conversion that forgets to say in config.json that projections have a bias, or that weights are quantized, leaves a
model that loads and computes something else. Nothing is unused that the model forms by itself (rotary frequencies,
causal masks), or that transformers knows to be unneeded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.modules import ATTENTION_LIKE, NOT_TEXT, layer_lists, linear_shape, submodule

SCALE = re.compile(r"(^|_)(scales?|scale_inv|qzeros|zero_?points?|absmax|amax|nested_\w+|quant_\w+|g_idx|scb)$", re.I)
CONSTANT = re.compile(r"(^|\.)(inv_freq|masked_bias|causal_mask|position_ids)$")
GGUF_CONSTANT = re.compile(r"^rope_(freqs|factors_\w+)\.weight$|attn_rot_embd")
NORMS = re.compile(r"norm|(^|_)ln", re.I)
NUM_LISTED = 4


def check_loaded(model: nn.Module, report: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Refuse a model that a checkpoint does not fill, or whose attention it does not fit.

    Args:
        model: As loaded.
        report: What transformers says of the loading.
        place: The checkpoint, for messages.

    Returns:
        Warnings, one sentence each.

    Raises:
        QkovError: for parameters without weights or of another shape, and for unused tensors of attention and scales.
    """
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report.get("mismatched_keys", ()))}):
        got = f"none for {len(absent)}, among them {absent[0]}"
        remedy = "These would be random numbers; use a complete checkpoint that fits its config.json."
        raise QkovError(place, expected="weights for every parameter", got=got, remedy=remedy)
    formed = {name for name, _ in model.named_buffers()}
    unused = [key for key in sorted(report["unexpected_keys"]) if key not in formed and not CONSTANT.search(key)]
    layers = [f"{path}.{number}" for path, stack in layer_lists(model) for number in range(len(stack))]
    needed = [key for key in unused if _is_scale(model, key) or _is_attention(layers, key)]
    return _judged(needed, unused, place)


def check_gguf(model: nn.Module, path: Path) -> tuple[str, ...]:
    """The same for a GGUF file, of which transformers takes what it has a name for, and does not say what it leaves.

    Only what changes a layer is looked at: biases, norms and sinks of its attention, and scales.
    """
    from gguf import GGUFReader

    layers = {number: layer for _, stack in layer_lists(model) for number, layer in enumerate(stack)}
    unused = []
    for name in sorted(tensor.name for tensor in GGUFReader(path).tensors):
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
        if found and not GGUF_CONSTANT.search(name) and int(found[1]) in layers:
            unused += [name] if not _gguf_used(layers[int(found[1])], found[2], found[3]) else []
    return _judged(unused, unused, str(path))


def _judged(needed: Collection[str], unused: Collection[str], place: str) -> tuple[str, ...]:
    if needed:
        raise QkovError(
            place,
            expected="a model that uses all of its checkpoint's attention tensors and scales",
            got=f"{len(needed)} that it does not use: {_listed(needed)}",
            remedy="Its config.json does not fit the weights (a bias, a norm or a quantization that it does not name): "
            "correct it, or convert the checkpoint again.",
        )
    if not unused:
        return ()
    return (f"{len(unused)} tensors of the checkpoint are not used by the model: {_listed(unused)}",)


def _listed(keys: Collection[str]) -> str:
    """Names with layer numbers starred out, each once, the first few."""
    forms = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", key) for key in keys))
    more = f", and {len(forms) - NUM_LISTED} other names" if len(forms) > NUM_LISTED else ""
    return ", ".join(forms[:NUM_LISTED]) + more


def _is_scale(model: nn.Module, key: str) -> bool:
    """Whether a tensor is a scale of a module that the text model has."""
    path, _, name = key.rpartition(".")
    path = path.removesuffix(".weight")  # bitsandbytes writes weight.absmax beside weight
    at_home = submodule(model, path) is not None and not NOT_TEXT.intersection(path.split("."))
    return at_home and SCALE.search(name) is not None


def _is_attention(layers: Collection[str], key: str) -> bool:
    """Whether a tensor belongs to attention in one of the decoder layers that the model has."""
    inside = next((key.removeprefix(f"{layer}.") for layer in layers if key.startswith(f"{layer}.")), "")
    return any(ATTENTION_LIKE.search(part) and not NORMS.search(part) for part in inside.split("."))


def _gguf_used(layer: nn.Module, name: str, kind: str) -> bool:
    """Whether a layer has what a GGUF tensor (``attn_q`` and ``bias``, say) is for; other kinds are not looked at."""
    if SCALE.search(kind) or SCALE.search(name):
        return any(SCALE.search(own) for own, _ in layer.named_parameters())
    if not name.startswith("attn_"):
        return True
    attention = [part for path, part in layer.named_modules() if ATTENTION_LIKE.search(path) and not NORMS.search(path)]
    if kind == "bias" and "norm" not in name:
        return any(_has_bias(part) for part in _projections(attention, output=name == "attn_output"))
    if re.fullmatch(r"attn_(q|k|v|sub)_norm", name):
        return any(NORMS.search(path) for part in attention for path, _ in part.named_modules())
    if "sink" in name:
        return any("sink" in own for own, _ in layer.named_parameters())
    return True


def _projections(attention: Collection[nn.Module], *, output: bool) -> Iterator[nn.Module]:
    """Linears of attention modules: the last of each maps heads to the stream, all others the stream to heads."""
    for part in attention:
        linears = [child for child in part.children() if linear_shape(child) is not None]
        yield from linears[-1:] if output else linears[:-1]


def _has_bias(linear: nn.Module) -> bool:
    return getattr(linear, "bias", None) is not None

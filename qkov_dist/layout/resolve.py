"""Finding where each head lives: architecture -> ``heads.Layout``.

Head dims are read from the attention module, counts follow from the projections' shapes and are checked against those
that the module and the config state, and the slices of a projection must tile it exactly; what disagrees is an error.
No weight's value is read: the meta device will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from torch import nn

from qkov_dist.errors import QkovError

from .attention import attention_layer
from .detect import guess_families
from .families import FAMILIES, OUTPUT_MARK, REFUSED, Family, HeadDims
from .heads import Layout, OtherLayer
from .modules import (
    attention_linears,
    is_encoder_decoder,
    layer_lists,
    other_mixers,
    submodule,
    text_config,
)
from .names import without_wrappers
from .row_order import parse

_REGISTERED: dict[str, Family] = {}


def register_layout(
    model_type: str,
    orders: Mapping[str, str],
    *,
    head_dim: str = "head_dim",
    v_head_dim: str = "",
    attention: str | None = None,
    optional: Sequence[str] = (),
) -> None:
    """Say where the heads of a custom architecture are.

    Three lines do it::

        register_layout("my_model", {
            "qkv": "K*(G*q k v)", "out": "cols H*v",
        }, head_dim="head_dim")

    Args:
        model_type: ``config.model_type``; a known one is overridden.
        orders: Path inside the attention module -> row order (``rows.py``); O's column order starts with ``"cols "``.
        head_dim: Attribute of the attention module with the Q and K head dim; ``"a/b"`` is a quotient.
        v_head_dim: The same for V where it differs.
        attention: Path of the attention module in a decoder layer; by default, the one that has these projections.
        optional: Projections that some layers lack.

    Raises:
        QkovError: for an order outside the grammar, or unless exactly one projection is O.
    """
    outputs = [path for path, order in orders.items() if order.startswith(OUTPUT_MARK)]
    if len(outputs) != 1:
        raise QkovError(
            f"register_layout({model_type!r})",
            expected=f"one output projection, whose order starts with {OUTPUT_MARK!r}",
            got=f"{len(outputs)} in {dict(orders)}",
            remedy="Write for example {'qkv': 'H*(q k v)', 'out': 'cols H*v'}.",
        )
    for order in orders.values():
        parse(order.removeprefix(OUTPUT_MARK))
    dims = HeadDims(q=head_dim, v=v_head_dim)
    _REGISTERED[model_type] = Family(
        model_type, (model_type,), attention, tuple(orders.items()), optional=tuple(optional), dims=dims
    )


def known_family(config: object) -> Family | None:
    """The registered or built-in family of a text config, or None."""
    model_type = str(getattr(config, "model_type", ""))
    if model_type in _REGISTERED:
        return _REGISTERED[model_type]
    matching = (f for f in FAMILIES if model_type in f.model_types)
    return next((f for f in matching if all(getattr(config, a, None) == v for a, v in f.when)), None)


def resolve(model: nn.Module) -> Layout:
    """Find every head of a model; ``proved`` stays False until ``proof`` has seen each slice respond.

    An unknown architecture is resolved where its structure allows one layout only, with the family name
    "found by structure": believe that one after ``proof.resolve_proved``, not before.

    Raises:
        QkovError: for encoder-decoders, refused and ambiguous architectures (with the attention parameters found and
            the lines that register a layout), and wherever shapes, counts and head dims disagree.
    """
    _check_covered(model)
    family = known_family(text_config(model))
    if family is not None:
        return layout_of_family(model, family)
    found = candidates(model)
    if len(found) == 1:
        return found[0]
    raise unresolved(model, f"an unknown one, whose structure allows {len(found)} layouts")


def candidates(model: nn.Module) -> list[Layout]:
    """Layouts that the structure of an unknown architecture allows; ``proof.prove_candidates`` finds the true one.

    A fused projection fits several row orders, so several layouts come back; orders that do not tile are left out.

    Raises:
        QkovError: for encoder-decoders and refused architectures.
    """
    _check_covered(model)
    config = text_config(model)
    found: dict[object, Layout] = {}
    for family in guess_families(model):
        try:
            layout = layout_of_family(model, family)
        except QkovError:
            continue  # this guess does not tile the parameters: it is no candidate
        key = tuple((p.module, p.slices) for layer in layout.layers for p in layer.projections)
        found.setdefault(key, replace(layout, model_type=str(config.model_type)))
    return list(found.values())


def layout_of_family(model: nn.Module, family: Family) -> Layout:
    """Lay one family's rule over a model.

    Raises:
        QkovError: where no layer has its projections, or shapes, counts and head dims disagree.
    """
    config = text_config(model)
    path, stack = _decoder(model, family, config)
    layers, others, classes = [], [], set()
    for index, layer in enumerate(stack):
        found = find_attention(layer, family)
        if found is None:
            others.append(_other(index, f"{path}.{index}", layer, family))
            continue
        place = f"{path}.{index}.{found[0]}".removesuffix(".")
        attention = attention_layer(index, place, found[1], family, config)
        beside = [kind for kind in other_mixers(layer) if kind != type(found[1]).__name__]
        notes = tuple(f"beside the attention there is a {kind}, which is not scored" for kind in beside)
        layers.append(replace(attention, notes=(*attention.notes, *notes)))
        classes.add(type(found[1]))
    for other in others:
        _check_other(other, stack[other.index], classes, family)
    return Layout(str(config.model_type), family.name, len(stack), tuple(layers), tuple(others))


def _check_other(other: OtherLayer, layer: nn.Module, attention_classes: Set[type], family: Family) -> None:
    """An attention of a covered class that lacks a projection must not pass for a layer without attention."""
    missed = [path for path, module in layer.named_modules() if type(module) in attention_classes]
    if missed:
        raise QkovError(
            f"{other.module}.{missed[0]}",
            expected=f"the projections {', '.join(family.required)}, as in other layers",
            got="an attention without all of them",
            remedy="Register a layout that names them in register_layout(..., optional=[...]).",
        )


def _check_covered(model: nn.Module) -> None:
    model_type = str(text_config(model).model_type)
    if model_type in _REGISTERED:
        return  # the user's word, to be proved like any other
    if model_type in REFUSED:
        raise QkovError(
            f"model type {model_type!r}",
            expected="an architecture whose heads have weights of their own",
            got=REFUSED[model_type],
            remedy="Its heads cannot be scored one by one; choose another model.",
        )
    if is_encoder_decoder(model):
        raise unresolved(model, "an encoder-decoder or cross-attention, which is not covered")


def find_attention(layer: nn.Module, family: Family) -> tuple[str, nn.Module] | None:
    """The attention module of a decoder layer, with its path inside it; None where the layer has none.

    Raises:
        QkovError: where a second module of the layer has the same projections: it would be overlooked.
    """
    having = [(path, module) for path, module in layer.named_modules() if _has_all(module, family)]
    found = {without_wrappers(path): (path, module) for path, module in having}  # the innermost of wrapped modules
    chosen = [place for path, place in found.items() if family.attention in (None, path)]
    if chosen and len(found) > 1:
        raise QkovError(
            type(layer).__name__,
            expected=f"one module with {', '.join(family.required)} in a layer",
            got=", ".join(found),
            remedy="A layer with two attentions is not covered.",
        )
    return chosen[0] if chosen else None


def _has_all(module: nn.Module, family: Family) -> bool:
    return all(submodule(module, path) is not None for path in family.required)


def _decoder(model: nn.Module, family: Family, config: Any) -> tuple[str, nn.ModuleList]:
    """The one list of decoder layers, with its path."""
    found = [(path, stack) for path, stack in layer_lists(model) if any(find_attention(x, family) for x in stack)]
    if len(found) > 1:
        found = [(path, stack) for path, stack in found if len(stack) == getattr(config, "num_hidden_layers", None)]
    if len(found) != 1:
        raise unresolved(model, f"{len(found)} stacks of layers have {', '.join(family.required)}, of which one must")
    return found[0]


def _other(index: int, path: str, layer: nn.Module, family: Family) -> OtherLayer:
    at_place = submodule(layer, family.attention or "")
    found = [type(at_place).__name__] if at_place not in (None, layer) else other_mixers(layer)
    kind = next(iter(found), type(layer).__name__)
    return OtherLayer(index, path, kind, f"no softmax attention with {', '.join(family.required)}")


def unresolved(model: nn.Module, why: str) -> QkovError:
    """The refusal: what attention-like parameters there are, and the lines that register a layout."""
    model_type = str(text_config(model).model_type)
    found = [f"{path} {list(shape)}" for path, shape in attention_linears(model)]
    shared = [name for name in ("k_proj", "v_proj") if _is_missing_somewhere(model, name)]
    optional = f", optional={shared}" if shared else ""
    return QkovError(
        f"model type {model_type!r}",
        expected="an architecture whose heads are known",
        got=f"{why}; attention-like parameters [out, in]: {'; '.join(found) or 'none'}",
        remedy=(
            "Register its layout before using it:\n"
            "    from qkov_dist import register_layout\n"
            f"    orders = {{'q_proj': 'H*q', 'k_proj': 'K*k', 'v_proj': 'K*v', 'o_proj': 'cols H*v'}}\n"
            f"    register_layout({model_type!r}, orders, head_dim='head_dim'{optional})"
        ),
    )


def _is_missing_somewhere(model: nn.Module, name: str) -> bool:
    """Whether some attention modules have this projection beside q_proj, and others have q_proj alone."""
    having = [submodule(m, name) is not None for _, m in model.named_modules() if submodule(m, "q_proj") is not None]
    return any(having) and not all(having)

"""What the plans of transformers can cut of a model: its attention and feed-forwards, and its experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from qkov_dist.config import ModelConfig
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Layout
from qkov_dist.layout.resolve import resolve
from qkov_dist.loading.architecture import meta_model

SHARDED_BY_HOOKS = ("colwise", "rowwise")


def check_model(config: ModelConfig, *, tp: int, ep: int, shards: int) -> None:
    """Refuse a model that tensor or expert parallelism, or FSDP2, cannot cut so, before its weights are read.

    Args:
        config: Which model.
        tp: Into how many parts tensor parallelism cuts it.
        ep: Over how many ranks its experts are spread.
        shards: Over how many ranks FSDP2 spreads each part of the experts.
    """
    if tp == ep == shards == 1:
        return
    model = meta_model(config)
    try:
        check_shards(model, ep, shards)
    except QkovError as error:
        raise error.within(str(config.path)) from None
    if tp == ep == 1:
        return
    layout, plan, names = resolve(model), getattr(model, "tp_plan", None) or {}, expert_weights(model)
    attention = {style_of(f"{p.module}.weight", plan) for layer in layout.layers for p in layer.projections}
    in_layers = {style_of(name, plan) for name, _ in model.named_parameters() if "*" in starred(name)}
    try:
        check_experts({len(model.get_parameter(name)) for name in names}, layout, ep)
        check_tensor_parallel(attention, layout, 1 if ep > 1 and not in_layers - {None} else tp, in_layers)
    except QkovError as error:
        raise error.within(str(config.path)) from None


def check_tensor_parallel(
    styles: Collection[str | None], layout: Layout, tp: int, in_layers: Collection[str | None] = ()
) -> None:
    """Refuse tensor parallelism of a model without a plan, or with heads that the ranks cannot share.

    Args:
        styles: The plan's for the attention projections; None is of a projection that has none.
        layout: The layers.
        tp: Into how many parts each is to be cut.
        in_layers: The plan's styles for all weights of layers.

    Raises:
        QkovError: naming what would do.
    """
    known = set(styles) - {None}
    if tp > 1 and not known | (set(in_layers) - {None}):
        raise QkovError(
            "parallel.tp",
            expected="a model whose transformers class has a tensor-parallel plan for its layers",
            got=f"model type {layout.model_type!r}, which has none",
            remedy="Use parallel.shard=fsdp or zero3, which cut any model, with parallel.tp=1.",
        )
    if not known & set(SHARDED_BY_HOOKS):
        return  # attention runs whole on every rank: any number of heads will do
    for layer in layout.layers:
        if layer.num_kv_heads % tp or layer.num_heads % tp:
            raise QkovError(
                "parallel.tp",
                expected=f"a divisor of the {layer.num_heads} query and {layer.num_kv_heads} kv heads of each layer",
                got=str(tp),
                remedy="Choose such a parallel.tp, or parallel.shard=fsdp or zero3, which cut between any two rows.",
            )


def check_experts(numbers: Collection[int], layout: Layout, ep: int) -> None:
    """Refuse expert parallelism of a model without experts that a plan cuts, or with a number that does not divide.

    Args:
        numbers: How many experts there are, of each module of them.
        layout: The layers.
        ep: Over how many ranks they are to be spread.

    Raises:
        QkovError: naming what would do.
    """
    if ep == 1:
        return
    if not numbers:
        raise QkovError(
            "parallel.ep",
            expected="a mixture of experts whose transformers class has a plan for them",
            got=f"model type {layout.model_type!r}, which has none",
            remedy="Use parallel.shard=fsdp or zero3, which cut any model, with parallel.ep=1.",
        )
    if odd := [number for number in sorted(numbers) if number % ep]:
        raise QkovError(
            "parallel.ep",
            expected=f"a divisor of the {odd[0]} experts",
            got=str(ep),
            remedy="Choose such a parallel.ep, or parallel.shard=fsdp or zero3 with parallel.ep=1.",
        )


def check_shards(model: nn.Module, ep: int, shards: int) -> None:
    """Refuse FSDP2 of experts that a checkpoint has one by one, where a rank would get none of them.

    transformers stacks those of a rank's share, which is cut between experts, and cannot stack none.

    Raises:
        QkovError: naming what would do.
    """
    for number in sorted({len(model.get_parameter(name)) // ep for name in expert_weights(model)}):
        if shards > 1 and -(-number // shards) * (shards - 1) >= number and _stacks_experts(model):
            raise QkovError(
                "parallel.shard",
                expected=f"ranks that each get one of the {number} experts",
                got=f"fsdp of them over {shards}, which leaves ranks without any: transformers cannot load these",
                remedy=f"Let {number} ranks or a divisor of it share them (by parallel.replicate or parallel.ep), or "
                "use parallel.shard=zero3.",
            )


def _stacks_experts(model: Any) -> bool:
    """Whether transformers makes a model's experts of tensors that are one expert's each."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return False
    kind = model.config.get_text_config().model_type
    conversions = get_checkpoint_conversion_mapping(kind) or ()  # type: ignore[no-untyped-call]
    steps = (step for conversion in conversions for step in getattr(conversion, "operations", ()))
    return any(type(step).__name__ == "MergeModulelist" for step in steps)


def expert_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that transformers' plan for experts cuts between experts, along their first dim."""
    plan: Mapping[str, str] = getattr(model, "ep_plan", None) or {}
    return {name for name, _ in model.named_parameters() if plan.get(starred(name)) == "grouped_gemm"}


def whole_plan(model: Any) -> dict[str, str]:
    """A tensor-parallel plan that cuts nothing: for ranks that share samples, and have nothing but experts apart."""
    embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    return dict.fromkeys([*(getattr(model, "tp_plan", None) or {}), embeddings], "replicate")


def starred(name: str) -> str:
    """A dotted name with every number replaced by ``*``, as plans of transformers write it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def style_of(name: str, styles: Mapping[str, str]) -> str | None:
    """A plan's style for a parameter or module: its own, or that of the module it is in."""
    own = starred(name)
    return styles.get(own, styles.get(own.rpartition(".")[0]))

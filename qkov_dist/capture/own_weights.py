"""Whether each projection has a weight of its own, which nothing else uses or changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import Site


def check_weights(model: nn.Module, sites: Sequence[Site]) -> None:
    """Raise unless each site's weight is its own module's alone.

    Raises:
        QkovError: for a weight that is shared, or has hooks on its gradient.
    """
    sharing = _sharing(model)
    for site in sites:
        module = model.get_submodule(site.module)
        weight = module._parameters.get("weight")
        if weight is None:
            continue  # a quantized linear with parameters of its own
        name = f"{site.module}.weight"
        if others := sharing.get(name):
            raise QkovError(
                name,
                expected="a weight that no other layer uses",
                got=f"one that is also {', '.join(others[:3])}{', …' if len(others) > 3 else ''}",
                remedy="Its gradient is the sum over all its uses, which belongs to no single layer. Choose layers "
                "whose weights are their own (metric.layers; layers of a FisherCollector), or untie them.",
            )
        if weight._backward_hooks:
            raise QkovError(
                name,
                expected="a weight without hooks on its gradient",
                got=f"{len(weight._backward_hooks)} registered with weight.register_hook",
                remedy="Remove them while samples are collected: weights are frozen then, and no such hook runs.",
            )


def _sharing(model: nn.Module) -> dict[str, list[str]]:
    """By name, the other parameters (or other names) whose numbers lie at the same place, where there are any."""
    places = sorted((*_place(parameter), name) for name, parameter in _named_once(model))
    groups: list[list[str]] = []
    on, end = "", 0
    for where, start, stop, name in places:
        if where != on or start >= end:
            groups.append([])
            on, end = where, stop
        groups[-1].append(name)
        end = max(end, stop)
    return {name: [other for other in group if other != name] for group in groups if len(group) > 1 for name in group}


def _named_once(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by each of its names, but those by which a wrapper calls the same module of the same layer.

    A module under the numbers of two layers is used by both.
    """
    known: set[tuple[int, str, tuple[str, ...]]] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            key = (id(module), name, tuple(part for part in path.split(".") if part.isdigit()))
            if parameter is not None and key not in known:
                known.add(key)
                yield f"{path}.{name}" if path else name, parameter


def _place(parameter: nn.Parameter) -> tuple[str, int, int]:
    """Where a parameter lies: on which device, and from which byte to which."""
    if hasattr(parameter, "ds_id"):
        return "ZeRO-3", int(parameter.ds_id), int(parameter.ds_id) + 1
    local: Tensor = getattr(parameter, "_local_tensor", parameter)
    if local.device.type == "meta" or not local.numel():
        return "object", id(parameter), id(parameter) + 1
    span = 1 + sum((size - 1) * abs(stride) for size, stride in zip(local.shape, local.stride(), strict=True))
    return str(local.device), local.data_ptr(), local.data_ptr() + span * local.element_size()

"""Evaluation mode, and back: no dropout, no learning, kernels that gradients can pass, every flag restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; restore each module's flag afterwards.

    Four-bit linears of bitsandbytes stay in training mode, which changes nothing but the kernel: on CPUs their
    evaluation mode repacks the weights for one that no gradient can pass.
    """
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                _unpack(module)
                module.training = True
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter; restore ``requires_grad`` afterwards. Gradients that are there are left alone."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _unpack(linear: Any) -> None:
    """Undo the repacking of an earlier evaluation: making a state dict does that."""
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        linear.state_dict()

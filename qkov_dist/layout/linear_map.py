r"""Whether a projection *is* Y = X W^T + b, on the numbers of one pass.

Scores are made of D^T X, which is dL/dW of that map and of no other: not of one that scales its input or output, or
uses W twice. Where W lies dense in this process it is multiplied out; where it is quantized, W is what the map does,
which has to be affine; where it is a DTensor, the module has to be a linear of torch or transformers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from qkov_dist.errors import QkovError

from .modules import is_transposed, linear_shape

ROWS = 8  # tokens that are looked at
# Rounding of one product, with room for TF32 and for what a process allows float32 products (1e-3).
TOLERANCE = {torch.float64: 1e-7, torch.float32: 5e-3}
TOLERANCE_HALF, TOLERANCE_QUANTIZED = 0.03, 0.1
PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward)


Forward = Callable[..., Tensor]
See = Callable[[Forward, Tensor, Tensor], Tensor | None]


@contextmanager
def watched(module: nn.Module, see: See) -> Iterator[None]:
    """Have ``see(forward, x, y)`` called between a linear map and all hooks; what it returns goes on in place of y.

    The module's own ``forward`` is replaced, inside the one that accelerate puts around it to move weights: hooks that
    change X come before it, hooks that change Y after it.
    """
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own, forward = module.__dict__.get(name), getattr(module, name)

    def seen(*args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = forward(*args, **kwargs)
        instead = see(forward, args[0] if args else next(iter(kwargs.values())), y)
        return y if instead is None else instead

    setattr(module, name, seen)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


@torch.no_grad()
def check_linear_map(place: str, module: nn.Module, forward: Forward, x: Tensor, y: Tensor) -> None:
    """Raise unless Y = X W^T + b, up to rounding.

    Args:
        place: The module's path, for messages.
        module: The linear, with its weight as it is during the pass.
        forward: What made y, without hooks.
        x: Its input [..., in].
        y: Its output [..., out].

    Raises:
        QkovError: names the projection.
    """
    weight = getattr(module, "weight", None)
    if _is_dtensor(weight):
        if type(module).forward not in PLAIN_FORWARDS:
            raise _not_linear(place, module, "a class whose map cannot be checked on a part of its weight")
        return
    x, y = x.reshape(-1, x.shape[-1])[:ROWS], y.reshape(-1, y.shape[-1])[:ROWS]
    with torch.autocast(y.device.type, enabled=False):
        if _is_dense(weight, module):
            assert isinstance(weight, Tensor)
            _check_dense(place, module, weight, x, y)
        else:
            _check_affine(place, module, forward, x)


def _check_dense(place: str, module: nn.Module, weight: Tensor, x: Tensor, y: Tensor) -> None:
    weight, bias = weight.t() if is_transposed(module) else weight, getattr(module, "bias", None)
    if (y.shape[1], x.shape[1]) != tuple(weight.shape):
        raise _not_linear(place, module, f"{x.shape[1]} features in and {y.shape[1]} out of a weight {[*weight.shape]}")
    dtypes = (x.dtype, y.dtype, weight.dtype)
    product = functional.linear(x.to(weight.dtype), weight, bias)
    deviation, size = (product.double() - y.double()).norm(), product.double().norm()
    if not deviation <= max(TOLERANCE.get(dtype, TOLERANCE_HALF) for dtype in dtypes) * size:
        raise _not_linear(place, module, f"an output that differs from it by {float(deviation / size):.2g} of its norm")


def _check_affine(place: str, module: nn.Module, forward: Forward, x: Tensor) -> None:
    """f(-2x) + 2 f(x) = 3 f(0) holds for affine maps, and fails for what bends at 0 or saturates."""
    zero, once, twice = (forward(factor * x).double() for factor in (0.0, 1.0, -2.0))
    deviation, size = (twice + 2 * once - 3 * zero).norm(), (once - zero).norm()
    if not deviation <= TOLERANCE_QUANTIZED * size:
        raise _not_linear(place, module, f"a map that is not affine ({float(deviation / size):.2g} of its norm)")


def _is_dtensor(weight: object) -> bool:
    return hasattr(weight, "placements")


def _is_dense(weight: object, module: nn.Module) -> bool:
    """Whether a weight lies here as numbers in its logical shape (under ZeRO-3, while its module runs)."""
    shape = linear_shape(module)
    stored = shape[::-1] if shape and is_transposed(module) else shape
    return (
        isinstance(weight, Tensor)
        and type(weight.detach()) is Tensor
        and weight.is_floating_point()
        and weight.device.type != "meta"
        and tuple(weight.shape) == stored
        and weight.dtype.itemsize > 1  # an 8-bit float is a quantized weight, with a scale beside it
    )


def _not_linear(place: str, module: nn.Module, got: str) -> QkovError:
    return QkovError(
        place,
        expected=f"a projection that is Y = X W^T + b ({type(module).__name__})",
        got=got,
        remedy="The gradient of its weight is not D^T X. Replace it by a plain linear (fold scales into its weight), "
        "or leave its layer out (metric.layers; layers of a FisherCollector).",
    )

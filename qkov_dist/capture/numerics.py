"""How products are formed, whatever the process around has set: precision, autocast, default device; all put back.

A user's process may have allowed TF32 or bfloat16 in float32 products, stand inside ``torch.autocast``, or have set a
default device. The model computes as it is told; what is formed from its factors must not depend on that.

And by how much the same numbers differ where they are summed in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def products_as(precision: str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Form float32 products in this precision, outside of autocast, with new tensors on the CPU by default.

    Args:
        precision: ``highest``, which allows neither TF32 nor bfloat16, ``high`` or ``medium``, as torch names them.
        device: Where they are formed; autocast is switched off there, and on the CPU.
    """
    with ExitStack() as stack:
        for kind in {"cpu", torch.device(device).type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_matmul_precision(precision))
        yield


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products; put back what was set of each backend, in the old way or the new."""
    before = [(backend, getattr(backend, "fp32_precision", None)) for backend in _backends()]
    try:
        legacy: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # backends were set one by one, in a way that the one name for all has no word for
        legacy = None
    try:
        torch.set_float32_matmul_precision(precision)
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, value in before:
            if value is not None and backend.fp32_precision != value:
                backend.fp32_precision = value


def _backends() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


# Through all layers of a model; what a false answer differs by is of order 1. Of a half type 8 or 11 bits are left.
_MOVED = {torch.float64: 1e-7, torch.float32: 1e-3}
_MOVED_HALF = 0.1


def moved_by_order(*dtypes: torch.dtype) -> float:
    """What another order of sums moves numbers of these types by at most, as a share of their norm."""
    return max(_MOVED.get(dtype, _MOVED_HALF) for dtype in dtypes)

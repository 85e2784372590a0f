"""What running out of memory looks like, on CPUs and GPUs alike."""

from __future__ import annotations

import torch

_SIGNS = ("can't allocate memory", "out of memory", "not enough memory")


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was no memory left: nothing is wrong with what was asked but its size."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)

"""What a rank holds of a tensor, in bytes, however the tensor is cut."""

from __future__ import annotations

from typing import Any


def num_parameters(model: Any) -> int:
    """Parameters of a whole, unsharded model."""
    return sum(int(parameter.numel()) for parameter in model.parameters())


def local_bytes(tensor: Any) -> int:
    """Bytes that this rank holds of a parameter or buffer: of a DTensor its shard, under ZeRO-3 its partition."""
    if hasattr(tensor, "ds_id"):
        return int(tensor.ds_tensor.nbytes) if tensor.ds_tensor is not None else int(tensor.nbytes)
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.nbytes)

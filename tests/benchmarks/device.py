"""Where everybody computes: the GPU where there is one, as a run does, else the CPU."""

from __future__ import annotations

import torch


def device() -> torch.device:
    """The first GPU, or the CPU; `CUDA_VISIBLE_DEVICES=` hides the GPUs."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def on_gpu() -> bool:
    """Whether that is a GPU."""
    return device().type == "cuda"


def finish() -> None:
    """Wait for what the GPU was told to do."""
    if on_gpu():
        torch.cuda.synchronize()


def gpu_peak() -> float:
    """The most GPU memory that this process has reserved, in MiB; 0 without a GPU."""
    return torch.cuda.max_memory_reserved() / 2**20 if on_gpu() else 0.0

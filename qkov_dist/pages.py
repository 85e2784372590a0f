"""Memory whose pages are cheap to touch for the first time: what is freed is kept and taken again, or pages are huge.

A page that a process touches first is made by the kernel then, which on a virtual machine costs more than to write it.
Passes through a model free and take the same sizes layer after layer; glibc hands large ones back to the kernel each
time, but not inside :func:`kept_heap`. What is touched only once, and is large, has huge pages (:func:`large_tensor`).
Both change no number, and do nothing where a system knows no such thing.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

HUGE_PAGE = 2 * 2**20
_FEWEST = 4  # huge pages; a smaller tensor is an ordinary one

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_NEVER, _NONE, _ANY = -1, 0, 65536
_LARGEST_THRESHOLD = 32 * 2**20  # where glibc's own one stays once a tensor of this size was freed


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Keep what a model on the CPU frees inside the block; at its end all that is free goes back to the kernel."""
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_MAX, _NONE)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_MAX, _ANY)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
        libc.malloc_trim(0)


def large_tensor(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """A tensor of any content on the CPU, [num_rows, width]; on huge pages where it fills several."""
    size = num_rows * width * dtype.itemsize
    if size >= _FEWEST * HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # no memory, or a kernel without huge pages: as any other tensor
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(pages, dtype=dtype).view(num_rows, width)
    return torch.empty(num_rows, width, dtype=dtype)


@cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

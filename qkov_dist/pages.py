"""Memory whose pages need not be made again: what is freed is kept, and taken again.

A page that a process touches first is made by the kernel then, which on a virtual machine costs more than to write it.
Passes through a model free and take the same sizes layer after layer; glibc hands large ones back to the kernel each
time, but not inside :func:`kept_heap`. It changes no number, and does nothing where a system knows no such thing.

Huge pages are not asked for: a virtual machine may have to fetch each of them from its host, which made a gigabyte of
factors cost 2 s in place of 0.3 where that was measured.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

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


@cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

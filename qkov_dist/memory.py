"""A process's memory: pages that are kept, arrays larger than it, copies elsewhere, what running out looks like."""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import QkovError

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # mallopt(3)
_NEVER, _NONE, _ANY = -1, 0, 65536
_LARGEST_THRESHOLD = 32 * 2**20  # where glibc's own one stays once a tensor of this size was freed


@contextmanager
def kept_heap(device: torch.device) -> Iterator[None]:
    """Keep what a model on the CPU frees inside the block; at its end all that is free goes back to the kernel.

    A page that a process touches first is made by the kernel then, which on a virtual machine costs more than to write
    it. Passes through a model free and take the same sizes layer after layer; glibc hands large ones back to the kernel
    each time, but not in here. It changes no number, and does nothing where a system knows no such thing.

    Huge pages are not asked for: a virtual machine may have to fetch each of them from its host, which made a gigabyte
    of factors cost 2 s in place of 0.3 where that was measured.
    """
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
        give_back()


def give_back() -> None:
    """Give the kernel what memory of this process is free, whichever thread it was of."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def host_memory() -> int:
    """Bytes of memory that processes here may have together: the machine's, or what a container is given of it."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


IN_MEMORY_BYTES = 256 * 2**20


def scratch_array(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path | None = None) -> npt.NDArray[Any]:
    """An array of zeros: in memory, or in a scratch file where it is larger than ``IN_MEMORY_BYTES``.

    The file has no name (it is unlinked at once), so that a process leaves nothing behind however it ends. Its room is
    taken before it is mapped: a full disk is an error here and not a crash later.

    Args:
        shape: Its shape.
        dtype: A floating type.
        folder: Where the scratch file is; the system's temporary folder by default.

    Raises:
        QkovError: where the file system has no room for it.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY_BYTES:
        return np.zeros(shape, dtype)
    place = Path(folder or tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile(prefix="qkov-scratch-", dir=place) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise QkovError(
            str(place),
            expected=f"room for {size / 2**30:.1f} GiB of scores",
            got=error.strerror or type(error).__name__,
            remedy="Free disk space, set TMPDIR or output.dir to a larger disk, or take fewer samples.",
        ) from error


def moved(values: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Values elsewhere, in another type: they cross as they are stored, and are converted where they arrive.

    A GPU fetches them by itself, in its current stream, and nobody waits.
    """
    there = values.to(device, non_blocking=torch.device(device).type == "cuda")
    return there if dtype is None else there.to(dtype)


# In what is raised on CPUs and GPUs alike.
_SIGNS = ("can't allocate memory", "out of memory", "not enough memory")


class UnlessShort(AbstractContextManager[None]):
    """Goes on behind its block where memory ran out inside; nothing of the error is kept."""

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        """Whether to go on."""
        return error is not None and is_shortage(error)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there was no memory left: nothing is wrong with what was asked but its size."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)

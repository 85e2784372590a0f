"""Arrays that may be larger than memory: beyond a size they lie in a file that nobody else sees.

The file has no name (it is unlinked at once), so that a process leaves nothing behind however it ends. Its room is
taken before it is mapped: a full disk is an error here and not a crash later.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import QkovError

IN_MEMORY_BYTES = 256 * 2**20


def scratch_array(shape: tuple[int, ...], dtype: npt.DTypeLike, folder: Path | None = None) -> npt.NDArray[Any]:
    """An array of zeros: in memory, or in a scratch file where it is larger than ``IN_MEMORY_BYTES``.

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

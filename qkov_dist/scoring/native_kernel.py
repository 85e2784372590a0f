"""``tile_kernel.c``, compiled once for the processor at hand: what of it Python sees.

It is compiled with the system's C compiler (``CC``, or ``cc``, ``gcc``, ``clang``) where it is first wanted, which
takes about a second, and kept in ``$XDG_CACHE_HOME/qkov_dist`` (``~/.cache/qkov_dist``) under a name that says which
source, compiler and processor it is of. Where there is no compiler, :mod:`~qkov_dist.scoring.kernel` does the same by
torch's own products.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkov_dist.errors import QkovError

SOURCE = Path(__file__).with_name("tile_kernel.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-shared", "-fPIC")
OF_DTYPE = {torch.float32: (), torch.float64: ("-DQKOV_DOUBLE",)}
TIMEOUT = 120  # seconds that compiling may take


class Tile(ctypes.Structure):
    """``tile`` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "d", "x_at", "d_at", "tokens")),
        *((name, ctypes.c_int64) for name in ("blocks", "row", "rows", "col", "cols", "tasks")),
        *((name, ctypes.c_void_p) for name in ("weights", "mean_weights")),
        ("own_squares", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("epsilon", "ridge", "least")),
        *((name, ctypes.c_int64) for name in ("left_map", "right_map", "alike", "half")),
        *((name, ctypes.c_int64) for name in ("left", "left_end", "right", "right_end")),
        *((name, ctypes.c_void_p) for name in ("scores", "fisher", "products", "influences")),
        *((name, ctypes.c_void_p) for name in ("chosen", "own_weights", "rest", "of_tasks", "own_shares", "scratch")),
    )


@dataclass(frozen=True)
class Rows:
    """Where samples are among the rows of all, in lanes.

    Attributes:
        starts: The first row of each, int64 [lanes].
        lengths: How many it has, int64 [lanes]; 0 of a lane without a sample.
    """

    starts: Tensor
    lengths: Tensor


class NativeKernel:
    """The kernel for one type of numbers.

    Args:
        library: What was compiled.
        dtype: The type.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self._library, self.dtype = library, dtype
        for name in ("qkov_lanes", "qkov_panel", "qkov_scratch"):
            getattr(library, name).restype = ctypes.c_int64
        library.qkov_pack.restype = library.qkov_tile.restype = library.qkov_gram.restype = None

    @cached_property
    def lanes(self) -> int:
        """Samples of a block."""
        return int(self._library.qkov_lanes())

    @cached_property
    def panel(self) -> int:
        """Features of a panel."""
        return int(self._library.qkov_panel())

    def scratch(self, blocks: int, left: int, num_tasks: int) -> int:
        """Numbers that a tile takes while it is worked on."""
        return int(self._library.qkov_scratch(*map(ctypes.c_int64, (blocks, left, num_tasks))))

    def pack(self, values: Tensor, rows: Rows, scales: Tensor | None, tokens: Tensor, at: Tensor, to: Tensor) -> None:
        """Put factors [rows, width], all samples' one behind another, where products of tiles read them.

        Args:
            values: The factors.
            rows: Which of them are each sample's, and of which there are none, in lanes.
            scales: What each sample's are multiplied by [lanes]; None: by nothing.
            tokens: Of each block [blocks].
            at: Where each block's begin in ``to`` [blocks].
            to: All blocks'.
        """
        values = values if values.stride(1) == 1 else values.contiguous()
        self._library.qkov_pack(
            _address(values),
            *map(ctypes.c_int64, (values.stride(0), values.shape[1])),
            *map(_address, (rows.starts, rows.lengths, scales)),
            ctypes.c_int64(len(tokens)),
            *map(_address, (tokens, at, to)),
        )

    def gram(self, values: Tensor) -> Tensor:
        """The products of all pairs of a sample's tokens, [n, T, T], of factors [n, T, width]."""
        values = values if values.stride(2) == 1 else values.contiguous()
        samples, tokens, width = values.shape
        found = values.new_empty(samples, tokens, tokens)
        sizes = (*values.stride()[:2], samples, tokens, width)
        self._library.qkov_gram(_address(values), *map(ctypes.c_int64, sizes), _address(found))
        return found

    def add(self, tile: Tile) -> None:
        """Do what is to be done with a tile; other Python goes on meanwhile."""
        self._library.qkov_tile(ctypes.byref(tile))


def _address(values: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if values is None else values.data_ptr())


def pointers(**values: Tensor | None) -> dict[str, Any]:
    """Where contiguous tensors lie, as fields of a tile; the tensors have to be held while it is worked on."""
    return {name: None if of is None else of.data_ptr() for name, of in values.items()}


@cache
def native_kernel(dtype: torch.dtype) -> NativeKernel:
    """The kernel, compiled if it is not there.

    Args:
        dtype: Of scores.

    Raises:
        QkovError: where there is no C compiler that can make it.
    """
    command = [*_compiler(), *FLAGS, *OF_DTYPE[dtype]]
    name = f"tile_kernel-{hashlib.sha256('|'.join(_identity(command)).encode()).hexdigest()[:24]}.so"
    cached = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    try:
        return NativeKernel(_loaded(command, Path(cached) / "qkov_dist" / name), dtype)
    except OSError:  # a folder that cannot be written, or is full
        pass
    try:
        with tempfile.TemporaryDirectory(prefix="qkov_dist-") as folder:  # what is loaded needs no file any more
            return NativeKernel(_loaded(command, Path(folder) / name), dtype)
    except OSError as error:
        raise _cannot_be_had(str(error)) from error


def _loaded(command: Sequence[str], library: Path) -> ctypes.CDLL:
    if not _is_ours(library):
        _compile(command, library)
    return ctypes.CDLL(str(library))


def has_native_kernel(dtype: torch.dtype) -> bool:
    """Whether it is there, or can be compiled."""
    try:
        native_kernel(dtype)
    except QkovError:
        return False
    return True


def _compiler() -> Sequence[str]:
    """The command that starts it."""
    given = shlex.split(os.environ.get("CC", ""))
    for command in [given] if given else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise _cannot_be_had(f"none of {', '.join(given[:1] or COMPILERS)}")


def _cannot_be_had(reason: str) -> QkovError:
    return QkovError(
        "compute.compile",
        expected="a C compiler (CC, cc, gcc or clang)",
        got=reason,
        remedy="Install one, or set compute.compile=false: scores are then formed by torch's own products.",
    )


def _identity(command: Sequence[str]) -> Iterator[str]:
    """What a compiled kernel depends on."""
    yield SOURCE.read_text(encoding="utf-8")
    yield shlex.join(command)
    yield str(Path(command[0]).resolve().stat().st_mtime_ns)
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.exists() else []
    for line in lines:
        name = line.partition(":")[0].strip()
        if name in ("flags", "Features", "model name", "CPU part"):
            yield line
        if not line.strip():  # the next processor's
            return


def _is_ours(library: Path) -> bool:
    """Whether there is one that nobody else can have put there."""
    try:
        about = library.stat()
    except OSError:
        return False
    return about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(command: Sequence[str], library: Path) -> None:
    """Make the library; processes that do so at the same time do not see each other's half.

    Raises:
        OSError: where it cannot be written.
        QkovError: where it cannot be compiled.
    """
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made), str(SOURCE)], capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise _cannot_be_had(f"{command[0]} did not end within {TIMEOUT} s") from error
        if done.returncode or not made.exists():
            said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise _cannot_be_had(f"{command[0]}: {said[0] if said else f'exit code {done.returncode}'}")
        made.chmod(0o700)
        made.replace(library)

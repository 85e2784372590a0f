"""partial_rank00000.h5: what one rank has scored, layer by layer, through kills and restarts.

A process may be killed at any moment, and HDF5 cannot be: a file whose structure is half written is lost. So no file is
ever changed. While a run goes on, every finished layer is a file of its own in ``partial_rank00000.layers/``, which
appears only when it is on disk; that it is there is what completes the layer. Closing copies these into the one partial
file, which likewise appears whole, and only then removes them. Reading takes both places as one, so a killed run is
read, resumed or merged from whatever it finished. One process writes at a time: it holds a lock on the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from qkov_dist.errors import QkovError

from .disk import file_errors
from .hdf5_read import reading
from .hdf5_write import sync_folder, writing
from .partial_schema import (
    BlockPartial,
    Floats,
    LayerPartial,
    PartialHeader,
    check_same,
    checked_layer,
    complete_layers,
    copy_layer,
    layer_name,
    read_header,
    read_layer,
    write_header,
    write_layer,
)

HELD_BYTES = 32 << 20  # of finished layers that stay in memory as well, until they are added up


@dataclass(frozen=True)
class Partial:
    """A rank's finished layers, wherever they are: in the partial file or, of a run under way or killed, beside it."""

    path: Path
    header: PartialHeader
    files: Mapping[int, Path]

    @property
    def complete(self) -> tuple[int, ...]:
        """Layers on disk, sorted."""
        return tuple(sorted(self.files))

    @property
    def missing(self) -> tuple[int, ...]:
        """Layers still to be scored, in the header's order."""
        return tuple(layer for layer in self.header.layers if layer not in self.files)

    def read_layer(self, layer: int) -> LayerPartial:
        """Read one layer, checked against its checksums.

        Raises:
            QkovError: for a layer that is not complete, or a damaged file.
        """
        if layer not in self.files:
            got, remedy = f"layers {self.complete}", "Run again with output.resume: true to finish it."
            raise QkovError(str(self.path), expected=f"layer {layer} to be complete", got=got, remedy=remedy)
        with reading(self.files[layer]) as reader:
            return read_layer(reader, layer, self.header)


def partial_path(folder: Path, rank: int) -> Path:
    """Where a rank's partial file is."""
    return folder / f"partial_rank{rank:05d}.h5"


def list_partials(folder: Path) -> tuple[Path, ...]:
    """Partial files of a folder by rank; one that does not exist yet is among them where a layer beside it does."""
    with file_errors(folder, OSError):
        stems = {path.stem for path in folder.iterdir() if re.fullmatch(r"partial_rank\d{5,}\.(h5|layers)", path.name)}
        paths = [folder / f"{stem}.h5" for stem in sorted(stems)]
        return tuple(path for path in paths if path.exists() or _layer_files(path))


def read_partial(path: str | Path) -> Partial:
    """Find the finished layers of one rank. Scores are not read yet.

    Raises:
        QkovError: where there is nothing, or files are damaged or of different runs.
    """
    path = Path(path)
    sources = [file for file in (path, *_layer_files(path)) if file.exists()]
    if not sources:
        remedy = "Check the path; `qkov run` writes partial files with output.partials: true."
        raise QkovError(str(path), expected="a partial file", got="none", remedy=remedy)
    headers: dict[Path, PartialHeader] = {}
    files: dict[int, Path] = {}
    for source in sources:
        with reading(source) as reader:
            headers[source] = read_header(reader)
            files = dict.fromkeys(complete_layers(reader), source) | files
    for source, header in headers.items():
        check_same(source, headers[sources[0]], header)
    return Partial(path, headers[sources[-1]], files)


class PartialWriter:
    """Writes one rank's partial file; a context manager.

    Leaving the block brings the finished layers together in the one file. When the block is left by an error, or the
    process is killed, they stay where they are and the next writer finds them.

    Args:
        path: The partial file; its folder is made where there is none.
        header: Whose scores these are. Its ``extra`` may be replaced (``writer.header = ...``) before layers are
            written; where it is empty, that of the earlier writer is kept.
        resume: Whether to keep the layers that an earlier writer of the same run finished; otherwise they are removed.

    Raises:
        QkovError: on entry, where there are files of another run, rank or world size (nothing is overwritten), damaged
            files, another writer, or a folder that cannot be written.
    """

    def __init__(self, path: str | Path, header: PartialHeader, *, resume: bool = True) -> None:
        self.path, self.header, self._resume = Path(path), header, resume
        self._folder = layer_folder(self.path)
        self._files: dict[int, Path] = {}  # of finished layers
        self._held: dict[int, LayerPartial] = {}
        self._held_bytes = 0
        self._lock = -1

    @property
    def completed(self) -> frozenset[int]:
        """Layers on disk."""
        return frozenset(self._files)

    def __enter__(self) -> PartialWriter:
        with file_errors(self._folder, OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._folder)
        with contextlib.ExitStack() as undo:
            undo.callback(self._leave_no_empty_folder)
            undo.callback(self._unlock)
            self._take_over()
            remove_unfinished(self._folder)
            undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._bring_together()
        finally:
            self._unlock()

    @property
    def folder(self) -> Path:
        """This rank's own folder while a run goes on; it is removed when the writer is closed."""
        return self._folder

    def write_layer(
        self,
        layer: int,
        blocks: Mapping[str, BlockPartial],
        shared: Mapping[str, Floats] | None = None,
    ) -> None:
        """Write one layer; when this returns it is on disk and complete.

        Args:
            layer: The model's number of it, one of the header's and not complete yet.
            blocks: Block -> its heads' numbers; blocks without heads are left out.
            shared: Name -> scores [left, right] of what no head owns.

        Raises:
            QkovError: for wrong shapes or names, a full disk, or a folder that cannot be written.
        """
        if layer not in self.header.layers or layer in self._files:
            expected = f"one of the layers {tuple(n for n in self.header.layers if n not in self._files)}"
            remedy = "Report this: a layer is scored once, and is one of the plan's."
            raise QkovError(f"{self.path}: layer {layer}", expected=expected, got="another layer", remedy=remedy)
        content = checked_layer(layer, self.header, blocks, shared or {})
        file = self._folder / f"{layer_name(layer)}.h5"
        with writing(file, self.header.run_id) as writer:
            write_header(writer, self.header, {layer})
            write_layer(writer, layer, content)
        self._files[layer] = file
        if self._held_bytes + content.nbytes <= HELD_BYTES:
            self._held[layer] = content
            self._held_bytes += content.nbytes

    def layer(self, layer: int) -> LayerPartial:
        """A finished layer, once: from memory where this writer wrote it and had room, else from disk.

        Raises:
            QkovError: for a layer that is not complete, or a damaged file.
        """
        held = self._held.pop(layer, None)
        return self._on_disk.read_layer(layer) if held is None else held

    @cached_property
    def _on_disk(self) -> Partial:
        return read_partial(self.path)

    def _take_over(self) -> None:
        """Find what an earlier writer left, prove that it can be read, and keep or remove it."""
        with file_errors(self.path, OSError):
            found = read_partial(self.path) if self.path.exists() or _layer_files(self.path) else None
            if not found:
                return
            check_same(self.path, self.header, found.header)
            if not self._resume:
                self.path.unlink(missing_ok=True)
                for file in _layer_files(self.path):
                    file.unlink()
                return
        if not self.header.extra:
            self.header = replace(self.header, extra=found.header.extra)
        for layer in found.complete:
            found.read_layer(layer)
        self._files = dict(found.files)

    def _bring_together(self) -> None:
        """All finished layers -> the partial file; then the layers' own files go."""
        pending = _layer_files(self.path)
        with file_errors(self.path, OSError):
            if pending or not self.path.exists():
                with writing(self.path, self.header.run_id) as writer:
                    write_header(writer, self.header, {*self._files})
                    for layer, file in sorted(self._files.items()):
                        with reading(file) as reader:
                            copy_layer(reader, writer, layer)
                        writer.check()
            shutil.rmtree(self._folder)
            sync_folder(self.path.parent)

    def _leave_no_empty_folder(self) -> None:
        with contextlib.suppress(OSError):  # it holds an earlier writer's layers
            self._folder.rmdir()

    def _unlock(self) -> None:
        os.close(self._lock)
        self._lock = -1


def layer_folder(path: Path) -> Path:
    """Where a rank's finished layers are while its run goes on."""
    return path.with_suffix(".layers")


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left in a :func:`layer_folder` besides finished layers."""
    with file_errors(folder, OSError):
        for path in set(folder.iterdir()) - set(_finished_in(folder)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _layer_files(path: Path) -> list[Path]:
    """Finished layers beside a partial file."""
    return _finished_in(layer_folder(path))


def _finished_in(folder: Path) -> list[Path]:
    """Finished layers of a layer folder; unfinished ones have other names."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(file for file in found if re.fullmatch(r"layer_\d{4,}\.h5", file.name))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for this process alone, for as long as the block lasts; it is made where there is none.

    Raises:
        QkovError: where another process has it, or it cannot be made.
    """
    with file_errors(folder, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Take a folder for this process, until the descriptor is closed; file systems without locks give it to all."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor

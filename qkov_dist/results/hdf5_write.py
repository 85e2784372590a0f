"""Writing HDF5 files that appear under their name whole or not at all. The conventions are in ``hdf5_read``.

A file grows under another name in the same folder, is flushed and fsynced, and is then renamed: whatever kills the
process, a reader meets the old file, the new one, or none. HDF5 never meets a failing disk, because its library may
crash the interpreter after a write error: bytes go through a sink that keeps the first error and drops what follows,
and the error is raised here.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5o, h5p, h5r, h5s, h5t

from qkov_dist.errors import QkovError

from .disk import file_errors
from .hdf5_read import SCHEMA, SLAB_BYTES, Reader, reading

_LIBVER = ("v110", "v110")  # the first format with checksums on its own structure
_SCALES = h5py.vlen_dtype(h5py.ref_dtype)
_SCALES_STORED, _SCALES_HELD = h5t.py_create(_SCALES, logical=True), h5t.py_create(_SCALES)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Sink:
    """A file object for h5py that never fails: it keeps the first error in ``error`` and drops the bytes."""

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        self._position = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, os.fstat(self._descriptor).st_size)
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        data = os.pread(self._descriptor, size, self._position)
        self._position += len(data)
        return data

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes) -> int:
        """Write all of it, unless something failed before."""
        view, done = memoryview(data).cast("B"), 0
        try:
            while done < len(view) and not self.error:
                done += os.pwrite(self._descriptor, view[done:], self._position + done)
        except OSError as error:
            self.error = error
        self._position += len(view)
        return len(view)

    def truncate(self, size: int) -> int:
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.error = self.error or error
        return size

    def flush(self) -> None:
        """Nothing waits here: every write went to the system at once."""

    def check(self) -> None:
        """Raise the first error."""
        if self.error:
            raise self.error

    @contextmanager
    def synced(self) -> Iterator[_Sink]:
        """Use the sink; afterwards raise what failed, and have the bytes on disk."""
        try:
            yield self
            self.check()
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


class Writer:
    """Datasets and attributes into a file that is being made. Paths are like ``scores/Q``."""

    def __init__(self, file: Any, sink: _Sink) -> None:
        self._file, self._sink = file, sink
        self._scaled: dict[str, list[tuple[Any, int]]] = {}  # scale -> datasets, and the axis that it is of
        self._groups: dict[str, Any] = {"": file}  # looking one up takes as long as writing a small dataset
        self._scales: dict[str, Any] = {}  # references to scales
        self._kinds: dict[Any, tuple[Any, Any, Any]] = {}  # what datasets of a shape and type are made of

    def array(self, path: str, values: npt.NDArray[Any], dims: Sequence[str] = ()) -> None:
        """Write numbers; ``dims`` names scales already written. One chunk is one matrix of the last two axes."""
        stored = values.astype(np.int8) if values.dtype == np.bool_ else values
        kind = stored.shape, stored.dtype
        if kind not in self._kinds:
            self._kinds[kind] = _kind(*kind)
        folder, _, name = path.rpartition("/")
        made = h5d.create(self._group(folder).id, name.encode(), *self._kinds[kind])
        self._attach(made, dims)
        if stored.dtype is not values.dtype:
            _put_string(h5py.Dataset(made), "dtype", "bool")
        if 0 < stored.nbytes <= SLAB_BYTES:
            made.write(h5s.ALL, h5s.ALL, np.ascontiguousarray(stored))
        elif stored.nbytes:
            self._write_in_slabs(h5py.Dataset(made), stored)
        self._sink.check()

    def _write_in_slabs(self, dataset: Any, stored: npt.NDArray[Any]) -> None:
        rows = max(SLAB_BYTES * len(stored) // stored.nbytes, 1)
        for start in range(0, len(stored), rows):
            dataset[start : start + rows] = stored[start : start + rows]
            self._sink.check()

    def scale(self, name: str, values: npt.NDArray[Any]) -> None:
        """Write a dimension scale, at the root or in a group."""
        self.array(name, values)
        self._file[name].make_scale(name.rpartition("/")[2])
        self._scales[name] = np.array([self._file[name].ref], h5py.ref_dtype)

    def strings(self, path: str, texts: Sequence[str], dims: Sequence[str] = ()) -> None:
        """Write UTF-8 strings of one fixed length; what UTF-8 cannot hold is escaped with backslashes."""
        encoded = [text.encode("utf-8", "backslashreplace") for text in texts]
        dtype = h5py.string_dtype("utf-8", max(map(len, encoded), default=0) or 1)
        rows = max(SLAB_BYTES // dtype.itemsize, 1)
        chunks, growing = (min(rows, len(texts) or 1),), (len(texts) or None,)
        folder, _, name = path.rpartition("/")
        dataset = self._group(folder).create_dataset(
            name, (len(texts),), dtype, chunks=chunks, maxshape=growing, fletcher32=True, compression="gzip"
        )
        self._attach(dataset.id, dims)
        _put_string(dataset, "_Encoding", "utf-8")
        for start in range(0, len(texts), rows):
            dataset[start : start + rows] = np.array(encoded[start : start + rows], dtype=dtype)
            self._sink.check()

    def attributes(self, values: Mapping[str, Any], path: str = "/") -> None:
        """Write attributes of an existing object."""
        attrs, as_json = self._file[path].attrs, []
        for name, value in values.items():
            if isinstance(value, str):
                _put_string(self._file[path], name, value)
            elif _is_number(value):
                attrs[name] = value
            else:
                as_json.append(name)
                _put_string(self._file[path], name, _to_json(name, value))
        if as_json:
            _put_string(self._file[path], "json_attributes", json.dumps(as_json))
        self._sink.check()

    def link(self, path: str, target: str) -> None:
        """Have what is at ``target`` at ``path`` too, by a hard link."""
        folder, _, name = path.rpartition("/")
        of_target, _, target_name = target.rpartition("/")
        self._group(folder).id.links.create_hard(name.encode(), self._group(of_target).id, target_name.encode())

    def copy(self, source: Reader, path: str) -> None:
        """Copy a dataset that was proved before, with attributes and checksums, bit for bit.

        ``check`` says whether there was room.
        """
        folder, _, name = path.rpartition("/")
        h5o.copy(source.group(folder).id, name.encode(), self._group(folder).id, name.encode())

    def check(self) -> None:
        """Raise the first error that the file system reported."""
        self._sink.check()

    def _attach(self, dataset: Any, dims: Sequence[str]) -> None:
        """Name the scales of a new dataset's axes."""
        reference = h5r.create(dataset, b".", h5r.OBJECT)
        for axis, dim in enumerate(dims):
            self._scaled.setdefault(dim, []).append((reference, axis))
        if dims:
            scales = np.empty(len(dims), object)
            scales[:] = [self._scales[dim] for dim in dims]
            attribute = h5a.create(dataset, b"DIMENSION_LIST", _SCALES_STORED, h5s.create_simple(scales.shape))
            attribute.write(scales, mtype=_SCALES_HELD)

    def _group(self, path: str) -> Any:
        """A group, made where it is not there."""
        if path not in self._groups:
            above, _, name = path.rpartition("/")
            self._groups[path] = self._group(above).require_group(name)
        return self._groups[path]

    def attach_scales(self) -> None:
        """Tell each scale whose axes it is of: once, as HDF5's own function writes the list anew for every dataset and
        leaves the old one in the file.
        """
        entry = np.dtype([("dataset", h5py.ref_dtype), ("dimension", np.int32)])
        for dim, attached in self._scaled.items():
            self._file[dim].attrs.create("REFERENCE_LIST", np.array(attached, entry))
        self._scaled.clear()


@contextmanager
def writing(path: Path, run_id: str) -> Iterator[Writer]:
    """Make a file that appears at ``path`` when the block ends well, and not at all when it does not.

    Raises:
        QkovError: where ``path`` holds a file of another run, and for a full disk or a folder that cannot be written.
    """
    with file_errors(path, OSError):
        refuse_other_run(path, run_id)
        remove_leftovers(path)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with _Sink(temporary).synced() as sink, h5py.File(sink, "w", libver=_LIBVER) as file:
                writer = Writer(file, sink)
                yield writer
                writer.attach_scales()
                _put_string(file, "run_id", run_id)
                _put_string(file, "schema", SCHEMA)
            refuse_other_run(path, run_id)
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def refuse_other_run(path: Path, run_id: str) -> None:
    """Raise unless ``path`` is free, or holds a file of this run (an empty run_id is nobody's)."""
    if not path.exists():
        return
    with reading(path) as reader:
        found = reader.attribute("/", "run_id")
    if found != run_id or not run_id:
        remedy = "Nothing was overwritten. Choose another output.dir, or move the old files away."
        wanted = f"a file of run {run_id!r}" if run_id else "no file there, as these results are of no run"
        got = f"run {found!r}" if found else "results of no run"
        raise QkovError(str(path), expected=wanted, got=got, remedy=remedy)


def refuse_output(path: Path, run_id: str) -> None:
    """Refuse before anything is added up or tested what could not be written after: a path without a folder too.

    Raises:
        QkovError: as `refuse_other_run` does, and where the file's folder does not exist.
    """
    refuse_other_run(path, run_id)
    if not path.parent.is_dir():
        remedy = "Make the folder, or choose another --output."
        raise QkovError(str(path), expected="a file in an existing folder", got="none", remedy=remedy)


def remove_leftovers(path: Path) -> None:
    """Remove unfinished files that a killed writer of ``path`` left."""
    for file in path.parent.iterdir():
        if file.name.startswith(f".{path.name}.") and file.suffix == ".tmp":
            file.unlink(missing_ok=True)


def _kind(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any, Any]:
    """The type, the space and the properties of datasets, made once for all of a kind: h5py's own way of making them
    takes several times as long as the small dataset itself.
    """
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk(_matrix_chunks(shape, dtype.itemsize))
    properties.set_fletcher32()
    properties.set_obj_track_times(False)
    growing = tuple(size or h5s.UNLIMITED for size in shape)  # an empty axis cannot be chunked unless it may grow
    return h5t.py_create(dtype, logical=True), h5s.create_simple(shape, growing), properties


def _matrix_chunks(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The last two axes whole, but no chunk above ``SLAB_BYTES``."""
    cols = min(shape[-1] or 1, SLAB_BYTES // itemsize)
    if len(shape) == 1:
        return (cols,)
    rows = min(shape[-2] or 1, max(SLAB_BYTES // (cols * itemsize), 1))
    return (*(1 for _ in shape[:-2]), rows, cols)


def _is_number(value: Any) -> bool:
    """Whether HDF5 has a type for a number or an array of numbers."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iuf"
    return isinstance(value, float) or (type(value) is int and -(2**63) <= value < 2**63)


def _put_string(target: Any, name: str, text: str) -> None:
    encoded = text.encode("utf-8", "backslashreplace")
    target.attrs.create(name, np.array(encoded, dtype=h5py.string_dtype("utf-8", len(encoded) or 1)))


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, default=lambda v: v.tolist() if isinstance(v, np.generic | np.ndarray) else str(v))
    except (TypeError, ValueError) as error:
        remedy = "Use strings, numbers, lists and dicts with string keys."
        raise QkovError(f"attribute {name}", expected="JSON values", got=str(error), remedy=remedy) from error

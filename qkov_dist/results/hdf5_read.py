"""Reading HDF5 without believing it: the one place where result files are opened.

Only hard links are followed; only numbers and strings behind known filters are read; memory is allocated only for what
the bytes on disk can fill. Every dataset carries a fletcher32 checksum, and the format (HDF5 1.10 and later) carries
checksums on its own structure; a file in an older format, whose damage HDF5 itself may not survive, is not opened.
Whatever goes wrong is a QkovError that names the file.

Booleans are int8 with the attribute ``dtype="bool"`` (xarray's convention). Strings have a fixed length, because HDF5
cannot checksum any other. Attributes that are no number, array or string are JSON and named in ``json_attributes``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from qkov_dist.errors import QkovError
from qkov_dist.values import Kind, readable, written

from .disk import DAMAGED, file_errors

SCHEMA = "qkov-dist/1"
SLAB_BYTES = 4 << 20  # of a chunk, and of strings read at once


_SIGNATURE, _FIRST_CHECKED = b"\x89HDF\r\n\x1a\n", b"\2"  # a file begins with it and the version of its format
_KNOWN_FILTERS = {h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}
_DEFLATE_RATIO = 1100  # zlib cannot do better than 1032:1
_DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError)


class Reader:
    """Checked access to an open file. Every refusal is a QkovError without the file's name, which the caller adds."""

    def __init__(self, file: Any, num_bytes: int) -> None:
        self._file, self._num_bytes = file, num_bytes
        self._found: dict[str, Any] = {}  # the file does not change while it is open

    def names(self, path: str = "/") -> tuple[str, ...]:
        """Members of a group, sorted; none where there is no such group."""
        found = self._find(path)
        return tuple(sorted(found)) if isinstance(found, h5py.Group) else ()

    def has(self, path: str) -> bool:
        """Whether there is an object at a path."""
        return self._find(path) is not None

    def is_group(self, path: str) -> bool:
        """Whether there is a group at a path."""
        return isinstance(self._find(path), h5py.Group)

    def group(self, path: str) -> Reader:
        """The same for what is in a group.

        Raises:
            QkovError: where there is no such group.
        """
        if not self.is_group(path):
            raise _refusal(path, "a group", "none")
        return Reader(self._find(path), self._num_bytes)

    @property
    def id(self) -> Any:
        """HDF5's identifier of the root, or of the group."""
        return self._file.id

    def array(self, path: str, shape: tuple[int, ...] | None = None, kinds: str = "f") -> npt.NDArray[Any]:
        """Read numbers of a shape (None: any) and of numpy's ``kinds`` (``f``, ``iu``, ``b``)."""
        dataset = self.dataset(path)
        is_bool = dataset.dtype == np.int8 and "dtype" in dataset.attrs and self.attribute(path, "dtype") == "bool"
        kind = "b" if is_bool else dataset.dtype.kind
        if kind not in kinds or dataset.dtype.itemsize > 8:
            raise _refusal(path, f"numbers of kind {kinds}", f"{dataset.dtype}")
        if shape not in (None, dataset.shape):
            raise _refusal(path, f"shape {shape}", f"{dataset.shape}")
        values = _data(dataset, path, slice(None))
        return values.astype(np.bool_ if is_bool else values.dtype.newbyteorder("="), copy=False)

    def strings(self, path: str, count: int) -> tuple[str, ...]:
        """Read ``count`` strings of fixed length, a few at a time."""
        dataset = self.dataset(path)
        if dataset.dtype.kind != "S" or dataset.shape != (count,):
            raise _refusal(path, f"{count} fixed-length strings", f"{dataset.dtype} of shape {dataset.shape}")
        rows = max(SLAB_BYTES // dataset.dtype.itemsize, 1)
        parts = (_data(dataset, path, slice(start, start + rows)) for start in range(0, count, rows))
        return tuple(bytes(text).decode("utf-8") for part in parts for text in part)

    def attributes(self) -> dict[str, Any]:
        """The root's attributes, or the group's, JSON decoded; other tools' own (``_NCProperties``) are left out."""
        values = {name: self.attribute("/", name) for name in self._file.attrs if not name.startswith("_")}
        as_json = json.loads(values.pop("json_attributes", "[]"))
        if not isinstance(as_json, list):
            raise _refusal("json_attributes", "a list of names", type(as_json).__name__)
        return {name: json.loads(value) if name in as_json else value for name, value in values.items()}

    def attribute(self, path: str, name: str) -> Any:
        """One string, number or array of numbers."""
        attrs = self._existing(path).attrs
        if name not in attrs:
            raise _refusal(f"{path} attribute {name}", "a value", "nothing")
        found = attrs.get_id(name)
        is_string = h5py.check_string_dtype(found.dtype) is not None and found.shape == ()
        if found.get_storage_size() > self._num_bytes or not (is_string or found.dtype.kind in "iuf"):
            raise _refusal(f"{path} attribute {name}", "a string or numbers", f"{found.dtype} {found.shape}")
        value = attrs[name]
        if is_string:
            return value.decode("utf-8") if isinstance(value, bytes) else str(value)
        return value.item() if found.shape == () else np.asarray(value)

    def dataset(self, path: str) -> Any:
        """The dataset at a path, proved to hold what it declares within the bytes on disk.

        Raises:
            QkovError: for data that lie elsewhere (virtual, external), unknown filters, or sizes that cannot be.
        """
        dataset = self._existing(path)
        if not isinstance(dataset, h5py.Dataset):
            raise _refusal(path, "a dataset", type(dataset).__name__)
        if dataset.shape is None:
            raise _refusal(path, "a dataset with a shape", "an empty one")
        if dataset.is_virtual or dataset.external:
            raise _refusal(path, "data inside this file", "a virtual or external dataset")
        plist = dataset.id.get_create_plist()
        filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
        if not filters <= _KNOWN_FILTERS:
            raise _refusal(path, "known filters", f"filters {sorted(filters)}")
        stored = dataset.id.get_storage_size()
        ratio = _DEFLATE_RATIO if h5py.h5z.FILTER_DEFLATE in filters else 1
        chunk_bytes = int(np.prod(dataset.chunks or (0,), dtype=np.float64)) * dataset.dtype.itemsize
        needed = max(dataset.size * dataset.dtype.itemsize, chunk_bytes if dataset.size else 0)
        if stored > self._num_bytes or needed > stored * ratio:
            raise _refusal(path, f"at most {stored} stored bytes", f"{needed} declared, {self._num_bytes} in the file")
        if any(size != limit for size, limit in zip(dataset.shape, dataset.maxshape, strict=True) if size):
            raise _refusal(path, "a shape that cannot grow", f"{dataset.shape} up to {dataset.maxshape}")
        return dataset

    def _existing(self, path: str) -> Any:
        found = self._find(path)
        if found is None:
            raise _refusal(path, "to be in the file", "nothing")
        return found

    def _find(self, path: str) -> Any:
        """The object at a path, or None; hard links only, so that no name leads out of the file."""
        found, place = self._file, ""
        for name in filter(None, path.split("/")):
            place = f"{place}/{name}"
            if place in self._found:
                found = self._found[place]
                continue
            if not isinstance(found, h5py.Group) or name not in found.keys():  # noqa: SIM118 (`in` would follow links)
                return None
            if not isinstance(found.get(name, getlink=True), h5py.HardLink):
                raise _refusal(path, "data inside this file", "a soft or external link")
            found = self._found[place] = found[name]
        return found


@contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Open a file of this schema for reading.

    Raises:
        QkovError: naming the file, for anything in it that is not as it should be, also inside the block.
    """
    with file_errors(path, *_DAMAGED):
        _check_format(path)
        try:
            with h5py.File(path, "r") as file:
                reader = Reader(file, path.stat().st_size)
                if (schema := reader.attribute("/", "schema")) != SCHEMA:
                    raise _refusal("schema", SCHEMA, written(schema))
                if not isinstance(run_id := reader.attribute("/", "run_id"), str):
                    raise _refusal("run_id", "text", written(run_id))
                yield reader
        except QkovError as error:
            # a file may name its data, and make up its types, as it likes
            parts = {name: readable(part) for name, part in error.parts.items()}
            raise QkovError(**parts).within(str(path)) from error


def check_values(place: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Prove that values from a file are of their kinds, where they are there.

    Raises:
        QkovError: at the first that is not.
    """
    for name, kind in ((name, kind) for name, kind in kinds.items() if name in values):
        try:
            kind.read(values[name])
        except (ValueError, OverflowError):
            raise _refusal(f"{place} {name}", kind.expected, written(values[name])) from None


def _check_format(path: Path) -> None:
    """Refuse what is no HDF5 from its first byte on, and formats without checksums on their structure."""
    with path.open("rb") as file:
        signature, version = file.read(len(_SIGNATURE)), file.read(1)
    if signature != _SIGNATURE or version < _FIRST_CHECKED:
        old = "an older format of HDF5, without checksums on its structure"
        got = old if signature == _SIGNATURE else "no signature of HDF5"
        raise QkovError(str(path), expected=f"an intact file of schema {SCHEMA}", got=got, remedy=DAMAGED)


def _data(dataset: Any, path: str, rows: slice) -> npt.NDArray[Any]:
    """Rows of a dataset; HDF5 checks the checksums."""
    try:
        values: npt.NDArray[Any] = dataset[rows]
    except (OSError, RuntimeError) as error:
        raise _refusal(path, "data that match their checksum", str(error)) from error
    return values


def _refusal(where: str, expected: str, got: str) -> QkovError:
    return QkovError(where, expected=expected, got=got, remedy=DAMAGED)

"""Edits of a valid result file that change where and how data lie: elsewhere, nowhere, behind filters that grow or lie.

Nothing here names a file outside the folder of the edited one but ``/dev/zero``: a later edit may write there.
"""

from __future__ import annotations

from random import Random
from typing import Any

import h5py
import numpy as np
from hdf5_edits import Edit, near_shape, one, paths, plain_values

_HUGE = (1 << 62, 1 << 40, 1 << 32, (1 << 31) - 1, 1 << 24)
_PACKED = (b"x\x9c\x03\x00\x00\x00\x00\x01", b"", b"x\x9c", bytes(100))  # deflate of nothing, and what is no deflate


def huge(file: h5py.File, random: Random, _: Any) -> None:
    """A shape that no memory holds and no byte backs, filled with a fill value or chunked."""
    path, size = one(file, random), random.choice(_HUGE)
    chunks = (min(size, random.choice((1, 1 << 10, 1 << 20, 1 << 28))),)
    filters = random.choice(
        ({}, {"fletcher32": True}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True})
    )
    options: dict[str, Any] = random.choice(({"chunks": chunks} | filters, {"chunks": chunks} | filters, {}))
    dtype, fill = random.choice((("i1", 7), ("i8", 7), ("f8", 0.5), ("i8", None), ("f8", None), ("S8", None)))
    del file[path]
    file.create_dataset(path, (size,), dtype, fillvalue=fill, **options)


def blow_up(file: h5py.File, random: Random, _: Any) -> None:
    """Chunks that grow when they are read: deflate of zeros, and deflate of less than a chunk."""
    path, size = one(file, random, h5py.Dataset), random.choice((1 << 20, 1 << 26, 1 << 28))
    shape, dtype = file[path].shape, file[path].dtype
    if not shape:
        return
    del file[path]
    chunks, limits = (*(1 for _ in shape[1:]), size), (None,) * len(shape)
    dataset = file.create_dataset(path, shape, dtype, chunks=chunks, maxshape=limits, compression="gzip")
    if random.random() < 0.5:
        dataset.id.write_direct_chunk((0,) * len(shape), random.choice(_PACKED))


def odd_filter(file: h5py.File, random: Random, _: Any) -> None:
    """Filters that we do not use, or several of the same, and masks that say that they were skipped."""
    path = one(file, random, h5py.Dataset)
    shape, array = file[path].shape, plain_values(file[path])
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(tuple(max(n, 1) for n in shape))
    for _ in range(random.randint(1, 3)):
        _add_filter(plist, random)
    made = _created(file, shape, array.dtype, plist)
    if random.random() < 0.5:
        made[...] = array
    elif shape:
        made.id.write_direct_chunk((0,) * len(shape), random.randbytes(64), random.choice((0, 1, 3, 0xFFFF)))
    del file[path]
    file.move("made", path)


def _add_filter(plist: Any, random: Random) -> None:
    match random.choice(("absent", "unknown", "deflate", "shuffle", "fletcher32", "scaleoffset", "nbit")):
        case "absent":
            plist.set_filter(32000, h5py.h5z.FLAG_OPTIONAL)
        case "unknown":
            plist.set_filter(random.randrange(300, 60_000), h5py.h5z.FLAG_OPTIONAL, (1, 2, 3))
        case "deflate":
            plist.set_deflate(9)
        case "shuffle":
            plist.set_shuffle()
        case "fletcher32":
            plist.set_fletcher32()
        case "scaleoffset":
            plist.set_scaleoffset(h5py.h5z.SO_INT, 2)
        case _:
            plist.set_filter(h5py.h5z.FILTER_NBIT, h5py.h5z.FLAG_OPTIONAL)


def elsewhere(file: h5py.File, random: Random, _: Any) -> None:
    """Raw data in another file, or a view of datasets, also of one that is not there."""
    path = one(file, random, h5py.Dataset)
    shape, dtype = file[path].shape, file[path].dtype
    del file[path]
    if random.random() < 0.5:
        where = random.choice(("file.h5", "file.h5.raw", "/dev/zero"))  # no name of a temporary folder
        file.create_dataset(path, shape, dtype, external=[(where, random.choice((0, 1 << 40)), h5py.h5f.UNLIMITED)])
        return
    plist, space = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5s.create_simple(shape)
    source = random.choice((".", "absent.h5", "/dev/zero")).encode()
    plist.set_virtual(space, source, path.encode(), h5py.h5s.create_simple(shape))
    _created(file, shape, dtype, plist)
    file.move("made", path)


def unchecked(file: h5py.File, random: Random, _: Any) -> None:
    """Data in the object's header, or none at all."""
    path = one(file, random, h5py.Dataset)
    shape, array = file[path].shape, plain_values(file[path])
    if random.random() < 0.5:
        del file[path]
        file[path] = h5py.Empty(array.dtype)
        return
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    _created(file, shape, array.dtype, plist)[...] = array
    del file[path]
    file.move("made", path)


def _created(file: h5py.File, shape: tuple[int, ...], dtype: Any, plist: Any) -> h5py.Dataset:
    space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype, logical=True)
    plist.set_obj_track_times(False)  # as h5py does: no clock in what a seed draws
    return h5py.Dataset(h5py.h5d.create(file.id, b"made", kind, space, plist))


def link(file: h5py.File, random: Random, _: Any) -> None:
    """A name that leads elsewhere: around in a circle, up, out of the file, to nothing, to a type."""
    path, other = one(file, random), random.choice(("/", *paths(file)))
    target = file[other]
    if path.startswith(other) and other != "/":
        return
    del file[path]
    file[path] = random.choice(
        (
            h5py.SoftLink(f"/{path}"),
            h5py.SoftLink(f"/{other}"),
            h5py.SoftLink(random.choice(("", ".", "..", "/", "/absent", "x" * 60_000))),
            h5py.ExternalLink("absent.h5", "/"),
            h5py.ExternalLink(file.filename, f"/{other}"),
            h5py.ExternalLink(random.choice(("/dev/zero", "")), "/x"),
            target,
            target,
            np.dtype("f8"),
        )
    )


def reference(file: h5py.File, random: Random, _: Any) -> None:
    """A dataset of references to objects and regions."""
    path, other = one(file, random), one(file, random, h5py.Dataset)
    is_region = random.random() < 0.5
    found = file[other].regionref[...] if is_region else file[other].ref
    shape = near_shape(file, other, random)
    made = file.create_dataset("made", shape, h5py.regionref_dtype if is_region else h5py.ref_dtype)
    if made.shape and made.size:
        made[(0,) * len(shape)] = found
    del file[path]
    file.move("made", path)


STORAGE: tuple[Edit, ...] = (huge, blow_up, odd_filter, elsewhere, unchecked, link, reference)

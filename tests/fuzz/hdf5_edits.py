"""Edits of a valid result file that make its content lie: parts missing, other types and shapes, odd values, bad JSON.

An edit is made with h5py, so that checksums are right. Which object it meets and what it puts there comes from a seed.
Edits of where and how data lie are ``hdf5_storage``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import h5py
import numpy as np
from fuzz_text import WORDS, changed

Edit = Callable[[h5py.File, Random, Any], None]

ODD_DTYPES: tuple[Any, ...] = (
    *("f2", ">f4", "f8", "g", "i1", "i2", ">i8", "u8", "?", "c8", "S1", "S40", "V5"),
    np.dtype([("a", "i4"), ("b", "S3")]),
    np.dtype(("f4", (3,))),
    np.dtype(("f8", (1 << 20,))),
    h5py.string_dtype(),
    h5py.string_dtype("ascii", 5),
    h5py.vlen_dtype("f4"),
    h5py.vlen_dtype(np.dtype("i8")),
    h5py.enum_dtype({"a": 0, "b": 1}, "i1"),
    h5py.ref_dtype,
    h5py.regionref_dtype,
    h5py.opaque_dtype("M8[s]"),
)
_MOST = 8 << 20  # bytes of values that an edit reads
_NUMBERS = (0, 1, -1, -(2**63), 2**63 - 1, 2**31, np.nan, np.inf, -np.inf, 1e300, -1e-300)
_NAMES = ("Q", "X", "..", "é", "a" * 3000, "layer_9999", "x\ny", "\x1b[2J", b"\xff\xfe")


def paths(file: h5py.File, kind: type = object) -> list[str]:
    """All objects of a kind."""
    found: list[str] = []
    file.visititems(lambda name, item: found.append(name) if isinstance(item, kind) else None)
    return found


def one(file: h5py.File, random: Random, kind: type = object) -> str:
    """One of them."""
    return random.choice(paths(file, kind))


def near_shape(file: h5py.File, path: str, random: Random) -> tuple[int, ...]:
    """The shape of a dataset, or nearly."""
    shape = tuple(getattr(file[path], "shape", None) or (2,))
    others = (shape[::-1], (*shape, 1), shape[1:], (), (0,), tuple(n + 1 for n in shape), (0, *shape[1:]), (1,) * 32)
    return random.choice((shape, shape, shape, *others))


def plain_values(dataset: h5py.Dataset) -> np.ndarray:
    """What a dataset holds, unless an earlier edit made it odd: HDF5 itself crashes on some that no reader reads."""
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(place)[0] for place in range(plist.get_nfilters())}
    num_bytes = max(dataset.size or 0, int(np.prod(dataset.chunks or (0,)))) * dataset.dtype.itemsize
    if dataset.dtype.kind not in "iufS" or dataset.external or dataset.is_virtual:
        raise ValueError("values that are elsewhere, or no numbers and text")
    if (
        not filters <= {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
        or num_bytes > _MOST
    ):
        raise ValueError("values behind an odd filter, or too many")
    return np.asarray(dataset[...])


def remove(file: h5py.File, random: Random, _: Any) -> None:
    """A dataset or group is not there."""
    del file[one(file, random)]


def swap(file: h5py.File, random: Random, _: Any) -> None:
    """Two objects have each other's names."""
    first, second = one(file, random), one(file, random)
    file.move(first, "swapped")
    file.move(second, first)
    file.move("swapped", second)


def other_type(file: h5py.File, random: Random, _: Any) -> None:
    """A dataset of another type, unfilled."""
    path = one(file, random)
    shape = near_shape(file, path, random)
    del file[path]
    file.create_dataset(path, shape, random.choice(ODD_DTYPES))


def other_shape(file: h5py.File, random: Random, _: Any) -> None:
    """A dataset of the same type and another shape."""
    path = one(file, random, h5py.Dataset)
    dtype, shape = file[path].dtype, near_shape(file, path, random)
    del file[path]
    file.create_dataset(path, shape, dtype, fletcher32=bool(shape))


def values(file: h5py.File, random: Random, _: Any) -> None:
    """Numbers or text that no run writes."""
    dataset = file[one(file, random, h5py.Dataset)]
    array = plain_values(dataset)
    if array.dtype.kind == "S":
        dataset[...] = np.array(random.choice(WORDS).encode("utf-8", "replace")[: dataset.dtype.itemsize])
        return
    with np.errstate(all="ignore"):
        number = np.array(random.choice(_NUMBERS)).astype(array.dtype)
    if array.size and random.random() < 0.5:
        array.flat[random.randrange(array.size)] = number
    else:
        array[...] = number
    dataset[...] = array


def names(file: h5py.File, random: Random, _: Any) -> None:
    """Members that nobody asked for, under names that are no names."""
    group = random.choice(("/", *paths(file, h5py.Group)))
    file[group][random.choice(_NAMES)] = random.choice((1.5, np.zeros((2, 2)), file[group], h5py.Empty("f8")))


def attribute(file: h5py.File, random: Random, _: Any) -> None:
    """An attribute is not there, or is of another type."""
    owner = file[random.choice(("/", "/", *paths(file)))]
    name = random.choice([*owner.attrs, "dtype", "heads", "json_attributes"])
    if random.random() < 0.3:
        del owner.attrs[name]
        return
    dtype = random.choice((*ODD_DTYPES, "S0", None))
    if dtype is None:
        owner.attrs.create(name, h5py.Empty("f8"))
        return
    shape = random.choice(((), (), (2,), (0,), (3, 2), (60_000,)))
    owner.attrs.create(name, np.zeros(shape, np.uint8), shape, dtype)


def attribute_value(file: h5py.File, random: Random, _: Any) -> None:
    """An attribute of a likely type has an unlikely value."""
    owner = file[random.choice(("/", "/", "/", *paths(file)))]
    name = random.choice([*owner.attrs, "heads", "dtype"])
    word = random.choice(WORDS).encode("utf-8", "surrogatepass")
    numbers = np.array(random.choice(([-1], [0, 0], [2**63 - 1], [0, 1, 2, 3], [[0]], 1.5)))
    count = np.int64(random.choice((-1, 0, 1, 2, 2**40, 2**63 - 1)))
    owner.attrs[name] = random.choice((np.bytes_(word or b"\0"), count, numbers, np.float64("nan")))


def json_tree(file: h5py.File, random: Random, tree: Any) -> None:
    """An attribute of JSON in which one value is another."""
    listed = json.loads(file.attrs["json_attributes"])
    longest = max(listed, key=lambda name: len(file.attrs[name]))
    name = random.choice((random.choice((*listed, "json_attributes")), longest, longest))
    _put(file, name, json.dumps(changed(json.loads(file.attrs[name]), random.getrandbits(64), tree)))


def json_word(file: h5py.File, random: Random, text: Any) -> None:
    """An attribute that should be JSON and is hardly."""
    _put(file, random.choice([*json.loads(file.attrs["json_attributes"]), "json_attributes"]), text)


def _put(file: h5py.File, name: str, text: str) -> None:
    encoded = text.encode("utf-8", "surrogatepass")
    file.attrs.create(name, np.array(encoded, dtype=h5py.string_dtype("utf-8", len(encoded) or 1)))


FALSE_VALUES: tuple[Edit, ...] = (values, values, json_tree, json_tree, attribute_value, swap, remove)
CONTENT: tuple[Edit, ...] = (*FALSE_VALUES, other_type, other_shape, names, attribute)

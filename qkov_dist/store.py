"""heatmap.h5: the heatmap on disk.

    /layer /head /kv_head /sample_a /sample_b           dimension scales; /sample /sample_right with pooled scores
    /scores/{B}            [layer, head, a, b]          per sample pair, with ``pairs: cross`` or ``all``
    /scores_all/{B}        [layer, head, N, N]          among all samples, A's first, with ``pairs: all``
    /heatmap/{B}           [layer, head] float64        mean over the pairs
    /present/{B}           [layer, head] bool           whether the layer has this head; NaN elsewhere where not
    /fisher/{B}/{mean,min,ridge_share,share_a}          [layer, head] float64
    /shared/O_bias/{scores,heatmap}                     [layer, a, b], [layer]: O's bias belongs to no head
    /statistics/{cross_mean,overlap}/{B}/...            [layer, head], the rest in attribute ``statistics``
    /samples/{a,b}/{id,num_tokens,loss,text,content}    [a] or [b]; content: a hash, by which copies are known
    /group                 [layer]                      query heads of one kv head

``head`` is ``kv_head`` for K and V. How arrays are named is ``Heatmap.labelled``; how they lie in HDF5, and why a file
can be trusted after it was read, is ``hdf5_write`` and ``hdf5_read``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .disk import DAMAGED
from .errors import QkovError
from .hdf5_read import Reader, reading
from .results import FISHER_KEYS, Heatmap, Pairs, SampleTable
from .slices import BLOCKS
from .store_checks import check_stored
from .views import HEAD_DIM

HEATMAP_FILE = "heatmap.h5"
_DEEPEST = 8
_BY_BLOCK = ("heatmap", "present", "fisher", "scores", "scores_all")


def write_heatmap(path: str | Path, heatmap: Heatmap, pairs: Pairs = "all") -> None:
    """Write ``heatmap.h5`` atomically; see ``Heatmap.save``."""
    heatmap.save(path, pairs)


def heatmap_path(place: str | Path) -> Path:
    """The file of a heatmap, given itself or the folder of its run."""
    path = Path(place)
    return path / HEATMAP_FILE if path.is_dir() else path


def load_heatmap(path: str | Path) -> Heatmap:
    """Read a heatmap whole.

    Args:
        path: The file, or the folder of a run, in which it is ``heatmap.h5``.

    Raises:
        QkovError: naming the file, for anything that is missing, damaged, of another schema, or outside the file.
    """
    with reading(heatmap_path(path)) as reader:
        heatmap = _heatmap(reader)
        check_stored(heatmap)
        return heatmap


def _heatmap(reader: Reader) -> Heatmap:
    attributes = reader.attributes()
    axes = {name: reader.array(name, kinds="iu") for name in ("layer", "head", "kv_head")}
    sizes = {name: len(axis) for name, axis in axes.items()}
    tables = {task: _samples(reader, task) for task in ("a", "b")}
    n_a, n_b = len(tables["a"]), len(tables["b"])
    found = {block for group in _BY_BLOCK for block in reader.names(group)}
    shapes = {block: (sizes["layer"], sizes[HEAD_DIM[block]]) for block in BLOCKS if block in found}

    def scores(group: str, left: int, right: int) -> dict[str, Any] | None:
        if not reader.has(group):
            return None
        return {block: reader.array(f"{group}/{block}", (*shape, left, right)) for block, shape in shapes.items()}

    layers, heads, kv_heads = (tuple(axis.tolist()) for axis in axes.values())
    tested = "statistics" in attributes or reader.has("statistics")
    others = attributes.pop("statistics", {})
    statistics = _merged("statistics", _tree(reader, "statistics"), others) if tested else None
    return Heatmap(
        reader.attribute("/", "task_a"),
        reader.attribute("/", "task_b"),
        layers,
        heads,
        kv_heads,
        reader.array("group", (len(layers),), "iu").astype(np.int64),
        tables["a"],
        tables["b"],
        {block: reader.array(f"heatmap/{block}", shape) for block, shape in shapes.items()},
        {block: reader.array(f"present/{block}", shape, "b") for block, shape in shapes.items()},
        {block: _fisher(reader, block, shape) for block, shape in shapes.items()},
        scores("scores", n_a, n_b),
        scores("scores_all", n_a + n_b, n_a + n_b),
        {name: _shared(reader, name, len(layers), n_a, n_b) for name in reader.names("shared")},
        statistics,
        {name: value for name, value in attributes.items() if name not in ("schema", "task_a", "task_b")},
    )


def _samples(reader: Reader, task: str) -> SampleTable:
    count = len(reader.array(f"sample_{task}", kinds="iu"))
    group = f"samples/{task}"
    return SampleTable(
        reader.strings(f"{group}/id", count),
        reader.array(f"{group}/num_tokens", (count,), "iu"),
        reader.array(f"{group}/loss", (count,)),
        reader.strings(f"{group}/text", count),
        reader.strings(f"{group}/content", count) if reader.has(f"{group}/content") else (),
    )


def _fisher(reader: Reader, block: str, shape: tuple[int, int]) -> dict[str, Any]:
    return {key: reader.array(f"fisher/{block}/{key}", shape) for key in FISHER_KEYS}


def _shared(reader: Reader, name: str, num_layers: int, n_a: int, n_b: int) -> dict[str, Any]:
    arrays = {"mean": reader.array(f"shared/{name}/heatmap", (num_layers,))}
    if reader.has(f"shared/{name}/scores"):
        arrays["cross"] = reader.array(f"shared/{name}/scores", (num_layers, n_a, n_b))
    return arrays


def _tree(reader: Reader, path: str, depth: int = 0) -> dict[str, Any]:
    """A group as nested dicts of arrays; hard links may form circles, so its depth is bounded."""
    if depth > _DEEPEST:
        raise QkovError(path, expected="at most 8 nested groups", got="more", remedy="Write the file again.")
    return {
        name: _tree(reader, below, depth + 1) if reader.is_group(below) else reader.array(below, kinds="fiub")
        for name in reader.names(path)
        for below in (f"{path}/{name}",)
    }


def _merged(path: str, arrays: Any, others: Any) -> dict[str, Any]:
    """Two nested dicts as one: the arrays of the file, and what an attribute says besides."""
    if not isinstance(arrays, dict) or not isinstance(others, dict):
        raise QkovError(path, expected="a mapping", got="something else", remedy=DAMAGED)
    both = arrays.keys() & others.keys()
    return {**arrays, **others, **{name: _merged(f"{path}/{name}", arrays[name], others[name]) for name in both}}

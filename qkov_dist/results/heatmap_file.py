"""heatmap.h5: the heatmap on disk.

    /layer /head /kv_head /sample_a /sample_b           dimension scales; /sample /sample_right with pooled scores
    /scores/{B}            [layer, head, a, b]          per sample pair, with ``pairs: cross`` or ``all``
    /scores_all/{B}        [layer, head, N, N]          among all samples, A's first, with ``pairs: all``
    /heatmap/{B}           [layer, head] float64        mean over the pairs
    /present/{B}           [layer, head] bool           whether the layer has this head; NaN elsewhere where not
    /fisher/{B}/{mean,min,ridge_share,share_a}          [layer, head] float64
    /shared/O_bias/{scores,heatmap}                     [layer, a, b], [layer]: O's bias belongs to no head
    /effects/{B}/{sgd,adam}/{change,standard_error,...} [layer, head] float64: what a step does (``effects``)
    /influences/{B}/{sgd,adam}                          [layer, head, sample]: what each sample has to do with it
    /own_shares/{B}/{rows_a,...,overlap}                [layer, head, sample] float64, with scores_all (``KNOWN``)
    /statistics/{cross_mean,overlap}/{B}/...            [layer, head], the rest in attribute ``statistics``
    /samples/{a,b}/{id,num_tokens,loss,text,content}    [a] or [b]; content: a hash, by which copies are known
    /samples/{a,b}/gradient_norm                        [a] or [b] float64, with ``metric.sample_scale: unit`` alone
    /samples/{a,b}/elsewhere                            [a] or [b] bool: a third task has this sample too
    /group                 [layer]                      query heads of one kv head

``head`` is ``kv_head`` for K and V. Where each head lies among the model's parameters is the attribute ``slices``
(``head_slices``). How arrays are named is ``labelled``; how they lie in HDF5, and why a file
can be trusted after it was read, is ``hdf5_write``, ``hdf5_read`` and ``heatmap_checks``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS
from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.scoring.own_share_records import KNOWN

from .block_view import HEAD_DIM
from .disk import DAMAGED
from .hdf5_read import Reader, reading
from .heatmap import Heatmap
from .heatmap_checks import check_stored
from .heatmap_data import FISHER_KEYS, SampleTable
from .matrix_data import checked_pair, pair_group

HEATMAP_FILE = "heatmap.h5"
_DEEPEST = 8
_BY_BLOCK = ("heatmap", "present", "fisher", "scores", "scores_all")


def heatmap_path(place: str | Path) -> Path:
    """The file of a heatmap, given itself or the folder of its run."""
    path = Path(place)
    return path / HEATMAP_FILE if path.is_dir() else path


def load_heatmap(path: str | Path, pair: tuple[str, str] | None = None, *, with_scores: bool = True) -> Heatmap:
    """Read a heatmap whole.

    Args:
        path: The file, or the folder of a run, in which it is ``heatmap.h5``.
        pair: The names of two of more than two tasks, in the order of the configuration; of two tasks it may be left
            out.
        with_scores: Whether to read scores of sample pairs, where there are any.

    Raises:
        QkovError: naming the file, for a pair that it does not hold, and for anything that is missing, damaged, of
            another schema, or outside the file.
    """
    with reading(heatmap_path(path)) as reader:
        tasks = task_names(reader)
        if tasks is None:
            heatmap = _heatmap(reader, reader.attributes(), with_scores=with_scores)
            if pair is not None:
                checked_pair((heatmap.task_a, heatmap.task_b), pair)
        else:
            heatmap = _pair(reader, tasks, pair, with_scores=with_scores)
        check_stored(heatmap)
        return heatmap


def task_names(reader: Reader) -> tuple[str, ...] | None:
    """The tasks of a file of more than two; None of a file of two."""
    if not reader.has("matrix"):
        return None
    return reader.strings("tasks", len(reader.array("task", kinds="iu")))


def _pair(reader: Reader, tasks: tuple[str, ...], pair: tuple[str, str] | None, *, with_scores: bool) -> Heatmap:
    if pair is None:
        raise QkovError(
            "pair",
            expected="two of its tasks: the file is of more than two",
            got="none",
            remedy=f"Name two of {', '.join(tasks)}: load_heatmap(path, pair=({tasks[0]!r}, {tasks[1]!r})), or "
            "--pair on the command line; load_matrix(path) reads what there is of all.",
        )
    own = reader.group(pair_group(*checked_pair(tasks, pair)))
    return _heatmap(own, {**reader.attributes(), **own.attributes()}, with_scores=with_scores)


def _heatmap(reader: Reader, attributes: dict[str, Any], *, with_scores: bool) -> Heatmap:
    axes = {name: reader.array(name, kinds="iu") for name in ("layer", "head", "kv_head")}
    sizes = {name: len(axis) for name, axis in axes.items()}
    tables = {task: read_samples(reader, f"samples/{task}", f"sample_{task}") for task in ("a", "b")}
    n_a, n_b = len(tables["a"]), len(tables["b"])
    found = {block for group in _BY_BLOCK for block in reader.names(group)}
    shapes = {block: (sizes["layer"], sizes[HEAD_DIM[block]]) for block in BLOCKS if block in found}

    def scores(group: str, left: int, right: int) -> dict[str, Any] | None:
        if not with_scores or not reader.has(group):
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
        {name: _shared(reader, name, (len(layers), n_a, n_b), with_scores) for name in reader.names("shared")},
        statistics,
        {name: value for name, value in attributes.items() if name not in ("schema", "task_a", "task_b")},
        _influences(reader, shapes, n_a + n_b),
        _effects(reader, shapes),
        _own_shares(reader, shapes, n_a + n_b) if with_scores else None,
    )


def _influences(reader: Reader, shapes: Mapping[str, tuple[int, int]], num: int) -> dict[str, Any] | None:
    """Block -> [layer, head, optimizer, sample]; None in a file that knows no effects."""
    if not reader.has("influences"):
        return None
    found = {}
    for block, shape in shapes.items():
        found[block] = np.empty((*shape, len(OPTIMIZERS), num))
        for place, optimizer in enumerate(OPTIMIZERS):
            found[block][:, :, place] = reader.array(f"influences/{block}/{optimizer}", (*shape, num))
    return found


def _own_shares(reader: Reader, shapes: Mapping[str, tuple[int, int]], num: int) -> dict[str, Any] | None:
    """Block -> [layer, head, KNOWN, sample]; None in a file that does not know all of it."""
    if not all(reader.has(f"own_shares/{block}/{name}") for block in shapes for name in KNOWN):
        return None
    return {
        block: np.stack([reader.array(f"own_shares/{block}/{name}", (*shape, num)) for name in KNOWN], axis=2)
        for block, shape in shapes.items()
    }


def _effects(reader: Reader, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    if not reader.has("effects"):
        return None
    return {
        block: {
            optimizer: {
                key: reader.array(f"effects/{block}/{optimizer}/{key}", shape)
                for key in reader.names(f"effects/{block}/{optimizer}")
            }
            for optimizer in OPTIMIZERS
        }
        for block, shape in shapes.items()
    }


def read_samples(reader: Reader, group: str, axis: str) -> SampleTable:
    """The samples of one task: where they are, and the name of their axis."""
    count = len(reader.array(axis, kinds="iu"))
    return SampleTable(
        reader.strings(f"{group}/id", count),
        reader.array(f"{group}/num_tokens", (count,), "iu"),
        reader.array(f"{group}/loss", (count,)),
        reader.strings(f"{group}/text", count),
        reader.strings(f"{group}/content", count) if reader.has(f"{group}/content") else (),
        reader.array(f"{group}/gradient_norm", (count,)) if reader.has(f"{group}/gradient_norm") else None,
        reader.array(f"{group}/elsewhere", (count,), "b") if reader.has(f"{group}/elsewhere") else None,
    )


def _fisher(reader: Reader, block: str, shape: tuple[int, int]) -> dict[str, Any]:
    return {key: reader.array(f"fisher/{block}/{key}", shape) for key in FISHER_KEYS}


def _shared(reader: Reader, name: str, shape: tuple[int, int, int], with_scores: bool) -> dict[str, Any]:
    arrays = {"mean": reader.array(f"shared/{name}/heatmap", shape[:1])}
    if with_scores and reader.has(f"shared/{name}/scores"):
        arrays["cross"] = reader.array(f"shared/{name}/scores", shape)
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

"""A heatmap's arrays by their names: what is stored, and what xarray and pandas are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from qkov_dist.scoring.influence_records import OPTIMIZERS
from qkov_dist.scoring.own_share_records import KNOWN

from .block_view import HEAD_DIM
from .effects import EFFECT_KEYS
from .export import LabelledArrays, Variable, split_arrays
from .heatmap_data import FISHER_KEYS, HeatmapData, Pairs, SampleTable


def labelled(heatmap: HeatmapData, pairs: Pairs = "all") -> LabelledArrays:
    """All of it as labelled arrays, as stored; ``pairs`` limits which scores of sample pairs are among them."""
    arrays, others = split_arrays(heatmap.statistics or {})
    sizes = {"sample_a": len(heatmap.samples_a), "sample_b": len(heatmap.samples_b)}
    num = sum(sizes.values())
    if heatmap.influences is not None:
        sizes["sample"] = num
    if pairs == "all" and heatmap.pooled is not None:
        sizes["sample"] = sizes["sample_right"] = num
    coords = {
        "layer": np.array(heatmap.layers, np.int64),
        "head": np.array(heatmap.heads, np.int64),
        "kv_head": np.array(heatmap.kv_heads, np.int64),
    } | {name: np.arange(size) for name, size in sizes.items()}
    tests = tuple(_statistics_variable(heatmap, path, array) for path, array in arrays.items())
    extra = {dim: np.arange(int(dim[1:])) for test in tests for dim in test.dims if dim not in coords}
    names = {"task_a": heatmap.task_a, "task_b": heatmap.task_b}
    stored = {**heatmap.attributes, **names, **({"statistics": others} if heatmap.statistics is not None else {})}
    return LabelledArrays(
        coords | extra, (*_summaries(heatmap), *_effects(heatmap), *_pair_scores(heatmap, pairs), *tests), stored
    )


def _summaries(heatmap: HeatmapData) -> Iterator[Variable]:
    yield Variable("group", ("layer",), np.asarray(heatmap.groups, np.int64))
    for task, table in (("a", heatmap.samples_a), ("b", heatmap.samples_b)):
        for name, values in sample_columns(table).items():
            yield Variable(f"samples/{task}/{name}", (f"sample_{task}",), values)
    for block in heatmap.blocks:
        dims = ("layer", HEAD_DIM[block])
        yield Variable(f"heatmap/{block}", dims, heatmap.mean[block])
        yield Variable(f"present/{block}", dims, heatmap.present[block])
        for key in FISHER_KEYS:
            yield Variable(f"fisher/{block}/{key}", dims, heatmap.fisher[block][key])
    for name, arrays in heatmap.shared.items():
        yield Variable(f"shared/{name}/heatmap", ("layer",), arrays["mean"])


def sample_columns(table: SampleTable) -> dict[str, Any]:
    """What is stored of the samples of a task: name -> a value for each."""
    columns: dict[str, Any] = {
        "id": table.ids,
        "num_tokens": table.num_tokens,
        "loss": table.losses,
        "text": table.texts,
        "content": table.contents,
    }
    optional = {"gradient_norm": table.gradient_norms, "elsewhere": table.elsewhere}
    return columns | {name: values for name, values in optional.items() if values is not None}


def _effects(heatmap: HeatmapData) -> Iterator[Variable]:
    for block in heatmap.blocks:
        dims = ("layer", HEAD_DIM[block])
        for optimizer, arrays in (heatmap.effects or {}).get(block, {}).items():
            for key in filter(arrays.__contains__, EFFECT_KEYS):
                yield Variable(f"effects/{block}/{optimizer}/{key}", dims, arrays[key])
        if heatmap.influences is not None:
            for place, optimizer in enumerate(OPTIMIZERS):
                yield Variable(
                    f"influences/{block}/{optimizer}", (*dims, "sample"), heatmap.influences[block][:, :, place]
                )


def _pair_scores(heatmap: HeatmapData, pairs: Pairs) -> Iterator[Variable]:
    cross = ("sample_a", "sample_b")
    for block in heatmap.blocks:
        dims = ("layer", HEAD_DIM[block])
        if pairs != "none" and heatmap.cross is not None:
            yield Variable(f"scores/{block}", (*dims, *cross), heatmap.cross[block])
        if pairs == "all" and heatmap.pooled is not None:
            yield Variable(f"scores_all/{block}", (*dims, "sample", "sample_right"), heatmap.pooled[block])
            if heatmap.own_shares is not None:
                for at, name in enumerate(KNOWN):
                    yield Variable(f"own_shares/{block}/{name}", (*dims, "sample"), heatmap.own_shares[block][:, :, at])
    for name, arrays in heatmap.shared.items():
        if pairs != "none" and "cross" in arrays:
            yield Variable(f"shared/{name}/scores", ("layer", *cross), arrays["cross"])


def _statistics_variable(heatmap: HeatmapData, path: str, array: npt.NDArray[Any]) -> Variable:
    """Arrays [layer, native head, ...] under a block's name; any other axis is a dimension ``n<size>``."""
    block = next((part for part in path.split("/") if part in heatmap.mean), None)
    known = ("layer", HEAD_DIM[block]) if block and array.shape[:2] == heatmap.mean[block].shape else ()
    dims = (*known, *(f"n{size}" for size in array.shape[len(known) :]))
    return Variable(f"statistics/{path}", dims, array)

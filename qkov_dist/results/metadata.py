"""What a heatmap is besides its scores: axes, samples, provenance; stored with every partial file.

What a result says about how it was made: settings, versions, seeds, and what was left out. No clock, no machine.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qkov_dist.capture.collect import SampleRecord
from qkov_dist.config import FEWEST_TASKS, RunConfig, to_dict
from qkov_dist.errors import QkovError
from qkov_dist.layout.heads import BLOCKS, Layout, layout_notes
from qkov_dist.scoring.sample_norms import NO_GRADIENT
from qkov_dist.scoring.tiles import LayerTiles, TilePlan
from qkov_dist.values import written

from .head_slices import slices_of
from .heatmap_checks import ABOVE_ALL, check_attributes
from .heatmap_data import SampleTable

_LONGEST = 300  # of an error's text
_LISTED = 5  # samples in a warning
_UNIT = (
    "sample_scale: unit: each sample's gradient is divided by its norm over all scored weights. Scores, I and effects "
    "are of scaled gradients: of a loss in which every sample weighs the same, whose change and harm they predict in "
    "place of those of the tasks' mean losses."
)


@dataclass(frozen=True)
class LayerAxes:
    """One layer's axes: its number, query heads of one kv head, query heads scored, native heads of each block."""

    layer: int
    group: int
    query_heads: tuple[int, ...]
    heads: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class HeatmapMetadata:
    """Everything that :func:`qkov_dist.results.assemble.assemble` needs besides scores.

    Attributes:
        tasks: Names of the tasks; of two A, then B.
        layers: The layers scored.
        samples: The samples of each.
        pooled: Whether scores are among all pooled samples rather than A x B.
        attributes: Settings, versions, seeds: strings, numbers, JSON values.
    """

    tasks: tuple[str, ...]
    layers: tuple[LayerAxes, ...]
    samples: tuple[SampleTable, ...]
    pooled: bool
    attributes: Mapping[str, Any]

    @property
    def query_heads(self) -> tuple[int, ...]:
        """Query heads scored in some layer."""
        return tuple(sorted({head for layer in self.layers for head in layer.query_heads}))

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Kv heads scored in some layer, in K or V."""
        return tuple(sorted({head for layer in self.layers for kv in "KV" for head in layer.heads.get(kv, ())}))

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks that some layer has."""
        return tuple(block for block in BLOCKS if any(block in layer.heads for layer in self.layers))

    def axis(self, block: str) -> tuple[int, ...]:
        """Native heads along a block's axis."""
        return self.query_heads if block in ("Q", "O") else self.kv_heads

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each task."""
        return tuple(map(len, self.samples))

    def of_pair(self, a: int, b: int) -> HeatmapMetadata:
        """That of the heatmap of two of the tasks, given by number."""
        contents = [table.contents for table in self.samples]
        of_tables = [self.samples[task] for task in (a, b)]
        others = {text for task, of_task in enumerate(contents) if task not in (a, b) for text in of_task} - {""}
        elsewhere = [np.array([text in others for text in table.contents], bool) for table in of_tables]
        tables = tuple(
            replace(table, elsewhere=found if found.any() else None)
            for table, found in zip(of_tables, elsewhere, strict=True)
        )
        attributes = {**self.attributes, "tasks": list(self.tasks)}
        return replace(self, tasks=(self.tasks[a], self.tasks[b]), samples=tables, attributes=attributes)


def make_metadata(
    tile_plan: TilePlan,
    layout: Layout,
    tasks: tuple[str, ...],
    records: Sequence[Sequence[SampleRecord]],
    *,
    pooled: bool,
    attributes: Mapping[str, Any],
) -> HeatmapMetadata:
    """The metadata of a plan and the samples that were run."""
    layers = tuple(layer_axes(layer, layout) for layer in tile_plan.layers)
    return HeatmapMetadata(tasks, layers, tuple(map(_table, records)), pooled, attributes)


def layer_axes(layer: LayerTiles, layout: Layout) -> LayerAxes:
    """The axes of one layer of a plan."""
    return LayerAxes(layer.layer, layout.layer(layer.layer).group, layer.query_heads, layer.heads)


def with_norms(metadata: HeatmapMetadata, norms: np.ndarray) -> HeatmapMetadata:
    """The same of a run whose samples' gradients are divided by their norms [N], task after task; a note says so.

    Samples without any gradient are a warning.
    """
    parts, known = np.split(norms, np.cumsum(metadata.sizes)[:-1]), metadata.attributes
    tables = [replace(table, gradient_norms=part) for table, part in zip(metadata.samples, parts, strict=True)]
    still = [
        f"task {task!r}, sample {name!r}"
        for task, table, part in zip(metadata.tasks, tables, parts, strict=True)
        for name, norm in zip(table.ids, part, strict=True)
        if norm < NO_GRADIENT
    ]
    more = f"; {len(still) - _LISTED} samples more" if len(still) > _LISTED else ""
    warning = f"without any gradient, so that sample_scale leaves them at 0: {'; '.join(still[:_LISTED])}{more}."
    attributes = {
        **known,
        "notes": [*known.get("notes", ()), _UNIT],
        "warnings": [*known.get("warnings", ()), *([warning] if still else [])],
    }
    return replace(metadata, samples=tuple(tables), attributes=attributes)


def norms_in(metadata: HeatmapMetadata) -> np.ndarray | None:
    """The norms [N] by which gradients were divided; None where they were not."""
    norms = [table.gradient_norms for table in metadata.samples if table.gradient_norms is not None]
    return np.concatenate(norms) if len(norms) == len(metadata.samples) else None


def to_json(metadata: HeatmapMetadata) -> dict[str, Any]:
    """The metadata as JSON values."""
    return {
        "tasks": list(metadata.tasks),
        "layers": [
            {"layer": x.layer, "group": x.group, "query_heads": list(x.query_heads), "heads": dict(x.heads)}
            for x in metadata.layers
        ],
        "samples": [
            {
                "ids": list(table.ids),
                "num_tokens": table.num_tokens.tolist(),
                "losses": table.losses.tolist(),
                "texts": list(table.texts),
                "contents": list(table.contents),
                **({} if table.gradient_norms is None else {"gradient_norms": table.gradient_norms.tolist()}),
            }
            for table in metadata.samples
        ],
        "pooled": metadata.pooled,
        "attributes": dict(metadata.attributes),
    }


def from_json(raw: Mapping[str, Any], where: str) -> HeatmapMetadata:
    """The metadata that :func:`to_json` wrote.

    Raises:
        QkovError: at ``where``, for anything that is not such metadata.
    """
    try:
        layers = tuple(_layer_from(x) for x in raw["layers"])
        tasks, tables = tuple(map(str, raw["tasks"])), tuple(map(_table_from, raw["samples"]))
        if len(tasks) < FEWEST_TASKS or len(tasks) != len(tables):
            raise ValueError(f"{len(tasks)} tasks and {len(tables)} tables of samples")
        metadata = HeatmapMetadata(tasks, layers, tables, bool(raw["pooled"]), dict(raw["attributes"]))
        check_attributes(metadata.attributes, needed=("score", "estimator", "scope"))
    except QkovError as error:
        raise error.within(where) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise QkovError(
            where,
            expected="a description of layers, heads and samples",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST]}",
            remedy="Use a partial file that `qkov run` wrote.",
        ) from error
    return metadata


def _layer_from(raw: Mapping[str, Any]) -> LayerAxes:
    heads = {str(block): tuple(map(_number, numbers)) for block, numbers in raw["heads"].items()}
    layer, group = _number(raw["layer"]), _number(raw["group"])
    if group == 0:
        raise ValueError("no query head of a kv head")
    return LayerAxes(layer, group, tuple(map(_number, raw["query_heads"])), heads)


def _table_from(raw: Mapping[str, Any]) -> SampleTable:
    counts, losses = np.array(raw["num_tokens"], np.int64), np.array(raw["losses"], np.float64)
    texts, contents = (tuple(map(str, raw.get(key, ()))) for key in ("texts", "contents"))
    norms = np.array(raw["gradient_norms"], np.float64) if "gradient_norms" in raw else None
    return SampleTable(tuple(map(str, raw["ids"])), counts, losses, texts, contents, norms)


def _number(raw: object) -> int:
    if type(raw) is not int or not 0 <= raw < ABOVE_ALL:
        raise ValueError(f"{written(raw)} for a number of a layer or head")
    return raw


def _table(records: Sequence[SampleRecord]) -> SampleTable:
    return SampleTable(
        ids=tuple(record.id for record in records),
        num_tokens=np.array([record.num_tokens for record in records], np.int64),
        losses=np.array([record.loss for record in records], np.float64),
        texts=tuple(record.text for record in records),
        contents=tuple(record.content for record in records),
    )


PACKAGES = ("qkov-dist", "torch", "transformers", "numpy", "scipy", "h5py")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what it computes with."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def run_attributes(
    config: RunConfig, layout: Layout, run_id: str, warnings: Sequence[str] = (), notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The attributes of a run's heatmap; ``warnings`` and ``notes`` are those known before the first batch."""
    return {
        "run_id": run_id,
        "config": to_dict(config),
        "versions": versions(),
        "seeds": {"statistics": config.statistics.seed},
        "model_type": layout.model_type,
        "layout_family": layout.family,
        "slices": slices_of(layout, include_bias=config.metric.include_bias),
        "score": config.metric.score,
        "sample_scale": config.metric.sample_scale,
        "estimator": config.fisher.estimator,
        "scope": config.fisher.scope,
        "notes": [*layout_notes(layout), *notes],
        "warnings": list(warnings),
    }

"""What a tracker is given of a finished run: numbers of blocks, the whole or pairs of tasks, settings, figures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.results.matrix_file import has_many_tasks, load_matrix
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .effect_findings import EFFECTS, effects_of, found_by_change
from .figures import figures
from .findings import found, tally
from .matrix_figures import matrix_figures
from .tables import test_arrays

Found = Heatmap | TaskMatrix


def load_run(place: str | Path) -> Found:
    """What a finished run found, given its folder or its file."""
    return load_matrix(place) if has_many_tasks(place) else load_heatmap(place)


def scalars(run: Found) -> dict[str, float]:
    """Name -> number, each finite.

    Of two tasks ``Q/mean_score``, ``Q/overlap``, ``Q/change_adam``, ``Q/conflict_adam``, ``Q/contested``, and the same
    of ``all`` where it adds up. Of more, over all blocks, ``math__code/mean_score`` and so on, A before B.
    """
    numbers = dict(_of_pairs(run)) if isinstance(run, TaskMatrix) else _of_heatmap(run)
    return {name: float(number) for name, number in numbers.items() if math.isfinite(number)}


def _of_pairs(matrix: TaskMatrix) -> Iterator[tuple[str, float]]:
    """The numbers of each ordered pair of tasks, over all heads."""
    known = {name for arrays in matrix.values.values() for name in arrays}
    arrays = {f"{name}_score" if name == "mean" else name: matrix.average(name) for name in known & {"mean", "overlap"}}
    arrays |= {name: matrix.total(name) for name in known if name.startswith("change")}
    names = [re.sub(r"[^\w. -]", "_", task) for task in matrix.tasks]  # which mlflow takes
    for name, values in sorted(arrays.items()):
        for (row, column), value in np.ndenumerate(values):
            yield f"{names[row]}__{names[column]}/{name}", float(value)


def _of_heatmap(heatmap: Heatmap) -> dict[str, float]:
    numbers = dict(_of_blocks(heatmap))
    if heatmap.has_tested_effects:
        for optimizer in OPTIMIZERS:
            total = heatmap.total_effect(optimizer)
            names = ("change", "change_low", "change_high")
            numbers |= {
                f"all/{name}_{optimizer}": number
                for name, number in zip(names, (total.change, *total.interval), strict=True)
            }
    return numbers


def _of_blocks(heatmap: Heatmap) -> Iterator[tuple[str, float]]:
    """The numbers of each block, over its present heads."""
    for block in heatmap.blocks:
        yield f"{block}/mean_score", _mean(heatmap.mean[block])
        overlap = test_arrays(heatmap, "overlap", block)
        if "statistic" in overlap:
            yield f"{block}/overlap", _mean(overlap["statistic"])
        if heatmap.tests:
            for finding, number in tally(heatmap, found(heatmap, block)).items():
                if number or not finding.is_rare:
                    yield f"{block}/{finding.name}", number
        for optimizer in OPTIMIZERS:
            if effects_of(heatmap, block, optimizer):
                codes = found_by_change(heatmap, block, optimizer)
                yield f"{block}/change_{optimizer}", heatmap.total_effect(optimizer, block).change
                for code, finding in enumerate(EFFECTS, 1):
                    yield f"{block}/{finding.name}_{optimizer}", int((codes == code).sum())


def _mean(values: Any) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else math.nan


def settings(run: Found) -> dict[str, str | int | float | bool]:
    """``section.key`` -> value of the run's configuration, lists as JSON, and what the run is."""
    config = run.attributes.get("config")
    flat = dict(_flat(config)) if isinstance(config, Mapping) else {}
    tables = run.samples if isinstance(run, TaskMatrix) else (run.samples_a, run.samples_b)
    return {"run_id": run.run_id, **{f"samples.{place}": len(table) for place, table in enumerate(tables)}, **flat}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}.{place}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else json.dumps(value, default=str)


def pictures(run: Found) -> dict[str, bytes]:
    """Name -> PNG of every figure.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    drawn = matrix_figures(run, ("png",)) if isinstance(run, TaskMatrix) else figures(run, ("png",))
    return {name.removesuffix(".png"): content for name, content in drawn}


def words(run: Found) -> str:
    """The answer and the warnings, as Markdown."""
    verdict = run.verdict
    sentences = [] if verdict is None else [*verdict.sentences, *(action.why for action in verdict.actions)]
    warnings = [f"- {warning}" for warning in run.attributes.get("warnings", [])]
    return "\n\n".join([run.title, *sentences, *(["Warnings:", "\n".join(warnings)] if warnings else [])])

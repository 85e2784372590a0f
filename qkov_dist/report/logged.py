"""What a tracker is given of a finished run: numbers by block and of the whole, the settings, and the figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qkov_dist.results.heatmap import Heatmap
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .effect_findings import EFFECTS, effects_of, found_by_change
from .figures import figures
from .findings import found, tally
from .tables import test_arrays


def scalars(heatmap: Heatmap) -> dict[str, float]:
    """Name -> number: ``Q/mean_score``, ``Q/overlap``, ``Q/change_adam``, ``Q/conflict_adam``, ``Q/contested``, and
    the same of ``all`` where it adds up; what is not finite is left out.
    """
    numbers = dict(_of_blocks(heatmap))
    if heatmap.has_tested_effects:
        for optimizer in OPTIMIZERS:
            total = heatmap.total_effect(optimizer)
            names = ("change", "change_low", "change_high")
            numbers |= {
                f"all/{name}_{optimizer}": number
                for name, number in zip(names, (total.change, *total.interval), strict=True)
            }
    return {name: float(number) for name, number in numbers.items() if math.isfinite(number)}


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


def settings(heatmap: Heatmap) -> dict[str, str | int | float | bool]:
    """``section.key`` -> value of the run's configuration, lists as JSON, and what the run is."""
    config = heatmap.attributes.get("config")
    flat = dict(_flat(config)) if isinstance(config, Mapping) else {}
    sizes = {"task_a": len(heatmap.samples_a), "task_b": len(heatmap.samples_b)}
    return {"run_id": heatmap.run_id, **{f"samples.{task}": size for task, size in sizes.items()}, **flat}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}.{place}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else json.dumps(value, default=str)


def pictures(heatmap: Heatmap) -> dict[str, bytes]:
    """Name -> PNG of every figure.

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
    """
    return {name.removesuffix(".png"): content for name, content in figures(heatmap, ("png",))}


def words(heatmap: Heatmap) -> str:
    """The answer and the warnings, as Markdown."""
    verdict = heatmap.verdict
    sentences = [] if verdict is None else [*verdict.sentences, *(action.why for action in verdict.actions)]
    warnings = [f"- {warning}" for warning in heatmap.attributes.get("warnings", [])]
    return "\n\n".join([heatmap.title, *sentences, *(["Warnings:", "\n".join(warnings)] if warnings else [])])

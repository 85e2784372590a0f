"""What a result says about how it was made: settings, versions, seeds, and what was left out. No clock, no machine."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from .config import RunConfig, to_dict
from .slices import Layout

PACKAGES = ("qkov-dist", "torch", "transformers", "numpy", "scipy", "h5py")


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what it computes with."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def layout_notes(layout: Layout) -> list[str]:
    """What no score of this layout covers, one sentence each."""
    notes = [f"layer {other.index} ({other.kind}) is not scored: {other.reason}" for other in layout.others]
    for text in dict.fromkeys(note for layer in layout.layers for note in layer.notes):
        where = [layer.index for layer in layout.layers if text in layer.notes]
        notes.append(text if len(where) == len(layout.layers) else f"layers {where}: {text}")
    return notes


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
        "score": config.metric.score,
        "estimator": config.fisher.estimator,
        "scope": config.fisher.scope,
        "notes": [*layout_notes(layout), *notes],
        "warnings": list(warnings),
    }

"""From all partial layers to ``heatmap.h5``: added up, tested and written as the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from .combine import Read, combine
from .config import RunConfig
from .frame import Frame
from .progress import Voice, progress_bar
from .results import Heatmap, Pairs
from .statistics import QKOVStatistics
from .world import World

HEATMAP_FILE = "heatmap.h5"


def statistics_of(config: RunConfig) -> QKOVStatistics | None:
    """The tests that a configuration asks for."""
    settings = config.statistics
    if not settings.enabled:
        return None
    return QKOVStatistics(settings.fdr_alpha, settings.permutations, seed=settings.seed, confidence=settings.confidence)


def finish(
    frame: Frame,
    read: Read,
    config: RunConfig,
    path: Path,
    world: World,
    voice: Voice,
    statistics: QKOVStatistics | None,
) -> Heatmap | None:
    """Add up, test and write as a configuration says, and pass on warnings and notes.

    Args:
        frame: Axes, samples and provenance.
        read: This rank's partial of a layer.
        config: Whose output this is.
        path: The heatmap's file.
        world: The ranks; all of them call this alike.
        voice: Takes warnings and notes, and shows progress.
        statistics: The tests; None leaves them out.

    Returns:
        On rank 0 the heatmap as written; None elsewhere.
    """
    pairs = cast(Pairs, config.output.pairs)
    what = "adding up" if statistics is None else "testing"
    with progress_bar(what, len(frame.layers), "layer", show=voice.show_progress) as advance:
        heatmap = combine(frame, read, world, statistics=statistics, pairs=pairs, folder=path.parent, on_layer=advance)
    if heatmap is None:
        return None
    heatmap.save(path, pairs)
    for warning in heatmap.attributes["warnings"]:
        voice.say(f"warning: {warning}")
    for note in (heatmap.statistics or {}).get("notes", ()):
        voice.say(f"note: {note}")
    return heatmap

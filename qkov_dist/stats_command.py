"""``qkov stats``: a finished run tested again with other settings, from the scores that are on disk.

The tests need scores among all pooled samples. They are in ``heatmap.h5`` with ``output.pairs: all``, and are the sum
of the ranks' partial files otherwise. Scores in ``heatmap.h5`` stay as they are; only the tests are replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import QkovError
from .frame import from_json
from .merge import add_layers, assemble
from .partials import Partial, list_partials, read_partial
from .results import Heatmap
from .run import HEATMAP_FILE
from .statistics import QKOVStatistics
from .store import load_heatmap

Say = Callable[[str], object]


def retest(folder: Path, changes: Mapping[str, Any], say: Say) -> Heatmap:
    """Test a finished run again and write the tests into its ``heatmap.h5``, which is replaced whole or not at all.

    Args:
        folder: The run's output folder.
        changes: Settings of ``QKOVStatistics`` that replace those of the last test.
        say: Takes one line about each stage.

    Returns:
        The heatmap as written.

    Raises:
        QkovError: where there is no finished run or no pooled scores, and for a setting out of range.
    """
    path = folder / HEATMAP_FILE
    if not path.exists():
        remedy = "Finish the run with `qkov run`, or name its output.dir."
        raise QkovError(str(path), expected="the heatmap of a finished run", got="no such file", remedy=remedy)
    stored = load_heatmap(path)
    tests = QKOVStatistics(**{**_last_settings(stored), **changes})
    pooled = stored if stored.pooled is not None else _from_partials(folder, stored.run_id, say)
    say("testing heads")
    results = tests.test_heatmap(pooled)
    seeds = {**stored.attributes.get("seeds", {}), "statistics": tests.seed}
    tested = dataclasses.replace(stored, attributes={**stored.attributes, "seeds": seeds}).with_statistics(results)
    tested.save(path)  # with the scores that it had: those that are not in the file are not in ``stored``
    for note in results["notes"]:
        say(f"note: {note}")
    return tested


def _last_settings(heatmap: Heatmap) -> dict[str, Any]:
    """The settings of the last test; of a run that was never tested, those of its configuration."""
    known = {entry.name for entry in dataclasses.fields(QKOVStatistics)}
    if heatmap.statistics is not None:
        return {name: value for name, value in heatmap.statistics.get("settings", {}).items() if name in known}
    alternative = "less" if heatmap.attributes.get("score") == "signed" else "greater"
    config = heatmap.attributes.get("config")
    section = config.get("statistics", {}) if isinstance(config, Mapping) else {}
    names = {"permutations": "n_permutations", "bootstrap": "n_bootstrap", "fdr_alpha": "fdr_alpha", "seed": "seed"}
    return {"alternative": alternative} | {name: section[key] for key, name in names.items() if key in section}


def _from_partials(folder: Path, run_id: str, say: Say) -> Heatmap:
    """The heatmap with pooled scores, summed from the partial files of all ranks."""
    partials = [read_partial(path) for path in list_partials(folder)]
    if not partials:
        raise _no_pooled_scores(folder, "no partial files, and scores between the two tasks at most")
    _check_complete(folder, run_id, partials)
    say(f"adding up {len(partials)} partial file{'s' if len(partials) > 1 else ''}")
    source = next((partial for partial in partials if partial.header.extra), partials[0])
    frame = from_json(source.header.extra, str(source.path))
    layers = {x.layer: add_layers([partial.read_layer(x.layer) for partial in partials]) for x in frame.layers}
    return assemble(frame, layers)


def _check_complete(folder: Path, run_id: str, partials: list[Partial]) -> None:
    """Raise unless these are all ranks of this very run, each with all layers and pooled scores."""
    world_size = partials[0].header.world_size
    for partial in partials:
        header = partial.header
        if header.run_id != run_id:
            remedy = "Move the files of one of the two runs away."
            raise QkovError(str(partial.path), expected=f"run {run_id}", got=f"run {header.run_id}", remedy=remedy)
        if not header.pooled:
            raise _no_pooled_scores(folder, "partial files with scores between the two tasks only")
        if header.world_size != world_size or partial.missing:
            got = f"{header.world_size} ranks, missing layers {list(partial.missing)}"
            remedy = "Finish the run again with output.resume=true."
            raise QkovError(
                str(partial.path), expected=f"all layers of one of {world_size} ranks", got=got, remedy=remedy
            )
    if (ranks := sorted(partial.header.rank for partial in partials)) != list(range(world_size)):
        remedy = "Bring the partial files of all ranks into this folder."
        raise QkovError(
            str(folder), expected=f"partial files of ranks 0 to {world_size - 1}", got=f"ranks {ranks}", remedy=remedy
        )


def _no_pooled_scores(folder: Path, got: str) -> QkovError:
    return QkovError(
        str(folder),
        expected="scores among all pooled samples",
        got=got,
        remedy="Run again into another output.dir, with output.pairs=all, or with statistics.enabled=true and "
        "output.partials=true.",
    )

"""``qkov stats``: a finished run tested again with other settings, from the scores that are on disk.

The tests need scores among all pooled samples. They are in ``heatmap.h5`` with ``output.pairs: all``, and are the sum
of the ranks' partial files otherwise. Scores in ``heatmap.h5`` stay as they are; only the tests are replaced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .combine import combine
from .errors import QkovError
from .finish import HEATMAP_FILE
from .merge_command import gather_partials
from .partials import list_partials
from .results import Heatmap
from .statistics import QKOVStatistics
from .store import load_heatmap
from .world import Alone

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
    if stored.pooled is not None:
        say("testing heads")
        results: Mapping[str, Any] = tests.test_heatmap(stored)
    else:
        results = _tested_partials(folder, stored.run_id, tests, say)
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
    config = heatmap.attributes.get("config")
    section = config.get("statistics", {}) if isinstance(config, Mapping) else {}
    names = {"permutations": "n_permutations"} | {key: key for key in ("fdr_alpha", "seed", "confidence")}
    return {name: section[key] for key, name in names.items() if key in section}


def _tested_partials(folder: Path, run_id: str, tests: QKOVStatistics, say: Say) -> Mapping[str, Any]:
    """The tests of the sums of all ranks' partial files."""
    if not list_partials(folder):
        raise _no_pooled_scores(folder, "no partial files, and scores between the two tasks at most")
    gathered = gather_partials(folder, Alone())
    if gathered.run_id != run_id:
        remedy = "Move the files of one of the two runs away."
        where = gathered.sources[0].path
        raise QkovError(where, expected=f"run {run_id}", got=f"run {gathered.run_id}", remedy=remedy)
    if not gathered.frame.pooled:
        raise _no_pooled_scores(folder, "partial files with scores between the two tasks only")
    count = len(gathered.sources)
    say(f"adding up {count} partial file{'s' if count > 1 else ''}, testing heads")
    heatmap = combine(gathered.frame, gathered.reader(Alone()), Alone(), statistics=tests, pairs="none", folder=folder)
    assert heatmap is not None  # one process is the first
    return heatmap.statistics or {}


def _no_pooled_scores(folder: Path, got: str) -> QkovError:
    return QkovError(
        str(folder),
        expected="scores among all pooled samples",
        got=got,
        remedy="Run again into another output.dir, with output.pairs=all, or with statistics.enabled=true and "
        "output.partials=true.",
    )

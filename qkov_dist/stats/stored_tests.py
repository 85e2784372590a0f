"""The tests in a result file: with which settings they were made, and what writing others in their place would lose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.results.hdf5_read import reading
from qkov_dist.results.heatmap_file import task_names
from qkov_dist.results.matrix_data import pair_group

from .statistics import QKOVStatistics

_WORDS = {"n_permutations": "permutations", "fdr_alpha": "alpha"}  # as the command line calls them


def settings_of(attributes: Mapping[str, Any], statistics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of ``QKOVStatistics``: those of the last test; of a run never tested, those of its configuration."""
    known = {entry.name for entry in dataclasses.fields(QKOVStatistics)}
    if statistics is not None:
        return {name: value for name, value in statistics.get("settings", {}).items() if name in known}
    config = attributes.get("config")
    section = config.get("statistics", {}) if isinstance(config, Mapping) else {}
    same = ("fdr_alpha", "seed", "confidence", "family")
    names = {"permutations": "n_permutations"} | {key: key for key in same}
    return {name: section[key] for key, name in names.items() if key in section}


def stored_settings(path: Path) -> dict[str, Any] | None:
    """The settings of the tests that a file holds; None where it holds none. No scores are read.

    Raises:
        QkovError: for a file that is not of ours, or damaged.
    """
    if not path.exists():
        return None
    with reading(path) as reader:
        attributes, tasks = reader.attributes(), task_names(reader)
        if tasks is not None:  # the tests of all pairs have one setting
            attributes |= reader.group(pair_group(*tasks[:2])).attributes()
    found = attributes.get("statistics")
    return settings_of(attributes, found) if isinstance(found, Mapping) else None


def changes(before: Mapping[str, Any], tests: QKOVStatistics, score: str) -> list[str]:
    """How tests differ from those with other settings: ``name before -> after``; settings not known are passed over."""
    after = dataclasses.asdict(tests) | {"statistic": tests.statistic or tests.names(score)[-1]}
    return [
        f"{_WORDS.get(name, name)} {before[name]} -> {value}"
        for name, value in after.items()
        if name in before and before[name] != value
    ]


def tests_to_keep(path: Path, tests: QKOVStatistics | None, score: str, keep: bool | None) -> QKOVStatistics | None:
    """The tests to write into a file that may hold others.

    Args:
        path: The file.
        tests: Those of the run's configuration; None where it asks for none.
        score: The kind of score.
        keep: Whether to test with the settings of the file's tests; None refuses where these are others.

    Raises:
        QkovError: where tests with other settings would be lost, and nobody has said what to do.
    """
    before = stored_settings(path)
    if before is None or keep is False:
        return tests
    if keep:
        return QKOVStatistics(**before)
    lost = ["tests -> none"] if tests is None else changes(before, tests, score)
    if lost:
        raise QkovError(
            str(path),
            expected="no tests there, or those of the run's configuration",
            got=f"tests with other settings, as of `qkov stats`; merging would change {', '.join(lost)}",
            remedy="Give --tests keep (test the sum with the settings of the file), --tests run (with those of the "
            "run), or another --output.",
        )
    return tests

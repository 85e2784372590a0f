"""``qkov stats``: a finished run tested again with other settings, from the scores that are on disk.

The tests need scores among all pooled samples. They are in ``heatmap.h5`` with ``output.pairs: all``, and are the sum
of the ranks' partial files otherwise. Scores in ``heatmap.h5`` stay as they are; only the tests are replaced, and what
they replace is said.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qkov_dist.config import FEWEST_TASKS, RETIRED
from qkov_dist.errors import QkovError
from qkov_dist.results.hdf5_write import refuse_output
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE, load_heatmap
from qkov_dist.results.matrix_file import has_many_tasks
from qkov_dist.results.partials import list_partials

from .arguments import run_folder, say, show_result

if TYPE_CHECKING:
    from qkov_dist.results.task_matrix import TaskMatrix
    from qkov_dist.stats.statistics import QKOVStatistics

Say = Callable[[str], object]
Found = TypeVar("Found", "Heatmap", "TaskMatrix")
EXAMPLE = "qkov stats runs/demo --permutations 5400 --statistic cross_mean"
_AGAIN = "Tests of scores were made again, those of effects not: "
SETTINGS = ("n_permutations", "confidence", "fdr_alpha", "seed", "statistic", "alternative", "family")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, the tests' settings, and where they go."""
    parser.add_argument("folder", metavar="DIR", help="output folder of the run, or heatmap.h5 in it")
    parser.add_argument("--permutations", dest="n_permutations", type=int, metavar="K", help="relabellings")
    parser.add_argument("--bootstrap", help=argparse.SUPPRESS)  # given up: says what took its place
    parser.add_argument("--confidence", type=float, help="of intervals, and of the null's band")
    parser.add_argument("--alpha", dest="fdr_alpha", type=float, help="level of the false discovery rate")
    parser.add_argument("--seed", type=int, help="of relabellings")
    parser.add_argument("--statistic", choices=("overlap", "cross_mean"), help="which one decides what is significant")
    parser.add_argument("--alternative", choices=("greater", "less", "two-sided"), help="direction of the test")
    parser.add_argument(
        "--family", choices=("pair", "all"), help="of more than two tasks: correct within each pair, or over all pairs"
    )
    parser.add_argument("--output", metavar="FILE", help="write here and leave DIR/heatmap.h5 as it is")


def execute(options: argparse.Namespace) -> None:
    """Test a finished run again."""
    if options.bootstrap is not None:
        remedy = RETIRED["statistics.bootstrap"].replace("statistics.confidence", "--confidence")
        raise QkovError("--bootstrap", expected="no such option any more", got=options.bootstrap, remedy=remedy)
    chosen = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) is not None}
    folder = run_folder(options.folder)
    output = Path(options.output or folder / HEATMAP_FILE)
    path = folder / HEATMAP_FILE
    again = retest_matrix if path.exists() and has_many_tasks(path) else retest
    show_result(again(folder, chosen, say, output), output.parent, output.name)


def retest(folder: Path, settings: Mapping[str, Any], say: Say, output: Path | None = None) -> Heatmap:
    """Test a finished run again and write the tests into its ``heatmap.h5``, which is replaced whole or not at all.

    Args:
        folder: The run's output folder.
        settings: Of ``QKOVStatistics``; they replace those of the last test.
        say: Takes one line about each stage.
        output: Another file to write, with the same scores; ``heatmap.h5`` then stays as it is.

    Returns:
        The heatmap as written.

    Raises:
        QkovError: where there is no finished run or no pooled scores, and for a setting out of range.
    """
    path = folder / HEATMAP_FILE
    if not path.exists():
        remedy = "Finish the run with `qkov run`, or name its output.dir."
        raise QkovError(str(path), expected="the heatmap of a finished run", got="no such file", remedy=remedy)
    stored, output = load_heatmap(path), output or path
    tests = _tests_to_make(stored, settings, output, say)
    if stored.pooled is not None:
        say("testing heads")
        results: Mapping[str, Any] = tests.test_heatmap(stored)
    else:
        results = _tested_partials(folder, stored.run_id, tests, say)
    tested = _with_seed(stored, tests).with_statistics(results)
    tested.save(output)  # with the scores that it had: those that are not in the file are not in ``stored``
    for note in results["notes"]:
        say(f"note: {note}")
    return tested


def retest_matrix(folder: Path, settings: Mapping[str, Any], say: Say, output: Path | None = None) -> TaskMatrix:
    """The same of a run of more than two tasks: every pair is tested again.

    Effects keep their tests. Arguments and errors are those of ``retest``.
    """
    from qkov_dist.results.matrix_file import load_matrix
    from qkov_dist.stats.families import note_on_families, over_all_pairs

    path = folder / HEATMAP_FILE
    stored, output = load_matrix(path), output or path
    tests = _tests_to_make(stored.heatmaps[stored.pairs[0]], settings, output, say)
    if stored.heatmap(*stored.pairs[0]).pooled is not None:
        say("testing heads")
        results: Mapping[Any, Any] = {pair: tests.test_heatmap(stored.heatmap(*pair)) for pair in stored.pairs}
    else:
        results = _tested_partials(folder, stored.run_id, tests, say)

    def with_results(heatmap: Heatmap, found: Mapping[str, Any]) -> Heatmap:
        return _with_seed(heatmap, tests).with_statistics(found)

    tested = {pair: with_results(stored.heatmaps[pair], found) for pair, found in results.items()}
    if tests.family == "all":
        tested = over_all_pairs(tested, with_effects=False)
    notes = [note for note in stored.attributes.get("notes", ()) if not note.startswith(_AGAIN)]
    again = f"{_AGAIN}{note_on_families(len(stored.pairs), tests.family)}"
    matrix = dataclasses.replace(
        _with_seed(stored, tests),
        heatmaps=tested,
        whole=lambda pair: with_results(load_heatmap(path, pair), tested[pair].statistics or {}),
    )
    matrix = dataclasses.replace(matrix, attributes={**matrix.attributes, "notes": [*notes, again]})
    matrix.save(output)
    return matrix


def _tests_to_make(heatmap: Heatmap, settings: Mapping[str, Any], output: Path, say: Say) -> QKOVStatistics:
    """The tests of a stored heatmap with other settings; what they replace in ``output`` is said."""
    from qkov_dist.stats.statistics import QKOVStatistics
    from qkov_dist.stats.stored_tests import settings_of

    last = settings_of(heatmap.attributes, heatmap.statistics)
    tests = QKOVStatistics(**{**last, **settings})
    refuse_output(output, heatmap.run_id)
    _say_what_is_replaced(output, tests, str(heatmap.attributes["score"]), say)
    return tests


def _with_seed(found: Found, tests: QKOVStatistics) -> Found:
    """A heatmap or a matrix whose attributes name the seed of these tests."""
    seeds = {**found.attributes.get("seeds", {}), "statistics": tests.seed}
    return dataclasses.replace(found, attributes={**found.attributes, "seeds": seeds})


def _say_what_is_replaced(output: Path, tests: QKOVStatistics, score: str, say: Say) -> None:
    from qkov_dist.stats.stored_tests import changes, stored_settings

    before = stored_settings(output)
    if before is None:
        say(f"writing tests into {output}")
        return
    changed = ", ".join(changes(before, tests, score)) or "the same settings"
    say(f"replacing the tests in {output} ({changed})")


def _tested_partials(folder: Path, run_id: str, tests: QKOVStatistics, say: Say) -> Mapping[Any, Any]:
    """The tests of the sums of all ranks' partial files; of more than two tasks those of each pair."""
    if not list_partials(folder):
        raise _no_pooled_scores(folder, "no partial files, and scores between the two tasks at most")
    from qkov_dist.distributed.world import Alone
    from qkov_dist.finish import combine, combine_tasks
    from qkov_dist.results.gather import gather_partials

    gathered = gather_partials(folder, Alone())
    if gathered.run_id != run_id:
        remedy = "Move the files of one of the two runs away."
        where = gathered.sources[0].path
        raise QkovError(where, expected=f"run {run_id}", got=f"run {gathered.run_id}", remedy=remedy)
    if not gathered.metadata.pooled:
        raise _no_pooled_scores(folder, "partial files with scores between the two tasks only")
    count = len(gathered.sources)
    say(f"adding up {count} partial file{'s' if count > 1 else ''}, testing heads")
    asked: dict[str, Any] = {"statistics": tests, "pairs": "none", "folder": folder}
    if len(gathered.metadata.tasks) > FEWEST_TASKS:
        within = {**asked, "statistics": dataclasses.replace(tests, family="pair")}
        matrix = combine_tasks(gathered.metadata, gathered.reader(Alone()), Alone(), **within)
        assert matrix is not None  # one process is the first
        return {pair: found.statistics or {} for pair, found in matrix.heatmaps.items()}
    heatmap = combine(gathered.metadata, gathered.reader(Alone()), Alone(), **asked)
    assert heatmap is not None
    return heatmap.statistics or {}


def _no_pooled_scores(folder: Path, got: str) -> QkovError:
    return QkovError(
        str(folder),
        expected="scores among all pooled samples",
        got=got,
        remedy="Run again into another output.dir, with output.pairs=all, or with statistics.enabled=true and "
        "output.partials=true.",
    )

"""The report of a finished run: ``report.html``, and with ``qkov report`` figures and tables for papers.

Of two tasks:

    DIR/report.html                             the page: self-contained, offline
    DIR/report/{heads,blocks,layers,conflicts}.{csv,md}, and shared.{csv,md} where O's bias was scored
    DIR/report/{heatmaps,blocks,layers}.{pdf,png}   with matplotlib; {changes,waterfall} where effects are known

Of more than two:

    DIR/report.html                             the page of the matrix of tasks
    DIR/pairs/A__B.html                         the page of each pair, as of two tasks (``pair_files``)
    DIR/report/{pairs,tasks,heads_over_pairs,matrix}.{csv,md}
    DIR/report/{matrix,matrix_blocks,matrix_scores,matrix_heads}.{pdf,png}

It shows what ``heatmap.h5`` holds and computes nothing else. A page of another run is refused, never overwritten.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from qkov_dist.errors import QkovError
from qkov_dist.results.disk import file_errors
from qkov_dist.results.hdf5_write import remove_leftovers
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE, heatmap_path, load_heatmap
from qkov_dist.results.matrix_data import Pair, checked_pair
from qkov_dist.results.matrix_file import has_many_tasks, load_matrix
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.results.verdict_facts import BY

from .figures import figures
from .matrix_figures import matrix_figures
from .matrix_page import make_matrix_page
from .matrix_tables import matrix_tables
from .page import make_page
from .page_frame import run_marker
from .pair_files import FOLDER as PAIRS
from .pair_files import link_back, pair_files
from .table import Table
from .tables import all_tables

PAGE_FILE, FOLDER = "report.html", "report"
MOST_WITH_A_RUN, MOST_AT_ONCE = 10, 190  # pages of pairs that a run, and `qkov report`, write by themselves
_HEAD = 4000  # bytes of a page among which its marker is


def write_page(heatmap: Heatmap, folder: str | Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Raises:
        QkovError: where ``folder`` holds a page of another run, or cannot be written.
    """
    path = Path(folder) / PAGE_FILE
    _refuse_other_page(path, heatmap.run_id)
    _replace(path, make_page(heatmap).encode("utf-8", "backslashreplace"))
    return path


def write_report(place: str | Path, say: Callable[[str], None], pairs: Iterable[Pair] = ()) -> Path:
    """Write page, tables and figures of a run beside its heatmap; returns the page's path.

    Args:
        place: The heatmap's file, or the folder where ``heatmap.h5`` lies.
        say: Takes a line about each part.
        pairs: Of more than two tasks: the pairs whose pages alone are written (``write_matrix_report``).

    Raises:
        QkovError: without a readable ``heatmap.h5``, for a page of another run, and where writing fails.
    """
    path = heatmap_path(place)
    if not path.exists():
        remedy = "Name the output folder of a finished `qkov run`, or its heatmap."
        raise QkovError(str(place), expected=f"a folder with {HEATMAP_FILE}, or a heatmap", got="none", remedy=remedy)
    folder, chosen = path.parent, list(pairs)
    if has_many_tasks(path):
        return write_matrix_report(load_matrix(path), folder, say, chosen)
    if chosen:
        remedy = "Leave --pair away: the report is of both tasks."
        raise QkovError(str(place), expected="more than two tasks", got="two", remedy=remedy)
    heatmap = load_heatmap(path)
    page = write_page(heatmap, folder)
    _write_others(all_tables(heatmap), figures(heatmap), folder / FOLDER, say)
    return page


def write_matrix_page(matrix: TaskMatrix, folder: str | Path, pairs: Iterable[Pair] | None = None) -> Path:
    """Write the page of many tasks, and pages of pairs beside it; returns its path.

    Args:
        matrix: Of all tasks.
        folder: Where ``report.html`` is to lie. Pages of pairs of this run that are there already stay, and are linked.
        pairs: Whose pages to write; by default all, where there are at most ``MOST_WITH_A_RUN``, else none.

    Raises:
        QkovError: where ``folder`` holds a page of another run, or cannot be written, and for a pair that is not there.
    """
    path = Path(folder) / PAGE_FILE
    if pairs is None:
        pairs = matrix.pairs if len(matrix.pairs) <= MOST_WITH_A_RUN else ()
    chosen = [checked_pair(matrix.tasks, pair) for pair in pairs]
    files = pair_files(matrix.tasks)
    for checked in (path, *(path.parent / files[pair] for pair in chosen)):
        _refuse_other_page(checked, matrix.run_id)
    for pair in chosen:
        content = make_page(matrix.heatmap(*pair), link_back(PAGE_FILE, pair))
        _replace(path.parent / files[pair], content.encode("utf-8", "backslashreplace"))
    written = {pair: file for pair, file in files.items() if _is_of_run(path.parent / file, matrix.run_id)}
    _replace(path, make_matrix_page(matrix, written).encode("utf-8", "backslashreplace"))
    return path


def write_matrix_report(
    matrix: TaskMatrix, folder: str | Path, say: Callable[[str], None], pairs: Iterable[Pair] = ()
) -> Path:
    """Write the page of many tasks, pages of pairs, tables and figures; returns the page's path.

    Args:
        matrix: Of all tasks.
        folder: Where ``report.html`` is to lie.
        say: Takes a line about each part.
        pairs: Write the pages of these alone, and no tables and figures. Else those of all pairs, or of the
            ``MOST_AT_ONCE`` whose change is furthest from 0 for its error.

    Raises:
        QkovError: as ``write_matrix_page``.
    """
    if chosen := list(pairs):
        return write_matrix_page(matrix, folder, chosen)
    page = write_matrix_page(matrix, folder, first_pairs(matrix, MOST_AT_ONCE))
    shown = min(len(matrix.pairs), MOST_AT_ONCE)
    left = len(matrix.pairs) - shown
    others = f"; each of the other {left:,}: qkov report DIR --pair A B" if left else ""
    say(f"pages of {shown:,} of {len(matrix.pairs):,} pairs: {Path(folder) / PAIRS}/*.html{others}")
    _write_others(matrix_tables(matrix), matrix_figures(matrix), Path(folder) / FOLDER, say)
    return page


def first_pairs(matrix: TaskMatrix, most: int) -> list[Pair]:
    """All pairs, or as many: those whose total change is furthest from 0 for its error."""
    if len(matrix.pairs) <= most:
        return list(matrix.pairs)
    told = sorted(matrix.records, key=lambda record: record.totals[BY].total.p_value if record.totals else 1.0)
    return [record.tasks for record in told[:most]]


def write_files(
    path: Path,
    marker: str,
    page: str,
    tables: Iterable[Table],
    drawn: Iterator[tuple[str, bytes]],
    say: Callable[[str], None],
) -> Path:
    """Write a page and, beside it, tables and figures; returns the page's path.

    Args:
        path: Of the page.
        marker: What the page bears as its run: a page that bears another is refused, never overwritten.
        page: All of it.
        tables: To be written as CSV and Markdown.
        drawn: File name and content of figures.
        say: Takes a line about each part.

    Raises:
        QkovError: for another page at ``path``, and where writing fails.
    """
    _refuse_other_page(path, marker)
    _replace(path, page.encode("utf-8", "backslashreplace"))
    _write_others(tables, drawn, path.parent, say)
    return path


def _write_others(
    tables: Iterable[Table], drawn: Iterator[tuple[str, bytes]], folder: Path, say: Callable[[str], None]
) -> None:
    """Tables, and figures where matplotlib is there."""
    for table in tables:
        _replace(folder / f"{table.name}.csv", table.to_csv().encode())
        _replace(folder / f"{table.name}.md", table.to_markdown().encode())
    say(f"tables: {folder}/*.csv, *.md")
    try:
        for name, content in drawn:
            _replace(folder / name, content)
        say(f"figures: {folder}/*.pdf, *.png")
    except ModuleNotFoundError as error:
        say(f"no figures: {error.name} is not installed. Run: pip install 'qkov-dist[report]'")


def _is_of_run(path: Path, run_id: str) -> bool:
    """Whether there is a page of this run; only its head is read."""
    if not path.is_file():
        return False
    with file_errors(path, OSError), path.open("rb") as file:
        return run_marker(run_id).encode() in file.read(_HEAD)


def _refuse_other_page(path: Path, run_id: str) -> None:
    with file_errors(path, OSError):
        found = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
    if found is not None and run_marker(run_id) not in found:
        remedy = "Nothing was overwritten. Move it away, then run `qkov report` again."
        raise QkovError(str(path), expected=f"a report of run {run_id!r}", got="another file", remedy=remedy)


def _replace(path: Path, content: bytes) -> None:
    """Have a file appear whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with file_errors(path, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

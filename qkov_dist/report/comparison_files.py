"""The files of a comparison.

    DIR/compare.html                               the page: self-contained, offline
    DIR/{heads,correlations}.{csv,md}              a row a head; a row for every quantity, block and two runs
    DIR/{scatter,differences,trajectories}.{pdf,png}   with matplotlib; trajectories of more than two runs

A page of another comparison, or of a run, is refused, never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qkov_dist.results.comparison import Comparison

from .comparison_figures import comparison_figures
from .comparison_page import comparison_id, make_comparison_page
from .comparison_tables import correlations_table, heads_table
from .write import write_files

COMPARISON_PAGE = "compare.html"


def write_comparison(comparison: Comparison, folder: Path, say: Callable[[str], None]) -> Path:
    """Write page, tables and figures; returns the page's path.

    Raises:
        QkovError: where ``folder`` holds a page of another comparison, or cannot be written.
    """
    return write_files(
        folder / COMPARISON_PAGE,
        comparison_id(comparison),
        make_comparison_page(comparison),
        (heads_table(comparison), correlations_table(comparison)),
        comparison_figures(comparison),
        say,
    )

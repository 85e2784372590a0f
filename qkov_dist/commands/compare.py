"""``qkov compare``: runs of one layout, head by head: which heads moved, and do the runs rank heads alike."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qkov_dist.errors import QkovError
from qkov_dist.results.heatmap_file import HEATMAP_FILE, heatmap_path

from .arguments import say

if TYPE_CHECKING:
    from qkov_dist.results.comparison import Comparison

EXAMPLE = "qkov compare runs/checkpoint-100 runs/checkpoint-200 --output runs/compared"
FORMATS = ("table", "json", "csv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Runs in order, how they are compared, and in which form."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="output folders of two runs or more, or their heatmaps' files, in order"
    )
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"), help="compare this pair of tasks")
    parser.add_argument("--alpha", type=float, help="a head moved at or below this q (default: the first run's level)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of intervals (default: 0.95)")
    parser.add_argument(
        "--draws", type=int, default=1000, metavar="K", help="draws of signs for family-wise p (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed (default: table)")
    parser.add_argument("--output", metavar="DIR", help="write compare.html, tables and figures here")


def execute(options: argparse.Namespace) -> None:
    """Compare, print, and write where asked."""
    for run in options.runs:
        if not heatmap_path(run).is_file():
            remedy = "Name the output folder of a finished `qkov run`, or its heatmap."
            raise QkovError(str(run), expected=f"a folder with {HEATMAP_FILE}, or a heatmap", got="none", remedy=remedy)
    if len(options.runs) < 2:
        raise QkovError("compare", expected="two runs or more", got="one", remedy="Name another run of the same heads.")
    from qkov_dist.stats.comparison import compare_runs

    comparison = compare_runs(
        options.runs,
        alpha=options.alpha,
        confidence=options.confidence,
        num_draws=options.draws,
        seed=options.seed,
        pair=None if options.pair is None else (options.pair[0], options.pair[1]),
    )
    _show(comparison, options.format)
    if options.output is not None:
        from qkov_dist.report.comparison_files import write_comparison

        page = write_comparison(comparison, Path(options.output), say)
        say(f"page: {page} (opens in any browser)")


def _show(comparison: Comparison, form: str) -> None:
    from qkov_dist.report.comparison_tables import heads_table, print_comparison

    if form == "json":
        print(json.dumps(comparison.to_json(), indent=1, allow_nan=False))
    elif form == "csv":
        print(heads_table(comparison).to_csv(), end="")
    else:
        print_comparison(comparison)

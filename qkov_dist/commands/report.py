"""`qkov report`: the page of a finished run again, with tables and figures."""

from __future__ import annotations

import argparse

from .arguments import say

EXAMPLE = "qkov report runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, or a heatmap's file; of more than two tasks perhaps some pairs."""
    parser.add_argument("folder", metavar="DIR", help="the run's output folder with heatmap.h5, or a heatmap's file")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        metavar=("A", "B"),
        help="of more than two tasks: write the page of this pair alone, in the configuration's order; may be repeated",
    )


def execute(options: argparse.Namespace) -> None:
    """Write page, tables and figures."""
    from qkov_dist.report.summary import print_page
    from qkov_dist.report.write import write_report

    print_page(write_report(options.folder, say, [(a, b) for a, b in options.pair]))

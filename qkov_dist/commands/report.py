"""`qkov report`: the page of a finished run again, with tables and figures."""

from __future__ import annotations

import argparse

from qkov_dist.config import TRACKERS

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
    parser.add_argument(
        "--report-to",
        nargs="+",
        choices=TRACKERS,
        metavar="TRACKER",
        help=f"also hand numbers, figures and a page without samples' texts to some of {', '.join(TRACKERS)}",
    )


def execute(options: argparse.Namespace) -> None:
    """Write page, tables and figures."""
    from qkov_dist.report.logged import load_run
    from qkov_dist.report.summary import print_page
    from qkov_dist.report.trackers import check_installed, report_to
    from qkov_dist.report.write import write_report

    names = tuple(dict.fromkeys(options.report_to or ()))
    check_installed(names, "--report-to")
    page = write_report(options.folder, say, [(a, b) for a, b in options.pair])
    print_page(page)
    if names:
        report_to(names, load_run(options.folder), page.parent, say)

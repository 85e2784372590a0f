"""`qkov report`: the page of a finished run again, with tables and figures."""

from __future__ import annotations

import argparse

from .arguments import Commands, _add, say


def _add_report(group: Commands) -> None:
    parser = _add(
        group,
        "report",
        report_command,
        "Write the report of a finished run: report.html, and in report/ figures (PDF, PNG), tables (CSV, Markdown).",
        "qkov report runs/demo",
    )
    parser.add_argument("folder", metavar="DIR", help="the run's output folder with heatmap.h5, or a heatmap's file")


def report_command(options: argparse.Namespace) -> None:
    """Write page, tables and figures."""
    from qkov_dist.report.summary import print_page
    from qkov_dist.report.write import write_report

    print_page(write_report(options.folder, say))

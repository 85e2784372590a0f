"""`qkov run`: score two tasks as a configuration says."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from qkov_dist.distributed.launchers import launched_size
from qkov_dist.errors import QkovError

from .arguments import add_configuration, say, show_result

if TYPE_CHECKING:
    from qkov_dist.config import RunConfig

EXAMPLE = "qkov run configs/laptop.yaml metric.layers=0-3 output.dir=runs/first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A configuration, or what it may hold."""
    add_configuration(parser, "configuration file", optional=True)
    parser.add_argument("--keys", action="store_true", help="list every setting with its default and meaning")
    parser.add_argument("--schema", action="store_true", help="print the configuration's JSON Schema, for editors")


def execute(options: argparse.Namespace) -> None:
    """Score two tasks as a configuration says."""
    if options.keys or options.schema:
        _print_keys(as_schema=options.schema)
    elif options.config is None:
        raise QkovError(
            "qkov run",
            expected="a configuration file",
            got="none",
            remedy="Write `qkov run CONFIG.yaml`; `qkov run --keys` lists what it may hold.",
        )
    else:
        _run(options)


def _print_keys(*, as_schema: bool) -> None:
    from qkov_dist.config import describe

    from .keys import schema_text

    print(schema_text() if as_schema else describe())


def _run(options: argparse.Namespace) -> None:
    from qkov_dist.config_file import load_config
    from qkov_dist.report.trackers import check_installed, report_to

    def checked() -> RunConfig:
        config = load_config(options.config, options.overrides)
        check_installed(config.output.report_to or ())
        return config

    # A process alone reads the configuration before it loads what runs one; several ranks refuse it together.
    early = checked() if launched_size(os.environ) == 1 else None
    from qkov_dist.console import Console
    from qkov_dist.distributed.connect import connected
    from qkov_dist.planning.measured import measured_scalars
    from qkov_dist.run import run

    taken: dict[str, float] = {}
    with connected():
        config = early or checked()
        console = Console.of(say, show_progress=not options.quiet)
        found = run(config, console, lambda measured: taken.update(measured_scalars(measured)))
    folder, names = Path(config.output.dir), config.output.report_to or ()
    show_result(found, folder)
    if found is None or not names:
        return
    if taken:
        report_to(names, found, folder, say, taken)
    else:
        say(f"a finished run is not reported again; to do so: qkov report {folder} --report-to {' '.join(names)}")

"""`qkov run`: score two tasks as a configuration says."""

from __future__ import annotations

import argparse
from pathlib import Path

from qkov_dist.errors import QkovError

from .arguments import Commands, _add, _show, say


def _add_run(group: Commands) -> None:
    parser = _add(
        group,
        "run",
        run_command,
        "Score two tasks as a configuration says; write heatmap.h5.",
        "qkov run configs/laptop.yaml metric.layers=0-3 output.dir=runs/first",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--keys", action="store_true", help="list every setting with its default and meaning")


def run_command(options: argparse.Namespace) -> None:
    """Score two tasks as a configuration says."""
    from qkov_dist.config import describe
    from qkov_dist.config_file import load_config
    from qkov_dist.console import Console
    from qkov_dist.distributed.connect import connected
    from qkov_dist.run import run

    if options.keys:
        print(describe())
        return
    if options.config is None:
        raise QkovError(
            "qkov run",
            expected="a configuration file",
            got="none",
            remedy="Write `qkov run CONFIG.yaml`; `qkov run --keys` lists what it may hold.",
        )
    with connected():
        config = load_config(options.config, options.overrides)
        heatmap = run(config, Console.of(say, show_progress=not options.quiet))
    _show(heatmap, Path(config.output.dir))

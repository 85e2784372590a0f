"""What each command does: its parsed options -> one call. Imports wait for the command that needs them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import QkovError

if TYPE_CHECKING:
    from .config import ModelConfig
    from .results import Heatmap


def run_command(options: argparse.Namespace) -> None:
    """Score two tasks as a configuration says."""
    from .comm import connected
    from .config import describe
    from .config_file import load_config
    from .run import run

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
        heatmap = run(config, say=say, show_progress=not options.quiet)
    _show(heatmap, Path(config.output.dir))


def demo_command(options: argparse.Namespace) -> None:
    """Run the demo's configuration."""
    from .comm import connected
    from .demo import demo_config
    from .run import run

    config = demo_config(
        model=options.model, samples=options.samples, max_tokens=options.max_tokens, output=options.output
    )
    with connected():
        heatmap = run(config, say=say, show_progress=not options.quiet)
    _show(heatmap, Path(config.output.dir))


def plan_command(options: argparse.Namespace) -> None:
    """Show what a run would cost."""
    from .config_file import load_config
    from .plan_command import Machines, plan_run

    config = load_config(options.config, options.overrides)
    machines = Machines(
        world_size=options.world_size,
        hardware=options.hardware,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        ranks_per_node=options.ranks_per_node,
        samples=options.samples,
        tokens=options.tokens,
    )
    plan_run(config, machines, as_numbers=options.json)


def merge_command(options: argparse.Namespace) -> None:
    """Add up partial files."""
    from .comm import SharedError, connected_by_mpi
    from .finish import HEATMAP_FILE
    from .merge_command import merge_folder

    folder = _run_folder(options.folder)
    output = Path(options.output or folder / HEATMAP_FILE)
    try:
        with connected_by_mpi() as world:
            keep = {"keep": True, "run": False, None: None}[options.tests]
            heatmap = merge_folder(
                folder, output, world=world, say=say, show_progress=not options.quiet, keep_tests=keep
            )
    except SharedError:
        if world.rank:
            sys.exit(2)  # rank 0 says what is wrong
        raise
    _show(heatmap, output.parent, output.name)


def inspect_command(options: argparse.Namespace) -> None:
    """Show where heads live."""
    from .inspection import inspect_model

    inspect_model(_model_config(options), verify=options.verify)


def check_command(options: argparse.Namespace) -> None:
    """Measure the six properties."""
    from .check_command import check

    check(
        _model_config(options),
        samples=options.samples,
        max_tokens=options.max_tokens,
        layers=options.layers,
        say=say,
    )


def stats_command(options: argparse.Namespace) -> None:
    """Test a finished run again."""
    from .finish import HEATMAP_FILE
    from .stats_command import retest

    if options.bootstrap is not None:
        from .config import RETIRED

        remedy = RETIRED["statistics.bootstrap"].replace("statistics.confidence", "--confidence")
        raise QkovError("--bootstrap", expected="no such option any more", got=options.bootstrap, remedy=remedy)
    names = ("n_permutations", "confidence", "fdr_alpha", "seed", "statistic", "alternative")
    chosen = {name: getattr(options, name) for name in names}
    changes = {name: value for name, value in chosen.items() if value is not None}
    folder = _run_folder(options.folder)
    output = Path(options.output or folder / HEATMAP_FILE)
    _show(retest(folder, changes, say, output), output.parent, output.name)


def report_command(options: argparse.Namespace) -> None:
    """Write page, tables and figures."""
    from .report import write_report
    from .summary import print_page

    print_page(write_report(options.folder, say))


def validate_command(options: argparse.Namespace) -> None:
    """Measure what the scores predict."""
    from .demo import demo_model
    from .validate_command import validate

    if options.model is None:
        options.model = str(demo_model())
    validate(
        _model_config(options),
        tasks=(options.task_a, options.task_b),
        samples=options.samples,
        max_tokens=options.max_tokens,
        heads=options.heads,
        steps=options.step,
        bootstrap=options.bootstrap,
        seed=options.seed,
        output=options.output,
        say=say,
        show_progress=not options.quiet,
    )


def _run_folder(place: str) -> Path:
    """The folder of a run, given itself or one of the files that the run keeps its scores in.

    Raises:
        QkovError: for a file of another name: what is in the folder need not be of the same run.
    """
    path = Path(place)
    if not path.is_file():
        return path
    if path.name != "heatmap.h5" and not re.fullmatch(r"partial_rank\d{5,}\.h5", path.name):
        remedy = "Name the run's output folder."
        raise QkovError(place, expected="a run's folder, or heatmap.h5 in it", got="another file", remedy=remedy)
    return path.parent


def _model_config(options: argparse.Namespace) -> ModelConfig:
    from .config import ModelConfig

    return ModelConfig(
        path=options.model,
        revision=options.revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )


def say(line: str) -> None:
    """One line about a stage, to stderr."""
    print(f"qkov: {line}", file=sys.stderr)


def _show(heatmap: Heatmap | None, folder: Path, file: str = "heatmap.h5") -> None:
    """Print the summary on rank 0, and write the page beside ``heatmap.h5``."""
    from .report import write_page
    from .store import HEATMAP_FILE
    from .summary import print_page, print_summary

    if heatmap is None:
        return
    print_summary(heatmap, folder, file)
    if file == HEATMAP_FILE:
        print_page(write_page(heatmap, folder))

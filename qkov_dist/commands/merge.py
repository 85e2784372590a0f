"""`qkov merge`: the partial files of a folder -> heatmap.h5, after the fact, without the model or a process group.

Partial scores add up, so any number of processes may share the files: each adds its own, and where ``mpirun`` started
several, their sums are added layer by layer. What the result says of samples and settings is in every partial file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qkov_dist.config import RunConfig
from qkov_dist.config_file import from_dict
from qkov_dist.console import SILENT, Console
from qkov_dist.errors import QkovError
from qkov_dist.results.hdf5_write import refuse_output
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import HEATMAP_FILE

from .arguments import run_folder, say, show_result

if TYPE_CHECKING:
    from qkov_dist.distributed.world import World
    from qkov_dist.results.metadata import HeatmapMetadata
    from qkov_dist.results.task_matrix import TaskMatrix

EXAMPLE = "mpirun -n 4 qkov merge runs/first --output first.h5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run's folder, where the sum goes, and which tests it gets."""
    parser.add_argument("folder", metavar="DIR", help="output folder of `qkov run` with output.partials=true")
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: DIR/heatmap.h5)")
    parser.add_argument(
        "--tests",
        choices=("run", "keep"),
        help="where the file holds tests with other settings than the run's (`qkov stats`): test as the run says, or "
        "keep those settings (default: refuse)",
    )


def execute(options: argparse.Namespace) -> None:
    """Add up partial files."""
    folder = run_folder(options.folder)
    output = Path(options.output or folder / HEATMAP_FILE)
    keep = {"keep": True, "run": False, None: None}[options.tests]
    from qkov_dist.distributed.connect import connected_by_mpi
    from qkov_dist.distributed.shared_errors import SharedError

    try:
        with connected_by_mpi() as world:
            heatmap = merge_folder(
                folder, output, world=world, console=Console.of(say, show_progress=not options.quiet), keep_tests=keep
            )
    except SharedError:
        if world.rank:
            sys.exit(2)  # rank 0 says what is wrong
        raise
    show_result(heatmap, output.parent, output.name)


def merge_folder(
    folder: str | Path,
    output: str | Path | None = None,
    *,
    world: World | None = None,
    console: Console = SILENT,
    keep_tests: bool | None = None,
) -> Heatmap | TaskMatrix | None:
    """Add up the partial files of a folder, test the sum as its run would have, and write it.

    Args:
        folder: Where the partial files are.
        output: The file to write; ``heatmap.h5`` in ``folder`` by default.
        world: The processes that share the files; all of them call this alike.
        console: Takes one line about each stage, and shows progress; of a process alone, rank 0 alone uses it.
        keep_tests: Where the file holds tests with other settings than the run's, test with these (True), with the
            run's (False), or refuse (None).

    Returns:
        On rank 0 the heatmap as written, or the matrix of more than two tasks; None elsewhere.

    Raises:
        QkovError: as :func:`gather_partials` does; for a damaged layer, and an output that cannot be or is another's.
    """
    from qkov_dist.distributed.shared_errors import together
    from qkov_dist.distributed.world import Alone
    from qkov_dist.finish import finish, statistics_of
    from qkov_dist.results.gather import gather_partials
    from qkov_dist.stats.stored_tests import tests_to_keep

    world, folder = world or Alone(), Path(folder)
    output = Path(output) if output else folder / HEATMAP_FILE
    gathered = gather_partials(folder, world)
    together(world, lambda: refuse_output(output, gathered.run_id))
    num_files, num_layers = len(gathered.sources), len(gathered.metadata.layers)
    console = console.on_rank(world.rank, world.size)
    console.say(f"adding {num_files} partial file{'s' * (num_files > 1)} of run {gathered.run_id}, {num_layers} layers")
    config = together(world, lambda: _config_of(gathered.metadata))
    asked, score = statistics_of(config), str(gathered.metadata.attributes["score"])
    tests = together(world, lambda: tests_to_keep(output, asked, score, keep_tests))
    return finish(gathered.metadata, gathered.reader(world), config, output, world, console, tests)


def _config_of(metadata: HeatmapMetadata) -> RunConfig:
    try:
        return from_dict(metadata.attributes["config"], stored=True)
    except KeyError:
        remedy = "Use partial files that `qkov run` wrote."
        raise QkovError("partial files", expected="the run's configuration", got="none", remedy=remedy) from None
    except QkovError as error:
        raise error.within("configuration in the partial files") from error

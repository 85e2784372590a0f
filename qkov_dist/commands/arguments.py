"""Arguments that several commands share, and what becomes of them."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qkov_dist.errors import QkovError

if TYPE_CHECKING:
    from qkov_dist.config import ModelConfig
    from qkov_dist.results.heatmap import Heatmap
    from qkov_dist.results.task_matrix import TaskMatrix


def run_folder(place: str) -> Path:
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


def model_config(options: argparse.Namespace) -> ModelConfig:
    """The model that `add_model_arguments` asked for."""
    from qkov_dist.config import ModelConfig

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


def show_result(found: Heatmap | TaskMatrix | None, folder: Path, file: str = "heatmap.h5") -> None:
    """Print the summary on rank 0, and write the page beside ``heatmap.h5``."""
    from qkov_dist.report.summary import print_matrix_summary, print_page, print_summary
    from qkov_dist.report.write import write_matrix_page, write_page
    from qkov_dist.results.heatmap_file import HEATMAP_FILE
    from qkov_dist.results.task_matrix import TaskMatrix

    if found is None:
        return
    if isinstance(found, TaskMatrix):
        print_matrix_summary(found, folder, file)
        if file == HEATMAP_FILE:
            print_page(write_matrix_page(found, folder))
        return
    print_summary(found, folder, file)
    if file == HEATMAP_FILE:
        print_page(write_page(found, folder))


def add_configuration(parser: argparse.ArgumentParser, text: str, *, optional: bool = False) -> None:
    """The configuration's file, and settings that replace the file's."""
    if optional:
        parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help=text)
    else:
        parser.add_argument("config", metavar="CONFIG.yaml", help=text)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Two tasks of a run of more."""
    text = "two tasks of a run of more than two, in the order of the configuration"
    parser.add_argument("--pair", nargs=2, metavar=("A", "B"), help=text)


def add_model_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """A model, and how it is loaded."""
    text = "hub id, model directory or .gguf file"
    if optional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{text} (default: the demo's model)")
    else:
        parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float64, bfloat16 or float16 (default: auto)")
    parser.add_argument("--attn-implementation", help="eager, sdpa, ... (default: what transformers chooses)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def positive_float(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return number

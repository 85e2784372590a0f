"""``qkov push``: a finished run on the Hugging Face hub, with a card that says what it found and how to load it."""

from __future__ import annotations

import argparse

from qkov_dist.report.upload import REPO_TYPES, Target, push

from .arguments import say

EXAMPLE = "qkov push runs/demo my-name/heatmap-of-smollm2 --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, where it goes, and whether its samples go along."""
    parser.add_argument("folder", metavar="DIR", help="the run's output folder with heatmap.h5, or a heatmap's file")
    parser.add_argument("repo_id", metavar="HUB_ID", help="repository, made where there is none: name/repository")
    parser.add_argument("--repo-type", choices=REPO_TYPES, default="dataset", help="its type (default: %(default)s)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="upload to this branch, made where there is none")
    parser.add_argument(
        "--samples",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="upload the samples' texts, and paths as they are, in heatmap.h5 and the page; by default a copy without",
    )


def execute(options: argparse.Namespace) -> None:
    """Upload it, and say where it is."""
    if options.quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    if options.samples:
        say("warning: heatmap.h5 and report.html hold the texts of samples, and paths of this machine")
    target = Target(options.repo_id, options.repo_type, options.revision, options.private)
    print(f"uploaded: {push(options.folder, target, say, with_texts=options.samples)}")

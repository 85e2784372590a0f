"""``qkov check``: are the scores of this model right?"""

from __future__ import annotations

import argparse

from .arguments import add_model_arguments, model_config, positive, say

EXAMPLE = "qkov check ./my-model --layers 0,15,29"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, and how much of it to measure."""
    add_model_arguments(parser)
    parser.add_argument("--samples", type=positive, default=4, help="samples of each task (default: 4)")
    parser.add_argument("--max-tokens", type=positive, default=48, help="tokens of a sample at most (default: 48)")
    parser.add_argument("--layers", help="layers to score, such as 0-3,7 (default: the first, middle and last)")


def execute(options: argparse.Namespace) -> None:
    """Measure the six properties."""
    config = model_config(options)
    from qkov_dist.verification.check import check

    check(config, samples=options.samples, max_tokens=options.max_tokens, layers=options.layers, say=say)

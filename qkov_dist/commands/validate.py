"""``qkov validate``: do scores predict what a step on one task does to the other?"""

from __future__ import annotations

import argparse

from .arguments import add_model_arguments, model_config, positive, positive_float, say

EXAMPLE = "qkov validate ./my-model --heads 40"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, two tasks, and how much of them to measure."""
    add_model_arguments(parser, optional=True)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--task-a", default="builtin:arithmetic", help="whose loss is measured (default: %(default)s)")
    parser.add_argument("--task-b", default="builtin:python", help="whose step is taken (default: %(default)s)")
    parser.add_argument("--samples", type=positive, default=8, help="samples of each task (default: 8)")
    parser.add_argument("--max-tokens", type=positive, default=48, help="tokens of a sample at most (default: 48)")
    parser.add_argument("--heads", type=positive, default=40, help="heads, spread over blocks and layers (default: 40)")
    parser.add_argument(
        "--step", type=positive_float, nargs="+", default=[0.1, 1.0], help="step sizes (default: 0.1 1)"
    )
    parser.add_argument("--bootstrap", type=positive, default=1000, help="resamples of heads (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of heads and the resamples (default: 0)")
    parser.add_argument("--output", metavar="FILE.json", help="write all numbers here")


def execute(options: argparse.Namespace) -> None:
    """Measure what the scores predict."""
    from .demo import demo_model

    if options.model is None:
        options.model = str(demo_model())
    config = model_config(options)
    from qkov_dist.console import Console
    from qkov_dist.verification.validate import validate

    validate(
        config,
        tasks=(options.task_a, options.task_b),
        samples=options.samples,
        max_tokens=options.max_tokens,
        heads=options.heads,
        steps=options.step,
        bootstrap=options.bootstrap,
        seed=options.seed,
        output=options.output,
        console=Console.of(say, show_progress=not options.quiet),
    )

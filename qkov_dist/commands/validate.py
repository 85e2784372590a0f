"""``qkov validate``: do effects and scores predict what steps on one task do to the other? Does freezing help?"""

from __future__ import annotations

import argparse

from .arguments import add_model_arguments, model_config, positive, positive_float, say

EXAMPLE = "qkov validate ./my-model --task-a math.jsonl --task-b code.jsonl --freeze 0.1 0.25 --warmup 12"
SIZES = {"sgd": (0.1, 1.0), "adam": (1e-4, 1e-3)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A model, two tasks, and how much of them to measure."""
    add_model_arguments(parser, optional=True)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--task-a", default="builtin:arithmetic", help="whose loss is measured (default: %(default)s)")
    parser.add_argument("--task-b", default="builtin:python", help="whose step is taken (default: %(default)s)")
    for task in ("a", "b"):
        parser.add_argument(
            f"--columns-{task}",
            type=_column,
            nargs="+",
            default=(),
            metavar="KEY=COLUMN",
            help=f"what it calls prompt, completion and the like, if --task-{task} names them otherwise",
        )
    parser.add_argument("--samples", type=positive, default=16, help="samples of each task (default: 16)")
    parser.add_argument("--max-tokens", type=positive, default=48, help="tokens of a sample at most (default: 48)")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="of halves and choices, the first of --seeds (default: 0)"
    )
    parser.add_argument("--output", metavar="FILE.json", help="write all numbers here")
    steps = parser.add_argument_group("steps in one head (without --freeze)")
    steps.add_argument("--heads", type=positive, default=24, help="heads, spread over blocks and layers (default: 24)")
    steps.add_argument("--optimizer", choices=tuple(SIZES), default="adam", help="whose step (default: %(default)s)")
    steps.add_argument(
        "--sizes", type=positive_float, nargs="+", help="step sizes (default: 1e-4 1e-3 for adam, 0.1 1 for sgd)"
    )
    steps.add_argument("--bootstrap", type=positive, default=1000, help="resamples of heads (default: 1000)")
    training = parser.add_argument_group("training with heads frozen")
    training.add_argument(
        "--freeze",
        type=_share,
        nargs="+",
        metavar="SHARE",
        help="shares of all heads to freeze, each by every criterion",
    )
    training.add_argument("--steps", type=positive, default=12, help="AdamW steps on B (default: 12)")
    training.add_argument("--warmup", type=_count, default=0, help="AdamW steps on A before (default: 0)")
    training.add_argument("--learning-rate", type=positive_float, default=3e-4, help="of AdamW (default: 3e-4)")
    training.add_argument("--batch", type=positive, default=4, help="samples a step (default: 4)")
    training.add_argument("--seeds", type=positive, default=5, help="how many seeds (default: 5)")
    training.add_argument("--random", type=_count, default=2, help="random choices with each seed (default: 2)")


def _column(text: str) -> tuple[str, str]:
    key, equals, column = text.partition("=")
    if not key or not equals or not column:
        raise argparse.ArgumentTypeError(f"expected KEY=COLUMN, such as prompt=question, got {text}")
    return key, column


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text}")
    return number


_seed = _count


def execute(options: argparse.Namespace) -> None:
    """Measure what effects and scores predict, or what freezing does."""
    from .demo import demo_model

    if options.model is None:
        options.model = str(demo_model())
    config = model_config(options)
    from qkov_dist.console import Console
    from qkov_dist.verification.validate import Question, validate

    console = Console.of(say, show_progress=not options.quiet)
    tasks = (options.task_a, options.task_b)
    columns = (dict(options.columns_a) or None, dict(options.columns_b) or None)
    question = Question(tasks, columns, options.samples, options.max_tokens, options.seed, options.output)
    if options.freeze:
        _freeze(options, config, question, console)
        return
    validate(
        config,
        question,
        heads=options.heads,
        optimizer=options.optimizer,
        sizes=options.sizes or SIZES[options.optimizer],
        bootstrap=options.bootstrap,
        console=console,
    )


def _freeze(options: argparse.Namespace, config: object, question: object, console: object) -> None:
    from qkov_dist.verification.freezing import FreezingPlan
    from qkov_dist.verification.trajectories import Training
    from qkov_dist.verification.validate import validate_freezing

    plan = FreezingPlan(
        Training(options.steps, options.learning_rate, options.batch),
        options.warmup,
        tuple(dict.fromkeys(options.freeze)),
        options.random,
    )
    validate_freezing(config, question, plan, num_seeds=options.seeds, console=console)  # type: ignore[arg-type]

"""The command line: parse, call, exit code. 0 for success, 2 for the user's error, 1 for ours."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from .errors import QkovError

if TYPE_CHECKING:
    from .config import ModelConfig

    Commands = argparse._SubParsersAction["_Parser"]

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qkov`` with the given arguments (those of the process by default); returns the exit code."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if unknown := [word for word in more if options.name != "run" or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = [*getattr(options, "overrides", []), *more]  # argparse stops at an option between them
    if not options.debug:
        warnings.simplefilter("ignore")
    try:
        options.command(options)
    except QkovError as error:
        if options.debug:
            raise
        print(f"qkov: {_this_rank()}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qkov: interrupted; the same command goes on from the layers on disk", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:  # ours: say so, and how to see more
        if options.debug:
            raise
        print(
            f"qkov: {_this_rank()}internal error: {type(error).__name__}: {error}. Run again with --debug.",
            file=sys.stderr,
        )
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    from .comm import connected
    from .config import describe
    from .config_file import load_config
    from .report import write_page
    from .run import run
    from .summary import print_page, print_summary

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
        heatmap = run(config, say=_say, show_progress=not options.quiet)
    if heatmap is not None:
        print_summary(heatmap, config.output.dir)
        print_page(write_page(heatmap, config.output.dir))


def _demo(options: argparse.Namespace) -> None:
    from .comm import connected
    from .demo import demo_config
    from .report import write_page
    from .run import run
    from .summary import print_page, print_summary

    config = demo_config(
        model=options.model, samples=options.samples, max_tokens=options.max_tokens, output=options.output
    )
    with connected():
        heatmap = run(config, say=_say, show_progress=not options.quiet)
    if heatmap is not None:
        print_summary(heatmap, config.output.dir)
        print_page(write_page(heatmap, config.output.dir))


def _merge(options: argparse.Namespace) -> None:
    from pathlib import Path

    from .comm import SharedError, connected_by_mpi
    from .merge_command import merge_folder
    from .run import HEATMAP_FILE
    from .summary import print_summary

    output = Path(options.output or Path(options.folder) / HEATMAP_FILE)
    try:
        with connected_by_mpi() as world:
            heatmap = merge_folder(options.folder, output, world=world, say=_say, show_progress=not options.quiet)
    except SharedError:
        if world.rank:
            sys.exit(2)  # rank 0 says what is wrong
        raise
    if heatmap is not None:
        print_summary(heatmap, output.parent, output.name)


def _inspect(options: argparse.Namespace) -> None:
    from .inspection import inspect_model

    inspect_model(_model_config(options), verify=options.verify)


def _check(options: argparse.Namespace) -> None:
    from .check_command import check

    check(
        _model_config(options),
        samples=options.samples,
        max_tokens=options.max_tokens,
        layers=options.layers,
        say=_say,
    )


def _stats(options: argparse.Namespace) -> None:
    from pathlib import Path

    from .stats_command import stats

    names = ("n_permutations", "n_bootstrap", "fdr_alpha", "seed", "statistic", "alternative")
    chosen = {name: getattr(options, name) for name in names}
    stats(Path(options.folder), {name: value for name, value in chosen.items() if value is not None}, _say)


def _report(options: argparse.Namespace) -> None:
    from .report import write_report
    from .summary import print_page

    print_page(write_report(options.folder, _say))


def _validate(options: argparse.Namespace) -> None:
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
        say=_say,
        show_progress=not options.quiet,
    )


def _model_config(options: argparse.Namespace) -> ModelConfig:
    from .config import ModelConfig

    return ModelConfig(
        path=options.model,
        revision=options.revision,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
    )


def _this_rank() -> str:
    """Which rank speaks, where several were started and the error does not say so itself."""
    return f"rank {os.environ['RANK']}: " if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _say(line: str) -> None:
    print(f"qkov: {line}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Errors in the project's own form."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. See `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qkov",
        description="Which attention heads, in which projection (Q, K, V, O), two tasks fight over.",
        epilog="example: qkov demo",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # some launchers insist on it
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_run(commands)
    _add_demo(commands)
    _add_merge(commands)
    _add_inspect(commands)
    _add_check(commands)
    _add_stats(commands)
    _add_validate(commands)
    _add_report(commands)
    return parser


def _add(commands: Commands, name: str, command: Command, text: str, example: str) -> _Parser:
    parser = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    parser.set_defaults(command=command)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    return parser


def _add_run(commands: Commands) -> None:
    parser = _add(
        commands,
        "run",
        _run,
        "Score two tasks as a configuration says; write heatmap.h5.",
        "qkov run configs/laptop.yaml metric.layers=0-3 output.dir=runs/first",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--keys", action="store_true", help="list every setting with its default and meaning")


def _add_demo(commands: Commands) -> None:
    parser = _add(
        commands,
        "demo",
        _demo,
        "Score arithmetic against Python code on SmolLM2-135M, a model that comes as a package.",
        "qkov demo --samples 8 --output runs/demo",
    )
    parser.add_argument("--model", help="another model: hub id, directory or .gguf file")
    parser.add_argument("--samples", type=_positive, default=24, help="samples of each task (default: 24)")
    parser.add_argument("--max-tokens", type=_positive, default=96, help="tokens of a sample at most (default: 96)")
    parser.add_argument("--output", default="runs/demo", help="output folder (default: runs/demo)")


def _add_merge(commands: Commands) -> None:
    parser = _add(
        commands,
        "merge",
        _merge,
        "Add up the partial files of a finished run, alone or under mpirun; write heatmap.h5.",
        "mpirun -n 4 qkov merge runs/first --output first.h5",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of `qkov run` with output.partials=true")
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: DIR/heatmap.h5)")


def _add_inspect(commands: Commands) -> None:
    parser = _add(
        commands,
        "inspect",
        _inspect,
        "Show where each head of a model lives, from its configuration alone.",
        "qkov inspect HuggingFaceTB/SmolLM2-135M --verify",
    )
    _add_model_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="load the weights and prove every head by perturbation")


def _add_check(commands: Commands) -> None:
    parser = _add(
        commands,
        "check",
        _check,
        "Prove on a model of yours that its scores are right: six properties, with the deviation measured of each.",
        "qkov check ./my-model --layers 0,15,29",
    )
    _add_model_arguments(parser)
    parser.add_argument("--samples", type=_positive, default=4, help="samples of each task (default: 4)")
    parser.add_argument("--max-tokens", type=_positive, default=48, help="tokens of a sample at most (default: 48)")
    parser.add_argument("--layers", help="layers to score, such as 0-3,7 (default: the first, middle and last)")


def _add_stats(commands: Commands) -> None:
    parser = _add(
        commands,
        "stats",
        _stats,
        "Test a finished run again with other settings; what is not given stays as in the last test.",
        "qkov stats runs/demo --permutations 5400 --statistic cross_mean",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of the run")
    parser.add_argument("--permutations", dest="n_permutations", type=int, metavar="K", help="relabellings")
    parser.add_argument("--bootstrap", dest="n_bootstrap", type=int, metavar="B", help="resamples; 0: no intervals")
    parser.add_argument("--alpha", dest="fdr_alpha", type=float, help="level of the false discovery rate")
    parser.add_argument("--seed", type=int, help="of relabellings and resamples")
    parser.add_argument("--statistic", choices=("overlap", "cross_mean"), help="which one decides what is significant")
    parser.add_argument("--alternative", choices=("greater", "less", "two-sided"), help="direction of the test")


def _add_report(commands: Commands) -> None:
    parser = _add(
        commands,
        "report",
        _report,
        "Write the report of a finished run: report.html, and in report/ figures (PDF, PNG), tables (CSV, Markdown).",
        "qkov report runs/demo",
    )
    parser.add_argument("folder", metavar="DIR", help="the run's output folder, with heatmap.h5")


def _add_validate(commands: Commands) -> None:
    parser = _add(
        commands,
        "validate",
        _validate,
        "Measure whether scores predict what a gradient step on task B, in one head alone, does to task A's loss.",
        "qkov validate ./my-model --heads 40",
    )
    _add_model_arguments(parser, optional=True)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--task-a", default="builtin:arithmetic", help="whose loss is measured (default: %(default)s)")
    parser.add_argument("--task-b", default="builtin:python", help="whose step is taken (default: %(default)s)")
    parser.add_argument("--samples", type=_positive, default=8, help="samples of each task (default: 8)")
    parser.add_argument("--max-tokens", type=_positive, default=48, help="tokens of a sample at most (default: 48)")
    parser.add_argument(
        "--heads", type=_positive, default=40, help="heads, spread over blocks and layers (default: 40)"
    )
    parser.add_argument(
        "--step", type=_positive_float, nargs="+", default=[0.1, 1.0], help="step sizes (default: 0.1 1)"
    )
    parser.add_argument("--bootstrap", type=_positive, default=1000, help="resamples of heads (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of heads and the resamples (default: 0)")
    parser.add_argument("--output", metavar="FILE.json", help="write all numbers here")


def _add_model_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    text = "hub id, model directory or .gguf file"
    if optional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{text} (default: the demo's model)")
    else:
        parser.add_argument("model", metavar="MODEL", help=text)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", default="auto", help="auto, float32, float64, bfloat16 or float16 (default: auto)")
    parser.add_argument("--attn-implementation", help="eager, sdpa, ... (default: what transformers chooses)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def _positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return number

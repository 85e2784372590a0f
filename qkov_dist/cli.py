"""The command line: parse, call, exit code. 0 for success, 2 for the user's error, 1 for ours."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from . import commands
from .disk import disk_errors
from .errors import QkovError
from .launcher import launched_size

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction["_Parser"]

Command = Callable[[argparse.Namespace], None]

CONFIGURED = ("run", "plan")  # commands that take section.key=value anywhere on the line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qkov`` with the given arguments (those of the process by default); returns the exit code."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if unknown := [word for word in more if options.name not in CONFIGURED or word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = [*getattr(options, "overrides", []), *more]  # argparse stops at an option between them
    if not options.debug:
        warnings.simplefilter("ignore")
    try:
        launched_size(os.environ)
        with disk_errors():
            options.command(options)
    except QkovError as error:
        if options.debug:
            traceback.print_exc()
        print(f"qkov: {_this_rank()}{error}", file=sys.stderr)
        return error.exit_code
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


def _this_rank() -> str:
    """Which rank speaks, where several were started and the error does not say so itself."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
    return f"rank {rank}: " if rank.isdecimal() and size.isdecimal() and size != "1" else ""


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
    group = parser.add_subparsers(dest="name", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_run(group)
    _add_demo(group)
    _add_plan(group)
    _add_merge(group)
    _add_inspect(group)
    _add_check(group)
    _add_stats(group)
    _add_validate(group)
    _add_report(group)
    return parser


def _add(group: Commands, name: str, command: Command, text: str, example: str) -> _Parser:
    parser = group.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    parser.set_defaults(command=command)
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    return parser


def _add_run(group: Commands) -> None:
    parser = _add(
        group,
        "run",
        commands.run_command,
        "Score two tasks as a configuration says; write heatmap.h5.",
        "qkov run configs/laptop.yaml metric.layers=0-3 output.dir=runs/first",
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--keys", action="store_true", help="list every setting with its default and meaning")


def _add_demo(group: Commands) -> None:
    parser = _add(
        group,
        "demo",
        commands.demo_command,
        "Score arithmetic against Python code on SmolLM2-135M, a model that comes as a package.",
        "qkov demo --samples 8 --output runs/demo",
    )
    parser.add_argument("--model", help="another model: hub id, directory or .gguf file")
    parser.add_argument("--samples", type=_positive, default=24, help="samples of each task (default: 24)")
    parser.add_argument("--max-tokens", type=_positive, default=96, help="tokens of a sample at most (default: 96)")
    parser.add_argument("--output", default="runs/demo", help="output folder (default: runs/demo)")


def _add_plan(group: Commands) -> None:
    parser = _add(
        group,
        "plan",
        commands.plan_command,
        "Show what a run would hold, send and compute on each rank, and how long it should take; no weights are read.",
        "qkov plan configs/node8.yaml model.path=configs/models/llama-3-70b.json --world-size 8 --hardware H100",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration; model.path may be a JSON of a few facts")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--world-size", type=_positive, metavar="N", help="ranks (default: parallel.tp)")
    parser.add_argument(
        "--hardware", metavar="NAME", help="A100-40, A100-80, H100, H200, MI300X, L40S or cpu (measured)"
    )
    parser.add_argument("--gpu-memory", type=_positive_float, metavar="GiB", help="of each GPU")
    parser.add_argument("--host-memory", type=_positive_float, metavar="GiB", help="of a node beside its GPUs")
    parser.add_argument("--ranks-per-node", type=_positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--samples", type=_positive, metavar="N", help="samples of each task, instead of reading them")
    parser.add_argument("--tokens", type=_positive, metavar="N", help="tokens of each sample")
    parser.add_argument("--json", action="store_true", help="print the numbers of every rank")


def _add_merge(group: Commands) -> None:
    parser = _add(
        group,
        "merge",
        commands.merge_command,
        "Add up the partial files of a finished run, alone or under mpirun; write heatmap.h5.",
        "mpirun -n 4 qkov merge runs/first --output first.h5",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of `qkov run` with output.partials=true")
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: DIR/heatmap.h5)")
    parser.add_argument(
        "--tests",
        choices=("run", "keep"),
        help="where the file holds tests with other settings than the run's (`qkov stats`): test as the run says, or "
        "keep those settings (default: refuse)",
    )


def _add_inspect(group: Commands) -> None:
    parser = _add(
        group,
        "inspect",
        commands.inspect_command,
        "Show where each head of a model lives, from its configuration alone.",
        "qkov inspect HuggingFaceTB/SmolLM2-135M --verify",
    )
    _add_model_arguments(parser)
    parser.add_argument("--verify", action="store_true", help="load the weights and prove every head by perturbation")


def _add_check(group: Commands) -> None:
    parser = _add(
        group,
        "check",
        commands.check_command,
        "Prove on a model of yours that its scores are right: six properties, with the deviation measured of each.",
        "qkov check ./my-model --layers 0,15,29",
    )
    _add_model_arguments(parser)
    parser.add_argument("--samples", type=_positive, default=4, help="samples of each task (default: 4)")
    parser.add_argument("--max-tokens", type=_positive, default=48, help="tokens of a sample at most (default: 48)")
    parser.add_argument("--layers", help="layers to score, such as 0-3,7 (default: the first, middle and last)")


def _add_stats(group: Commands) -> None:
    parser = _add(
        group,
        "stats",
        commands.stats_command,
        "Test a finished run again with other settings; what is not given stays as in the last test.",
        "qkov stats runs/demo --permutations 5400 --statistic cross_mean",
    )
    parser.add_argument("folder", metavar="DIR", help="output folder of the run, or heatmap.h5 in it")
    parser.add_argument("--permutations", dest="n_permutations", type=int, metavar="K", help="relabellings")
    parser.add_argument("--bootstrap", help=argparse.SUPPRESS)  # given up: says what took its place
    parser.add_argument("--confidence", type=float, help="of intervals, and of the null's band")
    parser.add_argument("--alpha", dest="fdr_alpha", type=float, help="level of the false discovery rate")
    parser.add_argument("--seed", type=int, help="of relabellings")
    parser.add_argument("--statistic", choices=("overlap", "cross_mean"), help="which one decides what is significant")
    parser.add_argument("--alternative", choices=("greater", "less", "two-sided"), help="direction of the test")
    parser.add_argument("--output", metavar="FILE", help="write here and leave DIR/heatmap.h5 as it is")


def _add_report(group: Commands) -> None:
    parser = _add(
        group,
        "report",
        commands.report_command,
        "Write the report of a finished run: report.html, and in report/ figures (PDF, PNG), tables (CSV, Markdown).",
        "qkov report runs/demo",
    )
    parser.add_argument("folder", metavar="DIR", help="the run's output folder with heatmap.h5, or a heatmap's file")


def _add_validate(group: Commands) -> None:
    parser = _add(
        group,
        "validate",
        commands.validate_command,
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

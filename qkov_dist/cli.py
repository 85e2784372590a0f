"""The command line: parse, call, exit code. 0 for success, 2 for the user's error, 1 for ours."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from .commands.arguments import _Parser
from .commands.check import _add_check
from .commands.demo import _add_demo
from .commands.inspect import _add_inspect
from .commands.merge import _add_merge
from .commands.plan import _add_plan
from .commands.report import _add_report
from .commands.run import _add_run
from .commands.stats import _add_stats
from .commands.validate import _add_validate
from .distributed.launchers import launched_size
from .errors import QkovError
from .results.disk import disk_errors

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

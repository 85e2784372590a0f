"""The command line: parse, call, exit code. 0 for success, 2 for the user's error, 1 for ours.

Modules of commands are loaded when they are chosen, and what a command needs when it starts to work: help, versions,
keys and refusals wait for neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from .commands.parser import CommandParser, Parser
from .distributed.launchers import launched_size
from .errors import QkovError
from .results.disk import disk_errors

COMMANDS = {  # in the order of the help; each is a module of the room ``commands``
    "run": "Score two tasks as a configuration says; write heatmap.h5.",
    "demo": "Score arithmetic against Python code on SmolLM2-135M, a model that comes as a package.",
    "plan": "Show what a run would hold, send and compute on each rank, and how long it should take; no weights are "
    "read.",
    "merge": "Add up the partial files of a finished run, alone or under mpirun; write heatmap.h5.",
    "inspect": "Show where each head of a model lives, from its configuration alone.",
    "check": "Prove on a model of yours that its scores are right: six properties, with the deviation measured of "
    "each.",
    "stats": "Test a finished run again with other settings; what is not given stays as in the last test.",
    "validate": "Measure whether effects and scores predict what a step on task B does to task A's loss; with "
    "--freeze, whether freezing the heads that they put first spares A.",
    "heads": "List the heads of a finished run, most harmful first, with the exact rows or columns of each.",
    "compare": "Compare runs of one layout (checkpoints, seeds, scores, data): which heads moved, and whether the runs "
    "rank heads alike.",
    "report": "Write the report of a finished run: report.html, and in report/ figures (PDF, PNG), tables (CSV, "
    "Markdown).",
    "push": "Upload a finished run to the Hugging Face hub with a card; without the samples' texts unless asked.",
}
SHELLS = ("bash", "zsh", "tcsh", "fish")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``qkov`` with the given arguments (those of the process by default); returns the exit code."""
    parser, commands = make_parser()
    if "_ARGCOMPLETE" in os.environ:
        from .commands.completion import complete

        complete(parser, commands.values())  # answers the shell, and ends the process
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, more = parser.parse_known_args(words)
    if options.name is None or options.version or options.print_completion:
        return _without_command(parser, options, more)
    _take_overrides(commands[options.name], options, more, words)
    return _exit_code(options)


def make_parser() -> tuple[Parser, dict[str, CommandParser]]:
    """The parser, and those of the commands by name."""
    parser = Parser(
        prog="qkov",
        description="Which attention heads, in which projection (Q, K, V, O), two tasks fight over.",
        epilog="example: qkov demo",
    )
    parser.add_argument("--version", action="store_true", help="print the versions of qkov-dist and what it stands on")
    parser.add_argument(
        "--print-completion", choices=SHELLS, help="print what a shell evaluates to complete commands, options and keys"
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # some launchers insist on it
    group = parser.add_subparsers(dest="name", metavar="COMMAND", title="commands", parser_class=CommandParser)
    commands = {name: group.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for name, command in commands.items():
        command.module = f"{__package__}.commands.{name}"
    return parser, commands


def _without_command(parser: Parser, options: argparse.Namespace, more: Sequence[str]) -> int:
    if more:
        from .commands.keys import unknown_flags

        parser.error(unknown_flags(more, more, parser.flags, with_keys=False))
    if options.version:
        from .commands.version import version

        print(version())
    elif options.print_completion:
        from .commands.completion import shell_code

        print(shell_code(options.print_completion))
    else:
        parser.print_help()
    return 0


def _take_overrides(
    command: CommandParser, options: argparse.Namespace, more: Sequence[str], words: Sequence[str]
) -> None:
    """Where a command takes ``section.key=value``, it does so anywhere on the line; argparse stops at an option."""
    with_keys = hasattr(options, "overrides")
    unknown = [word for word in more if not with_keys or word.startswith("-")]
    if unknown:
        from .commands.keys import unknown_flags

        command.error(unknown_flags(unknown, words, command.flags, with_keys=with_keys))
    if with_keys:
        options.overrides = [*options.overrides, *more]


def _exit_code(options: argparse.Namespace) -> int:
    """Call the command; errors become a message and an exit code."""
    if not options.debug:
        warnings.simplefilter("ignore")
    try:
        launched_size(os.environ)
        with disk_errors():
            options.execute(options)
    except QkovError as error:
        if options.debug:
            traceback.print_exc()
        print(f"qkov: {_from_this_rank(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("qkov: interrupted; the same command goes on from the layers on disk", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:  # ours: say so, and how to see more
        if options.debug:
            raise
        said = f"internal error: {type(error).__name__}: {error}. Run again with --debug."
        print(f"qkov: {_from_this_rank(said)}", file=sys.stderr)
        return 1
    return 0


def _from_this_rank(message: str) -> str:
    """The message with the rank that speaks, where several were started and it does not begin with that rank itself."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "1")
    speaker = f"rank {rank}: " if rank.isdecimal() and size.isdecimal() and size != "1" else ""
    return message if message.startswith(speaker) else speaker + message

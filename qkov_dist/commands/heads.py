"""``qkov heads``: the heads of a finished run, most harmful first, and the exact rows or columns of each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qkov_dist.errors import QkovError
from qkov_dist.results.criteria import CRITERIA
from qkov_dist.results.disk import file_errors
from qkov_dist.results.heatmap import Heatmap
from qkov_dist.results.heatmap_file import load_heatmap
from qkov_dist.results.selection import Selection, as_text

from .arguments import add_pair, positive, positive_float, say

EXAMPLE = "qkov heads runs/demo --by change_adam --top 20"
FORMATS = ("table", "json", "csv", "peft")
CHOICES = ("by", "harms", "optimizer", "step", "top", "share", "significant", "blocks")  # arguments of heatmap.select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, by what its heads are ranked, how many, and in which form."""
    parser.add_argument("folder", metavar="DIR", help="output folder of the run, or its heatmap's file")
    add_pair(parser)
    parser.add_argument("--by", choices=CRITERIA, default="change_adam", help="rank by this (default: %(default)s)")
    parser.add_argument(
        "--step", type=positive_float, metavar="S", help="for harm: learning rate times number of steps"
    )
    parser.add_argument(
        "--harms", type=str.upper, choices=("A", "B"), default="A", help="for harm, curvature: whose loss (default: A)"
    )
    parser.add_argument("--optimizer", choices=("sgd", "adam"), help="for harm, curvature (default: adam)")
    number = parser.add_mutually_exclusive_group()
    number.add_argument("--top", type=positive, metavar="N", help="take this many heads")
    number.add_argument("--share", type=float, metavar="F", help="take this part of all heads, such as 0.25")
    number.add_argument(
        "--significant", action="store_true", help="take those with q at or below the run's level, where harm is"
    )
    parser.add_argument("--blocks", metavar="Q,K", help="choose from these blocks alone")
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed (default: table)")
    parser.add_argument("--output", metavar="FILE", help="write it here in place of printing it")


def execute(options: argparse.Namespace) -> None:
    """Rank, choose, print."""
    heatmap = load_heatmap(options.folder, options.pair and tuple(options.pair))
    chosen = {name: getattr(options, name) for name in CHOICES}
    try:
        selection = heatmap.select(**chosen)
    except QkovError as error:
        raise _as_option(error) from error
    text = _formatted(options, heatmap, selection)
    if options.output is None:
        print(text)
        return
    path = Path(options.output)
    with file_errors(path, OSError):
        path.write_text(f"{text}\n", encoding="utf-8")
    say(f"{len(selection)} heads written to {path}")


def _formatted(options: argparse.Namespace, heatmap: Heatmap, selection: Selection) -> str:
    if options.format == "json":
        return as_text(selection.to_json())
    if options.format == "csv":
        return as_csv(selection)
    if options.format == "peft":
        return as_peft(selection, heatmap, options)
    return "\n".join([*_above(heatmap, selection), "", str(selection)])


def _above(heatmap: Heatmap, selection: Selection) -> list[str]:
    """What the table is of; for harm, what the step does through attention as a whole."""
    num = sum(int(heatmap.present[block].sum()) for block in selection.settings["blocks"])
    lines = [f"{len(selection)} of {num} heads by {selection.by}, most harmful first; A is {heatmap.task_a!r}, "]
    lines[0] += f"B is {heatmap.task_b!r}"
    if selection.by == "harm":
        harm = heatmap.harm(selection.settings["step"], selection.settings["optimizer"], selection.settings["harms"])
        total, whose = harm.total, harm.harmed.upper()
        lines.append(
            f"all heads together change {whose}'s loss by {total['value']:.3g} "
            f"[{total['ci_low']:.3g}, {total['ci_high']:.3g}] at this step: first order {total['first']:.3g}, second "
            f"{total['second']:.3g}"
        )
        where = "decides: near" if harm.near_optimum else "is the smaller: far from"
        lines.append(f"the second order {where} {whose}'s optimum; it overtakes at a step of {total['overtakes']:.3g}")
    return lines


def as_csv(selection: Selection) -> str:
    """One row for each rectangle of a head."""
    from qkov_dist.report.table import Table

    columns = ("block", "layer", "head", selection.by, "q_value", "parameter", "axis", "start", "stop")
    rows: list[tuple[str | int | float | None, ...]] = []
    for head in selection.heads:
        known = (head.block, head.layer, head.head, head.value, head.q_value)
        rows += [(*known, p.parameter, p.axis, p.start, p.stop) for p in head.ranges]
        rows += [] if head.ranges else [(*known, None, None, None, None)]
    return Table("heads", columns, tuple(rows)).to_csv().rstrip("\n")


PEFT = """\
# {num} heads by {by}, in {num_modules} of {num_all} attention modules.
from peft import LoraConfig, get_peft_model
from qkov_dist import freeze_heads, load_heatmap

selection = load_heatmap({folder}).select({arguments})
kinds = {kinds}
selected = {selected}

# LoRA adapts whole modules and cannot leave out single heads. Either adapt all, and hold the selected heads:
model = get_peft_model(model, LoraConfig(target_modules=kinds))
with freeze_heads(model, selection):
    ...  # train

# or, with PEFT alone, leave out every module that has a selected head ({num_free} of {num_all} are left):
# LoraConfig(target_modules=kinds, exclude_modules=selected)
# or adapt these modules and no others:
# LoraConfig(target_modules=selected)"""


def as_peft(selection: Selection, heatmap: Heatmap, options: argparse.Namespace) -> str:
    """The lines of Python with which PEFT adapts a model around the selected heads."""
    selection.check_ranges()
    selected = _modules(piece.parameter for head in selection.heads for piece in head.ranges)
    every = _modules(record["parameter"] for record in heatmap.attributes["slices"])
    given = {name: getattr(options, name) for name in CHOICES}
    usual: dict[str, Any] = {"by": None, "harms": "A", "significant": False}
    return PEFT.format(
        num=len(selection),
        by=selection.by,
        num_modules=len(selected),
        num_all=len(every),
        num_free=len(every) - len(selected),
        folder=", ".join([repr(str(options.folder)), *([repr(heatmap.pair)] if heatmap.pair else [])]),
        arguments=", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None and v != usual.get(k)),
        kinds=repr(list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in every))),  # an MLP has a c_proj too
        selected="[\n" + "".join(f"    {name!r},\n" for name in selected) + "]",
    )


def _modules(parameters: Any) -> list[str]:
    """Modules of parameters, each once."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))


def _as_option(error: QkovError) -> QkovError:
    """An error of an argument as one of the option."""
    if error.where not in CHOICES:
        return error
    return QkovError(**{**error.parts, "where": f"--{error.where}"})

"""``compare.html``: runs compared, on one self-contained page; what its script draws, and the parts that need none."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Iterable, Iterator
from typing import Any

from qkov_dist.results.block_view import HEAD_DIM
from qkov_dist.results.compared_runs import RunHeader
from qkov_dist.results.comparison import WITHOUT_RANKS, Comparison
from qkov_dist.results.comparison_data import Quantity
from qkov_dist.results.comparison_words import NAMES

from .comparison_tables import interval
from .page_frame import base64_of, page_of

STYLE = ("page.css", "compare.css")
SCRIPT = ("core.js", "sorting.js", "compare.js")
MOVE_ARRAYS = ("difference", "standard_error", "ci_low", "ci_high", "p_value", "q_value", "p_max")
HINTS = {
    "change": "First-order change of either task's loss for a unit step on the other in this head alone; above 0 is "
    "harm. It grows with the gradients' scale.",
    "relative": "Change over the root mean square of change over the block's heads: a pattern over heads, free of the "
    "gradients' scale and of the step's.",
    "overlap": "Whether both tasks use the same weights, whatever the scale of their gradients.",
    "cross_mean": "Distance of the mean score from its mean under exchanged task labels, in standard deviations.",
    "score_mean": "Mean score over pairs of different samples. It grows with the loss.",
}


def comparison_id(comparison: Comparison) -> str:
    """By which a page tells which comparison it shows: tasks and first run, hashed; runs can be added."""
    first = comparison.runs[0]
    said = "\n".join((first.run_id, first.name, *first.tasks))
    return f"compared {hashlib.sha256(said.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"


def make_comparison_page(comparison: Comparison) -> str:
    """The whole page."""
    has_trajectories = len(comparison.runs) > 2
    shown = {
        "title": html.escape(comparison.title),
        "answer": _answer(comparison.verdict),
        "runs": "".join(map(_run, comparison.runs)),
        "trajectory_link": '<a href="#trajectories">Trajectories</a> ' if has_trajectories else "",
        "trajectories": _trajectories() if has_trajectories else "",
        "ranks": _ranks(comparison),
        "ranks_hint": html.escape(_about_ranks(comparison)),
        "notes": _notes(comparison.notes),
    }
    data = comparison_data(comparison)
    return page_of("compare.html", comparison_id(comparison), STYLE, SCRIPT, data, shown)


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "shared": {},
        "runs": [run.name for run in comparison.runs],
        "layers": comparison.runs[0].layers,
        "alpha": comparison.alpha,
        "confidence": comparison.confidence,
        "quantities": [_quantity(comparison, name, of) for name, of in comparison.quantities.items()],
        "blocks": [
            {
                "name": block,
                "axis": HEAD_DIM[block].replace("_", " "),
                "heads": comparison.runs[0].natives[block],
                "values": {k: v for name, of in comparison.quantities.items() for k, v in _values(name, of, block)},
                "effects": {},
            }
            for block in comparison.blocks
        ],
    }


def _quantity(comparison: Comparison, name: str, quantity: Quantity) -> dict[str, Any]:
    is_tested = quantity.moves is not None
    return {
        "key": name,
        "label": NAMES[name],
        "hint": HINTS.get(name) or HINTS[name.partition("_")[0]],
        "isTested": is_tested,
        "how": "paired by sample" if quantity.paired else "unpaired",
        "moved": comparison.num_moved(name) if is_tested else None,
    }


def _values(name: str, quantity: Quantity, block: str) -> Iterator[tuple[str, str]]:
    """Of every head, by name: ``overlap_0`` of the first run, ``overlap_q_value`` of the test."""
    for place, of_run in enumerate(quantity.values[block]):
        yield f"{name}_{place}", base64_of(of_run, "<f4")
    if quantity.moves is not None:
        for key in MOVE_ARRAYS:
            yield f"{name}_{key}", base64_of(quantity.moves[block][key], "<f4")


def _answer(sentences: Iterable[str]) -> str:
    first, *others = (html.escape(text).replace("&lt;=", "≤") for text in sentences)
    return f'<p class="verdict">{first}</p>' + "".join(f"<p>{text}</p>" for text in others)


def _run(run: RunHeader) -> str:
    sizes = ", ".join(f"{len(table)} {task}" for table, task in zip(run.samples, run.tasks, strict=True))
    said = [f"run {run.run_id}" if run.run_id else "", str(run.model.get("path", "")), sizes]
    return f"<li>{html.escape(run.name)}<small>{html.escape(' · '.join(filter(None, said)))}</small></li>"


def _trajectories() -> str:
    return (
        '<section id="trajectories" aria-labelledby="trajectories-title"><h2 id="trajectories-title">Trajectories</h2>'
        '<p class="hint">Every head over the runs, in the order given; coloured: the eight of a block that moved most '
        "from the first run to the last, dashed where that is within errors.</p>"
        '<div class="charts" id="trajectory-charts"></div></section>'
    )


def _about_ranks(comparison: Comparison) -> str:
    return (
        f"Spearman's correlation over the native heads of a block, with {comparison.confidence:.0%} intervals: a "
        "delete-one jackknife over samples, or, where a file does not keep what samples have to do with a quantity, a "
        "bootstrap over heads."
    )


def _ranks(comparison: Comparison) -> str:
    """Quantity and two runs by block; every two runs where there are more than two."""
    num = len(comparison.runs)
    titles = ["Quantity", *(["Runs"] if num > 2 else []), *comparison.blocks, "Interval over", "Moved"]
    head = "".join(f"<th scope='col'>{html.escape(title)}</th>" for title in titles)
    rows = "".join(
        _rank_row(comparison, name, quantity, one, other)
        for name, quantity in comparison.quantities.items()
        for one in range(num)
        for other in range(one + 1, num)
        if name not in WITHOUT_RANKS or (one, other) == (0, num - 1)
    )
    return f"<table id='rank-table'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _rank_row(comparison: Comparison, name: str, quantity: Quantity, one: int, other: int) -> str:
    names, is_whole = [run.name for run in comparison.runs], (one, other) == (0, len(comparison.runs) - 1)
    cells = [NAMES[name], *([f"{names[one]}, {names[other]}"] if len(names) > 2 else [])]
    cells += [interval(quantity, block, one, other) for block in comparison.blocks]
    cells += [quantity.interval_by if name not in WITHOUT_RANKS else "-"]
    cells += ["-" if quantity.moves is None or not is_whole else f"{comparison.num_moved(name):,}"]
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def _notes(notes: Iterable[str]) -> str:
    items = "".join(f'<li class="note"><b>note</b> {html.escape(text)}</li>' for text in notes)
    return f'<ul id="warnings">{items}</ul>'

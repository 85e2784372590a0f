"""``report.html`` of many tasks: the answer, the matrix of tasks, its pairs, and heads over pairs.

Nothing of single samples is here: each pair has a page of its own beside it, ``pairs/A__B.html``. What a head shows in
every pair travels as one byte of three signs, as long as that is little; else a head's counts alone.
"""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qkov_dist.report import page_parts as parts
from qkov_dist.results.block_view import HEAD_DIM
from qkov_dist.results.matrix_data import MATRIX_KEYS, Pair
from qkov_dist.results.matrix_pairs import KINDS, PairRecord, heads_in, scope_of
from qkov_dist.results.task_matrix import TaskMatrix
from qkov_dist.results.verdict_facts import UNITS
from qkov_dist.scoring.influence_records import OPTIMIZERS

from .matrix_findings import SIGNS, families, kinds_of, said_of_pairs, task_rows, words_of
from .page_effects import action_item, prose
from .page_frame import base64_of, page_of

STYLE = ("page.css", "matrix.css")
SCRIPT = (
    "core.js",
    "matrix_values.js",
    "marks.js",
    "sorting.js",
    "heatmaps.js",
    "saving.js",
    "matrix.js",
    "matrix_pairs.js",
    "matrix_heads.js",
    "matrix_page.js",
)
MOST_CODES = 2_000_000  # bytes of what heads show in every pair
_LONGEST_TITLE = 64
_DIRECTIONS = {"harm": 1, "help": -1, "unknown": 0}


def make_matrix_page(matrix: TaskMatrix, pages: Mapping[Pair, str]) -> str:
    """The whole page.

    Args:
        matrix: Of all tasks.
        pages: Where the pages of pairs lie, relative to this one, of those that are written.
    """
    said = said_of_pairs(matrix)
    shown = {
        "title": html.escape(_title(matrix)),
        "answer": _answer(matrix),
        "facts": _facts(matrix),
        "tasks": _tasks(matrix),
        "families": "".join(f'<p class="hint">{prose(text)}</p>' for text in families(matrix)),
        "count": parts.count_of(sum(kind == "warning" for kind, _ in said)),
        "warnings": parts.warning_list(said),
        "provenance": parts.provenance_of(matrix.attributes, {}),
    }
    return page_of("matrix.html", matrix.run_id, STYLE, SCRIPT, matrix_data(matrix, pages), shown)


def _title(matrix: TaskMatrix) -> str:
    named = " × ".join(matrix.tasks)
    return named if len(named) <= _LONGEST_TITLE else f"{len(matrix.tasks)} tasks"


def _answer(matrix: TaskMatrix) -> str:
    """The verdict and what to do next; nothing where effects are not known."""
    verdict = matrix.verdict
    if verdict is None:
        return ""
    first, *others = verdict.sentences
    return (
        f'<section id="answer" class="{verdict.direction}" aria-labelledby="answer-title">'
        '<div class="said"><h2 id="answer-title">Which tasks hurt each other, and which can be trained together?</h2>'
        f'<p class="verdict">{prose(first)}</p>{"".join(map(_paragraph, others))}</div>'
        f'<div class="next"><h3>What to do next</h3><ol>{"".join(map(action_item, verdict.actions))}</ol></div>'
        '<div class="more-said"><details><summary>What the numbers are, and how sure they are</summary><ul>'
        f"{''.join(f'<li>{prose(text)}</li>' for text in verdict.details)}</ul></details></div></section>"
    )


def _paragraph(text: str) -> str:
    """A sentence of the answer; what it is about, before its colon, stands out."""
    lead, colon, rest = text.partition(":")
    return f'<p><span class="lead">{prose(lead)}{colon}</span>{prose(rest)}</p>'


def _facts(matrix: TaskMatrix) -> str:
    present = sum(int(mask.sum()) for mask in matrix.present.values())
    layers, heads, kv_heads = len(matrix.layers), len(matrix.heads), len(matrix.kv_heads)
    model, _, samples = matrix.title.rpartition(": ")
    found = {
        "Model": model or "not said",
        "Tasks": samples,
        "Scored": f"{layers} layers × {heads} heads ({kv_heads} kv heads); {present:,} in {len(matrix.blocks)} blocks",
        "Pairs": f"{len(matrix.pairs):,}",
    }
    return "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in found.items())


def _tasks(matrix: TaskMatrix) -> str:
    """The table of tasks, which needs no script."""
    kinds = [kind for kind in kinds_of(matrix) if kind != OPTIMIZERS[0]]
    titles = ["Task", "Samples", "Mean loss"]
    has_effects = matrix.verdict is not None
    titles += ["Pairs that hurt", "Pairs that help", "Not known"] if has_effects else []
    titles += [
        f"Heads {word}" if kind == KINDS[-1] else f"Heads in {word}"
        for kind in kinds
        for word in words_of(matrix, kind)
    ]
    rows = []
    for row in task_rows(matrix):
        cells = [row.task, str(row.num_samples), f"{row.loss:.4g}"]
        cells += map(str, row.pairs) if has_effects else ()
        cells += [f"{count:,}" for kind in kinds for count in row.heads[kind]]
        rows.append([(cell,) for cell in cells])
    return parts.table("tasks-table", titles, rows)


def matrix_data(matrix: TaskMatrix, pages: Mapping[Pair, str]) -> dict[str, Any]:
    """What the page's script draws."""
    records = matrix.records
    kinds = kinds_of(matrix)
    return {
        "score": str(matrix.attributes.get("score", "score")),
        "title": matrix.title,
        "file": f"{len(matrix.tasks)}-tasks",
        "tasks": matrix.tasks,
        "order": matrix.order,
        "level": records[0].level,
        "unit": UNITS.get(str(matrix.settings("metric").get("loss_reduction")), "nats"),
        "kinds": kinds,
        "scopes": {kind: scope_of(records, kind) for kind in kinds},
        "words": {kind: words_of(matrix, kind) for kind in kinds},
        "findings": [],
        "effects": None,
        "shared": {},
        "layers": matrix.layers,
        "groups": np.asarray(matrix.groups).tolist(),
        "blocks": [_block(matrix, block) for block in matrix.blocks],
        "matrices": {name or "all": _matrices(matrix, name) for name in (None, *matrix.blocks)},
        "pairs": [[matrix.tasks.index(task) for task in record.tasks] for record in records],
        "pages": [pages.get(record.tasks) for record in records],
        "command": f"qkov report {shlex.quote(matrix.folder)} --pair",
        "counts": base64_of(_counts(records, kinds, matrix.blocks), "<i4"),
        "totals": {optimizer: _totals(records, optimizer) for optimizer in OPTIMIZERS} if matrix.verdict else None,
    }


def _matrices(matrix: TaskMatrix, block: str | None) -> dict[str, str]:
    """[task, task] of all heads or of a block: sums of changes, means of others."""
    known = [name for name in MATRIX_KEYS if all(name in of for of in matrix.values.values())]
    found = {
        name: matrix.total(name, block) if name.startswith("change") else matrix.average(name, block) for name in known
    }
    return {name: base64_of(values, "<f4") for name, values in found.items() if np.isfinite(values).any()}


def _block(matrix: TaskMatrix, block: str) -> dict[str, Any]:
    """One block by head: in how many pairs it shows what, and, where that is little, in which."""
    mask = matrix.present[block]
    apart = ~np.eye(len(matrix.tasks), dtype=bool)
    arrays = {"score": np.where(mask, matrix.values[block]["mean"][apart].mean(0), np.nan)}
    for kind in kinds_of(matrix):
        for sign, word in zip(SIGNS, ("above", "below"), strict=True):
            arrays[f"{kind}_{word}"] = np.where(mask, heads_in(matrix.records, kind, sign, block), np.nan)
    num_heads = sum(of.size for of in matrix.present.values())
    codes = _codes(matrix.records, block) if num_heads * len(matrix.records) <= MOST_CODES else None
    return {
        "name": block,
        "axis": HEAD_DIM[block].replace("_", " "),
        "heads": matrix.natives(block),
        "values": {name: base64_of(values, "<f4") for name, values in arrays.items()},
        "marks": None,
        "effects": {},
        "pairs": None,
        "codes": None if codes is None else base64_of(codes, "i1"),
    }


def _codes(records: Sequence[PairRecord], block: str) -> Any:
    """int8 [pair, layer, native head]: for each kind a digit to base 3, 1 above, 2 below."""
    return np.stack(
        [
            np.sum([3 ** KINDS.index(kind) * np.mod(codes[block], 3) for kind, codes in record.codes.items()], axis=0)
            for record in records
        ]
    )


def _counts(records: Sequence[PairRecord], kinds: Sequence[str], blocks: Sequence[str]) -> list[Any]:
    """[pair, kind, sign, block]: how many heads."""
    return [
        [[[record.count(kind, sign, block) for block in blocks] for sign in SIGNS] for kind in kinds]
        for record in records
    ]


def _totals(records: Sequence[PairRecord], optimizer: str) -> dict[str, str]:
    """By pair: the total, its interval and q; practical steps on, and losses of, both; what it says."""
    rows = {name: base64_of(column, "<f4") for name, column in _columns(records, optimizer)}
    verdicts = {"own": [r.direction(optimizer) for r in records], "held": [r.verdict(optimizer) for r in records]}
    return rows | {name: base64_of([_DIRECTIONS[one] for one in of], "<f4") for name, of in verdicts.items()}


def _columns(records: Sequence[PairRecord], optimizer: str) -> Iterator[tuple[str, list[float]]]:
    totals = [record.totals[optimizer] for record in records]
    yield "change", [of.total.change for of in totals]
    yield "low", [of.total.interval[0] for of in totals]
    yield "high", [of.total.interval[1] for of in totals]
    yield "q", [of.q_value for of in totals]
    for place, name in enumerate("ab"):
        yield f"step_{name}", [of.steps[place] for of in totals]
        yield f"loss_{name}", [of.losses[place] for of in totals]
